"""What the official score costs: perturbed roofs against the truth, in this process and in a pool of all cores.

64 scenes stand for a set: the cost is one scene's times their number, 1,024 for a dev set. Both ways must give the same
scores, and the truth must score 1.
"""

import functools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.peers import OURS
from perceiver.score import Job, ScorePool
from perceiver.wireframe import Wireframe, true_wireframe
from train.roofs import generate_scenes

SCENES, NOISE_M = 64, 0.1
WORKERS = {"serial": 1, "pool": max(2, os.cpu_count() or 2)}
SCORER = replace(OURS, package="hoho2025", licence="not stated")


@functools.cache
def _jobs() -> list[Job]:
    random = np.random.default_rng(0)
    jobs = []
    for scene in generate_scenes(SCENES, seed=1, points=256, setting="easy"):
        truth = true_wireframe(scene)
        moved_V3 = truth.vertices_V3 + NOISE_M * random.standard_normal(truth.vertices_V3.shape)
        jobs.append(Job(scene.order_id, Wireframe(moved_V3, truth.edges_E2), truth))
    return jobs


@functools.cache
def _serial_scores() -> list[torch.Tensor]:
    with ScorePool(workers=1) as pool:
        return [torch.tensor(pool.score(_jobs()), dtype=torch.float64)]


@pytest.mark.parametrize("how", WORKERS)
def bench_score(measure, how):
    with ScorePool(workers=WORKERS[how]) as pool:
        truth = []
        if SCORER.version() is not None:
            truth = _serial_scores() if how == "pool" else []
            (score,) = pool.score([_jobs()[0]._replace(prediction=_jobs()[0].truth)])
            assert score.hss == pytest.approx(1.0), "the truth must score 1"
        measure(
            lambda: [torch.tensor(pool.score(_jobs()), dtype=torch.float64)],
            group=f"evaluate, official score of {SCENES} scenes, {how}",
            peer=SCORER,
            truth=truth,
            scenes=SCENES,
            workers=WORKERS[how],
        )
