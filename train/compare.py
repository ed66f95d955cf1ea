"""Are two runs the same? Their metrics line by line, their weights byte by byte: `python -m train compare A B`."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import load_checkpoint
from train.rundir import RunRefused, whole_lines


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer: a sentence, and the differences that it sums up, first one first."""

    sentence: str
    differences: tuple[str, ...] = field(default=())

    @property
    def identical(self) -> bool:
        return not self.differences


def compare_runs(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare metrics.jsonl and the weights and optimizer states of all stage ends of two runs.

    Raises:
        RunRefused: a directory holds no run, or the runs have not both reached the same point.
    """
    a, b = Path(run_a), Path(run_b)
    for path in (a, b):
        if not (path / "metrics.jsonl").is_file():
            raise RunRefused(f"{path} holds no run: it has no metrics.jsonl")
    lines = [whole_lines(path / "metrics.jsonl") for path in (a, b)]
    differences = list(filter(None, [_first_differing_line(*lines)]))
    stages = [sorted(p.name for p in path.glob("stage[0-9].pt")) for path in (a, b)]
    if stages[0] != stages[1]:
        differences.append(
            f"finished stages: {', '.join(stages[0]) or 'none'} against {', '.join(stages[1]) or 'none'}"
        )
    for name in sorted(set(stages[0]) & set(stages[1])):
        states = [load_checkpoint(path / name) for path in (a, b)]
        tensors = [{**dict(s.model), **_optimizer_tensors(s.optimizer)} for s in states]
        differences += [f"{name}: {text}" for text in _differing_tensors(*tensors)]
    if differences:
        return Comparison(sentence=f"{a} and {b} differ", differences=tuple(differences))
    return Comparison(
        sentence=f"{a} and {b} are identical: {len(lines[0]):,} lines of metrics and the weights and optimizer "
        f"states of {len(stages[0])} stages, every bit"
    )


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


def _optimizer_tensors(state: Any) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


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
