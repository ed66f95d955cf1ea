"""The README, and the page on GPUs, say what the repository holds: numbers, files, commands."""

import json
import re
import textwrap
from pathlib import Path

import pytest

from bench.readme import GPU_PAGE, REGIONS, fill, gpu_summary, gpus, operators
from bench.results import merge, write_results
from tests.tiny_runs import tiny_recipe, train_quietly
from train.__main__ import main
from train.roofs import generate_scenes
from train.sources import write_npz

ROOT = Path(__file__).resolve().parent.parent
README, ON_GPUS = (ROOT / "README.md").read_text(), GPU_PAGE.read_text()
RESULTS = ROOT / "bench" / "results"


def test_numbers_are_those_of_the_result_files():
    """`python -m bench report` makes them so."""
    assert fill(README) == README and fill(ON_GPUS) == ON_GPUS
    assert set(re.findall(r"<!-- numbers: (\w+) -->", README + ON_GPUS)) == set(REGIONS)


# what the published baseline's authors report
PUBLISHED = {"0.342", "0.379", "0.281", "0.351", "0.382"}
VERSIONS = {"3.11", "3.12", "2.0", "2.11", "2.13", "3.6", "3.9"}


@pytest.mark.parametrize("page", [README, ON_GPUS], ids=["README", "gpu"])
def test_every_measured_number_stands_in_a_region_that_is_checked(page):
    prose = re.sub(r"<!-- numbers: .*?<!-- end -->", "", page, flags=re.DOTALL)
    prose = re.sub(r"`[^`]*`|^    .*$", "", prose, flags=re.MULTILINE)
    units = r"(?:s|ms|µs|us|minutes?|seconds?|hours?|times|x|×|%|TFLOP|GFLOP|GB|MB)"
    found = re.findall(rf"\b\d[\d,]*\.\d+(?:e-?\d+)?\b|\b\d[\d,.]*(?=\s?{units}\b)", prose)
    assert set(found) <= PUBLISHED | VERSIONS, set(found) - PUBLISHED - VERSIONS


def test_a_number_that_was_changed_by_hand_is_found():
    changed = re.sub(r"\| 0\.(\d{3}) \|", "| 9.999 |", README, count=1)
    assert fill(changed) == README != changed


def test_an_operator_is_shown_against_its_fastest_peer(tmp_path):
    group = "attention, cross 256x2048, forward and backward"
    notes = {"suite": "attention", "group": group, "iqr_s": 0.0, "error": "1.0e-06", "same_bits": True}
    notes |= {"items": 4, "dtype": "bfloat16"}
    cases = [
        {**notes, "name": peer, "peer": peer, "median_s": median}
        for peer, median in (("ridgeline", 0.02), ("slow", 0.5), ("fast", 0.03), ("ridgeline, CUDA graph", 0.001))
    ]
    demo = [{**case, "group": group.replace("cross", "demo")} for case in cases]
    write_results(tmp_path / "cpu.json", merge(None, [*cases, *demo], {"cores": 2, "torch": "2.13.0"}))
    *_, row = operators(tmp_path).splitlines()
    assert row == "| cpu | attention, cross 256x2048 | 4 bf16 | 20 ms | fast | 1.50 times ours | yes |"
    write_results(tmp_path / "cpu.json", merge(None, cases[:1], {"cores": 2, "torch": "2.13.0"}))
    assert operators(tmp_path) == "No operator has been timed yet."


def test_an_unknown_region_is_refused():
    with pytest.raises(ValueError, match="must be one of demo, steps, operators, gpu_summary, gpus, got speed"):
        fill("<!-- numbers: speed -->\n<!-- end -->")


def test_a_gpus_targets_are_named_with_what_was_measured_of_them(tmp_path):
    rows = [
        {"name": "a step", "unit": "ms", "target": 4, "least": False, "measured": 4.8765, "met": False},
        {"name": "the fastest peer", "unit": "x", "target": 1, "least": True, "measured": None, "met": None},
    ]
    found = {"machine": {"gpu": "Some GPU"}, "suites": {"step": {"torch": "2.11.0"}}, "cases": [], "targets": rows}
    (tmp_path / "some-gpu.json").write_text(json.dumps(found))
    assert gpus(tmp_path).splitlines()[0] == "Some GPU (torch 2.11.0):"
    assert gpus(tmp_path).splitlines()[-2:] == [
        "| a step | at most 4 ms | 4.88 ms | missed |",
        "| the fastest peer | at least 1 x |  | not measured |",
    ]
    found["targets"] = [rows[0] | {"noise": True}]
    dev = {"scenes": 64, "hss": [0.1, 0.2], "yardsticks": {"label_clusters": 0.3}}
    train = {"updates": [30, 5], "scenes": 9, "same_bits": True, "dev_scores": dev, "killed_after": 15}
    found["checks"] = {"train": train | {"resumed_from": 10}}
    (tmp_path / "some-gpu.json").write_text(json.dumps(found))
    *_, noisy, _, told = gpus(tmp_path).splitlines()
    assert noisy == "| a step | at most 4 ms | 4.88 ms | noise |"
    assert told == (
        "Three stages of 30 and 5 updates on 9 roofs, trained twice, the second time killed after update 15 and "
        "resumed from 10: the same bytes; HSS after each on 64 other roofs: 0.100, 0.200 (label clusters 0.300)."
    )


def test_the_readme_shows_the_designs_targets_of_a_gpu_and_counts_all(tmp_path):
    names = ["tests that fail", "training step", "cross-attention", "attention", "match_segments, wall on one thread"]
    row = {"unit": "ms", "target": 4, "least": False, "measured": 3.0, "met": True}
    rows = [row | {"name": name, "met": name != "attention"} for name in names]
    found = {"machine": {"gpu": "Some GPU"}, "suites": {"step": {"torch": "2.11.0"}}, "cases": [], "targets": rows}
    (tmp_path / "some-gpu.json").write_text(json.dumps(found))
    *_, first, second, _, count = gpu_summary(tmp_path).splitlines()
    assert first.startswith("| training step |") and second.startswith("| cross-attention |")
    assert count == "Of all 5 targets: 4 met, 1 missed."


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


def test_the_demos_digests_stand_where_it_says():
    found = json.loads((RESULTS / "demo-cpu-2core.json").read_text())
    assert "`bench/results/demo-cpu-2core.json` (`weights`)" in README
    assert all(re.fullmatch(r"[0-9a-f]{64}", stage["weights"]) for stage in found["stages"])


def test_the_operators_are_called_as_it_shows():
    (example,) = re.findall(r"^## As a library\n\n(.*?)\n\n`pip", README, re.MULTILINE | re.DOTALL)
    exec(textwrap.dedent(example), names := {})
    shapes = {name: tuple(names[name].shape) for name in ("plan", "row_slack", "col_slack", "o", "y")}
    assert shapes == {
        "plan": (8, 64, 20), "row_slack": (8, 64), "col_slack": (8, 20), "o": (8, 4, 64, 32), "y": (8, 64, 128),
    }  # fmt: skip
    assert names["match"].matched_BN.shape == (8, 64)


def test_rows_of_ones_own_are_scored_and_answered_beside_the_runs_scores(tmp_path, monkeypatch, capsys):
    train_quietly(tiny_recipe(), tmp_path / "runs" / "demo")
    own = tmp_path / "runs" / "demo" / "scores.json"
    own.write_text('{"source": "roofs:easy?points=128#dev"}')
    write_npz(generate_scenes(3, seed=5, points=128, setting="easy"), tmp_path / "DIRECTORY")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(
        r"python -m train (\w+ runs/demo --data npz:DIRECTORY\b.*?)(?:\s+#.*)?$", README, re.MULTILINE
    )
    assert [command.split()[0] for command in commands] == ["evaluate", "predict"]
    for command in commands:
        assert main([*command.split(), "--device", "cpu"]) == 0, capsys.readouterr().err
    assert own.read_text() == '{"source": "roofs:easy?points=128#dev"}'
    assert (tmp_path / "scores" / "scores.json").exists() and (tmp_path / "submission.json").exists()


def test_no_number_of_a_gpu_without_a_result_of_a_gpu():
    measured = [p for p in RESULTS.glob("*.json") if '"gpu"' in p.read_text()]
    if not measured:
        assert "nothing in this repository has been measured\non a GPU yet" in README
        assert not re.search(r"\d\s*(ms|us|µs|TFLOP)", README)
