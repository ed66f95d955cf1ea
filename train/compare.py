"""Are two runs the same, and if not, where do they part? `python -m train compare A B`.

Compared are metrics.jsonl line by line, trace.jsonl step by step where both have a step, all kept checkpoints of equal
names byte by byte, and, to say why, recipe, data, code and machine. The first difference names a step. Where both runs
can be recomputed here from a checkpoint before it, that update is made again in both, and the first differing tensor of
each kind is named in forward order: of the state before it, its rows, activations, terms of the loss, gradients, and of
the state after it. Digests at the nearest checkpoints, and the checkpoints, name tensors of the state in any case.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.anatomy import KINDS, Anatomy, differing_tensors
from train.checkpoint import load_checkpoint
from train.config import differing_keys, read_object
from train.replay import CannotCheck, initial_weights, readable, recompute_update
from train.rundir import RunRefused, kept_states, read_log, whole_lines
from train.trace import Line, in_order, state_tensors


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer: a sentence, and the differences it sums up: where the runs part, what may be why, by how much."""

    sentence: str
    differences: tuple[str, ...] = field(default=())

    @property
    def identical(self) -> bool:
        return not self.differences


def compare_runs(
    run_a: str | Path, run_b: str | Path, *, recompute: bool = True, say: Callable[[str], None] | None = None
) -> Comparison:
    """Compare two runs: their metrics, traces and checkpoints, and what they were computed from.

    A trace is only compared where both runs have one. Checkpoints are those that stay: of stage ends, of the updates
    before them, and of `keep_every`.

    Args:
        recompute: make the first differing update again in both runs, to name the first differing tensor. It takes
            the time of the updates since the nearest checkpoint, and puts the process into the runs' state.
        say: receives a line before each recomputation, which then shows a bar too, on a terminal.
    Raises:
        RunRefused: a directory holds no run, or the two have neither a step nor a checkpoint in common.
        CheckpointError: a kept checkpoint is damaged.
    """
    a, b = Path(run_a), Path(run_b)
    for path in (a, b):
        if not (path / "metrics.jsonl").is_file():
            raise RunRefused(f"{path} holds no run: it has no metrics.jsonl")
    lines = [whole_lines(path / "metrics.jsonl") for path in (a, b)]
    traces = [read_log(path / "trace.jsonl") if (path / "trace.jsonl").is_file() else [] for path in (a, b)]
    metrics = _first_differing_line(*lines)
    first, trace = _first_differing_step(*traces)
    stages = [[name for name in _kept(path) if re.fullmatch(r"stage\d+\.pt", name)] for path in (a, b)]
    differences = [*filter(None, [_scores_at_the_ends(*lines), metrics]), *trace]
    if stages[0] != stages[1]:
        differences.append(
            f"finished stages: {', '.join(stages[0]) or 'none'} against {', '.join(stages[1]) or 'none'}"
        )
    tensors = _differing_checkpoints(a, b)
    steps = len(_steps(traces[0]) & _steps(traces[1]))
    if not differences and not tensors:
        if not steps and not set(_kept(a)) & set(_kept(b)):
            raise RunRefused(f"{a} and {b} cannot be compared: they have no traced step and no checkpoint in common")
        traced = f"{steps:,} traced steps, " if steps else ""
        return Comparison(
            sentence=f"{a} and {b} are identical: {len(lines[0]):,} lines of metrics, {traced}and the weights and "
            f"optimizer states of {len(stages[0])} stages, every bit"
        )
    causes = [*_differing_recipe(a, b), *_differing_processes(a, b)]
    again = _made_again(a, b, first[0], first[1], say) if first and recompute else []
    where = f"step {first[1]:,} is the first that differs: " if first else ""
    return Comparison(sentence=f"{where}{a} and {b} differ", differences=(*differences, *again, *causes, *tensors))


def _kept(path: Path) -> list[str]:
    """The names of the checkpoints that a run keeps, in the order of stages and steps."""
    return [file.name for file in kept_states(path, tails=True)]


def _steps(trace: Sequence[Line]) -> set[int]:
    return {line["step"] for line in trace if line["kind"] == "step"}


def _scores_at_the_ends(a: list[str], b: list[str]) -> str | None:
    """Say how the last stages of two runs were scored, where both were and not alike."""
    left, right = (next((x for line in reversed(log) if "hss_mean" in (x := json.loads(line))), None) for log in (a, b))
    names = {"hss_mean": "HSS", "corner_f1_mean": "corner F1", "edge_iou_mean": "edge IoU"}
    if left is None or right is None or all(left[key] == right[key] for key in names):
        return None
    scores = ", ".join(f"{name} {left[key]:.4f} against {right[key]:.4f}" for key, name in names.items())
    steps = dict.fromkeys(f"{end['step']:,}" for end in (left, right))
    return f"scores at step {' and '.join(steps)}: {scores}"


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


def _first_differing_step(a: Sequence[Line], b: Sequence[Line]) -> tuple[tuple[str, int] | None, list[str]]:
    """Kind and step of the first difference, and how the lines of the traces and the digests of tensors differ."""
    digests = _first_differing_digests(a, b)
    steps = [{(x["kind"], x["step"]): x for x in trace if x["kind"] != "tensors"} for trace in (a, b)]
    for kind, step in sorted(steps[0].keys() & steps[1].keys(), key=lambda key: key[1]):
        x, y = steps[0][kind, step], steps[1][kind, step]
        keys = [key for key in x if key in y and x[key] != y[key]]
        if keys:
            key = in_order(keys)[0]
            line = f"trace: first at step {step:,} ({kind}): {key} {readable(x[key])} against {readable(y[key])}"
            if digests and digests[0] < step:
                return ("step", digests[0]), [digests[1], line]
            later = " (traces name tensors at checkpoints only)" if digests and digests[0] > step else ""
            return (kind, step), [line, *([digests[1] + later] if digests else [])]
    if digests:
        return ("step", digests[0]), [digests[1]]
    ends = [max((step for _, step in x), default=0) for x in steps]
    if steps[0] and steps[1] and ends[0] != ends[1]:
        return None, [f"trace: one run ends at step {ends[0]:,}, the other at step {ends[1]:,}"]
    return None, []


def _first_differing_digests(a: Sequence[Line], b: Sequence[Line]) -> tuple[int, str] | None:
    """The first checkpoint of both runs at which digests of tensors differ, and of which."""
    digests = [{x["step"]: x["digests"] for x in trace if x["kind"] == "tensors"} for trace in (a, b)]
    for step in sorted(digests[0].keys() & digests[1].keys()):
        x, y = digests[0][step], digests[1][step]
        names = [name for name in {**x, **y} if x.get(name) != y.get(name)]
        if names:
            return step, f"tensors of step {step:,}: first {names[0]}; {len(names)} of {len({**x, **y})} differ"
    return None


def _made_again(a: Path, b: Path, kind: str, step: int, say: Callable[[str], None] | None) -> list[str]:
    """Make the first differing update, or the initial weights, again in both runs, and name what differs first."""
    found: list[Anatomy] = []
    lines: list[str] = []
    for path in (a, b):
        if say:
            say(f"making {'the initial weights' if kind == 'start' else f'step {step:,}'} of {path} again")
        try:
            if kind == "start":
                found.append({"before": initial_weights(path)})
                continue
            again = recompute_update(path, step, progress=say is not None)
        except CannotCheck as reason:
            lines.append(f"recomputed: not step {step:,} of {path}: {reason}")
            continue
        found.append(again.tensors)
        agrees = f"but {'; '.join(again.notes)}" if again.notes else "and it is as its trace says"
        lines.append(f"recomputed: step {step:,} of {path}, from {again.origin}, {agrees}")
    if len(found) == 2:
        lines += _first_of_each_kind(found[0], found[1], step)
    return lines


def _first_of_each_kind(a: Anatomy, b: Anatomy, step: int) -> Iterator[str]:
    """Where two anatomies of an update part, kind by kind in forward order."""
    same = []
    for kind in (kind for kind in KINDS if kind in a):
        if differing := differing_tensors(a[kind], b[kind]):
            total = len({**a[kind], **b[kind]})
            yield f"recomputed: step {step:,}, {kind}: first {differing[0]}; {len(differing)} of {total} differ"
        else:
            same.append(kind)
    if same and "after" in same:
        yield f"recomputed: step {step:,}: every tensor is the same here: it is not recipe, rows or state that differ"
    elif same:
        yield f"recomputed: step {step:,}, {', '.join(same)}: the same"


def _differing_checkpoints(a: Path, b: Path) -> list[str]:
    """What differs in the checkpoints that both runs keep."""
    found: list[tuple[int, list[str]]] = []
    for name in (name for name in _kept(a) if (b / name).is_file()):
        x, y = (load_checkpoint(path / name) for path in (a, b))
        tensors = [state_tensors(state.model, state.optimizer) for state in (x, y)]
        found.append((x.step, [f"{name}: {text}" for text in differing_tensors(*tensors)]))
    return [text for _, texts in sorted(found, key=lambda item: item[0]) for text in texts]


def _differing_recipe(a: Path, b: Path) -> list[str]:
    """The values of the recipes that differ."""
    if not all((path / "config.json").is_file() for path in (a, b)):
        return []
    recipes = [read_object(path / "config.json") for path in (a, b)]
    return [
        f"recipe: {key} {_value(recipes[0], key)!r} against {_value(recipes[1], key)!r}"
        for key in differing_keys(recipes[0], recipes[1])
    ]


def _value(values: Any, key: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in key.split("."):
        if isinstance(values, list) and part.isdigit():
            values = values[int(part)] if int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


def _differing_processes(a: Path, b: Path) -> Iterator[str]:
    """What differs in code, environment and machine code between the processes that computed the runs."""
    x, y = (_computed_with(path) for path in (a, b))
    if not x or not y:
        return
    for name in sorted({**x, **y}):
        p, q = x.get(name, []), y.get(name, [])
        if p != q and name.startswith("environment "):
            yield f"{name}: {', '.join(p)} against {', '.join(q)}"
        elif p != q:
            yield f"{name} differs"


def _computed_with(path: Path) -> dict[str, list[str]]:
    """Everything that the processes of a run noted, by name: sources, environment, machine code of kernels."""
    log = path / "processes.jsonl"
    found: dict[str, set[str]] = {}
    for line in read_log(log) if log.is_file() else []:
        if line["kind"] == "kernels":
            values = {f"machine code of {name}": cubins for name, cubins in line["cubins"].items()}
        else:
            values = {f"environment {name}": [str(value)] for name, value in line["environment"].items()}
            values |= {f"code {name}": [digest] for name, digest in line["code"].items()}
        for name, value in values.items():
            found.setdefault(name, set()).update(value)
    return {name: sorted(values) for name, values in found.items()}
