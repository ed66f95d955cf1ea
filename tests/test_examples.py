"""The examples of the page: three scenes by their rank, in metres."""

import json

import pytest

from perceiver.model import Perceiver
from perceiver.wireframe import PostprocessConfig
from tests.small_models import SMALL
from train.determinism import enter
from train.evaluate import Evaluation, SceneRow
from train.examples import write_examples
from train.roofs import generate_scenes


def test_three_scenes_are_shown_from_bad_to_good(tmp_path):
    scenes = generate_scenes(11, seed=3, points=64, setting="easy")
    order = [5, 0, 9, 2, 7, 1, 10, 3, 8, 6, 4]
    rows = [SceneRow(s.order_id, rank / 10, 0, 0, 0, 0, 0, 0) for s, rank in zip(scenes, order, strict=True)]
    write_examples(
        tmp_path / "examples.json",
        Perceiver(SMALL),
        scenes,
        Evaluation(rows=rows, summary={}),
        machine=enter(threads=1, precision="fp32", impl="eager", device="cpu"),
        postprocess=PostprocessConfig(),
    )
    examples = json.loads((tmp_path / "examples.json").read_text())
    assert [x["hss"] for x in examples] == [0.1, 0.5, 0.9]
    assert [x["percentile"] for x in examples] == [10, 50, 90]
    chosen = scenes[order.index(5)]
    middle = examples[1]
    assert middle["order_id"] == chosen.order_id
    assert len(middle["points"]) == len(middle["class_id"]) == chosen.point_count
    assert middle["points"][0] == pytest.approx(chosen.valid_points_world()[0].tolist(), abs=6e-4)
    assert middle["truth"]["edges"] == chosen.gt_edges.tolist()
    assert middle["prediction"]["edges"]
