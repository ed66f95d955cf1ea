"""The harness of the suites: `measure` checks a case, then times it with pytest-benchmark, then keeps the line.

A case whose check is red has no number. A peer that is not installed, or refuses the input, is kept with its reason.
Each line is written as soon as it is known, so that nothing is lost when a later case fails or the run is cut.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import (
    LONG_S,
    ON_GPU,
    Run,
    choose_rounds,
    device_seconds,
    graphed,
    largest_error,
    peak_bytes,
    quartiles,
    root,
    same_bits,
    significant,
    synchronized,
    tensor_bytes,
)
from bench.peers import OURS, Peer
from bench.results import installed_versions

# what a peer may answer instead of a result; from our own operator it is a failure
REFUSALS = (RuntimeError, NotImplementedError, ValueError, ImportError)


def pytest_addoption(parser):
    parser.addoption("--lines", type=Path, help="append what was measured to this file, a line of JSON per case")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(installed_versions())


def pytest_report_teststatus(report, config):
    """Print a line per case instead of a dot."""
    lines = [text for name, text in report.user_properties if name == "line"]
    if report.when == "call" and lines:
        return report.outcome, lines[-1] + "\n", lines[-1]
    if report.when == "call" and report.failed:
        return report.outcome, f"RED  {report.nodeid.partition('::')[2]}\n", "RED"
    return None


@pytest.fixture
def measure(request) -> "Measure":
    """Check, time and keep one case; see `Measure.__call__`."""
    return Measure(request)


class Measure:
    """One case of a suite."""

    def __init__(self, request):
        self._request, self._node, self._config = request, request.node, request.config

    def __call__(
        self,
        run: Callable[[], object],
        *,
        group: str,
        peer: Peer = OURS,
        check: Run | None = None,
        truth: Sequence[Tensor] = (),
        tolerance: float = 0.0,
        inputs: Sequence[Tensor] = (),
        flops: int | None = None,
        **notes: Any,
    ) -> None:
        """Check a case and time it.

        Args:
            run: what is timed. Where it also is what is checked it returns tensors.
            group: the table in which this case is a row.
            check: returns what is checked, and compared between two calls; `run` if left out.
            truth: float64, for the first tensors that `check` returns.
            tolerance: the largest error, relative to the largest true value.
            inputs: read at least once; with the results they are the bytes that must be moved.
            flops: operations of the plain formula, the same for every peer.
            notes: kept beside the time: sizes, dtype, iterations.
        """
        suite = Path(self._node.path).stem.removeprefix("bench_")
        notes = {"suite": suite, "group": group, "name": self._node.name, "peer": peer.name, **notes}
        notes |= {"threads": torch.get_num_threads()} | ({"version": version} if (version := peer.version()) else {})
        checked: Any = check or run
        with self._refusals(peer, notes):
            peer.require()
            started = time.perf_counter()
            found = [x.detach().clone() for x in checked()]
            notes["first_call_s"] = significant(time.perf_counter() - started)
            launched = run
            if peer.graph:
                run = checked = graphed(checked)
                found = [x.detach().clone() for x in checked()]
        error = largest_error(found, truth)
        if not error <= tolerance:
            self._keep({**notes, "red": f"relative error {error:.1e}, must be at most {tolerance:.0e}"})
            pytest.fail(self._node.user_properties[-1][1])
        started = time.perf_counter()
        again = [x.detach().clone() for x in checked()]
        if ON_GPU:
            torch.cuda.synchronize()
        call_s = time.perf_counter() - started
        # after both checks, because a call may change what it works on; a replay holds nothing of its own
        notes["peak_mb"] = significant(peak_bytes(launched) / 1e6)
        notes |= {"error": f"{error:.1e}"} if truth else {}
        notes |= {"same_bits": same_bits(found, again)} if found else {}
        notes |= {"flops": flops} if flops else {}
        notes |= {"bytes": tensor_bytes([*inputs, *found])} if inputs else {}
        self._time(run, call_s, notes)

    def _time(self, run: Callable[[], object], call_s: float, notes: dict[str, Any]) -> None:
        # asked for only now, because a fixture that is not used is an error and a red case uses none
        benchmark = self._request.getfixturevalue("benchmark")
        rounds = choose_rounds(call_s, float(self._config.getoption("benchmark_max_time")))
        benchmark.group = notes["group"]
        benchmark.extra_info.update(notes)
        benchmark.pedantic(synchronized(run), rounds=rounds, warmup_rounds=int(call_s < LONG_S))
        if ON_GPU:
            on_device = quartiles(device_seconds(run, rounds))
            notes |= {"device_median_s": on_device[0], "device_iqr_s": on_device[1]}
        median, spread = quartiles(benchmark.stats.stats.data)
        self._keep({**notes, "median_s": median, "iqr_s": spread, "rounds": rounds})

    @contextlib.contextmanager
    def _refusals(self, peer: Peer, notes: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except REFUSALS as refusal:
            if peer.package is None:
                raise
            reason = root(refusal)
            self._keep({**notes, "refused": reason})
            pytest.skip(f"{peer.name}: {reason}")

    def _keep(self, case: dict[str, Any]) -> None:
        self._node.user_properties.append(("line", _line(case)))
        if path := self._config.getoption("--lines"):
            with path.open("a") as file:
                file.write(json.dumps(case) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _line(case: dict[str, Any]) -> str:
    head = f"{case['group']:54} {case['peer']:32}"
    if "median_s" not in case:
        return f"{head} {case.get('refused') or 'RED: ' + case['red']}"[:160]
    bits = {True: "same bits", False: "OTHER BITS", None: ""}[case.get("same_bits")]
    return f"{head} {1e3 * case['median_s']:10.3f} ms ± {1e3 * case['iqr_s']:.3f}  {case.get('error', '')}  {bits}"
