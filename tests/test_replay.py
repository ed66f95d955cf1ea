"""Updates made again: yes, no down to step and tensor, or why it cannot be checked here."""

import json

import pytest

from perceiver.model import Perceiver
from tests.test_verify import WEIGHT, flip_one_bit
from tests.tiny_runs import tiny_recipe
from train import determinism
from train.replay import CannotCheck, initial_weights, recompute_update, replay
from train.trace import tensor_digests


def test_another_processor_or_torch_cannot_be_replayed(finished, monkeypatch):
    monkeypatch.setattr(determinism, "fingerprint", lambda _device: "GenuineIntel family 6, torch 2.12.0")
    verdict = replay(finished, 5)
    assert verdict.exit_code == 2
    assert "here GenuineIntel family 6, torch 2.12.0: other bits are to be expected" in verdict.sentence


def test_a_recipe_of_another_version_cannot_be_checked(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"momentum": 1}))
    verdict = replay(run_dir, 5)
    assert verdict.exit_code == 2
    assert "does not know its recipe: recipe has no key 'momentum'" in verdict.sentence


def test_a_step_is_replayed_from_the_nearest_checkpoint(finished):
    verdict = replay(finished, 11)
    assert verdict.exit_code == 0
    assert verdict.lines == (
        "recomputed steps 9 to 11 from stage1.pt: every value and digest of the trace is the same",
    )
    assert replay(finished, 14, steps=4).lines[0].startswith("recomputed steps 9 to 14 from ")


def test_a_replay_shows_how_far_it_is_where_it_is_asked_to(finished, capfd, terminal):
    replay(finished, 11)
    assert "again" not in capfd.readouterr().err
    replay(finished, 11, progress=True)
    assert "making steps 9 to 11 again" in capfd.readouterr().err


def test_a_replay_that_differs_names_step_and_value(run_dir):
    log = run_dir / "trace.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step" and line["step"] == 10:
            line["mass"] = (0.5).hex()
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict = replay(run_dir, 10)
    assert verdict.exit_code == 1
    assert "step 10, mass: computed" in verdict.sentence
    assert "it says 0.5 (0x1.0000000000000p-1)" in verdict.sentence


def test_a_replay_from_a_flipped_bit_names_the_tensor(run_dir):
    flip_one_bit(run_dir / "stage1.pt")
    flip_one_bit(run_dir / "stage2_tail.pt")
    verdict = replay(run_dir, 9)
    assert verdict.exit_code == 1
    assert f"first tensor {WEIGHT}, 1 of" in verdict.sentence


def test_a_step_that_was_not_made_cannot_be_checked(finished, tmp_path):
    assert "has no step 21" in replay(finished, 21).sentence
    assert replay(finished, 21).exit_code == 2
    assert "has no config.json" in replay(tmp_path, 1).sentence


@pytest.mark.parametrize("step", [0, -3, 21, 99])
def test_a_step_that_was_not_made_cannot_be_made_again(finished, step):
    with pytest.raises(CannotCheck, match=rf"has no step {step}: its recipe has 1 to 20"):
        recompute_update(finished, step)


def test_no_steps_are_refused(finished):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        replay(finished, 5, steps=0)


def test_a_damaged_file_is_named(run_dir):
    (run_dir / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        replay(run_dir, 5)


def test_a_run_without_checkpoints_is_replayed_from_its_initial_weights(run_dir):
    for path in run_dir.glob("*.pt*"):
        path.unlink()
    verdict = replay(run_dir, 2)
    assert verdict.exit_code == 0
    assert verdict.lines[0].startswith("recomputed steps 1 to 2 from the initial weights: ")
    (run_dir / "processes.jsonl").unlink()
    assert "no log of its processes" in replay(run_dir, 2).sentence


def test_an_update_made_again_has_every_tensor_and_is_the_runs(finished):
    again = recompute_update(finished, 9)
    assert (again.origin, again.notes) == ("stage1.pt", ())
    lines = [json.loads(line) for line in (finished / "trace.jsonl").read_text().splitlines()]
    (digests,) = [line["digests"] for line in lines if line["kind"] == "tensors" and line["step"] == 9]
    assert tensor_digests(again.tensors["after"]) == digests
    (line,) = [line for line in lines if line["kind"] == "step" and line["step"] == 9]
    assert again.tensors["loss"]["transport"].item() == float.fromhex(line["transport"])
    assert again.tensors["gradient"]["norm"].item() == float.fromhex(line["grad_norm"])


def test_an_update_from_a_flipped_bit_is_made_and_said_to_be_another_one(run_dir):
    for name in ("stage1.pt", "stage2_tail.pt"):
        flip_one_bit(run_dir / name)
    again = recompute_update(run_dir, 9)
    assert f"first tensor {WEIGHT}, 1 of" in again.notes[0]
    assert "step 9, state: computed" in again.notes[1]
    with pytest.raises(CannotCheck, match=rf"the checkpoint of step 8: .*{WEIGHT}.*; step 9, state: computed"):
        recompute_update(run_dir, 10)


def test_the_initial_weights_are_drawn_again_unless_they_came_from_a_file(run_dir):
    recipe = tiny_recipe()
    assert tensor_digests(initial_weights(run_dir)) == tensor_digests(
        Perceiver(recipe.model, seed=recipe.seed).state_dict()
    )
    log = run_dir / "trace.jsonl"
    log.write_text(log.read_text().replace('"from": null', '"from": {"file": "published.pt"}', 1))
    with pytest.raises(CannotCheck, match=r"it began with the weights of published\.pt"):
        initial_weights(run_dir)
