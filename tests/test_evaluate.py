import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train.evaluate
from perceiver.model import Perceiver, PerceiverConfig, Segments
from perceiver.scene import Scene, SceneBatch
from perceiver.score import Job, ScorePool, summarize
from perceiver.wireframe import PostprocessConfig, Wireframe, segments_to_wireframe, true_wireframe
from train.determinism import Machine
from train.evaluate import (
    SceneRow,
    evaluate,
    evaluate_command,
    format_scores,
    measure_yardsticks,
    predict_wireframes,
    write_scores,
)
from train.roofs import generate_scenes

CPU = Machine(device=torch.device("cpu"), precision="fp32", impl="eager")
SETTINGS = PostprocessConfig()


def gable(order_id: str, length_m: float) -> Scene:
    """A gable roof with one labelled point, far from its corners, and one of padding."""
    vertices_V3 = np.array([[0, 3, 0], [1, 3, 0], [1, 3, 6], [0, 3, 6], [0, 5, 3], [1, 5, 3]], np.float32)
    vertices_V3[:, 0] *= length_m
    edges_E2 = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 4], [3, 4], [1, 5], [2, 5], [4, 5]], np.int32)
    center, scale = np.array([length_m / 2, 4, 3], np.float32), np.float32(10)
    return Scene(
        order_id=order_id,
        xyz_norm=np.zeros((2, 3), np.float32),
        class_id=np.array([10, 10], np.uint8),
        source=np.zeros(2, np.uint8),
        mask=np.array([True, False]),
        center=center,
        scale=scale,
        visible_src=np.zeros(2, np.uint8),
        visible_id=np.zeros(2, np.int16),
        gt_segments=((vertices_V3[edges_E2] - center) / scale).astype(np.float32),
        gt_vertices=vertices_V3,
        gt_edges=edges_E2,
    )


class Oracle(torch.nn.Module):
    """Answers with the truth of its batch moved by `error` (normalised units), padded with edges of no confidence."""

    def __init__(self, error: float = 0.0):
        super().__init__()
        self.error, self.batches, self.seen = error, [], []

    def forward(self, batch: SceneBatch, *, impl: str) -> Segments:
        self.batches.append(len(batch))
        self.seen.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), impl))
        start_BM3, end_BM3 = batch.gt_BM23.unbind(dim=2)
        along_BM3 = end_BM3 - start_BM3
        is_true_BM = torch.arange(batch.gt_BM23.shape[1]) < batch.gt_count_B[:, None]
        along_BM3[~is_true_BM] = torch.tensor([0.0, 0.3, 0.4])
        length_BM = along_BM3.norm(dim=-1)
        return Segments(
            mid_BN3=(start_BM3 + end_BM3) / 2 + self.error,
            dir_BN3=along_BM3 / length_BM[..., None],
            len_BN=length_BM,
            conf_BN=torch.where(is_true_BM, 9.0, -9.0),
        )


@pytest.fixture
def scenes() -> list[Scene]:
    return [gable(f"gable-{length_m}", length_m) for length_m in (4, 6, 8)]


@pytest.fixture
def pool():
    with ScorePool(1) as pool:
        yield pool


@pytest.fixture
def clusters(monkeypatch):
    """A label-cluster heuristic that always finds the first gable."""
    monkeypatch.setitem(
        sys.modules, "train.heuristic", SimpleNamespace(label_clusters=lambda scene: true_wireframe(gable("", 4)))
    )


def test_predictions_come_back_in_world_metres_and_scene_order(scenes):
    model = Oracle()
    wireframes = predict_wireframes(model, scenes, machine=CPU, batch=2, postprocess=SETTINGS)
    assert model.batches == [2, 1]
    for scene, wireframe in zip(scenes, wireframes, strict=True):
        assert len(wireframe.edges_E2) == 9
        ends = wireframe.vertices_V3[np.lexsort(wireframe.vertices_V3.T)]
        np.testing.assert_allclose(ends, scene.gt_vertices[np.lexsort(scene.gt_vertices.T)], atol=1e-5)


def test_scenes_of_other_numbers_of_points_go_in_other_passes(scenes):
    model = Oracle()
    per_point = ("xyz_norm", "class_id", "source", "mask", "visible_src", "visible_id")
    wider = replace(scenes[1], **{name: np.repeat(getattr(scenes[1], name), 2, axis=0) for name in per_point})
    mixed = [scenes[0], scenes[2], wider, scenes[0]]
    wireframes = predict_wireframes(model, mixed, machine=CPU, batch=8, postprocess=SETTINGS)
    assert model.batches == [2, 1, 1]
    assert [len(wireframe.edges_E2) for wireframe in wireframes] == [9, 9, 9, 9]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_predicts_in_evaluation_mode_and_its_mode_is_restored(scenes, training):
    model = Oracle().train(training)
    predict_wireframes(model, scenes, machine=CPU, batch=8, postprocess=SETTINGS)
    assert model.seen == [(False, False, False, "eager")]
    assert model.training is training


def test_the_mode_is_restored_after_an_error(scenes):
    model = Oracle(error=float("nan")).train()
    with pytest.raises(ValueError, match="prediction for scene 'gable-4' cannot be used: endpoints_N23 must be finite"):
        predict_wireframes(model, scenes, machine=CPU, batch=8, postprocess=SETTINGS)
    assert model.training


def test_bf16_runs_the_model_under_autocast(scenes):
    model = Oracle()
    predict_wireframes(model, scenes, machine=replace(CPU, precision="bf16"), batch=8, postprocess=SETTINGS)
    assert model.seen == [(False, False, True, "eager")]


def test_a_scene_without_valid_points_gets_the_fallback(scenes):
    blind = replace(scenes[0], mask=np.zeros(2, bool))
    wireframe, other = predict_wireframes(Oracle(), [blind, scenes[1]], machine=CPU, batch=8, postprocess=SETTINGS)
    assert wireframe.vertices_V3.tolist() == [[0, 0, 0], [0, 0, 0]] and wireframe.edges_E2.tolist() == [[0, 1]]
    assert len(other.edges_E2) == 9


def test_a_batch_of_nothing_is_refused(scenes):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        predict_wireframes(Oracle(), scenes, machine=CPU, batch=0, postprocess=SETTINGS)


def test_evaluation_tells_a_good_model_from_a_bad_one(scenes, pool, clusters):
    good = evaluate(Oracle(), scenes, machine=CPU, batch=8, postprocess=SETTINGS, pool=pool)
    bad = evaluate(Oracle(error=0.1), scenes, machine=CPU, batch=8, postprocess=SETTINGS, pool=pool, yardsticks=False)
    assert good.summary["hss_mean"] > 0.999
    assert bad.summary["hss_mean"] < 0.1
    assert [row.order_id for row in good.rows] == ["gable-4", "gable-6", "gable-8"]
    assert good.rows[0][4:] == (6, 6, 9, 9)
    assert bad.yardsticks == {}


def test_yardsticks_score_the_truth_and_the_heuristic(scenes, pool, clusters):
    yardsticks = measure_yardsticks(scenes, postprocess=SETTINGS, pool=pool)
    assert yardsticks["truth_through_postprocessing"]["hss_q5"] > 0.999
    assert yardsticks["label_clusters"]["hss_q95"] > 0.8 > yardsticks["label_clusters"]["hss_mean"]
    # post-processing that glues the corners together shows in the yardstick
    glued = PostprocessConfig(merge_radii_m=(4.5,))
    assert measure_yardsticks(scenes, postprocess=glued, pool=pool)["truth_through_postprocessing"]["hss_mean"] < 0.5


def test_scenes_without_truth_or_no_scenes_are_refused(scenes, pool):
    untold = replace(scenes[1], gt_segments=None, gt_vertices=None, gt_edges=None)
    with pytest.raises(ValueError, match="scene 'gable-6' has no ground truth"):
        evaluate(Oracle(), [scenes[0], untold], machine=CPU, batch=8, postprocess=SETTINGS, pool=pool)
    with pytest.raises(ValueError, match="scene 'gable-6' has no ground truth"):
        measure_yardsticks([untold], postprocess=SETTINGS, pool=pool)
    with pytest.raises(ValueError, match="scores must hold at least one scene"):
        evaluate(Oracle(), [], machine=CPU, batch=8, postprocess=SETTINGS, pool=pool)


@pytest.mark.parametrize(
    ("set_name", "stem", "title"),
    [
        ("dev", "scores", "dev"),
        ("validation", "scores_validation", "official validation"),
        ("test", "scores_test", "public test"),
    ],
)
def test_the_command_prints_and_writes_what_it_measured(scenes, clusters, tmp_path, capsys, set_name, stem, title):
    evaluation = evaluate_command(
        Oracle(),
        scenes,
        set_name=set_name,
        source="npz:gables",
        run_dir=tmp_path,
        machine=CPU,
        batch=8,
        postprocess=SETTINGS,
        workers=1,
        checkpoint={"step": 7, "digest": "abc"},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.csv", f"{stem}.json"]
    content = json.loads((tmp_path / f"{stem}.json").read_text())
    assert content["set"] == title and content["scenes"] == 3 and content["source"] == "npz:gables"
    assert content["summary"] == evaluation.summary and content["yardsticks"] == evaluation.yardsticks
    assert content["checkpoint"] == {"step": 7, "digest": "abc"}
    assert content["postprocess"]["merge_radii_m"] == list(SETTINGS.merge_radii_m)
    with (tmp_path / f"{stem}.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == SceneRow._fields
    assert [(row[0], float(row[1]), int(row[-1])) for row in rows] == [
        (row.order_id, row.hss, row.true_edges) for row in evaluation.rows
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{title}, 3 scenes") and printed[0].split()[-8:] == list(evaluation.summary)
    assert [line.split("  ")[0] for line in printed[1:4]] == ["model", "truth through postprocessing", "label clusters"]
    assert printed[1].split()[1] == f"{evaluation.summary['hss_mean']:.4f}"
    assert printed[4].startswith("written to ")


def test_the_scores_of_the_model_are_printed_before_the_yardsticks_are_measured(scenes, tmp_path, monkeypatch, capsys):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.evaluate, "measure_yardsticks", interrupted)
    how = {"set_name": "dev", "source": "npz:gables", "machine": CPU, "batch": 8, "postprocess": SETTINGS, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate_command(Oracle(), scenes[:1], run_dir=tmp_path, **how)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0].startswith("dev, 1 scene  ") and printed[1].startswith("model ")


def test_another_set_is_refused(scenes, pool, tmp_path):
    evaluation = evaluate(Oracle(), scenes[:1], machine=CPU, batch=8, postprocess=SETTINGS, pool=pool, yardsticks=False)
    with pytest.raises(ValueError, match="set_name must be one of dev, validation, test, got 'private'"):
        write_scores(tmp_path, evaluation, set_name="private", source="", postprocess=SETTINGS)
    with pytest.raises(ValueError, match="set_name must be one of"):
        format_scores(evaluation, set_name="private")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_made(scenes, pool, tmp_path):
    evaluation = evaluate(Oracle(), scenes[:1], machine=CPU, batch=8, postprocess=SETTINGS, pool=pool, yardsticks=False)
    where = {"set_name": "dev", "source": "roofs:easy#dev", "postprocess": SETTINGS}
    path = write_scores(tmp_path / "new" / "run", evaluation, **where)
    assert path.is_file()
    assert path.with_suffix(".csv").is_file()


def processed_truth_score(roofs: list[Scene], postprocess: PostprocessConfig) -> float:
    processed = [segments_to_wireframe(roof.to_world(roof.gt_segments), roof, postprocess) for roof in roofs]
    return mean_score(roofs, processed)


def mean_score(roofs: list[Scene], predictions: list[Wireframe]) -> float:
    jobs = [Job(roof.order_id, p, true_wireframe(roof)) for roof, p in zip(roofs, predictions, strict=True)]
    return summarize(ScorePool(1).score(jobs))["hss_mean"]


def test_the_truth_of_200_roofs_survives_post_processing():
    roofs = generate_scenes(200, seed=7, points=256, setting="easy")
    assert processed_truth_score(roofs, SETTINGS) >= 0.98


def test_without_snapping_the_truth_stays_whole_whatever_the_labels():
    roofs = generate_scenes(20, seed=7, points=256, setting="real")
    assert processed_truth_score(roofs, PostprocessConfig(snap=False)) > 0.999


def test_the_score_measures_the_error_of_corners():
    roofs = generate_scenes(12, seed=8, points=64, setting="easy")
    rng = np.random.default_rng(0)
    scores = []
    for sigma_m in (0.1, 0.3, 0.5):
        truths = [true_wireframe(roof) for roof in roofs]
        noisy = [Wireframe(t.vertices_V3 + sigma_m * rng.normal(size=t.vertices_V3.shape), t.edges_E2) for t in truths]
        scores.append(mean_score(roofs, noisy))
    another = mean_score(roofs, [true_wireframe(roof) for roof in (*roofs[1:], roofs[0])])
    assert 1 > scores[0] > 0.75 > scores[1] > 0.35 > scores[2] > another
    assert another < 0.05


def test_an_untrained_model_is_scored_and_leaves_no_gradient(pool):
    roofs = generate_scenes(2, seed=9, points=64, setting="easy")
    model = Perceiver(
        PerceiverConfig(hidden=64, ff=64, latent_tokens=8, latent_layers=1, decoder_layers=1, segments=16, dropout=0.0)
    )
    evaluation = evaluate(model, roofs, machine=CPU, batch=2, postprocess=SETTINGS, pool=pool, yardsticks=False)
    assert evaluation.summary["hss_mean"] < 0.2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_yardsticks_of_generated_roofs_are_far_apart(pool):
    yardsticks = measure_yardsticks(
        generate_scenes(8, seed=10, points=512, setting="easy"), postprocess=SETTINGS, pool=pool
    )
    assert yardsticks["truth_through_postprocessing"]["hss_mean"] > yardsticks["label_clusters"]["hss_mean"] + 0.05
    assert yardsticks["label_clusters"]["hss_mean"] > 0.4
