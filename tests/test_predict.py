import dataclasses
import json

import numpy as np
import pytest

from tests.test_evaluate import CPU, SETTINGS, Oracle, gable
from train.predict import NothingRead, predict_command

FALLBACK = {"wf_vertices": [[0, 0, 0], [0, 0, 0]], "wf_edges": [[0, 1]], "wf_classifications": [0]}


def predict(scenes, out, **options):
    return predict_command(Oracle(), scenes, out=out, machine=CPU, batch=8, postprocess=SETTINGS, **options)


def test_the_submission_has_a_complete_row_per_scene(tmp_path):
    rows = predict([gable("a", 4), gable("b", 6)], tmp_path / "submission.json")
    assert json.loads((tmp_path / "submission.json").read_text()) == rows
    assert [row["order_id"] for row in rows] == ["a", "b"]
    for row in rows:
        assert list(row) == ["order_id", "wf_vertices", "wf_edges", "wf_classifications"]
        assert len(row["wf_vertices"]) == 6 and len(row["wf_edges"]) == len(row["wf_classifications"]) == 9


def test_a_scene_that_could_not_be_read_is_answered_with_the_fallback(tmp_path, capsys):
    rows = predict([gable("b", 6)], tmp_path / "submission.json", order_ids=["a", "b"])
    assert rows[0] == {"order_id": "a", **FALLBACK}
    assert len(rows[1]["wf_edges"]) == 9
    assert capsys.readouterr().out.startswith("2 answers, 1 of them the fallback")


def test_answers_without_a_predicted_edge_are_counted(tmp_path, capsys):
    scenes = [gable("a", 4), dataclasses.replace(gable("b", 6), mask=np.zeros(len(gable("b", 6).mask), bool))]
    rows = predict(scenes, tmp_path / "submission.json", order_ids=["a", "b", "c"])
    assert [row["order_id"] for row in rows if row["wf_vertices"] == FALLBACK["wf_vertices"]] == ["b", "c"]
    assert "3 answers, 1 of them the fallback for want of data, 1 without a predicted edge" in capsys.readouterr().out


def test_a_set_without_a_readable_row_is_answered_and_said_to_be_unread(tmp_path):
    with pytest.raises(NothingRead, match=r"no row could be read: every answer in .* is the fallback"):
        predict([], tmp_path / "submission.json", order_ids=["a"])
    assert json.loads((tmp_path / "submission.json").read_text()) == [{"order_id": "a", **FALLBACK}]
    assert predict([], tmp_path / "submission.json", order_ids=[]) == []


@pytest.mark.parametrize("content", ["# a text", "{}", "[3]", '[{"order_id": "a"}]'])
def test_a_file_with_something_else_in_it_is_not_written_over(tmp_path, content):
    out = tmp_path / "README.md"
    out.write_text(content)
    with pytest.raises(ValueError, match=r"README\.md holds something else than answers: name another file with --out"):
        predict([gable("a", 4)], out)
    assert out.read_text() == content
    out.write_text("")
    rows = predict([gable("a", 4)], out)
    assert predict([gable("a", 4)], out) == rows


@pytest.mark.parametrize(
    ("order_ids", "rule"),
    [
        (["a", "b", "a"], "order_ids must name each scene once, got 'a' twice"),
        (["a"], "order_ids must name every scene, got no 'b'"),
    ],
)
def test_order_ids_that_do_not_fit_are_refused(tmp_path, order_ids, rule):
    with pytest.raises(ValueError, match=rule):
        predict([gable("a", 4), gable("b", 6)], tmp_path / "submission.json", order_ids=order_ids)
    assert not list(tmp_path.iterdir())


def test_a_scene_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must name each scene once, got 'a' twice"):
        predict([gable("a", 4), gable("a", 6)], tmp_path / "submission.json")
    with pytest.raises(ValueError, match="scenes must name each scene once, got 'a' twice"):
        predict([gable("a", 4), gable("a", 6)], tmp_path / "submission.json", order_ids=["a"])
