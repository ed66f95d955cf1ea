"""Was it computed so? Updates are made again and compared with what a run or its certificate says of them.

`replay` checks updates of a run directory, `verify` a certificate: the first 20 updates of the run and the last 20 of
each stage, the latter from `stage<k>_tail.pt` beside it. The answer is yes, no with the first difference, or that it
cannot be checked here and why.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceiver.model import Perceiver
from train.batches import StageBatches, stage_data
from train.certificate import CertificateError, code_digest, read_certificate
from train.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from train.config import Recipe, recipe_from_dict
from train.data import StageData
from train.determinism import EnvironmentRefused, Machine, enter
from train.optim import build_optimizer, learning_rate, load_optimizer_state
from train.rundir import read_log
from train.step import update
from train.trace import Line, Trace, digest, state_tensors, tensor_digests


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


class _Differs(Exception):
    """The first difference."""


def replay(run_dir: str | Path, step: int, *, steps: int = 1, device: str | None = None) -> Verdict:
    """Make the updates of a run that end with `step` again and compare them with its trace.

    Args:
        run_dir: a run; the updates begin at the nearest checkpoint that is old enough, or at the initial weights.
        step: the last update to check.
        steps: how many updates before and with it are checked.
        device: where; None takes the run's own kind of device.
    Returns:
        Yes, no with the first difference, or why it cannot be checked: no such update or checkpoint, or this machine
        computes other bits.
    Determinism: depends on the run directory and the machine only.
    """
    path = Path(run_dir)
    try:
        recipe, trace = _read_run(path)
        by_step = {line["step"]: line for line in trace if line["kind"] == "step"}
        begin = step - steps
        missing = [s for s in range(begin + 1, step + 1) if s not in by_step]
        if missing or steps < 1:
            raise CannotCheck(f"the trace of {path} has no step {missing[0] if missing else step}")
        name, checkpoint, machine = _nearest_state(path, recipe, trace, begin, device)
        past = _Past(recipe, machine, _rows_of_run(path))
        past.begin(checkpoint, trace)
        for line in past.updates(step):
            _check_line(line, by_step[line["step"]], past, trace)
    except CannotCheck as reason:
        return Verdict(agrees=None, sentence=f"step {step:,} of {path} cannot be checked here: {reason}")
    except _Differs as difference:
        return Verdict(agrees=False, sentence=f"no, {path} was not computed so: {difference}")
    start = checkpoint.step if checkpoint else 0
    note = f"recomputed steps {start + 1:,} to {step:,} from {name}: every value and digest of the trace is the same"
    return Verdict(agrees=True, sentence=f"yes, step {step:,} of {path} was computed so", lines=(note,))


def verify(path: str | Path, *, device: str | None = None) -> Verdict:
    """Recompute what a certificate says of the first 20 updates and of the last 20 of each stage.

    Args:
        path: certificate.json; the ends of stages are checked where their stage<k>_tail.pt lie beside it.
        device: where; None takes the certificate's own kind of device.
    Returns:
        Yes, no with the first difference, or why it cannot be checked here: another processor or GPU, another torch or
        Triton, rows that cannot be had, or a missing checkpoint (what can be checked without it was checked).
    Determinism: depends on the certificate, the files beside it and the machine only.
    """
    path = Path(path)
    done: list[str] = []
    try:
        certificate = read_certificate(path)
        recipe = _known_recipe(certificate["recipe"])
        code, _ = code_digest()
        if code != certificate["code"]["digest"]:
            done.append("note: the code here is not the certificate's; its updates are recomputed with the code here")
        machine = _same_machine(recipe, certificate["environment"], device)
        trace = _trace_beside(path)
        past = _Past(recipe, machine, {row["stage"]: row for row in certificate["data"]})
        missing = _verify_start(certificate, past, trace, done)
        for stage in certificate["stages"]:
            missing += _verify_end(path.parent, stage, past, trace, done)
        if missing:
            raise CannotCheck("; ".join(missing))
    except CertificateError as error:
        contradiction = path.is_file() and "contradicts itself" in str(error)
        start = "no: " if contradiction else "cannot be checked here: "
        return Verdict(agrees=False if contradiction else None, sentence=f"{start}{error}")
    except CannotCheck as reason:
        return Verdict(agrees=None, sentence=f"{path} cannot be checked here: {reason}", lines=tuple(done))
    except _Differs as difference:
        return Verdict(agrees=False, sentence=f"no, {path} does not hold: {difference}", lines=tuple(done))
    return Verdict(agrees=True, sentence=f"yes, {path} holds", lines=tuple(done))


class _Past:
    """A model and an optimizer that make the updates of a run again."""

    def __init__(self, recipe: Recipe, machine: Machine, rows: Mapping[int, Mapping[str, Any]]):
        self.recipe, self.machine, self._rows = recipe, machine, rows
        self._loaded: tuple[str, StageData] | None = None

    def begin(self, checkpoint: Checkpoint | None, trace: Sequence[Line]) -> None:
        """Take a checkpoint's state, or the initial one, and compare it with what the trace says of it."""
        self.model = Perceiver(self.recipe.model, seed=self.recipe.seed).to(self.machine.device)
        self.optimizer = build_optimizer(self.model, self.recipe.optim)
        self.step = 0
        if checkpoint:
            self.model.load_state_dict(checkpoint.model)
            load_optimizer_state(self.optimizer, checkpoint.optimizer)
            self.step = checkpoint.step
        said = [line["state"] for line in trace if line["step"] == self.step and "state" in line]
        if said and said[0] != digest(self.state()):
            what = f"the checkpoint of step {self.step:,}" if checkpoint else "the initial weights"
            raise _Differs(
                f"{what}: its digest is {digest(self.state())}, the trace says {said[0]}{self.which_tensor(trace)}"
            )

    def state(self):
        return state_tensors(self.model.state_dict(), self.optimizer.state_dict())

    def updates(self, until: int) -> Iterator[Line]:
        """Make the updates after the current one up to `until`; yield the trace's line of each."""
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
                    batches.at(self.step),
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
                self._loaded = uri, stage_data(self.recipe, number)
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                raise CannotCheck(f"the rows of {uri} cannot be read: {error}") from error
        data, said = self._loaded[1], self._rows[number]["train_digest"]
        if data.train.digest != said:
            raise _Differs(f"rows of stage {number}, {uri}: their digest is {data.train.digest}, it says {said}")
        return data


def _check_line(found: Line, said: Line, past: _Past, trace: Sequence[Line]) -> None:
    """Compare the lines of one update, value by value in the order in which they are computed."""
    for name in [*(name for name in found if name not in ("loss", "state")), "loss", "state"]:
        a, b = found.get(name), said.get(name)
        if a == b or name not in said:
            continue
        which = past.which_tensor(trace) if name == "state" else ""
        raise _Differs(f"step {found['step']:,}, {name}: computed {readable(a)}, it says {readable(b)}{which}")


def readable(value: Any) -> Any:
    """A value of a trace line for people: hexadecimal floats also in decimal."""
    if isinstance(value, str) and "0x" in value:
        return f"{float.fromhex(value)!r} ({value})"
    return value


def _verify_start(certificate: Mapping[str, Any], past: _Past, trace: Sequence[Line], done: list[str]) -> list[str]:
    """Check the first updates; return why they cannot be."""
    start, lines = certificate["start"], certificate["first"]
    if start["from"]:
        return [f"the run began with the weights of {start['from'].get('file')}, which are not here"]
    past.begin(None, [start, *trace])
    for found, said in zip(past.updates(lines[-1]["step"]), lines, strict=True):
        _check_line(found, said, past, trace)
    done.append(f"steps 1 to {lines[-1]['step']:,}: every value the same")
    return []


def _verify_end(
    directory: Path, stage: Mapping[str, Any], past: _Past, trace: Sequence[Line], done: list[str]
) -> list[str]:
    """Check the last updates of a stage from the state before them; return why they cannot be."""
    file = directory / f"stage{stage['stage']}_tail.pt"
    if not file.is_file():
        return [f"{file.name} is missing: the end of stage {stage['stage']} was not recomputed"]
    try:
        checkpoint = load_checkpoint(file)
    except CheckpointError as error:
        raise _Differs(str(error)) from error
    if checkpoint.step != stage["tail"]["step"]:
        raise _Differs(f"{file.name} is of step {checkpoint.step:,}, the certificate says {stage['tail']['step']:,}")
    past.begin(checkpoint, [{"kind": "step", **stage["tail"]}, *trace])
    for found, said in zip(past.updates(stage["step"]), stage["last"], strict=True):
        _check_line(found, said, past, trace)
    done.append(
        f"steps {checkpoint.step + 1:,} to {stage['step']:,}, end of stage {stage['stage']}: every bit the same"
    )
    return []


def _same_machine(recipe: Recipe, record: Mapping[str, str], device: str | None) -> Machine:
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


def _read_run(path: Path) -> tuple[Recipe, list[Line]]:
    for name in ("config.json", "trace.jsonl", "metrics.jsonl"):
        if not (path / name).is_file():
            raise CannotCheck(f"{path} has no {name}")
    return _known_recipe(json.loads((path / "config.json").read_text())), read_log(path / "trace.jsonl")


def _known_recipe(values: Mapping[str, Any]) -> Recipe:
    try:
        return recipe_from_dict(values)
    except ValueError as error:
        raise CannotCheck(f"this version of the program does not know its recipe: {error}") from error


def _rows_of_run(path: Path) -> dict[int, Mapping[str, Any]]:
    return {line["stage"]: line for line in read_log(path / "metrics.jsonl") if line["kind"] == "data"}


def _nearest_state(
    path: Path, recipe: Recipe, trace: Sequence[Line], before: int, device: str | None
) -> tuple[str, Checkpoint | None, Machine]:
    """The newest usable checkpoint of update `before` or earlier, or the initial weights."""
    found: list[tuple[str, Checkpoint]] = []
    for file in (*sorted(path.glob("*.pt")), path / "checkpoint.pt.previous"):
        try:
            checkpoint = load_checkpoint(file)
        except CheckpointError:
            continue
        if checkpoint.step <= before:
            found.append((file.name, checkpoint))
    if found:
        name, checkpoint = max(found, key=lambda item: item[1].step)
        return name, checkpoint, _same_machine(recipe, checkpoint.machine, device)
    start = next((line for line in trace if line["kind"] == "start"), None)
    if start is None or start["from"]:
        raise CannotCheck(f"{path} has no checkpoint of step {before:,} or before, and began with weights of a file")
    newest = path / "checkpoint.pt"
    record = load_checkpoint(newest).machine if newest.is_file() else None
    if record is None:
        raise CannotCheck(f"{path} has no checkpoint, so nothing says what computed it")
    return "the initial weights", None, _same_machine(recipe, record, device)


def _trace_beside(certificate: Path) -> list[Line]:
    """The trace of the run that left the certificate, where it is there: it names tensors."""
    path = certificate.with_name("trace.jsonl")
    return read_log(path) if path.is_file() else []
