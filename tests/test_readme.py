"""The README says what the repository holds: its numbers, its files, its commands."""

import json
import re
from pathlib import Path

import pytest

from train.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results"


def demo_table() -> str:
    """The demo's result as the README shows it."""
    run = json.loads((RESULTS / "demo-cpu-2core.json").read_text())
    yardsticks = run["yardsticks"]
    rows = [
        f"| {s['name']} | {s['until']:,} | {s['hss']:.3f} | {s['corner_f1']:.3f} | {s['edge_iou']:.3f} |"
        for s in run["stages"]
    ]
    rows += [
        f"| *label clusters, no learning* | | {yardsticks['label_clusters']:.3f} | | |",
        f"| *truth through post-processing* | | {yardsticks['truth_through_postprocessing']:.3f} | | |",
    ]
    minutes, machine = run["training_seconds"] / 60, run["machine"]
    when = f"({run['date']}, torch {machine['torch']})"
    rows += ["", f"Two cores train it in {minutes:.1f} minutes, evaluation not counted {when}."]
    return "\n".join(["| after stage | steps | HSS | corner F1 | edge IoU |", "| --- | --- | --- | --- | --- |", *rows])


def step_table() -> str:
    """The step times as the README shows them."""
    cases = json.loads((RESULTS / "cpu-2core.json").read_text())["cases"]
    rows = [
        f"| {case['precision']} | {case['median_s']:.2f} s | {case['iqr_s']:.2f} s | {case['error']} |"
        for case in cases
        if case["suite"] == "step" and case["recipe"] == "s23dr"
    ]
    head = ["| precision | median | spread | error of the loss against float64 |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *sorted(rows, reverse=True)])


@pytest.mark.parametrize("table", [demo_table, step_table])
def test_numbers_are_those_of_the_result_files(table):
    assert table() in README


def test_files_it_names_exist():
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|json|txt|sh))`", README))
    folders = ["", "configs", "kernels", "perceiver", "train", "bench", "tests"]
    lost = [name for name in named if not any((ROOT / folder / name).exists() for folder in folders)]
    assert not [name for name in lost if not name.startswith(("certificate", "submission", "scores", "checkpoint"))]


def test_commands_it_names_exist(capsys):
    door = (ROOT / "reproduce.sh").read_text()
    for command in re.findall(r"bash reproduce\.sh ([a-z0-9]+)", README):
        assert re.search(rf"^{command}\b|\b{command} \||\| {command}\b", door, re.MULTILINE), command
    for command in re.findall(r"python -m train (\w+)", README):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0, command
    capsys.readouterr()


def test_no_number_of_a_gpu_without_a_result_of_a_gpu():
    measured = [p for p in RESULTS.glob("*.json") if '"gpu"' in p.read_text()]
    if not measured:
        assert "nothing in this repository has been measured\non a GPU yet" in README
        assert not re.search(r"\d\s*(ms|us|µs|TFLOP)", README)
