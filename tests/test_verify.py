"""A certificate holds: yes, no down to step and tensor, or why it cannot be checked here."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

import train.replay
from tests.tiny_runs import tiny_recipe
from train import determinism
from train.certificate import value_digest
from train.checkpoint import load_checkpoint, save_checkpoint
from train.verify import verify

WEIGHT = "segmenter.decoder_layers.0.ffn.ffn.linear1.weight"


def flip_one_bit(path):
    state = load_checkpoint(path)
    state.model[WEIGHT].view(torch.int32)[1, 2] ^= 1
    save_checkpoint(path, state)


def checked(verdict):
    """What was checked, without the notes that the sources were edited since and of what was not looked at."""
    return tuple(line for line in verdict.lines if not line.startswith(("note: the code here", "note: metrics.jsonl")))


def edit(path, change):
    certificate = json.loads(path.read_text())
    change(certificate)
    path.write_text(json.dumps(certificate))


def test_a_certificate_holds(finished):
    verdict = verify(finished / "certificate.json")
    assert verdict.exit_code == 0, verdict
    assert verdict.sentence == f"yes, {finished / 'certificate.json'} holds"
    assert checked(verdict) == (
        "steps 1 to 8: every value the same",
        "steps 1 to 8, end of stage 1: every bit the same",
        "steps 9 to 12, end of stage 2: every bit the same",
        "steps 13 to 20, end of stage 3: every bit the same",
    )


def test_a_certificate_alone_is_checked_as_far_as_it_goes(finished, tmp_path):
    shutil.copy(finished / "certificate.json", tmp_path)
    verdict = verify(tmp_path / "certificate.json")
    assert verdict.exit_code == 2
    assert "stage1_tail.pt is missing: the end of stage 1 was not recomputed" in verdict.sentence
    assert checked(verdict) == ("steps 1 to 8: every value the same",)


def test_one_flipped_bit_in_a_tail_is_found_down_to_the_tensor(run_dir):
    flip_one_bit(run_dir / "stage2_tail.pt")
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1
    assert "the checkpoint of step 8: its digest is" in verdict.sentence
    assert f"first tensor {WEIGHT}, 1 of" in verdict.sentence
    assert len(checked(verdict)) == 2


def test_a_changed_value_is_found_down_to_the_step(run_dir):
    def nudge(certificate):
        line = certificate["first"][4]
        line["grad_norm"] = (float.fromhex(line["grad_norm"]) * (1 + 2**-24)).hex()

    edit(run_dir / "certificate.json", nudge)
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1
    assert "step 5, grad_norm: computed" in verdict.sentence


def test_a_final_state_that_was_not_trained_so_is_found(run_dir):
    edit(run_dir / "certificate.json", lambda c: c["stages"][2]["last"][-1].update(state="0" * 32))
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1
    assert "step 20, state: computed" in verdict.sentence


def forge_rows(certificate):
    """Other dev rows, in all places that speak of them."""
    certificate["data"][1]["dev_digest"] = "0" * 64
    certificate["stages"][1]["parents"]["data"] = value_digest(certificate["data"][1])


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda c: c["stages"][2].update(weights="0" * 64), "its weights is"),
        (lambda c: c["stages"][2].update(state="0" * 32), "its state is"),
        (lambda c: c["stages"][2]["last"][-1].pop("state"), "step 20, state: computed"),
        (lambda c: c["first"][3].pop("loss"), "step 4, loss: computed"),
        (lambda c: c["first"][3].update(speed="0x1p+0"), "step 4, speed: computed nothing"),
        (lambda c: c["stages"][1]["last"].pop(0), r"by its recipe its last must be .*\[9, 10, 11, 12\]"),
        (lambda c: c["first"].clear(), r"its first must be \[1, .* 8\], it has \[\]"),
        (lambda c: c.update(stages=[]), r"by its recipe its stages must be \[\(1, '64 points', 8\)"),
        (lambda c: c["stages"].pop(), "by its recipe its stages must be"),
        (lambda c: c["start"].update(stage=4), "no run of its recipe begins at stage 4"),
        (lambda c: c["start"].update(step=8), "its start must be 0, it has 8"),
        (forge_rows, "rows of stage 2, .*: their dev_digest is"),
        (lambda c: c.update(scores={"checkpoint": {"weights": "0"}}), "its scores are of other weights"),
    ],
)
@pytest.mark.parametrize("with_ends", [True, False], ids=["whole run", "tails only"])
def test_a_forged_certificate_does_not_hold(run_dir, forge, reason, with_ends):
    edit(run_dir / "certificate.json", forge)
    for path in () if with_ends else run_dir.glob("stage?.pt"):
        path.unlink()
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1, verdict
    assert re.search(reason, verdict.sentence)


def test_another_file_for_the_end_of_a_stage_is_found(run_dir):
    flip_one_bit(run_dir / "stage2.pt")
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1
    assert "stage2.pt: the digest of its state is" in verdict.sentence


def test_scores_are_said_not_to_be_computed_again(run_dir):
    edit(
        run_dir / "certificate.json", lambda c: c.update(scores={"checkpoint": {"weights": c["stages"][2]["weights"]}})
    )
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 0
    assert "note: the scores were not computed again" in verdict.lines


def with_scores(run_dir, **changes):
    """Scores in the certificate, and in scores.json the same with changes."""
    weights = json.loads((run_dir / "certificate.json").read_text())["stages"][2]["weights"]
    yardsticks = {"label_clusters": {"hss_mean": 0.75}}
    scores = {"checkpoint": {"step": 20, "weights": weights}, "scenes": 2, "summary": {"hss_mean": 0.82}}
    edit(run_dir / "certificate.json", lambda c: c.update(scores=scores | {"yardsticks": yardsticks}))
    (run_dir / "scores.json").write_text(json.dumps(scores | {"yardsticks": yardsticks} | changes))
    return verify(run_dir / "certificate.json")


def test_scores_that_were_edited_are_found(run_dir):
    assert with_scores(run_dir).exit_code == 0
    for changes, reason in (
        ({"summary": {"hss_mean": 0.99}}, "scores.json says hss_mean 0.99, the certificate 0.82"),
        ({"summary": {}}, "scores.json says hss_mean None, the certificate 0.82"),
        ({"scenes": 64}, "scores.json says scenes 64, the certificate 2"),
        (
            {"yardsticks": {"label_clusters": {"hss_mean": 0.1}}},
            "says label_clusters hss_mean 0.1, the certificate 0.75",
        ),
        ({"summary": None}, "scores.json cannot be compared with its scores: TypeError"),
    ):
        verdict = with_scores(run_dir, **changes)
        assert verdict.exit_code == 1 and reason in verdict.sentence, verdict


def test_what_was_not_looked_at_is_said(run_dir):
    verdict = with_scores(run_dir, checkpoint={"file": "stage3.pt"}, summary={"hss_mean": 0.99})
    assert verdict.exit_code == 0
    assert "note: scores.json is of another evaluation than the certificate's, and was not compared" in verdict.lines
    assert "note: metrics.jsonl was not looked at" in verdict.lines


def test_exchanged_rows_are_found(finished, monkeypatch):
    real = train.replay.stage_data

    def exchanged(recipe, number, **options):
        data = real(recipe, number, **options)
        rows = data.train.rows
        order = torch.arange(len(rows))
        order[[0, 1]] = order[[1, 0]]
        ids = (data.train.order_ids[1], data.train.order_ids[0], *data.train.order_ids[2:])
        other = dataclasses.replace(data.train, rows=rows.rows(order), order_ids=ids, digest="f" * 64)
        return dataclasses.replace(data, train=other)

    monkeypatch.setattr(train.replay, "stage_data", exchanged)
    verdict = verify(finished / "certificate.json")
    assert verdict.exit_code == 1
    assert f"rows of stage 1, {tiny_recipe().stages[0].data}: their train_digest is ffff" in verdict.sentence


def test_rows_that_cannot_be_had_cannot_be_checked(finished, monkeypatch):
    def gone(_recipe, _number, **_options):
        raise ValueError("no network")

    monkeypatch.setattr(train.replay, "stage_data", gone)
    verdict = verify(finished / "certificate.json")
    assert verdict.exit_code == 2
    assert "the rows of roofs:easy?points=64&scenes=32 cannot be read: no network" in verdict.sentence


def test_another_processor_or_torch_cannot_be_checked(finished, monkeypatch):
    monkeypatch.setattr(determinism, "fingerprint", lambda _device: "GenuineIntel family 6, torch 2.12.0")
    verdict = verify(finished / "certificate.json")
    assert verdict.exit_code == 2
    assert "fingerprint" in verdict.sentence
    assert "here GenuineIntel family 6, torch 2.12.0: other bits are to be expected" in verdict.sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpus_certificate_cannot_be_checked_without_one(run_dir):
    edit(run_dir / "certificate.json", lambda c: c["environment"].update(device="cuda", precision="bf16"))
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 2
    assert "no CUDA device" in verdict.sentence


def test_another_thread_count_is_named(run_dir):
    edit(run_dir / "certificate.json", lambda c: c["environment"].update(threads="2"))
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 2
    assert "it was computed with threads 2, here 1" in verdict.sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_other_kernels_are_found_down_to_the_term_of_the_loss(run_dir):
    edit(run_dir / "certificate.json", lambda c: c["environment"].update(impl="triton"))
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1
    assert "step 1, transport: computed" in verdict.sentence


def test_a_recipe_of_another_thread_count_contradicts_the_states(run_dir):
    edit(run_dir / "certificate.json", lambda c: c["recipe"].update(threads=2))
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 1
    assert "contradicts itself: stage 1 was computed from another recipe" in verdict.sentence


def test_other_code_is_said(finished, tmp_path):
    shutil.copy(finished / "certificate.json", tmp_path)

    def other_code(certificate):
        certificate["code"]["files"]["train/step.py"] = "0"
        certificate["code"]["digest"] = value_digest(certificate["code"]["files"])
        for stage in certificate["stages"]:
            stage["parents"]["code"] = certificate["code"]["digest"]

    edit(tmp_path / "certificate.json", other_code)
    note = verify(tmp_path / "certificate.json").lines[0]
    assert note.startswith("note: the code here is not the certificate's (") and "train/step.py" in note


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: c.pop("environment"), "no 'environment'|KeyError 'environment'"),
        (lambda c: c["stages"][1].pop("tail"), "a stage has no 'tail'|KeyError 'tail'"),
        (lambda c: c.update(kernels=None), "kernels must be an object, got None"),
        (lambda c: c["first"].append(3), "TypeError"),
        (lambda c: c["start"].update({"from": "a.pt"}), "where it started from must be an object, got 'a.pt'"),
        (lambda c: c["data"][0].pop("dev_digest"), "a line of its data has no 'dev_digest'"),
    ],
)
def test_a_certificate_that_is_not_whole_cannot_be_checked_and_why_is_said(run_dir, spoil, reason):
    edit(run_dir / "certificate.json", spoil)
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 2
    assert re.search(f"is not a certificate: .*{reason}", verdict.sentence), verdict.sentence


def test_what_is_no_certificate_cannot_be_checked(tmp_path):
    (tmp_path / "certificate.json").write_text("[]")
    assert verify(tmp_path / "certificate.json").exit_code == 2
    assert verify(tmp_path / "nothing.json").exit_code == 2


def test_a_directory_stands_for_the_certificate_in_it(finished, tmp_path):
    assert verify(finished).sentence == f"yes, {finished / 'certificate.json'} holds"
    assert verify(tmp_path).exit_code == 2


def test_weights_of_a_file_at_the_start_cannot_be_had(run_dir):
    edit(run_dir / "certificate.json", lambda c: c["start"].update({"from": {"file": "published.pt"}}))
    verdict = verify(run_dir / "certificate.json")
    assert verdict.exit_code == 2
    assert "the run began with the weights of published.pt" in verdict.sentence
    assert len(checked(verdict)) == 3


def test_a_run_that_is_not_finished_is_said_to_be_so(tmp_path):
    verdict = verify(tmp_path)
    assert verdict.agrees is None
    assert verdict.sentence.endswith("certificate.json is not there: a run writes it when it is finished")
