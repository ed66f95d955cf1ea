import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from perceiver.score import Job, Score, ScorePool, score_wireframe, summarize
from perceiver.wireframe import Wireframe

ROOT = Path(__file__).parent.parent
GABLE_V3 = np.array([[0, 3, 0], [8, 3, 0], [8, 3, 6], [0, 3, 6], [0, 5, 3], [8, 5, 3]], float)
GABLE_E2 = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 4], [3, 4], [1, 5], [2, 5], [4, 5]])
GABLE = Wireframe(GABLE_V3, GABLE_E2)
NOTHING = Wireframe(np.zeros((0, 3)), np.zeros((0, 2), np.int64))


def noisy(sigma_m: float, seed: int) -> Wireframe:
    rng = np.random.default_rng(seed)
    return Wireframe(GABLE_V3 + rng.normal(size=GABLE_V3.shape) * sigma_m, GABLE_E2[rng.random(9) > 0.1])


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    predictions = [noisy(sigma_m, seed) for seed, sigma_m in enumerate((0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0))]
    predictions += [
        NOTHING,
        Wireframe(np.zeros((2, 3)), np.array([[0, 1]])),
        Wireframe(GABLE_V3 + np.array([0.45, 0, 0]), GABLE_E2),
    ]
    return [Job(f"roof-{i}", prediction, GABLE) for i, prediction in enumerate(predictions)]


@pytest.fixture(scope="module")
def inline_scores(jobs) -> list[Score]:
    with ScorePool(1) as pool:
        return pool.score(jobs)


def test_scores_are_those_of_the_official_implementation(jobs, inline_scores):
    from hoho2025.metric_helper import hss

    official = [
        hss(p.vertices_V3, p.edges_E2, t.vertices_V3, t.edges_E2, vert_thresh=0.5, edge_thresh=0.5) for _, p, t in jobs
    ]
    assert [tuple(score) for score in inline_scores] == [(o.hss, o.f1, o.iou) for o in official]
    assert len({score.hss for score in inline_scores}) > 4


def test_two_workers_score_the_same_bits_in_the_same_order_again_and_again(jobs, inline_scores):
    with ScorePool(2) as pool:
        assert pool.score(jobs) == inline_scores
        assert pool.score(reversed(jobs)) == inline_scores[::-1]
        broken = Job("roof-broken", Wireframe(np.full((2, 3), np.nan), np.array([[0, 1]])), GABLE)
        with pytest.raises(RuntimeError, match="scene 'roof-broken' failed: prediction must have finite vertices"):
            pool.score([jobs[0], broken, jobs[1]])
        assert pool.score(jobs[:2]) == inline_scores[:2]


def ignores_interrupts(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) >> (signal.SIGINT - 1) & 1)


def test_workers_leave_an_interrupt_to_the_process_that_owns_them(jobs, inline_scores):
    with ScorePool(2) as pool:
        pool.score(jobs[:2])
        workers, deadline = list(pool._executor._processes), time.monotonic() + 60
        # a worker that is still starting has nothing to lose to an interrupt yet
        while not all(ignores_interrupts(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker does not ignore SIGINT"
            time.sleep(0.01)
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        assert pool.score(jobs[:2]) == inline_scores[:2]


OWNER = """
import time
from perceiver.score import ScorePool
from tests.test_score import GABLE, Job
if __name__ == "__main__":
    pool = ScorePool(2)
    pool.score([Job("a", GABLE, GABLE), Job("b", GABLE, GABLE)])
    print(*pool._executor._processes, flush=True)
    time.sleep(600)
"""


def runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_an_owner_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as owner:
        workers = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(workers) == 2 and all(map(runs, workers))
        owner.kill()
    deadline = time.monotonic() + 30
    try:
        while any(map(runs, workers)):
            assert time.monotonic() < deadline, "a worker outlives its owner"
            time.sleep(0.05)
    finally:
        for pid in filter(runs, workers):
            os.kill(pid, signal.SIGKILL)


def test_a_failing_scene_is_named_inline_too(jobs):
    broken = Job("roof-broken", Wireframe(GABLE_V3, np.array([[0, 6]])), GABLE)
    with pytest.raises(RuntimeError, match="scene 'roof-broken' failed"):
        ScorePool(1).score([jobs[0], broken])


def test_no_worker_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        ScorePool(0)


def test_score_falls_with_noise(inline_scores):
    scores = [score.hss for score in inline_scores[:7]]
    assert scores[0] > 0.9 and scores[6] < 0.1
    assert scores[1] > scores[3] > scores[5]


def test_a_corner_within_half_a_metre_counts(inline_scores):
    assert inline_scores[9].corner_f1 == 1


def test_an_empty_prediction_scores_zero(inline_scores):
    assert inline_scores[7] == (0, 0, 0)


def test_edges_without_a_volume_in_common_score_zero_and_warn_of_nothing():
    # the bounding boxes overlap, the cylinders do not
    inside = Wireframe(np.array([[4, 0, 3], [4, 1, 3]], float), np.array([[0, 1]]))
    around = Wireframe(GABLE_V3 * [1, 0, 1], np.array([[0, 1], [2, 3]]))
    assert score_wireframe(inside, around) == (0, 0, 0)


@pytest.mark.parametrize(
    ("wireframe", "rule"),
    [
        (Wireframe(np.array([[0, 0, 0], [np.nan, 0, 0]]), np.array([[0, 1]])), "must have finite vertices"),
        (Wireframe(np.array([[0, 0, 0], [np.inf, 0, 0]]), np.array([[0, 1]])), "must have finite vertices"),
        (Wireframe(np.zeros((2, 2)), np.array([[0, 1]])), r"must have vertices \[V, 3\], got shape \(2, 2\)"),
        (Wireframe(np.zeros((2, 3)), np.array([0, 1])), r"must have edges \[E, 2\], got shape \(2,\)"),
        (Wireframe(np.zeros((2, 3)), np.array([[0, 2]])), "must have edges that index 2 vertices, got 0 to 2"),
        (Wireframe(np.zeros((2, 3)), np.array([[-1, 1]])), "must have edges that index 2 vertices, got -1 to 1"),
    ],
)
def test_a_wireframe_that_breaks_a_rule_is_refused_by_name(wireframe, rule):
    with pytest.raises(ValueError, match="prediction " + rule):
        score_wireframe(wireframe, GABLE)
    with pytest.raises(ValueError, match="truth " + rule):
        score_wireframe(GABLE, wireframe)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hoho2025.metric_helper", None)
    with pytest.raises(ImportError, match=r"needs the package hoho2025: pip install \.\[eval\]"):
        score_wireframe(GABLE, GABLE)


def test_summary_has_the_fields_of_the_leaderboard():
    summary = summarize([Score(hss / 100, 0.5, hss / 50) for hss in (40, 0, 20, 30, 10)])
    assert list(summary) == [
        *("hss_mean", "hss_q5", "hss_q25", "hss_q50", "hss_q75", "hss_q95"),
        *("corner_f1_mean", "edge_iou_mean"),
    ]
    assert list(summary.values()) == pytest.approx([0.2, 0.02, 0.1, 0.2, 0.3, 0.38, 0.5, 0.4])


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="scores must hold at least one scene"):
        summarize([])
