"""A run's directory: one process, one recipe, logs cut back to the checkpoint."""

import dataclasses
import json
import os

import pytest

from train.config import load_recipe
from train.rundir import RunDirectory, RunRefused, kept_states

RECIPE = load_recipe("tiny")


def test_a_second_process_is_refused_while_the_first_holds_the_lock(tmp_path):
    with (
        RunDirectory(tmp_path / "run").locked(),
        pytest.raises(RunRefused, match="in use by another process"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pass
    with RunDirectory(tmp_path / "run").locked():
        pass


def test_another_recipe_is_refused_and_the_first_one_kept(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.fix_recipe(RECIPE)
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    directory.fix_recipe(RECIPE)
    with pytest.raises(RunRefused, match=r"another recipe \(different: seed\); take another --name"):
        directory.fix_recipe(dataclasses.replace(RECIPE, seed=9))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == RECIPE.seed


def test_a_recipe_can_be_corrected_before_the_first_checkpoint(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.fix_recipe(dataclasses.replace(RECIPE, seed=9))
    # it is written where a short stage begins
    directory.stage_tail(1).write_bytes(b"")
    directory.fix_recipe(RECIPE)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == RECIPE.seed


@pytest.mark.parametrize("name", ["checkpoint.pt.previous", "stage1.pt", "stage12.pt", "step000500.pt"])
def test_a_recipe_stays_with_every_state_that_stays(tmp_path, name):
    directory = RunDirectory(tmp_path)
    directory.fix_recipe(RECIPE)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(RunRefused, match=r"different: seed"):
        directory.fix_recipe(dataclasses.replace(RECIPE, seed=9))


def test_states_that_stay_are_in_the_order_of_stages_and_steps(tmp_path):
    names = [f"stage{n}" for n in (10, 1, 2)] + ["step1000000", "step000500", "stage2_tail", "stage10_tail"]
    for name in [*names, "checkpoint", "stage", "stage2_old"]:
        (tmp_path / f"{name}.pt").write_bytes(b"")
    ends, steps = ["stage1", "stage2", "stage10"], ["step000500", "step1000000"]
    assert [path.stem for path in RunDirectory(tmp_path).kept_states()] == ends + steps
    found = [path.stem for path in kept_states(tmp_path, tails=True)]
    assert [x for x in found if not x.endswith("_tail")] == ends + steps
    assert [x for x in found if x.endswith("_tail")] == ["stage2_tail", "stage10_tail"]


def test_logs_can_be_cleared(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append("metrics", kind="train", step=1)
    directory.clear_logs()
    assert directory.read("metrics") == []


def test_logs_are_cut_back_to_the_step_and_half_lines_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.append("metrics", kind="train", step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    directory.cut_logs(2)
    assert [line["step"] for line in directory.read("metrics")] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    directory.flush_logs()


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert RunDirectory(tmp_path).read("metrics") == []


@pytest.mark.parametrize("line", ["damaged", "3", "{}"])
def test_a_damaged_file_is_named(tmp_path, line):
    directory = RunDirectory(tmp_path)
    directory.append("metrics", kind="train", step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    for read in (directory.read, lambda _log: directory.cut_logs(1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is damaged: "):
            read("metrics")
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        directory.fix_recipe(RECIPE)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunRefused, match="cannot be made: Not a directory"):
        RunDirectory(tmp_path / "file" / "run")


def test_a_read_only_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunRefused, match="cannot be written"):
        RunDirectory(tmp_path)
