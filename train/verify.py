"""Does a certificate hold? `python -m train verify CERTIFICATE` makes the updates again that it has lines of.

Those are the first 20 updates of the run and the last 20 of each stage. The first begin with the initial weights or, if
the run did, with those of a file, which must be given; the last with the `stage<k>_tail.pt` beside the certificate. The
state that a stage ends with must have the certificate's digests of it, and so must `stage<k>.pt` where it lies there;
`scores.json` must have its scores, unless `evaluate` wrote it later. The updates between, and the scores, are not
computed again, and metrics.jsonl is not looked at. The answer is yes, no with the first difference, or that it cannot
be checked here and why.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from train.certificate import (
    CertificateError,
    Contradiction,
    check_extent,
    code_files,
    loaded_cubins,
    read_certificate,
)
from train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, tensors_digest
from train.config import read_object
from train.determinism import Machine
from train.replay import CannotCheck, Differs, Past, Verdict, check_line, known_recipe, same_machine
from train.rundir import read_log
from train.starting_point import begun_with
from train.trace import Line, digest, state_tensors


def verify(
    path: str | Path, *, start_from: Path | None = None, device: str | None = None, progress: bool = False
) -> Verdict:
    """Recompute what a certificate says of the first 20 updates and of the last 20 of each stage.

    Args:
        path: certificate.json, or the directory it lies in; the ends of stages are checked where their
            stage<k>_tail.pt lie beside it.
        start_from: the file that the run began with, where it did not begin with initial weights.
        device: where; None takes the certificate's own kind of device.
        progress: show bars, on a terminal.
    Returns:
        Yes, no with the first difference, or why it cannot be checked here: another processor or GPU, another torch or
        Triton, rows that cannot be had, or a missing checkpoint (what can be checked without it was checked).
    Determinism: depends on the certificate, the files beside it and the machine only.
    """
    path = Path(path) / "certificate.json" if Path(path).is_dir() else Path(path)
    if not path.exists():
        sentence = f"cannot be checked here: {path} is not there: a run writes it when it is finished"
        return Verdict(agrees=None, sentence=sentence)
    done: list[str] = []
    try:
        certificate = read_certificate(path)
        recipe = known_recipe(certificate["recipe"])
        check_extent(path, certificate, recipe)
        done += _other_code(certificate["code"]["files"])
        done += _other_scores(path.with_name("scores.json"), certificate["scores"])
        machine = same_machine(recipe, certificate["environment"], device)
        trace = _trace_beside(path)
        past = Past(recipe, machine, {row["stage"]: row for row in certificate["data"]}, progress=progress)
        try:
            missing = _verify_start(certificate, start_from, past, trace, done)
            for stage in certificate["stages"]:
                missing += _verify_end(path.parent, stage, past, trace, done)
        finally:
            done += _other_kernels(certificate, machine)
            if certificate["scores"]:
                done.append("note: the scores were not computed again")
            if path.with_name("metrics.jsonl").is_file():
                done.append("note: metrics.jsonl was not looked at")
        if missing:
            raise CannotCheck("; ".join(missing))
    except Contradiction as error:
        return Verdict(agrees=False, sentence=f"no: {error}")
    except CertificateError as error:
        return Verdict(agrees=None, sentence=f"cannot be checked here: {error}")
    except CannotCheck as reason:
        return Verdict(agrees=None, sentence=f"{path} cannot be checked here: {reason}", lines=tuple(done))
    except Differs as difference:
        return Verdict(agrees=False, sentence=f"no, {path} does not hold: {difference}", lines=tuple(done))
    return Verdict(agrees=True, sentence=f"yes, {path} holds", lines=tuple(done))


def _verify_start(
    certificate: Mapping[str, Any], file: Path | None, past: Past, trace: Sequence[Line], done: list[str]
) -> list[str]:
    """Check the first updates, from the file that they began with if they did; return why they cannot be."""
    start, lines = certificate["start"], certificate["first"]
    try:
        state = begun_with(start, file, past.recipe, certificate["environment"])
    except ValueError as reason:
        return [str(reason)]
    past.begin(state)
    past.check_begin([start, *trace])
    for found, said in zip(past.updates(lines[-1]["step"]), lines, strict=True):
        check_line(found, said, past, trace)
    origin = f" from {file}" if file else ""
    done.append(f"steps {start['step'] + 1:,} to {lines[-1]['step']:,}{origin}: every value the same")
    return []


def _verify_end(
    directory: Path, stage: Mapping[str, Any], past: Past, trace: Sequence[Line], done: list[str]
) -> list[str]:
    """Check the last updates of a stage from the state before them; return why they cannot be."""
    name = f"stage{stage['stage']}"
    if ended := _beside(directory / f"{name}.pt", stage["step"]):
        _check_state(f"{name}.pt", ended.model, state_tensors(ended.model, ended.optimizer), stage)
    checkpoint = _beside(directory / f"{name}_tail.pt", stage["tail"]["step"])
    if not checkpoint:
        return [f"{name}_tail.pt is missing: the end of stage {stage['stage']} was not recomputed"]
    past.begin(checkpoint)
    past.check_begin([{"kind": "step", **stage["tail"]}, *trace])
    for found, said in zip(past.updates(stage["step"]), stage["last"], strict=True):
        check_line(found, said, past, trace)
    _check_state(f"the end of stage {stage['stage']}", past.model.state_dict(), past.state(), stage)
    done.append(
        f"steps {checkpoint.step + 1:,} to {stage['step']:,}, end of stage {stage['stage']}: every bit the same"
    )
    return []


def _beside(file: Path, step: int) -> Checkpoint | None:
    """A checkpoint beside the certificate, of the step that it should be of; None where there is none."""
    if not file.is_file():
        return None
    try:
        checkpoint = load_checkpoint(file)
    except CheckpointError as error:
        raise Differs(str(error)) from error
    if checkpoint.step != step:
        raise Differs(f"{file.name} is of step {checkpoint.step:,}, the certificate says {step:,}")
    return checkpoint


def _check_state(
    what: str, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], stage: Mapping[str, Any]
) -> None:
    """Compare the state that a stage ended with with what the certificate says of it."""
    for name, found in (("state", digest(state)), ("weights", tensors_digest(weights))):
        if found != stage[name]:
            raise Differs(f"{what}: the digest of its {name} is {found}, the certificate says {stage[name]}")


def _other_code(files: Mapping[str, str]) -> list[str]:
    """Say which sources are not those that a run was computed with."""
    here = code_files()
    names = [name for name in sorted({**here, **files}) if here.get(name) != files.get(name)]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    others = f"{', '.join(names[:5])}{more}"
    note = f"note: the code here is not the certificate's ({others}); the updates are made with the code here"
    return [note] if names else []


def _other_scores(path: Path, said: Mapping[str, Any] | None) -> list[str]:
    """Compare scores.json with the scores of the certificate; say where it is of a later evaluation."""
    if not said or not path.is_file():
        return []
    try:
        scores = read_object(path)
        if scores["checkpoint"] != said["checkpoint"]:
            return ["note: scores.json is of another evaluation than the certificate's, and was not compared"]
        found, known = _numbers(scores), _numbers(said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Differs(f"scores.json cannot be compared with its scores: {type(error).__name__} {error}") from error
    for name in {**known, **found}:
        if found.get(name) != known.get(name):
            raise Differs(f"scores.json says {name} {found.get(name)}, the certificate {known.get(name)}")
    return []


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """What scores say, by name."""
    yardsticks = scores["yardsticks"].items()
    return (
        {"scenes": scores["scenes"]}
        | scores["summary"]
        | {f"{name} {key}": value for name, summary in yardsticks for key, value in summary.items()}
    )


def _other_kernels(certificate: Mapping[str, Any], machine: Machine) -> list[str]:
    """Say which kernels ran here with machine code that the run did not have."""
    known = certificate["kernels"]["cubins"]
    if known is None or machine.device.type != "cuda":
        return []
    here = loaded_cubins(torch.cuda.current_device())
    names = [name for name, cubins in here.items() if not cubins.keys() <= known.get(name, {}).keys()]
    return [f"note: other machine code than the run's ran here of {', '.join(names)}"] if names else []


def _trace_beside(certificate: Path) -> list[Line]:
    """The trace of the run that left the certificate, where it is there: it names tensors."""
    path = certificate.with_name("trace.jsonl")
    return read_log(path) if path.is_file() else []
