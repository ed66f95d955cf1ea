"""A recipe: everything a run depends on, as one frozen value.

A recipe file in `configs/` holds what differs from `configs/base.json`; a stage is a row of data. Unknown keys are
refused. The resolved recipe is saved in the run as `config.json`, and a run only ever continues under an equal one.
"""

import dataclasses
import itertools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perceiver.loss import LossConfig
from perceiver.model import PerceiverConfig
from perceiver.wireframe import PostprocessConfig
from train.augment import AugmentConfig
from train.optim import OptimConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training: its data, where it ends, and its learning rate.

    Steps count from the start of the run: a stage trains the updates from the end of the one before to `until`.
    lr(s) = lr * min(1, s / warmup) * max(0, 1 - max(0, s - cooldown_start) / cooldown_steps).
    """

    name: str
    data: str
    until: int
    batch: int
    lr: float
    warmup: int = 0
    cooldown_start: int = 0
    cooldown_steps: int = 0
    endpoint_weight: float = 0.0

    def __post_init__(self):
        for name, least in (("until", 1), ("batch", 1), ("warmup", 0), ("cooldown_start", 0), ("cooldown_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"stage {self.name!r}: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"stage {self.name!r}: lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """When and how a run scores itself. `every` is in steps; 0 scores at the ends of stages only.

    scenes: of the dev set, the first so many, between the ends of stages; a stage's end scores the whole set. The
        losses on training and dev rows are of the first so many at any time; `scenes` in a log counts the scored.
    workers: processes that compute the score; the result does not depend on it.
    score: False leaves the wireframe score out and keeps the dev loss (a machine without hoho2025).
    """

    every: int = 5000
    scenes: int = 64
    batch: int = 32
    workers: int = 2
    score: bool = True

    def __post_init__(self):
        for name, least in (("every", 0), ("scenes", 1), ("batch", 1), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluate.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is kept out of training, beside the dev sets of all stages.

    bad_samples: a file of order_ids, relative to the repository. published_split: keep only a stage's own dev set out.
    strict: stop at a row that cannot be decoded instead of leaving it out.
    """

    bad_samples: str | None = None
    published_split: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run.

    seed: of initial weights, data order, augmentation and dropout.
    threads: of the CPU; part of the bits, so fixed by the recipe.
    precision: of matrix products; "auto" is bf16 on a GPU and fp32 on a CPU.
    impl: of the operators; "auto" is triton on a GPU and eager on a CPU.
    log_every, checkpoint_every, keep_every: in steps; keep_every > 0 keeps a checkpoint step<NNNNNN>.pt so often.
    trace_every: in steps; so often trace.jsonl holds a digest of weights and optimizer, beside the values of each step.
    """

    name: str
    stages: tuple[StageConfig, ...]
    seed: int = 353
    threads: int = 2
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    impl: Literal["auto", "eager", "triton"] = "auto"
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_every: int = 0
    trace_every: int = 50
    model: PerceiverConfig = field(default_factory=PerceiverConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stages must hold at least one stage")
        ends = [0, *(stage.until for stage in self.stages)]
        if any(a >= b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"stages must end one after the other, their `until` are {ends[1:]}")
        least_values = {
            "threads": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "keep_every": 0,
            "trace_every": 1,
            "seed": 0,
        }
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2^64, got {self.seed}")

    def start_of(self, stage: int) -> int:
        """The step after which stage `stage` (counted from 0) begins."""
        return self.stages[stage - 1].until if stage else 0


def load_recipe(name: str | Path) -> Recipe:
    """Read `configs/<name>.json`, or a path to such a file, on top of `base.json` beside it.

    Raises:
        ValueError: no such recipe (the known ones are listed), broken JSON, an unknown key or a value out of range.
    """
    path = Path(name) if str(name).endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        if path.parent == CONFIGS and not CONFIGS.is_dir():
            raise ValueError(
                f"recipe {str(name)!r} does not exist: {CONFIGS} is not there, an installed package has no recipes; "
                "work in a checkout, or name a .json file"
            )
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.json") if p.stem != "base"))
        raise ValueError(f"recipe {str(name)!r} does not exist; known recipes: {known}")
    base = path.parent / "base.json"
    values = _merge(read_object(base) if base.is_file() else {}, read_object(path))
    return recipe_from_dict({"name": path.stem, **values})


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it holds something else; names the file.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain JSON values.

    Raises:
        ValueError: naming the key that is unknown, missing or of the wrong type.
    """
    return _build(Recipe, values, "recipe")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain JSON values of a recipe; `recipe_from_dict` inverts it."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the values in which two recipes (as plain values) differ, dotted; stages count from 0."""
    names: list[str] = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            left, right = ({str(i): x for i, x in enumerate(values)} for values in (left, right))
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(prefix + key)
    return names


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, plain JSON, as the type `kind`: a dataclass, a tuple of them, a literal or a scalar."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            raise ValueError(f"{where} has no key {unknown[0]!r}; it knows {', '.join(sorted(hints))}")
        missing = [field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name not in value]
        if missing:
            raise ValueError(f"{where} must say {', '.join(missing)}, got {', '.join(sorted(value)) or 'nothing'}")
        return kind(**{name: _build(hints[name], part, f"{where}.{name}") for name, part in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_build(args[0], part, f"{where}.{i}") for i, part in enumerate(value))
        return tuple(_build(arg, part, f"{where}.{i}") for i, (arg, part) in enumerate(zip(args, value, strict=True)))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    kinds = args if origin in (types.UnionType, typing.Union) else (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not any(type(value) is k for k in kinds):
        raise ValueError(f"{where} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    return value
