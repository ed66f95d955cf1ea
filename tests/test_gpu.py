"""The GPU suite without a GPU: its clocks, its processes and its judgements, on parts made for it."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_process, gpu_repeats, gpu_step, gpu_targets, gpu_tests
from bench.gpu_process import Ended, Sheet, Workers


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def hear(commands: dict[str, list[str]], seconds: float, at_once: int = 4) -> tuple[list, dict[str, Ended]]:
    """All lines in the order of their arrival, and how each command ended."""
    lines, ends = [], {}
    with Workers(seconds=seconds, at_once=at_once) as workers:
        for name, command in commands.items():
            workers.start(name, command)
        for name, heard in workers:
            if isinstance(heard, Ended):
                ends[name] = heard
            else:
                lines.append((name, heard))
    return lines, ends


NOTE = "from bench.gpu_process import note; "


def test_workers_are_heard_line_by_line_and_end_with_their_code():
    failing = script(NOTE + "note(value=1); note(value=2); print('the reason'); raise SystemExit(7)")
    lines, ends = hear({"a": failing, "b": script("pass")}, seconds=60)
    assert lines == [("a", {"value": 1}), ("a", {"value": 2})]
    assert ends == {"a": Ended(code=7, tail="the reason"), "b": Ended(code=0, tail="")}


def test_a_hanging_worker_is_cut_with_its_children_and_keeps_its_lines(tmp_path):
    sleeper = f"import time; time.sleep(60)  # {tmp_path}"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{sleeper}']); "
    started = time.monotonic()
    lines, ends = hear({"a": script(NOTE + child + "note(found=3); time.sleep(60)")}, seconds=3)
    assert time.monotonic() - started < 20
    assert lines == [("a", {"found": 3})] and ends["a"].code is None
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(str(tmp_path).encode() in command for command in commands)


def test_workers_that_there_was_no_time_to_start_are_named():
    _, ends = hear({"a": script("import time; time.sleep(60)"), "b": script("pass")}, seconds=0.5, at_once=1)
    assert [end.code for end in ends.values()] == [None, None] and "no time" in ends["b"].tail


PART = """
import json, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"cases": [{"suite": "s", "group": "g", "name": out.stem, "peer": "p", "median_s": 1.0}]}))
"""


def run_planted(parts: dict[str, gpu.Part], out: Path, monkeypatch, scale: float = 1.0) -> tuple[int, dict]:
    monkeypatch.setattr(gpu, "PARTS", parts)
    red = gpu.run_parts(parts, out, "device", {"gpu": "none"}, scale)
    return red, json.loads((out / "device.json").read_text())


def test_a_part_that_fails_or_hangs_loses_nothing_else(tmp_path, monkeypatch, capsys):
    endings = {"fails": "raise SystemExit(3)", "hangs": "time.sleep(60)", "works": "print('all well')"}
    parts = {n: gpu.Part(command=tuple(script(PART + end)), seconds=20) for n, end in endings.items()}
    parts["hangs"] = dataclasses.replace(parts["hangs"], seconds=-15.0)
    red, summary = run_planted(parts, tmp_path, monkeypatch)
    assert red == 2
    assert [case["name"] for case in summary["cases"]] == ["fails", "hangs", "works"]
    assert {n: part["ended"] for n, part in summary["parts"].items()} == {
        "fails": "exit 3",
        "hangs": "cut by the clock",
        "works": "green",
    }
    assert (
        "works: green" in (printed := capsys.readouterr().out) and "all well" in printed and "not measured" in printed
    )


def test_time_that_a_part_does_not_use_is_the_next_ones(tmp_path, monkeypatch):
    case = "{'suite': 's', 'group': 'g', 'name': out.stem, 'told': float(sys.argv[-1])}"
    tell = f"out.write_text(json.dumps({{'cases': [{case}]}}))"
    parts = {n: gpu.Part(command=tuple(script(PART + tell)), seconds=10) for n in ("first", "second")}
    _, summary = run_planted(parts, tmp_path, monkeypatch, scale=2.0)
    first, second = (case["told"] for case in summary["cases"])
    assert first == 15 and 20 < second <= 35


def test_without_a_gpu_the_suite_says_so_and_exits_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_the_parts_that_run_unasked_take_nine_minutes_at_most_and_leave_eight_files():
    unasked = [part for part in gpu.PARTS.values() if part.unasked]
    assert sum(part.seconds for part in unasked) <= 540
    assert len(unasked) + 1 <= 8


def row(group: str, peer: str, **clocks: float) -> dict:
    return {"group": group, "peer": peer, **clocks}


def test_the_table_says_what_was_promised_measured_and_met():
    match = "match_segments, 64x64, detached, forward and backward"
    cross = "attention, cross 256x2048, forward and backward"
    results = {
        "tests": {"counts": {"passed": 7, "skipped": 2, "crashed": 1, "unfinished": 2}},
        "matching": {
            "cases": [
                row(match, "ridgeline", median_s=20e-6, wall_median_s=1e-4),
                row(match, "log domain", median_s=1.0, wall_median_s=3e-3),
            ]
        },
        "attention": {"cases": [row(cross, "ridgeline", median_s=4e-4), row(cross, "flex", median_s=6e-4)]},
        "step": {
            "cases": [
                row("training step, 32 x 2048", "ridgeline", median_s=4e-3),
                row("training step, 64 x 4096", "ridgeline", median_s=8e-3),
            ]
        },
    }
    rows = {line["name"]: line for line in gpu_targets.compare(results)}
    assert rows["tests that fail"]["measured"] == 3 and not rows["tests that fail"]["met"]
    found = rows["match_segments, B = 64, forward and backward"]
    assert found["measured"] == pytest.approx(20) and found["ratio"] == pytest.approx(0.8) and found["met"]
    slow = rows["match_segments: eager log domain takes, wall time"]
    assert slow["measured"] == pytest.approx(30) and not slow["met"]
    assert not rows["cross-attention, 32 x 2048, forward and backward"]["met"]
    assert rows["attention, cross 256x2048, forward and backward: the fastest peer timed takes"][
        "measured"
    ] == pytest.approx(1.5)
    assert rows["170,000 steps of the recipe at these times"]["measured"] == pytest.approx(
        (125e3 * 4e-3 + 45e3 * 8e-3) / 60
    )
    assert rows["training step, 32 x 2048: torch.compile takes"]["met"] is None
    table = gpu_targets.format_table(list(rows.values()))
    assert table.count("not measured") == sum(line["met"] is None for line in rows.values())
    assert "MISSED" in table


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
    failures = {f["test"].partition("::")[2]: f for f in found["failures"]}
    assert failures["test_dies"]["outcome"] == "crashed" and "ended with 9" in failures["test_dies"]["message"][0]
    assert "a reason" in failures["test_fails"]["message"][0]
    assert "no_such_module" in " ".join(failures["import"]["message"])


def test_the_tests_of_every_operator_are_found():
    names = {Path(path).name for path in gpu_tests.operator_tests()}
    assert {
        "test_attention.py",
        "test_sinkhorn_small.py",
        "test_matching.py",
        "test_philox.py",
        "test_trace.py",
    } <= names


def test_a_sheet_is_whole_at_every_moment(tmp_path):
    sheet = Sheet(tmp_path / "new" / "sheet.json", a=1)
    sheet.content["b"] = object()
    with pytest.raises(TypeError):
        sheet.write()
    assert json.loads(sheet.path.read_text()) == {"a": 1}
    assert gpu_process.LINES not in os.environ


def answer_as_workers(monkeypatch, folder: Path, answers: str) -> None:
    """Let a shell script stand in for the workers' Python; $4 is what the worker is to do."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\ntell() {{ echo "$1" >>"${gpu_process.LINES}"; }}\n{answers}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_each_way_to_a_step_has_its_own_bound_and_what_it_found_before_stays(tmp_path, monkeypatch):
    case = '{"case": {"suite": "step", "group": "training step, 32 x 2048", "peer": "\'"$4"\'", "median_s": 1}}'
    answers = f"""case "$4" in
        ridgeline) tell '{case}'; tell '{{"profile": {{"32 x 2048": {{"launches": 3}}}}}}';;
        eager) tell '{case}'; echo the reason; exit 1;;
        torch.compile) if [ "$5" = --once ]; then exit 0; fi; tell '{case}'; sleep 60;;
    esac"""
    answer_as_workers(monkeypatch, tmp_path, answers)
    monkeypatch.setitem(gpu_step.WAYS, "torch.compile", 0.05)
    sheet = Sheet(tmp_path / "step.json")
    gpu_step.time_ways(["ridgeline", "eager", "torch.compile"], list(gpu_step.SHAPES), sheet, seconds=30)
    found = json.loads(sheet.path.read_text())
    rows = {(case["peer"], case["group"][-9:]): case for case in found["cases"]}
    assert [rows[way, "32 x 2048"]["median_s"] for way in ("ridgeline", "eager", "torch.compile")] == [1, 1, 1]
    assert rows["eager", "64 x 4096"]["refused"] == "exit 1"
    assert rows["torch.compile", "64 x 4096"]["refused"] == "cut by the clock"
    assert ("ridgeline", "64 x 4096") not in rows and found["profiles"]["32 x 2048"]["launches"] == 3
    assert found["compiling"] == {} and "the reason" in found["errors"][0]


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
