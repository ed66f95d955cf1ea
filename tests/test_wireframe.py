from dataclasses import replace

import numpy as np
import pytest

from perceiver.scene import Scene
from perceiver.wireframe import (
    PostprocessConfig,
    Wireframe,
    fallback_wireframe,
    keep_segments,
    level_edges,
    merge_vertices,
    segments_to_wireframe,
    snap_to_points,
    true_wireframe,
)

SETTINGS = PostprocessConfig()
MERGE_ONLY = PostprocessConfig(snap=False, level=False)
APEX, EAVE_END, FLASHING_END, RIDGE = 0, 1, 2, 4


def scene_of(points_P3=(), classes=(), padding: int = 1) -> Scene:
    """A scene whose valid points are these, in metres; the padding repeats the last one."""
    points_P3 = np.asarray(points_P3, np.float32).reshape(-1, 3)
    center = np.array([10, 20, 30], np.float32)
    xyz = np.concatenate([points_P3, np.repeat(points_P3[-1:], padding, axis=0)]) if len(points_P3) else np.ones((1, 3))
    class_id = [*classes, *classes[-1:] * padding] if len(points_P3) else [APEX]
    return Scene(
        order_id="hand-made",
        xyz_norm=((xyz - center) / 4).astype(np.float32),
        class_id=np.array(class_id, np.uint8),
        source=np.zeros(len(xyz), np.uint8),
        mask=np.arange(len(xyz)) < len(points_P3),
        center=center,
        scale=np.float32(4),
        visible_src=np.zeros(len(xyz), np.uint8),
        visible_id=np.zeros(len(xyz), np.int16),
    )


def path_of(*vertices) -> Wireframe:
    """A polyline through these vertices."""
    vertices_V3 = np.array(vertices, np.float64)
    return Wireframe(vertices_V3, np.stack([np.arange(len(vertices) - 1), np.arange(1, len(vertices))], axis=1))


def random_segments(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-3, 3, (count, 2, 3))


def test_kept_are_segments_whose_sigmoid_is_above_the_threshold():
    conf_N = np.array([-1e9, -0.1, 0.0, 0.1, 1e9])
    assert keep_segments(conf_N, SETTINGS).tolist() == [False, False, False, True, True]
    at_09 = np.log(0.9 / 0.1)
    strict = PostprocessConfig(confidence=0.9)
    assert keep_segments(np.array([at_09 - 1e-6, at_09 + 1e-6]), strict).tolist() == [False, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keep_segments_refuses_a_confidence_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="conf_N must be finite"):
        keep_segments(np.array([0.0, bad]), SETTINGS)


def test_merge_replaces_a_cluster_by_its_mean():
    merged = merge_vertices(path_of([0, 0, 0], [4, 0, 0], [4, 0.1, 0], [4, 3, 0]), (0.15,))
    # the short edge became a loop and went
    np.testing.assert_allclose(merged.vertices_V3, [[0, 0, 0], [4, 0.05, 0], [4, 3, 0]])
    assert merged.edges_E2.tolist() == [[0, 1], [1, 2]]


def test_merge_links_chains_transitively():
    chain = Wireframe(
        np.array([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.3, 0, 0], [5, 0, 0]], float),
        np.array([[0, 4], [1, 4], [2, 4], [3, 4]]),
    )
    merged = merge_vertices(chain, (0.12,))
    np.testing.assert_allclose(merged.vertices_V3, [[0.15, 0, 0], [5, 0, 0]])
    assert merged.edges_E2.tolist() == [[0, 1]]


def test_merge_counts_a_vertex_of_the_previous_radius_once():
    vertices_V3 = np.array([[0, 0, 0], [0.1, 0, 0], [0.6, 0, 0], [5, 0, 0]], float)
    merged = merge_vertices(Wireframe(vertices_V3, np.array([[0, 3], [1, 3], [2, 3]])), (0.15, 0.6))
    np.testing.assert_allclose(merged.vertices_V3, [[(0.05 + 0.6) / 2, 0, 0], [5, 0, 0]])


def test_merge_drops_duplicate_edges_and_vertices_without_an_edge():
    vertices_V3 = np.array([[0, 0, 0], [0, 0, 2], [9, 0, 0], [9, 0, 0.1], [7, 7, 7]], float)
    merged = merge_vertices(Wireframe(vertices_V3, np.array([[0, 1], [1, 0], [2, 3]])), (0.15,))
    assert merged.vertices_V3.tolist() == [[0, 0, 0], [0, 0, 2]]
    assert merged.edges_E2.tolist() == [[0, 1]]


def test_a_distance_equal_to_the_radius_merges():
    assert len(merge_vertices(path_of([0, 0, 0], [0.5, 0, 0], [3, 0, 0]), (0.5,)).vertices_V3) == 2
    assert len(merge_vertices(path_of([0, 0, 0], [0.5, 0, 0], [3, 0, 0]), (0.49,)).vertices_V3) == 3


def test_snap_moves_a_vertex_to_the_mean_of_the_corner_points_around_it():
    scene = scene_of(
        [[0.2, 0, 0], [0, 0.4, 0], [0, 0, -0.1], [0, 0.1, 0], [3.2, 0, 0], [0, 0.6, 0]],
        [APEX, EAVE_END, FLASHING_END, RIDGE, APEX, APEX],
        padding=5,
    )
    snapped = snap_to_points(path_of([0, 0, 0], [3, 0, 0]), scene, SETTINGS)
    # the ridge point is no corner, the sixth is too far; one point alone does not move the second vertex
    np.testing.assert_allclose(snapped.vertices_V3, [[0.2 / 3, 0.4 / 3, -0.1 / 3], [3, 0, 0]], atol=1e-6)


def test_snap_needs_two_corner_points_in_the_scene_and_padding_is_none():
    wireframe = path_of([0, 0, 0], [3, 0, 0])
    one_point = scene_of([[0.2, 0, 0]], [APEX], padding=9)
    assert np.array_equal(snap_to_points(wireframe, one_point, SETTINGS).vertices_V3, wireframe.vertices_V3)
    moved = snap_to_points(wireframe, one_point, replace(SETTINGS, snap_min_points=1))
    np.testing.assert_allclose(moved.vertices_V3[0], [0.2, 0, 0], atol=1e-6)


def test_vertices_that_snap_to_one_place_become_one():
    scene = scene_of([[0.3, 0, 0], [0.32, 0, 0]], [APEX, APEX])
    snapped = snap_to_points(path_of([0, 0, 0], [0.7, 0, 0], [4, 0, 0]), scene, SETTINGS)
    np.testing.assert_allclose(snapped.vertices_V3, [[0.31, 0, 0], [4, 0, 0]], atol=1e-6)
    assert snapped.edges_E2.tolist() == [[0, 1]]


def test_level_gives_connected_nearly_horizontal_edges_their_mean_height():
    # run 4, rises 0.1 and 0.19 (level), then a rise of 0.21 (sloped: 0.0525)
    leveled = level_edges(path_of([0, 1, 0], [4, 1.1, 0], [4, 1.29, 4], [0, 1.5, 4]), SETTINGS)
    np.testing.assert_allclose(leveled.vertices_V3[:, 1], [1.13, 1.13, 1.13, 1.5])
    np.testing.assert_array_equal(leveled.vertices_V3[:, [0, 2]], [[0, 0], [4, 0], [4, 4], [0, 4]])


def test_level_leaves_steep_and_short_edges_alone():
    steep = path_of([0, 0, 0], [1, 0.05, 0], [2, 1, 0])
    assert np.array_equal(level_edges(steep, SETTINGS).vertices_V3, steep.vertices_V3)
    short = path_of([0, 0, 0], [0.1, 0.004, 0])
    assert np.array_equal(level_edges(short, SETTINGS).vertices_V3, short.vertices_V3)
    assert level_edges(short, replace(SETTINGS, level_min_run_m=0.05)).vertices_V3[0, 1] == 0.002


def test_level_keeps_two_separate_roofs_apart():
    vertices_V3 = np.array([[0, 1, 0], [4, 1.1, 0], [0, 5, 0], [4, 5.1, 0]], float)
    leveled = level_edges(Wireframe(vertices_V3, np.array([[0, 1], [2, 3]])), SETTINGS)
    np.testing.assert_allclose(leveled.vertices_V3[:, 1], [1.05, 1.05, 5.05, 5.05])


def test_the_steps_run_in_order_and_can_be_switched_off():
    segments_N23 = np.array([[[0, 0, 0], [4, 0.1, 0]], [[4, 0.1, 0.1], [4, 3, 0]]])
    scene = scene_of([[4, 3.2, 0], [4, 3.4, 0]], [APEX, APEX])
    both = segments_to_wireframe(segments_N23, scene, SETTINGS)
    np.testing.assert_allclose(both.vertices_V3, [[0, 0.05, 0], [4, 0.05, 0.05], [4, 3.3, 0]], atol=1e-6)
    unsnapped = segments_to_wireframe(segments_N23, scene, PostprocessConfig(snap=False))
    np.testing.assert_allclose(unsnapped.vertices_V3[2], [4, 3, 0])
    neither = segments_to_wireframe(segments_N23, scene, MERGE_ONLY)
    np.testing.assert_allclose(neither.vertices_V3[:, 1], [0, 0.1, 3])


@pytest.mark.parametrize("settings", [SETTINGS, PostprocessConfig(merge_radii_m=(), snap=False, level=False)])
@pytest.mark.parametrize("seed", range(5))
def test_order_and_direction_of_segments_do_not_change_a_bit(seed, settings):
    segments_N23 = random_segments(seed)
    # coordinates that tie, and zeros of both signs
    segments_N23[::4] = np.round(segments_N23[::4])
    segments_N23[1::4, 0, 0] = segments_N23[::4, 1, 0]
    shuffled_N23 = segments_N23[np.random.default_rng(seed + 100).permutation(len(segments_N23))]
    shuffled_N23[::2] = shuffled_N23[::2, ::-1]
    shuffled_N23[shuffled_N23 == 0] = -0.0
    scene = scene_of(np.random.default_rng(seed).uniform(-3, 3, (200, 3)), [i % 6 for i in range(200)])
    a, b = (segments_to_wireframe(s, scene, settings) for s in (segments_N23, shuffled_N23))
    assert a.vertices_V3.tobytes() == b.vertices_V3.tobytes()
    assert a.edges_E2.tobytes() == b.edges_E2.tobytes()


@pytest.mark.parametrize("seed", range(10))
def test_every_vertex_has_an_edge_and_every_edge_is_there_once(seed):
    scene = scene_of(np.random.default_rng(seed).uniform(-3, 3, (200, 3)), [i % 6 for i in range(200)])
    wireframe = segments_to_wireframe(random_segments(seed) * 0.5, scene, SETTINGS)
    assert wireframe.vertices_V3.dtype == np.float64 and wireframe.edges_E2.dtype == np.int64
    assert np.array_equal(np.unique(wireframe.edges_E2), np.arange(len(wireframe.vertices_V3)))
    assert (wireframe.edges_E2[:, 0] != wireframe.edges_E2[:, 1]).all()
    assert len(np.unique(np.sort(wireframe.edges_E2, axis=1), axis=0)) == len(wireframe.edges_E2)


@pytest.mark.parametrize(
    "segments_N23", [np.zeros((0, 2, 3)), np.ones((3, 2, 3)), [[[0, 0, 0], [0.1, 0, 0]]]], ids=["none", "loops", "tiny"]
)
def test_nothing_left_is_answered_with_the_fallback(segments_N23):
    wireframe = segments_to_wireframe(np.array(segments_N23), scene_of(), SETTINGS)
    assert wireframe.vertices_V3.tolist() == fallback_wireframe().vertices_V3.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert wireframe.edges_E2.tolist() == fallback_wireframe().edges_E2.tolist() == [[0, 1]]


def test_a_scene_without_valid_points_snaps_to_nothing():
    segments_N23 = np.array([[[0, 0, 0], [4, 0, 0]]], float)
    assert segments_to_wireframe(segments_N23, scene_of(), SETTINGS).vertices_V3.tolist() == segments_N23[0].tolist()


def test_segments_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"endpoints_N23 must be \[N, 2, 3\], got shape \(4, 6\)"):
        segments_to_wireframe(np.zeros((4, 6)), scene_of(), SETTINGS)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_segments_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="endpoints_N23 must be finite"):
        segments_to_wireframe(np.full((1, 2, 3), bad), scene_of(), SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("confidence", 0.0),
        ("confidence", 1.0),
        ("confidence", float("nan")),
        ("merge_radii_m", (0.1, -0.1)),
        ("snap_radius_m", float("nan")),
        ("snap_min_points", 0),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PostprocessConfig(**{field: value})


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_of_the_range_of_confidences_are_refused_in_words_that_leave_them_out(end):
    with pytest.raises(ValueError, match=f"confidence must be strictly between 0 and 1, got {end}"):
        PostprocessConfig(confidence=end)


def test_truth_of_a_scene_without_any_is_refused():
    with pytest.raises(ValueError, match="scene 'hand-made' has no ground truth"):
        true_wireframe(scene_of())


def test_truth_is_the_scenes_vertices_and_edges():
    scene = replace(scene_of(), gt_vertices=np.eye(3, dtype=np.float32), gt_edges=np.array([[0, 1], [1, 2]], np.int32))
    truth = true_wireframe(scene)
    assert truth.vertices_V3.tolist() == np.eye(3).tolist() and truth.edges_E2.tolist() == [[0, 1], [1, 2]]
