"""Operators on the GPU against their peers: device time of every row that first showed the right result.

Rows are compiled and checked side by side, then timed one after the other, alone, in the order of what matters if the
time runs out: ours, plain PyTorch, what must be compiled, other packages.
"""

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_clock import LONG_S, measure
from bench.gpu_process import (
    Ended,
    Sheet,
    Workers,
    end_on_sigterm,
    end_with_parent,
    note,
    seconds_to_prepare,
    stay,
    wait_for_turn,
)
from bench.gpu_repeats import words
from bench.gpu_rows import OURS, SUITES, Problem
from bench.measure import largest_error, root
from bench.peers import Peer

BIT_REPEATS, LONG_BIT_REPEATS, _PROCESSES = 20, 3, 4
# one process has all of our rows, one those of plain PyTorch
PLAIN = "plain"
NO_TURN = "right, but had no turn"
NO_TIME = "there was no time to check it"
# of the time, what these may take in their turn, and each other process
TURN_SHARES, OTHER_TURN_SHARE = {OURS: 0.5, PLAIN: 0.6}, 0.4
# many processes compile and load side by side: each by few threads
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"}


def ordered(rows: Iterable[tuple[Problem, list[Peer]]]) -> list[tuple[Problem, Peer]]:
    """The rows to time: ours, plain PyTorch, what must be compiled (of which Flex is the fastest), other packages.

    What must be compiled is timed forward and backward only: a row takes up to a minute of a processor to prepare.
    """
    pairs = [
        (problem, peer)
        for problem, peers in rows
        for peer in peers
        if not peer.graph and not (peer.compiled and problem.group.endswith("forward"))
    ]
    return sorted(
        pairs,
        key=lambda pair: (
            pair[1].name != OURS,
            pair[1].package not in (None, "torch"),
            pair[1].compiled,
            not pair[1].name.startswith("flex"),
        ),
    )


def worker_of(problem: Problem, peer: Peer) -> str:
    """The process that has a row: ours have one, each package has one, and each row that must be compiled."""
    if peer.compiled:
        return f"{problem.group}: {peer.name}"
    if peer.name == OURS:
        return OURS
    return PLAIN if peer.package in (None, "torch") else str(peer.package)


def check_row(
    problem: Problem, peer: Peer, truths: dict[str, list[Tensor]], device: torch.device
) -> tuple[dict[str, Any], Callable[[], list[Tensor]] | None]:
    """Run a row; return what is to be said of it and, if its result is right, the call to be timed.

    Args:
        truths: by group; filled as needed.
    """
    case = _title(problem, peer) | problem.notes
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
        started = time.perf_counter()
        run()[0].flatten()[:1].tolist()
        repeats = BIT_REPEATS if time.perf_counter() - started <= LONG_S else LONG_BIT_REPEATS
        error = largest_error(found, [x.to(device) for x in truths[problem.group]])
        if not error <= problem.tolerance:
            return {**case, "red": f"relative error {error:.1e}, must be at most {problem.tolerance:.0e}"}, None
        return {**case, "error": f"{error:.1e}", "same_bits": _repeats_agree(run, found, repeats)}, run
    except Exception as refusal:
        return {**case, "refused": root(refusal)}, None


def _title(problem: Problem, peer: Peer) -> dict[str, Any]:
    title = {"suite": problem.suite, "group": problem.group, "name": peer.name, "peer": peer.name}
    return title | ({"version": version} if (version := peer.version()) else {})


def time_rows(pairs: Sequence[tuple[Problem, Peer]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Check rows while there is time for it, wait for the turn, and time those that are right.

    A row without a time says why.
    """
    truths: dict[str, list[Tensor]] = {}
    right = []
    for problem, peer in pairs:
        if seconds_to_prepare() <= 0:
            yield {**_title(problem, peer), "refused": NO_TIME}
            continue
        case, run = check_row(problem, peer, truths, device)
        if run is None:
            yield case
        else:
            right.append((case, run))
            yield case | {"refused": NO_TURN}
    truths.clear()
    _give_back(device)
    wait_for_turn()
    for case, run in right:
        try:
            yield case | measure(run, device)
        except Exception as refusal:
            yield case | {"refused": root(refusal)}
        _give_back(device)


def _give_back(device: torch.device) -> None:
    """Return memory that is not in use to the device, which other processes share."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _repeats_agree(run: Callable[[], list[Tensor]], found: list[Tensor], repeats: int) -> bool:
    differing = sum((words(x) != words(y)).any() for _ in range(repeats) for x, y in zip(run(), found, strict=True))
    return not bool(differing)


def time_suite(suite: str, sheet: Sheet, *, at_once: int, seconds: float = math.inf, prepare: float = math.inf) -> None:
    """Prepare and time the rows of a suite, keeping the sheet up to date."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for problem, peer in ordered(SUITES[suite](torch.device("meta"))):
        rows.setdefault(worker_of(problem, peer), []).append((problem.group, peer.name))
    titles = [title for name in rows for title in rows[name]]
    command, cases = [sys.executable, "-m", "bench.gpu_speed", suite, "--worker"], {}
    with Workers(seconds=seconds, at_once=at_once, prepare=prepare) as workers:
        for name in rows:
            workers.start(name, [*command, name], ENVIRONMENT, turn_share=TURN_SHARES.get(name, OTHER_TURN_SHARE))
        for name, heard in workers:
            if isinstance(heard, Ended):
                how = "cut by the clock" if heard.code is None else f"exit {heard.code}: {heard.tail[-200:]}"
                for group, peer in rows[name]:
                    unknown = {"suite": suite, "group": group, "name": peer, "peer": peer, "refused": NO_TURN}
                    case = cases.setdefault((group, peer), unknown)
                    case |= {"refused": how} if case.get("refused") == NO_TURN else {}
            else:
                cases[heard["case"]["group"], heard["case"]["peer"]] = heard["case"]
            sheet.content["cases"] = [cases[title] for title in titles if title in cases]
            sheet.write()


def _work(suite: str, worker: str) -> int:
    """Be a worker: take the rows that are its own."""
    end_with_parent()
    device = torch.device("cuda")
    for case in time_rows(rows_of(suite, worker, device), device):
        note(case=case)
    stay()
    return 0


def rows_of(suite: str, worker: str, device: torch.device) -> list[tuple[Problem, Peer]]:
    """The rows of a worker; one of a single row that is compiled has inputs for no other problem than its own."""

    def wanted(group: str) -> bool:
        return ": " not in worker or worker.startswith(f"{group}: ")

    pairs = ordered(SUITES[suite](device, wanted))
    return [(problem, peer) for problem, peer in pairs if worker_of(problem, peer) == worker]


def main() -> int:
    """Run the part; exit code 0 only if our own rows are right and none of their bits moved."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_speed")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for timing, at most")
    parser.add_argument("--prepare", type=float, default=math.inf, help="seconds for compiling before that, at most")
    parser.add_argument("--processes", type=int, default=min(_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.suite, options.worker)
    end_on_sigterm()
    end_with_parent()
    sheet = Sheet(options.out)
    time_suite(options.suite, sheet, seconds=options.seconds, prepare=options.prepare, at_once=options.processes)
    cases = sheet.content["cases"]
    print(f"{sum('median_s' in case for case in cases)} of {len(cases)} rows timed")
    return int(not all(case.get("same_bits") and "median_s" in case for case in cases if case["peer"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
