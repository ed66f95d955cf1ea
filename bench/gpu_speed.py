"""Operators on the GPU against their peers: device time of every row that first showed the right result.

Rows are compiled and checked side by side, then timed one after the other, alone, in the order of what matters if the
time runs out: ours, peers as they are, peers that must be compiled.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_clock import measure
from bench.gpu_process import Ended, Sheet, Workers, end_on_sigterm, note, wait_for_turn
from bench.gpu_repeats import words
from bench.gpu_rows import OURS, SUITES, Problem
from bench.measure import largest_error, root
from bench.peers import Peer

BIT_REPEATS, _PROCESSES = 20, 4
# shares of the time that the rows of plain PyTorch may take, and a row of torch.compile
PLAIN_SHARE, COMPILED_SHARE = 0.6, 0.2
# many processes compile side by side: each by itself
COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


def ordered(rows: Iterable[tuple[Problem, list[Peer]]]) -> list[tuple[Problem, Peer]]:
    """The rows to time: ours first, and last those that must be compiled, of which Flex is the fastest.

    What must be compiled is timed forward and backward only: a row takes up to a minute of a processor to prepare.
    """
    pairs = [
        (problem, peer)
        for problem, peers in rows
        for peer in peers
        if not peer.graph and not (peer.compiled and problem.group.endswith("forward"))
    ]
    return sorted(pairs, key=lambda pair: (pair[1].name != OURS, pair[1].compiled, not pair[1].name.startswith("flex")))


def check_row(
    problem: Problem, peer: Peer, truths: dict[str, list[Tensor]], device: torch.device
) -> tuple[dict[str, Any], Callable[[], list[Tensor]] | None]:
    """Run a row; return what is to be said of it and, if its result is right, the call to be timed.

    Args:
        truths: by group; filled as needed.
    """
    case = {"suite": problem.suite, "group": problem.group, "name": peer.name, "peer": peer.name, **problem.notes}
    for leaf in problem.leaves:
        leaf.requires_grad_("backward" in problem.group)
    run = functools.partial(problem.finish, peer.solve)
    try:
        peer.require()
        if problem.group not in truths:
            truths[problem.group] = [x.cpu() for x in problem.truth()]
        started = time.perf_counter()
        found = [x.detach().clone() for x in run()]
        case["first_call_s"] = round(time.perf_counter() - started, 2)
        error = largest_error(found, [x.to(device) for x in truths[problem.group]])
        if not error <= problem.tolerance:
            return {**case, "red": f"relative error {error:.1e}, must be at most {problem.tolerance:.0e}"}, None
        return {**case, "error": f"{error:.1e}", "same_bits": _repeats_agree(run, found)}, run
    except Exception as refusal:
        return {**case, "refused": root(refusal)}, None


def time_rows(pairs: Sequence[tuple[Problem, Peer]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Check all rows, wait for the turn, and time those that are right; a row without a time says why."""
    truths: dict[str, list[Tensor]] = {}
    right = []
    for problem, peer in pairs:
        case, run = check_row(problem, peer, truths, device)
        if run is None:
            yield case
        else:
            right.append((case, run))
    wait_for_turn()
    for case, run in right:
        try:
            yield case | measure(run, device)
        except Exception as refusal:
            yield case | {"refused": root(refusal)}


def _repeats_agree(run: Callable[[], list[Tensor]], found: list[Tensor]) -> bool:
    differing = sum((words(x) != words(y)).any() for _ in range(BIT_REPEATS) for x, y in zip(run(), found, strict=True))
    return not bool(differing)


def time_suite(suite: str, sheet: Sheet, *, seconds: float, prepare: float, at_once: int) -> None:
    """Prepare and time the rows of a suite, keeping the sheet up to date.

    What torch.compile makes has a process for each row; one process has all other rows.
    """
    pairs = ordered(SUITES[suite](torch.device("meta")))
    titles = [(problem.group, peer.name) for problem, peer in pairs]
    rows = {"plain": [title for title, (_, peer) in zip(titles, pairs, strict=True) if not peer.compiled]}
    rows |= {str(i): [titles[i]] for i, (_, peer) in enumerate(pairs) if peer.compiled}
    command, cases = [sys.executable, "-m", "bench.gpu_speed", suite, "--worker"], {}
    with Workers(seconds=seconds, at_once=at_once, prepare=prepare) as workers:
        for name in rows:
            share = PLAIN_SHARE if name == "plain" else COMPILED_SHARE
            workers.start(name, [*command, name], COMPILER, turn_s=share * seconds)
        for name, heard in workers:
            if isinstance(heard, Ended):
                how = "cut by the clock" if heard.code is None else f"exit {heard.code}: {heard.tail[-200:]}"
                for group, peer in set(rows[name]) - set(cases):
                    cases[group, peer] = {"suite": suite, "group": group, "name": peer, "peer": peer, "refused": how}
            else:
                cases[heard["case"]["group"], heard["case"]["peer"]] = heard["case"]
            sheet.content["cases"] = [cases[title] for title in titles if title in cases]
            sheet.write()


def _work(suite: str, worker: str) -> int:
    """Be a worker: the rows that are not compiled, or the one of a number."""
    device = torch.device("cuda")
    pairs = ordered(SUITES[suite](device))
    mine = [pair for pair in pairs if not pair[1].compiled] if worker == "plain" else [pairs[int(worker)]]
    del pairs
    for case in time_rows(mine, device):
        note(case=case)
    return 0


def main() -> int:
    """Run the part; exit code 0 only if our own rows are right and none of their bits moved."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_speed")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0, help="for timing")
    parser.add_argument("--prepare", type=float, default=200.0, help="seconds for compiling and checking before that")
    parser.add_argument("--processes", type=int, default=min(_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.suite, options.worker)
    end_on_sigterm()
    sheet = Sheet(options.out)
    time_suite(options.suite, sheet, seconds=options.seconds, prepare=options.prepare, at_once=options.processes)
    cases = sheet.content["cases"]
    print(f"{sum('median_s' in case for case in cases)} of {len(cases)} rows timed")
    return int(not all(case.get("same_bits") and "median_s" in case for case in cases if case["peer"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
