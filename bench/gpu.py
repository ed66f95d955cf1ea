"""python -m bench.gpu --out DIR [--only PART ...] [--seconds N]: all that a GPU is needed for, in nine minutes.

Needs torch, triton, numpy and pytest, no network. Every part is a process with a time bound of its own and writes what
it finds as it finds it, so that a part that fails or is cut loses nothing else: DIR/<part>.json, and DIR/<device>.json
with the machine, all timed rows and the table of targets.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_process import Ended, Sheet, Workers
from bench.gpu_targets import compare, format_table
from bench.results import default_name, installed_versions, merge

# a part is told to end so long before it is made to
_MARGIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the suite: what it runs (`--out FILE --seconds N` are added), for how long, and whether unasked."""

    command: tuple[str, ...]
    seconds: float
    unasked: bool = True


def _module(*names: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *names)


# in the order in which they run
PARTS = {
    "tests": Part(command=_module("bench.gpu_tests"), seconds=130),
    "repeats": Part(command=_module("bench.gpu_repeats"), seconds=95),
    "attention": Part(command=_module("bench.gpu_speed", "attention"), seconds=80),
    "sinkhorn": Part(command=_module("bench.gpu_speed", "sinkhorn"), seconds=30),
    "matching": Part(command=_module("bench.gpu_speed", "matching"), seconds=40),
    "points": Part(command=_module("bench.gpu_speed", "points"), seconds=40),
    "step": Part(command=_module("bench.gpu_step"), seconds=125),
    "tiles": Part(command=_module("bench.gpu_tiles"), seconds=240, unasked=False),
    "train": Part(command=_module("bench.gpu_train"), seconds=240, unasked=False),
}


def run_parts(parts: Mapping[str, Part], out: Path, name: str, machine: Mapping[str, Any], scale: float = 1.0) -> int:
    """Run parts one after the other; what one does not use of its time, the next may.

    Returns:
        How many of them were not green.
    """
    saved, red = 0.0, 0
    summary = Sheet(out / f"{name}.json", **merge(None, [], machine), parts={}, targets=[])
    for part_name, part in parts.items():
        started, bound = time.monotonic(), part.seconds * scale + saved
        file = out / f"{part_name}.json"
        file.unlink(missing_ok=True)
        told = ["--out", str(file), "--seconds", f"{max(bound - _MARGIN_S, bound / 2):.1f}"]
        ended = _run([*part.command, *told], bound)
        used = time.monotonic() - started
        saved = max(bound - used, 0.0)
        red += ended.code != 0
        how = {0: "green", None: "cut by the clock"}.get(ended.code, f"exit {ended.code}")
        print(f"{part_name}: {how} after {used:.0f} s. {ended.tail.rpartition(chr(10))[2][:200]}", flush=True)
        if ended.code not in (0, 1):
            print("\n".join(f"    {line[:160]}" for line in ended.tail.splitlines()[-6:]), flush=True)
        summary.content["parts"][part_name] = {"ended": how, "seconds": round(used, 1)}
        _gather(summary, out, machine)
    print(format_table(summary.content["targets"]))
    return red


def _run(command: Sequence[str], seconds: float) -> Ended:
    with Workers(seconds=seconds, at_once=1) as workers:
        workers.start("part", command)
        for _, heard in workers:
            if isinstance(heard, Ended):
                return heard
    return Ended(code=None, tail="")


def _gather(summary: Sheet, out: Path, machine: Mapping[str, Any]) -> None:
    """Gather what the parts have written so far."""
    results = {name: json.loads(file.read_text()) for name in PARTS if (file := out / f"{name}.json").exists()}
    content = summary.content
    content |= merge(None, [case for result in results.values() for case in result.get("cases", ())], machine)
    content["checks"] = {
        "tests": results.get("tests", {}).get("counts"),
        "repeats": _repeats_in_short(results.get("repeats")),
        "train": results.get("train", {}).get("same_bits"),
    }
    content["targets"] = compare(results)
    summary.write()


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
        "processes": found["processes"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if all were green, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, help="time for all parts together; each part's share scales")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"bench.gpu needs a CUDA device; torch {torch.__version__} of {sys.executable} sees none", file=sys.stderr
        )
        return 2
    parts = {name: part for name, part in PARTS.items() if (name in options.only if options.only else part.unasked)}
    total = sum(part.seconds for part in parts.values())
    scale = options.seconds / total if options.seconds else 1.0
    red = run_parts(parts, options.out, default_name(), installed_versions(), scale)
    print(f"results in {options.out}")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
