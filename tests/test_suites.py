"""The harness of the benchmarks: a wrong result has no number, a refusal is kept, what was measured is never lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import SUITES, main
from bench.results import merge, read_lines, read_results, write_results

PLANTED = Path(__file__).parent / "planted_cases.py"


def run_planted(lines: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the planted cases in a process of their own, as `python -m bench` runs a suite."""
    code = f"import sys; from bench.__main__ import run_suite as run; sys.exit(run({str(PLANTED)!r}, {str(lines)!r}))"
    # a worker of xdist says so to its children, and pytest-benchmark then times nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = inherited | {"PYTEST_ADDOPTS": "-p bench.conftest"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    lines = tmp_path_factory.mktemp("planted") / "lines"
    answer = run_planted(lines)
    return answer, {case["name"]: case for case in read_lines(lines)}


def test_a_right_case_has_a_number_and_what_is_needed_to_read_it(planted):
    case = planted[1]["bench_right"]
    assert 0.002 <= case["median_s"] < 0.5
    assert case["rounds"] >= 5 and case["iqr_s"] >= 0
    assert (case["error"], case["same_bits"], case["bytes"], case["flops"]) == ("0.0e+00", True, 16, 2)
    assert (case["suite"], case["group"], case["peer"]) == ("planted_cases", "planted", "ridgeline")


@pytest.mark.parametrize(("name", "error"), [("bench_wrong", "5.0e-03"), ("bench_not_finite", "inf")])
def test_a_wrong_operator_is_red_and_has_no_number(planted, name, error):
    answer, cases = planted
    assert answer.returncode == 1
    assert cases[name]["red"] == f"relative error {error}, must be at most 1e-03"
    assert "median_s" not in cases[name]
    assert "RED: relative error 5.0e-03" in answer.stdout


def test_a_peer_that_is_not_installed_or_refuses_is_kept_with_its_reason(planted):
    answer, cases = planted
    assert cases["bench_refused[absent]"]["refused"] == "not installed"
    assert cases["bench_refused[picky]"]["refused"] == "wants a power of two"
    assert "median_s" not in cases["bench_refused[picky]"]
    assert "not installed" in answer.stdout


def test_our_own_operator_may_not_refuse(planted):
    answer, cases = planted
    assert "bench_broken" not in cases
    assert "RED  bench_broken" in answer.stdout


def test_other_bits_in_a_second_call_are_seen(planted):
    assert planted[1]["bench_changing"]["same_bits"] is False
    assert planted[1]["bench_moving"]["same_bits"] is True


def test_a_slower_operator_is_found_by_compare(planted, tmp_path, capsys):
    assert run_planted(tmp_path / "lines", PLANTED_DELAY_S="0.05").returncode == 1
    for name, cases in (("a", planted[1].values()), ("b", read_lines(tmp_path / "lines"))):
        write_results(tmp_path / name, merge(None, list(cases), {"cores": 2}))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert re.search(r"^planted: ridgeline .*x  slower$", capsys.readouterr().out, re.M)


def test_what_was_measured_before_a_crash_is_kept(tmp_path):
    answer = run_planted(tmp_path / "lines", PLANTED_FATAL="1")
    assert answer.returncode == 1
    assert "bench_right" in {case["name"] for case in read_lines(tmp_path / "lines")}


def test_a_suite_that_fails_keeps_its_numbers_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    ran = []

    def run_suite(path, lines, select, seconds):
        ran.append(path.stem)
        case = {"suite": path.stem.removeprefix("bench_"), "group": "g", "name": "n", "peer": "ridgeline"}
        lines.write_text(json.dumps({**case, "median_s": 1.0, "iqr_s": 0.1}) + "\n" + '{"suite": "cut in the mid')
        return int(path.stem == "bench_sinkhorn")

    monkeypatch.setattr("bench.__main__.run_suite", run_suite)
    assert main(["sinkhorn", "trace", "--out", str(tmp_path / "out.json")]) == 1
    assert ran == ["bench_sinkhorn", "bench_trace"]
    results = json.loads((tmp_path / "out.json").read_text())
    assert [case["suite"] for case in results["cases"]] == ["sinkhorn", "trace"]
    assert set(results["suites"]["trace"]) >= {"date", "torch", "triton", "python"}
    assert "1 cases kept in" in capsys.readouterr().out


def test_an_interrupted_suite_keeps_its_numbers(tmp_path, monkeypatch):
    def run_suite(path, lines, select, seconds):
        lines.write_text('{"suite": "trace", "group": "g", "name": "n", "peer": "p", "median_s": 1.0}\n')
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.__main__.run_suite", run_suite)
    with pytest.raises(KeyboardInterrupt):
        main(["trace", "--out", str(tmp_path / "out.json")])
    assert len(read_results(tmp_path / "out.json")["cases"]) == 1


def test_an_unknown_suite_is_misuse(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sinkhron"])
    assert stop.value.code == 2
    assert f"unknown suite 'sinkhron'; there are {', '.join(SUITES)}" in capsys.readouterr().err
