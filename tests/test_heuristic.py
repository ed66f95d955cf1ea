"""The label-cluster yardstick: what it finds, what it cannot, and what it scores on generated roofs."""

from dataclasses import replace

import numpy as np
import pytest

from perceiver.scene import Scene
from perceiver.score import score_wireframe
from perceiver.wireframe import fallback_wireframe, true_wireframe
from train.heuristic import LINK_RADIUS_M, TUBE_RADIUS_M, label_clusters
from train.roofs import generate_scenes

CORNER, EDGE, FACE = 1, 5, 10
A, B, C = np.array([0.0, 2.0, 0.0]), np.array([4.0, 2.0, 0.0]), np.array([0.0, 2.0, 3.0])


def scene_of(*groups: tuple[int, np.ndarray], padding: int = 0) -> Scene:
    """A scene with points (class, [N, 3] metres); the padding repeats the last one."""
    xyz = np.concatenate([np.reshape(points, (-1, 3)) for _, points in groups]).astype(np.float32)
    class_id = np.concatenate([np.full(len(np.reshape(points, (-1, 3))), label) for label, points in groups])
    valid = len(xyz)
    xyz = np.concatenate([xyz, np.repeat(xyz[-1:], padding, axis=0)])
    return Scene(
        order_id="hand-made",
        xyz_norm=xyz / 4,
        class_id=np.append(class_id, np.full(padding, class_id[-1])).astype(np.uint8),
        source=np.zeros(len(xyz), np.uint8),
        mask=np.arange(len(xyz)) < valid,
        center=np.zeros(3, np.float32),
        scale=np.array(4, np.float32),
        visible_src=np.zeros(len(xyz), np.uint8),
        visible_id=np.zeros(len(xyz), np.int16),
    )


def blob(center: np.ndarray) -> np.ndarray:
    """Six points around a centre."""
    return center + 0.1 * np.concatenate([np.eye(3), -np.eye(3)])


def along(start: np.ndarray, end: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    return start + np.linspace(low, high, 21)[:, None] * (end - start)


CORNERS = (CORNER, np.stack([blob(A), blob(B), blob(C)]))


def test_corners_are_joined_where_edge_points_lie_between():
    found = label_clusters(scene_of(CORNERS, (EDGE, along(A, B)), (EDGE, along(A, C))))
    np.testing.assert_allclose(found.vertices_V3, [A, B, C], atol=1e-6)
    np.testing.assert_array_equal(found.edges_E2, [[0, 1], [0, 2]])


def test_a_vertex_without_an_edge_is_left_out():
    found = label_clusters(scene_of(CORNERS, (EDGE, along(A, C))))
    np.testing.assert_allclose(found.vertices_V3, [A, C], atol=1e-6)
    np.testing.assert_array_equal(found.edges_E2, [[0, 1]])


@pytest.mark.parametrize("covered, joined", [(0.45, False), (0.70, True)])
def test_more_than_60_percent_of_the_metres_must_be_covered(covered, joined):
    """Two of the four metres between A and B are not enough, three are."""
    found = label_clusters(scene_of(CORNERS, (EDGE, along(A, C)), (EDGE, along(A, B, high=covered))))
    assert len(found.edges_E2) == 1 + joined


@pytest.mark.parametrize("offset, joined", [(0.9 * TUBE_RADIUS_M, True), (1.1 * TUBE_RADIUS_M, False)])
def test_only_points_near_the_segment_cover_it(offset, joined):
    aside = along(A, B) + np.array([0, offset, 0])
    found = label_clusters(scene_of(CORNERS, (EDGE, along(A, C)), (EDGE, aside)))
    assert len(found.edges_E2) == 1 + joined


def test_a_short_segment_needs_one_point():
    near = A + np.array([0.8, 0, 0])
    found = label_clusters(scene_of((CORNER, np.stack([blob(A), blob(near)])), (EDGE, (A + near) / 2)))
    np.testing.assert_array_equal(found.edges_E2, [[0, 1]])


@pytest.mark.parametrize("gap, clusters", [(0.9 * LINK_RADIUS_M, 1), (1.1 * LINK_RADIUS_M, 2)])
def test_points_within_the_link_radius_are_one_corner(gap, clusters):
    """One corner is a mean; two of them would be joined with B each."""
    pair = np.stack([A, A - np.array([gap, 0, 0])])
    found = label_clusters(scene_of((CORNER, pair), (CORNER, blob(B)), (EDGE, along(A, B))))
    assert len(found.vertices_V3) == clusters + 1
    if clusters == 1:
        np.testing.assert_allclose(found.vertices_V3[0], pair.mean(0), atol=1e-6)


def test_a_cluster_of_few_among_many_is_noise():
    crowd = np.repeat(np.stack([blob(A), blob(B)]), 100, axis=0)
    edges = [(EDGE, along(A, B)), (EDGE, along(A, C))]
    lonely = label_clusters(scene_of((CORNER, crowd), (CORNER, C), *edges))
    assert len(lonely.vertices_V3) == 2
    enough = label_clusters(scene_of((CORNER, crowd), (CORNER, np.repeat(C[None], 20, axis=0)), *edges))
    assert len(enough.vertices_V3) == 3


def test_clusters_round_one_place_are_not_joined():
    """A ring round a corner has its mean there, too: a segment without length is no edge."""
    angle = np.arange(32) * np.pi / 16
    ring = np.round(np.stack([np.cos(angle), 0 * angle, np.sin(angle)], axis=1) * 64) / 64
    ring = np.concatenate([ring[:16], -ring[:16]])
    found = label_clusters(scene_of((CORNER, ring), (CORNER, np.zeros((6, 3))), (EDGE, along(A * 0, B))))
    assert_fallback(found)


def assert_fallback(found) -> None:
    np.testing.assert_array_equal(found.vertices_V3, fallback_wireframe().vertices_V3)
    np.testing.assert_array_equal(found.edges_E2, fallback_wireframe().edges_E2)


@pytest.mark.parametrize("groups", [[(FACE, A)], [CORNERS], [(EDGE, along(A, B))]], ids=["face", "corners", "edges"])
def test_without_corners_or_edges_the_answer_is_the_fallback(groups):
    assert_fallback(label_clusters(scene_of(*groups)))


def test_padding_does_not_count():
    groups = CORNERS, (EDGE, along(A, B)), (CORNER, C + 9.0)
    assert_same(label_clusters(scene_of(*groups)), label_clusters(scene_of(*groups, padding=500)))


def test_truth_is_not_read():
    scene = generate_scenes(1, seed=0, points=512, setting="easy")[0]
    blind = replace(scene, gt_segments=None, gt_vertices=None, gt_edges=None, gt_edge_classes=None)
    assert_same(label_clusters(blind), label_clusters(scene))


def assert_same(found, other) -> None:
    np.testing.assert_array_equal(found.vertices_V3, other.vertices_V3)
    np.testing.assert_array_equal(found.edges_E2, other.edges_E2)


@pytest.mark.parametrize("setting, points, low, high", [("easy", 512, 0.62, 0.82), ("real", 2048, 0.25, 0.4)])
def test_it_scores_as_handcrafted_solutions_do(setting, points, low, high):
    """About 0.7 on clean labels; 0.25 to 0.40 on real data."""
    scenes = generate_scenes(12, seed=0, points=points, setting=setting)
    assert low < np.mean([score_wireframe(label_clusters(s), true_wireframe(s)).hss for s in scenes]) < high
