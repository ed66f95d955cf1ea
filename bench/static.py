"""What the compiler makes of every kernel, on a machine without a GPU, and the rules it must keep.

    python -m bench.static [OPERATOR ...] [--arch 80 89 90] [--full] [--check] [--write]
    python -m bench.static step [...]       a whole training step, see `bench.static_step`

Every launch of the cases in `bench.static_cases` is compiled for GPUs that are not there (`bench.offline`), and its
machine code is read (`bench.cubin`). `--write` keeps the result in results/static-<triton>.json; results are compared
only within one Triton release, because another one makes other code. `--check` exits with 1 if

    a case does not compile, or launches no kernel
    a launch spills registers (LDL, STL) beyond what SPILLS_ALLOWED lists with a reason
    it uses atomic operations; sm_100 may use those on shared memory that allocate tensor memory
    it asks for more shared memory than a block may have
    it has a dot but no matrix instruction, unless all its dots are float32 at ieee precision
    its registers or instructions grew by more than a tenth against the committed result

Each run compiles into a fresh cache folder, so nothing stale counts. The times are lower bounds, see `bench.cubin`. The
hash of a kernel's machine code is the same in every run but where ptxas names registers at random: on sm_100, and in
the TF32 form of attention's gradients of keys and values on sm_90.
"""

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 89, 90)
FULL_ARCHITECTURES = (80, 86, 89, 90, 100)
PROCESSES = 2
GROWTH = 1.1
# what differs between launches of the same machine code
LAUNCH = ("sha256", "grid", "bound_us", "bound_by")


class Unit(NamedTuple):
    """One case compiled for one architecture, by one process."""

    module: str
    operator: str
    case: str
    arch: int

    def __str__(self) -> str:
        return f"{self.operator}/{self.case}/sm_{self.arch}"


class Finding(NamedTuple):
    """What became of a unit: a row per distinct launch by its key, or why there is none."""

    unit: Unit
    rows: dict[str, dict[str, Any]]
    error: str | None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from bench.offline import prepare_environment

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["step"]:
        return importlib.import_module("bench.static_step").main(arguments[1:])
    options = _parse(arguments)
    try:
        prepare_environment()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    cases = importlib.import_module(options.cases)
    known = sorted({case.operator for case in cases.CASES})
    if not set(options.operators) <= set(known):
        print(f"operators must be among {', '.join(known)}, got {', '.join(options.operators)}", file=sys.stderr)
        return 2
    units = [
        Unit(options.cases, case.operator, case.name, arch)
        for case in cases.CASES
        if (options.full or not case.full) and (not options.operators or case.operator in options.operators)
        for arch in options.arch
    ]
    started = time.perf_counter()
    findings = []
    for finding in survey(units):
        _print_rows(finding, heading=not findings or finding.unit[:3] != findings[-1].unit[:3])
        findings.append(finding)
    rows = {key: row for finding in findings for key, row in finding.rows.items()}
    print(f"{len(rows)} launches of {len(units)} cases in {time.perf_counter() - started:.0f} s")
    path = _result_path()
    problems = list(violations(findings, _committed(path), cases.SPILLS_ALLOWED))
    for problem in problems:
        print(f"REFUSED {problem}")
    if options.write:
        _write(path, units, rows)
    return 1 if options.check and problems else 0


def survey(units: list[Unit]) -> Iterator[Finding]:
    """Compile all units from a cold cache and yield what was found, in their order."""
    with tempfile.TemporaryDirectory(prefix="triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # new processes, not forked ones: each reads the environment before it imports triton
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(PROCESSES, len(units)), mp_context=context) as pool:
            yield from pool.map(_survey_unit, units)


def violations(
    findings: list[Finding],
    committed: dict[str, dict[str, Any]],
    spills_allowed: dict[tuple[str, int | str], tuple[int, str]],
) -> Iterator[str]:
    """Yield a line for each rule that a launch breaks: what, which rule, by how much; the same code only once.

    Args:
        committed: rows by key of the same Triton release, to compare with; may be empty.
        spills_allowed: (kernel, architecture or case) -> (spilling instructions accepted, reason).
    """
    seen: set[str] = set()
    for finding in findings:
        if finding.error:
            yield f"{finding.unit}: must compile: {finding.error}"
        for key, row in finding.rows.items():
            if row["sha256"] in seen:
                continue
            seen.add(row["sha256"])
            places = (finding.unit.arch, finding.unit.case)
            allowed = max(spills_allowed.get((row["kernel"], place), (0, ""))[0] for place in places)
            if row["spills"] > allowed:
                yield f"{key}: spills must be at most {allowed}, got {row['spills']} LDL and STL"
            if row["atomics"]:
                yield f"{key}: atomics are not allowed, got {row['atomics']}"
            if row["fused_sums"]:
                yield f"{key}: products must be rounded before lanes add them, got {row['fused_sums']} fused"
            if row["shared"] > row["shared_limit"]:
                yield f"{key}: shared memory must be at most {row['shared_limit']} bytes, got {row['shared']}"
            if row["scalar_dots"]:
                yield f"{key}: a dot must become matrix instructions, got scalar ones for {row['scalar_dots']}"
            for quantity in ("registers", "instructions"):
                before = committed.get(key, row)[quantity]
                if row[quantity] > GROWTH * before:
                    yield f"{key}: {quantity} must not grow by more than 10 %, got {row[quantity]} after {before}"


def _survey_unit(unit: Unit) -> Finding:
    import torch

    from bench import offline

    torch.set_num_threads(1)
    cases = importlib.import_module(unit.module).CASES
    case = next(case for case in cases if (case.operator, case.name) == (unit.operator, unit.case))
    try:
        with offline.gpu(unit.arch) as launches:
            case.run()
    except Exception as error:  # whatever a compiler or an operator that is not there yet raises is the finding
        last_line = (str(error).strip().splitlines() or [""])[-1]
        return Finding(unit, {}, f"{type(error).__name__}: {last_line}")
    if not launches:
        return Finding(unit, {}, "launched no kernel")
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches:
        row = _row(launch, unit.arch, case)
        same = [key for key in rows if rows[key]["kernel"] == launch.kernel]
        if all(rows[key] != row for key in same):
            rows[f"{unit}/{launch.kernel}" + (f"#{len(same) + 1}" if same else "")] = row
    return Finding(unit, rows, None)


def _row(launch, arch: int, case) -> dict[str, Any]:
    from bench import cubin

    gpu, code = cubin.GPUS[arch], cubin.read(launch.cubin)
    mix, matrix = code.mix(), code.opcodes("matrix")
    blocks, limiter = cubin.occupancy(gpu, code.registers, launch.warps, launch.shared_bytes)
    bound_us, bound_by = cubin.time_bound_us(
        gpu,
        code,
        programs=launch.programs,
        warps=launch.warps,
        tensor_bytes=launch.tensor_bytes,
        trips=case.trips(launch),
        main_loop=case.main_loop,
    )
    atomics = code.opcodes("atomic")
    if not any(opcode.startswith("UTCATOMSWS") for _, opcode in code.instructions):
        atomics |= code.opcodes("shared atomic")
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "warps": launch.warps,
        "registers": code.registers,
        "spills": mix.get("spill", 0),
        "stack": code.stack_bytes,
        "shared": launch.shared_bytes,
        "shared_limit": gpu.shared_bytes_per_block,
        "blocks": blocks,
        "occupancy": round(blocks * launch.warps / gpu.warps, 3),
        "limiter": limiter,
        "instructions": len(code.instructions),
        "mix": mix,
        "matrix": matrix,
        "scalar_dots": _scalar_dots(launch, matrix),
        "atomics": atomics,
        "fused_sums": code.fused_sums,
        "bound_us": round(bound_us, 2),
        "bound_by": bound_by,
        "sha256": code.sha256,
    }


def _scalar_dots(launch, matrix_instructions: dict[str, int]) -> list[str]:
    """Return the operand types of dots that are not on matrix units, but for float32 at ieee precision."""
    # after layouts are chosen, a dot left in a blocked layout is one of multiply-adds
    scalar = r"tt\.dot (.*?) : tensor<[\dx]*x(\w+), #ttg\.dot_op<{opIdx = 0, parent = #blocked"
    found = re.findall(scalar, launch.ttgir)
    if not matrix_instructions:
        found += re.findall(r"tt\.dot (.*?) : tensor<[\dx]*x(\w+)>", launch.ttir)
    return sorted({dtype for operands, dtype in found if dtype != "f32" or "inputPrecision" in operands})


def _print_rows(finding: Finding, *, heading: bool) -> None:
    form = "{:6} {:30} {:10} {:>5} {:>4} {:>6} {:>5} {:>6} {:>7} {:15} {:>6} {:>6} {:>9} {:17} {}"
    columns = "arch kernel grid warps regs spills stack shared blk/SM limiter instr matrix bound_us bound_by sha256"
    unit = finding.unit
    if heading:
        print(f"\n{unit.operator}, {unit.case}", form.format(*columns.split()), sep="\n")
    if finding.error:
        print(f"sm_{unit.arch} {finding.error}")
    for row in finding.rows.values():
        cells = [f"sm_{unit.arch}", row["kernel"], "x".join(map(str, row["grid"]))]
        cells += [row[name] for name in ("warps", "registers", "spills", "stack", "shared")]
        cells += [
            f"{row['blocks']} {row['occupancy']:.0%}",
            row["limiter"].replace(" + ", "+")[:15],
            row["instructions"],
        ]
        cells += [sum(row["matrix"].values()), f"{row['bound_us']:.2f}", row["bound_by"], row["sha256"][:12]]
        print(form.format(*cells), flush=True)


def _result_path() -> Path:
    import triton

    return RESULTS / f"static-{triton.__version__}.json"


def _committed(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a result file by key; there is none for a Triton release that nobody kept."""
    kept = _sections(path)
    return {key: kept["code"][row["sha256"]] | row for key, row in kept.get("launches", {}).items()}


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a result file holds: "code" by hash, "launches" and "steps" by key; nothing where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, units: list[Unit], rows: dict[str, dict[str, Any]]) -> None:
    """Replace the rows of these units and keep those of others: sorted, one line per launch and per machine code."""
    replaced = {str(unit) for unit in units}
    rows = {key: row for key, row in _committed(path).items() if key.rpartition("/")[0] not in replaced} | rows
    launches = {key: {name: row[name] for name in LAUNCH} for key, row in rows.items()}
    code = {row["sha256"]: {name: row[name] for name in row if name not in LAUNCH} for row in rows.values()}
    _save(path, _sections(path) | {"code": code, "launches": launches})


def _save(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    path.write_text("{\n" + ",\n".join(f'"{name}": {_lines(rows)}' for name, rows in sections.items()) + "\n}\n")


def _lines(rows: dict[str, dict[str, Any]]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())) + "\n}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="default: all in the table of cases")
    parser.add_argument("--arch", nargs="+", type=int, choices=FULL_ARCHITECTURES, help="compute capabilities, as 90")
    parser.add_argument("--full", action="store_true", help="also the cases and architectures kept out of CI")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a rule is broken")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--cases", default="bench.static_cases", help="module with CASES and SPILLS_ALLOWED")
    options = parser.parse_args(arguments)
    options.arch = options.arch or (FULL_ARCHITECTURES if options.full else ARCHITECTURES)
    return options


if __name__ == "__main__":
    sys.exit(main())
