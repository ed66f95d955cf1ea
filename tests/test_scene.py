import dataclasses
import io
import pickle
import random
import re
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver import scene as schema
from perceiver.scene import (
    RowError,
    Scene,
    check_scene,
    decode_scene,
    doubts_about,
    encode_scene,
    scene_key,
    stack_scenes,
)
from tests.random_scenes import random_scene, random_scenes
from train.plots import POINT_CLASSES
from train.sources import open_rows

ROWS_PAGE = (Path(__file__).resolve().parent.parent / "docs" / "rows.md").read_text()
TRUTH = ("gt_segments", "gt_vertices", "gt_edges", "gt_edge_classes")


def npz(arrays: dict) -> bytes:
    """The bytes of an archive with these members; bytes are stored as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in arrays.items():
            member = io.BytesIO()
            if isinstance(value, bytes):
                archive.writestr(name, value)
            else:
                np.save(member, value)
                archive.writestr(name + ".npy", member.getvalue())
    return buffer.getvalue()


def fields_of(scene: Scene) -> dict:
    values = {field.name: getattr(scene, field.name) for field in dataclasses.fields(scene)}
    return {name: value for name, value in values.items() if name != "order_id" and value is not None}


def assert_same(a: Scene, b: Scene) -> None:
    assert a.order_id == b.order_id
    assert fields_of(a).keys() == fields_of(b).keys()
    for name, value in fields_of(a).items():
        np.testing.assert_array_equal(value, fields_of(b)[name], strict=True)


@pytest.mark.parametrize("optional", [True, False])
def test_decoding_gives_back_what_was_encoded(optional):
    scene = random_scene("a", optional=optional)
    assert_same(decode_scene("a", encode_scene(scene)), scene)


def test_decoding_reads_what_numpy_wrote_and_ignores_unknown_fields():
    scene = random_scene("a")
    buffer = io.BytesIO()
    np.savez(buffer, **fields_of(scene), something_else=np.arange(3))
    assert_same(decode_scene("a", buffer.getvalue()), scene)


def test_equal_scenes_have_equal_bytes_whatever_their_memory_order():
    scene = random_scene("a")
    transposed = dataclasses.replace(scene, xyz_norm=np.asfortranarray(scene.xyz_norm))
    assert encode_scene(transposed) == encode_scene(scene)


def test_encoding_is_uncompressed():
    with zipfile.ZipFile(io.BytesIO(encode_scene(random_scene("a")))) as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"", "data", "not a readable .npz"),
        (b"hello", "data", r"is not a readable .npz \(it is no zip archive\)$"),
        (b"\x93NUMPY", "data", "not a readable .npz"),
        (npz({"mask": np.ones(3, bool)}), "xyz_norm", "is missing"),
        (npz({**fields_of(random_scene("a")), "class_id": np.array([{}], dtype=object)}), "data", "not a readable"),
        (npz({**fields_of(random_scene("a", optional=False)), "behind": b"hello"}), "behind", "not a numpy array"),
    ],
)
def test_undecodable_row_names_row_and_field(data, field, reason):
    with pytest.raises(RowError, match=f"row 'abc': field '{field}' .*{reason}") as error:
        decode_scene("abc", data)
    assert (error.value.order_id, error.value.field) == ("abc", field)


@pytest.mark.parametrize("name", sorted(fields_of(random_scene("a", optional=False))))
def test_missing_field_is_named(name):
    arrays = fields_of(random_scene("a"))
    del arrays[name]
    with pytest.raises(RowError, match=f"field '{name}' is missing"):
        decode_scene("a", npz(arrays))


def test_damaged_bytes_are_a_row_error_or_an_unchanged_scene():
    # without optional fields: one whose name is damaged is one that is not there
    scene = random_scene("a", optional=False)
    data, rng, refused = encode_scene(scene), random.Random(0), 0
    for _ in range(500):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with warnings.catch_warnings(action="ignore"):
            try:
                assert_same(decode_scene("a", bytes(damaged)), scene)
            except RowError:
                refused += 1
    assert refused > 400


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"xyz_norm": np.zeros((24, 3))}, "xyz_norm", "must be float32, is float64"),
        ({"xyz_norm": np.zeros(24, np.float32)}, "xyz_norm", "must have shape"),
        ({"center": np.zeros(2, np.float32)}, "center", "must have shape"),
        ({"class_id": np.zeros(23, np.uint8)}, "class_id", "must have shape"),
        ({"xyz_norm": np.full((24, 3), np.nan, np.float32)}, "xyz_norm", "not finite"),
        ({"gt_vertices": np.full((6, 3), np.inf, np.float32)}, "gt_vertices", "not finite"),
        ({"mask": np.arange(24) > 3}, "mask", "prefix"),
        ({"scale": np.array(1e-7, np.float32)}, "scale", "at least 1e-6"),
        ({"scale": 10.0}, "scale", "is not a numpy array, it is float"),
        ({"center": [0.0, 0.0, 0.0]}, "center", "is not a numpy array, it is list"),
        ({"gt_vertices": None}, "gt_vertices", "is missing beside gt_segments"),
        ({"class_id": np.full(24, 13, np.uint8)}, "class_id", "below 13"),
        ({"source": np.full(24, 2, np.uint8)}, "source", "below 2"),
        ({"behind": np.full(24, 29, np.int16)}, "behind", "below 29"),
        ({"gt_edges": np.full((7, 2), 6, np.int32)}, "gt_edges", "must index 6 vertices"),
        ({"gt_edges": np.full((7, 2), -1, np.int32)}, "gt_edges", "must index 6 vertices"),
        (
            {name: np.zeros((0, *shape), dtype) for name, shape, dtype in [
                ("gt_edges", (2,), np.int32), ("gt_segments", (2, 3), np.float32), ("gt_edge_classes", (), np.int64)
            ]},
            "gt_edges",
            "1 to 64 edges, has 0",
        ),
        (
            {name: np.zeros((65, *shape), dtype) for name, shape, dtype in [
                ("gt_edges", (2,), np.int32), ("gt_segments", (2, 3), np.float32), ("gt_edge_classes", (), np.int64)
            ]},
            "gt_edges",
            "1 to 64 edges, has 65",
        ),
    ],
)  # fmt: skip
def test_rule_that_a_row_breaks_is_named(change, field, reason):
    with pytest.raises(RowError, match=f"field '{field}' .*{reason}"):
        check_scene(random_scene("a", **change))


@pytest.mark.parametrize(
    ("change", "doubts"),
    [
        (lambda x: {}, []),
        (lambda x: {"xyz_norm": x.to_world(x.xyz_norm).astype(np.float32)}, ["an xyz_norm beyond 2 at most points"]),
        (lambda x: {"xyz_norm": np.where(np.arange(24)[:, None] < 5, 9, x.xyz_norm).astype(np.float32)}, []),
        (lambda x: {"gt_segments": x.gt_vertices[x.gt_edges]}, ["gt_segments that are not their gt_edges"]),
        (lambda x: {"gt_vertices": x.gt_segments[:6, 0].copy()}, ["gt_segments that are not their gt_edges"]),
        (lambda x: {"gt_segments": x.gt_segments[::-1, ::-1].copy()}, []),
        (lambda x: dict.fromkeys(TRUTH), []),
        (lambda x: {"mask": np.zeros(24, bool)}, []),
    ],
    ids=["as it should be", "points in metres", "outliers", "segments in metres", "normalised vertices", "other order",
         "no truth", "no point"],
)  # fmt: skip
def test_what_breaks_no_rule_and_can_hardly_be_meant_is_doubted(change, doubts):
    scene = random_scene("a")
    scene = dataclasses.replace(scene, **change(scene))
    check_scene(scene)
    found = doubts_about(scene)
    assert len(found) == len(doubts)
    assert all(text.startswith(start) for text, start in zip(found, doubts, strict=True))


def test_the_rounding_of_metres_far_from_their_origin_is_not_doubted():
    scene, far = random_scene("a"), np.array([5e5, 0, 4e5], np.float32)
    moved = dataclasses.replace(scene, center=scene.center + far, gt_vertices=scene.gt_vertices + far)
    assert doubts_about(moved) == []


def test_row_without_any_point_is_refused():
    with pytest.raises(RowError, match="field 'mask' is empty"):
        check_scene(random_scene("a", points=0))


def test_row_without_truth_is_accepted_only_where_none_is_needed():
    data = encode_scene(random_scene("a", **dict.fromkeys(TRUTH)))
    assert decode_scene("a", data, truth=False).gt_segments is None
    with pytest.raises(RowError, match="field 'gt_segments' is missing"):
        decode_scene("a", data)


def test_broken_truth_is_refused_where_it_is_needed_and_else_not_read():
    data = encode_scene(random_scene("a", gt_vertices=None))
    with pytest.raises(RowError, match="field 'gt_vertices' is missing"):
        decode_scene("a", data)
    assert decode_scene("a", data, truth=False).gt_segments is None


def test_row_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RowError("a", "mask", "is empty")))
    assert (error.order_id, error.field, error.reason) == ("a", "mask", "is empty")


def test_valid_points_in_metres_are_scale_times_normalised_plus_center():
    scene = random_scene("a")
    expected = scene.xyz_norm[:21].astype(np.float64) * 8 + scene.center
    np.testing.assert_array_equal(scene.valid_points_world(), expected)


def test_key_of_a_scene_is_the_start_of_the_sha256_of_its_order_id():
    # printf abc | sha256sum: ba7816bf...
    assert scene_key("abc") == 0xBF1678BA


def test_stacking_keeps_rows_in_order_and_pads_the_truth():
    scenes = [random_scene("a"), random_scene("b", **dict.fromkeys(TRUTH)), random_scene("c")]
    batch = stack_scenes(scenes)
    assert len(batch) == 3
    assert batch.gt_count_B.tolist() == [7, 0, 7]
    assert batch.point_count_B.tolist() == [21, 21, 21]
    assert batch.scene_B.tolist() == [scene_key(name) for name in "abc"]
    for i in (0, 2):
        np.testing.assert_array_equal(batch.xyz_BT3[i], scenes[i].xyz_norm)
        np.testing.assert_array_equal(batch.gt_BM23[i, :7], scenes[i].gt_segments)
    assert not batch.gt_BM23[:, 7:].any()
    assert not batch.gt_BM23[1].any()


def test_stacking_normalises_votes_and_replaces_what_is_missing_by_zero():
    votes = random_scene(
        "a",
        n_views_voted=np.full(24, 3, np.uint8),
        vote_frac=np.full(24, 1, np.float32),
        behind=np.arange(-1, 23, dtype=np.int16),
    )
    batch = stack_scenes([votes, random_scene("b", optional=False)])
    torch.testing.assert_close(batch.votes_BT2[0, 0], torch.tensor([0.3, 2.0]))
    assert not batch.votes_BT2[1].any()
    assert batch.behind_BT[0].tolist() == [0, *range(23)]
    assert not batch.behind_BT[1].any()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_gathered_rows_are_the_rows_stacked_in_that_order(impl, device):
    scenes = random_scenes(5)
    gathered = stack_scenes(scenes).to(device).rows(torch.tensor([3, 0, 3], device=device), impl=impl)
    expected = stack_scenes([scenes[3], scenes[0], scenes[3]]).to(device)
    for field in dataclasses.fields(expected):
        assert torch.equal(getattr(gathered, field.name), getattr(expected, field.name))


def test_stacking_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one scene"):
        stack_scenes([])


def test_stacking_unequal_numbers_of_points_names_the_row():
    with pytest.raises(RowError, match=r"row 'b': .* 24 points as the others, has 25"):
        stack_scenes([random_scene("a"), random_scene("b", points=25)])


def test_the_page_of_rows_shows_the_schema():
    """In its order: names, dtypes, shapes, what is needed, and the classes of points."""
    shown = re.findall(r"^\| `(\w+)` \| (\w+) \| (\[.*?\]) \| (\w+) \| (.*) \|$", ROWS_PAGE, re.MULTILINE)
    expected = []
    for name, (dtype, shape) in schema._SCHEMA.items():
        needed = "no" if name in schema._OPTIONAL else "truth" if name in schema._TRUTH else "always"
        expected.append((name, dtype, f"[{', '.join(map(str, shape))}]", needed))
    assert [row[:4] for row in shown] == expected
    texts = {name: text for name, *_, text in shown}
    assert texts["class_id"] == ", ".join(f"{i} {name}" for i, (name, _) in enumerate(POINT_CLASSES))
    assert f"1 to {schema.MAX_SEGMENTS} edges" in texts["gt_segments"]
    assert f"0 to {schema.BEHIND_CLASSES - 1}" in texts["behind"]


def test_the_rows_that_the_page_writes_are_read(tmp_path, monkeypatch):
    (example,) = re.findall(r"^## Write some\n\n(.*?)\n\nA scene", ROWS_PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(example), names := {})
    rows = open_rows("npz:mynpz")
    assert list(rows.order_ids) == ["house-1"]
    assert_same(rows.scene(0, truth=True), names["scene"])
