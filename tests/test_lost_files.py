"""A finished run that lost a file: what is made again, and what is said where that cannot be."""

import json
import shutil

import pytest

import train.loop
from tests.tiny_runs import tiny_recipe, train_quietly
from train.loop import run
from train.rundir import RunRefused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that keeps states within its stages, too."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    train_quietly(tiny_recipe(keep_every=7), path)
    return path


@pytest.mark.parametrize(
    ("lost", "origins"),
    [
        ("stage3.pt", ["checkpoint.pt, step 20"]),
        ("stage1_tail.pt", ["the initial weights, step 0"]),
        ("stage1.pt stage2_tail.pt", ["step000007.pt, step 7", "stage1.pt, step 8"]),
        ("stage2.pt stage3_tail.pt", ["stage1.pt, step 8", "stage2.pt, step 12"]),
    ],
)
def test_a_finished_run_gets_states_back_that_are_gone_with_every_byte(finished, tmp_path, monkeypatch, lost, origins):
    monkeypatch.setattr(train.loop, "CHECKED_STEPS", 5)
    path, lines = tmp_path / "run", []
    shutil.copytree(finished, path)
    for name in lost.split():
        (path / name).unlink()
    assert not run(tiny_recipe(keep_every=7), path, device="cpu", progress=False, say=lines.append)
    assert lines == [
        f"{path / name} was gone: made again from {origin}" for name, origin in zip(lost.split(), origins, strict=True)
    ]
    for name in lost.split():
        assert (path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_damaged_state_of_a_finished_run_is_made_again_with_every_byte_and_kept_aside(finished, tmp_path):
    path, lines = tmp_path / "run", []
    shutil.copytree(finished, path)
    whole = (path / "stage2.pt").read_bytes()
    damaged = whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    (path / "stage2.pt").write_bytes(damaged)
    (path / "stage3_tail.pt").write_bytes(b"")
    assert not run(tiny_recipe(keep_every=7), path, device="cpu", progress=False, say=lines.append)
    assert lines == [
        f"{path / name} was damaged, and is {name}.previous now: made again from {origin}"
        for name, origin in (("stage2.pt", "stage1.pt, step 8"), ("stage3_tail.pt", "stage2.pt, step 12"))
    ]
    assert (path / "stage2.pt.previous").read_bytes() == damaged
    for name in ("stage2.pt", "stage3_tail.pt"):
        assert (path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_damaged_state_that_cannot_be_made_again_stays_where_it_is(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "CHECKED_STEPS", 0)
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    (path / "stage2.pt").write_bytes(b"half")
    (path / "stage3_tail.pt").unlink()
    with pytest.raises(
        RunRefused, match=r"^stage2\.pt, stage3_tail\.pt of .* are gone or damaged, .* stage2\.pt could not"
    ):
        train_quietly(tiny_recipe(keep_every=7), path)
    assert (path / "stage2.pt").read_bytes() == b"half"


def test_a_finished_run_without_a_state_that_is_too_far_to_make_again_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "CHECKED_STEPS", 5)
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for name in ("stage1.pt", "stage2_tail.pt", "step000007.pt"):
        (path / name).unlink()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(
        RunRefused,
        match=r"^stage1\.pt, stage2_tail\.pt of .* are gone or damaged, and what they would .*: put them back",
    ) as refusal:
        train_quietly(tiny_recipe(keep_every=7), path)
    said = "stage1.pt could not be made again: the nearest state, stage1_tail.pt, is 8 updates before it"
    assert said in str(refusal.value)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_state_whose_updates_are_not_those_of_the_trace_is_not_made_again(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    for name in ("stage1.pt", "stage2_tail.pt"):
        (path / name).unlink()
    lines = (path / "trace.jsonl").read_text().splitlines()
    # the update between the state at 7 and the end of the stage at 8
    place = next(i for i, line in enumerate(lines) if '"kind": "step", "step": 8' in line)
    line = json.loads(lines[place])
    line["grad_norm"] = (2 * float.fromhex(line["grad_norm"])).hex()
    lines[place] = json.dumps(line)
    (path / "trace.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunRefused, match=r"stage1\.pt could not be made again: made with the code here, step 8"):
        train_quietly(tiny_recipe(keep_every=7), path)
    assert not (path / "stage1.pt").exists()


def test_a_finished_run_is_refused_without_a_result(finished, tmp_path):
    recipe, path = tiny_recipe(keep_every=7), tmp_path / "run"
    shutil.copytree(finished, path)
    (path / "certificate.json").unlink()
    with pytest.raises(
        RunRefused, match=r"certificate\.json is gone from a finished run: .* remove checkpoint\.pt and"
    ):
        train_quietly(recipe, path)
    for name in ("checkpoint.pt", "checkpoint.pt.previous"):
        (path / name).unlink()
    assert train_quietly(recipe, path)
    assert (path / "certificate.json").read_bytes() == (finished / "certificate.json").read_bytes()
    (path / "trace.jsonl").unlink()
    with pytest.raises(RunRefused, match=r"trace\.jsonl is gone from a finished run: .* under another --name"):
        train_quietly(recipe, path)
