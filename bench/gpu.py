"""python -m bench.gpu --out DIR [--only PART ...] [--seconds N]: all that a GPU is needed for, in nine minutes.

Needs torch, triton, numpy and pytest, nothing else and no network; what cannot be had without another package, a score
or a peer, says so in its place. Every part is a process with a time bound of its own and writes what it finds as it
finds it, DIR/parts/<part>.json (--parts names another folder), so that a part that fails or is cut loses nothing of it.
All of that is gathered every few seconds into one file, DIR/<device>.json: the machine, all timed rows, the table of
targets, and what was checked.

First what is checked and not timed, side by side: tests, bitwise repeats, a short training twice, once killed and
resumed; meanwhile the other parts compile and check what they will time. Then these get the machine one after the
other, each for itself.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_process import Ended, Sheet, Workers, at_most_every, end_on_sigterm

# from the start of this process to the end of the last part; of it for ending parts that do not end by themselves
TOTAL_S, CUT_S = 525.0, 10.0
# without so much of it nothing can be compiled
LEAST_PREPARE_S = 60.0
_GATHER_EVERY_S = 5.0
# kernels are compiled as for training, whatever is tested or timed; the other is for JAX, where a package other than
# POT imports it: see `bench.peers.POT_ALONE`
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the suite: what it runs, and if it times something, for how many seconds it has the machine for itself.

    `--out FILE` is added; deadlines are handed down by `Workers`. The higher its niceness, the later it gets a
    processor. Not `unasked`: runs only if it is named.
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
    "train": Part(command=_module("bench.gpu_train"), niceness=0),
    "sinkhorn": Part(command=_module("bench.gpu_speed", "sinkhorn", "--processes", "6"), alone_s=28, niceness=5),
    "matching": Part(command=_module("bench.gpu_speed", "matching", "--processes", "6"), alone_s=12, niceness=5),
    # some of its peers compile longest
    "step": Part(command=_module("bench.gpu_step"), alone_s=46, niceness=0),
    "attention": Part(command=_module("bench.gpu_speed", "attention", "--processes", "8"), alone_s=36, niceness=5),
    "points": Part(command=_module("bench.gpu_speed", "points"), alone_s=10, niceness=5),
    "tiles": Part(command=_module("bench.gpu_tiles"), alone_s=60, unasked=False),
    "seams": Part(command=_module("bench.gpu_seams"), alone_s=30, unasked=False),
    "sanitizer": Part(command=_module("bench.gpu_sanitizer"), unasked=False),
    "autotune": Part(
        command=_module("bench.gpu_step", "--ways", "torch.compile, max-autotune"), alone_s=30, unasked=False
    ),
}


def run_parts(
    parts: Mapping[str, Part], into: Path, folder: Path, machine: Mapping[str, Any], *, prepare: float
) -> int:
    """Run parts: all side by side until those that time something are prepared, then these one after the other.

    Args:
        into: the file that gathers what they find.
        folder: of the parts' own files.
        prepare: seconds from now until the first turn, at most.
    Returns:
        How many of them were not green.
    """
    started, red = time.monotonic(), 0
    files = {part_name: folder / f"{part_name}.json" for part_name in parts}
    folder.mkdir(parents=True, exist_ok=True)
    summary = Sheet(into, parts={}, cases=[], targets=[])
    alone = sum(part.alone_s for part in parts.values())
    gather_often = at_most_every(_GATHER_EVERY_S, lambda: _gather(summary, files, machine))
    try:
        with Workers(seconds=alone + CUT_S, prepare=prepare, at_once=len(parts), meanwhile=gather_often) as workers:
            for part_name, part in parts.items():
                files[part_name].unlink(missing_ok=True)
                command = ["nice", "-n", str(part.niceness), *part.command, "--out", str(files[part_name])]
                turn = {"turn_s": part.alone_s} if part.alone_s else {}
                workers.start(part_name, command, ENVIRONMENT, **turn)
            for part_name, ended in workers:
                if not isinstance(ended, Ended):
                    continue
                red += ended.code != 0
                how = {0: "green", None: "cut by the clock"}.get(ended.code, f"exit {ended.code}")
                after = round(time.monotonic() - started, 1)
                print(f"{part_name}: {how} at {after:.0f} s. {ended.tail.rpartition(chr(10))[2][:200]}", flush=True)
                if ended.code not in (0, 1):
                    print("\n".join(f"    {line[:160]}" for line in ended.tail.splitlines()[-6:]), flush=True)
                summary.content["parts"][part_name] = {"ended": how, "seconds": after, "tail": ended.tail[-600:]}
                _gather(summary, files, machine)
    finally:
        # also when this process is told to end: its parts have written what they had
        _gather(summary, files, machine)
    return red


def _gather(summary: Sheet, files: Mapping[str, Path], machine: Mapping[str, Any]) -> None:
    """Put into the summary what the parts have written so far; a fault in that ends no part."""
    from bench.gpu_gathered import gather

    try:
        results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
        summary.content |= gather(results, machine)
        summary.write()
    except Exception as fault:
        print(f"gathering: {fault!r}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if all were green, 1 if not, 2 without a GPU."""
    started = time.monotonic()
    # which takes its time, too
    import torch

    from bench.gpu_targets import format_table
    from bench.results import default_name, installed_versions

    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=as_written)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument("--parts", type=Path, metavar="DIR", help="folder of the parts' own files (OUT/parts)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_S, help=f"time for everything ({TOTAL_S:g}); turns stay as long"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"bench.gpu needs a CUDA device; torch {torch.__version__} of {sys.executable} sees none", file=sys.stderr
        )
        return 2
    parts = {name: part for name, part in PARTS.items() if (name in options.only if options.only else part.unasked)}
    alone = sum(part.alone_s for part in parts.values())
    if (prepare := options.seconds - alone - CUT_S) < LEAST_PREPARE_S:
        parser.error(f"--seconds must be at least {alone + CUT_S + LEAST_PREPARE_S:g} for these parts")
    end_on_sigterm()
    into, machine = options.out / f"{default_name()}.json", installed_versions()
    left = prepare - (time.monotonic() - started)
    red = run_parts(parts, into, options.parts or options.out / "parts", machine, prepare=left)
    print(format_table(json.loads(into.read_text())["targets"]))
    print(f"results in {into}")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
