"""Small result files: one per device, a line per case, with what is needed to read the number."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]


def default_name() -> str:
    """The device's name as a file name: cpu-<cores>core, or the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}core"


def condense(raw: Mapping[str, Any]) -> Results:
    """Reduce a pytest-benchmark report to medians with their spread.

    Args:
        raw: the parsed JSON report.
    Returns:
        machine: what measured. cases: per benchmark its suite, group, name, median and quartile distance in seconds,
        rounds, and the case's own notes (shapes, error, peer).
    """
    cases = [
        {
            "suite": Path(case["fullname"].split("::")[0]).stem.removeprefix("bench_"),
            "group": case["group"],
            "name": case["name"],
            "median_s": _significant(case["stats"]["median"]),
            "iqr_s": _significant(case["stats"]["iqr"]),
            "rounds": case["stats"]["rounds"],
            **case["extra_info"],
        }
        for case in raw["benchmarks"]
    ]
    return {"machine": describe_machine(raw), "cases": cases}


def describe_machine(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What measured: processor or GPU, versions, commit, day."""
    return {
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"].get("id"),
        "cpu": raw["machine_info"]["cpu"].get("brand_raw", platform.processor()),
        **installed_versions(),
    }


def installed_versions() -> dict[str, Any]:
    """Cores, GPU and the versions that a number depends on."""
    machine: dict[str, Any] = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def write_results(path: Path, results: Results) -> None:
    """Write a result file; cases of suites that were not run now are kept from the file that is there."""
    suites = {case["suite"] for case in results["cases"]}
    old = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = [case for case in old if case["suite"] not in suites] + results["cases"]
    cases.sort(key=lambda case: (case["suite"], case["group"] or "", case["name"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": results["machine"], "cases": cases}, indent=1) + "\n")


def format_results(results: Results) -> str:
    """Return a table for people: medians and quartile distances in milliseconds."""
    rows = [(c["group"] or c["suite"], c["name"], c["median_s"], c["iqr_s"]) for c in results["cases"]]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"{'group':{widths[0]}}  {'case':{widths[1]}}  {'median ms':>10}  {'spread':>8}"]
    for group, name, median, spread in sorted(rows):
        lines.append(f"{group:{widths[0]}}  {name:{widths[1]}}  {1e3 * median:10.3f}  {1e3 * spread:8.3f}")
    return "\n".join(lines)


def _significant(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
