"""The kept result of a run says what its logs say."""

import json

import pytest

from bench.run_summary import summarize_run

YARDSTICK = {"hss_mean": 0.99, "hss_q5": 0.9, "corner_f1_mean": 1.0, "edge_iou_mean": 0.97765}


def test_stages_yardsticks_and_times_are_collected(tmp_path):
    def lines(name, *values):
        (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))

    stage = {"kind": "stage", "corner_f1_mean": 0.5, "edge_iou_mean": 0.25, "weights": "w"}
    lines(
        "metrics.jsonl",
        {"kind": "train", "step": 1},
        {**stage, "step": 4, "name": "one", "hss_mean": 0.123456},
        {**stage, "step": 6, "name": "two", "hss_mean": 0.3},
    )
    lines(
        "speed.jsonl",
        {"step": 4, "seconds": 2.0, "steps_per_second": 2.0, "memory_mb": 10.0},
        {"step": 6, "seconds": 4.0, "steps_per_second": 0.5, "memory_mb": 12.0},
    )
    (tmp_path / "config.json").write_text('{"name": "mine"}')
    scores = {"source": "roofs:easy#dev", "scenes": 64, "yardsticks": {"truth": YARDSTICK}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    summary = summarize_run(tmp_path)
    assert [(s["name"], s["until"], s["hss"]) for s in summary["stages"]] == [("one", 4, 0.1235), ("two", 6, 0.3)]
    assert summary["training_seconds"] == 6.0
    assert summary["steps_per_second"] == {"4": 2.0, "6": 0.5}
    assert summary["yardsticks"] == {"truth": {"hss": 0.99, "corner_f1": 1.0, "edge_iou": 0.9777}}
    assert (summary["recipe"], summary["scenes"], summary["peak_memory_mb"]) == ("mine", 64, 12.0)


def test_an_unfinished_run_has_no_summary(tmp_path):
    with pytest.raises(ValueError, match="is not finished"):
        summarize_run(tmp_path)
