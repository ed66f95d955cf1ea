"""The short training of the GPU suite: twice the same bits, also where one run is killed and resumed."""

import json
import sys

import pytest

from bench import gpu_gathered, gpu_train
from bench.gpu_process import Sheet
from tests.test_gpu import answer_as_workers, script


def test_the_short_recipe_has_all_stages_and_the_confidences_of_the_demo():
    recipe = gpu_train.short_recipe(share=0.02, scenes=64)
    first, _, last = recipe.stages
    assert [stage.until for stage in recipe.stages] == [2500, 2700, 3400]
    assert (first.warmup, last.cooldown_start, last.cooldown_steps) == (200, 3000, 400)
    assert [stage.batch for stage in recipe.stages] == [32, 64, 64] and recipe.checkpoint_every == 833
    assert (recipe.loss.conf_target, recipe.postprocess.confidence) == ("partner", 0.25) and last.endpoint_weight > 0
    # of 150,000 + 20,000 updates: 160.5 and 21.4 rounded are 181, 181.9 is 182
    last = gpu_train.short_recipe(share=0.00107, scenes=64).stages[-1]
    assert last.cooldown_start + last.cooldown_steps == last.until
    with pytest.raises(ValueError, match="until must be at least 1, got 0"):
        gpu_train.short_recipe(share=0, scenes=64)
    runs = [{"files": {"a": "1"}, "weights": ["w"]}, {"files": {"a": "1"}, "weights": ["v"]}]
    assert gpu_train.compare(runs[:1]) is None and gpu_train.compare(runs) is False
    assert gpu_train.compare([runs[0], runs[0]]) is True


def test_a_training_without_scores_says_why(tmp_path, monkeypatch, capsys):
    scores = '"dev_scores": {"scenes": 2, "hss": [], "not_computed": "no scorer"}'
    found = f'tell \'{{"files": {{}}, "weights": [], "loss": [], "begun_at": [0\'"$MORE"\'], {scores}}}\''
    killed = """for last; do :; done; case "$last" in *second) if [ -d "$last" ]; then MORE=", 1000"; else
        mkdir "$last"; echo '{"step": 1250}' >"$last/metrics.jsonl"; sleep 60; fi;; esac"""
    answer_as_workers(monkeypatch, tmp_path, f"{killed}\n{found}")
    monkeypatch.setattr(sys, "argv", ["gpu_train", "--out", str(tmp_path / "train.json")])
    for name in ("end_on_sigterm", "end_with_parent"):
        monkeypatch.setattr(gpu_train, name, lambda: None)
    assert gpu_train.main() == 0
    told = "2 runs, one killed after update 1250, resumed from 1000, same bits: True; scores not computed: no scorer\n"
    assert capsys.readouterr().out == told
    checks = gpu_gathered.gather({"train": json.loads((tmp_path / "train.json").read_text())}, {})["checks"]
    assert (checks["train"]["killed_after"], checks["train"]["resumed_from"]) == (1250, 1000)


TRAINS = """
import dataclasses, sys
from pathlib import Path
from bench import gpu_train
from bench.gpu_process import note
from tests.test_reproducible import longer_recipe
gpu_train._why_unscored = lambda: "not asked for"
recipe = dataclasses.replace(longer_recipe(), checkpoint_every=40)
note(**gpu_train.train_once(recipe, Path(sys.argv[-1])))
"""


def test_of_two_trainings_one_is_killed_and_resumed_and_both_have_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sheet = Sheet(tmp_path / "train.json")
    gpu_train.train_twice(script(TRAINS), sheet, kill_after=50, seconds=300)
    found = sheet.content
    assert not found["errors"] and 50 <= found["killed_after"] < 120
    assert found["resumed_from"] in (40, 80) and sorted(run["begun_at"] for run in found["runs"])[0] == [0]
    assert found["same_bits"] is True and len(found["runs"][0]["weights"]) == 3
