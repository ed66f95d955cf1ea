"""python -m bench.gpu --out DIR [--only PART ...] [--seconds N]: all that a GPU is needed for, in nine minutes.

Needs torch, triton, numpy and pytest, no network. Every part is a process with a time bound of its own and writes what
it finds as it finds it, so that a part that fails or is cut loses nothing else: DIR/<part>.json, and DIR/<device>.json
with the machine, all timed rows and the table of targets.

First what is checked and not timed, side by side: tests, bitwise repeats, two short trainings; meanwhile the other
parts compile and check what they will time. Then these get the machine one after the other, each for itself.
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

# a part is told to end so long before it is made to, and to be prepared: it counts from when it has been loaded
_MARGIN_S, _PREPARED_S = 5.0, 45.0
# for everything that is not timed
PREPARE_S = 420.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the suite: what it runs, and if it times something, for how many seconds it has the machine for itself.

    `--out FILE --seconds N` are added, for a part that times something also `--prepare N`. The higher its niceness, the
    later it gets a processor. Not `unasked`: runs only if it is named.
    """

    command: tuple[str, ...]
    alone_s: float = 0.0
    niceness: int = 10
    unasked: bool = True


def _module(*names: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *names)


# in the order in which they have their turns
PARTS = {
    "tests": Part(command=_module("bench.gpu_tests")),
    "repeats": Part(command=_module("bench.gpu_repeats")),
    "train": Part(command=_module("bench.gpu_train")),
    # some of its peers compile longest
    "step": Part(command=_module("bench.gpu_step"), alone_s=45, niceness=0),
    "matching": Part(command=_module("bench.gpu_speed", "matching"), alone_s=12, niceness=5),
    "attention": Part(command=_module("bench.gpu_speed", "attention"), alone_s=35, niceness=5),
    "sinkhorn": Part(command=_module("bench.gpu_speed", "sinkhorn"), alone_s=15, niceness=5),
    "points": Part(command=_module("bench.gpu_speed", "points"), alone_s=12, niceness=5),
    "tiles": Part(command=_module("bench.gpu_tiles"), alone_s=60, unasked=False),
}


def run_parts(parts: Mapping[str, Part], out: Path, name: str, machine: Mapping[str, Any], scale: float = 1.0) -> int:
    """Run parts: all side by side until those that time something are prepared, then these one after the other.

    Returns:
        How many of them were not green.
    """
    started, prepare, red = time.monotonic(), PREPARE_S * scale, 0
    summary = Sheet(out / f"{name}.json", **merge(None, [], machine), parts={}, targets=[])
    alone = sum(part.alone_s for part in parts.values()) * scale
    with Workers(seconds=alone, prepare=prepare, at_once=len(parts)) as workers:
        for part_name, part in parts.items():
            (file := out / f"{part_name}.json").unlink(missing_ok=True)
            seconds = part.alone_s * scale or prepare
            command = ["nice", "-n", str(part.niceness), *part.command, "--out", str(file), "--seconds", _told(seconds)]
            if part.alone_s:
                command += ["--prepare", _told(prepare, _PREPARED_S)]
            workers.start(part_name, command, turn_s=seconds)
        for part_name, ended in workers:
            if not isinstance(ended, Ended):
                continue
            red += ended.code != 0
            how = {0: "green", None: "cut by the clock"}.get(ended.code, f"exit {ended.code}")
            after = round(time.monotonic() - started, 1)
            print(f"{part_name}: {how} at {after:.0f} s. {ended.tail.rpartition(chr(10))[2][:200]}", flush=True)
            if ended.code not in (0, 1):
                print("\n".join(f"    {line[:160]}" for line in ended.tail.splitlines()[-6:]), flush=True)
            summary.content["parts"][part_name] = {"ended": how, "seconds": after}
            _gather(summary, out, machine)
    print(format_table(summary.content["targets"]))
    return red


def _told(seconds: float, margin: float = _MARGIN_S) -> str:
    return f"{max(seconds - margin, seconds / 2):.1f}"


def _gather(summary: Sheet, out: Path, machine: Mapping[str, Any]) -> None:
    """Gather what the parts have written so far."""
    results = {name: json.loads(file.read_text()) for name in PARTS if (file := out / f"{name}.json").exists()}
    content = summary.content
    content |= merge(None, [case for result in results.values() for case in result.get("cases", ())], machine)
    content["checks"] = {
        "tests": _tests_in_short(results.get("tests")),
        "repeats": _repeats_in_short(results.get("repeats")),
        "train": _train_in_short(results.get("train")),
    }
    content["targets"] = compare(results)
    summary.write()


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
        "processes": found["processes"],
    }


def _train_in_short(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found or not found["runs"]:
        return None
    first = found["runs"][0]
    return {"steps_each_stage": found["steps"], "same_bits": found["same_bits"]} | {
        key: first[key] for key in ("weights", "dev_scores", "loss")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if all were green, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, help="time for everything; each share scales")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"bench.gpu needs a CUDA device; torch {torch.__version__} of {sys.executable} sees none", file=sys.stderr
        )
        return 2
    parts = {name: part for name, part in PARTS.items() if (name in options.only if options.only else part.unasked)}
    total = PREPARE_S + sum(part.alone_s for part in parts.values())
    scale = options.seconds / total if options.seconds else 1.0
    red = run_parts(parts, options.out, default_name(), installed_versions(), scale)
    print(f"results in {options.out}")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
