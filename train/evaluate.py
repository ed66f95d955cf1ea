"""How good a model is: scenes through it, the official score, two yardsticks, and the files that keep them.

    predict_wireframes  scenes -> model -> kept segments -> wireframes
    evaluate            ... -> official HSS per scene, their summary, the yardsticks beside it
    write_scores        scores.json and scores.csv in a run directory
    evaluate_command    all of it, printed: `python -m train evaluate`

The yardsticks say what a score is worth: the truth sent through the same post-processing (what a perfect model
would get) and clusters of labelled points joined along labelled edges (what needs no learning).

Evaluation is a phase of its own: the model predicts first, the processes score afterwards, and training waits. On a
CPU that shares its cores between training and scoring both become many times slower.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from perceiver.model import Perceiver, Segments
from perceiver.scene import Scene, SceneBatch, stack_scenes
from perceiver.score import Job, Score, ScorePool, summarize
from perceiver.wireframe import (
    PostprocessConfig,
    Wireframe,
    fallback_wireframe,
    keep_segments,
    segments_to_wireframe,
    true_wireframe,
)
from train.checkpoint import write_atomically
from train.determinism import Machine

Summary = dict[str, float]

YARDSTICKS = ("truth_through_postprocessing", "label_clusters")
SET_TITLES = {"dev": "dev", "validation": "official validation", "test": "public test"}


class SceneRow(NamedTuple):
    """One line of scores.csv."""

    order_id: str
    hss: float
    corner_f1: float
    edge_iou: float
    predicted_vertices: int
    true_vertices: int
    predicted_edges: int
    true_edges: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a model on a set: one row per scene, their summary, and the yardsticks' summaries by name."""

    rows: list[SceneRow]
    summary: Summary
    yardsticks: dict[str, Summary] = field(default_factory=dict)


def predict_wireframes(
    model: Perceiver,
    scenes: Sequence[Scene],
    *,
    machine: Machine,
    batch: int,
    postprocess: PostprocessConfig,
) -> list[Wireframe]:
    """Predict the wireframe of each scene; one without a valid point gets the fallback.

    Args:
        model: on the machine's device; its training mode is restored.
        scenes: their ground truth is not read.
        batch: scenes per forward pass, at most; those of a pass follow each other and have equal numbers of points.
    Raises:
        ValueError: if `batch` is below 1, or a prediction is not finite (names the scene).
    Determinism: equal model, scenes, batch and machine give equal bits.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    was_training = model.training
    model.eval()
    wireframes = []
    try:
        for chunk in _chunks(scenes, batch):
            segments = _forward(model, stack_scenes(chunk), machine)
            endpoints_BN23 = segments.endpoints().double().cpu().numpy()
            conf_BN = segments.conf_BN.double().cpu().numpy()
            wireframes += [
                _to_wireframe(*item, postprocess) for item in zip(endpoints_BN23, conf_BN, chunk, strict=True)
            ]
    finally:
        model.train(was_training)
    return wireframes


def evaluate(
    model: Perceiver,
    scenes: Sequence[Scene],
    *,
    machine: Machine,
    batch: int,
    postprocess: PostprocessConfig,
    pool: ScorePool,
    yardsticks: bool = True,
) -> Evaluation:
    """Score a model on scenes with ground truth.

    Args:
        pool: scores after the model is done; keep one for all evaluations of a run.
        yardsticks: also score them, at twice the cost; they depend on scenes and `postprocess` only.
    Raises:
        ValueError: if there are no scenes or one has no ground truth; see also `predict_wireframes`.
        RuntimeError: naming the scene whose scoring failed.
    """
    truths = [true_wireframe(scene) for scene in scenes]
    predictions = predict_wireframes(model, scenes, machine=machine, batch=batch, postprocess=postprocess)
    scores = _score(predictions, truths, scenes, pool)
    rows = [
        SceneRow(
            scene.order_id,
            *score,
            predicted_vertices=len(prediction.vertices_V3),
            true_vertices=len(truth.vertices_V3),
            predicted_edges=len(prediction.edges_E2),
            true_edges=len(truth.edges_E2),
        )
        for scene, score, prediction, truth in zip(scenes, scores, predictions, truths, strict=True)
    ]
    return Evaluation(
        rows=rows,
        summary=summarize(scores),
        yardsticks=measure_yardsticks(scenes, postprocess=postprocess, pool=pool) if yardsticks else {},
    )


def measure_yardsticks(
    scenes: Sequence[Scene], *, postprocess: PostprocessConfig, pool: ScorePool
) -> dict[str, Summary]:
    """Score the truth through post-processing and the label-cluster heuristic.

    Raises:
        ValueError: if there are no scenes or one has no ground truth.
    """
    from train.heuristic import label_clusters

    truths = [true_wireframe(scene) for scene in scenes]
    processed = [_processed_truth(scene, postprocess) for scene in scenes]
    clusters = [label_clusters(scene) for scene in scenes]
    summaries = (summarize(_score(wireframes, truths, scenes, pool)) for wireframes in (processed, clusters))
    return dict(zip(YARDSTICKS, summaries, strict=True))


def write_scores(
    run_dir: Path,
    evaluation: Evaluation,
    *,
    set_name: str,
    source: str,
    postprocess: PostprocessConfig,
    checkpoint: Mapping[str, object] | None = None,
) -> Path:
    """Write an evaluation as JSON and CSV: `scores` for the dev set, `scores_validation` and `scores_test` else.

    Args:
        set_name: "dev", "validation" or "test".
        source: URI of the scenes.
        checkpoint: what is known of it, such as step and digest.
    Returns:
        The path of the JSON file.
    Raises:
        ValueError: if `set_name` is another one.
        OSError: if the directory cannot be written; older files stay whole.
    """
    _check_set(set_name)
    content = {
        "set": SET_TITLES[set_name],
        "source": source,
        "scenes": len(evaluation.rows),
        "checkpoint": dict(checkpoint) if checkpoint is not None else None,
        "summary": evaluation.summary,
        "yardsticks": evaluation.yardsticks,
        "postprocess": asdict(postprocess),
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(SceneRow._fields)
    writer.writerows(evaluation.rows)
    path = scores_path(run_dir, set_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".csv"), table.getvalue().encode())
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def scores_path(run_dir: Path, set_name: str) -> Path:
    """Return where the scores of a set are kept: scores.json for dev, scores_<set>.json else."""
    return Path(run_dir) / ("scores.json" if set_name == "dev" else f"scores_{set_name}.json")


def format_scores(evaluation: Evaluation, *, set_name: str) -> str:
    """Return a table for people: the model, then the yardsticks, a column per field of the leaderboard."""
    _check_set(set_name)
    lines = {"model": evaluation.summary, **evaluation.yardsticks}
    title = f"{SET_TITLES[set_name]}, {len(evaluation.rows)} scene{'s' * (len(evaluation.rows) != 1)}"
    # of all tables alike, so that the yardsticks can follow
    width = max(len(title), *map(len, YARDSTICKS))
    rows = [f"{title:{width}}  {'  '.join(evaluation.summary)}"]
    for name, summary in lines.items():
        numbers = (f"{value:{len(key)}.4f}" for key, value in summary.items())
        rows.append(f"{name.replace('_', ' '):{width}}  {'  '.join(numbers)}")
    return "\n".join(rows)


def evaluate_command(
    model: Perceiver,
    scenes: Sequence[Scene],
    *,
    set_name: str,
    source: str,
    run_dir: Path,
    machine: Machine,
    batch: int,
    postprocess: PostprocessConfig,
    workers: int,
    checkpoint: Mapping[str, object] | None = None,
) -> Evaluation:
    """Evaluate, print the scores, measure and print the yardsticks, write the files: `python -m train evaluate`.

    Raises:
        ValueError, RuntimeError, OSError: see `evaluate` and `write_scores`.
    """
    _check_set(set_name)
    with ScorePool(workers) as pool:
        evaluation = evaluate(
            model, scenes, machine=machine, batch=batch, postprocess=postprocess, pool=pool, yardsticks=False
        )
        # the yardsticks take twice the time, and a full disk could lose it
        scores = format_scores(evaluation, set_name=set_name)
        print(scores, flush=True)
        yardsticks = measure_yardsticks(scenes, postprocess=postprocess, pool=pool)
    evaluation = replace(evaluation, yardsticks=yardsticks)
    print(format_scores(evaluation, set_name=set_name).removeprefix(scores + "\n"))
    path = write_scores(
        run_dir, evaluation, set_name=set_name, source=source, postprocess=postprocess, checkpoint=checkpoint
    )
    print(f"written to {path} and {path.with_suffix('.csv').name}")
    return evaluation


def _chunks(scenes: Sequence[Scene], batch: int) -> Iterator[list[Scene]]:
    """The scenes in their order, in pieces that can be stacked."""
    for _, group in groupby(scenes, key=lambda scene: len(scene.mask)):
        equal = list(group)
        for start in range(0, len(equal), batch):
            yield equal[start : start + batch]


@torch.no_grad()
def _forward(model: Perceiver, batch: SceneBatch, machine: Machine) -> Segments:
    with machine.autocast():
        return model(batch.to(machine.device), impl=machine.impl)


def _to_wireframe(
    endpoints_N23: np.ndarray, conf_N: np.ndarray, scene: Scene, postprocess: PostprocessConfig
) -> Wireframe:
    if not scene.point_count:
        return fallback_wireframe()
    try:
        kept_K23 = endpoints_N23[keep_segments(conf_N, postprocess)]
        return segments_to_wireframe(scene.to_world(kept_K23), scene, postprocess)
    except ValueError as error:
        raise ValueError(f"the prediction for scene {scene.order_id!r} cannot be used: {error}") from error


def _processed_truth(scene: Scene, postprocess: PostprocessConfig) -> Wireframe:
    """What a perfect model would get; from the normalised segments it would have to predict."""
    assert scene.gt_segments is not None
    return segments_to_wireframe(scene.to_world(scene.gt_segments), scene, postprocess)


def _score(predictions, truths, scenes, pool: ScorePool) -> list[Score]:
    jobs = zip(scenes, predictions, truths, strict=True)
    return pool.score(Job(scene.order_id, prediction, truth) for scene, prediction, truth in jobs)


def _check_set(set_name: str) -> None:
    if set_name not in SET_TITLES:
        raise ValueError(f"set_name must be one of {', '.join(SET_TITLES)}, got {set_name!r}")
