"""Generated scenes: a random roof and the labelled points that cameras in the street might have seen of it.

`generate_scene(i, seed=s)` is a pure function: the roof comes from Philox words at (seed, index, purpose 0), the
points from purpose 1. The truth, its centre and its scale do not depend on the number of points. World coordinates
are multiples of 1/1024 m, so that the last bits of a sine do not matter: scene i of seed s is the same everywhere.

`easy` has labels without errors and houses that all look along the street; `real` has any yaw, parts nobody saw,
and labels that are displaced, missing, invented and confused.
"""

import math
from dataclasses import dataclass

import numpy as np

from perceiver.scene import Scene
from train.roof_shapes import EAVE, FLASHING, HIP, RAKE, RIDGE, STEP_FLASHING, VALLEY, Roof
from train.roof_types import Draws, draw_roof

SETTINGS = ("easy", "real")

_GRID_M = 1 / 1024
_ROOF_FACE, _OTHER_HOUSE, _NON_HOUSE = 10, 11, 12
# class of a point on an edge, by the edge's class; point classes name what a picture shows
_POINT_CLASS = np.full(10, _ROOF_FACE)
_POINT_CLASS[[RAKE, RIDGE, EAVE, HIP, VALLEY, FLASHING, STEP_FLASHING]] = (3, 4, 5, 6, 7, 8, 9)
# the id in the gestalt pictures that a point class comes from; other house parts: siding, brick, window, door
_GESTALT_ID = np.array([1, 2, 3, 5, 4, 6, 11, 12, 9, 10, 13, 20, 26])
_HOUSE_IDS = np.array([20, 20, 20, 21, 22, 16, 16, 14, 18, 25])
# what stands in front of houses, in ids of ADE: tree, plant, car, fence
_OCCLUDER_IDS = np.array([4, 4, 4, 17, 20, 32])
_TIER = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3, 4])


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """Everything in which `easy` and `real` differ; lengths in metres, shares of points or of vertices."""

    types: tuple[str, ...]
    yaw_rad: float
    shares: tuple[float, float, float, float, float]
    blob_m: float
    noise_m: tuple[float, float]
    back_density: float
    hidden: int
    short: float


_SETTINGS = {
    "easy": _Setting(
        types=("gable", "gable", "hip", "half-hip", "pyramid", "L", "T", "T", "lean-to"),
        yaw_rad=0.15,
        shares=(0.16, 0.38, 0.26, 0.12, 0.08),
        blob_m=0.11,
        noise_m=(0.03, 0.08),
        back_density=0.4,
        hidden=2,
        short=0.15,
    ),
}


def generate_scenes(count: int, *, seed: int, points: int, setting: str, start: int = 0) -> list[Scene]:
    """Generate the scenes `start` to `start + count - 1` of a seed; see `generate_scene`."""
    return [generate_scene(start + i, seed=seed, points=points, setting=setting) for i in range(count)]


def generate_scene(index: int, *, seed: int, points: int, setting: str) -> Scene:
    """Generate one scene in the schema of the hub's rows.

    Args:
        index: number of the scene, 0 or more.
        seed: any integer in [0, 2^63).
        points: T, the number of rows of points, valid and padded; at least 16.
        setting: "easy" or "real".
    Returns:
        A scene with truth, votes and padding; three points of COLMAP for one of monocular depth.
    Raises:
        ValueError: if an argument is out of its range.
    Determinism: a pure function of its arguments, on any machine; `points` changes the points only.
    """
    if setting not in _SETTINGS:
        raise ValueError(f"setting must be one of {SETTINGS}, got {setting!r}")
    if not 0 <= seed < 2**63 or not 0 <= index < 2**63:
        raise ValueError(f"seed and index must be in [0, 2**63), got seed {seed} and index {index}")
    if points < 16:
        raise ValueError(f"points must be at least 16, got {points}")
    s = _SETTINGS[setting]
    d = Draws(seed, index, 0)
    house = _place(d, draw_roof(d, d.pick(s.types)), s)
    center, scale = _robust_box(_surface_points(d, house, 256))
    vertices_V3 = house.roof.vertices_V3.astype(np.float32)
    segments_E23 = (house.roof.vertices_V3[house.roof.edges_E2] - center) / scale
    return Scene(
        order_id=f"roofs-{setting}-{seed}-{index:06d}",
        gt_segments=segments_E23.astype(np.float32),
        gt_vertices=vertices_V3,
        gt_edges=house.roof.edges_E2.astype(np.int32),
        gt_edge_classes=house.roof.edge_class_E,
        center=center.astype(np.float32),
        scale=np.asarray(scale, np.float32),
        **_observe(Draws(seed, index, 1), house, points, s, center, scale),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _House:
    """A roof in the world, the height of the ground, and how well each place is seen."""

    roof: Roof
    ground: float
    front_xz: tuple[float, float]
    hidden_K3: np.ndarray
    back_density: float

    def density(self, points_N3: np.ndarray) -> np.ndarray:
        """Chance in [0, 1] that a point is seen: it falls from the front of the house to its back."""
        low, high = self.roof.vertices_V3.min(0), self.roof.vertices_V3.max(0)
        x, _, z = ((points_N3 - (low + high) / 2) / (high - low).max()).T
        behind = 0.5 - x * self.front_xz[0] - z * self.front_xz[1]
        density = 1 - (1 - self.back_density) * np.clip(behind, 0.0, 1.0)
        for center in self.hidden_K3:
            offset = points_N3 - center[:3]
            density[(offset * offset).sum(1) < 1.0] *= 0.05
        return density


def _place(d: Draws, roof: Roof, s: _Setting) -> _House:
    """Turn a roof, put it somewhere, round it to the grid, and choose what is hidden."""
    yaw, front = d.between(-s.yaw_rad, s.yaw_rad), d.between(0.0, 2 * math.pi)
    cos, sin = math.cos(yaw), math.sin(yaw)
    x, y, z = (roof.vertices_V3 - (roof.vertices_V3.min(0) + roof.vertices_V3.max(0)) / 2).T
    offset = [d.between(-5.0, 5.0), d.between(4.0, 6.0), d.between(-5.0, 5.0)]
    turned = np.stack([x * cos + z * sin, y, z * cos - x * sin], axis=1) + offset
    vertices_V3 = np.round(turned / _GRID_M) * _GRID_M
    roof = Roof(**{**vars(roof), "vertices_V3": vertices_V3})
    hidden = vertices_V3[[d.pick(range(len(vertices_V3))) for _ in range(s.hidden)]]
    return _House(
        roof=roof,
        ground=float(vertices_V3[:, 1].min()) - d.between(2.4, 3.2),
        front_xz=(math.cos(front), math.sin(front)),
        hidden_K3=hidden,
        back_density=s.back_density,
    )


def _surface_points(d: Draws, house: _House, count: int) -> np.ndarray:
    """Points on faces and walls, two to one."""
    walls = count // 3
    return np.concatenate([_face_points(d, house.roof, count - walls), _wall_points(d, house, walls)])


def _robust_box(points_N3: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and diagonal of the box between the 2.5 % quantiles of the points within 2.5 MAD of the median."""
    offset = points_N3 - np.median(points_N3, axis=0)
    distance = np.sqrt((offset * offset).sum(1))
    median = np.median(distance)
    kept = np.sort(points_N3[distance <= median + 2.5 * np.median(np.abs(distance - median))], axis=0)
    cut = round(0.025 * (len(kept) - 1))
    low, high = kept[cut], kept[len(kept) - 1 - cut]
    size = high - low
    center = np.round((low + high) / 2 / _GRID_M) * _GRID_M
    return center, max(round(float(np.sqrt((size * size).sum())) / _GRID_M) * _GRID_M, 1e-6)


def _choose(d: Draws, weight_K: np.ndarray, count: int) -> np.ndarray:
    """Draw indices in proportion to weights."""
    total = np.cumsum(weight_K)
    return np.minimum(np.searchsorted(total, d.uniform(count) * total[-1], side="right"), len(total) - 1)


def _edge_lengths(roof: Roof) -> np.ndarray:
    along = roof.vertices_V3[roof.edges_E2[:, 1]] - roof.vertices_V3[roof.edges_E2[:, 0]]
    return np.sqrt((along * along).sum(1))


def _on_edges(d: Draws, roof: Roof, edges_N: np.ndarray) -> np.ndarray:
    a, b = (roof.vertices_V3[roof.edges_E2[edges_N, i]] for i in (0, 1))
    return a + d.uniform(len(edges_N))[:, None] * (b - a)


def _wall_points(d: Draws, house: _House, count: int) -> np.ndarray:
    """Points between the free eaves and rakes and the ground."""
    length_E = _edge_lengths(house.roof) * house.roof.wall_E
    points = _on_edges(d, house.roof, _choose(d, length_E, count))
    points[:, 1] += d.uniform(count) * (house.ground - points[:, 1])
    return points


def _face_points(d: Draws, roof: Roof, count: int) -> np.ndarray:
    """Points on roof faces, uniform by area: drawn in the plan box of a face, kept inside its outline."""
    corner_FK3 = roof.vertices_V3[roof.faces_FK]
    following_FK3 = np.roll(corner_FK3, -1, axis=1)
    minus, plus = corner_FK3 - following_FK3, corner_FK3 + following_FK3
    normal_F3 = (minus[..., [1, 2, 0]] * plus[..., [2, 0, 1]]).sum(1)
    low_F3, size_F3 = corner_FK3.min(1), np.ptp(corner_FK3, axis=1)
    slant_F = np.sqrt((normal_F3 * normal_F3).sum(1)) / normal_F3[:, 1]

    tries = 3 * count + 32
    face = _choose(d, size_F3[:, 0] * size_F3[:, 2] * slant_F, tries)
    x = low_F3[face, 0] + d.uniform(tries) * size_F3[face, 0]
    z = low_F3[face, 2] + d.uniform(tries) * size_F3[face, 2]
    x0, z0 = corner_FK3[face, :, 0], corner_FK3[face, :, 2]
    x1, z1 = following_FK3[face, :, 0], following_FK3[face, :, 2]
    crosses = (z0 > z[:, None]) != (z1 > z[:, None])
    left = (x[:, None] - x0) * (z1 - z0) < (x1 - x0) * (z[:, None] - z0)
    inside = np.flatnonzero(((crosses & (left == (z1 > z0))).sum(1) & 1) == 1)
    kept = np.resize(inside, count)
    x, z, face = x[kept], z[kept], face[kept]
    anchor_N3, normal_N3 = corner_FK3[face, 0], normal_F3[face]
    drop = ((x - anchor_N3[:, 0]) * normal_N3[:, 0] + (z - anchor_N3[:, 2]) * normal_N3[:, 2]) / normal_N3[:, 1]
    return np.stack([x, anchor_N3[:, 1] - drop, z], axis=1)


def _clutter_points(d: Draws, house: _House, count: int) -> np.ndarray:
    """Points of trees, cars and fences: a few clumps around the house."""
    low, high = house.roof.vertices_V3.min(0), house.roof.vertices_V3.max(0)
    clumps = np.stack([d.uniform(4), d.uniform(4), d.uniform(4)], axis=1) * (high - low + 3.0) + (low - 1.5)
    clumps[:, 1] = house.ground + d.uniform(4) * (high[1] - house.ground)
    return clumps[_choose(d, np.ones(4), count)] + 0.6 * d.normal(3 * count).reshape(count, 3)


def _observe(d: Draws, house: _House, points: int, s: _Setting, center: np.ndarray, scale: float) -> dict:
    """Draw the points of a scene with their labels, votes and sources, as fields of `Scene`."""
    valid = points if not d.chance(s.short) else int(points * d.between(0.6, 1.0))
    xyz_N3, class_N = _labelled_points(d, house, valid, s)
    source_N = (np.arange(valid) % 4 == 3).astype(np.uint8)
    noise_N = np.array(s.noise_m)[source_N]
    xyz_N3 += noise_N[:, None] * d.normal(3 * valid).reshape(valid, 3)
    xyz_N3 = np.round(xyz_N3 / _GRID_M) * _GRID_M

    occluded_N = class_N == _NON_HOUSE
    other_N = _HOUSE_IDS[_choose(d, np.ones(len(_HOUSE_IDS)), valid)]
    gestalt_N = np.where(class_N == _OTHER_HOUSE, other_N, _GESTALT_ID[class_N])
    occluder_N = _OCCLUDER_IDS[_choose(d, np.ones(len(_OCCLUDER_IDS)), valid)]
    views_N = 1 + (d.uniform(valid) * d.uniform(valid) * 7.8).astype(np.int64)
    agree_N = np.minimum(1 + (d.uniform(valid) * views_N).astype(np.int64), views_N)

    order = np.argsort(source_N * 8 + _TIER[class_N], kind="stable")
    order = np.append(order, np.full(points - valid, order[-1]))
    return {
        "xyz_norm": ((xyz_N3 - center) / scale).astype(np.float32)[order],
        "class_id": class_N.astype(np.uint8)[order],
        "source": source_N[order],
        "mask": np.arange(points) < valid,
        "visible_src": np.where(occluded_N, 2, 1).astype(np.uint8)[order],
        "visible_id": np.where(occluded_N, occluder_N, gestalt_N).astype(np.int16)[order],
        "behind": gestalt_N.astype(np.int16)[order],
        "n_views_voted": views_N.astype(np.uint8)[order],
        "vote_frac": (agree_N / views_N).astype(np.float32)[order],
    }


def _labelled_points(d: Draws, house: _House, count: int, s: _Setting) -> tuple[np.ndarray, np.ndarray]:
    """Points on vertices, edges, faces, walls and clutter with the classes of what they lie on."""
    roof = house.roof
    numbers = [int(share * count) for share in s.shares]
    numbers[1] += count - sum(numbers)
    tries = [3 * n + 8 for n in numbers]
    vertex_N = _choose(d, np.ones(len(roof.vertices_V3)), tries[0])
    edge_N = _choose(d, _edge_lengths(roof), tries[1])
    sheets = (
        (roof.vertices_V3[vertex_N], roof.vertex_class_V[vertex_N]),
        (_on_edges(d, roof, edge_N), _POINT_CLASS[roof.edge_class_E[edge_N]]),
        (_face_points(d, roof, tries[2]), np.full(tries[2], _ROOF_FACE)),
        (_wall_points(d, house, tries[3]), np.full(tries[3], _OTHER_HOUSE)),
        (_clutter_points(d, house, tries[4]), np.full(tries[4], _NON_HOUSE)),
    )
    xyz, classes = [], []
    for number, (points_N3, class_N) in zip(numbers, sheets, strict=True):
        seen = np.flatnonzero(d.uniform(len(points_N3)) < house.density(points_N3))
        kept = np.resize(seen if len(seen) else np.arange(len(points_N3)), number)
        xyz.append(points_N3[kept])
        classes.append(class_N[kept])
    xyz[0] = xyz[0] + s.blob_m * d.normal(3 * numbers[0]).reshape(-1, 3)
    return np.concatenate(xyz), np.concatenate(classes)
