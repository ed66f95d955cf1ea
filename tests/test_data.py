import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver.scene import RowError, encode_scene, stack_scenes
from tests.random_scenes import random_scene, random_scenes
from train import data
from train.data import digest_scenes, load_scenes, load_stage_data, read_bad_samples
from train.sources import SourceError, SourceUri, write_npz, write_parquet

SHIPPED = Path(__file__).parent.parent / "configs" / "bad_samples.txt"


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, if it is there; it keeps its copies below the test's own directory."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


@pytest.fixture
def small(tmp_path) -> str:
    """Ten rows, the last three of them dev."""
    write_npz(random_scenes(10), tmp_path / "small")
    return f"npz:{tmp_path}/small?dev=3"


def damage(uri: str, order_id: str, **changes) -> None:
    file = Path(SourceUri.parse(uri).place) / f"{order_id}.npz"
    file.write_bytes(encode_scene(random_scene(order_id, **changes)) if changes else b"damaged")


def assert_rows_are(rows, scenes) -> None:
    expected = stack_scenes(scenes)
    for field in dataclasses.fields(expected):
        assert torch.equal(getattr(rows, field.name), getattr(expected, field.name)), field.name


def assert_counts_add_up(stage) -> None:
    counts = dataclasses.asdict(stage.counts)
    assert counts.pop("rows") == sum(counts.values())
    assert stage.counts.trained_on == len(stage.train)
    assert stage.counts.dev == len(stage.dev)


def test_stage_trains_on_the_first_rows_and_is_measured_on_the_last(small):
    stage, scenes = load_stage_data(small), random_scenes(10)
    assert stage.train.order_ids == tuple(s.order_id for s in scenes[:7])
    assert stage.dev.order_ids == tuple(s.order_id for s in scenes[7:])
    assert_rows_are(stage.train.rows, scenes[:7])
    assert_rows_are(stage.dev.rows, scenes[7:])
    assert [s.order_id for s in stage.dev.scenes] == list(stage.dev.order_ids)
    assert stage.train.scenes == ()
    assert (stage.train.uri.part, stage.dev.uri.part, stage.uri.part) == ("train", "dev", None)
    assert_counts_add_up(stage)


def test_stacking_in_chunks_gives_the_rows_stacked_at_once(small, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 3)
    assert_rows_are(load_stage_data(small).train.rows, random_scenes(7))


def test_digest_and_rows_do_not_depend_on_where_rows_come_from(tmp_path, small, datasets):
    scenes, parquet = random_scenes(10), f"parquet:{tmp_path}/parquet?dev=3"
    write_parquet(scenes, tmp_path / "parquet", rows_per_file=4)
    stage, other = load_stage_data(small), load_stage_data(parquet)
    assert stage.train.digest == other.train.digest == digest_scenes(scenes[:7])
    assert stage.dev.digest == other.dev.digest == digest_scenes(scenes[7:])
    assert_rows_are(other.train.rows, scenes[:7])


def test_digest_is_the_documented_one():
    scene = random_scene("äb", optional=False)
    text = b"row 3\n" + "äb".encode()
    for name, header in [
        ("xyz_norm", "<f4 [24, 3]"), ("class_id", "|u1 [24]"), ("source", "|u1 [24]"), ("mask", "|b1 [24]"),
        ("center", "<f4 [3]"), ("scale", "<f4 []"), ("visible_src", "|u1 [24]"), ("visible_id", "<i2 [24]"),
        ("gt_segments", "<f4 [7, 2, 3]"), ("gt_vertices", "<f4 [6, 3]"), ("gt_edges", "<i4 [7, 2]"),
    ]:  # fmt: skip
        text += f"{name} {header}\n".encode() + getattr(scene, name).tobytes()
    assert digest_scenes([scene, scene]) == hashlib.sha256(text * 2).hexdigest()


def test_digest_changes_with_the_order_a_bit_or_a_name():
    scenes = random_scenes(3)
    flipped = scenes[2].xyz_norm.copy()
    flipped.view(np.uint32)[5, 1] ^= 1
    others = [
        [scenes[1], scenes[0], scenes[2]],
        [*scenes[:2], dataclasses.replace(scenes[2], xyz_norm=flipped)],
        [*scenes[:2], dataclasses.replace(scenes[2], order_id="row-00003")],
        [*scenes[:2], dataclasses.replace(scenes[2], behind=None)],
        scenes[:2],
    ]
    assert len({digest_scenes(rows) for rows in [scenes, *others]}) == 6


def test_digest_does_not_depend_on_memory_order():
    scene = random_scene("a")
    transposed = dataclasses.replace(scene, xyz_norm=np.asfortranarray(scene.xyz_norm))
    assert digest_scenes([transposed]) == digest_scenes([scene])


def test_undecodable_rows_are_named_left_out_and_counted(small, caplog):
    damage(small, "row-00002")
    damage(small, "row-00008", class_id=np.full(24, 99, np.uint8))
    stage = load_stage_data(small)
    scenes = random_scenes(10)
    assert_rows_are(stage.train.rows, scenes[:2] + scenes[3:7])
    assert_rows_are(stage.dev.rows, [scenes[7], scenes[9]])
    assert stage.train.order_ids == tuple(s.order_id for s in scenes[:2] + scenes[3:7])
    assert (stage.counts.undecodable, stage.counts.trained_on, stage.counts.dev) == (2, 6, 2)
    assert_counts_add_up(stage)
    assert "row 'row-00002': field 'data' is not a readable .npz" in caplog.text
    assert "row 'row-00008': field 'class_id' must be below 13, is 99; the row is left out" in caplog.text


def test_many_undecodable_rows_are_named_in_part_and_counted(tmp_path, caplog):
    write_npz(random_scenes(20), tmp_path / "set")
    for i in range(15):
        damage(f"npz:{tmp_path}/set", f"row-{i:05}")
    assert len(load_scenes(f"npz:{tmp_path}/set")) == 5
    assert caplog.text.count("the row is left out") == 10
    assert "15 rows are undecodable and left out" in caplog.text


@pytest.mark.parametrize("order_id", ["row-00002", "row-00008"])
def test_strict_raises_at_an_undecodable_row(small, order_id):
    damage(small, order_id)
    with pytest.raises(RowError, match=f"row '{order_id}': field 'data'"):
        load_stage_data(small, strict=True)
    with pytest.raises(RowError, match=f"row '{order_id}': field 'data'"):
        load_scenes(small, strict=True)


@pytest.mark.parametrize(("part", "rows"), [("train", range(7)), ("dev", range(7, 10))])
def test_part_without_a_usable_row_is_refused(small, part, rows):
    for i in rows:
        damage(small, f"row-{i:05}")
    with pytest.raises(SourceError, match=f"its {part} part has no usable rows"):
        load_stage_data(small)
    with pytest.raises(SourceError, match="has no usable rows"):
        load_scenes(f"{small}#{part}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1], "row 'row-00001': field 'mask' must have 24 points as the rows before, has 25"),
        ([4], "row 'row-00004': field 'mask' must have 24 points as the rows before, has 25"),
        ([7, 8, 9], "its train and dev parts differ in their number of points"),
    ],
)
def test_rows_that_differ_in_their_number_of_points_are_refused(small, rows, message, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 2)
    for i in rows:
        damage(small, f"row-{i:05}", points=25)
    with pytest.raises(ValueError, match=message):
        load_stage_data(small)


def test_no_set_of_the_run_trains_on_a_dev_scene_of_another(tmp_path):
    # as the published sets: the second lacks scenes, so its last rows are other scenes
    scenes = random_scenes(12)
    write_npz(scenes, tmp_path / "first")
    write_npz(scenes[:2] + scenes[3:9], tmp_path / "second")
    uris = [f"npz:{tmp_path}/first?dev=3", f"npz:{tmp_path}/second?dev=3"]
    stages = [load_stage_data(uri, dev_uris=uris) for uri in uris]
    held_out = {order_id for stage in stages for order_id in stage.dev.order_ids}
    assert held_out == {f"row-{i:05}" for i in (6, 7, 8, 9, 10, 11)}
    for stage in stages:
        assert not held_out & set(stage.train.order_ids)
        assert_counts_add_up(stage)
    assert [stage.counts.dropped_leak for stage in stages] == [3, 0]

    published = load_stage_data(uris[0], dev_uris=uris, published_split=True)
    assert published.train.order_ids == tuple(s.order_id for s in scenes[:9])
    assert published.counts.dropped_leak == 0


def test_scene_that_a_set_holds_twice_is_not_trained_on_if_it_is_dev(tmp_path, datasets):
    write_parquet([random_scene("row-00005"), *random_scenes(6)], tmp_path / "set")
    stage = load_stage_data(f"parquet:{tmp_path}/set?dev=2")
    assert stage.train.order_ids == tuple(f"row-{i:05}" for i in range(4))
    assert stage.counts.dropped_leak == 1


def test_bad_samples_are_left_out_of_training_only(small, tmp_path):
    listed = tmp_path / "bad.txt"
    listed.write_text("row-00001\nrow-00009\nelsewhere")
    stage = load_stage_data(small, bad_samples=listed)
    assert stage.train.order_ids == tuple(f"row-{i:05}" for i in (0, 2, 3, 4, 5, 6))
    assert "row-00009" in stage.dev.order_ids
    assert stage.counts.dropped_bad == 1
    assert_counts_add_up(stage)


def test_list_of_bad_samples_may_hold_comments_and_end_without_newline(tmp_path):
    listed = tmp_path / "bad.txt"
    listed.write_bytes(b"# why\n\n a \nb # misaligned\r\n#c\nd")
    assert read_bad_samples(listed) == {"a", "b", "d"}


def test_wrong_list_of_bad_samples_is_explained(tmp_path):
    (tmp_path / "bad.txt").write_text("a\nb c\n")
    with pytest.raises(SourceError, match=r"bad.txt line 2: must hold one order_id, got 'b c'"):
        read_bad_samples(tmp_path / "bad.txt")
    with pytest.raises(SourceError, match="cannot read the list of bad samples"):
        read_bad_samples(tmp_path / "missing.txt")


def test_rows_are_counted_as_they_are_chosen(small, tmp_path):
    listed = tmp_path / "bad.txt"
    listed.write_text("row-00001\nrow-00009\n")
    assert data.count_train_rows(small) == 7
    assert (
        data.count_train_rows(small, bad_samples=listed) == load_stage_data(small, bad_samples=listed).counts.trained_on
    )


def test_shipped_list_keeps_the_published_recipe_and_names_its_two_optional_scenes():
    assert read_bad_samples(SHIPPED) == frozenset()
    assert re.findall(r"^# ([0-9a-f]{11})$", SHIPPED.read_text(), re.MULTILINE) == ["47b0e0ce19b", "4b2d56eb3ef"]


@pytest.mark.parametrize("part", ["dev", "all"])
def test_stage_refuses_a_uri_that_names_another_part(small, part):
    with pytest.raises(SourceError, match=f"leave out #{part}"):
        load_stage_data(f"{small}#{part}")
    assert load_stage_data(f"{small}#train").uri == SourceUri.parse(small)


def test_every_count_is_printed(small, tmp_path):
    listed = tmp_path / "bad.txt"
    listed.write_text("row-00001")
    damage(small, "row-00002")
    assert load_stage_data(small, bad_samples=listed).describe() == (
        f"npz:{tmp_path}/small?dev=3: 10 rows = 5 trained on + 3 dev + 1 bad samples + 0 in a dev part of this run"
        " + 1 undecodable"
    )


def test_doubtful_rows_are_used_counted_and_told_also_where_they_were_kept(small, tmp_path, monkeypatch, caplog):
    metres = np.full((24, 3), 9, np.float32)
    damage(small, "row-00001", xyz_norm=metres)
    damage(small, "row-00008", xyz_norm=metres, gt_segments=np.ones((7, 2, 3), np.float32))
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "kept"))
    for _ in range(2):
        stage = load_stage_data(small)
        assert stage.counts == data.Counts(
            rows=10, trained_on=7, dev=3, dropped_bad=0, dropped_leak=0, undecodable=0
        )  # fmt: skip
        assert stage.describe().endswith(
            " + 0 undecodable; 2 of 10 have an xyz_norm beyond 2 at most points, as metres would be; "
            "1 of 10 have gt_segments that are not their gt_edges, normalised"
        )
    assert not caplog.text
    assert len(load_scenes(f"{small}#dev", truth=False)) == 3
    assert "1 of 3 rows have an xyz_norm beyond 2 at most points" in caplog.text
    assert "gt_segments" not in caplog.text


@pytest.mark.parametrize("setting", ["easy", "real"])
def test_generated_roofs_are_not_doubted(setting):
    stage = load_stage_data(f"roofs:{setting}?scenes=64&points=256")
    assert stage.train.doubts == stage.dev.doubts == {}


def test_scenes_of_a_part_or_of_all_are_loaded_in_order(small):
    names = [f"row-{i:05}" for i in range(10)]
    for part, expected in (("", names), ("#all", names), ("#train", names[:7]), ("#dev", names[7:])):
        assert [s.order_id for s in load_scenes(small + part)] == expected


def test_order_ids_name_undecodable_rows_too(small):
    damage(small, "row-00008")
    assert data.load_order_ids(f"{small}#dev") == ["row-00007", "row-00008", "row-00009"]
    assert len(data.load_order_ids(small)) == 10


def test_scenes_without_truth_are_loaded_only_where_none_is_needed(small):
    damage(small, "row-00004", gt_segments=None, gt_vertices=None, gt_edges=None, gt_edge_classes=None)
    assert len(load_scenes(small, truth=False)) == 10
    with pytest.raises(RowError, match="row 'row-00004': field 'gt_segments' is missing"):
        load_scenes(small, strict=True)


def test_no_usable_row_is_an_error_only_where_truth_is_needed(small, caplog):
    for i in range(10):
        damage(small, f"row-{i:05}")
    assert load_scenes(small, truth=False) == []
    assert "row-00000" in caplog.text
    with pytest.raises(SourceError, match="has no usable rows"):
        load_scenes(small)


def test_generated_roofs_need_no_file(tmp_path):
    stage = load_stage_data("roofs:easy?scenes=5&points=64")
    assert stage.counts == data.Counts(
        rows=69, trained_on=5, dev=64, dropped_bad=0, dropped_leak=0, undecodable=0
    )  # fmt: skip
    assert stage.train.rows.xyz_BT3.shape == (5, 64, 3)


def test_roofs_of_another_density_in_the_run_do_not_leak():
    uris = ["roofs:easy?scenes=5&points=64&seed=1", "roofs:easy?scenes=5&points=128&seed=0"]
    stage = load_stage_data("roofs:easy?scenes=100&points=64&seed=1", dev_uris=uris)
    # seed 1 is the dev part of seed 0
    assert stage.counts.dropped_leak == 64
