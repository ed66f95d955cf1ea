"""The recipe `tiny` without its score: a run of seconds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from train.checkpoint import load_checkpoint, tensors_digest
from train.config import Recipe, load_recipe, recipe_to_dict
from train.loop import run


def tiny_recipe(**changes: Any) -> Recipe:
    recipe = load_recipe("tiny")
    quick = dataclasses.replace(recipe.evaluate, score=False)
    return dataclasses.replace(recipe, **{"threads": 1, "evaluate": quick, **changes})


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """A file that the command line reads, where the package that reads flags may be absent."""
    path.write_text(json.dumps(recipe_to_dict(recipe)))
    return path


def train_quietly(recipe: Recipe, run_dir: Path, **options: Any) -> bool:
    return run(recipe, run_dir, device="cpu", progress=False, say=lambda _line: None, **options)


def final_state(run_dir: Path) -> tuple[str, bytes]:
    """Digest of the final weights, and the bytes of the metrics."""
    weights = tensors_digest(load_checkpoint(run_dir / "stage3.pt").model)
    return weights, (run_dir / "metrics.jsonl").read_bytes()
