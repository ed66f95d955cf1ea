"""The promises about whole runs, kept by real processes: the same bits again, after kill -9, in another place."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_runs import final_state
from train.compare import compare_runs

ROOT = Path(__file__).resolve().parent.parent
# long enough to be killed in the middle; without a score, without learning much
QUICK = ["--evaluate.no-score", "--threads", "1", "--log-every", "3"]
QUICK += ["--stages.2.until", "120", "--stages.2.warmup", "200"]


def command(runs: Path, name: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "train",
        "run",
        "--recipe",
        "tiny",
        "--runs",
        str(runs),
        "--name",
        name,
        "--quiet",
        *QUICK,
    ]


def environment(hash_seed: int) -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}


def train(runs: Path, name: str, hash_seed: int = 0) -> None:
    subprocess.run(command(runs, name), cwd=ROOT, env=environment(hash_seed), check=True, capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    train(runs, "run")
    return runs / "run"


def test_another_process_and_hash_seed_and_directory_give_the_same_bits(undisturbed, tmp_path):
    train(tmp_path / "else where", "again", hash_seed=12345)
    assert compare_runs(undisturbed, tmp_path / "else where" / "again").differences == ()


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(undisturbed, tmp_path):
    rng = random.Random(4)
    killed = 0
    for _ in range(40):
        process = subprocess.Popen(
            command(tmp_path, "run"),
            cwd=ROOT,
            env=environment(rng.randrange(1000)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        # wait until it computes, then kill it somewhere in the next half second
        while killed < 5 and process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
            time.sleep(0.01)
        if killed == 5 or process.poll() is not None:
            assert process.wait() == 0
            break
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    assert compare_runs(undisturbed, tmp_path / "run").differences == ()
    assert final_state(undisturbed) == final_state(tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tmp_path, number, code):
    process = subprocess.Popen(
        command(tmp_path, "run"),
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size < 1000):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert "Run the same command again to go on." in errors
    train(tmp_path, "run")
    assert final_state(undisturbed) == final_state(tmp_path / "run")
