"""Was it computed so? Updates are made again and compared with what a run says of them.

`replay` checks updates of a run directory against its trace. The answer is yes, no with the first difference, or that
it cannot be checked here and why. `recompute_update` keeps every tensor of one update, `state_again` the state after
an update.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perceiver.loss import Loss
from perceiver.model import Perceiver
from train.anatomy import Anatomy, copies, watch_update
from train.batches import StageBatches, stage_data
from train.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from train.config import Recipe, read_object, recipe_from_dict
from train.data import StageData
from train.determinism import EnvironmentRefused, Machine, enter
from train.optim import build_optimizer, learning_rate, load_optimizer_state
from train.progress import progress_bar
from train.rundir import read_log
from train.starting_point import begun_with
from train.step import update
from train.trace import Line, Trace, digest, in_order, state_tensors, tensor_digests


class CannotCheck(RuntimeError):
    """Nothing was found wrong and nothing can be said: says why."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer. agrees: True yes, False no, None cannot be checked here. lines: what was checked, and the reason."""

    agrees: bool | None
    sentence: str
    lines: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return {True: 0, False: 1, None: 2}[self.agrees]


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """An update that was made again. origin: from what; notes: how it differs from what the run says of it."""

    tensors: Anatomy
    origin: str
    notes: tuple[str, ...]


class Differs(Exception):
    """The first difference."""


def replay(
    run_dir: str | Path,
    step: int,
    *,
    steps: int = 1,
    start_from: Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Verdict:
    """Make the updates of a run that end with `step` again and compare them with its trace.

    Args:
        run_dir: a run; the updates begin at the nearest checkpoint that is old enough, or where the run began.
        step: the last update to check.
        steps: how many updates before and with it are checked.
        start_from: the file that the run began with, where it did not begin with initial weights.
        device: where; None takes the run's own kind of device.
        progress: show a bar, on a terminal.
    Returns:
        Yes, no with the first difference, or why it cannot be checked: no such update or checkpoint, or this machine
        computes other bits.
    Raises:
        ValueError: steps is below 1, or a file of the run is damaged.
    Determinism: depends on the run directory and the machine only.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    path = Path(run_dir)
    try:
        run = _Run(path)
        missing = [s for s in range(step - steps + 1, step + 1) if s not in run.by_step]
        if missing:
            raise CannotCheck(f"the trace of {path} has no step {missing[0]}")
        past, name = run.nearest_past(step - steps, start_from=start_from, device=device, progress=progress)
        begun = past.step
        past.check_begin(run.trace)
        for line in past.updates(step):
            check_line(line, run.by_step[line["step"]], past, run.trace)
    except CannotCheck as reason:
        return Verdict(agrees=None, sentence=f"step {step:,} of {path} cannot be checked here: {reason}")
    except Differs as difference:
        return Verdict(agrees=False, sentence=f"no, {path} was not computed so: {difference}")
    note = f"recomputed steps {begun + 1:,} to {step:,} from {name}: every value and digest of the trace is the same"
    return Verdict(agrees=True, sentence=f"yes, step {step:,} of {path} was computed so", lines=(note,))


def recompute_update(
    run_dir: str | Path,
    step: int,
    *,
    start_from: Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Recomputed:
    """Make update `step` of a run again, from the nearest state before it, and keep every tensor of it.

    `start_from`, `device` and `progress` as for `replay`.

    Raises:
        CannotCheck: there is no such checkpoint, the rows are not there, this machine computes other bits, or an update
            on the way is not what the trace says, so that the state before `step` would not be the run's.
    """
    run, notes = _Run(Path(run_dir)), []
    last = run.recipe.stages[-1].until
    if not 1 <= step <= last:
        raise CannotCheck(f"{run_dir} has no step {step:,}: its recipe has 1 to {last:,}")
    past, name = run.nearest_past(step - 1, start_from=start_from, device=device, progress=progress)
    try:
        past.check_begin(run.trace)
    except Differs as difference:
        # a run may have gone on from a damaged state, and then it differs by that
        notes.append(str(difference))
    try:
        for line in past.updates(step - 1):
            check_line(line, run.by_step.get(line["step"], line), past, run.trace)
        before = copies(past.state())
        with watch_update(past.model) as seen:
            (line,) = past.updates(step)
    except Differs as difference:
        raise CannotCheck("; ".join([*notes, str(difference)])) from difference
    try:
        check_line(line, run.by_step.get(step, line), past, run.trace)
        if which := past.which_tensor(run.trace):
            raise Differs(f"the state after step {step:,} is another one{which}")
    except Differs as difference:
        notes.append(str(difference))
    # the total is the sum of the terms after it
    terms = [*Loss._fields[1:], "loss"]
    seen["loss"] = {term: torch.tensor(float.fromhex(line[term])) for term in terms}
    seen["gradient"]["norm"] = torch.tensor(float.fromhex(line["grad_norm"]))
    return Recomputed(
        tensors={**seen, "before": before, "after": copies(past.state())}, origin=name, notes=tuple(notes)
    )


def state_again(run_dir: str | Path, step: int, *, most: int, progress: bool = False) -> tuple["Past", str]:
    """Make the state of a run after update `step` again, from the nearest state that is there.

    Args:
        most: updates that this may take.
        progress: show a bar, on a terminal.
    Returns:
        The model and the optimizer, and what they were made from.
    Raises:
        CannotCheck: no state is near enough, the rows are not there, or the updates are not what the trace says.
    """
    run = _Run(Path(run_dir))
    past, name = run.nearest_past(step, progress=progress)
    begun = past.step
    if step - begun > most:
        raise CannotCheck(f"the nearest state, {name}, is {step - begun:,} updates before it")
    try:
        past.check_begin(run.trace)
        for line in past.updates(step):
            check_line(line, run.by_step.get(line["step"], {}), past, run.trace)
    except Differs as difference:
        raise CannotCheck(f"made with the code here, {difference}") from difference
    return past, f"{name}, step {begun:,}"


def initial_weights(run_dir: str | Path) -> dict[str, torch.Tensor]:
    """Draw the weights that a run began with again.

    Raises:
        CannotCheck: they came from a file, or the directory lacks what says so.
    """
    run = _Run(Path(run_dir))
    start = run.start or {"from": {}}
    if start["from"] is not None:
        raise CannotCheck(f"it began with the weights of {start['from'].get('file', 'an unknown file')}")
    return copies(Perceiver(run.recipe.model, seed=run.recipe.seed).state_dict())


class Past:
    """A model and an optimizer that make the updates of a run again."""

    def __init__(
        self, recipe: Recipe, machine: Machine, rows: Mapping[int, Mapping[str, Any]], *, progress: bool = False
    ):
        self.recipe, self.machine, self._rows, self._progress = recipe, machine, rows, progress
        self._loaded: tuple[str, StageData] | None = None

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Take a checkpoint's state, or the initial one."""
        self.model = Perceiver(self.recipe.model, seed=self.recipe.seed).to(self.machine.device)
        self.optimizer = build_optimizer(self.model, self.recipe.optim, impl=self.machine.impl)
        self.step = 0
        self._begun = "the initial weights"
        if checkpoint:
            self.model.load_state_dict(checkpoint.model)
            if checkpoint.optimizer:
                load_optimizer_state(self.optimizer, checkpoint.optimizer)
            self.step = checkpoint.step
            self._begun = f"the checkpoint of step {self.step:,}"

    def check_begin(self, trace: Sequence[Line]) -> None:
        """Compare the state that the past begins with with what the trace says of it."""
        said = [line["state"] for line in trace if line["step"] == self.step and "state" in line]
        if said and said[0] != (found := digest(self.state())):
            raise Differs(f"{self._begun}: its digest is {found}, the trace says {said[0]}{self.which_tensor(trace)}")

    def state(self):
        return state_tensors(self.model.state_dict(), self.optimizer.state_dict())

    def updates(self, until: int) -> Iterator[Line]:
        """Make the updates after the current one up to `until`; yield the trace's line of each."""
        title, total = f"making steps {self.step + 1:,} to {until:,} again", until - self.step
        with progress_bar(title=title, total=total, unit="step", show=self._progress and total > 0) as bar:
            for line in self._updates(until):
                bar.update()
                yield line

    def _updates(self, until: int) -> Iterator[Line]:
        lines: list[Line] = []
        trace = Trace(self.recipe, lines.extend)
        while self.step < until:
            number = next(i for i, s in enumerate(self.recipe.stages, start=1) if self.step < s.until)
            stage = self.recipe.stages[number - 1]
            batches = StageBatches(self.recipe, number, self._data(number), self.machine.device)
            while self.step < min(until, stage.until):
                self.step += 1
                result = update(
                    self.model,
                    self.optimizer,
                    batches.at(self.step, impl=self.machine.impl),
                    step=self.step,
                    stage=stage,
                    recipe=self.recipe,
                    machine=self.machine,
                )
                trace.step(self.step, number, result, learning_rate(self.step, stage), self.state)
                trace.flush()
                yield lines.pop()

    def which_tensor(self, trace: Sequence[Line]) -> str:
        """Name the first tensors whose digests differ from those the trace has for this step, if it has any."""
        known = next((x["digests"] for x in trace if x["kind"] == "tensors" and x["step"] == self.step), None)
        if known is None:
            return ""
        found = tensor_digests(self.state())
        names = [name for name in found if found[name] != known.get(name)]
        return f"; first tensor {names[0]}, {len(names)} of {len(found)} differ" if names else ""

    def _data(self, number: int) -> StageData:
        uri = self.recipe.stages[number - 1].data
        if self._loaded is None or self._loaded[0] != uri:
            try:
                self._loaded = uri, stage_data(self.recipe, number, progress=self._progress)
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                raise CannotCheck(f"the rows of {uri} cannot be read: {error}") from error
        data, said = self._loaded[1], self._rows.get(number)
        if said is None:
            raise CannotCheck(f"nothing says with which rows stage {number} was trained")
        for part, rows in (("train_digest", data.train), ("dev_digest", data.dev)):
            if rows.digest != said[part]:
                raise Differs(f"rows of stage {number}, {uri}: their {part} is {rows.digest}, it says {said[part]}")
        return data


def check_line(found: Line, said: Line, past: Past, trace: Sequence[Line]) -> None:
    """Compare the lines of one update, value by value in the order in which they are computed; none may be missing."""
    for name in in_order({**found, **said}):
        a, b = found.get(name, "nothing"), said.get(name, "nothing")
        if a == b:
            continue
        which = past.which_tensor(trace) if name == "state" else ""
        raise Differs(f"step {found['step']:,}, {name}: computed {readable(a)}, it says {readable(b)}{which}")


def readable(value: Any) -> Any:
    """A value of a trace line for people: hexadecimal floats also in decimal."""
    if isinstance(value, str) and re.fullmatch(r"-?0x[01]\.[0-9a-f]*p[+-]\d+", value):
        return f"{float.fromhex(value)!r} ({value})"
    return value


def same_machine(recipe: Recipe, record: Mapping[str, str], device: str | None) -> Machine:
    """Enter the deterministic state and refuse a machine other than the recorded one."""
    try:
        machine = enter(
            threads=recipe.threads,
            precision=record["precision"],
            impl=record["impl"],
            device=device or record["device"],
        )
    except (ValueError, EnvironmentRefused) as error:
        raise CannotCheck(str(error)) from error
    here = machine.record()
    different = [
        f"{name} {record.get(name)}, here {value}" for name, value in here.items() if record.get(name) != value
    ]
    if different:
        raise CannotCheck(f"it was computed with {'; '.join(different)}: other bits are to be expected")
    return machine


def known_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a run; `CannotCheck` where this version of the program has no such values."""
    try:
        return recipe_from_dict(values)
    except ValueError as error:
        raise CannotCheck(f"this version of the program does not know its recipe: {error}") from error


class _Run:
    """A run directory and what its logs say."""

    def __init__(self, path: Path):
        for name in ("config.json", "trace.jsonl", "metrics.jsonl"):
            if not (path / name).is_file():
                raise CannotCheck(f"{path} has no {name}")
        self.path = path
        self.recipe = known_recipe(read_object(path / "config.json"))
        self.trace = read_log(path / "trace.jsonl")
        self.by_step = {line["step"]: line for line in self.trace if line["kind"] == "step"}
        self.start = next((line for line in self.trace if line["kind"] == "start"), None)

    def nearest_past(
        self, before: int, *, start_from: Path | None = None, device: str | None = None, progress: bool = False
    ) -> tuple[Past, str]:
        """A past that begins with the newest usable state of update `before` or earlier, and where that is from."""
        name, checkpoint, record = self._nearest_checkpoint(before) or self._beginning(before, start_from)
        rows = {line["stage"]: line for line in read_log(self.path / "metrics.jsonl") if line["kind"] == "data"}
        past = Past(self.recipe, same_machine(self.recipe, record, device), rows, progress=progress)
        past.begin(checkpoint)
        return past, name

    def _nearest_checkpoint(self, before: int) -> tuple[str, Checkpoint, Mapping[str, str]] | None:
        # one at a time: a run may keep hundreds
        nearest: tuple[str, Checkpoint, Mapping[str, str]] | None = None
        for file in (*sorted(self.path.glob("*.pt")), self.path / "checkpoint.pt.previous"):
            try:
                checkpoint = load_checkpoint(file)
            except CheckpointError:
                continue
            if checkpoint.step <= before and (nearest is None or checkpoint.step > nearest[1].step):
                nearest = file.name, checkpoint, checkpoint.machine
        return nearest

    def _beginning(self, before: int, start_from: Path | None) -> tuple[str, Checkpoint | None, Mapping[str, str]]:
        """What the run began with, which must be the state of update `before` or earlier."""
        log = self.path / "processes.jsonl"
        process = next((line for line in read_log(log) if line["kind"] == "process"), None) if log.is_file() else None
        try:
            if self.start is None:
                raise ValueError("no line of its beginning in its trace")
            if self.start["step"] > before:
                raise ValueError(f"it began at step {self.start['step']:,}")
            if process is None:
                raise ValueError("no log of its processes")
            checkpoint = begun_with(self.start, start_from, self.recipe, process["environment"])
        except ValueError as reason:
            raise CannotCheck(f"{self.path} has no checkpoint of step {before:,} or before, and {reason}") from reason
        return str(start_from) if checkpoint else "the initial weights", checkpoint, process["environment"]
