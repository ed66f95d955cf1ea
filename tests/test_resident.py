"""Kept rows are the rows that were made, or they are made anew; where they lie is no part of the bits."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.data
import train.resident
from perceiver.scene import RowError, encode_scene, stack_scenes
from tests.random_scenes import random_scene, random_scenes
from tests.tiny_runs import final_state, tiny_recipe, train_quietly
from train.batches import StageBatches, stage_data
from train.data import RowSet, load_stage_data
from train.resident import cache_directory, keep_rows, to_device
from train.sources import GENERATOR, digest_sources, write_npz, write_parquet

ROOT = Path(__file__).resolve().parent.parent
ROOFS = "roofs:easy?points=32&scenes=40"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def uri(tmp_path) -> str:
    """Ten rows in files, the last three of them dev."""
    write_npz(random_scenes(10), tmp_path / "set")
    return f"npz:{tmp_path}/set?dev=3"


@pytest.fixture
def made(uri) -> RowSet:
    """The train rows in memory, without a cache."""
    return load_stage_data(uri).train


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many rows each load decoded; dev rows, three or 64 of them, are decoded by every one."""
    counts: list[int] = []
    real = train.data.decode

    def counted(tasks, count):
        if count not in (3, 64):
            counts.append(count)
        return real(tasks, count)

    monkeypatch.setattr(train.data, "decode", counted)
    return counts


def train_part(uri: str, **options) -> RowSet:
    return load_stage_data(uri, **options).train


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def assert_same(a: RowSet, b: RowSet) -> None:
    for name, rows in vars(a.rows).items():
        other = getattr(b.rows, name)
        assert torch.equal(rows, other) and rows.dtype == other.dtype, name
    assert (a.order_ids, a.digest, a.uri) == (b.order_ids, b.digest, b.uri)


def test_the_second_start_decodes_nothing_and_has_the_same_rows_and_digests(made, uri, cache, decoded):
    kept, read = train_part(uri), train_part(uri)
    assert decoded == [7]
    assert_same(kept, made)
    assert_same(read, made)
    assert [path.name for path in cache.iterdir() if path.suffix == ".partial"] == []


def test_kept_rows_are_mapped_and_what_is_done_to_them_stays_in_the_process(uri, cache, decoded):
    for _ in range(2):
        rows = train_part(uri).rows
        mapped = Path("/proc/self/maps").read_text()
        assert all(f"{entries(cache)[0]}/{name}.npy" in mapped for name in vars(rows))
        rows.xyz_BT3.zero_()
        rows.class_id_BT.zero_()
    assert train_part(uri).rows.xyz_BT3.any()
    assert decoded == [7]


def test_a_chunk_at_a_time_is_in_memory_while_rows_are_made(uri, cache, monkeypatch):
    monkeypatch.setattr(train.data, "_CHUNK", 3)
    appended = []
    real = train.resident._OnDisk.append

    def append(self, batch):
        appended.append(len(batch))
        real(self, batch)

    monkeypatch.setattr(train.resident._OnDisk, "append", append)
    first = train_part(uri)
    assert appended == [3, 3, 1]
    assert_same(train_part(uri), first)


@pytest.mark.parametrize("seed", range(2))
def test_one_flipped_bit_anywhere_is_noticed_and_the_rows_are_made_anew(made, uri, cache, decoded, caplog, seed):
    train_part(uri)
    rng = random.Random(seed)
    for number, file in enumerate(sorted(entries(cache)[0].iterdir()), start=1):
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        caplog.clear()
        assert_same(train_part(uri), made)
        assert f"{uri}#train: its rows in {entries(cache)[0]} are damaged" in caplog.text
        assert len(decoded) == 1 + number
    assert_same(train_part(uri), made)
    assert len(decoded) == 1 + len(vars(made.rows)) + 1


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "empty", "no list", "other list", "file for directory"])
def test_half_an_entry_is_noticed_and_made_anew(made, uri, cache, decoded, caplog, damage):
    train_part(uri)
    (entry,) = entries(cache)
    file = entry / "xyz_BT3.npy"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    elif damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "no list":
        (entry / "set.json").unlink()
    elif damage == "other list":
        (entry / "set.json").write_text("[]")
    else:
        file.unlink()
        file.mkdir()
    assert_same(train_part(uri), made)
    assert "damaged" in caplog.text and len(decoded) == 2
    assert_same(train_part(uri), made)
    assert len(decoded) == 2


def test_an_entry_of_other_rows_under_this_name_is_noticed(made, uri, cache, tmp_path, caplog):
    listed = tmp_path / "bad.txt"
    listed.write_text("row-00002")
    train_part(uri)
    (mine,) = entries(cache)
    train_part(uri, bad_samples=listed)
    (other,) = set(entries(cache)) - {mine}
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    assert_same(train_part(uri), made)
    assert "set.json is not what was written" in caplog.text


def test_what_a_killed_process_left_is_in_nobodys_way(made, uri, cache):
    train_part(uri)
    (entry,) = entries(cache)
    killed = cache / f"{entry.name[:-17]}.partial"
    entry.rename(killed)
    (killed / "set.json").unlink()
    assert_same(train_part(uri), made)
    assert entries(cache) == [entry]


def test_rows_that_cannot_be_stacked_leave_nothing(cache, tmp_path):
    write_npz([*random_scenes(3), random_scene("row-00003", points=25), *random_scenes(9, start=4)], tmp_path / "set")
    with pytest.raises(RowError, match="must have 24 points as the rows before, has 25"):
        load_stage_data(f"npz:{tmp_path}/set?dev=3")
    assert entries(cache) == []


def test_other_rows_have_another_key(uri, cache, decoded, tmp_path):
    listed = tmp_path / "bad.txt"
    digests = {train_part(u).digest for u in (ROOFS, ROOFS + "&seed=1", "roofs:real?points=32&scenes=40", uri)}
    for name in ("row-00002", "row-00003"):
        listed.write_text(name)
        digests |= {train_part(uri, bad_samples=listed).digest}
    assert decoded == [40, 40, 40, 7, 6, 6] and len(digests) == 6


def test_a_file_changed_behind_its_size_and_its_time_is_read_again(made, uri, cache, tmp_path):
    train_part(uri)
    file = tmp_path / "set" / "row-00001.npz"
    before = file.stat()
    changed = encode_scene(random_scene("row-00001", class_id=made.rows.class_id_BT[0].numpy()))
    assert len(changed) == before.st_size
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert train_part(uri).digest != made.digest


def test_rows_are_made_anew_after_the_code_that_makes_them_changed(uri, cache, decoded, monkeypatch):
    train_part(uri)
    real = train.data.digest_sources
    monkeypatch.setattr(train.data, "digest_sources", lambda *modules: real(*modules) + "edited")
    train_part(uri)
    assert decoded == [7, 7]


def test_the_sources_that_generated_rows_depend_on_are_all_named():
    found, pending = set(), {"train.roofs"}
    while pending:
        found |= pending
        texts = [(ROOT / f"{name.replace('.', '/')}.py").read_text() for name in pending]
        pending = {name for text in texts for name in re.findall(r"^from ([a-z]+\.\w+) import", text, re.M)} - found
        pending = {name for name in pending if name.startswith(("train.", "perceiver.", "kernels."))}
    kernels = ("dispatch", "gather", "philox", "philox_tile", "philox_triton", "registration")
    others = {"perceiver.scene", *(f"kernels.{name}" for name in kernels)}
    assert found == {*GENERATOR, *others}
    assert others <= set(train.data._CODE)


def test_the_digest_of_sources_changes_with_each_of_them(tmp_path, monkeypatch):
    for name in ("first_source", "second_source"):
        (tmp_path / f"{name}.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = [digest_sources("first_source", "second_source"), digest_sources("first_source")]
    (tmp_path / "second_source.py").write_text("a = 2\n")
    digests.append(digest_sources("first_source", "second_source"))
    assert len(set(digests)) == 3


@pytest.mark.parametrize("write", [write_npz, write_parquet])
def test_files_that_were_written_again_are_read_again(cache, decoded, tmp_path, monkeypatch, write):
    if write is write_parquet:
        package = pytest.importorskip("datasets")
        monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    kind = write.__name__.removeprefix("write_")
    uri = f"{kind}:{tmp_path}/set?dev=3"
    write(random_scenes(10), tmp_path / "set")
    first = train_part(uri)
    assert_same(train_part(uri), first)
    shutil.rmtree(tmp_path / "set")
    write(random_scenes(10, start=1), tmp_path / "set")
    assert train_part(uri).digest == train.data.digest_scenes(random_scenes(7, start=1))
    assert decoded == [7, 7]


def test_undecodable_rows_are_named_by_every_start_and_stop_a_strict_one(uri, cache, decoded, tmp_path, caplog):
    (tmp_path / "set" / "row-00002.npz").write_bytes(b"damaged")
    for _ in range(2):
        caplog.clear()
        stage = load_stage_data(uri)
        assert (stage.counts.undecodable, stage.counts.trained_on) == (1, 6)
        assert "row 'row-00002': field 'data' is not a readable .npz" in caplog.text
        expected = stack_scenes(random_scenes(2) + random_scenes(4, start=3))
        assert all(torch.equal(rows, getattr(expected, name)) for name, rows in vars(stage.train.rows).items())
    with pytest.raises(RowError, match="row 'row-00002': field 'data' is not a readable"):
        load_stage_data(uri, strict=True)
    assert decoded == [7]


@pytest.mark.parametrize("refusal", ["file in its place", "disk full", "disk full at the end"])
def test_a_disk_that_refuses_is_said_and_the_rows_stay_in_memory(made, uri, cache, caplog, monkeypatch, refusal):
    if refusal == "file in its place":
        cache.write_text("mine")
    else:
        name = "_write" if refusal == "disk full" else "finish"

        def full(*_args):
            with train.resident._disk():
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(train.resident._OnDisk, name, full)
    assert_same(train_part(uri), made)
    assert f"{uri}#train: its rows cannot be kept in {cache}" in caplog.text
    assert "RIDGELINE_CACHE=DIR names another directory, RIDGELINE_CACHE=off none" in caplog.text
    assert cache.read_text() == "mine" if refusal == "file in its place" else entries(cache) == []


def test_where_rows_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("RIDGELINE_CACHE", "off")
    assert cache_directory() is None
    monkeypatch.delenv("RIDGELINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "ridgeline"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "ridgeline"
    monkeypatch.setenv("RIDGELINE_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"


def test_a_user_without_a_home_keeps_no_rows(monkeypatch, caplog):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for variable in ("RIDGELINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_directory() is None and "RIDGELINE_CACHE=DIR names a place for them" in caplog.text


def test_the_newest_entries_of_a_set_are_kept(cache):
    def kept(version: str, name: str = "set"):
        def fill(columns):
            columns.append(stack_scenes(random_scenes(1)))
            return {"version": version}

        return keep_rows(name, version, 1, fill)[1]["version"]

    for version in "abc":
        assert kept(version) == version
    kept("x", name="other set")
    kept("a")
    kept("d")
    assert len(entries(cache)) == 4
    found = {json.loads((e / "set.json").read_text())["contents"]["facts"]["version"] for e in entries(cache)}
    assert found == {"x", "c", "a", "d"}


TWO = """
import logging, sys, time
import train.data
real = train.data.decode
def slow(tasks, count):
    if count == 7:
        print("decodes", flush=True)
        time.sleep(1)
    return real(tasks, count)
train.data.decode = slow
print(train.data.load_stage_data(sys.argv[1]).train.digest)
"""


def test_two_processes_at_once_make_the_rows_once(made, uri, cache):
    command = [sys.executable, "-c", TWO, uri]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    lines = [line for out, _ in answers for line in out.split()]
    assert lines.count("decodes") == 1
    assert len(set(lines)) == 2 and lines.count(made.digest) == 2
    assert len(entries(cache)) == 1


def test_loading_shows_progress_where_it_is_asked_for(uri, cache, capfd, terminal):
    for _ in range(2):
        load_stage_data(uri)
    assert capfd.readouterr().err == ""
    load_stage_data(uri, bad_samples=None, progress=True)
    assert f"{uri}#train: checking:   0%" in capfd.readouterr().err
    shutil.rmtree(cache)
    load_stage_data(uri, progress=True)
    shown = capfd.readouterr().err
    assert all(re.search(rf"{re.escape(uri)}: +0%.* 0/{rows} ", shown) for rows in (3, 7))


def test_a_run_on_kept_rows_has_the_bits_of_one_without_a_cache(tmp_path, monkeypatch):
    recipe = tiny_recipe()
    train_quietly(recipe, tmp_path / "made")
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    for number in (1, 2):
        stage_data(recipe, number)
    # what is not kept cannot be had
    monkeypatch.setattr(train.data, "stack_scenes", lambda scenes: stack_scenes(scenes) if len(scenes) == 64 else 0)
    train_quietly(recipe, tmp_path / "read")
    assert final_state(tmp_path / "read") == final_state(tmp_path / "made")
    for log in ("trace.jsonl", "certificate.json"):
        assert (tmp_path / "read" / log).read_bytes() == (tmp_path / "made" / log).read_bytes()


def test_stages_of_one_set_share_its_rows_on_the_device(monkeypatch):
    recipe = tiny_recipe()
    data = stage_data(recipe, 2)
    moved = []
    monkeypatch.setattr(train.data, "to_device", lambda rows, *_args, **_options: moved.append(1) or rows)
    batches = [StageBatches(recipe, number, data, torch.device("cpu")) for number in (2, 3)]
    assert batches[0].rows is batches[1].rows and moved == [1]


def test_rows_that_are_on_the_device_are_not_copied():
    rows = stack_scenes(random_scenes(2))
    assert to_device(rows, torch.device("cpu")) is rows


def test_rows_are_moved_in_parts_and_arrive_as_they_were(device, monkeypatch, capfd, terminal):
    monkeypatch.setattr(train.resident, "_UPLOAD_ROWS", 3)
    rows = stack_scenes(random_scenes(8))
    target = device if device.type == "cuda" else torch.device("meta")
    moved = to_device(rows, target, title="roofs", progress=True)
    assert "roofs:   0%" in capfd.readouterr().err
    for name, column in vars(rows).items():
        found = getattr(moved, name)
        assert (found.device.type, found.dtype, found.shape) == (target.type, column.dtype, column.shape)
        if target.type == "cuda":
            assert torch.equal(found.cpu(), column)
