"""The published recipe runs on files in the hub's schema: real model, all three stages, the first steps of each."""

import dataclasses
import json

import pytest

from train.checkpoint import load_checkpoint
from train.config import load_recipe
from train.loop import run
from train.roofs import generate_scenes
from train.sources import write_parquet


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Small stand-ins of the two sets of the hub, in its schema."""
    root = tmp_path_factory.mktemp("sets")
    for points in (2048, 4096):
        write_parquet(
            generate_scenes(8, seed=1, points=points, setting="real"), root / f"sampled_{points}", rows_per_file=3
        )
    return root


def test_three_steps_of_every_stage_at_real_size(sets, tmp_path):
    recipe = load_recipe("s23dr")
    stages = tuple(
        dataclasses.replace(
            stage,
            data=f"parquet:{sets}/sampled_{2048 if stage.until == 125_000 else 4096}?dev=2",
            until=3 * (i + 1),
            batch=2,
            warmup=10,
            cooldown_start=7 if stage.cooldown_steps else 0,
            cooldown_steps=min(stage.cooldown_steps, 4),
        )
        for i, stage in enumerate(recipe.stages)
    )
    recipe = dataclasses.replace(
        recipe, stages=stages, log_every=1, evaluate=dataclasses.replace(recipe.evaluate, score=False, scenes=2)
    )
    lines: list[str] = []
    run(recipe, tmp_path / "run", device="cpu", progress=False, say=lines.append)
    assert load_checkpoint(tmp_path / "run" / "stage3.pt").step == 9
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert all(line["loss"] > 0 for line in steps)
    counts = [line for line in metrics if line["kind"] == "data"]
    assert [(line["rows"], line["dev"], line["trained_on"]) for line in counts] == [(8, 2, 6)] * 3
    assert any("8 rows = 6 trained on + 2 dev" in line for line in lines)
