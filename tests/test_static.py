"""`bench.static` refuses every planted fault, accepts what is clean, and sees the same code in every process."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import triton

from bench.static import Finding, Unit, _committed, _scalar_dots, _write, main, violations
from bench.static_cases import CASES

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_static(*arguments: str, arch: int = 90) -> subprocess.CompletedProcess:
    options = ("--cases", "tests.planted_kernels", "--arch", str(arch))
    command = [sys.executable, "-m", "bench.static", *arguments, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def planted() -> subprocess.CompletedProcess:
    return run_static("--check")


@pytest.mark.parametrize(
    "refusal",
    [
        r"spill/tile/sm_90/_spill_kernel: spills must be at most 0, got \d+ LDL and STL",
        r"atomic/sum/sm_90/_atomic_kernel: atomics are not allowed, got {'(ATOMG|RED)\S*': 1}",
        r"fused/sum/sm_90/_fused_kernel: products must be rounded before lanes add them, got 1 fused",
        r"greedy/stages/sm_90/_greedy_kernel: shared memory must be at most 232448 bytes, got \d+",
        r"missing/raises/sm_90: must compile: NotImplementedError: this operator has no kernel yet",
        r"eager/nothing/sm_90: must compile: launched no kernel",
    ],
)
def test_a_planted_fault_is_refused_by_name_and_rule(planted, refusal):
    assert planted.returncode == 1
    assert re.search(f"^REFUSED {refusal}$", planted.stdout, re.M), planted.stdout + planted.stderr


def test_a_clean_kernel_passes_and_has_the_same_machine_code_in_another_process_and_cache(planted):
    clean = run_static("clean", "--check")
    assert clean.returncode == 0, clean.stdout + clean.stderr
    rows = [re.search(r"^sm_90 +_clean_kernel .* ([0-9a-f]{12})$", run.stdout, re.M) for run in (planted, clean)]
    assert rows[0][0] == rows[1][0]
    assert "REFUSED clean" not in planted.stdout and "REFUSED rounded" not in planted.stdout


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9), reason="has float64 matrix instructions on sm_100"
)
def test_a_dot_without_matrix_instructions_is_refused_where_another_one_has_them():
    refused = run_static("scalar_dot", "--check", arch=100)
    refusal = "scalar_dot/float64/sm_100/_scalar_dot_kernel: a dot must become matrix instructions, got scalar ones"
    assert refused.returncode == 1
    assert f"REFUSED {refusal} for ['f64']" in refused.stdout, refused.stdout + refused.stderr


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 2
    assert "TRITON_INTERPRET must not be set" in capsys.readouterr().err


def test_an_unknown_operator_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("KERNELS_OFFLINE", "TRITON_DISABLE_LINE_INFO"):
        monkeypatch.setenv(name, "1")
    assert main(["sinkhron"]) == 2
    known = ", ".join(sorted({case.operator for case in CASES}))
    assert f"operators must be among {known}, got sinkhron" in capsys.readouterr().err


ROW = {
    "kernel": "_kernel", "registers": 100, "instructions": 1000, "spills": 0, "atomics": {}, "fused_sums": 0,
    "shared": 0, "shared_limit": 1, "scalar_dots": [], "sha256": "0",
}  # fmt: skip
KEY = "op/case/sm_90/_kernel"


def _violations(row, committed=None, allowed=None) -> list[str]:
    finding = Finding(Unit("module", "op", "case", 90), {KEY: ROW | row}, None)
    return list(violations([finding], {KEY: committed} if committed else {}, allowed or {}))


@pytest.mark.parametrize(
    ("dot", "layout", "matrix", "found"),
    [
        ("%a, %b, %c : tensor<64x64xf32", "#blocked1", {}, []),
        ("%a, %b, %c, inputPrecision = tf32 : tensor<64x64xf32", "#blocked1", {}, ["f32"]),
        ("%a, %b, %c : tensor<16x16xbf16", "#blocked", {"HMMA": 1}, ["bf16"]),
        ("%a, %b, %c : tensor<16x16xbf16", "#mma", {"HMMA": 1}, []),
        ("%a, %b, %c : tensor<16x16xbf16", "#mma", {}, ["bf16"]),
    ],
)
def test_only_a_float32_dot_at_ieee_precision_may_do_without_matrix_instructions(dot, layout, matrix, found):
    ttgir = f"%d = tt.dot {dot}, #ttg.dot_op<{{opIdx = 0, parent = {layout}}}>> * tensor<64x64xf32>"
    assert _scalar_dots(SimpleNamespace(ttir=f"%d = tt.dot {dot}> * tensor<64x64xf32>", ttgir=ttgir), matrix) == found


def test_the_same_code_in_two_cases_is_refused_once():
    findings = [
        Finding(Unit("module", "op", case, 90), {f"op/{case}/sm_90/_kernel": ROW | {"spills": 1}}, None)
        for case in ("first", "second")
    ]
    assert [problem.partition(":")[0] for problem in violations(findings, {}, {})] == ["op/first/sm_90/_kernel"]


@pytest.mark.parametrize("quantity", ["registers", "instructions"])
def test_growth_beyond_a_tenth_of_the_committed_result_is_refused(quantity):
    grown = ROW[quantity] * 11 // 10
    assert _violations({quantity: grown}, committed=ROW) == []
    assert _violations({quantity: grown + 1}) == []
    found = _violations({quantity: grown + 1}, committed=ROW)
    assert found == [f"{KEY}: {quantity} must not grow by more than 10 %, got {grown + 1} after {ROW[quantity]}"]


def test_a_result_is_kept_as_it_was_and_only_units_that_ran_again_are_replaced(tmp_path):
    path = tmp_path / "static.json"
    units = [Unit("module", "op", case, 90) for case in ("first", "second")]
    rows = {f"{unit}/_kernel": ROW | {"grid": [1], "bound_us": 1.0, "bound_by": "issue"} for unit in units}
    _write(path, units, rows)
    assert _committed(path) == rows
    assert _committed(tmp_path / "none") == {}
    grown = {f"{units[1]}/_other_kernel": rows[f"{units[1]}/_kernel"] | {"sha256": "1"}}
    _write(path, units[1:], grown)
    assert _committed(path) == {f"{units[0]}/_kernel": rows[f"{units[0]}/_kernel"]} | grown


@pytest.mark.parametrize("place", [90, "case"])
def test_a_spill_passes_only_where_it_is_listed_and_up_to_what_is_listed(place):
    allowed = {("_kernel", place): (8, "why")}
    assert _violations({"spills": 8}, allowed=allowed) == []
    assert _violations({"spills": 9}, allowed=allowed) == [f"{KEY}: spills must be at most 8, got 9 LDL and STL"]
    for other in (80, "other case"):
        assert _violations({"spills": 8}, allowed={("_kernel", other): (8, "why")}) != []
