"""How much of the truth can be seen in the input: true vertices and edges that lie near a point."""

from collections.abc import Sequence

import numpy as np

from perceiver.scene import Scene
from train.sources import SourceUri


def coverage(scenes: Sequence[Scene], radius_m: float = 0.5) -> tuple[float, float]:
    """Return the shares of true vertices and of true edge length that lie within a radius of a valid point.

    An edge is cut into the fewest equal pieces of at most 0.1 m; a piece counts if its middle is within the radius,
    weighted by its length. Sums run over all scenes. This bounds what can be seen in the input.

    Args:
        scenes: at least one scene with ground truth.
        radius_m: the radius in metres.
    Returns:
        (vertex share, edge share) in [0, 1].
    Raises:
        ValueError: there are no scenes, or a scene has no ground truth.
        ImportError: the package scipy is not installed.
    """
    from scipy.spatial import KDTree

    if not scenes:
        raise ValueError("scenes must hold at least one scene")
    vertices = seen_vertices = length_m = seen_length_m = 0.0
    for scene in scenes:
        if scene.gt_vertices is None or scene.gt_edges is None:
            raise ValueError(f"scenes must have ground truth, {scene.order_id!r} has none")
        vertices += len(scene.gt_vertices)
        middles, weights_m = _edge_pieces(scene.gt_vertices.astype(np.float64), scene.gt_edges)
        length_m += weights_m.sum()
        if scene.point_count:
            tree = KDTree(scene.valid_points_world())
            seen_vertices += (tree.query(scene.gt_vertices)[0] <= radius_m).sum()
            seen_length_m += weights_m[tree.query(middles)[0] <= radius_m].sum()
    return float(seen_vertices / vertices), float(seen_length_m / length_m) if length_m else 0.0


def describe_coverage(uri: str | SourceUri, scenes: Sequence[Scene]) -> str:
    """One line with the coverage of a source's scenes, or why it is not known."""
    try:
        vertex_share, edge_share = coverage(scenes)
    except ImportError as error:
        return f"{uri}: how much of the truth lies within 0.5 m of a point was not computed: {error}"
    return (
        f"{uri}: {vertex_share:.1%} of the true vertices and {edge_share:.1%} of the true edges of {len(scenes):,} "
        f"scenes lie within 0.5 m of a point"
    )


def _edge_pieces(vertices_V3: np.ndarray, edges_E2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middles, weights_m = [], []
    for start, end in vertices_V3[edges_E2]:
        length_m = float(np.linalg.norm(end - start))
        pieces = max(1, int(np.ceil(length_m / 0.1)))
        middles.append(start + (np.arange(pieces)[:, None] + 0.5) / pieces * (end - start))
        weights_m.append(np.full(pieces, length_m / pieces))
    return np.concatenate(middles), np.concatenate(weights_m)
