"""The command line: exit codes, one clear line for a mistake, and the commands end to end on a tiny run."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_published import ARGS, small_published
from train.__main__ import main
from train.checkpoint import load_checkpoint, save_checkpoint
from train.roofs import generate_scenes
from train.sources import write_npz

ROOT = Path(__file__).resolve().parent.parent
# one stage of two updates, unscored
QUICK = ["--recipe", "tiny", "--quiet", "--device", "cpu", "--threads", "1", "--evaluate.no-score"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", *QUICK, "--runs", str(runs)]) == 0
    return runs


def test_a_run_leaves_a_page_and_says_where(runs, capsys):
    assert main(["run", *QUICK, "--runs", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert f"{runs / 'tiny'} is complete already" in printed
    assert f"report: {runs / 'tiny' / 'report.html'}" in printed


def test_a_run_can_be_scored_and_compared_and_answers_a_set(runs, tmp_path, capsys):
    write_npz(generate_scenes(3, seed=5, points=128, setting="easy"), tmp_path / "set")
    data = ["--data", f"npz:{tmp_path / 'set'}", "--device", "cpu", "--threads", "1"]
    score = ["--set", "validation", "--out", str(tmp_path), "--workers", "1"]
    assert main(["evaluate", str(runs / "tiny"), *data, *score]) == 0
    scores = json.loads((tmp_path / "scores_validation.json").read_text())
    assert (scores["set"], scores["scenes"], scores["checkpoint"]["step"]) == ("official validation", 3, 20)
    assert (
        main(["predict", str(runs / "tiny" / "stage3.pt"), *data, "--out", str(tmp_path / "new" / "submission.json")])
        == 0
    )
    rows = json.loads((tmp_path / "new" / "submission.json").read_text())
    assert len(rows) == 3
    assert all(row["wf_vertices"] and row["wf_edges"] for row in rows)
    assert main(["compare", str(runs / "tiny"), str(runs / "tiny")]) == 0
    assert "are identical" in capsys.readouterr().out


def test_runs_that_differ_give_exit_code_1_and_the_first_difference(runs, capsys):
    assert main(["run", *QUICK, "--runs", str(runs), "--name", "other", "--seed", "4", "--stages.2.until", "13"]) == 0
    assert main(["compare", str(runs / "tiny"), str(runs / "other")]) == 1
    printed = capsys.readouterr()
    assert "differ\n  metrics: first at step 1 (train): " in printed.out
    assert "\n  recomputed: step 0, before: first tokenizer.label_emb.weight: " in printed.out
    assert f"making the initial weights of {runs / 'other'} again" in printed.err
    assert main(["compare", str(runs / "tiny"), str(runs / "other"), "--no-recompute"]) == 1
    assert "recomputed" not in capsys.readouterr().out


def test_a_run_can_be_checked(runs, tmp_path, capsys):
    assert main(["verify", str(runs / "tiny" / "certificate.json")]) == 0
    assert main(["replay", str(runs / "tiny"), "--step", "10"]) == 0
    printed = capsys.readouterr().out
    assert "certificate.json holds\n" in printed and "  steps 1 to 8: every value the same\n" in printed
    assert f"yes, step 10 of {runs / 'tiny'} was computed so\n  recomputed steps 9 to 10 from stage1.pt" in printed
    assert main(["replay", str(runs / "tiny"), "--step", "9", "--tensors"]) == 0
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(kinds)) == ["before", "rows", "activation", "loss", "gradient", "after"]


def test_what_cannot_be_checked_is_exit_code_2_and_what_is_wrong_1(runs, tmp_path, capsys):
    assert main(["verify", str(tmp_path / "certificate.json")]) == 2
    assert main(["replay", str(tmp_path), "--step", "1"]) == 2
    text = (runs / "tiny" / "certificate.json").read_text()
    (tmp_path / "certificate.json").write_text(text)
    assert main(["verify", str(tmp_path / "certificate.json")]) == 2
    (tmp_path / "certificate.json").write_text(text.replace('"seed": 353', '"seed": 354', 1))
    assert main(["verify", str(tmp_path / "certificate.json")]) == 1
    printed = capsys.readouterr().out
    assert "stage1_tail.pt is missing" in printed
    assert "contradicts itself: stage 1 was computed from another recipe" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--recipe", "demoo"], "recipe 'demoo' does not exist; known recipes: demo"),
        (["run", "--recipe", "tiny", "--from", "nothing.pt"], "checkpoint nothing.pt does not exist"),
        (["run", "--recipe", "tiny", "--start-stage", "2"], "--start-stage must come with --from CHECKPOINT"),
        (["run", "--recipe", "tiny", "--name", "."], "--name must be the name of a directory below --runs, got '.'"),
        (["run", "--recipe", "tiny", "--name", ""], "--name must be the name of a directory below --runs, got ''"),
        (["run", "--recipe", "tiny", "--name", "../x"], "--name must be the name of a directory below --runs"),
        (["evaluate", "nowhere", "--data", "roofs:easy"], "checkpoint nowhere does not exist"),
        (["compare", "nowhere", "nowhere"], "nowhere holds no run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, message, capsys):
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith(f"train {arguments[0]}: ")
    assert errors.count("\n") == 1


def test_a_number_out_of_range_is_not_taken_for_none(runs, tmp_path, capsys):
    start = ["--from", str(runs / "tiny" / "stage1.pt"), "--start-stage", "0", "--runs", str(tmp_path)]
    assert main(["run", *QUICK, *start]) == 1
    assert "--start-stage must be 1 to 3, got 0" in capsys.readouterr().err
    data = ["--data", "npz:nowhere", "--out", str(tmp_path / "out.json"), "--device", "cpu"]
    assert main(["predict", str(runs / "tiny"), *data, "--threads", "0"]) == 1
    assert "threads must be at least 1, got 0" in capsys.readouterr().err


def test_the_operators_of_a_run_can_be_exchanged_to_score_it(runs, tmp_path, monkeypatch, capsys):
    state = load_checkpoint(runs / "tiny" / "stage3.pt")
    path = tmp_path / "of_a_gpu.pt"
    save_checkpoint(path, dataclasses.replace(state, recipe=dict(state.recipe) | {"impl": "triton"}))
    write_npz(generate_scenes(1, seed=5, points=64, setting="easy"), tmp_path / "set")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    predict = ["predict", str(path), "--data", f"npz:{tmp_path / 'set'}", "--out", str(tmp_path / "out.json")]
    assert main([*predict, "--device", "cpu", "--threads", "1"]) == 1
    assert "impl" in capsys.readouterr().err
    assert main([*predict, "--device", "cpu", "--threads", "1", "--impl", "eager"]) == 0


def test_another_recipe_in_the_directory_is_refused_and_nothing_overwritten(runs, capsys):
    before = (runs / "tiny" / "config.json").read_bytes()
    assert main(["run", *QUICK, "--runs", str(runs), "--seed", "9"]) == 1
    assert "holds a run of another recipe (different: seed); take another --name" in capsys.readouterr().err
    assert (runs / "tiny" / "config.json").read_bytes() == before


def test_scores_of_another_source_are_not_written_over(runs, tmp_path, capsys):
    (tmp_path / "scores.json").write_text('{"source": "roofs:easy?points=128#dev"}')
    evaluate = ["evaluate", str(runs / "tiny"), "--device", "cpu", "--out", str(tmp_path)]
    assert main([*evaluate, "--data", "roofs:real#dev"]) == 1
    assert "holds the scores of roofs:easy?points=128#dev: name another directory" in capsys.readouterr().err
    assert main([*evaluate, "--data", "roofs:real"]) == 1
    assert "does not say which set it is: add #dev, or --set" in capsys.readouterr().err


def test_which_set_it_is_can_be_said_in_one_step(runs, tmp_path, capsys):
    write_npz(generate_scenes(1, seed=5, points=128, setting="easy"), tmp_path / "set")
    evaluate = ["evaluate", str(runs / "tiny"), "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")]
    assert main([*evaluate, "--data", "npz:/nowhere"]) == 1
    assert capsys.readouterr().err == "train evaluate: npz:/nowhere: there is no directory /nowhere\n"
    data = [*evaluate, "--data", f"npz:{tmp_path / 'set'}"]
    assert main(data) == 1
    assert capsys.readouterr().err.endswith("set it is: add --set dev, validation or test\n")
    assert main([*data, "--set", "dev", "--workers", "1"]) == 0


def test_a_finished_model_is_scored_from_another_confidence_on(runs, tmp_path, capsys):
    write_npz(generate_scenes(2, seed=5, points=128, setting="easy"), tmp_path / "set")
    evaluate = ["evaluate", str(runs / "tiny"), "--data", f"npz:{tmp_path / 'set'}", "--set", "dev"]
    evaluate += ["--device", "cpu", "--threads", "1", "--workers", "1"]
    assert main([*evaluate, "--out", str(tmp_path / "a")]) == 0
    assert main([*evaluate, "--out", str(tmp_path / "a"), "--confidence", "0.9"]) == 1
    assert "holds the scores of another post-processing: name another directory" in capsys.readouterr().err
    assert main([*evaluate, "--out", str(tmp_path / "b"), "--confidence", "0.9"]) == 0
    assert json.loads((tmp_path / "b" / "scores.json").read_text())["postprocess"]["confidence"] == 0.9
    assert main([*evaluate, "--out", str(tmp_path / "c"), "--confidence", "1.5"]) == 1
    assert "confidence must be strictly between 0 and 1, got 1.5" in capsys.readouterr().err


def test_what_is_scored_is_said_and_that_a_run_is_not_finished(runs, tmp_path, capsys):
    write_npz(generate_scenes(1, seed=5, points=128, setting="easy"), tmp_path / "set")
    data = ["--data", f"npz:{tmp_path / 'set'}", "--device", "cpu", "--threads", "1"]
    score = [*data, "--set", "dev", "--out", str(tmp_path / "scores"), "--workers", "1"]
    stage, stopped, published = runs / "tiny" / "stage2.pt", tmp_path / "stopped", tmp_path / "published.pt"
    stopped.mkdir()
    shutil.copy(stage, stopped / "checkpoint.pt")
    torch.save({"model": small_published().state_dict(), "args": ARGS}, published)
    for model, said in (
        (stopped, "step 12 of 20: the run is not finished"),
        (stage, "step 12 of 20"),
        (runs / "tiny", "step 20 of 20"),
    ):
        assert main(["evaluate", str(model), *score]) == 0
        assert capsys.readouterr().out.startswith(f"weights of {model}, {said}\n")
    for model, said in ((stopped, "step 12 of 20: the run is not finished"), (published, "the published form")):
        assert main(["predict", str(model), *data, "--out", str(tmp_path / "answers.json")]) == 0
        assert capsys.readouterr().out.startswith(f"weights of {model}, {said}\n")


def test_every_row_of_a_set_is_answered_whatever_can_be_read(runs, tmp_path, capsys):
    scenes = [generate_scenes(1, seed=points, points=points, setting="easy") for points in (64, 128)]
    write_npz(itertools.chain(*scenes), tmp_path / "set")
    (tmp_path / "set" / "unreadable.npz").write_bytes(b"damaged")
    write_npz(generate_scenes(1, seed=1, points=64, setting="easy"), tmp_path / "bad")
    for file in (tmp_path / "bad").iterdir():
        file.write_bytes(b"damaged")
    predict = ["predict", str(runs / "tiny"), "--device", "cpu", "--threads", "1"]
    for name, answers, fallbacks, code in (("set", 3, 1, 0), ("bad", 1, 1, 1)):
        out = tmp_path / f"{name}.json"
        assert main([*predict, "--data", f"npz:{tmp_path / name}", "--out", str(out)]) == code
        assert len(json.loads(out.read_text())) == answers
        printed = capsys.readouterr()
        assert f"{answers} answers, {fallbacks} of them the fallback for want of data" in printed.out
        assert ("train predict: no row could be read" in printed.err) == bool(code)


def test_where_answers_or_scores_cannot_go_is_said_before_they_are_made(runs, tmp_path, capsys):
    common = [str(runs / "tiny"), "--data", "npz:nowhere", "--device", "cpu", "--threads", "1"]
    (tmp_path / "file").write_text("")
    # root may write where the rights forbid it, but not where the system does
    refused = [("file", "File exists"), ("file/more", "Not a directory"), ("/proc/out", "No such file")]
    for out, message in (("", "is a directory; name a file"), *((f"{out}/x", message) for out, message in refused)):
        assert main(["predict", *common, "--out", str(tmp_path / out)]) == 1
        assert message in capsys.readouterr().err
    for out, message in refused:
        assert main(["evaluate", *common, "--set", "dev", "--out", str(tmp_path / out)]) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path / out} cannot be written: {message}" in error and "with --out" in error


def test_scores_of_a_later_step_are_not_written_over(runs, tmp_path, capsys):
    write_npz(generate_scenes(3, seed=5, points=128, setting="easy"), tmp_path / "set")
    data = ["--data", f"npz:{tmp_path / 'set'}", "--set", "dev", "--device", "cpu", "--threads", "1"]
    out = ["--workers", "1", "--out", str(tmp_path)]

    def step():
        return json.loads((tmp_path / "scores.json").read_text())["checkpoint"]["step"]

    for name, found in (("stage1.pt", 8), ("stage2.pt", 12), (".", 20), ("stage3.pt", 20)):
        assert main(["evaluate", str(runs / "tiny" / name), *data, *out]) == 0
        assert step() == found
    assert main(["evaluate", str(runs / "tiny" / "stage1.pt"), *data, *out]) == 1
    assert "scores.json holds the scores of other weights, step 20: name" in capsys.readouterr().err
    assert step() == 20
    (tmp_path / "scores.json").write_text("half")
    assert main(["evaluate", str(runs / "tiny"), *data, *out]) == 1
    assert "scores.json holds no scores (" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["9", "2"], ids=["while it prints", "at the end"])
def test_a_reader_that_goes_away_is_no_error(runs, step):
    tensors = ["--tensors"] if step == "9" else []
    command = [sys.executable, "-m", "train", "replay", str(runs / "tiny"), "--step", step, *tensors]
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert child.returncode == 141
    assert "pipe" not in child.stderr.lower() and "Traceback" not in child.stderr


@pytest.mark.parametrize("data", ["roofs:hard", "parquet:nowhere", "s3://x", "roofs:easy?dots=3"])
def test_a_wrong_source_is_named(tmp_path, data, capsys):
    assert main(["run", *QUICK, "--runs", str(tmp_path), "--stages.0.data", data]) == 1
    errors = capsys.readouterr().err
    assert data.split("?")[0] in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["fly"], ["compare", "a"], ["evaluate", "a", "--data", "b", "--dat", "c"]])
def test_misuse_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m train" in capsys.readouterr().err


def test_an_unknown_value_of_the_recipe_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--recipe", "tiny", "--stages.0.lrr", "3"])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "--stages.0.lr" in errors
    assert errors.endswith("train run: --help-recipe lists the recipe's values, --help the other flags\n")
    assert "For full helptext" not in errors


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_threads_spin_for_a_short_time_unless_told_otherwise(given, found):
    code = "import sys; import train.__main__, os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment | given, check=True
    )
    assert run.stdout.split() == ["True", found]
