"""Are two runs the same, and if not, where do they part? `python -m train compare A B`.

Compared are metrics.jsonl line by line, trace.jsonl step by step where both have a step, all kept checkpoints of equal
names byte by byte, and, to say why, recipe, data and machine. The first difference names a step and, from the nearest
checkpoints or digests of tensors, the first tensor in forward order: a term of the loss, the norm of the gradient, a
weight, a quantity of the optimizer.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import Checkpoint, load_checkpoint
from train.config import differing_keys
from train.replay import readable
from train.rundir import RunRefused, read_log, whole_lines
from train.trace import Line, state_tensors


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer: a sentence, and the differences it sums up: where the runs part, what may be why, by how much."""

    sentence: str
    differences: tuple[str, ...] = field(default=())

    @property
    def identical(self) -> bool:
        return not self.differences


def compare_runs(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare two runs: their metrics, traces and checkpoints, and what they were computed from.

    A trace is only compared where both runs have one. Checkpoints are those that stay: of stage ends, of the updates
    before them, and of `keep_every`.

    Raises:
        RunRefused: a directory holds no run.
        CheckpointError: a kept checkpoint is damaged.
    """
    a, b = Path(run_a), Path(run_b)
    for path in (a, b):
        if not (path / "metrics.jsonl").is_file():
            raise RunRefused(f"{path} holds no run: it has no metrics.jsonl")
    lines = [whole_lines(path / "metrics.jsonl") for path in (a, b)]
    traces = [read_log(path / "trace.jsonl") if (path / "trace.jsonl").is_file() else [] for path in (a, b)]
    metrics = _first_differing_line(*lines)
    first_step, trace = _first_differing_step(*traces)
    stages = [sorted(p.name for p in path.glob("stage[0-9].pt")) for path in (a, b)]
    differences = [*filter(None, [metrics]), *trace]
    if stages[0] != stages[1]:
        differences.append(
            f"finished stages: {', '.join(stages[0]) or 'none'} against {', '.join(stages[1]) or 'none'}"
        )
    tensors, machines = _differing_checkpoints(a, b)
    if not differences and not tensors:
        steps = sum(line["kind"] == "step" for line in traces[0])
        traced = f"{steps:,} traced steps, " if steps else ""
        return Comparison(
            sentence=f"{a} and {b} are identical: {len(lines[0]):,} lines of metrics, {traced}and the weights and "
            f"optimizer states of {len(stages[0])} stages, every bit"
        )
    causes = [*_differing_recipe(a, b), *machines, *_differing_environment(a, b)]
    where = f"step {first_step:,} is the first that differs: " if first_step is not None else ""
    return Comparison(sentence=f"{where}{a} and {b} differ", differences=(*differences, *causes, *tensors))


def _first_differing_line(a: list[str], b: list[str]) -> str | None:
    """Say where two logs part, and in which values."""
    for left, right in itertools.zip_longest(a, b):
        if left == right:
            continue
        if left is None or right is None:
            line = json.loads(left or right or "")
            return f"metrics: only one run goes on to step {line['step']:,} ({line['kind']})"
        x, y = json.loads(left), json.loads(right)
        keys = [key for key in {**x, **y} if x.get(key) != y.get(key)]
        values = "; ".join(f"{key} {x.get(key)!r} against {y.get(key)!r}" for key in keys)
        return f"metrics: first at step {x['step']:,} ({x['kind']}): {values}"
    return None


def _first_differing_step(a: Sequence[Line], b: Sequence[Line]) -> tuple[int | None, list[str]]:
    """The first step whose values or digests differ, and how; then the first differing digests of tensors."""
    steps = [{(x["kind"], x["step"]): x for x in trace if x["kind"] != "tensors"} for trace in (a, b)]
    for kind, step in sorted(steps[0].keys() & steps[1].keys(), key=lambda key: key[1]):
        x, y = steps[0][kind, step], steps[1][kind, step]
        keys = [key for key in x if key in y and x[key] != y[key]]
        if keys:
            # the loss is the sum of the terms after it, the state comes out of everything before it
            key = min(keys, key=lambda key: (key == "state", key == "loss"))
            first = f"trace: first at step {step:,} ({kind}): {key} {readable(x[key])} against {readable(y[key])}"
            return step, [first, *_first_differing_digests(a, b)]
    ends = [max((step for _, step in x), default=0) for x in steps]
    if steps[0] and steps[1] and ends[0] != ends[1]:
        return None, [f"trace: one run ends at step {ends[0]:,}, the other at step {ends[1]:,}"]
    return None, [*_first_differing_digests(a, b)]


def _first_differing_digests(a: Sequence[Line], b: Sequence[Line]) -> Iterator[str]:
    """Name the first differing tensor from the digests at the nearest checkpoint of both runs."""
    digests = [{x["step"]: x["digests"] for x in trace if x["kind"] == "tensors"} for trace in (a, b)]
    for step in sorted(digests[0].keys() & digests[1].keys()):
        x, y = digests[0][step], digests[1][step]
        names = [name for name in {**x, **y} if x.get(name) != y.get(name)]
        if names:
            yield f"tensors of step {step:,}: first {names[0]}; {len(names)} of {len({**x, **y})} differ"
            return


def _differing_checkpoints(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """What differs in the checkpoints that both runs keep, and in the machines that computed them."""
    patterns = ("stage[0-9]_tail.pt", "stage[0-9].pt", "step*.pt")
    names = {p.name for pattern in patterns for p in a.glob(pattern) if (b / p.name).is_file()}
    found: list[tuple[int, list[str]]] = []
    machines: list[str] = []
    for name in sorted(names):
        x, y = (load_checkpoint(path / name) for path in (a, b))
        tensors = [state_tensors(state.model, state.optimizer) for state in (x, y)]
        found.append((x.step, [f"{name}: {text}" for text in _differing_tensors(*tensors)]))
        machines = machines or _differing_machines(x, y)
    return [text for _, texts in sorted(found, key=lambda item: item[0]) for text in texts], machines


def _differing_machines(a: Checkpoint, b: Checkpoint) -> list[str]:
    keys = [key for key in {**a.machine, **b.machine} if a.machine.get(key) != b.machine.get(key)]
    return [f"machine: {key} {a.machine.get(key)} against {b.machine.get(key)}" for key in keys]


def _differing_recipe(a: Path, b: Path) -> list[str]:
    """The values of the recipes that differ."""
    if not all((path / "config.json").is_file() for path in (a, b)):
        return []
    recipes = [json.loads((path / "config.json").read_text()) for path in (a, b)]
    return [
        f"recipe: {key} {_value(recipes[0], key)!r} against {_value(recipes[1], key)!r}"
        for key in differing_keys(*recipes)
    ]


def _value(values: Any, key: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in key.split("."):
        if isinstance(values, list) and part.isdigit():
            values = values[int(part)] if int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


def _differing_environment(a: Path, b: Path) -> list[str]:
    """What the certificates say differs in code and environment."""
    paths = [path / "certificate.json" for path in (a, b)]
    if not all(path.is_file() for path in paths):
        return []
    x, y = (json.loads(path.read_text()) for path in paths)
    said = [{**c["environment"], "code": c["code"]["digest"], "cubins": c["kernels"]["cubins"]} for c in (x, y)]
    already = {"device", "precision", "impl", "threads", "fingerprint"}
    keys = [key for key in said[0] if key not in already and said[0][key] != said[1].get(key)]
    return [f"environment: {key} {said[0][key]} against {said[1].get(key)}" for key in keys]


def _differing_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """One line per tensor that differs: how many elements, and how much."""
    found = []
    for name in {**a, **b}:
        if name not in a or name not in b:
            found.append(f"{name} is in one run only")
        elif a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            found.append(
                f"{name} is {a[name].dtype} {tuple(a[name].shape)} against {b[name].dtype} {tuple(b[name].shape)}"
            )
        else:
            same = _bytes(a[name]) == _bytes(b[name])
            if not same.all():
                elements = int((~same).reshape(max(a[name].numel(), 1), -1).any(dim=1).sum())
                much = float((a[name].double() - b[name].double()).abs().max())
                found.append(f"{name}: {elements:,} of {a[name].numel():,} elements differ, at most by {much:.3g}")
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
