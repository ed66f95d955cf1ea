"""The challenge's score, always by its official implementation: `hoho2025.metric_helper.hss`.

    HSS = harmonic mean of corner F1 (Hungarian assignment, 0.5 m) and edge IoU (volumes of cylinders, radius 0.5 m)

A set's score is the mean over its scenes. `score_wireframe` scores one scene, `ScorePool.score` many of them in
processes that stay alive between calls, `summarize` gives the leaderboard's fields.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch

from perceiver.wireframe import Wireframe

VERTEX_THRESHOLD_M = 0.5
EDGE_RADIUS_M = 0.5
QUANTILES = (5, 25, 50, 75, 95)


class Score(NamedTuple):
    """One scene's score; each part is in [0, 1]."""

    hss: float
    corner_f1: float
    edge_iou: float


class Job(NamedTuple):
    """A prediction to be scored against the truth of the scene `order_id`."""

    order_id: str
    prediction: Wireframe
    truth: Wireframe


def score_wireframe(prediction: Wireframe, truth: Wireframe) -> Score:
    """Score one scene with the official implementation.

    Args:
        prediction, truth: in metres. A prediction without edges scores 0.
    Raises:
        ImportError: if hoho2025 is not installed.
        ValueError: if a vertex is not finite, a shape is wrong or an edge indexes no vertex.
    Determinism: one thread; equal input gives equal bits.
    Source: package hoho2025, `metric_helper.hss`.
    """
    _check("prediction", prediction)
    _check("truth", truth)
    hss = _official_hss()
    # it asks for the centre of mass of the volume in common, which may be empty
    with np.errstate(invalid="ignore"):
        score = hss(
            prediction.vertices_V3,
            prediction.edges_E2,
            truth.vertices_V3,
            truth.edges_E2,
            vert_thresh=VERTEX_THRESHOLD_M,
            edge_thresh=EDGE_RADIUS_M,
        )
    return Score(float(score.hss), float(score.f1), float(score.iou))


class ScorePool:
    """Processes that score; they start with the first call and stay until the pool is closed, or its process is gone.

        with ScorePool(workers=2) as pool:
            scores = pool.score(jobs)

    Args:
        workers: processes of one thread each; 1 scores in the calling process.
    Raises:
        ValueError: if `workers` is below 1.
    Determinism: the scores and their order do not depend on `workers`.
    """

    def __init__(self, workers: int):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self._executor = None
        if workers > 1:
            # a fork server imports the package once; a plain fork is unsafe beside the threads of torch
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["hoho2025.metric_helper"])
            # its end closes with this process, however that ends
            self._owner_ends, self._owner_lives = context.Pipe(duplex=False)
            self._executor = ProcessPoolExecutor(
                workers, mp_context=context, initializer=_start_worker, initargs=(self._owner_ends,)
            )

    def score(self, jobs: Iterable[Job]) -> list[Score]:
        """Score all jobs, in their order.

        Raises:
            RuntimeError: naming the first scene whose scoring failed, and why.
        """
        if self._executor is None:
            return [_score_job(job) for job in jobs]
        return list(self._executor.map(_score_job, jobs))

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown()
            self._owner_ends.close()
            self._owner_lives.close()

    def __enter__(self) -> "ScorePool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def summarize(scores: Sequence[Score]) -> dict[str, float]:
    """Return the leaderboard's fields: hss_mean, hss_q5 to hss_q95, corner_f1_mean, edge_iou_mean.

    Raises:
        ValueError: if there are no scores.
    """
    if not scores:
        raise ValueError("scores must hold at least one scene")
    hss_B, corner_f1_B, edge_iou_B = np.array(scores, np.float64).T
    return {
        "hss_mean": float(hss_B.mean()),
        **{f"hss_q{q}": float(np.percentile(hss_B, q)) for q in QUANTILES},
        "corner_f1_mean": float(corner_f1_B.mean()),
        "edge_iou_mean": float(edge_iou_B.mean()),
    }


def _start_worker(owner_ends: Any) -> None:
    torch.set_num_threads(1)
    # the fork server, which is this process's parent, cannot tell that the owner was killed
    threading.Thread(target=_end_with, args=(owner_ends,), daemon=True).start()
    # Ctrl-C reaches every process of a terminal; the one that owns the pool decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with(owner_ends: Any) -> None:
    """End this process when the other end of a pipe is closed."""
    wait([owner_ends])
    os._exit(1)


def _score_job(job: Job) -> Score:
    try:
        return score_wireframe(job.prediction, job.truth)
    except Exception as error:
        raise RuntimeError(f"scoring scene {job.order_id!r} failed: {error}") from error


def require_scorer() -> None:
    """Import the official metric now, so that its absence is known before a run and not after hours of it.

    Raises:
        ImportError: the package hoho2025 is not installed; says how to install it.
    """
    _official_hss()


def _official_hss():
    try:
        from hoho2025.metric_helper import hss
    except ImportError as error:
        raise ImportError(f"scoring needs the package hoho2025: pip install .[eval] ({error})") from error
    return hss


def _check(name: str, wireframe: Wireframe) -> None:
    vertices_V3, edges_E2 = wireframe.vertices_V3, wireframe.edges_E2
    if vertices_V3.ndim != 2 or vertices_V3.shape[1] != 3:
        raise ValueError(f"{name} must have vertices [V, 3], got shape {vertices_V3.shape}")
    if not np.isfinite(vertices_V3).all():
        raise ValueError(f"{name} must have finite vertices, got NaN or infinity")
    if edges_E2.ndim != 2 or edges_E2.shape[1] != 2:
        raise ValueError(f"{name} must have edges [E, 2], got shape {edges_E2.shape}")
    # the official score would skip such an edge without a word
    if len(edges_E2) and not (edges_E2.min() >= 0 and edges_E2.max() < len(vertices_V3)):
        raise ValueError(
            f"{name} must have edges that index {len(vertices_V3)} vertices, got {edges_E2.min()} to {edges_E2.max()}"
        )
