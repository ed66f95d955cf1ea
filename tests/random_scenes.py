"""Scenes of random numbers for tests that need valid rows and no roof."""

from typing import Any

import numpy as np

from perceiver.scene import Scene


def random_scene(order_id: str, *, points: int = 24, optional: bool = True, **changes: Any) -> Scene:
    """A valid scene that depends on its order_id only. `optional` says whether it has the optional fields."""
    rng = np.random.default_rng(list(order_id.encode()))
    vertices, edges = 6, 7
    center, scale = rng.normal(size=3).astype(np.float32), np.array(8, np.float32)
    gt_vertices = rng.normal(size=(vertices, 3)).astype(np.float32)
    gt_edges = rng.integers(0, vertices, (edges, 2)).astype(np.int32)
    values = {
        "order_id": order_id,
        "xyz_norm": rng.normal(size=(points, 3)).astype(np.float32),
        "class_id": rng.integers(0, 13, points).astype(np.uint8),
        "source": rng.integers(0, 2, points).astype(np.uint8),
        "mask": np.arange(points) < points - 3,
        "center": center,
        "scale": scale,
        "visible_src": rng.integers(0, 3, points).astype(np.uint8),
        "visible_id": rng.integers(-1, 20, points).astype(np.int16),
        "gt_segments": ((gt_vertices[gt_edges] - center) / scale).astype(np.float32),
        "gt_vertices": gt_vertices,
        "gt_edges": gt_edges,
    }
    if optional:
        values |= {
            "behind": rng.integers(-1, 29, points).astype(np.int16),
            "n_views_voted": rng.integers(0, 9, points).astype(np.uint8),
            "vote_frac": rng.random(points).astype(np.float32),
            "gt_edge_classes": rng.integers(0, 10, edges).astype(np.int64),
        }
    return Scene(**(values | changes))


def random_scenes(count: int, *, start: int = 0, **options: Any) -> list[Scene]:
    """Scenes `row-<number>`, whose names sort as their numbers do."""
    return [random_scene(f"row-{i:05}", **options) for i in range(start, start + count)]
