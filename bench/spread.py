"""python -m bench compare A B: what became slower or faster between two result files.

A difference of two medians is noise unless it is larger than both spreads together, the distances of the quartiles.

Exit code 0: nothing of ours became slower beyond the noise, and every number of ours in A has one in B.
          1: something did, or lost its number (a red check, a case that is gone).
          2: a file cannot be read, or the files have no case in common.
Peers are compared, too, but do not count: what others do is no regression of ours.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.peers import OURS
from bench.results import Case, Results, key, measured, read_results


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
    """Yield what became of each case of `before` that has a number, in the order of the file."""
    numbers = {key(case): case for case in measured(after["cases"])}
    suites = {case["suite"] for case in after["cases"]}
    for case in measured(before["cases"]):
        if case["suite"] not in suites:
            continue
        now = numbers.get(key(case))
        ours, name = case["peer"].startswith(OURS.name), f"{case['group']}: {case['peer']}"
        yield Change(name, ours, judge(case, now), case, now)


def judge(before: Case, after: Case | None) -> str:
    """Return noise, slower, faster or lost."""
    if after is None:
        return "lost"
    difference = after["median_s"] - before["median_s"]
    if abs(difference) <= before["iqr_s"] + after["iqr_s"]:
        return "noise"
    return "slower" if difference > 0 else "faster"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    options = parser.parse_args(arguments)
    try:
        before, after = read_results(options.before), read_results(options.after)
    except ValueError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    changes = list(compare(before, after))
    if not changes:
        print("bench compare: the files have no suite in common", file=sys.stderr)
        return 2
    if before["machine"] != after["machine"]:
        print(f"not the same machine: {before['machine']} and {after['machine']}")
    width = max(len(change.name) for change in changes)
    for change in changes:
        print(
            f"{change.name:{width}}  {_milliseconds(change.before)}  {_milliseconds(change.after)}  {_outcome(change)}"
        )
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "faster", "noise", "lost")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(any(change.ours and change.verdict in ("slower", "lost") for change in changes))


def _milliseconds(case: Case | None) -> str:
    if case is None:
        return f"{'no number':>24}"
    return f"{1e3 * case['median_s']:10.3f} ± {1e3 * case['iqr_s']:8.3f} ms"


def _outcome(change: Change) -> str:
    return change.verdict if change.after is None else f"{change.ratio:6.2f} x  {change.verdict}"
