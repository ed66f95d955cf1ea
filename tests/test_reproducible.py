"""The promises about whole runs, kept by real processes: the same bits again, after kill -9, in another place.

| promise | tested in |
| --- | --- |
| L0 math: kernels err no more than twice eager against float64 | test_sinkhorn, test_matching, test_attention |
| L1 repeat: the same call gives the same bits | the same, and test_step |
| L2 process: a new process, cold caches, another hash seed | here: another_process_and_hash_seed_and_directory |
| L3 place: an item's bits do not depend on its batch | test_sinkhorn, test_matching, test_attention |
| L4 training: two runs of a recipe are identical at every step | here, by `compare`; test_compare finds what differs |
| L5 resume: stopped anywhere and resumed = never stopped | here: killed_at_random_moments, killed_in_the_middle |
| L6 workers: any number of workers gives the same bits | not yet: training has one worker |
| L7 published: a machine that should match and does not says where | test_trace (golden states), test_replay (verify) |
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_runs import final_state, tiny_recipe, train_quietly
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


# trains tiny again and again in forked processes, each of which kills itself before its n-th operation: an update, a
# flush or a renaming of a file; prints the operations at which it died
KILLS = """
import functools, os, random, signal, sys
from pathlib import Path
import train.graph
import train.loop
from tests.tiny_runs import tiny_recipe, train_quietly
rng, recipe, path = random.Random(2), tiny_recipe(), Path(sys.argv[1])
# rows are made once
train.loop.stage_data = functools.cache(train.loop.stage_data)
for number in (1, 2, 3):
    train.loop.stage_data(recipe, number)

def dying(function, name, left):
    def inner(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return inner

for kill in range(11):
    child = os.fork()
    if child == 0:
        left = [rng.randrange(1, 35) if kill < 10 else 10**9]
        train.graph.advance = dying(train.graph.advance, "update", left)
        os.replace, os.fsync = dying(os.replace, "replace", left), dying(os.fsync, "fsync", left)
        train_quietly(recipe, path)
        os._exit(0)
    rng.random()
    os.waitpid(child, 0)
"""


def test_a_run_killed_in_the_middle_of_updates_and_of_writing_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, env=environment(3), check=True, capture_output=True, text=True)
    died = done.stdout.split()
    assert len(died) == 10
    assert {"replace", "fsync"} <= set(died)
    train_quietly(tiny_recipe(), tmp_path / "undisturbed")
    assert compare_runs(tmp_path / "undisturbed", tmp_path / "killed").differences == ()
    for name in ("metrics.jsonl", "trace.jsonl", "certificate.json"):
        assert (tmp_path / "undisturbed" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


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
