"""Weights from a file: a run, a checkpoint of ours, or the published one; to start a stage from, or to score."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from perceiver.model import Perceiver
from perceiver.published import load_published
from perceiver.wireframe import PostprocessConfig
from train.checkpoint import CheckpointError, load_checkpoint, load_newest, tensors_digest
from train.config import Recipe, differing_keys, recipe_from_dict


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on the CPU, the post-processing and arithmetic of its recipe, and what is known of its weights."""

    model: Perceiver
    postprocess: PostprocessConfig
    record: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None = None
    threads: int = 2
    precision: str = "auto"
    impl: str = "auto"


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """Where a run begins that does not begin at step 0: weights, optimizer state if known, and stage from 1."""

    loaded: LoadedModel
    stage: int


def load_model(path: Path) -> LoadedModel:
    """Load a run directory's newest checkpoint, a checkpoint file of a run, or the published checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ValueError: the file is a checkpoint of another model.
    """
    if path.is_dir():
        found = load_newest(path / "checkpoint.pt")
        if not found:
            raise CheckpointError(f"{path} holds no checkpoint")
        checkpoint, damage = found
        if damage:
            raise CheckpointError(
                f"{damage}; name {path / 'checkpoint.pt.previous'} to take the one before it, step {checkpoint.step:,}"
            )
    elif _is_published(path):
        model = load_published(path)
        record = {"file": path.name, "step": None, "weights": tensors_digest(model.state_dict())}
        return LoadedModel(model=model, postprocess=PostprocessConfig(), record=record)
    else:
        checkpoint = load_checkpoint(path)
    recipe = recipe_from_dict(checkpoint.recipe)
    model = Perceiver(recipe.model)
    model.load_state_dict(checkpoint.model)
    return LoadedModel(
        model=model,
        postprocess=recipe.postprocess,
        record={"file": path.name, "step": checkpoint.step, "weights": tensors_digest(checkpoint.model)},
        optimizer=checkpoint.optimizer,
        threads=recipe.threads,
        precision=recipe.precision,
        impl=recipe.impl,
    )


def load_start(path: Path, stage: int, recipe: Recipe) -> StartPoint:
    """Load weights to start stage `stage` (from 1) of a recipe from.

    Raises:
        ValueError: there is no such stage, or the weights are of another model than the recipe's.
        CheckpointError: see `load_model`.
    """
    if not 1 <= stage <= len(recipe.stages):
        raise ValueError(f"--start-stage must be 1 to {len(recipe.stages)}, got {stage}")
    loaded = load_model(path)
    different = differing_keys(
        asdict(loaded.model.config), asdict(recipe.model) | {"dropout": loaded.model.config.dropout}
    )
    if different:
        raise ValueError(f"{path} holds a model of another architecture than the recipe: {', '.join(different)} differ")
    return StartPoint(loaded=loaded, stage=stage)


def _is_published(path: Path) -> bool:
    """Whether a file has the published form: a dict with `model` and `args`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(content, dict) and "args" in content
