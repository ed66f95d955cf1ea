"""Result files: one per device, small, committed; a line of JSON per case, with what is needed to read the number.

machine    processor, cores, GPU and driver
suites     per suite what its cases were measured with: date, commit, torch, Triton, Python
cases      suite, group, name, peer; then median, spread (distance of the quartiles), rounds, error against float64,
           whether a second call gave the same bits, peak memory, sizes; or why there is no number: "refused" is
           what a peer answered, "red" is a result that was wrong; "note" is what else must be known of it
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from train.determinism import triton_version

RESULTS = Path(__file__).parent / "results"
Case = dict[str, Any]
Results = dict[str, Any]
_HARDWARE = ("cpu", "cores", "gpu", "driver")


def default_name() -> str:
    """The device's name as a file name: cpu-<cores>core, or the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}core"


def installed_versions() -> dict[str, Any]:
    """What measures: processor, cores, GPU and its driver, and the versions and the commit that a number depends on."""
    machine: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
    }
    if commit := _first_line("git", "rev-parse", "HEAD"):
        machine["commit"] = commit + ("+" if _first_line("git", "status", "--porcelain", "-uno") else "")
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return machine


def read_lines(path: Path) -> list[Case]:
    """Read the cases that the harness has written so far; the last line may have been cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def merge(results: Results | None, cases: Sequence[Case], machine: Mapping[str, Any], *, part: bool = False) -> Results:
    """Put new cases in the place of old ones.

    Args:
        results: what there is; cases of suites that were not run now are kept.
        machine: what `installed_versions` says where the new cases were measured.
        part: only some cases of these suites were run: keep the others, too, and say that they are older.
    """
    suites = {case["suite"] for case in cases}
    new = {key(case) for case in cases}
    old = [case for case in (results or {}).get("cases", ()) if key(case) not in new]
    kept = [case for case in old if part or case["suite"] not in suites]
    software = {name: value for name, value in machine.items() if name not in _HARDWARE}
    measured = {suite: {"date": date.today().isoformat(), **software} for suite in suites}
    for case in kept if part else ():
        measured.get(case["suite"], {})["part"] = True
    return {
        "machine": {name: machine[name] for name in _HARDWARE if name in machine},
        "suites": dict(sorted(((results or {}).get("suites", {}) | measured).items())),
        "cases": sorted([*kept, *cases], key=key),
    }


def key(case: Case) -> tuple[str, str, str]:
    """What names a case in every result file."""
    return case["suite"], case["group"], case["name"]


def read_results(path: Path) -> Results:
    """Read a result file.

    Raises:
        ValueError: the file is missing or no result file.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a file that python -m bench wrote, got {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("cases"), list):
        raise ValueError(f"{path} must be a file that python -m bench wrote, it has no list of cases")
    return results


def write_results(path: Path, results: Results) -> None:
    """Write a result file, a line per case, so that a change shows as the lines of what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: results[name] for name in ("machine", "suites")}
    cases = ",\n".join(json.dumps(case) for case in results["cases"])
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "cases": [\n{cases}\n ]\n}}\n')


def measured(cases: Iterable[Case]) -> list[Case]:
    """The cases that have a number."""
    return [case for case in cases if "median_s" in case]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(": ")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _first_line(*command: str) -> str:
    """The first line of what a program prints; nothing where it is missing or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.partition("\n")[0].strip() if answer.returncode == 0 else ""
