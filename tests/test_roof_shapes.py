"""The wireframe that follows from faces: which edges there are, of which class, and how faces are cut up."""

import numpy as np
import pytest

from train.roof_shapes import (
    APEX,
    EAVE,
    EAVE_END,
    FLASHING,
    FLASHING_END,
    HIP,
    RAKE,
    RIDGE,
    TRANSITION_LINE,
    VALLEY,
    Point,
    Roof,
    RoofBuilder,
)


def build(*faces: list[Point]) -> Roof:
    builder = RoofBuilder()
    for face in faces:
        builder.face(face)
    return builder.roof()


def class_between(roof: Roof, a: Point, b: Point) -> int:
    """The class of the edge between two points."""
    i, j = (int(np.flatnonzero((roof.vertices_V3 == point).all(1))[0]) for point in (a, b))
    return int(roof.edge_class_E[(roof.edges_E2 == sorted((i, j))).all(1)][0])


def plan_area(corners_K3: np.ndarray) -> float:
    x, z = corners_K3[:, 0], corners_K3[:, 2]
    return float((z * np.roll(x, -1) - x * np.roll(z, -1)).sum() / 2)


RIDGE_ENDS = (0.0, 1.0, 0.0), (4.0, 1.0, 0.0)
FRONT = [(0.0, 0.0, 2.0), (4.0, 0.0, 2.0), *RIDGE_ENDS[::-1]]
BACK = [(0.0, 0.0, -2.0), (4.0, 0.0, -2.0), *RIDGE_ENDS[::-1]]


def test_two_slopes_make_a_gable():
    roof = build(FRONT, BACK)
    assert len(roof.vertices_V3) == 6 and sorted(roof.edge_class_E) == [EAVE] * 2 + [RAKE] * 4 + [RIDGE]
    assert class_between(roof, *RIDGE_ENDS) == RIDGE
    assert roof.wall_E.sum() == 6, "walls stand under eaves and rakes, not under the ridge"
    np.testing.assert_array_equal(roof.vertex_class_V[roof.vertices_V3[:, 1] == 1], APEX)
    np.testing.assert_array_equal(roof.vertex_class_V[roof.vertices_V3[:, 1] == 0], EAVE_END)


@pytest.mark.parametrize("turn", range(4))
def test_the_order_in_which_a_face_is_walked_does_not_matter(turn):
    roof = build(FRONT[turn:] + FRONT[:turn], BACK[::-1])
    same = build(FRONT, BACK)
    assert sorted(roof.edge_class_E) == sorted(same.edge_class_E)
    assert class_between(roof, FRONT[0], FRONT[1]) == EAVE


def test_a_sloped_fold_is_a_hip_if_convex_and_a_valley_if_concave():
    corner, peak = (0.0, 0.0, 0.0), (2.0, 1.0, 2.0)
    hip = build([corner, (4.0, 0.0, 0.0), peak], [corner, (0.0, 0.0, 4.0), peak])
    assert class_between(hip, corner, peak) == HIP
    valley = build([corner, (2.0, 1.0, -2.0), peak], [corner, (-2.0, 1.0, 2.0), peak])
    assert class_between(valley, corner, peak) == VALLEY


def test_a_level_fold_is_a_ridge_a_valley_or_a_change_of_pitch():
    def fold(front_y: float, back_y: float) -> int:
        a, b = (0.0, 0.0, 0.0), (2.0, 0.0, 0.0)
        front = [a, b, (2.0, front_y, 1.0), (0.0, front_y, 1.0)]
        back = [a, b, (2.0, back_y, -1.0), (0.0, back_y, -1.0)]
        return class_between(build(front, back), a, b)

    assert fold(-1.0, -1.0) == RIDGE
    assert fold(1.0, 1.0) == VALLEY
    assert fold(-1.0, 0.3) == fold(-0.3, 1.0) == TRANSITION_LINE


def test_the_upper_free_edge_of_a_shed_is_a_ridge():
    assert class_between(build(FRONT), *RIDGE_ENDS) == RIDGE


def test_a_line_against_a_wall_overrides_the_class_and_bears_no_wall():
    builder = RoofBuilder()
    builder.face(FRONT)
    builder.line(*RIDGE_ENDS, FLASHING)
    roof = builder.roof()
    assert class_between(roof, *RIDGE_ENDS) == FLASHING
    assert set(roof.vertex_class_V[roof.vertices_V3[:, 1] == 1]) == {FLASHING_END}
    assert roof.wall_E.sum() == 3


def test_a_line_without_a_face_is_an_edge():
    builder = RoofBuilder()
    builder.face(FRONT)
    builder.line((9.0, 0.0, 0.0), (9.0, 0.0, 1.0), FLASHING)
    roof = builder.roof()
    assert class_between(roof, (9.0, 0.0, 0.0), (9.0, 0.0, 1.0)) == FLASHING and len(roof.edges_E2) == 5


def test_no_wall_stands_under_a_face_that_stands_on_another():
    builder = RoofBuilder()
    builder.face(FRONT, grounded=False)
    assert not builder.roof().wall_E.any()


def test_repeated_points_fall_together_and_two_points_are_no_face():
    a, b, c = (0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (2.0, 1.0, -2.0)
    builder = RoofBuilder()
    builder.face([a, a, b, (2.0, 0.0, 1e-7), c])
    builder.face([a, a, b])
    assert builder.loops == [[0, 1, 2]] and len(builder.vertices) == 3


@pytest.mark.parametrize(
    "loop",
    [
        [(0.0, 0.0), (4.0, 0.0), (4.0, -2.0), (2.5, -2.0), (2.0, -0.5), (1.5, -2.0), (0.0, -2.0)],
        [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (3.0, -1.0), (0.0, -1.0)],
        [(0.0, 0.0), (3.0, -3.0), (3.0, -1.0), (5.0, -1.0), (1.0, 2.0)],
    ],
    ids=["notched", "collinear", "arrow"],
)
def test_triangles_tile_their_face(loop):
    """Wherever the walk round it starts, also in a corner that turns in."""
    points = [(x, x / 4, z) for x, z in loop]
    for first in range(len(points)):
        roof = build(points[first:] + points[:first])
        areas = [plan_area(roof.vertices_V3[triangle]) for triangle in roof.triangles_K3]
        assert len(areas) == len(loop) - 2 and min(areas) >= 0
        assert sum(areas) == pytest.approx(abs(plan_area(np.array(points))), abs=1e-12)
