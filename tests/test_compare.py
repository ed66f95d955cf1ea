"""Two runs are identical or the first difference is named."""

import dataclasses
import json
import platform
import shutil

import pytest
import torch

import train.graph
import train.loop
from kernels import attention_tile
from tests.test_checkpoint import checkpoint
from tests.tiny_runs import tiny_recipe, train_quietly
from train.checkpoint import load_checkpoint, save_checkpoint
from train.compare import compare_runs
from train.loop import run
from train.roofs import generate_scenes
from train.rundir import RunDirectory, RunRefused
from train.sources import write_npz
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
    for path, zero in zip(runs, (0.0, -0.0), strict=True):
        change(path / "stage1.pt", lambda state, zero=zero: state.model["w"].fill_(zero))
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


def test_the_last_scores_of_both_come_first(runs):
    for path, hss in zip(runs, (0.25, 0.5), strict=True):
        log = RunDirectory(path)
        log.append("metrics", kind="eval", step=2, hss_mean=0.1, corner_f1_mean=0.1, edge_iou_mean=0.1)
        log.append("metrics", kind="stage", step=3, hss_mean=hss, corner_f1_mean=0.75, edge_iou_mean=0.5)
        log.append("metrics", kind="train", step=4, loss=hss)
    first, *_ = compare_runs(*runs).differences
    scores = "HSS 0.2500 against 0.5000, corner F1 0.7500 against 0.7500, edge IoU 0.5000 against 0.5000"
    assert first == f"scores at step 3: {scores}"


@pytest.mark.parametrize("name", ["stage10.pt", "stage11_tail.pt", "step000500.pt"])
def test_every_checkpoint_that_stays_is_compared(runs, name):
    for path in runs:
        shutil.copy(path / "stage1.pt", path / name)
    change(runs[1] / name, lambda state: state.model["w"].add_(1))
    (difference,) = compare_runs(*runs).differences
    assert difference.startswith(f"{name}: w: 12 of 12 elements differ")


def test_stages_from_the_tenth_on_count(runs):
    shutil.copy(runs[0] / "stage1.pt", runs[0] / "stage10.pt")
    assert compare_runs(*runs).differences == ("finished stages: stage1.pt, stage10.pt against stage1.pt",)


def test_runs_of_which_nothing_was_compared_are_not_called_identical(runs):
    for path in runs:
        (path / "stage1.pt").unlink()
    with pytest.raises(RunRefused, match="cannot be compared: they have no traced step and no checkpoint in common"):
        compare_runs(*runs)


def test_a_run_that_stopped_earlier_differs(runs):
    (runs[1] / "metrics.jsonl").write_text((runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    (runs[1] / "stage1.pt").unlink()
    differences = compare_runs(*runs).differences
    assert differences == (
        "metrics: only one run goes on to step 2 (train)",
        "finished stages: stage1.pt against none",
    )


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


def of(comparison, start):
    """The differences that begin so."""
    return [text for text in comparison.differences if text.startswith(start)]


def test_the_first_differing_tensor_of_each_kind_is_named(finished, tmp_path):
    stages = tiny_recipe().stages
    stages = (*stages[:2], dataclasses.replace(stages[2], endpoint_weight=0.2))
    train_quietly(tiny_recipe(stages=stages), tmp_path / "other")
    comparison = compare_runs(finished, tmp_path / "other")
    assert comparison.sentence.startswith("step 13 is the first that differs: ")
    assert of(comparison, "recipe: ") == ["recipe: stages.2.endpoint_weight 0.1 against 0.2"]
    (tensors,) = of(comparison, "tensors of step 15: first tokenizer.label_emb.weight; ")
    assert tensors.endswith(" differ (traces name tensors at checkpoints only)")
    first, second, loss, gradient, after, same = of(comparison, "recomputed: ")
    assert first == f"recomputed: step 13 of {finished}, from stage2.pt, and it is as its trace says"
    assert second.endswith("and it is as its trace says")
    assert loss.startswith("recomputed: step 13, loss: first loss: 1 of 1 elements differ, at most by 0.")
    assert gradient.startswith("recomputed: step 13, gradient: first tokenizer.label_emb.weight: ")
    assert after.startswith("recomputed: step 13, after: first tokenizer.label_emb.weight: ")
    assert same == "recomputed: step 13, before, rows, activation: the same"


def test_a_wider_loss_shows_in_the_loss_and_coarser_products_in_an_activation(finished, tmp_path):
    train_quietly(tiny_recipe(precision="bf16"), tmp_path / "other")
    found = of(compare_runs(finished, tmp_path / "other"), "recomputed: step 1, ")
    assert found[0].startswith("recomputed: step 1, activation: first memory: ")
    assert found[-1].startswith("recomputed: step 1, before, rows")


def test_a_fault_is_told_from_what_is_computed_so(finished, tmp_path, monkeypatch):
    weight = "segmenter.decoder_layers.0.ffn.ffn.linear1.weight"

    def struck(model, *args, step, **kwargs):
        result = advance(model, *args, step=step, **kwargs)
        if step == 6:
            dict(model.named_parameters())[weight].detach().view(torch.int32)[1, 2] ^= 1
        return result

    monkeypatch.setattr(train.graph, "advance", struck)
    # the states are in the trace after steps 5, 10, ... only; the tensors of step 6 are, because of a checkpoint
    train_quietly(tiny_recipe(trace_every=5), tmp_path / "other")
    comparison = compare_runs(finished, tmp_path / "other")
    assert comparison.sentence.startswith("step 6 is the first that differs: ")
    assert of(comparison, "tensors of step 6: ") == [f"tensors of step 6: first {weight}; 1 of 265 differ"]
    first, second, third = of(comparison, "recomputed: ")
    assert first.endswith("and it is as its trace says")
    assert f"but the state after step 6 is another one; first tensor {weight}, 1 of 265 differ" in second
    assert third.endswith("every tensor is the same here: it is not recipe, rows or state that differ")


def test_a_run_that_went_on_from_a_flipped_bit_is_traced_to_it(finished, tmp_path, monkeypatch):
    weight = "segmenter.latent_layers.1.self_attn.attn.q_proj.weight"
    other = tmp_path / "other"
    recipe = tiny_recipe(keep_every=14)

    def stop(model, *args, step, **kwargs):
        if step == 15:
            raise KeyboardInterrupt
        return advance(model, *args, step=step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train.graph, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            train_quietly(recipe, other)
    for name in ("step000014.pt", "checkpoint.pt"):
        change(other / name, lambda state: state.model[weight][0, 0].neg_())
    shutil.copy(other / "step000014.pt", other / "checkpoint.pt")
    train_quietly(recipe, other)
    comparison = compare_runs(finished, other)
    assert comparison.sentence.startswith("step 15 is the first that differs: ")
    found = of(comparison, "recomputed: ")
    assert "from step000014.pt, but the checkpoint of step 14: its digest is" in found[1]
    assert found[2].startswith(f"recomputed: step 15, before: first {weight}: 1 of 1,024 elements differ, at most by ")
    assert found[3].startswith("recomputed: step 15, activation: first segmenter.latent_layers.1.self_attn: ")


def test_exchanged_rows_are_found_down_to_step_and_tensor(tmp_path):
    scenes = generate_scenes(12, seed=0, points=64, setting="easy")
    runs = []
    for name, order in (("a", [0, 1, 2, 3]), ("b", [0, 2, 1, 3])):
        # each of two scenes takes the other's place in the epochs
        order += range(4, 12)
        write_npz([dataclasses.replace(scenes[i], order_id=f"{k:02}") for k, i in enumerate(order)], tmp_path / "set")
        stage = dataclasses.replace(tiny_recipe().stages[0], data=f"npz:{tmp_path}/set?dev=4", until=2)
        train_quietly(tiny_recipe(stages=(stage,)), tmp_path / name)
        (tmp_path / "set").rename(tmp_path / f"set of {name}")
        # the recipe says where the rows are
        for config in (tmp_path / name).glob("*.json"):
            config.write_text(config.read_text().replace(f"{tmp_path}/set?", f"{tmp_path}/set of {name}?"))
        runs.append(tmp_path / name)
    comparison = compare_runs(*runs)
    assert comparison.sentence.startswith("step 1 is the first that differs: ")
    assert comparison.differences[0].startswith("metrics: first at step 1 (data): train_digest ")
    rows, activation = of(comparison, "recomputed: step 1, ")[:2]
    assert rows.startswith("recomputed: step 1, rows: first xyz_BT3: ")
    assert activation.startswith("recomputed: step 1, activation: first memory: ")


def test_another_kernel_table_is_found_down_to_step_and_value(device, tmp_path, monkeypatch):
    recipe = tiny_recipe()
    # one scene, one update: in the interpreter this takes a while; output projections begin with zeros, so that only
    # the decoder's attention to the latents has a say
    model = dataclasses.replace(recipe.model, latent_layers=1, latent_tokens=64)
    stage = dataclasses.replace(recipe.stages[0], batch=1, until=1)
    quick = dataclasses.replace(recipe.evaluate, scenes=1, batch=1, every=0)
    changes = {"model": model, "stages": (stage,), "evaluate": quick, "impl": "triton", "precision": "fp32"}
    for name in ("a", "b"):
        run(tiny_recipe(**changes), tmp_path / name, device=device.type, progress=False, say=lambda _line: None)
        tiles = {key: ((16, 16, 4, 1), *launches[1:]) for key, launches in attention_tile.TILES.items()}
        monkeypatch.setattr(attention_tile, "TILES", tiles)
    monkeypatch.undo()
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert comparison.sentence.startswith("step 1 is the first that differs: ")
    assert of(comparison, "trace: first at step 1 (step): ")
    first, second, third = of(comparison, "recomputed: ")
    assert first.endswith("and it is as its trace says")
    assert "but step 1, " in second
    assert third.endswith("every tensor is the same here: it is not recipe, rows or state that differ")
    if device.type == "cuda":
        assert "machine code of _attention_fwd_kernel differs" in comparison.differences


def test_rows_that_are_not_the_runs_cannot_be_recomputed(finished, tmp_path, monkeypatch):
    real = train.graph.advance

    def other(*args, **kwargs):
        result = real(*args, **kwargs)
        return result._replace(grad_norm=result.grad_norm + 1)

    monkeypatch.setattr(train.graph, "advance", other)
    train_quietly(tiny_recipe(), tmp_path / "other")
    log = tmp_path / "other" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"train_digest": "', '"train_digest": "f'))
    first, second = of(compare_runs(finished, tmp_path / "other"), "recomputed: ")
    assert first.endswith("and it is as its trace says")
    assert second.startswith(f"recomputed: not step 1 of {tmp_path / 'other'}: rows of stage 1, ")


def test_without_a_state_to_begin_with_nothing_is_recomputed_and_why_is_said(finished, other):
    log = other / "trace.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[2]["mass"] = (0.5).hex()
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (*other.glob("*.pt*"), other / "processes.jsonl"):
        path.unlink()
    found = of(compare_runs(finished, other), "recomputed: ")
    assert found[1].startswith(f"recomputed: not step 2 of {other}: {other} has no checkpoint of step 1 or before, ")
    assert of(compare_runs(finished, other, recompute=False), "recomputed: ") == []
    log.write_text(log.read_text().replace('"from": null', '"from": {"file": "published.pt"}', 1))
    found = of(compare_runs(finished, other), "recomputed: ")
    assert found == [f"recomputed: not step 0 of {other}: it began with the weights of published.pt"]


def test_other_initial_weights_are_named(finished, tmp_path):
    stage = dataclasses.replace(tiny_recipe().stages[0], until=1)
    train_quietly(tiny_recipe(stages=(stage,), seed=4), tmp_path / "other")
    said = []
    comparison = compare_runs(finished, tmp_path / "other", say=said.append)
    assert comparison.sentence.startswith("step 0 is the first that differs: ")
    (line,) = of(comparison, "recomputed: ")
    assert line.startswith("recomputed: step 0, before: first tokenizer.label_emb.weight: 208 of 208 elements differ, ")
    assert said[1] == f"making the initial weights of {tmp_path / 'other'} again"


def test_other_arithmetic_and_another_recipe_are_named_as_causes(finished, tmp_path):
    other = tmp_path / "other"
    stage = dataclasses.replace(tiny_recipe().stages[0], until=1)
    train_quietly(tiny_recipe(stages=(stage,), precision="bf16", threads=2, seed=4), other)
    comparison = compare_runs(finished, other)
    assert comparison.sentence.startswith("step 0 is the first that differs: ")
    for cause in (
        "recipe: precision 'auto' against 'bf16'",
        "recipe: seed 353 against 4",
        "recipe: threads 1 against 2",
        "environment precision: fp32 against bf16",
        "environment threads: 1 against 2",
    ):
        assert cause in comparison.differences


def edit_processes(run_dir, change):
    log = run_dir / "processes.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    change(lines)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_other_code_environment_and_machine_code_are_named(finished, other):
    def change(lines):
        lines[0]["environment"]["python"] = "2"
        lines[0]["code"]["train/step.py"] = "0"
        lines.append({"kind": "kernels", "step": 3, "cubins": {"_attention_dq_kernel": {"0": {"warps": 4}}}})

    edit_processes(other, change)
    (other / "stage3.pt").unlink()
    found = compare_runs(finished, other).differences
    assert found[1:] == (
        "code train/step.py differs",
        f"environment python: {platform.python_version()} against 2",
        "machine code of _attention_dq_kernel differs",
    )


def test_a_shorter_trace_is_said(finished, other):
    trace = (other / "trace.jsonl").read_text().splitlines(keepends=True)
    (other / "trace.jsonl").write_text("".join(trace[:-2]))
    (difference,) = compare_runs(finished, other).differences
    assert difference.startswith("trace: one run ends at step 20, the other at step ")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunRefused, match="holds no run"):
        compare_runs(tmp_path, tmp_path)
