"""From predicted segments to a wireframe: merge end points, snap corners to labelled points, level edges.

    keep      sigmoid(conf) > confidence
    merge     for each radius: clusters of vertices linked by distances <= radius become their mean
    snap      a vertex with enough corner-labelled points around it becomes their mean
    level     vertices joined by nearly horizontal edges take one height
    fallback  no edge left: two vertices at the origin and one edge, so that an answer is never empty

Everything is float64 in metres, Y up. Segments are sorted first and every sum runs in that order, so the result
depends, bit for bit, only on the set of segments: not on their order, their direction or the number of threads.
"""

from dataclasses import dataclass

import numpy as np

from perceiver.scene import Scene

CORNER_CLASSES = (0, 1, 2)
UP = 1


@dataclass(frozen=True, eq=False)
class Wireframe:
    """A roof as a graph: vertices in metres [V, 3] float64 and edges as pairs of vertex indices [E, 2] int64."""

    vertices_V3: np.ndarray
    edges_E2: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """How segments become a wireframe; lengths in metres."""

    confidence: float = 0.5
    merge_radii_m: tuple[float, ...] = (0.15, 0.2625, 0.375, 0.4875, 0.6)
    snap: bool = True
    snap_radius_m: float = 0.5
    snap_min_points: int = 2
    level: bool = True
    level_min_run_m: float = 0.1
    level_max_slope: float = 0.05

    def __post_init__(self):
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be strictly between 0 and 1, got {self.confidence}")
        for radius_m in (*self.merge_radii_m, self.snap_radius_m):
            if not (np.isfinite(radius_m) and radius_m >= 0):
                raise ValueError(f"merge_radii_m and snap_radius_m must be finite and not negative, got {radius_m}")
        if self.snap_min_points < 1:
            raise ValueError(f"snap_min_points must be at least 1, got {self.snap_min_points}")


def segments_to_wireframe(endpoints_N23: np.ndarray, scene: Scene, settings: PostprocessConfig) -> Wireframe:
    """Turn kept segments into a wireframe: sort, merge, snap, level, or the fallback.

    Args:
        endpoints_N23: end points of the kept segments, metres, finite; N may be 0.
        scene: its valid points and labels are read, never its ground truth.
        settings: radii and which steps run.
    Returns:
        A wireframe without isolated vertices, loops or duplicate edges; never empty.
    Raises:
        ValueError: if `endpoints_N23` has another shape or is not finite.
    Determinism: equal sets of segments give equal bits, whatever their order and direction.
    """
    endpoints_N23 = np.asarray(endpoints_N23, np.float64)
    if endpoints_N23.ndim != 3 or endpoints_N23.shape[1:] != (2, 3):
        raise ValueError(f"endpoints_N23 must be [N, 2, 3], got shape {endpoints_N23.shape}")
    if not np.isfinite(endpoints_N23).all():
        raise ValueError("endpoints_N23 must be finite, got NaN or infinity")
    # + 0.0 makes a negative zero positive: the two are equal to a sort, but not to the bits
    vertices_V3 = _sort_segments(endpoints_N23 + 0.0).reshape(-1, 3)
    wireframe = Wireframe(vertices_V3, np.arange(len(vertices_V3)).reshape(-1, 2))
    wireframe = merge_vertices(wireframe, settings.merge_radii_m)
    if settings.snap:
        wireframe = snap_to_points(wireframe, scene, settings)
    if settings.level:
        wireframe = level_edges(wireframe, settings)
    return wireframe if len(wireframe.edges_E2) else fallback_wireframe()


def keep_segments(conf_N: np.ndarray, settings: PostprocessConfig) -> np.ndarray:
    """Say which segments are kept, [N] bool: sigmoid(conf) > settings.confidence, conf being logits.

    Raises:
        ValueError: if `conf_N` is not finite; a NaN would pass for a low confidence.
    """
    conf_N = np.asarray(conf_N, np.float64)
    if not np.isfinite(conf_N).all():
        raise ValueError("conf_N must be finite, got NaN or infinity")
    return conf_N > np.log(settings.confidence / (1 - settings.confidence))


def true_wireframe(scene: Scene) -> Wireframe:
    """Return the scene's ground truth.

    Raises:
        ValueError: if the scene has none.
    """
    if scene.gt_vertices is None or scene.gt_edges is None:
        raise ValueError(f"scene {scene.order_id!r} has no ground truth")
    return Wireframe(scene.gt_vertices.astype(np.float64), scene.gt_edges.astype(np.int64))


def fallback_wireframe() -> Wireframe:
    """Return the answer when nothing was found: two vertices at the origin and the edge between them."""
    return Wireframe(np.zeros((2, 3)), np.array([[0, 1]]))


def merge_vertices(wireframe: Wireframe, radii_m: tuple[float, ...]) -> Wireframe:
    """Merge vertices, one radius after the other: clusters linked by distances <= radius become their mean.

    The mean is that of the vertices of the previous radius, each counted once. Loops and duplicate edges go, and in
    the end the vertices without an edge.
    """
    for radius_m in radii_m:
        wireframe = _merge_within(wireframe, radius_m)
    return _drop_isolated(wireframe)


def snap_to_points(wireframe: Wireframe, scene: Scene, settings: PostprocessConfig) -> Wireframe:
    """Move each vertex to the mean of the corner-labelled points within the radius, if there are enough of them.

    Corner labels are apex, eave end point and flashing end point. Vertices that arrive at one place become one.
    """
    is_corner_T = np.isin(scene.class_id[: scene.point_count], CORNER_CLASSES)
    corners_P3 = scene.valid_points_world()[is_corner_T]
    if len(corners_P3) < settings.snap_min_points:
        return wireframe
    near_VP = _distances(wireframe.vertices_V3, corners_P3) <= settings.snap_radius_m
    count_V1 = near_VP.sum(axis=1, keepdims=True)
    # not a matrix product: BLAS sums in an order that depends on the processor
    sum_V3 = np.where(near_VP[:, :, None], corners_P3, 0.0).sum(axis=1)
    snapped_V3 = np.where(count_V1 >= settings.snap_min_points, sum_V3 / np.maximum(count_V1, 1), wireframe.vertices_V3)
    return merge_vertices(Wireframe(snapped_V3, wireframe.edges_E2), (0.0,))


def level_edges(wireframe: Wireframe, settings: PostprocessConfig) -> Wireframe:
    """Give the vertices joined by nearly horizontal edges one height.

    An edge is nearly horizontal if its horizontal run > level_min_run_m and |dy| / run < level_max_slope, measured
    before anything moves. Vertices linked by such edges, directly or through others, take the mean of their heights.
    """
    vertices_V3, edges_E2 = wireframe.vertices_V3, wireframe.edges_E2
    delta_E3 = vertices_V3[edges_E2[:, 1]] - vertices_V3[edges_E2[:, 0]]
    run_E = np.hypot(delta_E3[:, 0], delta_E3[:, 2])
    rise_E = np.abs(delta_E3[:, UP])
    level_E2 = edges_E2[(run_E > settings.level_min_run_m) & (rise_E < settings.level_max_slope * run_E)]
    linked_VV = np.eye(len(vertices_V3), dtype=bool)
    linked_VV[level_E2[:, 0], level_E2[:, 1]] = linked_VV[level_E2[:, 1], level_E2[:, 0]] = True
    cluster_V = _clusters(linked_VV)
    leveled_V3 = vertices_V3.copy()
    leveled_V3[:, UP] = _cluster_means(vertices_V3[:, [UP]], cluster_V)[cluster_V, 0]
    return Wireframe(leveled_V3, edges_E2)


def _sort_segments(endpoints_N23: np.ndarray) -> np.ndarray:
    """Order the ends of each segment, then the segments, by x, then y, then z."""
    start_N3, end_N3 = endpoints_N23[:, 0], endpoints_N23[:, 1]
    before_N = np.zeros(len(endpoints_N23), bool)
    for axis in (2, 1, 0):
        tie_N = end_N3[:, axis] == start_N3[:, axis]
        before_N = np.where(tie_N, before_N, end_N3[:, axis] < start_N3[:, axis])
    directed_N23 = np.where(before_N[:, None, None], endpoints_N23[:, ::-1], endpoints_N23)
    return directed_N23[np.lexsort(directed_N23.reshape(-1, 6).T[::-1])]


def _merge_within(wireframe: Wireframe, radius_m: float) -> Wireframe:
    vertices_V3 = wireframe.vertices_V3
    cluster_V = _clusters(_distances(vertices_V3, vertices_V3) <= radius_m)
    edges_E2 = np.sort(cluster_V[wireframe.edges_E2], axis=1)
    edges_E2 = np.unique(edges_E2[edges_E2[:, 0] != edges_E2[:, 1]], axis=0)
    return Wireframe(_cluster_means(vertices_V3, cluster_V), edges_E2)


def _drop_isolated(wireframe: Wireframe) -> Wireframe:
    used, edges_E2 = np.unique(wireframe.edges_E2, return_inverse=True)
    return Wireframe(wireframe.vertices_V3[used], edges_E2.reshape(-1, 2))


def _distances(a_V3: np.ndarray, b_P3: np.ndarray) -> np.ndarray:
    return np.sqrt(((a_V3[:, None] - b_P3) ** 2).sum(axis=-1))


def _clusters(linked_VV: np.ndarray) -> np.ndarray:
    """Connected components, numbered by their first vertex; `linked_VV` is symmetric with a true diagonal."""
    first_V = np.arange(len(linked_VV))
    while True:
        lowest_V = np.where(linked_VV, first_V, len(first_V)).min(axis=1, initial=len(first_V))
        if np.array_equal(lowest_V, first_V):
            return np.unique(first_V, return_inverse=True)[1].reshape(-1)
        first_V = lowest_V


def _cluster_means(values_VC: np.ndarray, cluster_V: np.ndarray) -> np.ndarray:
    """Mean of each cluster's rows, added in the order of the rows."""
    count_K = np.bincount(cluster_V)
    sums_CK = [np.bincount(cluster_V, weights=values_V) for values_V in values_VC.T]
    return np.stack(sums_CK, axis=1) / count_K[:, None]
