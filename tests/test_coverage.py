"""The share of the truth that lies near a point."""

import dataclasses

import numpy as np
import pytest

from tests.random_scenes import random_scene
from train.coverage import coverage, describe_coverage


def one_edge_scene(points_world: list, vertices: list, edges: list, **changes):
    points = np.array(points_world, np.float32)
    return random_scene(
        "a", points=len(points), xyz_norm=points / 2, mask=np.ones(len(points), bool),
        center=np.zeros(3, np.float32), scale=np.array(2, np.float32),
        gt_vertices=np.array(vertices, np.float32), gt_edges=np.array(edges, np.int32),
        gt_segments=np.zeros((len(edges), 2, 3), np.float32), gt_edge_classes=None, **changes,
    )  # fmt: skip


def test_coverage_is_the_share_of_vertices_and_of_edge_length_near_a_point():
    # a point at one end of an edge of 4 m sees 0.5 m of it, and one of its two vertices
    scene = one_edge_scene([[0, 0, 0]], [[0, 0, 0], [4, 0, 0]], [[0, 1]])
    assert coverage([scene]) == (0.5, pytest.approx(0.125))
    # an edge of 2 m wholly out of sight: sums run over scenes
    other = one_edge_scene([[0, 9, 0]], [[0, 0, 0], [2, 0, 0]], [[0, 1]])
    assert coverage([scene, other]) == (0.25, pytest.approx(0.5 / 6))
    assert coverage([scene], radius_m=1.0) == (0.5, pytest.approx(0.25))


def test_coverage_ignores_padded_points():
    scene = one_edge_scene([[9, 0, 0], [0, 0, 0]], [[0, 0, 0], [0.1, 0, 0]], [[0, 1]])
    assert coverage([scene]) == (1, 1)
    for mask in ([True, False], [False, False]):
        assert coverage([dataclasses.replace(scene, mask=np.array(mask))]) == (0, 0)


def test_coverage_is_printed_per_source():
    scene = one_edge_scene([[0, 0, 0]], [[0, 0, 0], [4, 0, 0]], [[0, 1]])
    assert describe_coverage("npz:x#dev", [scene]) == (
        "npz:x#dev: 50.0% of the true vertices and 12.5% of the true edges of 1 scenes lie within 0.5 m of a point"
    )


def test_coverage_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one scene"):
        coverage([])
    with pytest.raises(ValueError, match="must have ground truth, 'a' has none"):
        coverage([random_scene("a", gt_segments=None, gt_vertices=None, gt_edges=None)])
