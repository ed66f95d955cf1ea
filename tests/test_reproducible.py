"""The promises about whole runs, kept by real processes: the same bits again, after kill -9, in another place.

| promise | tested in |
| --- | --- |
| L0 math: kernels err no more than twice eager against float64 | test_sinkhorn, test_matching, test_attention |
| L1 repeat: the same call gives the same bits | the same, and test_step |
| L2 process: a new process, cold caches, another hash seed | here: another_process_and_hash_seed_... |
| L3 place: an item's bits do not depend on its batch | test_sinkhorn, test_matching, test_attention |
| L4 training: two runs of a recipe are identical at every step | here, by `compare`; test_compare finds what differs |
| L5 resume: stopped anywhere and resumed = never stopped | here: killed_at_random_moments, killed_within_... |
| L6 workers: any number of workers gives the same bits | not yet: training has one worker |
| L7 published: a machine that should match and does not says where | test_trace (golden states), test_replay (verify) |
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_runs import final_state, tiny_recipe, train_quietly, write_recipe
from train.compare import compare_runs
from train.config import Recipe

ROOT = Path(__file__).resolve().parent.parent


def longer_recipe() -> Recipe:
    """Long enough to be killed in the middle; without learning much."""
    *stages, last = tiny_recipe().stages
    last = dataclasses.replace(last, until=120, warmup=200, cooldown_start=116)
    return tiny_recipe(stages=(*stages, last), log_every=3)


def command(runs: Path, name: str) -> list[str]:
    runs.mkdir(exist_ok=True)
    recipe = write_recipe(longer_recipe(), runs / "longer.json")
    flags = ["--recipe", str(recipe), "--runs", str(runs), "--name", name, "--quiet"]
    return [sys.executable, "-m", "train", "run", *flags]


def environment(hash_seed: int) -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}


def train(runs: Path, name: str) -> None:
    subprocess.run(command(runs, name), cwd=ROOT, env=environment(0), check=True, capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    train(runs, "run")
    return runs / "run"


def test_another_process_and_hash_seed_and_directory_and_cold_caches_give_the_same_bits(undisturbed, tmp_path):
    place = tmp_path / "else where"
    for room in ("configs", "kernels", "perceiver", "train"):
        shutil.copytree(ROOT / room, place / room, ignore=shutil.ignore_patterns("__pycache__"))
    caches = {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")}
    # no package of that name from another place
    variables = environment(12345) | caches | {"PYTHONPATH": str(place)}
    subprocess.run(command(place / "runs", "again"), cwd=place, env=variables, check=True, capture_output=True)
    again = place / "runs" / "again"
    assert compare_runs(undisturbed, again).differences == ()
    # it holds the code, and on a GPU the machine code of the kernels
    assert (again / "certificate.json").read_bytes() == (undisturbed / "certificate.json").read_bytes()


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


# trains tiny again and again in forked processes, each of which kills itself at an operation: an update, half-way
# through a file, before a flush or a renaming; the first ones at a given operation, the others at the n-th
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

def reached(operation):
    global left
    left -= 1
    return operation == target or left == 0

def die(operation):
    print(operation, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function, name, of):
    def inner(*args, **kwargs):
        operation = f"{name} {of(args, kwargs)}"
        if reached(operation):
            die(operation)
        return function(*args, **kwargs)
    return inner

def opening(self, mode="r", *args, real=Path.open, **kwargs):
    file = real(self, mode, *args, **kwargs)
    if mode == "wb" and reached(f"write {self.name}"):
        file.write(b"half of it")
        file.flush()
        die(f"write {self.name}")
    return file

targets = ["write checkpoint.pt.new", "replace stage1.pt.new", "update 9", "write stage2.pt.new"]
for kill in range(14):
    child = os.fork()
    if child == 0:
        target = targets[kill] if kill < 4 else ""
        left = rng.randrange(1, 40) if 4 <= kill < 13 else 10**9
        train.graph.advance = dying(train.graph.advance, "update", lambda args, kwargs: int(kwargs["step"]))
        os.replace = dying(os.replace, "replace", lambda args, kwargs: Path(args[0]).name)
        os.fsync = dying(os.fsync, "fsync", lambda args, kwargs: Path(os.readlink(f"/proc/self/fd/{args[0]}")).name)
        Path.open = opening
        train_quietly(recipe, path)
        os._exit(0)
    rng.random()
    os.waitpid(child, 0)
"""


def test_a_run_killed_within_updates_and_writing_and_between_stages_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, env=environment(3), check=True, capture_output=True, text=True)
    died = done.stdout.splitlines()
    assert died[:4] == ["write checkpoint.pt.new", "replace stage1.pt.new", "update 9", "write stage2.pt.new"]
    assert len(died) >= 10
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
