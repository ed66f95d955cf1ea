"""A run: three stages, one step counter, one loop. The only file that sees the whole recipe.

The state is (weights, optimizer, step); everything else, from the batch to the dropout mask, is a function of the step
and the recipe. A run can therefore stop anywhere and go on from its checkpoint with the bits of a run that never
stopped: its logs are cut back to the checkpoint and written again.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from perceiver.model import Perceiver
from perceiver.score import ScorePool, require_scorer
from train.batches import StageBatches, check_stages, stage_data
from train.certificate import code_files, describe_environment, loaded_cubins, write_certificate
from train.checkpoint import Checkpoint, is_usable, save_checkpoint, tensors_digest
from train.config import Recipe, StageConfig, recipe_to_dict
from train.coverage import describe_coverage
from train.data import StageData
from train.determinism import FP_FUSION, Machine, check_state, enter
from train.evaluate import Evaluation, evaluate, format_scores, write_scores
from train.examples import write_examples
from train.graph import StageUpdates
from train.optim import build_optimizer, learning_rate, load_optimizer_state
from train.progress import print_above_the_bar, progress_bar
from train.pulse import require_finite, require_matching, require_temperatures, stage_named, temperatures
from train.replay import CannotCheck, state_again
from train.rundir import RunDirectory, RunRefused
from train.signals import RunStopped, signals_noted
from train.speed import StepClock
from train.starting_point import StartPoint, load_state, stage_states
from train.step import StepResult, mean_loss
from train.trace import CHECKED_STEPS, Trace, state_tensors


def run(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    start: StartPoint | None = None,
    device: str | None = None,
    graph: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> bool:
    """Train a recipe in a directory, from the newest state that is there, see `load_state`.

    Args:
        recipe: what to train.
        run_dir: made if it is not there; holds one run of one recipe.
        start: partial reproduction, from given weights at the beginning of a stage; ignored once there is a checkpoint.
        device: "cpu", "cuda", "cuda:N"; None takes a GPU where there is one.
        graph: on a GPU, record the updates of a stage into a CUDA graph; the bits are the same without.
        progress: show a bar, on a terminal.
        say: receives lines for people; None prints them above the bar.
    Returns:
        False if the directory already held the complete run, also where some of its states had to be made again.
    Raises:
        ValueError: a stage ahead has too few rows or no learning rate to its end, or its data cannot be had.
        RunRefused: the directory is in use, cannot be written, or holds something else or only a part of a result.
        RunStopped: SIGINT or SIGTERM; the state is saved.
        RunDiverged: a value is not finite, everything goes to the dustbin after a warm-up and 500 updates of a stage,
            or a temperature left its range; what diverged was not saved.
        ImportError: the recipe asks for a score and the package hoho2025 is not installed.
        EnvironmentRefused: the process is not deterministic, see `enter`.
        OSError: the disk refused; the last checkpoint is untouched and the run goes on from it.
    Determinism: weights, optimizer state, metrics.jsonl and trace.jsonl are the same bits for the same recipe, data
        and machine, however often the run was stopped.
    """
    machine = enter(threads=recipe.threads, precision=recipe.precision, impl=recipe.impl, device=device)
    if recipe.evaluate.score:
        require_scorer()
    new = not Path(run_dir).exists()
    if new:
        # what is refused leaves no directory
        check_stages(recipe, recipe.start_of(start.stage - 1) if start else 0)
    directory = RunDirectory(run_dir)
    with directory.locked(), ScorePool(recipe.evaluate.workers) as pool:
        trainer = _Trainer(
            recipe, directory, machine, pool, graph=graph, progress=progress, say=say or print_above_the_bar
        )
        trainer.restore(start)
        if trainer.step == recipe.stages[-1].until:
            trainer.require_results()
            return False
        if not new:
            check_stages(recipe, trainer.step)
        trainer.note_process()
        with signals_noted() as caught:
            for number, stage in enumerate(recipe.stages, start=1):
                if trainer.step < stage.until:
                    with stage_named(number):
                        trainer.train_stage(number, stage, caught)
    return True


class _Trainer:
    """The state of a run and what happens to it."""

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        machine: Machine,
        pool: ScorePool,
        *,
        graph: bool,
        progress: bool,
        say: Callable[[str], None],
    ):
        self.recipe, self.directory, self.machine, self.pool = recipe, directory, machine, pool
        self.graph, self.progress, self.say = graph, progress, say
        self.model = Perceiver(recipe.model, seed=recipe.seed).to(machine.device)
        self.optimizer = build_optimizer(self.model, recipe.optim, impl=machine.impl)
        self.trace = Trace(recipe, lambda lines: directory.extend("trace", lines))
        self.code = code_files()
        self.step = 0
        # of the newest update
        self._result: StepResult | None = None
        self._data: StageData | None = None
        self._data_uri = ""
        self._cubins: dict[str, dict[str, dict[str, int]]] = {}

    def restore(self, start: StartPoint | None) -> None:
        """Take the newest state of the run, or that of `start`, or the initial one; cut the logs back to it."""
        found = load_state(self.directory, self.recipe)
        self.directory.fix_recipe(self.recipe)
        if found:
            checkpoint, why = found
            if checkpoint.machine != self.machine.record():
                raise RunRefused(
                    f"run directory {self.directory.path} was computed with {dict(checkpoint.machine)}, this process "
                    f"has {self.machine.record()}: other arithmetic gives other bits"
                )
            ahead = [number for number, stage in enumerate(self.recipe.stages, 1) if checkpoint.step < stage.until]
            if why or ahead:
                self.say(why or f"{self.directory.path} goes on from step {checkpoint.step:,}, in stage {ahead[0]}")
            self.model.load_state_dict(checkpoint.model)
            load_optimizer_state(self.optimizer, checkpoint.optimizer)
            self.step = checkpoint.step
        elif start:
            self.model.load_state_dict(start.loaded.model.state_dict())
            if start.loaded.optimizer:
                load_optimizer_state(self.optimizer, start.loaded.optimizer)
            self.step = self.recipe.start_of(start.stage - 1)
        stage, origin = (start.stage, start.loaded.record) if start else (1, None)
        if found:
            self._check_origin(stage, origin)
        else:
            if any(self.directory.path.glob("*.jsonl")):
                self.say(f"{self.directory.path} has no checkpoint yet: starts at step {self.step:,}")
            self.directory.clear_logs()
            self.trace.start(self.step, stage, origin, self._state())
        self.directory.cut_logs(self.step)

    def require_results(self) -> None:
        """Make states that a finished run lost again, where that takes few updates; refuse one that lacks a file."""
        lost: dict[str, str] = {}
        for path, step in stage_states(self.directory, self.recipe).items():
            if is_usable(path):
                continue
            what = f"damaged, and is {path.name}.previous now" if path.exists() else "gone"
            try:
                past, origin = state_again(self.directory.path, step, most=CHECKED_STEPS, progress=self.progress)
            except CannotCheck as reason:
                lost[path.name] = str(reason)
            else:
                save_checkpoint(path, self._checkpoint(past.step, past.model, past.optimizer))
                self.say(f"{path} was {what}: made again from {origin}")
        self.directory.require_results(scored=self.recipe.evaluate.score)
        self.directory.require_states(lost)

    def note_process(self) -> None:
        """Log where and with which sources this process computes: what a comparison of runs wants to know."""
        environment = {**describe_environment(self.machine), "fp_fusion": os.environ.get(FP_FUSION)}
        self.directory.append("processes", kind="process", step=self.step, environment=environment, code=self.code)

    def _check_origin(self, stage: int, origin: Mapping[str, Any] | None) -> None:
        """Refuse to go on with a run that began from other weights, or at another stage, than is asked for now."""
        begun = next((line for line in self.directory.read("trace") if line["kind"] == "start"), None)
        if origin is None or begun is None:
            return
        if begun["stage"] != stage or (begun["from"] or {}).get("weights") != origin["weights"]:
            raise RunRefused(
                f"run directory {self.directory.path} holds a run that did not begin at stage {stage} from "
                f"{origin['file']}; take another --name"
            )

    def train_stage(self, number: int, stage: StageConfig, caught: list[int]) -> None:
        """Make the updates from the current step to the stage's end, with all that happens on the way."""
        check_state(self.machine)
        data = self._load(number, stage)
        if caught:
            raise RunStopped(caught[0], self.step)
        batches = StageBatches(self.recipe, number, data, self.machine.device, progress=self.progress)
        updates = StageUpdates(
            self.model,
            self.optimizer,
            batches,
            stage=stage,
            recipe=self.recipe,
            machine=self.machine,
            graph=self.graph,
        )
        first = self.recipe.start_of(number - 1)
        clock = StepClock(self.step)
        if self.step == first and stage.until - CHECKED_STEPS <= first:
            self._save(self.directory.stage_tail(number))
        with self._bar(number, stage, first) as bar:
            while self.step < stage.until:
                try:
                    result = self._result = updates(self.step + 1)
                except ValueError:
                    # an operator refused what a weight has become
                    self._require_healthy()
                    raise
                self.step += 1
                self.trace.step(self.step, number, result, learning_rate(self.step, stage), self._state)
                bar.update()
                if self.step % self.recipe.log_every == 0 or self.step == stage.until:
                    line = self._log(number, stage, result)
                    self.directory.append("speed", **clock.read(self.step, stage.batch, self.machine.device))
                    bar.set_postfix(loss=f"{line['loss']:.3f}", mass=f"{line['mass']:.2f}", refresh=False)
                with clock.paused():
                    self._at(number, stage, data)
                if caught and self.step < self.recipe.stages[-1].until:
                    self._save(self.directory.checkpoint)
                    raise RunStopped(caught[0], self.step)

    def _at(self, number: int, stage: StageConfig, data: StageData) -> None:
        """What is due after this step: evaluation, the stage's end, checkpoints."""
        recipe, step = self.recipe, self.step
        ended = step == stage.until
        checkpoint_due = ended or step % recipe.checkpoint_every == 0
        if checkpoint_due or step == stage.until - CHECKED_STEPS:
            self.trace.tensors(step, number, self._state())
        if ended:
            self._end_stage(number, stage, data)
        elif recipe.evaluate.every and step % recipe.evaluate.every == 0:
            self._evaluate(number, stage, data, scenes=recipe.evaluate.scenes)
        if step == stage.until - CHECKED_STEPS:
            self._save(self.directory.stage_tail(number))
        if recipe.keep_every and step % recipe.keep_every == 0:
            self._save(self.directory.path / f"step{step:06d}.pt")
        if checkpoint_due:
            self._save(self.directory.checkpoint)

    def _end_stage(self, number: int, stage: StageConfig, data: StageData) -> None:
        """Score the whole dev set, keep the stage's weights; after the last stage write the run's results."""
        evaluation = self._evaluate(number, stage, data, scenes=len(data.dev))
        weights = tensors_digest(self.model.state_dict())
        self.directory.append(
            "metrics",
            kind="stage",
            step=self.step,
            stage=number,
            name=stage.name,
            scenes=len(data.dev),
            **(evaluation.summary if evaluation else {}),
            weights=weights,
        )
        self._save(self.directory.stage_checkpoint(number))
        if number == len(self.recipe.stages) and evaluation:
            write_scores(
                self.directory.path,
                evaluation,
                set_name="dev",
                source=str(data.dev.uri),
                postprocess=self.recipe.postprocess,
                checkpoint={"step": self.step, "weights": weights},
            )
            write_examples(
                self.directory.path / "examples.json",
                self.model,
                data.dev.scenes,
                evaluation,
                machine=self.machine,
                postprocess=self.recipe.postprocess,
            )
            self.say(format_scores(evaluation, set_name="dev"))
        if number == len(self.recipe.stages):
            self.trace.flush()
            self._note_kernels()
            write_certificate(self.directory, self.recipe, self.machine, self.code)

    def _evaluate(self, number: int, stage: StageConfig, data: StageData, *, scenes: int) -> Evaluation | None:
        """Log the loss on training and dev scenes without noise, and the score of the first `scenes` dev scenes.

        The losses are always of the first `evaluate.scenes` rows: those of a stage's end fit the curve before it.
        """
        self._require_healthy()
        recipe, count = self.recipe, min(scenes, len(data.dev))
        losses = [
            mean_loss(self.model, rows, recipe=recipe, machine=self.machine, endpoint_weight=stage.endpoint_weight)
            for rows in (data.train.rows, data.dev.rows)
        ]
        evaluation = None
        if recipe.evaluate.score:
            last = number == len(recipe.stages) and self.step == stage.until
            evaluation = evaluate(
                self.model,
                data.dev.scenes[:count],
                machine=self.machine,
                batch=recipe.evaluate.batch,
                postprocess=recipe.postprocess,
                pool=self.pool,
                yardsticks=last,
            )
        self.directory.append(
            "metrics",
            kind="eval",
            step=self.step,
            stage=number,
            scenes=count,
            train_loss=losses[0],
            dev_loss=losses[1],
            # a loss that has collapsed may be 0
            ratio=losses[1] / losses[0] if losses[0] else None,
            **(evaluation.summary if evaluation else {}),
        )
        score = f", HSS {evaluation.summary['hss_mean']:.3f} on {count} dev scenes" if evaluation else ""
        of = f"of up to {recipe.evaluate.scenes} scenes each"
        self.say(f"step {self.step:,}: train loss {losses[0]:.3f}, dev loss {losses[1]:.3f} {of}{score}")
        return evaluation

    def _log(self, number: int, stage: StageConfig, result: StepResult) -> dict[str, float]:
        """Write the metrics of this step; stop a run that has nothing left to learn from."""
        self.trace.flush()
        line = {name: float(value) for name, value in result.loss._asdict().items()}
        line["loss"] = line.pop("total")
        line["grad_norm"] = float(result.grad_norm)
        line["lr"] = learning_rate(self.step, stage)
        least, line["tau"] = temperatures(self.model)
        self.directory.append("metrics", kind="train", step=self.step, stage=number, **line)
        require_finite(self.step, result, {})
        require_temperatures(self.step, least, line["tau"])
        require_matching(self.step, line["mass"], begun=self.recipe.start_of(number - 1), warmup=stage.warmup)
        return line

    def _require_healthy(self) -> None:
        """Refuse a state, or an update that led to it, that training cannot go on from."""
        require_finite(self.step, self._result, self.model.state_dict())
        require_temperatures(self.step, *temperatures(self.model))

    def _load(self, number: int, stage: StageConfig) -> StageData:
        """Load the stage's rows, note them in the metrics, and refuse rows that changed since the run began."""
        if self._data is None or self._data_uri != stage.data:
            # the rows of the stage before make room first, also on the device
            self._data = None
            self._data = stage_data(self.recipe, number, progress=self.progress)
            self._data_uri = stage.data
            self.say(self._data.describe())
            self.say(describe_coverage(stage.data, self._data.dev.scenes))
        data = self._data
        first_step = self.recipe.start_of(number - 1) + 1
        line = {"uri": stage.data, "train_digest": data.train.digest, "dev_digest": data.dev.digest}
        line |= asdict(data.counts)
        noted = [x for x in self.directory.read("metrics") if x["kind"] == "data" and x["step"] == first_step]
        if not noted:
            self.directory.append("metrics", kind="data", step=first_step, stage=number, **line)
        elif noted[0]["train_digest"] != data.train.digest or noted[0]["dev_digest"] != data.dev.digest:
            raise RunRefused(f"{stage.data} holds other rows than when this run began: its digest is another one")
        return data

    def _state(self) -> dict[str, torch.Tensor]:
        return state_tensors(self.model.state_dict(), self.optimizer.state_dict())

    def _note_kernels(self) -> None:
        """Log the machine code that this process ran. What a killed one ran is in its log, or is run again."""
        if self.machine.device.type == "cuda" and self.machine.impl == "triton":
            cubins = loaded_cubins(torch.cuda.current_device())
            if cubins != self._cubins:
                self.directory.append("processes", kind="kernels", step=self.step, cubins=cubins)
            self._cubins = cubins

    def _save(self, path: Path) -> None:
        self._require_healthy()
        self.trace.flush()
        self._note_kernels()
        self.directory.flush_logs()
        save_checkpoint(path, self._checkpoint(self.step, self.model, self.optimizer))

    def _checkpoint(self, step: int, model: Perceiver, optimizer: torch.optim.Optimizer) -> Checkpoint:
        return Checkpoint(
            step=step,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            recipe=recipe_to_dict(self.recipe),
            machine=self.machine.record(),
        )

    def _bar(self, number: int, stage: StageConfig, first: int):
        title, total = f"stage {number}/{len(self.recipe.stages)} {stage.name}", stage.until - first
        initial = self.step - first
        return progress_bar(title=title, total=total, initial=initial, unit="step", leave=True, show=self.progress)
