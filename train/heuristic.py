"""A yardstick without learning: clusters of corner labels as vertices, joined where edge labels lie between them.

vertices  means of the clusters of points of classes 0 to 2, linked by distances <= LINK_RADIUS_M, that hold at least
          MIN_CLUSTER_SHARE of these points
edges     pairs of vertices with points of classes 3 to 9 within TUBE_RADIUS_M of the segment in more than MIN_COVER
          of its bins; a segment has one bin per started BIN_M
"""

import numpy as np

from perceiver.scene import Scene
from perceiver.wireframe import CORNER_CLASSES, Wireframe, fallback_wireframe

LINK_RADIUS_M = 0.3
MIN_CLUSTER_SHARE = 0.005
TUBE_RADIUS_M = 0.25
BIN_M = 1.0
MIN_COVER = 0.6
EDGE_CLASSES = (3, 4, 5, 6, 7, 8, 9)


def label_clusters(scene: Scene) -> Wireframe:
    """Guess the wireframe of a scene from its labels alone.

    Args:
        scene: its valid points and labels are read, never its ground truth.
    Returns:
        A wireframe without isolated vertices; the fallback where no two vertices are joined.
    Determinism: clusters are numbered by their first point, edges sorted; no random choice.
    """
    xyz_N3, class_N = scene.valid_points_world(), scene.class_id[: scene.point_count]
    vertices_V3 = _cluster_means(xyz_N3[np.isin(class_N, CORNER_CLASSES)])
    edges_E2 = _covered_pairs(vertices_V3, xyz_N3[np.isin(class_N, EDGE_CLASSES)])
    if not len(edges_E2):
        return fallback_wireframe()
    used_V, edges = np.unique(edges_E2, return_inverse=True)
    return Wireframe(vertices_V3[used_V], edges.reshape(-1, 2))


def _cluster_means(points_N3: np.ndarray) -> np.ndarray:
    """Means of the single-linkage clusters that are large enough."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    if not len(points_N3):
        return np.zeros((0, 3))
    pairs = KDTree(points_N3).query_pairs(LINK_RADIUS_M, output_type="ndarray")
    size = len(points_N3)
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    clusters, cluster_N = connected_components(links, directed=False)
    count_C = np.bincount(cluster_N, minlength=clusters)
    sums = [np.bincount(cluster_N, weights=axis, minlength=clusters) for axis in points_N3.T]
    return (np.stack(sums, axis=1) / count_C[:, None])[count_C >= MIN_CLUSTER_SHARE * size]


def _covered_pairs(vertices_V3: np.ndarray, points_N3: np.ndarray) -> np.ndarray:
    """Pairs of vertices, low index first, whose bins are covered by edge points."""
    first, second = np.triu_indices(len(vertices_V3), 1)
    covered = [
        _cover(vertices_V3[i], vertices_V3[j], points_N3) > MIN_COVER for i, j in zip(first, second, strict=True)
    ]
    return np.stack([first, second], axis=1)[np.array(covered, bool)]


def _cover(start: np.ndarray, end: np.ndarray, points_N3: np.ndarray) -> float:
    """Share of the bins along a segment that hold a point of the tube around it."""
    along, offset_N3 = end - start, points_N3 - start
    length = float(np.sqrt((along * along).sum()))
    if length == 0:
        return 0.0
    position_N = (offset_N3 * (along / length)).sum(1)
    distance_sq_N = (offset_N3 * offset_N3).sum(1) - position_N**2
    near = (position_N >= 0) & (position_N <= length) & (distance_sq_N <= TUBE_RADIUS_M**2)
    bins = int(np.ceil(length / BIN_M))
    hit = np.unique(np.minimum((position_N[near] * bins / length).astype(np.int64), bins - 1))
    return len(hit) / bins
