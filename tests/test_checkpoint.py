"""Checkpoints: exact, and usable after a crash at any moment of a save."""

import dataclasses
import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from train.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointMissing,
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


def test_a_state_has_the_same_bytes_whether_it_was_computed_or_loaded(tmp_path):
    states = {n: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3) * n} for n in range(2)}
    groups = [{"betas": (0.9, 0.95), "params": [n]} for n in range(2)]
    computed = dataclasses.replace(checkpoint(3), optimizer={"state": states, "param_groups": groups})
    save_checkpoint(tmp_path / "computed.pt", computed)
    save_checkpoint(tmp_path / "loaded.pt", load_checkpoint(tmp_path / "computed.pt"))
    assert (tmp_path / "loaded.pt").read_bytes() == (tmp_path / "computed.pt").read_bytes()


def test_the_previous_checkpoint_is_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "c.pt", checkpoint(step))
    assert load_checkpoint(tmp_path / "c.pt").step == 3
    assert load_checkpoint(tmp_path / "c.pt.previous").step == 2


def test_there_may_be_none(tmp_path):
    assert load_newest(tmp_path / "c.pt") is None
    with pytest.raises(CheckpointMissing, match="does not exist"):
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


class PowerCut(Exception):
    """The process is gone: no handler of an OSError runs."""


def save_cut_short(path, step, call, error):
    """Save, and fail at the `call`-th operation on files, a flush leaving half the file; False if there are fewer."""
    calls = 0

    def counted(function, half):
        def inner(*args):
            nonlocal calls
            calls += 1
            if calls == call:
                if half and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                    os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                raise error
            return function(*args)

        return inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace, half=False))
        patch.setattr(os, "fsync", counted(os.fsync, half=True))
        try:
            save_checkpoint(path, checkpoint(step))
        except (PowerCut, OSError):
            return True
    return False


def in_the_old_form(path):
    """Make a checkpoint as it was before its digest stood in it: that of the whole file, beside it."""
    state = load_checkpoint(path)
    torch.save({"format": 1, **state.__dict__}, path)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("old", [False, True], ids=["new files", "old files"])
@pytest.mark.parametrize("first", range(1, 8))
def test_crashes_between_any_operations_on_files_leave_a_usable_checkpoint(tmp_path, first, old):
    """One crash, and a second one in the save after it, which may also be a disk that is full."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for second in range(1, 8):
        for error in (PowerCut(), full):
            path = tmp_path / f"{second}{type(error).__name__}" / "c.pt"
            path.parent.mkdir()
            for step in (1, 2):
                save_checkpoint(path, checkpoint(step))
            if old:
                in_the_old_form(path)
                in_the_old_form(path.with_name("c.pt.previous"))
            crashed = save_cut_short(path, 3, first, PowerCut())
            assert crashed == (first <= (5 if old else 4))
            one = load_newest(path)
            assert one and one[0].step in (2, 3) and (one[1] is None)
            save_cut_short(path, 4, second, error)
            two = load_newest(path)
            assert two and two[0].step in (one[0].step, 4) and (two[1] is None)
            save_checkpoint(path, checkpoint(5))
            assert load_newest(path)[0].step == 5
            assert load_checkpoint(path.with_name("c.pt.previous")).step == two[0].step


def test_a_reader_moves_no_file_that_a_save_is_about_to_move(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(1))
    path.rename(tmp_path / "c.pt.new")
    assert load_newest(path)[0].step == 1
    assert [x.name for x in tmp_path.iterdir()] == ["c.pt.new"]


def a_save_goes_on(monkeypatch, renames, *, after=False):
    """Let a save rename files before, or after, a reader reads the first of them."""
    read = Path.read_bytes

    def interrupted(path):
        data = read(path) if after and path == renames[0][0] else None
        for source, target in renames if path == renames[0][0] and path.exists() else ():
            source.rename(target)
        return read(path) if data is None else data

    monkeypatch.setattr(Path, "read_bytes", interrupted)


@pytest.mark.parametrize("steps", [(2,), (1, 2)], ids=["first save", "later save"])
def test_a_save_that_ends_under_a_reader_gives_it_the_new_state(tmp_path, monkeypatch, steps):
    path, new = tmp_path / "c.pt", tmp_path / "c.pt.new"
    for step in steps:
        save_checkpoint(path, checkpoint(step))
    path.rename(new)
    a_save_goes_on(monkeypatch, [(new, path)])
    checkpoint_read, damage = load_newest(path)
    assert (checkpoint_read.step, damage) == (2, None)


def test_a_save_that_begins_to_end_under_a_reader_gives_it_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(1))
    a_save_goes_on(monkeypatch, [(path, tmp_path / "c.pt.previous")])
    checkpoint_read, damage = load_newest(path)
    assert (checkpoint_read.step, damage) == (1, None)


def test_a_file_that_a_save_moves_away_is_said_to_be_missing(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(1))
    a_save_goes_on(monkeypatch, [(path, tmp_path / "c.pt.previous")])
    with pytest.raises(CheckpointMissing, match="does not exist"):
        load_checkpoint(path)
    with pytest.raises(CheckpointMissing, match="does not exist"):
        load_checkpoint(tmp_path / "c.pt.previous" / "c.pt")
    with pytest.raises(CheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)


def test_a_first_save_that_was_half_written_when_a_reader_came_is_no_damage(tmp_path, monkeypatch):
    path, new, whole = tmp_path / "c.pt", tmp_path / "c.pt.new", tmp_path / "whole"
    save_checkpoint(whole, checkpoint(1))
    new.write_bytes(b"half")
    a_save_goes_on(monkeypatch, [(new, tmp_path / "gone"), (whole, path)], after=True)
    checkpoint_read, damage = load_newest(path)
    assert (checkpoint_read.step, damage) == (1, None)


def test_a_first_save_that_ends_after_the_look_at_its_name_is_found(tmp_path, monkeypatch):
    path, whole, is_file = tmp_path / "c.pt", tmp_path / "whole", Path.is_file
    save_checkpoint(whole, checkpoint(1))
    (tmp_path / "c.pt.new").write_bytes(b"half")
    looks = []

    def counted(file):
        looks.extend([file] if file == path else [])
        if len(looks) == 2 and whole.exists():
            whole.rename(path)
        return is_file(file)

    monkeypatch.setattr(Path, "is_file", counted)
    checkpoint_read, damage = load_newest(path)
    assert (checkpoint_read.step, damage) == (1, None)


def test_a_checkpoint_with_its_digest_beside_it_is_still_read_and_checked(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(3))
    in_the_old_form(path)
    assert load_checkpoint(path).step == 3
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: its bytes do not have the digest in c\.pt\.sha256"):
        load_checkpoint(path)


def test_a_damaged_digest_beside_a_checkpoint_is_said(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(3))
    in_the_old_form(path)
    path.with_name("c.pt.sha256").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"is damaged: its bytes do not have the digest in c\.pt\.sha256"):
        load_checkpoint(path)
    path.with_name("c.pt.sha256").unlink()
    assert load_checkpoint(path).step == 3


def test_a_damaged_seal_does_not_let_a_damaged_weight_pass(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, checkpoint(3))
    data = path.read_bytes()
    weight = data.index(checkpoint(3).model["w"].numpy().tobytes())
    # length of the comment, its mark, the digest
    for place in range(len(data) - 83, len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[weight] ^= 1
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="is damaged"):
                load_checkpoint(path)


@pytest.mark.parametrize("numbers", [12, 100_000])
def test_a_checkpoint_that_was_cut_anywhere_near_its_end_is_refused(tmp_path, numbers):
    path = tmp_path / "c.pt"
    save_checkpoint(path, dataclasses.replace(checkpoint(3), model={"w": torch.ones(numbers)}))
    data = path.read_bytes()
    for missing in range(1, 101):
        path.write_bytes(data[:-missing])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)


def test_the_digest_leaves_the_file_one_that_torch_reads(tmp_path):
    save_checkpoint(tmp_path / "c.pt", checkpoint(3))
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 3
    assert [x.name for x in tmp_path.iterdir()] == ["c.pt"]


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
    with pytest.raises(CheckpointError, match=r"e\.pt is damaged: by its first bytes it is not a checkpoint$"):
        load_checkpoint(tmp_path / "e.pt")
    (tmp_path / "e.pt").write_text("")
    with pytest.raises(CheckpointError, match=r"is damaged: it is empty$"):
        load_checkpoint(tmp_path / "e.pt")
    torch.save({"format": 1, "model": Path()}, tmp_path / "e.pt")
    with pytest.raises(
        CheckpointError, match=r"e\.pt is not a checkpoint: it holds more than tensors and plain values$"
    ):
        load_checkpoint(tmp_path / "e.pt")
    (tmp_path / "e.pt").write_bytes((tmp_path / "d.pt").read_bytes()[:-30])
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
