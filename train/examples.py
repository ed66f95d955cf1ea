"""Three dev scenes for the page: points, truth and prediction, at the 10th, 50th and 90th percentile of the score."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perceiver.model import Perceiver
from perceiver.scene import Scene
from perceiver.wireframe import PostprocessConfig, Wireframe, true_wireframe
from train.checkpoint import write_atomically
from train.determinism import Machine
from train.evaluate import Evaluation, predict_wireframes

PERCENTILES = (10, 50, 90)


def write_examples(
    path: Path,
    model: Perceiver,
    scenes: Sequence[Scene],
    evaluation: Evaluation,
    *,
    machine: Machine,
    postprocess: PostprocessConfig,
) -> None:
    """Write the examples of an evaluation of `scenes` as JSON; coordinates in metres, to the millimetre."""
    ranking = sorted(range(len(scenes)), key=lambda i: (evaluation.rows[i].hss, i))
    chosen = [ranking[round(percentile / 100 * (len(scenes) - 1))] for percentile in PERCENTILES]
    predictions = predict_wireframes(
        model,
        [scenes[i] for i in chosen],
        machine=machine,
        batch=len(chosen),
        postprocess=postprocess,
    )
    examples = [
        {
            "order_id": scenes[i].order_id,
            "percentile": percentile,
            "hss": evaluation.rows[i].hss,
            "points": _rounded(scenes[i].valid_points_world()),
            "class_id": scenes[i].class_id[: scenes[i].point_count].tolist(),
            "truth": _drawing(true_wireframe(scenes[i])),
            "prediction": _drawing(prediction),
        }
        for i, percentile, prediction in zip(chosen, PERCENTILES, predictions, strict=True)
    ]
    write_atomically(path, json.dumps(examples).encode())


def _drawing(wireframe: Wireframe) -> dict[str, list]:
    return {"vertices": _rounded(wireframe.vertices_V3), "edges": wireframe.edges_E2.tolist()}


def _rounded(xyz_N3: np.ndarray) -> list[list[float]]:
    return np.round(xyz_N3, 3).tolist()
