"""What a run of `bench.gpu` found, for one file: timed rows, targets, checks in short, and all else of each part."""

from collections.abc import Mapping
from typing import Any

from bench.gpu_targets import compare
from bench.results import merge


def gather(results: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the parts have found so far, from the content of their files by their names."""
    return {
        **merge(None, [case for result in results.values() for case in result.get("cases", ())], machine),
        "checks": {
            "tests": _tests_in_short(results.get("tests")),
            "repeats": _repeats_in_short(results.get("repeats")),
            "train": _train_in_short(results.get("train")),
            "sanitizer": _sanitizer_in_short(results.get("sanitizer")),
        },
        "targets": compare(results),
        "profiles": results.get("step", {}).get("profiles", {}),
        "details": {
            name: {key: value for key, value in result.items() if key not in ("cases", "profiles")}
            for name, result in results.items()
        },
    }


def _tests_in_short(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found or "counts" not in found:
        return None
    failures = {failure["test"]: failure["message"][0] for failure in found["failures"] if failure["message"]}
    return {**found["counts"], "failures": failures}


def _repeats_in_short(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    swept = found["swept"]
    return {
        "configurations": found["configurations"],
        "swept": len(swept),
        "repeats": max((line["repeats"] for line in swept), default=0),
        "differing": [
            f"{n['operator']} {n['case']}" for n in swept if n["differing"] or n["alone_differs"] or n["not_finite"]
        ],
        "errors": [
            f"{e['operator']} {e['case']}: {e['error']}" if "error" in e else f"{e['worker']}: exit {e['code']}"
            for e in found["errors"]
        ],
        "processes": found["processes"],
    }


def _train_in_short(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found or not found["runs"]:
        return None
    told = {key: found[key] for key in ("updates", "scenes", "killed_after", "resumed_from", "same_bits")}
    return told | {key: found["runs"][0][key] for key in ("weights", "dev_scores", "loss")}


def _sanitizer_in_short(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found or not found.get("tools"):
        return None
    return {
        tool: {
            "configurations": heard["called"],
            "defects": [ended["defects"] for ended in heard["shares"].values()],
            "planted": heard["planted"] and heard["planted"]["defects"],
        }
        for tool, heard in found["tools"].items()
    }
