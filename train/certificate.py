"""certificate.json: what a stranger needs to check a run in minutes, written when its last stage ends.

Format 2 is one JSON object:

    format        2
    recipe        the resolved recipe
    environment   device, precision, impl, threads, fingerprint (what bits may depend on; runs are compared by it),
                  and for the reader torch, triton, python, cpu capability, gpu
    code          files: {path: SHA-256} of the sources of kernels, perceiver, train and configs, as the process found
                  them that ended the run; digest: of all of them
    kernels       cubins: {kernel: {SHA-256 of its machine code: warps, stages and shared bytes of its launch}} of all
                  that the run launched, or null with `why`
    start         the first line of the trace: the state before the first update, and the file it came from
    data          per stage uri, train_digest, dev_digest (SHA-256 of the rows in their order) and what became of rows
    first         the trace lines of the first 20 updates, or of all of the first stage where it is shorter
    stages        per stage: stage, name, step (its end), weights (SHA-256), state (digest of weights and optimizer),
                  tail (step and state of stage<k>_tail.pt, 20 updates before the end), last (trace lines after it),
                  parents: digests of what the state was computed from: the state before, recipe, code, data
    scores        the scores of the last stage's weights on its dev set, or null

Digests of states and the form of trace lines are those of `train.trace`. `python -m train verify certificate.json`
checks it. Nothing in it varies between two runs of one recipe on one kind of machine.
"""

import hashlib
import json
import platform
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import write_atomically
from train.config import ROOT, Recipe, read_object, recipe_to_dict
from train.determinism import Machine, triton_version
from train.rundir import RunDirectory
from train.sources import SourceUri
from train.trace import CHECKED_STEPS, Line, tail_of

FORMAT = 2
_ROOMS = ("configs", "kernels", "perceiver", "train")
_SOURCES = (".py", ".json", ".txt", ".html")
# SHF_ALLOC and SHT_NOBITS of the ELF format
_ALLOCATED, _WITHOUT_BYTES = 2, 8


_KEYS = ("format", "recipe", "environment", "code", "kernels", "start", "data", "first", "stages", "scores")
_STAGE_KEYS = ("stage", "name", "step", "weights", "state", "tail", "last", "parents")


class CertificateError(ValueError):
    """A certificate that cannot be read: says why."""


class Contradiction(CertificateError):
    """A certificate that contradicts itself: says where."""


def write_certificate(
    directory: RunDirectory, recipe: Recipe, machine: Machine, code: Mapping[str, str]
) -> dict[str, Any]:
    """Write certificate.json from the logs of a run whose last stage has ended, and return it.

    Args:
        code: `code_files` when the process began: sources may be edited while it runs.
    Raises:
        CertificateError: the logs lack a line that it needs.
        OSError: the disk refused.
    """
    metrics, trace = directory.read("metrics"), directory.read("trace")
    digest = value_digest(code)
    start = _only(trace, kind="start")
    stages: list[dict[str, Any]] = []
    data = [{k: v for k, v in line.items() if k not in ("kind", "step")} for line in metrics if line["kind"] == "data"]
    for number, stage in enumerate(recipe.stages[start["stage"] - 1 :], start=start["stage"]):
        tail = tail_of(recipe, number)
        before = stages[-1]["state"] if stages else start["state"]
        rows = next(line for line in data if line["stage"] == number)
        stages.append(
            {
                "stage": number,
                "name": stage.name,
                "step": stage.until,
                "weights": _only(metrics, kind="stage", stage=number)["weights"],
                "state": _only(trace, kind="step", step=stage.until)["state"],
                "tail": {"step": tail, "state": _state_at(trace, tail)},
                "last": _updates(trace, tail, stage.until),
                "parents": {
                    "state": before,
                    "recipe": value_digest(recipe_to_dict(recipe)),
                    "code": digest,
                    "data": value_digest(rows),
                },
            }
        )
    first_end = min(start["step"] + CHECKED_STEPS, stages[0]["step"])
    certificate = {
        "format": FORMAT,
        "recipe": recipe_to_dict(recipe),
        "environment": describe_environment(machine),
        "code": {"digest": digest, "files": dict(code)},
        "kernels": describe_kernels(machine, directory.read("processes")),
        "start": start,
        "data": data,
        "first": _updates(trace, start["step"], first_end),
        "stages": stages,
        "scores": _scores(directory.path / "scores.json", recipe, stages[-1]["weights"]),
    }
    write_atomically(directory.path / "certificate.json", (json.dumps(certificate, indent=1) + "\n").encode())
    return certificate


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a certificate and check that it is whole, and that the parents of its stages are what it says elsewhere.

    Raises:
        CertificateError: it is not there, is no certificate, or is of another format.
        Contradiction: it contradicts itself.
    """
    try:
        certificate = json.loads(path.read_text())
        if certificate["format"] != FORMAT:
            raise CertificateError(f"{path} is a certificate of format {certificate['format']}, known is {FORMAT}")
        _check_form(certificate)
        wrong = _contradiction(certificate)
    except CertificateError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CertificateError(f"{path} is not a certificate: {type(error).__name__} {error}") from error
    if wrong:
        raise Contradiction(f"{path} contradicts itself: {wrong}")
    return certificate


def check_extent(path: Path, certificate: Mapping[str, Any], recipe: Recipe) -> None:
    """Check that a certificate has lines of the very updates and stages that its recipe and its start ask for.

    Raises:
        CertificateError: a part of it has another form.
        Contradiction: lines are missing, or of others.
    """
    try:
        said = _said_extent(certificate)
        start, numbers = certificate["start"], range(certificate["start"]["stage"], len(recipe.stages) + 1)
        if start["stage"] < 1 or not numbers or (start["stage"] > 1 and not start["from"]):
            raise Contradiction(f"{path} contradicts itself: no run of its recipe begins at stage {start['stage']}")
    except (KeyError, TypeError, AttributeError) as error:
        raise CertificateError(f"{path} is not a certificate: {type(error).__name__} {error}") from error
    step, ends = recipe.start_of(start["stage"] - 1), {n: recipe.stages[n - 1].until for n in numbers}
    implied = {
        "start": step,
        "first": list(range(step + 1, min(step + CHECKED_STEPS, ends[start["stage"]]) + 1)),
        "data": [(n, recipe.stages[n - 1].data) for n in numbers],
        "stages": [(n, recipe.stages[n - 1].name, ends[n]) for n in numbers],
        "tails": [tail_of(recipe, n) for n in numbers],
        "last": [list(range(tail_of(recipe, n) + 1, ends[n] + 1)) for n in numbers],
    }
    for name, value in implied.items():
        if said[name] != value:
            raise Contradiction(
                f"{path} contradicts itself: by its recipe its {name} must be {value}, it has {said[name]}"
            )


def code_files(root: Path = ROOT) -> dict[str, str]:
    """Return path and SHA-256 of all sources of a run, sorted, wherever they lie."""
    paths = (path for room in _ROOMS for path in (root / room).rglob("*"))
    found = {x.relative_to(root).as_posix(): x for x in paths if x.suffix in _SOURCES and x.is_file()}
    return {name: hashlib.sha256(found[name].read_bytes()).hexdigest() for name in sorted(found)}


def value_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe_environment(machine: Machine) -> dict[str, Any]:
    """Where a run was computed: what its bits may depend on, and what the reader wants to know."""
    return {
        **machine.record(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else None,
    }


def describe_kernels(machine: Machine, noted: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The machine code that ran in all processes of a run.

    Args:
        noted: lines of the run's log `processes`; those of kind "kernels" hold what `loaded_cubins` found.
    """
    if machine.device.type != "cuda":
        return {"cubins": None, "why": "no kernel ran on a GPU"}
    if machine.impl != "triton":
        return {"cubins": None, "why": f"the run computed with impl {machine.impl!r}"}
    found: dict[str, dict[str, Any]] = {}
    for line in noted:
        for name, cubins in line["cubins"].items() if line["kind"] == "kernels" else ():
            found.setdefault(name, {}).update(cubins)
    return {"cubins": {name: dict(sorted(found[name].items())) for name in sorted(found)}}


def loaded_cubins(device: int) -> dict[str, dict[str, dict[str, int]]]:
    """Return, for each Triton kernel of the package `kernels` that this process has for a device, its machine code.

    Returns:
        {kernel: {`machine_code_digest`: {"warps", "stages", "shared_bytes"} of the launch}}, sorted.
    """
    from triton.runtime.jit import JITFunction

    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, module in sorted(sys.modules.items()):
        for function in list(vars(module).values()) if name.startswith("kernels.") else ():
            if isinstance(function, JITFunction) and device in function.device_caches:
                for compiled in function.device_caches[device][0].values():
                    launch = compiled.metadata
                    options = {"warps": launch.num_warps, "stages": launch.num_stages, "shared_bytes": launch.shared}
                    found.setdefault(function.__name__, {})[machine_code_digest(compiled.asm["cubin"])] = options
    return {name: dict(sorted(cubins.items())) for name, cubins in sorted(found.items())}


def machine_code_digest(cubin: bytes) -> str:
    """Return the SHA-256 of what a GPU loads of a cubin: names and bytes of the sections that take memory there.

    The rest of the file depends on where the sources lie and on their comments: paths, line numbers, the PTX text.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # of an ELF section: name, type, flags, address, offset, bytes
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = cubin[sections[names][4] :]
    digest = hashlib.sha256()
    for name, kind, flags, _, offset, length in sections:
        if flags & _ALLOCATED:
            content = b"" if kind == _WITHOUT_BYTES else cubin[offset : offset + length]
            digest.update(strings[name : strings.index(0, name)] + b" %d\n" % length + content)
    return digest.hexdigest()


def _check_form(certificate: Mapping[str, Any]) -> None:
    """Name the first part that is missing."""
    parts: list[tuple[str, Any, tuple[str, ...]]] = [
        ("it", certificate, _KEYS),
        ("environment", certificate["environment"], ("device", "precision", "impl")),
        ("kernels", certificate["kernels"], ("cubins",)),
        ("start", certificate["start"], ("step", "stage", "from", "state")),
    ]
    if certificate["start"]["from"] is not None:
        parts.append(("where it started from", certificate["start"]["from"], ("file",)))
    rows = ("stage", "uri", "train_digest", "dev_digest")
    parts += [("a line of its data", line, rows) for line in certificate["data"]]
    for stage in certificate["stages"]:
        parts += [("a stage", stage, _STAGE_KEYS), ("the tail of a stage", stage["tail"], ("step", "state"))]
    for where, part, keys in parts:
        if not isinstance(part, Mapping):
            raise ValueError(f"{where} must be an object, got {part!r}")
        if missing := [key for key in keys if key not in part]:
            raise ValueError(f"{where} has no {missing[0]!r}")


def _contradiction(certificate: Mapping[str, Any]) -> str | None:
    """Where it says two things of one."""
    if value_digest(certificate["code"]["files"]) != certificate["code"]["digest"]:
        return "its code has another digest than its files give"
    before, weights = certificate["start"]["state"], None
    for stage in certificate["stages"]:
        rows = next(line for line in certificate["data"] if line["stage"] == stage["stage"])
        said = {
            "state": before,
            "recipe": value_digest(certificate["recipe"]),
            "code": certificate["code"]["digest"],
            "data": value_digest(rows),
        }
        if wrong := [name for name, value in said.items() if stage["parents"][name] != value]:
            return (
                f"stage {stage['stage']} was computed from another {wrong[0]} "
                f"({stage['parents'][wrong[0]]}) than it holds ({said[wrong[0]]})"
            )
        before, weights = stage["state"], stage["weights"]
    scores = certificate["scores"]
    if scores and (scores["checkpoint"] or {}).get("weights") != weights:
        return "its scores are of other weights than those of its last stage"
    return None


def _said_extent(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Which updates and stages a certificate has lines of."""
    stages = certificate["stages"]
    return {
        "start": certificate["start"]["step"],
        "first": [line["step"] for line in certificate["first"]],
        "data": [(line["stage"], line["uri"]) for line in certificate["data"]],
        "stages": [(stage["stage"], stage["name"], stage["step"]) for stage in stages],
        "tails": [stage["tail"]["step"] for stage in stages],
        "last": [[line["step"] for line in stage["last"]] for stage in stages],
    }


def _scores(path: Path, recipe: Recipe, weights: str) -> dict[str, Any] | None:
    """The scores of a run; None where those in its directory are of other weights or rows, as `evaluate` may leave."""
    if not recipe.evaluate.score or not path.is_file():
        return None
    scores = read_object(path)
    ours = (scores["checkpoint"] or {}).get("weights") == weights
    dev = SourceUri.parse(recipe.stages[-1].data).with_part("dev")
    return scores if ours and SourceUri.parse(scores["source"]) == dev else None


def _updates(trace: Iterable[Line], after: int, until: int) -> list[Line]:
    return [line for line in trace if line["kind"] == "step" and after < line["step"] <= until]


def _state_at(trace: list[Line], step: int) -> str:
    """The state's digest after an update, or before the first one."""
    return next(line["state"] for line in reversed(trace) if line["step"] == step and "state" in line)


def _only(lines: Iterable[Mapping[str, Any]], **values: Any) -> dict[str, Any]:
    """The line with these values."""
    for line in lines:
        if values.items() <= line.items():
            return dict(line)
    raise CertificateError(f"the logs of the run have no line with {values}")
