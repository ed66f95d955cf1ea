"""Generated scenes: a random roof and the labelled points that cameras in the street might have seen of it.

`generate_scene(i, seed=s)` is a pure function: the roof comes from Philox words at (seed, index, purpose 0), the
points from purpose 1. The truth, its centre and its scale do not depend on the number of points. World coordinates
are multiples of 1/1024 m, so that the last bits of a sine do not matter: scene i of seed s is the same everywhere.

`easy` has labels without errors and houses that stand along the axes; `real` has any yaw, half of the house hardly
seen, and labels that are displaced, missing, invented and confused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perceiver.scene import Scene
from train.draws import Draws, bell, unit
from train.roof_shapes import (
    APEX,
    EAVE,
    EAVE_END,
    FLASHING,
    FLASHING_END,
    HIP,
    RAKE,
    RIDGE,
    STEP_FLASHING,
    VALLEY,
    Roof,
    cross,
)
from train.roof_types import draw_roof

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
_PIECES, _CLUMPS, _CLUMP_M, _BOX_POINTS = 4, 4, 0.6, 256
_TIER = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3, 4])


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """Everything in which `easy` and `real` differ.

    Args:
        types: what roofs are drawn from, each with the same chance.
        yaw_rad: largest turn to either side.
        shares: shares of points on vertices, edges, faces, walls and clutter.
        blob_m: deviation of points with a corner label from the place of the label.
        noise_m: deviation of points of COLMAP and of depth from their surface.
        back_density, falloff, contrast: points are rarer at the back by back_density ** falloff; the larger the
            contrast, the more sudden.
        trees: number of spheres of 1 m around vertices that are hardly seen.
        short: share of scenes with fewer points than rows.
        shift_m: deviation of the label of a corner or an edge from its place, the same for all its points.
        missed: share of corners and edges without a label of their own.
        invented: corner labels where no corner is, per corner.
        confused: share of points with the label of another point.
    """

    types: tuple[str, ...]
    yaw_rad: float
    shares: tuple[float, float, float, float, float]
    blob_m: float
    noise_m: tuple[float, float]
    back_density: float
    falloff: int
    contrast: float
    trees: int
    short: float
    shift_m: float = 0.0
    missed: float = 0.0
    invented: float = 0.0
    confused: float = 0.0


_SETTINGS = {
    "easy": _Setting(
        types=("shed", "pyramid", "gable", "hip", "half-hip", "L", "T", "T", "lean-to"),
        yaw_rad=0.15,
        shares=(0.16, 0.38, 0.26, 0.12, 0.08),
        blob_m=0.0,
        noise_m=(0.02, 0.05),
        back_density=0.33,
        falloff=3,
        contrast=1.0,
        trees=2,
        short=0.15,
    ),
    "real": _Setting(
        types=("house",) * 40 + ("L", "T", "cross", "dormer", "half-hip", "lean-to", "hip", "gable", "pyramid", "shed"),
        yaw_rad=math.pi,
        shares=(0.25, 0.30, 0.22, 0.15, 0.08),
        blob_m=0.13,
        noise_m=(0.04, 0.10),
        back_density=0.22,
        falloff=4,
        contrast=5.0,
        trees=6,
        short=0.25,
        shift_m=0.1,
        missed=0.08,
        invented=0.25,
        confused=0.1,
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
        raise ValueError(f"setting must be one of {tuple(_SETTINGS)}, got {setting!r}")
    if not 0 <= seed < 2**63 or not 0 <= index < 2**63:
        raise ValueError(f"seed and index must be in [0, 2**63), got seed {seed} and index {index}")
    if points < 16:
        raise ValueError(f"points must be at least 16, got {points}")
    s = _SETTINGS[setting]
    d = Draws(seed, index, 0)
    roof = _place(d, draw_roof(d, d.pick(s.types)), s)
    patches = _patches(d, roof, s)
    center, scale = _robust_box(d, patches)
    return Scene(
        order_id=f"roofs-{setting}-{seed}-{index:06d}",
        gt_segments=((roof.vertices_V3[roof.edges_E2] - center) / scale).astype(np.float32),
        gt_vertices=roof.vertices_V3.astype(np.float32),
        gt_edges=roof.edges_E2.astype(np.int32),
        gt_edge_classes=roof.edge_class_E,
        center=center.astype(np.float32),
        scale=np.asarray(scale, np.float32),
        **_observe(Draws(seed, index, 1), patches, points, s, center, scale),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Patches:
    """What points lie on: p = origin + u first + v second, u and v in [0, 1), folded to u + v <= 1 on triangles.

    A vertex is a patch without arms, an edge piece has one arm. `spread_K` is the deviation, in metres, of points
    from their patch; `label_K4` holds class_id, visible_src, visible_id and behind.
    """

    origin_K3: np.ndarray
    first_K3: np.ndarray
    second_K3: np.ndarray
    triangle_K: np.ndarray
    spread_K: np.ndarray
    weight_K: np.ndarray
    label_K4: np.ndarray

    def choose(self, words: np.ndarray, weight_K: np.ndarray) -> np.ndarray:
        """Draw patches in proportion to weights."""
        total_K = np.cumsum(weight_K)
        return np.minimum(np.searchsorted(total_K, unit(words) * total_K[-1], side="right"), len(total_K) - 1)

    def places(self, patch_N: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Draw a place on each of the given patches."""
        u, v = (words >> np.uint64(32)) * 2.0**-32, (words & np.uint64(0xFFFFFFFF)) * 2.0**-32
        fold = self.triangle_K[patch_N] & (u + v > 1)
        u, v = np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)
        return self.origin_K3[patch_N] + u[:, None] * self.first_K3[patch_N] + v[:, None] * self.second_K3[patch_N]


def _place(d: Draws, roof: Roof, s: _Setting) -> Roof:
    """Turn a roof, put it somewhere and round it to the grid."""
    yaw = d.between(-s.yaw_rad, s.yaw_rad)
    cos, sin = math.cos(yaw), math.sin(yaw)
    x, y, z = (roof.vertices_V3 - (roof.vertices_V3.min(0) + roof.vertices_V3.max(0)) / 2).T
    offset = [d.between(-5.0, 5.0), d.between(4.0, 6.0), d.between(-5.0, 5.0)]
    vertices_V3 = np.stack([x * cos + z * sin, y, z * cos - x * sin], axis=1) + offset
    return replace(roof, vertices_V3=np.round(vertices_V3 / _GRID_M) * _GRID_M)


def _split_triangles(corners_K33: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Origins and arms of the four parts of triangles, cut at the middles of their sides."""
    a, b, c = corners_K33[:, 0], corners_K33[:, 1], corners_K33[:, 2]
    first, second = (b - a) / 2, (c - a) / 2
    origin = np.concatenate([a, a + first, a + second, a + first + second])
    return origin, np.concatenate([first] * 3 + [-first]), np.concatenate([second] * 3 + [-second])


def _seen(d: Draws, roof: Roof, s: _Setting) -> Callable[[np.ndarray], np.ndarray]:
    """Draw how well places are seen, in [0, 1]: ever less towards the back of the house, hardly at all behind trees."""
    front = d.between(0.0, 2 * math.pi)
    low, high = roof.vertices_V3.min(0), roof.vertices_V3.max(0)
    toward = np.array([math.cos(front), 0.0, math.sin(front)]) / (high - low).max()
    trees_J3 = roof.vertices_V3[[d.pick(range(len(roof.vertices_V3))) for _ in range(s.trees)]]

    def density(points_K3: np.ndarray) -> np.ndarray:
        x, _, z = ((points_K3 - (low + high) / 2) * toward).T
        seen_K = (1 - (1 - s.back_density) * np.clip(0.5 - s.contrast * (x + z), 0.0, 1.0)) ** s.falloff
        offset_KJ3 = points_K3[:, None] - trees_J3
        return np.where(((offset_KJ3 * offset_KJ3).sum(2) < 1.0).any(1), 0.05 * seen_K, seen_K)

    return density


def _corner_labels(d: Draws, roof: Roof, s: _Setting) -> tuple[np.ndarray, np.ndarray]:
    """Places and classes of corner labels: displaced, without a label of their own, and invented along edges."""
    corners, invented = len(roof.vertices_V3), int(s.invented * len(roof.vertices_V3))
    edge_N2 = roof.edges_E2[[d.pick(range(len(roof.edges_E2))) for _ in range(invented)]].reshape(-1, 2)
    along_N = unit(d.words(invented, 1))
    along_N3 = roof.vertices_V3[edge_N2[:, 0]] * along_N + roof.vertices_V3[edge_N2[:, 1]] * (1 - along_N)
    places_N3 = np.concatenate([roof.vertices_V3, along_N3])
    class_V = np.where(unit(d.words(corners)) < s.missed, _ROOF_FACE, roof.vertex_class_V)
    class_N = np.concatenate([class_V, [d.pick((APEX, EAVE_END, FLASHING_END)) for _ in range(invented)]])
    return places_N3 + s.shift_m * bell(d.words(*places_N3.shape)), class_N.astype(np.int64)


def _edge_pieces(d: Draws, roof: Roof, s: _Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Origins, arms and point classes of the pieces of edges: displaced, some without a label of their own."""
    start_E3, end_E3 = roof.vertices_V3[roof.edges_E2[:, 0]], roof.vertices_V3[roof.edges_E2[:, 1]]
    arm_E3, start_E3 = (end_E3 - start_E3) / _PIECES, start_E3 + s.shift_m * bell(d.words(*start_E3.shape))
    class_E = np.where(unit(d.words(len(arm_E3))) < s.missed, _ROOF_FACE, _POINT_CLASS[roof.edge_class_E])
    origins = np.concatenate([start_E3 + i * arm_E3 for i in range(_PIECES)])
    return origins, np.concatenate([arm_E3] * _PIECES), np.tile(class_E, _PIECES)


def _wall_triangles(roof: Roof, ground: float) -> np.ndarray:
    """Corners of two triangles under each edge that has a wall."""
    top = roof.vertices_V3[roof.edges_E2[roof.wall_E]]
    base = top.copy()
    base[:, :, 1] = ground
    a, b, under_a, under_b = top[:, 0], top[:, 1], base[:, 0], base[:, 1]
    return np.concatenate([np.stack([a, b, under_b], axis=1), np.stack([a, under_b, under_a], axis=1)])


def _patches(d: Draws, roof: Roof, s: _Setting) -> _Patches:
    """Lay patches over corners, edges, faces, walls and clutter, weighted by size, share and view."""
    corners, corner_class = _corner_labels(d, roof, s)
    pieces, arms, piece_class = _edge_pieces(d, roof, s)
    low, high = roof.vertices_V3.min(0) - 1.5, roof.vertices_V3.max(0) + 1.5
    low[1] = ground = roof.vertices_V3[:, 1].min() - d.between(2.4, 3.2)
    clumps = low + unit(d.words(_CLUMPS, 3)) * (high - low)

    sheets = (
        (corners, np.zeros_like(corners), np.zeros_like(corners)),
        (pieces, arms, np.zeros_like(arms)),
        _split_triangles(roof.vertices_V3[roof.triangles_K3]),
        _split_triangles(_wall_triangles(roof, ground)),
        (clumps, np.zeros_like(clumps), np.zeros_like(clumps)),
    )
    origin_K3, first_K3, second_K3 = (np.concatenate(parts) for parts in zip(*sheets, strict=True))
    sizes = [len(origins) for origins, _, _ in sheets]
    sheet_K = np.repeat(np.arange(5), sizes)
    other_class = np.repeat([_ROOF_FACE, _OTHER_HOUSE, _NON_HOUSE], sizes[2:])
    class_K = np.concatenate([corner_class, piece_class, other_class])

    across_K3 = cross(first_K3, second_K3)
    size_K = np.sqrt(np.where(sheet_K == 1, (first_K3 * first_K3).sum(1), (across_K3 * across_K3).sum(1)))
    size_K[(sheet_K == 0) | (sheet_K == 4)] = 1.0
    weight_K = size_K * _seen(d, roof, s)(origin_K3 + (first_K3 + second_K3) / 3)
    weight_K *= (np.array(s.shares) / np.bincount(sheet_K, weights=weight_K, minlength=5))[sheet_K]
    return _Patches(
        origin_K3=origin_K3,
        first_K3=first_K3,
        second_K3=second_K3,
        triangle_K=(sheet_K == 2) | (sheet_K == 3),
        spread_K=np.array([s.blob_m, 0.0, 0.0, 0.0, _CLUMP_M])[sheet_K],
        weight_K=weight_K,
        label_K4=_labels(d, class_K),
    )


def _labels(d: Draws, class_K: np.ndarray) -> np.ndarray:
    """What the pictures show at a patch: class_id, and visible_src, visible_id and behind that go with it."""
    other_K, occluder_K = (
        ids[(unit(d.words(len(class_K))) * len(ids)).astype(np.int64)] for ids in (_HOUSE_IDS, _OCCLUDER_IDS)
    )
    behind_K = np.where(class_K >= _OTHER_HOUSE, other_K, _GESTALT_ID[class_K])
    occluded_K = class_K == _NON_HOUSE
    return np.stack([class_K, 1 + occluded_K, np.where(occluded_K, occluder_K, behind_K), behind_K], axis=1)


def _median(values: np.ndarray) -> np.ndarray:
    """The lower median along the first axis."""
    return np.sort(values, axis=0)[(len(values) - 1) // 2]


def _robust_box(d: Draws, patches: _Patches) -> tuple[np.ndarray, float]:
    """Centre and diagonal of the box around what is seen of the surfaces.

    The box lies between the 2.5 % quantiles of the points within 2.5 MAD of the median.
    """
    words = d.words(2, _BOX_POINTS)
    patch_N = patches.choose(words[0], patches.weight_K * patches.triangle_K)
    points_N3 = patches.places(patch_N, words[1])
    offset_N3 = points_N3 - _median(points_N3)
    distance_N = np.sqrt((offset_N3 * offset_N3).sum(1))
    median = _median(distance_N)
    kept = np.sort(points_N3[distance_N <= median + 2.5 * _median(np.abs(distance_N - median))], axis=0)
    cut = round(0.025 * (len(kept) - 1))
    low, high = kept[cut], kept[len(kept) - 1 - cut]
    size = high - low
    center = np.round((low + high) / 2 / _GRID_M) * _GRID_M
    return center, round(float(np.sqrt((size * size).sum())) / _GRID_M) * _GRID_M


def _observe(d: Draws, patches: _Patches, points: int, s: _Setting, center: np.ndarray, scale: float) -> dict:
    """Draw the points of a scene with labels, votes and sources, as fields of `Scene`."""
    valid = points if not d.chance(s.short) else int(points * d.between(0.6, 1.0))
    words = d.words(8, valid)
    patch_N = patches.choose(words[0], patches.weight_K)
    source_N = (np.arange(valid) % 4 == 3).astype(np.uint8)
    spread_N = patches.spread_K[patch_N] + np.array(s.noise_m)[source_N]
    xyz_N3 = patches.places(patch_N, words[1]) + spread_N[:, None] * bell(words[2:5]).T
    xyz_N3 = np.round(xyz_N3 / _GRID_M) * _GRID_M
    labelled_N = np.where(unit(words[5]) < s.confused, patch_N[::-1], patch_N)
    class_N, visible_src_N, visible_id_N, behind_N = patches.label_K4[labelled_N].T

    lanes_N4 = (words[6][:, None] >> np.arange(0, 64, 16, dtype=np.uint64)) & np.uint64(0xFFFF)
    views_N = 1 + (lanes_N4 < 0.425 * 2**16).sum(1)
    order = np.argsort((source_N * 8 + _TIER[class_N]).astype(np.uint8), kind="stable")
    order = np.append(order, np.full(points - valid, order[-1]))
    return {
        "xyz_norm": ((xyz_N3 - center) / scale).astype(np.float32)[order],
        "class_id": class_N.astype(np.uint8)[order],
        "source": source_N[order],
        "mask": np.arange(points) < valid,
        "visible_src": visible_src_N.astype(np.uint8)[order],
        "visible_id": visible_id_N.astype(np.int16)[order],
        "behind": behind_N.astype(np.int16)[order],
        "n_views_voted": views_N.astype(np.uint8)[order],
        "vote_frac": np.clip(0.5 + 0.25 * bell(words[7]), 0.05, 1.0).astype(np.float32)[order],
    }
