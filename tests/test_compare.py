"""Two runs are identical or the first difference is named."""

import shutil

import pytest
import torch

from tests.test_checkpoint import checkpoint
from train.checkpoint import load_checkpoint, save_checkpoint
from train.compare import compare_runs
from train.rundir import RunDirectory, RunRefused


@pytest.fixture
def runs(tmp_path):
    a = RunDirectory(tmp_path / "a")
    for step in (1, 2):
        a.append("metrics", kind="train", step=step, loss=1 / 3)
    save_checkpoint(a.stage_checkpoint(1), checkpoint(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def change(path, edit):
    state = load_checkpoint(path)
    edit(state)
    save_checkpoint(path, state)


def test_copies_are_identical(runs):
    comparison = compare_runs(*runs)
    assert comparison.identical
    assert "are identical: 2 lines of metrics" in comparison.sentence


def test_one_flipped_bit_in_a_weight_is_found_and_named(runs):
    def flip(state):
        state.model["w"].view(torch.int32)[1, 2] ^= 1

    change(runs[1] / "stage1.pt", flip)
    comparison = compare_runs(*runs)
    assert not comparison.identical
    assert comparison.differences[0].startswith("stage1.pt: w: 1 of 12 elements differ, at most by ")


def test_negative_zero_is_another_bit(runs):
    for run, zero in zip(runs, (0.0, -0.0), strict=True):
        change(run / "stage1.pt", lambda state, zero=zero: state.model["w"].fill_(zero))
    assert compare_runs(*runs).differences[0].startswith("stage1.pt: w: 12 of 12 elements differ, at most by 0")


def test_a_difference_in_the_optimizer_is_found(runs):
    change(runs[1] / "stage1.pt", lambda state: state.optimizer["state"][0]["exp_avg"].add_(1))
    assert compare_runs(*runs).differences == ("stage1.pt: optimizer.0.exp_avg: 3 of 3 elements differ, at most by 1",)


def test_the_first_differing_step_and_value_are_named(runs):
    log = runs[1] / "metrics.jsonl"
    log.write_text(
        log.read_text().replace('"step": 2, "loss": 0.3333333333333333', '"step": 2, "loss": 0.33333333333333337')
    )
    (difference,) = compare_runs(*runs).differences
    assert difference == "metrics: first at step 2 (train): loss 0.3333333333333333 against 0.33333333333333337"


def test_a_run_that_stopped_earlier_differs(runs):
    (runs[1] / "metrics.jsonl").write_text((runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    (runs[1] / "stage1.pt").unlink()
    differences = compare_runs(*runs).differences
    assert differences == (
        "metrics: only one run goes on to step 2 (train)",
        "finished stages: stage1.pt against none",
    )


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunRefused, match="holds no run"):
        compare_runs(tmp_path, tmp_path)
