"""The loop: what a run leaves, that it stops and goes on without a trace, and when it gives up."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train.graph
import train.loop
from tests.tiny_runs import final_state, tiny_recipe, train_quietly, write_recipe
from train.checkpoint import CheckpointError, load_checkpoint
from train.compare import compare_runs
from train.config import load_recipe
from train.loop import run
from train.rundir import RunRefused, read_log
from train.signals import RunStopped
from train.starting_point import load_start
from train.step import advance


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never disturbed."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    assert train_quietly(tiny_recipe(keep_every=7), path)
    return path


def _stop_at(monkeypatch, at):
    def interrupted(*args, step, **kwargs):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(*args, step=step, **kwargs)

    monkeypatch.setattr(train.graph, "advance", interrupted)


def test_a_run_leaves_what_it_promises(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"trace.jsonl", "processes.jsonl", "certificate.json"} <= names
    assert {"config.json", "metrics.jsonl", "speed.jsonl", "checkpoint.pt", "step000007.pt", "step000014.pt"} <= names
    assert {f"stage{k}{part}.pt" for k in (1, 2, 3) for part in ("", "_tail")} <= names
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, 21))
    assert {
        "loss",
        "transport",
        "conf",
        "endpoint",
        "mass",
        "kept",
        "dustbin",
        "grad_norm",
        "lr",
        "tau",
    } <= train_lines[0].keys()
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 8, 12, 16, 20]
    assert [(line["step"], line["stage"]) for line in lines if line["kind"] == "stage"] == [(8, 1), (12, 2), (20, 3)]
    assert [line["uri"] for line in lines if line["kind"] == "data"] == [s.data for s in tiny_recipe().stages]
    assert load_checkpoint(finished / "stage2_tail.pt").step == 8
    assert load_checkpoint(finished / "stage3.pt").step == 20
    assert not {"seconds", "memory_mb"} & {key for line in lines for key in line}


def test_a_complete_run_is_left_alone(finished):
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.suffix in (".pt", ".json")}
    assert not train_quietly(tiny_recipe(keep_every=7), finished)
    assert before == {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.suffix in (".pt", ".json")}


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
    stages = tiny_recipe().stages
    stages = (*stages[:2], dataclasses.replace(stages[2], data="roofs:hard"))
    with pytest.raises(ValueError, match="roofs:hard"):
        train_quietly(tiny_recipe(stages=stages), tmp_path / "runs" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stops", [(1,), (8,), (5, 9, 19)])
def test_a_run_that_was_stopped_is_the_run_that_was_not(finished, tmp_path, monkeypatch, stops):
    recipe = tiny_recipe(keep_every=7)
    for step in stops:
        _stop_at(monkeypatch, step)
        with pytest.raises(RunStopped, match=f"SIGTERM after step {step}"):
            train_quietly(recipe, tmp_path / "run")
    assert train_quietly(recipe, tmp_path / "run")
    assert compare_runs(finished, tmp_path / "run").differences == ()
    assert final_state(finished) == final_state(tmp_path / "run")
    for file in finished.glob("*.pt"):
        assert (tmp_path / "run" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_trace_has_every_step_and_every_scheduled_checkpoint(finished):
    lines = read_log(finished / "trace.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 21))
    assert [line["step"] for line in lines if line["kind"] == "tensors"] == [3, 6, 8, 9, 12, 15, 18, 20]
    assert [line["step"] for line in lines if line["kind"] == "start"] == [0]
    metrics = [line for line in read_log(finished / "metrics.jsonl") if line["kind"] == "train"]
    for line, said in zip([line for line in lines if line["kind"] == "step"], metrics, strict=True):
        assert {name: float.fromhex(line[name]) for name in said.keys() - {"kind", "step", "stage", "tau"}} == {
            name: said[name] for name in said.keys() - {"kind", "step", "stage", "tau"}
        }


def test_the_trace_of_a_run_that_was_killed_or_stopped_is_byte_for_byte_the_same(finished, tmp_path, monkeypatch):
    """Stopped before the first checkpoint, killed after it and in a stage's end."""
    recipe, path, lines = tiny_recipe(keep_every=7), tmp_path / "run", []

    class Killed(BaseException):
        pass

    for at in (2, 5, 9, 20):

        def killed(*args, step, at=at, **kwargs):
            if step == at:
                raise Killed
            return advance(*args, step=step, **kwargs)

        monkeypatch.setattr(train.graph, "advance", killed)
        with pytest.raises(Killed):
            run(recipe, path, device="cpu", progress=False, say=lines.append)
        if at == 2:
            # as if it had been killed before its trace came to the disk
            (path / "trace.jsonl").unlink()
    monkeypatch.undo()
    run(recipe, path, device="cpu", progress=False, say=lines.append)
    said = ["has no checkpoint yet: starts at step 0"]
    said += [f"goes on from step {step}, in stage {stage}" for step, stage in ((3, 1), (8, 2), (18, 3))]
    assert [line for line in lines if line.startswith(str(path))] == [f"{path} {line}" for line in said]
    for name in ("trace.jsonl", "metrics.jsonl", "certificate.json"):
        assert (path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_full_disk_under_the_trace_is_said_and_costs_nothing_but_time(finished, tmp_path, monkeypatch):
    recipe, path = tiny_recipe(keep_every=7), tmp_path / "run"
    _stop_at(monkeypatch, 5)
    with pytest.raises(RunStopped):
        train_quietly(recipe, path)
    monkeypatch.undo()
    before = (path / "checkpoint.pt").read_bytes()
    real = Path.open

    def full(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        if self.name == "trace.jsonl" and mode == "a":
            file.write('{"kind": "st')
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"No space left on device: .*trace\.jsonl"):
        train_quietly(recipe, path)
    monkeypatch.undo()
    assert (path / "checkpoint.pt").read_bytes() == before
    train_quietly(recipe, path)
    assert compare_runs(finished, path).differences == ()


# a limit on the size of files, above that of the logs so far and below that of a checkpoint
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_under_a_checkpoint_is_said_and_leaves_the_last_one(finished, tmp_path, monkeypatch):
    recipe, path = tiny_recipe(keep_every=7), tmp_path / "tiny"
    _stop_at(monkeypatch, 1)
    with pytest.raises(RunStopped):
        train_quietly(recipe, path)
    monkeypatch.undo()
    before = (path / "checkpoint.pt").read_bytes()
    file = write_recipe(recipe, tmp_path / "tiny.json")
    flags = ["--recipe", str(file), "--runs", str(tmp_path), "--quiet", "--device", "cpu"]
    command = [sys.executable, "-c", LIMITED, "run", *flags]
    child = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert child.returncode == 1, child.stderr
    assert "File too large" in child.stderr and "checkpoint.pt.new" in child.stderr
    assert "Make room and run the same command again: it goes on from the last checkpoint" in child.stderr
    assert (path / "checkpoint.pt").read_bytes() == before
    train_quietly(recipe, path)
    assert compare_runs(finished, path).differences == ()


def test_a_damaged_checkpoint_costs_nothing_but_time(finished, tmp_path, monkeypatch):
    recipe, path = tiny_recipe(keep_every=7), tmp_path / "run"
    _stop_at(monkeypatch, 10)
    with pytest.raises(RunStopped):
        train_quietly(recipe, path)
    monkeypatch.undo()
    (path / "checkpoint.pt").write_bytes(b"half a checkpo")
    lines: list[str] = []
    run(recipe, path, device="cpu", progress=False, say=lines.append)
    assert any("checkpoint.pt is damaged" in line and "step 9" in line for line in lines)
    assert final_state(path) == final_state(finished)


@pytest.mark.parametrize(
    ("lost", "origin"),
    [
        ("checkpoint.pt*", "step000014.pt, step 14"),
        ("checkpoint.pt* step*", "stage2.pt, step 12"),
        ("checkpoint.pt* step* stage?.pt", None),
        ("*.pt* *.json", None),
    ],
)
def test_a_run_whose_checkpoint_is_lost_goes_on_from_a_state_that_stayed(finished, tmp_path, lost, origin):
    recipe, path = tiny_recipe(keep_every=7), tmp_path / "run"
    shutil.copytree(finished, path)
    for pattern in lost.split():
        for file in path.glob(pattern):
            file.unlink()
    lines: list[str] = []
    assert run(recipe, path, device="cpu", progress=False, say=lines.append)
    said = [line for line in lines if "going on from" in line]
    assert said == ([f"{path / 'checkpoint.pt'} does not exist; going on from {origin}"] if origin else [])
    assert compare_runs(finished, path).differences == ()
    for name in ("trace.jsonl", "metrics.jsonl", "certificate.json"):
        assert (path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_whose_checkpoints_are_both_damaged_goes_on_from_a_state_that_stayed(finished, tmp_path):
    recipe, path = tiny_recipe(keep_every=7), tmp_path / "run"
    shutil.copytree(finished, path)
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        (path / name).write_bytes(b"half a checkpo")
    lines: list[str] = []
    assert run(recipe, path, device="cpu", progress=False, say=lines.append)
    (said,) = [line for line in lines if "going on from" in line]
    assert re.search(r"pt is damaged: .*\.previous is damaged: .*; going on from step000014\.pt, step 14$", said)
    assert compare_runs(finished, path).differences == ()


def test_a_run_with_damaged_checkpoints_and_no_state_that_stayed_is_not_begun_anew(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for file in path.glob("*.pt*"):
        file.write_bytes(b"half a checkpo")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match=r"pt is damaged: .*\.previous is damaged: "):
        train_quietly(tiny_recipe(keep_every=7), path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_finished_run_is_not_begun_anew_for_want_of_a_checkpoint(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for file in path.glob("*.pt*"):
        if file.name != "stage3.pt":
            file.unlink()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(
        RunRefused, match=r"holds stage3\.pt but no state that .*, or copy stage3\.pt to checkpoint\.pt"
    ):
        train_quietly(tiny_recipe(keep_every=7), path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (path / "stage3.pt").rename(path / "checkpoint.pt")
    assert not train_quietly(tiny_recipe(keep_every=7), path)


def test_a_checkpoint_of_another_recipe_is_refused_without_its_config(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for lost in ("config.json", "checkpoint.pt"):
        (path / lost).unlink(missing_ok=True)
        with pytest.raises(RunRefused, match=r"holds a run of another recipe \(different: seed\)"):
            train_quietly(tiny_recipe(keep_every=7, seed=9), path)
        assert not (path / "config.json").exists()
    (path / "stage3.pt").rename(path / "checkpoint.pt")
    assert not train_quietly(tiny_recipe(keep_every=7), path)
    assert (path / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_stages_from_a_checkpoint_are_those_of_the_whole_run(finished, tmp_path):
    recipe = tiny_recipe(keep_every=7)
    start = load_start(finished / "stage1.pt", 2, recipe)
    train_quietly(recipe, tmp_path / "run", start=start)
    assert final_state(tmp_path / "run")[0] == final_state(finished)[0]


def test_a_start_takes_the_moments_of_the_checkpoint_and_the_decay_of_the_recipe(finished, tmp_path):
    recipe = tiny_recipe(optim=dataclasses.replace(tiny_recipe().optim, weight_decay=0.25, beta2=0.5))
    train_quietly(recipe, tmp_path / "run", start=load_start(finished / "stage2.pt", 3, recipe))
    group = load_checkpoint(tmp_path / "run" / "stage3.pt").optimizer["param_groups"][0]
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.9, 0.5))
    assert load_checkpoint(tmp_path / "run" / "stage3.pt").optimizer["state"][0]["step"] == 20


def test_a_run_that_began_elsewhere_is_not_gone_on_with(finished, tmp_path):
    recipe = tiny_recipe(keep_every=7)
    with pytest.raises(RunRefused, match=r"did not begin at stage 2 from stage1\.pt; take another --name"):
        train_quietly(recipe, finished, start=load_start(finished / "stage1.pt", 2, recipe))
    train_quietly(recipe, tmp_path / "run", start=load_start(finished / "stage1.pt", 2, recipe))
    assert not train_quietly(recipe, tmp_path / "run", start=load_start(finished / "stage1.pt", 2, recipe))
    with pytest.raises(RunRefused, match="did not begin at stage 3"):
        train_quietly(recipe, tmp_path / "run", start=load_start(finished / "stage2.pt", 3, recipe))


def test_thinner_logs_and_other_checkpoints_do_not_change_the_weights(finished, tmp_path):
    recipe = tiny_recipe(log_every=9, checkpoint_every=100)
    recipe = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, every=0))
    train_quietly(recipe, tmp_path / "run")
    assert final_state(tmp_path / "run")[0] == final_state(finished)[0]


@pytest.mark.parametrize("change", [{"seed": 354}, {"loss": dataclasses.replace(tiny_recipe().loss, eps=0.11)}])
def test_another_seed_or_loss_gives_other_weights(finished, tmp_path, change):
    train_quietly(tiny_recipe(**change), tmp_path / "run")
    assert final_state(tmp_path / "run")[0] != final_state(finished)[0]


def test_other_arithmetic_may_not_go_on_with_a_run(tmp_path, finished, monkeypatch):
    recipe = tiny_recipe(precision="auto")
    real = train.loop.enter
    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "enter", lambda **kw: real(**kw | {"precision": "bf16"}))
        train_quietly(recipe, tmp_path / "run")
    with pytest.raises(RunRefused, match="other arithmetic gives other bits"):
        train_quietly(recipe, tmp_path / "run")


def test_other_rows_may_not_go_on_with_a_run(tmp_path, monkeypatch):
    recipe = tiny_recipe()
    real = train.loop.stage_data
    _stop_at(monkeypatch, 5)
    with pytest.raises(RunStopped):
        train_quietly(recipe, tmp_path / "run")

    def other_rows(*args, **kwargs):
        data = real(*args, **kwargs)
        return dataclasses.replace(data, train=dataclasses.replace(data.train, digest="0" * 64))

    monkeypatch.setattr(train.loop, "stage_data", other_rows)
    with pytest.raises(RunRefused, match="holds other rows than when this run began"):
        train_quietly(recipe, tmp_path / "run")


def test_a_scored_run_writes_scores_and_examples(tmp_path):
    recipe = load_recipe("tiny")
    stage = dataclasses.replace(recipe.stages[0], until=2)
    recipe = dataclasses.replace(recipe, stages=(stage,), threads=1)
    lines: list[str] = []
    run(recipe, tmp_path / "run", device="cpu", progress=False, say=lines.append)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["set"] == "dev"
    assert scores["scenes"] == 64
    assert {"truth_through_postprocessing", "label_clusters"} == scores["yardsticks"].keys()
    assert len((tmp_path / "run" / "scores.csv").read_text().splitlines()) == 65
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["scores"] == scores
    examples = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert [x["percentile"] for x in examples] == [10, 50, 90]
    assert any("label clusters" in line for line in lines)
    (said,) = [line for line in lines if line.startswith("step 2: ")]
    assert re.fullmatch(r"step 2: train loss \S+, dev loss \S+ of up to 8 scenes each, HSS \S+ on 64 dev scenes", said)
