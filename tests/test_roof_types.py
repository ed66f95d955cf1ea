"""Every type of roof is a roof: planar faces that tile the plan, edges that do not cross, vertices far apart."""

from functools import cache

import numpy as np
import pytest

from train.draws import Draws
from train.roof_shapes import EAVE, FLASHING, HIP, RAKE, RIDGE, STEP_FLASHING, VALLEY, Roof
from train.roof_types import MAX_EDGES, MIN_GAP_M, ROOF_TYPES, draw_roof

every_type = pytest.mark.parametrize("kind", ROOF_TYPES)


@cache
def roofs(kind: str) -> list[Roof]:
    return [draw_roof(Draws(0, index, 0), kind) for index in range(60)]


def components(edges_E2: np.ndarray) -> int:
    """Number of connected parts among the vertices of edges."""
    root = {int(v): int(v) for v in edges_E2.ravel()}

    def find(v: int) -> int:
        while root[v] != v:
            v = root[v]
        return v

    for a, b in edges_E2.tolist():
        root[find(a)] = find(b)
    return sum(v == r for v, r in root.items())


def face_edges(roof: Roof) -> np.ndarray:
    """The edges of faces, without the lines that belong to none."""
    pairs = np.stack([roof.faces_FK, np.roll(roof.faces_FK, -1, axis=1)], axis=-1).reshape(-1, 2)
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


def segment_distance(p: np.ndarray, q: np.ndarray, r: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Smallest distances between segments pq and rs (Ericson, Real-Time Collision Detection, 5.1.9)."""
    d, e, w = q - p, s - r, p - r
    dd, ee, de, dw, ew = ((x * y).sum(1) for x, y in ((d, d), (e, e), (d, e), (d, w), (e, w)))
    denominator = dd * ee - de * de
    parallel = denominator < 1e-12
    t = np.where(parallel, 0.0, np.clip((de * ew - dw * ee) / np.where(parallel, 1.0, denominator), 0.0, 1.0))
    u = np.clip((de * t + ew) / ee, 0.0, 1.0)
    t = np.clip((de * u - dw) / dd, 0.0, 1.0)
    gap = w + d * t[:, None] - e * u[:, None]
    return np.sqrt((gap * gap).sum(1))


@every_type
def test_edges_number_4_to_40_and_vertices_keep_their_gap(kind):
    for roof in roofs(kind):
        assert 4 <= len(roof.edges_E2) <= MAX_EDGES
        gap = np.linalg.norm(roof.vertices_V3[:, None] - roof.vertices_V3, axis=2)
        assert gap[np.triu_indices(len(gap), 1)].min() >= MIN_GAP_M > 0.6


@every_type
def test_edges_are_unique_and_every_vertex_has_two(kind):
    for roof in roofs(kind):
        assert len(np.unique(np.sort(roof.edges_E2, axis=1), axis=0)) == len(roof.edges_E2)
        assert np.bincount(roof.edges_E2.ravel(), minlength=len(roof.vertices_V3)).min() >= 2


@every_type
def test_faces_are_planar(kind):
    for roof in roofs(kind):
        for loop in roof.faces_FK:
            corners = roof.vertices_V3[list(dict.fromkeys(loop.tolist()))]
            assert np.linalg.svd(corners - corners.mean(0), compute_uv=False)[2:].sum() < 1e-9


@every_type
def test_faces_that_hang_together_are_discs(kind):
    """Euler: V - E + F = 1 for each part, that is: no holes, no vertex of one face on an edge of another."""
    for roof in roofs(kind):
        edges = face_edges(roof)
        assert len(np.unique(edges)) - len(edges) + len(roof.faces_FK) == components(edges)


@every_type
def test_no_two_edges_meet_but_at_their_ends(kind):
    for roof in roofs(kind):
        first, second = np.triu_indices(len(roof.edges_E2), 1)
        shared = (roof.edges_E2[first][:, :, None] == roof.edges_E2[second][:, None]).any((1, 2))
        ends = roof.vertices_V3[roof.edges_E2]
        a, b = ends[first[~shared]], ends[second[~shared]]
        assert len(a) == 0 or segment_distance(a[:, 0], a[:, 1], b[:, 0], b[:, 1]).min() > 0.15


@every_type
def test_edges_of_a_vertex_point_different_ways(kind):
    """No two edges lie on each other: at least 8 degrees apart."""
    for roof in roofs(kind):
        for vertex in range(len(roof.vertices_V3)):
            mine = roof.edges_E2[(roof.edges_E2 == vertex).any(1)]
            along = roof.vertices_V3[mine.sum(1) - vertex] - roof.vertices_V3[vertex]
            along /= np.linalg.norm(along, axis=1, keepdims=True)
            assert (along @ along.T)[np.triu_indices(len(along), 1)].max() < np.cos(np.radians(8))


@pytest.mark.parametrize("kind", sorted(ROOF_TYPES.keys() - {"dormer", "house"}))
def test_no_place_has_two_roofs_above(kind):
    """The middle of each triangle lies in no other one (dormers stand on a slope, so not for them)."""
    for roof in roofs(kind):
        corners = roof.vertices_V3[roof.triangles_K3][:, :, [2, 0]]
        middle = corners.mean(1)
        sides = []
        for i in range(3):
            side, offset = corners[:, (i + 1) % 3] - corners[:, i], middle[:, None] - corners[:, i]
            sides.append(side[:, 0] * offset[..., 1] - side[:, 1] * offset[..., 0])
        np.testing.assert_array_equal((np.array(sides) > 1e-9).all(0).sum(1), 1)


@every_type
def test_eaves_and_ridges_are_level_and_the_rest_is_not(kind):
    for roof in roofs(kind):
        rise = np.abs(np.diff(roof.vertices_V3[roof.edges_E2][:, :, 1], axis=1)[:, 0])
        level = np.isin(roof.edge_class_E, (EAVE, RIDGE, FLASHING))
        assert (rise[level] < 1e-9).all() and (rise[~level] > 0.1).all()


@pytest.mark.parametrize(
    "kind, has, has_not",
    [
        ("shed", {EAVE, RAKE, RIDGE}, {HIP, VALLEY, FLASHING, STEP_FLASHING}),
        ("pyramid", {EAVE, HIP}, {RAKE, RIDGE, VALLEY}),
        ("gable", {EAVE, RAKE, RIDGE}, {HIP, VALLEY}),
        ("hip", {EAVE, HIP, RIDGE}, {RAKE, VALLEY}),
        ("half-hip", {EAVE, HIP, RAKE, RIDGE}, {VALLEY}),
        ("L", {HIP, VALLEY, RIDGE}, {FLASHING, STEP_FLASHING}),
        ("T", {VALLEY, RIDGE}, {FLASHING, STEP_FLASHING}),
        ("cross", {VALLEY, RIDGE}, {FLASHING, STEP_FLASHING}),
        ("lean-to", {FLASHING}, {VALLEY}),
        ("dormer", {FLASHING, STEP_FLASHING, VALLEY}, set()),
    ],
)
def test_a_type_has_the_lines_it_is_known_by(kind, has, has_not):
    for roof in roofs(kind):
        found = set(roof.edge_class_E.tolist())
        assert has <= found and not has_not & found


def test_a_pyramid_has_one_apex_where_all_hips_meet():
    for roof in roofs("pyramid"):
        assert len(roof.vertices_V3) == 5 and (roof.vertex_class_V == 0).sum() == 1


def test_the_feet_of_a_dormer_lie_on_the_slope_it_stands_on():
    for roof in roofs("dormer"):
        feet = roof.vertices_V3[np.unique(roof.edges_E2[roof.edge_class_E == FLASHING])]
        slopes = roof.vertices_V3[roof.faces_FK[:, :3]]
        normals = np.cross(slopes[:, 1] - slopes[:, 0], slopes[:, 2] - slopes[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        above = np.abs(((feet[:, None] - slopes[:, 0]) * normals).sum(2))
        assert above.min(1).max() < 1e-9


def test_a_house_has_more_parts_than_a_type():
    """Typical real scenes have 15 to 35 edges."""
    assert np.median([len(roof.edges_E2) for roof in roofs("house")]) >= 20
