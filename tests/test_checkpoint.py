"""Checkpoints: exact, and usable after a crash at any moment of a save."""

import errno
import os

import pytest
import torch

from train.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    tensors_digest,
    write_atomically,
)


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(3, 4, generator=generator), "h": torch.randn(2, generator=generator).bfloat16()}
    optimizer = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(3)}}, "param_groups": []}
    return Checkpoint(step=step, model=weights, optimizer=optimizer, recipe={"name": "x"}, machine={"impl": "eager"})


def test_a_checkpoint_comes_back_exactly(tmp_path):
    save_checkpoint(tmp_path / "c.pt", checkpoint(3))
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded.step == 3
    assert tensors_digest(loaded.model) == tensors_digest(checkpoint(3).model)
    assert loaded.optimizer["state"][0]["step"] == 3
    assert (loaded.recipe, loaded.machine) == ({"name": "x"}, {"impl": "eager"})


def test_the_previous_checkpoint_is_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "c.pt", checkpoint(step))
    assert load_checkpoint(tmp_path / "c.pt").step == 3
    assert load_checkpoint(tmp_path / "c.pt.previous").step == 2


def test_there_may_be_none(tmp_path):
    assert load_newest(tmp_path / "c.pt") is None
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_recognised_and_the_previous_one_used(tmp_path, damage):
    path = tmp_path / "c.pt"
    for step in (1, 2):
        save_checkpoint(path, checkpoint(step))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-7], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)
    found = load_newest(path)
    assert found
    assert found[0].step == 1
    assert "c.pt is damaged" in found[1]


def test_nothing_usable_is_an_error(tmp_path):
    save_checkpoint(tmp_path / "c.pt", checkpoint(1))
    (tmp_path / "c.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_newest(tmp_path / "c.pt")


@pytest.mark.parametrize("call", range(1, 8))
def test_a_crash_between_any_two_file_operations_leaves_a_usable_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "c.pt"
    for step in (1, 2):
        save_checkpoint(path, checkpoint(step))
    calls = 0

    class PowerCut(Exception):
        pass

    def counted(function):
        def inner(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise PowerCut
            return function(*args, **kwargs)

        return inner

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    try:
        save_checkpoint(path, checkpoint(3))
        crashed = False
    except PowerCut:
        crashed = True
    monkeypatch.undo()
    assert crashed == (call <= 7)
    found = load_newest(path)
    assert found
    assert found[0].step in (2, 3)
    save_checkpoint(path, checkpoint(4))
    assert load_newest(path)[0].step == 4


def test_a_half_written_first_checkpoint_counts_as_none(tmp_path):
    (tmp_path / "c.pt.new").write_bytes(b"half")
    assert load_newest(tmp_path / "c.pt") is None


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(1))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, checkpoint(2))
    monkeypatch.undo()
    assert load_newest(path)[0].step == 1
    assert not list(tmp_path.glob("*.new"))


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({"format": 99}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="another format"):
        load_checkpoint(tmp_path / "c.pt")
    torch.save({"weights": 1}, tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this program"):
        load_checkpoint(tmp_path / "d.pt")
    (tmp_path / "e.pt").write_text("not a zip")
    with pytest.raises(CheckpointError, match=r"cannot be read \(\w+: "):
        load_checkpoint(tmp_path / "e.pt")
    torch.save({"format": 1, "step": 3}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="must hold machine, model, optimizer, recipe, step"):
        load_checkpoint(tmp_path / "f.pt")


def test_digest_sees_names_types_shapes_and_bits():
    base = {"w": torch.arange(6.0)}
    others = [
        {"v": torch.arange(6.0)},
        {"w": torch.arange(6.0).double()},
        {"w": torch.arange(6.0).reshape(2, 3)},
        {"w": torch.arange(6.0).flip(0)},
        {"w": torch.tensor([-0.0, 1, 2, 3, 4, 5])},
    ]
    digests = {tensors_digest(x) for x in [base, *others]}
    assert len(digests) == 6
    assert tensors_digest({"w": torch.arange(12.0)[::2] / 2}) == tensors_digest(base)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
