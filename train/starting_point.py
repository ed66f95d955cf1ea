"""Weights from a file: a run, a checkpoint of ours, or the published one; to go on from, to start a stage, to score."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from perceiver.model import Perceiver
from perceiver.published import load_published
from perceiver.wireframe import PostprocessConfig
from train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_newest, tensors_digest
from train.config import Recipe, differing_keys, recipe_from_dict, recipe_to_dict
from train.rundir import RunDirectory, RunRefused
from train.trace import Line, digest, state_tensors, tail_of


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on the CPU, the post-processing and arithmetic of its recipe, and what is known of its weights.

    until: the last step of the recipe; None where there is none.
    """

    model: Perceiver
    postprocess: PostprocessConfig
    record: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None = None
    until: int | None = None
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
        until=recipe.stages[-1].until,
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


def begun_with(start: Line, file: Path | None, recipe: Recipe, machine: Mapping[str, str]) -> Checkpoint | None:
    """Load the state that a run began with, as a checkpoint; None stands for the initial weights.

    Args:
        start: the first line of the run's trace.
        file: where the weights are that the run began with; None where nobody says.
        machine: what the run was computed with.
    Raises:
        ValueError: the run began with a file that is not given, or not this one; or with no file.
    """
    origin = start["from"]
    if origin is None:
        if file:
            raise ValueError(f"the run began with its initial weights, not with those of {file}")
        return None
    if file is None:
        name = origin.get("file")
        raise ValueError(f"the run began with the weights of {name}, which verify and replay take with --from")
    try:
        loaded = load_start(file, start["stage"], recipe).loaded
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not the file that the run began with: {error}") from error
    model, optimizer = loaded.model.state_dict(), loaded.optimizer or {}
    digests = {"weights": (loaded.record["weights"], origin.get("weights"))}
    if optimizer:
        # without an optimizer the state follows from the weights: another digest of it is the run's fault
        digests["state"] = digest(state_tensors(model, optimizer)), start["state"]
    for name, (found, said) in digests.items():
        if found != said:
            raise ValueError(
                f"{file} is not the file that the run began with: the digest of its {name} is {found}, not {said}"
            )
    values = recipe_to_dict(recipe)
    return Checkpoint(step=start["step"], model=model, optimizer=optimizer, recipe=values, machine=machine)


def load_state(directory: RunDirectory, recipe: Recipe) -> tuple[Checkpoint, str | None] | None:
    """Load the state that a run goes on from: its newest checkpoint or, where none is usable, the newest that stays.

    Returns:
        The state and, if it is not checkpoint.pt's, a sentence saying so; None where the run is to begin.
    Raises:
        CheckpointError: there are checkpoints, and none is usable.
        RunRefused: the state is another recipe's, or the directory holds only the run's end, or unusable states.
    """
    try:
        found, unusable = load_newest(directory.checkpoint), None
    except CheckpointError as error:
        found, unusable = None, error
    if found:
        checkpoint, damage = found
        directory.refuse_other(checkpoint.recipe, recipe)
        return checkpoint, f"{damage}; going on from the one before it, step {checkpoint.step:,}" if damage else None
    kept = directory.kept_states()
    for path in _kept_before_the_end(directory, recipe):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError:
            continue
        if path in kept:
            directory.refuse_other(checkpoint.recipe, recipe)
        # else a tail, which a recipe that was corrected may have left
        if checkpoint.recipe == recipe_to_dict(recipe):
            why = unusable or f"{directory.checkpoint} does not exist"
            return checkpoint, f"{why}; going on from {path.name}, step {checkpoint.step:,}"
    if unusable:
        raise unusable
    if kept:
        raise RunRefused(
            f"run directory {directory.path} holds {kept[-1].name} but no state that this run could go on from: take "
            f"another --name, or copy {kept[-1].name} to checkpoint.pt"
        )
    return None


def stage_states(directory: RunDirectory, recipe: Recipe) -> dict[Path, int]:
    """The files of the states that a finished run keeps of its stages, in the order of their steps, and these."""
    begun = next((line["stage"] for line in directory.read("trace") if line["kind"] == "start"), 1)
    steps = {}
    for number in range(begun, len(recipe.stages) + 1):
        steps[directory.stage_tail(number)] = tail_of(recipe, number)
        steps[directory.stage_checkpoint(number)] = recipe.stages[number - 1].until
    return steps


def _kept_before_the_end(directory: RunDirectory, recipe: Recipe) -> list[Path]:
    """The files of states after the start and before the end of a run, newest first.

    The end is made again from the state before it: a crash may have come before its scores or its certificate.
    """
    numbers = range(1, len(recipe.stages) + 1)
    steps = {directory.stage_checkpoint(n): recipe.stages[n - 1].until for n in numbers}
    steps |= {
        directory.stage_tail(n): tail_of(recipe, n) for n in numbers if tail_of(recipe, n) > recipe.start_of(n - 1)
    }
    steps |= {path: int(path.stem[4:]) for path in directory.kept_states() if path.stem.startswith("step")}
    found = [path for path, step in steps.items() if step < recipe.stages[-1].until and path.is_file()]
    return sorted(found, key=lambda path: steps[path], reverse=True)


def _is_published(path: Path) -> bool:
    """Whether a file has the published form: a dict with `model` and `args`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(content, dict) and "args" in content
