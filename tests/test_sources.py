import builtins
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver.scene import RowError, encode_scene
from tests.random_scenes import random_scene, random_scenes
from train.sources import Rows, SourceError, SourceUri, open_rows, write_npz, write_parquet

ROOT = Path(__file__).parent.parent
HUB = "hf://usm3d/s23dr-2026-sampled_2048_v2:train"


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, if it is there; it keeps its copies below the test's own directory."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def read_all(uri: str | SourceUri) -> list:
    source = open_rows(uri)
    return [source.scene(i, True) for i in range(len(source))]


def same_rows(scenes, others) -> bool:
    return [(s.order_id, encode_scene(s)) for s in scenes] == [(s.order_id, encode_scene(s)) for s in others]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HUB, SourceUri(kind="hf", place="usm3d/s23dr-2026-sampled_2048_v2:train")),
        (HUB + "?dev=64#dev", SourceUri(kind="hf", place="usm3d/s23dr-2026-sampled_2048_v2:train", dev=64, part="dev")),
        ("parquet:data/x y", SourceUri(kind="parquet", place="data/x y")),
        ("npz:/data#all", SourceUri(kind="npz", place="/data", part="all")),
        ("roofs:easy", SourceUri(kind="roofs", place="easy", dev=64)),
        (
            "roofs:real?seed=7&points=2048&scenes=10#train",
            SourceUri(kind="roofs", place="real", dev=64, seed=7, points=2048, scenes=10, part="train"),
        ),
    ],
)
def test_uri_is_read_and_written_back(text, expected):
    assert SourceUri.parse(text) == expected
    assert SourceUri.parse(str(expected)) == expected
    assert SourceUri.parse(expected) is expected


def test_canonical_uri_leaves_out_defaults():
    assert str(SourceUri.parse("roofs:easy?seed=0&points=256#train")) == "roofs:easy?points=256#train"
    assert str(SourceUri.parse("npz:x?dev=1024")) == "npz:x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must start with one of hf, parquet, npz, roofs"),
        ("data/train", "must start with one of"),
        ("csv:data", "must start with one of"),
        ("hf:org/name:train", "must look like hf://org/name:split"),
        ("hf://org/name", "must look like hf://org/name:split"),
        ("hf://name:train", "must look like hf://org/name:split"),
        ("npz:", "must look like npz:DIR"),
        ("roofs", "must look like roofs:easy or roofs:real"),
        ("roofs:hard", "must look like roofs:easy or roofs:real"),
        ("roofs:easy?", "unknown key ''"),
        ("roofs:easy?size=3", "unknown key 'size', must be one of points, scenes, seed"),
        ("roofs:easy?dev=3", "unknown key 'dev'"),
        ("npz:x?points=3", "unknown key 'points', must be one of dev"),
        ("roofs:easy?seed=1&seed=1", "'seed' is given twice"),
        ("roofs:easy?points=0", "points must be a whole number, at least 1, got '0'"),
        ("roofs:easy?seed=-1", "seed must be a whole number, at least 0, got '-1'"),
        ("npz:x?dev=1.5", "dev must be a whole number"),
        ("npz:x?dev", "dev must be a whole number, at least 1, got ''"),
        ("npz:x#", "after '#' must come one of train, dev, all"),
        ("npz:x#validation", "after '#' must come one of train, dev, all"),
    ],
)
def test_wrong_uri_is_explained_and_the_grammar_shown(text, reason):
    with pytest.raises(SourceError) as error:
        SourceUri.parse(text)
    message = str(error.value)
    assert message.startswith(f"data source {text!r}: ")
    assert reason in message
    assert "Grammar: SOURCE[?key=value&...][#train|dev|all]" in message


def test_every_kind_gives_the_rows_that_were_written(tmp_path, monkeypatch, datasets):
    scenes = [*random_scenes(7), random_scene("row-99999", optional=False)]
    write_parquet(scenes, tmp_path / "parquet", rows_per_file=3)
    write_npz(reversed(scenes), tmp_path / "npz")
    assert same_rows(read_all(f"parquet:{tmp_path}/parquet"), scenes)
    assert same_rows(read_all(f"npz:{tmp_path}/npz"), scenes)

    files = [str(file) for file in sorted((tmp_path / "parquet").iterdir())]
    asked, load_dataset = [], datasets.load_dataset

    def hub(name, *, split, keep_in_memory):
        asked.append((name, split))
        return load_dataset("parquet", data_files=files, split="train")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert same_rows(read_all("hf://org/name:validation"), scenes)
    assert asked == [("org/name", "validation")]


def test_parquet_has_the_schema_of_the_hub(tmp_path, datasets):
    import pyarrow as pa
    import pyarrow.parquet

    write_parquet(random_scenes(5), tmp_path / "set", rows_per_file=2)
    files = sorted((tmp_path / "set").iterdir())
    assert [file.name for file in files] == ["rows-00000.parquet", "rows-00001.parquet", "rows-00002.parquet"]
    for file in files:
        table = pa.parquet.read_table(file)
        assert table.schema == pa.schema([("order_id", pa.string()), ("data", pa.binary())])
    assert [len(pa.parquet.read_table(file)) for file in files] == [2, 2, 1]


def test_parquet_rows_keep_the_order_of_the_files_names(tmp_path, datasets):
    for name, start in (("b", 0), ("a", 10)):
        write_parquet(random_scenes(2, start=start), tmp_path / name)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / name / "rows-00000.parquet").rename(tmp_path / "set" / f"{name}.parquet")
    assert open_rows(f"parquet:{tmp_path}/set").order_ids == ["row-00010", "row-00011", "row-00000", "row-00001"]


def test_npz_rows_are_sorted_by_stem(tmp_path):
    for name in ("b", "a-1", "a"):
        (tmp_path / f"{name}.npz").write_bytes(encode_scene(random_scene(name)))
    assert open_rows(f"npz:{tmp_path}").order_ids == ["a", "a-1", "b"]


def test_generated_roofs_end_with_dev_scenes_of_the_next_seed():
    source, following = open_rows("roofs:easy?scenes=3&points=128&seed=5"), open_rows("roofs:easy?points=128&seed=6")
    assert len(source) == 3 + 64
    assert source.span("dev") == range(3, 67)
    for i in (0, 63):
        assert same_rows([source.scene(3 + i, True)], [following.scene(i, True)])
    assert not same_rows([source.scene(0, True)], [following.scene(0, True)])


def test_names_of_generated_roofs_are_known_before_they_are_generated():
    source = open_rows("roofs:easy?scenes=2&points=128&seed=5")
    for i in (0, 1, 2, 65):
        assert source.scene(i, True).order_id == source.order_ids[i]


def test_parts_are_the_rows_before_the_last_and_the_last():
    rows = Rows(uri=SourceUri.parse("npz:x?dev=3"), order_ids=list("abcdefgh"), task=lambda i, truth: None, made_of=str)
    assert rows.span("train") == range(5)
    assert rows.span("dev") == range(5, 8)
    assert rows.span("all") == rows.span(None) == range(8)


@pytest.mark.parametrize("part", ["train", "dev"])
def test_set_no_larger_than_its_dev_part_is_refused(part):
    rows = Rows(uri=SourceUri.parse("npz:x?dev=3"), order_ids=list("abc"), task=lambda i, truth: None, made_of=str)
    with pytest.raises(SourceError, match=r"npz:x\?dev=3: has 3 rows, no more than its dev part of 3"):
        rows.span(part)
    assert rows.span("all") == range(3)


def test_all_rows_are_advised_only_where_they_can_be_taken():
    uri = SourceUri.parse("npz:x")
    one = {"order_ids": ["a"], "task": lambda i, truth: None, "made_of": str}
    with pytest.raises(
        SourceError, match=r"has 1 row, no more than its dev part of 1024; .*\(\?dev=\.\.\.\) or take all rows \(#all;"
    ):
        Rows(uri=uri.with_part("dev"), **one).span("dev")
    # a stage, which does not take #all
    with pytest.raises(SourceError, match=r"choose a smaller one \(\?dev=\.\.\.\)$"):
        Rows(uri=uri, **one).span("dev")


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_missing_directory_is_named(kind, tmp_path):
    with pytest.raises(SourceError, match=f"{kind}:.*there is no directory .*nowhere"):
        open_rows(f"{kind}:{tmp_path}/nowhere")


def test_directory_without_rows_is_refused(tmp_path):
    with pytest.raises(SourceError, match="has no rows"):
        open_rows(f"npz:{tmp_path}")
    with pytest.raises(SourceError, match=r"has no \*.parquet files"):
        open_rows(f"parquet:{tmp_path}")


def test_directory_that_mixes_splits_is_refused(tmp_path):
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(SourceError, match="mixes the splits train, validation"):
        open_rows(f"parquet:{tmp_path}")


def test_files_that_do_not_fit_are_one_clear_line(tmp_path, capfd, caplog, monkeypatch, datasets):
    import pyarrow as pa
    import pyarrow.parquet

    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(SourceError, match=r"cannot read the set .*Are they whole") as error:
        open_rows(f"parquet:{tmp_path}")
    assert "\n" not in str(error.value)

    for name, column in (("a", "data"), ("b", "text")):
        pa.parquet.write_table(pa.table({"order_id": ["a"], column: [b""]}), tmp_path / f"{name}.parquet")
    with pytest.raises(SourceError, match="column names don't match") as error:
        open_rows(f"parquet:{tmp_path}")
    assert "\n" not in str(error.value)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_other_columns_are_refused(tmp_path, datasets):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"order_id": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"needs the columns order_id: string and data: binary, has .*text"):
        open_rows(f"parquet:{tmp_path}")


def test_null_in_a_table_is_an_undecodable_row(tmp_path, datasets):
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("order_id", pa.string()), ("data", pa.binary())])
    table = pa.table({"order_id": ["a", None], "data": [None, b""]}, schema=schema)
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_rows(f"parquet:{tmp_path}")
    with pytest.raises(RowError, match="row 'a': field 'data' is missing"):
        source.scene(0, True)
    with pytest.raises(RowError, match="row 'number 1': field 'order_id' is missing"):
        source.scene(1, True)


def test_file_that_cannot_be_read_is_an_undecodable_row(tmp_path):
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(RowError, match="row 'a': field 'data' cannot be read"):
        open_rows(f"npz:{tmp_path}").scene(0, True)


@pytest.mark.parametrize("kind", ["offline", "unknown"])
def test_hub_that_does_not_answer_gives_advice(kind, monkeypatch, datasets):
    # what datasets 5 raises without a network, and for a set that is gated or does not exist
    raised = {
        "offline": ConnectionError("Couldn't reach 'usm3d/x' on the Hub (LocalEntryNotFoundError)"),
        "unknown": datasets.exceptions.DatasetNotFoundError("Dataset 'usm3d/x' doesn't exist on the Hub"),
    }[kind]

    def load_dataset(name, *, split, keep_in_memory):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError) as error:
        open_rows(HUB)
    message = str(error.value)
    assert message.startswith(f"{HUB}: cannot read the set ({type(raised).__name__}: ")
    for advice in ("accept its terms", "log in", "parquet:DIR"):
        assert advice in message


def test_hub_in_offline_mode_gives_advice(monkeypatch, datasets):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"cannot read the set \(ConnectionError: .*parquet:DIR"):
        open_rows(HUB)


def test_without_datasets_only_hub_and_parquet_are_refused(tmp_path, monkeypatch):
    write_npz(random_scenes(2), tmp_path / "npz")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "a.parquet").touch()
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for uri in (HUB, f"parquet:{tmp_path}/parquet"):
        with pytest.raises(SourceError, match="needs the package datasets, which is not installed: pip install"):
            open_rows(uri)
    assert len(open_rows(f"npz:{tmp_path}/npz")) == 2


def test_nothing_but_torch_and_numpy_is_imported_before_it_is_needed():
    modules = "datasets", "pyarrow", "pandas", "scipy"
    code = f"import sys, train.data, train.order; print([name for name in {modules} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_reading_prints_nothing_and_leaves_bars_and_log_as_they_were(tmp_path, capfd, datasets):
    def state() -> tuple:
        return datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()

    write_parquet(random_scenes(2), tmp_path / "set")
    before = state()
    open_rows(f"parquet:{tmp_path}/set")
    assert state() == before == (False, datasets.logging.WARNING)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [write_parquet, write_npz])
def test_writing_into_a_filled_directory_is_refused(write, tmp_path, datasets):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SourceError, match="is not an empty directory; nothing was written"):
        write(random_scenes(2), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("write", [write_parquet, write_npz])
def test_interrupted_writing_leaves_nothing(write, tmp_path, datasets):
    def failing():
        yield from random_scenes(2000 if write is write_parquet else 2, points=4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(failing(), tmp_path / "set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_parquet, write_npz])
def test_writing_no_rows_is_refused(write, tmp_path, datasets):
    with pytest.raises(SourceError, match="there are no rows to write"):
        write([], tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_rows_per_file_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="rows_per_file must be at least 1, got 0"):
        write_parquet(random_scenes(2), tmp_path / "set", rows_per_file=0)


@pytest.mark.parametrize("names", [["a/b"], ["a", "a"]])
def test_order_id_that_cannot_name_a_file_is_refused(names, tmp_path):
    with pytest.raises(SourceError, match="cannot name a file, or comes twice"):
        write_npz([random_scene(name) for name in names], tmp_path / "set")
