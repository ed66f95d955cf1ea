"""Two runs are identical or the first difference is named."""

import dataclasses
import shutil

import pytest
import torch

import train.graph
import train.loop
from tests.test_checkpoint import checkpoint
from tests.tiny_runs import tiny_recipe, train_quietly
from train.checkpoint import load_checkpoint, save_checkpoint
from train.compare import compare_runs
from train.rundir import RunDirectory, RunRefused
from train.step import advance


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    train_quietly(tiny_recipe(), path)
    return path


@pytest.fixture
def other(finished, tmp_path):
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "other")
    return tmp_path / "other"


def test_copies_of_a_run_are_identical_at_every_step(finished, other):
    assert "20 traced steps, and the weights and optimizer states of 3 stages, every bit" in (
        compare_runs(finished, other).sentence
    )


def test_one_flipped_bit_while_training_is_found_down_to_step_and_tensor(finished, tmp_path, monkeypatch):
    weight = "segmenter.decoder_layers.0.ffn.ffn.linear1.weight"

    def struck(model, *args, step, **kwargs):
        result = advance(model, *args, step=step, **kwargs)
        if step == 8:
            dict(model.named_parameters())[weight].detach().view(torch.int32)[1, 2] ^= 1
        return result

    monkeypatch.setattr(train.graph, "advance", struck)
    train_quietly(tiny_recipe(), tmp_path / "other")
    comparison = compare_runs(finished, tmp_path / "other")
    assert comparison.sentence == f"step 8 is the first that differs: {finished} and {tmp_path / 'other'} differ"
    differences = comparison.differences
    assert any(line.startswith("trace: first at step 8 (step): state ") for line in differences)
    assert any(line.startswith(f"tensors of step 8: first {weight}; 1 of ") for line in differences)
    first_checkpoint = next(line for line in differences if line.startswith("stage"))
    assert first_checkpoint.startswith(f"stage1.pt: {weight}: 1 of 1,024 elements differ, at most by ")


def test_exchanged_rows_are_found_at_the_first_step_and_named(finished, tmp_path, monkeypatch):
    real = train.loop.stage_data

    def exchanged(recipe, number, **options):
        data = real(recipe, number, **options)
        order = torch.arange(len(data.train))
        order[:2] = torch.tensor([1, 0])
        # the ids stay: each of the two scenes takes the other's place in the epochs
        return dataclasses.replace(
            data, train=dataclasses.replace(data.train, rows=data.train.rows.rows(order), digest="e" * 64)
        )

    monkeypatch.setattr(train.loop, "stage_data", exchanged)
    train_quietly(tiny_recipe(), tmp_path / "other")
    differences = compare_runs(finished, tmp_path / "other").differences
    assert differences[0].startswith("metrics: first at step 1 (data): train_digest ")
    assert differences[1].startswith("trace: first at step ")
    assert differences[2].startswith("tensors of step ")


def test_other_arithmetic_and_another_recipe_are_named_as_causes(finished, tmp_path):
    other = tmp_path / "other"
    train_quietly(tiny_recipe(precision="bf16", threads=2, seed=4), other)
    comparison = compare_runs(finished, other)
    assert comparison.sentence.startswith("step 0 is the first that differs: ")
    for cause in (
        "recipe: precision 'auto' against 'bf16'",
        "recipe: seed 353 against 4",
        "recipe: threads 1 against 2",
        "machine: precision fp32 against bf16",
        "machine: threads 1 against 2",
    ):
        assert cause in comparison.differences


def test_other_code_is_named(finished, other):
    path = other / "certificate.json"
    path.write_text(path.read_text().replace('"python": "3', '"python": "2'))
    trace = (other / "trace.jsonl").read_text().splitlines(keepends=True)
    (other / "trace.jsonl").write_text("".join(trace[:-2]))
    differences = compare_runs(finished, other).differences
    assert differences[0].startswith("trace: one run ends at step 20, the other at step ")
    assert differences[-1].startswith("environment: python 3")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunRefused, match="holds no run"):
        compare_runs(tmp_path, tmp_path)
