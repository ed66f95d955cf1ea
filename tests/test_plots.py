import math

import numpy as np
import pytest

from train.plots import POINT_CLASSES, draw_curves, draw_scene, finite

EXAMPLE = {
    "points": [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 5.0, 1.0]],
    "class_id": [0, 10, 10],
    "truth": {"vertices": [[0, 0, 0], [4, 0, 0], [4, 3, 1]], "edges": [[0, 1], [1, 2]]},
    "prediction": {"vertices": [[0, 0, 0], [9, 9, 9]], "edges": [[0, 1]]},
}

BARE = {name: {"vertices": [[0, 0, 0], [1, 1, 1]], "edges": [[0, 1]]} for name in ("truth", "prediction")}


def curve(figures, title, name):
    (figure,) = [figure for figure in figures if figure["title"] == title]
    (trace,) = [trace for trace in figure["traces"] if trace["name"] == name]
    return trace


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, [1]])
def test_only_finite_numbers_count_as_numbers(value):
    assert finite(value) is None and finite(2) == 2.0


def test_a_value_that_is_missing_or_not_finite_leaves_a_gap():
    lines = [{"kind": "train", "step": s, "loss": v} for s, v in ((1, 0.5), (2, math.nan), (4, 0.25))]
    lines.append({"kind": "train", "step": 3})
    trace = curve(draw_curves(lines, []), "Loss of the training batches", "total")
    assert trace["x"] == [1, 2, 4, 3] and trace["y"] == [0.5, None, 0.25, None]


def test_a_curve_without_values_is_left_out_and_so_is_an_empty_figure():
    figures = draw_curves([{"kind": "train", "step": 1, "loss": 0.5}], [])
    assert [figure["title"] for figure in figures] == ["Loss of the training batches"]
    assert [trace["name"] for trace in figures[0]["traces"]] == ["total"]
    assert draw_curves([], []) == []


def test_each_kind_of_line_goes_to_its_curves():
    metrics = [
        {"kind": "train", "step": 10, "loss": 1.0, "mass": 0.5, "kept": 1.5, "dustbin": 0.2, "lr": 1e-3, "tau": 8},
        {"kind": "eval", "step": 20, "train_loss": 0.4, "dev_loss": 0.6, "ratio": 1.5, "hss_mean": 0.3},
        {"kind": "stage", "step": 20, "hss_mean": 0.3},
    ]
    figures = draw_curves(metrics, [{"step": 10, "scenes_per_second": 500.0, "memory_mb": 800.0}], yardstick=0.7)
    assert curve(figures, "Loss without noise", "dev rows")["y"] == [0.6]
    assert curve(figures, "Score on dev scenes", "HSS")["x"] == [20]
    assert curve(figures, "Score on dev scenes", "HSS of label clusters")["y"] == [0.7, 0.7]
    assert curve(figures, "Matching", "dustbin share")["y"] == [0.2]
    assert curve(figures, "Speed", "scenes per second")["y"] == [500.0]
    assert all(figure["ends"] == [20] for figure in figures)


def test_scenes_are_turned_upright_without_being_mirrored():
    figure = draw_scene({**EXAMPLE, "points": np.eye(3).tolist(), "class_id": [0, 1, 2]})
    traces = {trace["name"]: trace for trace in figure["traces"]}
    axes = np.array([[traces[POINT_CLASSES[i][0]][axis][0] for axis in "xyz"] for i in range(3)])
    assert np.linalg.det(axes) == 1 and axes[1].tolist() == [0, 0, 1]


def test_a_scene_has_a_layer_per_class_that_occurs_and_both_wireframes():
    figure = draw_scene(EXAMPLE)
    traces = {trace["layer"]: trace for trace in figure["traces"]}
    assert list(traces) == ["apex", "roof", "truth", "prediction"]
    assert traces["roof"]["x"] == [1.0, 2.0]
    assert traces["truth"]["x"] == [0, 4, None, 4, 4, None]


def test_all_vertices_and_nearly_all_points_are_in_the_box():
    points = [*np.random.default_rng(0).normal(size=(1000, 3)).tolist(), [500.0, 500.0, 500.0]]
    (x0, x1), _, (z0, z1) = draw_scene({**EXAMPLE, "points": points, "class_id": [10] * 1001})["box"]
    assert x0 < -1.9 and 9 < x1 < 20
    assert z0 < -1.9 and 9 < z1 < 20


def test_points_beside_the_house_are_in_the_box():
    points = [*np.random.default_rng(0).uniform(size=(1000, 3)).tolist(), [-0.4, 1.4, 0.5]]
    (x0, _), _, (_, z1) = draw_scene({**EXAMPLE, "points": points, "class_id": [12] * 1001, **BARE})["box"]
    assert -0.7 < x0 < -0.4 and 1.4 < z1 < 1.7


@pytest.mark.parametrize(
    "broken",
    [
        {"class_id": [0]},
        {"points": [], "class_id": []},
        {"points": [[0, 0]], "class_id": [0]},
        {"truth": {"vertices": [], "edges": [[0, 1]]}},
        {"prediction": None},
    ],
)
def test_an_example_of_another_form_is_refused(broken):
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        draw_scene({**EXAMPLE, **broken})
