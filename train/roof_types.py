"""Types of procedural roofs: how bodies, wings, dormers and lean-tos are put together, with random sizes.

Local frame: metres, Y up, ridge of the main body along x, its eaves at height 0. Every body is made of one end
formula (`_end`) and one side formula (`_add_slope`):

    end at x with gable share g and hip run r, ridge height h, half width w (sides s = +1, -1):
        top = (x -/+ r, h, 0)    mid_s = (x, g h, s (1 - g) w)    corner_s = (x, 0, s w)
        g = 1, r = 0 gable;  g = 0 hip;  between: half-hip.  Repeated points of a loop fall together.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from train.draws import Draws
from train.roof_shapes import FLASHING, STEP_FLASHING, VALLEY, Point, Roof, RoofBuilder

MIN_GAP_M = 0.65
MAX_EDGES = 40
_CLEAR_M = 0.7


class _End(NamedTuple):
    """How a ridge ends: share of the height that is gable, horizontal run of the hip above it."""

    gable: float
    run: float


class _Wing(NamedTuple):
    """A ridge across the main one; its valleys start at the main eave. `rise` of the body: valleys meet its ridge."""

    x: float
    half: float
    rise: float
    depth: float
    end: _End


class _Body(NamedTuple):
    """A ridge along x from 0 to `length` with `half` to each side and `rise` above the eaves."""

    length: float
    half: float
    rise: float
    left: _End
    right: _End


def _end(b: RoofBuilder, body: _Body, x: float, inward: int, end: _End) -> dict[int, list[Point]]:
    """Add the face of an end; per side the chain of points from ridge to eave."""
    top = (x + inward * end.run, body.rise, 0.0)
    mid = {s: (x, end.gable * body.rise, s * (1 - end.gable) * body.half) for s in (1, -1)}
    b.face([top, mid[1], mid[-1]])
    return {s: [top, mid[s], (x, 0.0, s * body.half)] for s in (1, -1)}


def _apex(body: _Body, wing: _Wing, side: int) -> Point:
    """Where the ridge of a wing meets the slope of the body."""
    return (wing.x, wing.rise, side * body.half * (1 - wing.rise / body.rise))


def _add_slope(b: RoofBuilder, left: list[Point], right: list[Point], side: int, body: _Body, wings, joints) -> None:
    """Add one side of a body between two chains, cut out for its wings.

    `joints` are the points of the ridge where wings of either side meet it, in ascending x: the faces of both sides
    must have them as vertices.
    """
    outline = list(left)
    for wing in sorted(wings):
        foot_left, foot_right = ((wing.x + s * wing.half, 0.0, side * body.half) for s in (-1, 1))
        apex = _apex(body, wing, side)
        if wing.rise == body.rise:
            b.face([*outline, foot_left, apex, *[p for p in joints[::-1] if outline[0][0] < p[0] < apex[0]]])
            outline = [apex, foot_right]
        else:
            outline += [foot_left, apex, foot_right]
    b.face([*outline, *right[::-1], *[p for p in joints[::-1] if outline[0][0] < p[0] < right[0][0]]])


def _add_wing(b: RoofBuilder, apex: Point, feet: list[Point], side: int, half: float, front: float, end: _End):
    """Add the two slopes and the end of a wing whose ridge runs from `apex` to |z| = `front`."""
    x, rise, _ = apex
    top = (x, rise, side * (front - end.run))
    mids = [(x + s * (1 - end.gable) * half, end.gable * rise, side * front) for s in (-1, 1)]
    for s, foot, mid in zip((-1, 1), feet, mids, strict=True):
        b.face([foot, apex, top, mid, (x + s * half, 0.0, side * front)])
    b.face([top, *mids])


def _add_body(b: RoofBuilder, body: _Body, wings: dict[int, list[_Wing]]) -> None:
    """Add a body with wings on its sides +1 (front) and -1 (back)."""
    left = _end(b, body, 0.0, 1, body.left)
    right = _end(b, body, body.length, -1, body.right)
    joints = sorted({_apex(body, w, 0) for side in wings.values() for w in side if w.rise == body.rise})
    for side in (1, -1):
        _add_slope(b, left[side], right[side], side, body, wings[side], joints)
        for wing in wings[side]:
            feet = [(wing.x + s * wing.half, 0.0, side * body.half) for s in (-1, 1)]
            _add_wing(b, _apex(body, wing, side), feet, side, wing.half, body.half + wing.depth, wing.end)


def _add_corner(b: RoofBuilder, body: _Body, half: float, depth: float, end: _End) -> None:
    """Add an L: the body turns at its left end, where a hip outside and a valley inside meet at the ridges."""
    crossing, outer, inner = (half, body.rise, 0.0), (0.0, 0.0, -body.half), (2 * half, 0.0, body.half)
    right = _end(b, body, body.length, -1, body.right)
    _add_slope(b, [crossing, inner], right[1], 1, body, [], [])
    _add_slope(b, [crossing, outer], right[-1], -1, body, [], [])
    _add_wing(b, crossing, [outer, inner], 1, half, body.half + depth, end)


def _add_dormer(b: RoofBuilder, body: _Body, side: int, x: float, half: float, heights: tuple[float, float, float]):
    """Add a dormer with a gable of its own; `heights` of its base, eaves and ridge, all on or above the slope."""
    base, eave, ridge = heights
    depth = {y: side * body.half * (1 - y / body.rise) for y in heights}
    ridge_front, ridge_back = (x, ridge, depth[base]), (x, ridge, depth[ridge])
    feet = [(x + s * half, base, depth[base]) for s in (-1, 1)]
    for s, foot in zip((-1, 1), feet, strict=True):
        eave_front, eave_back = (x + s * half, eave, depth[base]), (x + s * half, eave, depth[eave])
        b.face([eave_front, ridge_front, ridge_back, eave_back], grounded=False)
        b.line(eave_back, ridge_back, VALLEY)
        b.line(foot, eave_back, STEP_FLASHING)
    b.line(feet[0], feet[1], FLASHING)


class _Wall(NamedTuple):
    """A wall of the body: a function from (along, height, out of the wall) to a point, its free stretch, its top."""

    place: Callable[[float, float, float], Point]
    low: float
    high: float
    top: float


def _add_lean_to(b: RoofBuilder, d: Draws, wall: _Wall, *, hipped: bool, low: bool = False) -> None:
    """Add a lower roof that leans against a wall, with open sides or hipped ones."""
    drop, depth, run = d.between(0.7, 2.4 if low else 1.4), d.between(1.0, 2.2), d.between(0.7, 0.9) if hipped else 0.0
    bottom = -drop - depth * d.between(0.25, 0.5) - (0.3 if hipped else 0.0)
    ends = (wall.low, wall.high)
    tops = [wall.place(along + inward * run, -drop, 0.0) for along, inward in zip(ends, (1, -1), strict=True)]
    corners = [wall.place(along, bottom, depth) for along in ends]
    b.face([tops[0], tops[1], corners[1], corners[0]])
    b.line(tops[0], tops[1], FLASHING)
    if hipped:
        for along, top, corner in zip(ends, tops, corners, strict=True):
            foot = wall.place(along, bottom, 0.0)
            b.face([foot, top, corner])
            b.line(foot, top, STEP_FLASHING)


def _add_annex(b: RoofBuilder, d: Draws, wall: _Wall) -> None:
    """Add a lower roof whose ridge runs out of a wall."""
    center, half = (wall.low + wall.high) / 2, (wall.high - wall.low) / 2
    ridge = min(wall.top, half * d.between(0.4, 0.9) - d.between(0.7, 2.6))
    eave = min(ridge - 0.35 * half, -0.7)
    depth, end = d.between(1.8, 3.5), _draw_end(d, half)
    out, shoulder = depth - end.run, (1 - end.gable) * half
    top = wall.place(center, ridge, out)
    mids = [wall.place(center + s * shoulder, eave + end.gable * (ridge - eave), depth) for s in (-1, 1)]
    for s, mid in zip((-1, 1), mids, strict=True):
        foot, peak = wall.place(center + s * half, eave, 0.0), wall.place(center, ridge, 0.0)
        b.face([foot, peak, top, mid, wall.place(center + s * half, eave, depth)])
        b.line(foot, peak, STEP_FLASHING)
    b.face([top, *mids])


def _side_wall(body: _Body, side: int, low: float, high: float) -> _Wall:
    return _Wall(lambda along, y, out: (along, y, side * (body.half + out)), low, high, -0.7)


def _end_wall(body: _Body, right: bool, share: float) -> _Wall:
    """The wall under an end; with a gable above it, a lower roof may reach into the gable."""
    x, outward, end = (body.length, 1, body.right) if right else (0.0, -1, body.left)
    top = 0.6 * (body.rise - 0.7) if end.gable == 1 else -0.7
    half = share * body.half
    return _Wall(lambda along, y, out: (x + outward * out, y, along), -half, half, top)


def _draw_gable(d: Draws, half: float) -> _End:
    return _End(1.0, 0.0)


def _draw_hip(d: Draws, half: float) -> _End:
    return _End(0.0, half * d.between(0.7, 1.1))


def _draw_half_hip(d: Draws, half: float) -> _End:
    gable = d.between(0.4, 0.6)
    return _End(gable, (1 - gable) * half * d.between(0.8, 1.2))


def _draw_end(d: Draws, half: float) -> _End:
    kind = d.between(0.0, 1.0)
    if kind < 0.6:
        return _draw_gable(d, half)
    return _draw_hip(d, half) if kind < 0.9 else _draw_half_hip(d, half)


def _draw_body(d: Draws, left: Callable | None = None, right: Callable | None = None, *, steep: bool = False) -> _Body:
    """Draw the sizes of a body; an end is given as a function of (draws, half) or is drawn, too."""
    half = d.between(1.25, 2.0) if steep else d.between(1.5, 2.4)
    rise = half * (d.between(0.75, 1.2) if steep else d.between(0.55, 1.0))
    ends = [(end or _draw_end)(d, half) for end in (left, right)]
    return _Body(
        sum(end.run for end in ends) + (d.between(3.0, 5.6) if steep else d.between(3.2, 6.0)), half, rise, *ends
    )


def _margin(body: _Body, end: _End, height: float) -> float:
    """How far the end has moved inward at a height."""
    over = height / body.rise - end.gable
    return end.run * over / (1 - end.gable) if over > 0 else 0.0


def _fits(body: _Body, x: float, half: float, height: float) -> bool:
    low = _margin(body, body.left, height) + half + _CLEAR_M
    high = body.length - _margin(body, body.right, height) - half - _CLEAR_M
    return low <= x <= high


def _draw_wing(d: Draws, body: _Body, low: float, high: float, *, full: bool = False) -> _Wing | None:
    """Draw a wing between two places on the eave; None if there is no room."""
    half = min((high - low) / 2, d.between(0.9, 1.8))
    x = d.between(low + half, high - half)
    rise = body.rise if full else min(body.rise, half * d.between(0.6, 1.0))
    if rise > body.rise - 0.3:
        rise = body.rise
    depth, end = d.between(0.9, 2.6), _draw_end(d, half)
    room = _fits(body, x, half, 0.0) and _fits(body, x, 0.0, rise)
    return _Wing(x, half, rise, depth + end.run, end) if room and half >= 0.7 else None


def _draw_dormer(d: Draws, b: RoofBuilder, body: _Body, side: int, low: float, high: float) -> bool:
    """Add a dormer between two places on the eave; False if there is no room."""
    half = min((high - low) / 2, d.between(0.7, 1.1))
    base, cheek = d.between(0.12, 0.3), d.between(0.68, 0.85)
    rise = min(half * d.between(0.5, 0.8), body.rise - 0.15 - base - cheek)
    x, ridge = d.between(low + half, high - half), base + cheek + rise
    room = _fits(body, x, half - 0.3, ridge)
    if half < 0.68 or rise < 0.27 or not room:
        return False
    _add_dormer(b, body, side, x, half, (base, base + cheek, ridge))
    return True


def _furnish(d: Draws, b: RoofBuilder, body: _Body, parts: dict[int, list[str]]) -> bool:
    """Add a body with the named parts side by side on its sides (+1 front, -1 back); False if one had no room."""
    wings: dict[int, list[_Wing]] = {1: [], -1: []}
    complete = True
    for side, names in parts.items():
        width = (body.length - 2 * _CLEAR_M) / max(len(names), 1)
        for slot, name in enumerate(names):
            low = _CLEAR_M * 1.5 + slot * width
            high = low + width - _CLEAR_M
            if name in ("wing", "full wing"):
                wing = _draw_wing(d, body, low, high, full=name == "full wing")
                wings[side] += [wing] if wing else []
                complete &= wing is not None
            elif name == "dormer":
                complete &= _draw_dormer(d, b, body, side, low, high)
            elif name == "lean-to":
                _add_lean_to(b, d, _side_wall(body, side, low, high), hipped=high - low > 2.4 and d.chance(0.4))
            elif name == "annex":
                _add_annex(b, d, _side_wall(body, side, low, high))
    _add_body(b, body, wings)
    return complete


def _shed(d: Draws, b: RoofBuilder) -> bool:
    length, width = d.between(3.0, 6.5), d.between(2.5, 4.5)
    rise = width * d.between(0.25, 0.5)
    b.face([(0.0, 0.0, 0.0), (length, 0.0, 0.0), (length, rise, width), (0.0, rise, width)])
    return True


def _pyramid(d: Draws, b: RoofBuilder) -> bool:
    half, run = d.between(1.6, 2.8), d.between(1.6, 2.8)
    return _furnish(d, b, _Body(2 * run, half, half * d.between(0.5, 0.9), _End(0.0, run), _End(0.0, run)), {})


def _gable(d: Draws, b: RoofBuilder) -> bool:
    return _furnish(d, b, _draw_body(d, _draw_gable, _draw_gable), {})


def _hip(d: Draws, b: RoofBuilder) -> bool:
    return _furnish(d, b, _draw_body(d, _draw_hip, _draw_hip), {})


def _half_hip(d: Draws, b: RoofBuilder) -> bool:
    return _furnish(d, b, _draw_body(d, _draw_half_hip, d.pick((_draw_half_hip, _draw_gable))), {})


def _l_wing(d: Draws, b: RoofBuilder) -> bool:
    body = _draw_body(d, _draw_gable)
    half = min(body.half * d.between(0.75, 1.1), (body.length - body.right.run) / 2 - 0.9)
    end = _draw_end(d, half)
    _add_corner(b, body, half, end.run + d.between(1.2, 3.0), end)
    return True


def _t_wing(d: Draws, b: RoofBuilder) -> bool:
    return _furnish(d, b, _draw_body(d), {1: [d.pick(("wing", "full wing"))]})


def _cross_wing(d: Draws, b: RoofBuilder) -> bool:
    """Add wings at the same place of the ridge on both sides."""
    body = _draw_body(d)
    wing = _draw_wing(d, body, _CLEAR_M, body.length - _CLEAR_M, full=True)
    if wing is None:
        return False
    _add_body(b, body, {1: [wing], -1: [wing._replace(depth=wing.end.run + d.between(0.9, 2.6))]})
    return True


def _lean_to(d: Draws, b: RoofBuilder) -> bool:
    return _furnish(d, b, _draw_body(d), {1: ["lean-to"]})


def _dormer(d: Draws, b: RoofBuilder) -> bool:
    return _furnish(d, b, _draw_body(d), {1: ["dormer"] if d.chance(0.6) else ["dormer", "dormer"]})


def _house(d: Draws, b: RoofBuilder) -> bool:
    """Add a body with several parts on all sides, as in typical real scenes; a part without room is left out."""
    body = _draw_body(d, steep=True)
    names = ("wing", "wing", "full wing", "dormer", "dormer", "lean-to", "annex")
    slots = 2 if body.length > 5.6 else 1
    parts = {side: [d.pick(names) for _ in range(slots if d.chance(0.7) else 1)] for side in (1, -1)}
    if d.chance(0.2):
        parts[-1] = []
    for right in (False, True):
        kind = d.between(0.0, 1.0)
        if kind < 0.4:
            _add_annex(b, d, _end_wall(body, right, d.between(0.6, 0.9)))
        elif kind < 0.5:
            _add_lean_to(b, d, _end_wall(body, right, d.between(0.6, 0.95)), hipped=False, low=True)
    _furnish(d, b, body, parts)
    return True


# kind -> adds the roof to an empty builder; False: did not work out, draw again
ROOF_TYPES: dict[str, Callable[[Draws, RoofBuilder], bool]] = {
    "shed": _shed,
    "pyramid": _pyramid,
    "gable": _gable,
    "hip": _hip,
    "half-hip": _half_hip,
    "L": _l_wing,
    "T": _t_wing,
    "cross": _cross_wing,
    "lean-to": _lean_to,
    "dormer": _dormer,
    "house": _house,
}


def draw_roof(d: Draws, kind: str) -> Roof:
    """Draw a roof of a type, again and again until it fits the limits.

    Args:
        d: where the numbers come from.
        kind: one of `ROOF_TYPES`.
    Returns:
        A roof with 4 to MAX_EDGES edges, no two of its vertices closer than MIN_GAP_M.
    """
    while True:
        b = RoofBuilder()
        if ROOF_TYPES[kind](d, b) and _smallest_gap(np.array(b.vertices)) >= MIN_GAP_M:
            roof = b.roof()
            if len(roof.edges_E2) <= MAX_EDGES:
                return roof


def _smallest_gap(vertices_V3: np.ndarray) -> float:
    gap = vertices_V3[:, None] - vertices_V3[None]
    return math.sqrt(((gap * gap).sum(2) + 1e9 * np.eye(len(gap))).min())
