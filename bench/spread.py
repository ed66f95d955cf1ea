"""python -m bench compare A B: what became slower or faster between two result files.

A difference of two medians is noise unless it is larger than both spreads together, the distances of the quartiles.
Noise is counted, not listed, unless --all is given.

Exit code 0: nothing of ours became slower beyond the noise, and every number of ours in A has one in B.
          1: something did, or lost its number (a red check, a case that is gone, another clock).
          2: a file cannot be read, or the files have no case in common.
Peers are compared, too, but do not count: what others do is no regression of ours.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.peers import OURS
from bench.results import Case, Results, key, measured, read_results


class Ratio(NamedTuple):
    """A peer's time over ours; noise is one inside both spreads, wall one of wall times beside other clocks."""

    value: float
    noise: bool
    wall: bool = False


class Change(NamedTuple):
    """One case in two files; `verdict` is noise, slower, faster or lost."""

    name: str
    ours: bool
    verdict: str
    before: Case
    after: Case | None

    @property
    def ratio(self) -> float:
        """How many times as long it takes."""
        return self.after["median_s"] / self.before["median_s"] if self.after else float("nan")


def compare(before: Results, after: Results) -> Iterator[Change]:
    """Yield what became of each case of `before` that has a number, in the order of the file.

    Suites that were not run for `after` are left out.
    """
    numbers = {key(case): case for case in measured(after["cases"])}
    suites = {case["suite"] for case in after["cases"]}
    for case in measured(before["cases"]):
        if case["suite"] not in suites:
            continue
        now = numbers.get(key(case))
        ours, name = case["peer"].startswith(OURS.name), f"{case['group']}: {case['peer']}"
        yield Change(name, ours, judge(case, now), case, now)


def ratio(ours: Case, peer: Case) -> Ratio | None:
    """Return the peer's time over ours on a clock that both have; None if there is none.

    Replays of a graph are the kernels' time and say nothing of what is launched one by one: unless both are replays,
    or both have the only clock of a CPU or of a step, their wall times are divided.
    """
    clocks = {_clock(ours), _clock(peer)}
    if len(clocks) == 1 and clocks != {"stream"}:
        return Ratio(peer["median_s"] / ours["median_s"], within_spread(ours, peer))
    if "wall_median_s" in ours and "wall_median_s" in peer:
        return Ratio(peer["wall_median_s"] / ours["wall_median_s"], within_spread(ours, peer, "wall_"), wall=True)
    return None


def within_spread(before: Case, after: Case, clock: str = "") -> bool:
    """Whether two medians differ by no more than both spreads together; never where a spread was not kept.

    Args:
        clock: what the names of median and spread begin with: nothing, "wall_" or "wall_one_thread_".
    """
    if not all(f"{clock}iqr_s" in case for case in (before, after)):
        return False
    difference = abs(after[f"{clock}median_s"] - before[f"{clock}median_s"])
    return difference <= before[f"{clock}iqr_s"] + after[f"{clock}iqr_s"]


def _clock(case: Case) -> str | None:
    """The kind of clock, without the reason for it."""
    return case["clock"].partition(":")[0] if "clock" in case else None


def judge(before: Case, after: Case | None) -> str:
    """Return noise, slower, faster or lost."""
    if after is None or _clock(before) != _clock(after):
        return "lost"
    if within_spread(before, after):
        return "noise"
    return "slower" if after["median_s"] > before["median_s"] else "faster"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--all", action="store_true", help="list what is noise, too")
    options = parser.parse_args(arguments)
    try:
        before, after = read_results(options.before), read_results(options.after)
    except ValueError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    if not {key(case) for case in measured(before["cases"])} & {key(case) for case in after["cases"]}:
        print("bench compare: the files have no case in common", file=sys.stderr)
        return 2
    changes = list(compare(before, after))
    lines = [*_other_machine(before, after), *_lines(changes, everything=options.all)]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # the reader has seen enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(any(change.ours and change.verdict in ("slower", "lost") for change in changes))


def _other_machine(before: Results, after: Results) -> list[str]:
    if before["machine"] == after["machine"]:
        return []
    return [f"not the same machine: {before['machine']} and {after['machine']}"]


def _lines(changes: Sequence[Change], *, everything: bool) -> list[str]:
    """A line per change, aligned, and one that counts them all."""
    rows = [
        (change.name, _time(change.before), _time(change.after), _outcome(change))
        for change in changes
        if everything or change.verdict != "noise"
    ]
    name, before, after = (max((len(row[i]) for row in rows), default=0) for i in range(3))
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "faster", "noise", "lost")}
    lines = [f"{row[0]:{name}}  {row[1]:>{before}}  {row[2]:>{after}}  {row[3]}" for row in rows]
    return [*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]


def _time(case: Case | None) -> str:
    return "no number" if case is None else f"{time_text(case['median_s'])} ± {time_text(case['iqr_s'])}"


def _outcome(change: Change) -> str:
    if change.after is None:
        return "lost"
    if change.verdict == "lost":
        return f"lost, another clock: {_clock(change.before)}, then {_clock(change.after)}"
    return f"{change.ratio:6.2f} x  {change.verdict}"


def time_text(seconds: float) -> str:
    """Return a time with three digits in a unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{float(f'{seconds / factor:.3g}'):g} {unit}"
    return f"{float(f'{seconds / 1e-6:.3g}'):g} µs"
