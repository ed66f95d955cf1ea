"""The GPU suite without a GPU: its clocks, its processes and its judgements, on parts made for it."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_process, gpu_repeats, gpu_speed, gpu_step, gpu_targets, gpu_tests
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


TURNS = NOTE + "from bench.gpu_process import wait_for_turn; import time; "


def hear_turns(workers: Workers) -> list[str]:
    return [f"{name} {'ends' if isinstance(heard, Ended) else heard['does']}" for name, heard in workers]


def test_what_is_timed_has_the_machine_for_itself_once_all_are_prepared():
    timing = script(TURNS + "wait_for_turn(); note(does='begins'); time.sleep(0.3); note(does='is done')")
    with Workers(seconds=60, at_once=2) as workers:
        for name in ("a", "b", "c"):
            workers.start(name, timing)
        workers.start("checks", script(TURNS + "time.sleep(1); note(does='checked')"))
        told = hear_turns(workers)
    assert told[:2] == ["checks checked", "checks ends"]
    assert told[2:] == [f"{name} {does}" for name in "abc" for does in ("begins", "is done", "ends")]


def test_what_is_not_prepared_in_time_is_cut_and_so_is_a_turn_that_takes_too_long():
    timing = TURNS + "wait_for_turn(); note(does='begins')"
    with Workers(seconds=60, at_once=8, prepare=3) as workers:
        workers.start("slow to prepare", script(TURNS + "time.sleep(60)"))
        workers.start("slow", script(timing + "; time.sleep(60)"), turn_s=1)
        workers.start("quick", script(timing))
        told = hear_turns(workers)
    assert told == ["slow to prepare ends", "slow begins", "slow ends", "quick begins", "quick ends"]


def test_a_part_whose_workers_are_prepared_waits_for_its_own_turn(tmp_path):
    inner = tmp_path / "part.py"
    inner.write_text(
        f"""
import sys
from bench.gpu_process import Ended, Workers, note
with Workers(seconds=60, at_once=2) as workers:
    for name in "12":
        workers.start(name, [sys.executable, "-c", {TURNS + "wait_for_turn(); note(does='times')"!r}])
    for name, heard in workers:
        if not isinstance(heard, Ended):
            note(does=f"{{name}} {{heard['does']}}")
"""
    )
    with Workers(seconds=60, at_once=4) as workers:
        for name in ("first", "second"):
            workers.start(name, [sys.executable, str(inner)], {"PYTHONPATH": str(Path(gpu.__file__).parent.parent)})
        workers.start("checks", script(TURNS + "time.sleep(2); note(does='checked')"))
        told = hear_turns(workers)
    each = ["1 times", "2 times", "ends"]
    assert told == [
        "checks checked",
        "checks ends",
        *(f"{name} {does}" for name in ("first", "second") for does in each),
    ]


PART = """
import json, sys, time
from pathlib import Path
from bench.gpu_process import wait_for_turn
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"cases": [{"suite": "s", "group": "g", "name": out.stem, "peer": "p", "median_s": 1.0}]}))
"""


def run_planted(parts: dict[str, gpu.Part], out: Path, monkeypatch, scale: float = 1.0) -> tuple[int, dict]:
    monkeypatch.setattr(gpu, "PARTS", parts)
    red = gpu.run_parts(parts, out, "device", {"gpu": "none"}, scale)
    return red, json.loads((out / "device.json").read_text())


def test_a_part_that_fails_or_hangs_loses_nothing_else(tmp_path, monkeypatch, capsys):
    endings = {"fails": "raise SystemExit(3)", "hangs": "time.sleep(60)", "works": "wait_for_turn(); print('all well')"}
    parts = {n: gpu.Part(command=tuple(script(PART + end))) for n, end in endings.items()}
    parts["works"] = dataclasses.replace(parts["works"], alone_s=20)
    monkeypatch.setattr(gpu, "PREPARE_S", 5.0)
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


def test_a_part_is_told_to_end_a_little_before_it_is_made_to(tmp_path, monkeypatch):
    case = "{'suite': 's', 'group': 'g', 'name': out.stem, 'told': sys.argv[3:]}"
    tell = f"out.write_text(json.dumps({{'cases': [{case}]}}))"
    parts = {n: gpu.Part(command=tuple(script(PART + tell)), alone_s=alone) for n, alone in (("one", 0), ("two", 30))}
    monkeypatch.setattr(gpu, "PREPARE_S", 50.0)
    _, summary = run_planted(parts, tmp_path, monkeypatch, scale=2.0)
    one, two = (case["told"] for case in summary["cases"])
    assert one == ["--seconds", "95.0"] and two == ["--seconds", "55.0", "--prepare", "55.0"]


def test_without_a_gpu_the_suite_says_so_and_exits_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_the_parts_that_run_unasked_take_nine_minutes_at_most():
    unasked = [part for part in gpu.PARTS.values() if part.unasked]
    assert gpu.PREPARE_S + sum(part.alone_s for part in unasked) <= 540


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
        "test_products.py",
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
    answers = f"""case "$5" in plain) tell '{case}'; exit 4;; *) exit 5;; esac"""
    answer_as_workers(monkeypatch, tmp_path, answers)
    sheet = Sheet(tmp_path / "matching.json")
    gpu_speed.time_suite("matching", sheet, seconds=20, prepare=20, at_once=9)
    cases = json.loads(sheet.path.read_text())["cases"]
    assert cases[0] == {"group": group, "peer": "ridgeline", "median_s": 1}
    ends = {case["peer"].endswith("torch.compile"): case["refused"] for case in cases[1:]}
    assert ends[True].startswith("exit 5") and ends[False].startswith("exit 4")


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
