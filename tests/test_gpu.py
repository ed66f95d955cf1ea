"""The GPU suite without a GPU: its parts and its judgements, on parts made for it."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import (
    gpu,
    gpu_gathered,
    gpu_process,
    gpu_repeats,
    gpu_speed,
    gpu_step,
    gpu_targets,
    gpu_tests,
    results,
)
from bench.gpu_process import Sheet

ROOT = Path(gpu.__file__).parent.parent


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


PART = """
import json, sys, time
from pathlib import Path
from bench.gpu_process import wait_for_turn
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"cases": [{"suite": "s", "group": "g", "name": out.stem, "peer": "p", "median_s": 1.0}]}))
"""


def run_planted(parts: dict[str, gpu.Part], out: Path, prepare: float = 30.0) -> tuple[int, dict]:
    red = gpu.run_parts(parts, out / "device.json", out / "parts", {"gpu": "none"}, prepare=prepare)
    return red, json.loads((out / "device.json").read_text())


def test_a_part_that_fails_or_hangs_loses_nothing_else(tmp_path, capsys):
    endings = {"fails": "raise SystemExit(3)", "hangs": "time.sleep(60)", "works": "wait_for_turn(); print('all well')"}
    parts = {n: gpu.Part(command=tuple(script(PART + end))) for n, end in endings.items()}
    parts["works"] = dataclasses.replace(parts["works"], alone_s=20)
    red, summary = run_planted(parts, tmp_path, prepare=5.0)
    assert red == 2
    assert [case["name"] for case in summary["cases"]] == ["fails", "hangs", "works"]
    assert {n: part["ended"] for n, part in summary["parts"].items()} == {
        "fails": "exit 3",
        "hangs": "cut by the clock",
        "works": "green",
    }
    assert "works: green" in (printed := capsys.readouterr().out) and "all well" in printed
    assert "not measured" in gpu_targets.format_table(summary["targets"])


def test_a_part_is_told_to_end_before_it_is_made_to(tmp_path):
    tell = """
import math, os
from bench.gpu_process import ENDS_BY, PREPARED_BY
told = {name: float(os.environ[name]) - time.monotonic() for name in (ENDS_BY, PREPARED_BY)}
told |= {"turn": wait_for_turn() - time.monotonic()} if told[PREPARED_BY] < math.inf else {}
out.write_text(json.dumps({"cases": [{"suite": "s", "group": "g", "name": out.stem, **told}]}))
"""
    parts = {n: gpu.Part(command=tuple(script(PART + tell)), alone_s=alone) for n, alone in (("one", 0), ("two", 30))}
    _, summary = run_planted(parts, tmp_path, prepare=50.0)
    one, two = summary["cases"]
    assert 40 < one[gpu_process.ENDS_BY] <= 50 and one[gpu_process.PREPARED_BY] == math.inf
    assert 40 < two[gpu_process.PREPARED_BY] <= 50 and two[gpu_process.ENDS_BY] == math.inf
    # what was not needed to prepare is its own
    assert 60 < two["turn"] <= 90


def test_one_file_holds_what_all_parts_found_while_they_still_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GATHER_EVERY_S", 0.2)
    tell = """
case = {"suite": "step", "group": "g", "name": "n", "peer": "p"}
out.write_text(json.dumps({"cases": [case], "profiles": {"s": {"launches": 3}}, "errors": ["why"]}))
time.sleep(60)
"""
    running = tmp_path / "device.json"
    seen = []

    def look() -> None:
        seen.append(json.loads(running.read_text()) if running.exists() else {})
        if seen[-1].get("profiles"):
            raise KeyboardInterrupt

    gather = gpu._gather
    monkeypatch.setattr(gpu, "_gather", lambda *arguments: (gather(*arguments), look()))
    with pytest.raises(KeyboardInterrupt):
        run_planted({"step": gpu.Part(command=tuple(script(PART + tell)), alone_s=20)}, tmp_path)
    assert seen[-1]["profiles"] == {"s": {"launches": 3}} and seen[-1]["details"] == {"step": {"errors": ["why"]}}
    assert [case["name"] for case in seen[-1]["cases"]] == ["n"] and seen[-1]["parts"] == {}


def test_told_to_end_the_suite_gathers_what_its_parts_wrote_while_they_ended(tmp_path):
    part = f"""{PART}
from bench.gpu_process import end_on_sigterm
end_on_sigterm()
text = out.read_text()
try:
    out.with_suffix(".runs").touch()
    time.sleep(60)
finally:
    out.write_text(text.replace('"g"', '"the last group"'))
"""
    suite = f"""
import sys
from pathlib import Path
from bench import gpu
gpu.end_on_sigterm()
parts = {{"one": gpu.Part(command=(sys.executable, "-c", {part!r}))}}
out = Path({str(tmp_path)!r})
gpu.run_parts(parts, out / "device.json", out / "parts", {{}}, prepare=60)
"""
    with subprocess.Popen(script(suite), cwd=ROOT) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "parts" / "one.runs").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=20) == 143
    assert [case["group"] for case in json.loads((tmp_path / "device.json").read_text())["cases"]] == ["the last group"]


def test_a_fault_in_gathering_ends_no_part(tmp_path, capsys):
    tell = "out.write_text('[1]'); print('all well')"
    red, summary = run_planted({"one": gpu.Part(command=tuple(script(PART + tell)))}, tmp_path)
    assert red == 0 and summary["cases"] == []
    assert "gathering: " in (printed := capsys.readouterr().out) and "one: green" in printed


def test_less_time_shortens_what_is_prepared_and_no_turn(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results, "default_name", lambda: "device")
    monkeypatch.setattr(results, "installed_versions", dict)
    monkeypatch.setattr(gpu, "end_on_sigterm", lambda: None)
    seen = {}

    def run(parts, into, folder, machine, *, prepare):
        seen.update(prepare=prepare, alone={part: parts[part].alone_s for part in parts}, folder=folder)
        Sheet(into, targets=gpu_targets.compare({}))
        return 0

    monkeypatch.setattr(gpu, "run_parts", run)
    turns = {part: gpu.PARTS[part].alone_s for part in ("step", "matching")}
    for seconds in (300.0, 400.0):
        assert gpu.main(["--out", str(tmp_path), "--only", *turns, "--seconds", str(seconds)]) == 0
        assert seen["alone"] == turns
        assert seen["prepare"] == pytest.approx(seconds - sum(turns.values()) - gpu.CUT_S, abs=10)
    assert seen["folder"] == tmp_path / "parts" and (tmp_path / "device.json").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", *turns, "--seconds", "100"])


def test_without_a_gpu_the_suite_says_so_and_exits_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_the_parts_that_run_unasked_take_nine_minutes_at_most():
    unasked = [part for part in gpu.PARTS.values() if part.unasked]
    assert gpu.TOTAL_S <= 540 - 15
    assert gpu.TOTAL_S - gpu.CUT_S - sum(part.alone_s for part in unasked) > 300


def row(group: str, peer: str, **clocks: float) -> dict:
    return {"group": group, "peer": peer, **clocks}


def test_the_table_says_what_was_promised_measured_and_met():
    match = "match_segments, 64x64, detached, forward and backward"
    cross = "attention, cross 256x2048, forward and backward"
    found = {
        "tests": {"counts": {"passed": 7, "skipped": 2, "crashed": 1, "unfinished": 2}},
        "matching": {
            "cases": [
                row(match, "ridgeline", median_s=20e-6, wall_median_s=1e-4, wall_one_thread_median_s=5e-5),
                row(match, "log domain", median_s=1.0, wall_median_s=3e-3, wall_one_thread_median_s=2.5e-3),
            ]
        },
        "attention": {
            "cases": [
                row(cross, "ridgeline", median_s=4e-4, iqr_s=1e-5, wall_median_s=4e-3, wall_iqr_s=5e-4),
                row(cross, "flex", median_s=6e-4, iqr_s=1e-5, wall_median_s=3.6e-3, wall_iqr_s=1e-4),
            ]
        },
        "step": {
            "cases": [
                row("training step, 32 x 2048", "ridgeline", median_s=4e-3),
                row("training step, 64 x 4096", "ridgeline", median_s=8e-3),
            ]
        },
    }
    rows = {line["name"]: line for line in gpu_targets.compare(found)}
    assert rows["tests that fail"]["measured"] == 3 and not rows["tests that fail"]["met"]
    match = rows["match_segments, B = 64, forward and backward"]
    assert match["measured"] == pytest.approx(20) and match["ratio"] == pytest.approx(0.8) and match["met"]
    slow = rows["match_segments: eager log domain takes, wall time"]
    assert slow["measured"] == pytest.approx(30) and not slow["met"]
    alone = rows["match_segments: eager log domain takes, wall time on one thread"]
    assert alone["measured"] == pytest.approx(50) and alone["met"]
    assert not rows["cross-attention, 32 x 2048, forward and backward"]["met"]
    fastest = rows["attention, cross 256x2048, forward and backward: the fastest peer timed takes"]
    assert fastest["measured"] == pytest.approx(1.5) and fastest["met"] and not fastest["noise"]
    wall = rows["attention, cross 256x2048, forward and backward: the fastest peer timed takes, wall time"]
    assert wall["measured"] == pytest.approx(0.9) and wall["noise"]
    assert rows["170,000 steps of the recipe at these times"]["measured"] == pytest.approx(
        (125e3 * 4e-3 + 45e3 * 8e-3) / 60
    )
    assert rows["training step, 32 x 2048: torch.compile takes"]["met"] is None
    table = gpu_targets.format_table(list(rows.values()))
    assert table.count("not measured") == sum(line["met"] is None for line in rows.values())
    assert "MISSED" in table and table.count("  noise") == 1


PLANTED_TESTS = """
import os, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "a reason"
def test_is_skipped(): pytest.skip("no")
def test_dies(): os._exit(9)
@pytest.mark.parametrize("i", range(4))
def test_after(i): pass
"""


def test_a_test_that_kills_its_process_is_named_and_the_others_run(tmp_path):
    planted = tmp_path / "test_planted.py"
    planted.write_text(PLANTED_TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    sheet = Sheet(tmp_path / "tests.json")
    gpu_tests.run_tests([str(planted), str(tmp_path / "test_broken.py")], sheet, seconds=100, processes=1)
    found = json.loads(sheet.path.read_text())
    assert found["counts"] == {"passed": 5, "failed": 2, "skipped": 1, "crashed": 1}
    assert found["skipped"] == {"Skipped: no": 1}
    failures = {f["test"].partition("::")[2]: f for f in found["failures"]}
    assert failures["test_dies"]["outcome"] == "crashed" and "ended with 9" in failures["test_dies"]["message"][0]
    assert "a reason" in failures["test_fails"]["message"][0]
    assert "no_such_module" in " ".join(failures["import"]["message"])


def test_tests_that_are_cut_keep_the_outcomes_of_those_that_ended(tmp_path):
    planted = tmp_path / "test_planted.py"
    planted.write_text("import time\ndef test_passes(): pass\ndef test_hangs(): time.sleep(100)\n")
    out = tmp_path / "tests.json"
    command = [sys.executable, "-m", "bench.gpu_tests", str(planted), "--out", str(out), "--processes", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        counts = {}
        while counts != {"passed": 1, "unfinished": 1}:
            assert time.monotonic() < end, counts
            time.sleep(0.1)
            counts = json.loads(out.read_text()).get("counts", {}) if out.exists() else {}
        out.unlink()
        process.terminate()
        assert process.wait(timeout=20) == 143
    assert json.loads(out.read_text())["counts"] == {"passed": 1, "unfinished": 1}


def test_the_tests_of_every_operator_are_found():
    paths = [Path(path).name for path in gpu_tests.operator_tests()]
    # they take longest, and a deadline cuts what comes last
    assert paths[: len(gpu_tests.NEED_A_GPU)] == list(gpu_tests.NEED_A_GPU)
    names = set(paths)
    assert {
        "test_attention.py",
        "test_sinkhorn_small.py",
        "test_matching.py",
        "test_philox.py",
        "test_products.py",
        "test_trace.py",
        "test_equivalence.py::test_two_runs_are_the_same_bits[graph]",
    } <= names
    for test in gpu_tests.NEED_A_GPU:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (gpu_tests.TESTS / file).read_text()


def answer_as_workers(monkeypatch, folder: Path, answers: str) -> None:
    """Let a shell script stand in for the workers' Python; $4 is what the worker is to do."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\ntell() {{ echo "$1" >>"${gpu_process.LINES}"; }}\n{answers}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_each_way_to_a_step_is_a_process_and_what_others_found_stays(tmp_path, monkeypatch):
    case = '{"case": {"suite": "step", "group": "training step, \'"$6"\'", "name": "\'"$4"\'", "median_s": 1}}'
    answers = f"""case "$4 $6" in
        ridgeline*) tell '{case}'; tell '{{"profile": {{"'"$6"'": {{"launches": 3}}}}}}';;
        "eager 32 x 2048") tell '{case}'; echo the reason; exit 1;;
        "eager 64 x 4096") exit 1;;
        torch.compile*) sleep 60;;
    esac"""
    answer_as_workers(monkeypatch, tmp_path, answers)
    sheet = Sheet(tmp_path / "step.json")
    gpu_step.time_ways(
        ["ridgeline", "eager", "torch.compile"], list(gpu_step.SHAPES), sheet, seconds=10, prepare=3, at_once=9
    )
    found = json.loads(sheet.path.read_text())
    rows = {(case["name"], case["group"][-9:]): case for case in found["cases"]}
    assert len(rows) == len(found["cases"]) == 6
    for row in (("ridgeline", "32 x 2048"), ("ridgeline", "64 x 4096"), ("eager", "32 x 2048")):
        assert rows[row]["median_s"] == 1
    assert rows["eager", "64 x 4096"]["refused"] == "exit 1"
    assert rows["torch.compile", "64 x 4096"]["refused"] == "cut by the clock"
    assert found["profiles"]["32 x 2048"]["launches"] == 3 and "the reason" in "".join(found["errors"])


def test_each_compiled_row_is_a_process_and_rows_that_are_missing_say_why(tmp_path, monkeypatch):
    group = "match_segments, 64x64, detached, forward and backward"
    case = f'{{"case": {{"group": "{group}", "peer": "ridgeline", "median_s": 1}}}}'
    answers = f"""case "$5" in ridgeline) tell '{case}'; exit 3;; plain) exit 4;; *) exit 5;; esac"""
    answer_as_workers(monkeypatch, tmp_path, answers)
    sheet = Sheet(tmp_path / "matching.json")
    gpu_speed.time_suite("matching", sheet, seconds=20, prepare=20, at_once=9)
    cases = json.loads(sheet.path.read_text())["cases"]
    assert cases[0] == {"group": group, "peer": "ridgeline", "median_s": 1}
    ends = {(case["peer"] == "ridgeline", "compile" in case["peer"]): case["refused"][:6] for case in cases[1:]}
    assert ends == {(True, False): "exit 3", (False, False): "exit 4", (False, True): "exit 5"}


def test_a_sweep_that_dies_is_followed_by_one_that_goes_on_behind_it(tmp_path, monkeypatch):
    line = '{"operator": "o", "case": "\'"$1"\'", "repeats": 5, "differing": 0, "alone_differs": [], "not_finite": []}'
    answers = f"""sweep() {{ tell '{{"began": "o"}}'; tell '{line}'; }}
    case "$*" in
        *digests) exit 6;;
        *0/1) sweep one; tell '{{"began": "o two"}}'; echo the reason; exit 3;;
        *"0/1 --skip 2")
            tell '{{"began": "o"}}'; tell '{{"operator": "o", "case": "three", "error": "E"}}'; sweep four;;
    esac"""
    answer_as_workers(monkeypatch, tmp_path, answers)
    monkeypatch.setattr(gpu_repeats, "cases", lambda: ["one", "two", "three", "four"])
    sheet = Sheet(tmp_path / "repeats.json")
    gpu_repeats.run_sweeps(sheet, seconds=30, repeats=5, device="cpu", processes=1)
    content = json.loads(sheet.path.read_text())
    assert [line["case"] for line in content["swept"]] == ["one", "four"]
    errors = {error.get("case", error.get("worker")): error for error in content["errors"]}
    assert errors["three"]["error"] == "E" and errors["0/1"]["tail"] == "the reason" and errors["0/1"]["code"] == 3
    assert not gpu_repeats.is_green(content)
    told = gpu_gathered.gather({"repeats": content}, {"gpu": "none"})["checks"]["repeats"]
    assert "o three: E" in told["errors"] and "0/1: exit 3" in told["errors"] and told["swept"] == 2


def test_a_sweep_that_dies_before_its_first_configuration_is_not_started_again(tmp_path, monkeypatch):
    answer_as_workers(monkeypatch, tmp_path, f"echo x >>{tmp_path}/starts; exit 3")
    monkeypatch.setattr(gpu_repeats, "cases", lambda: ["one", "two"])
    sheet = Sheet(tmp_path / "repeats.json")
    gpu_repeats.run_sweeps(sheet, seconds=30, repeats=5, device="cpu", processes=2)
    assert len((tmp_path / "starts").read_text()) == 2 * (2 + len(gpu_repeats.HASH_SEEDS))


def test_the_sweep_is_green_only_when_everything_was_swept_and_agrees(tmp_path, monkeypatch):
    swept = '{"operator": "o", "case": "c", "repeats": 5, "differing": 0, "alone_differs": [], "not_finite": []}'
    fresh = '{"digests": {"a": "1"}, "cubins": {"k": ["x"]}}'
    answers = f"""for last; do :; done
    case "$last" in digests) tell '{fresh}';; 0/2) tell '{swept}'; tell '{swept}';; 1/2) exit "${{CODE:-0}}";; esac"""
    answer_as_workers(monkeypatch, tmp_path, answers)
    monkeypatch.setattr(gpu_repeats, "cases", lambda: ["one", "two"])
    for code in ("0", "3"):
        monkeypatch.setenv("CODE", code)
        sheet = Sheet(tmp_path / "repeats.json")
        gpu_repeats.run_sweeps(sheet, seconds=30, repeats=5, device="cpu", processes=2)
        assert gpu_repeats.is_green(sheet.content) and len(sheet.content["errors"]) == (code == "3")
    for change in (
        {"swept": sheet.content["swept"][:1]},
        {"swept": [{**line, "differing": 1} for line in sheet.content["swept"]]},
        {"processes": {**sheet.content["processes"], "processes": 2}},
        {"processes": {**sheet.content["processes"], "differing_cubins": ["k"]}},
    ):
        assert not gpu_repeats.is_green({**sheet.content, **change})
