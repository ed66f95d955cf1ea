"""The operators' tests on the GPU: every n-th test to each of n processes, which compile kernels side by side.

A process that dies, or whose CUDA context does, is started again without the tests it has finished; the test it died in
is called crashed. Each worker is pytest with this module as a plugin, which hands over every outcome as it comes.
"""

import argparse
import collections
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_process import Ended, Line, Sheet, Workers, at_most_every, end_on_sigterm, end_with_parent, note, share

TESTS = Path(__file__).resolve().parent.parent / "tests"
# beside those of the operators; of two files only what needs a GPU: the rest trains for minutes
MORE = ("accuracy", "fused", "graph", "measure", "products", "trace")
NEED_A_GPU = (
    "test_certificate.py::test_a_run_on_a_gpu_names_its_machine_code_the_same_each_time",
    "test_equivalence.py::test_two_runs_are_the_same_bits[graph]",
    "test_equivalence.py::test_100_steps_are_no_further_from_float64_than_rounding_the_first_weights[graph]",
)
SHARD, DONE = "RIDGELINE_SHARD", "RIDGELINE_DONE"
_WRITE_EVERY_S = 2.0
_RESTARTS, _FAILURES, _MESSAGE_LINES, _LINE_WIDTH = 4, 60, 4, 200
# after one of these every later CUDA call of the process fails
_STICKY = re.compile(
    r"CUDA error: (?!out of memory)|illegal memory access|unspecified launch failure|device-side assert"
)


def operator_tests() -> list[str]:
    """`NEED_A_GPU`, which take longest, then the test files of all operators, found by the names of the modules."""
    modules = (TESTS.parent / "kernels").glob("*.py")
    stems = {path.stem.partition("_")[0] for path in modules if path.stem != "__init__"} | set(MORE)
    files = [path for path in sorted(TESTS.glob("test_*.py")) if path.stem.split("_")[1] in stems]
    return [str(path) for path in (*(TESTS / test for test in NEED_A_GPU), *files)]


class Outcomes:
    """What became of each test, from the lines of the workers."""

    def __init__(self):
        self.of: dict[str, str] = {}
        self.messages: dict[str, list[str]] = {}
        self.reasons: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, float] = {}
        self.selected: set[str] = set()

    def hear(self, line: Line) -> None:
        """Take one line of a worker."""
        if "selected" in line:
            self.selected |= set(line["selected"])
        elif line["outcome"] == "started":
            self.of[line["test"]] = "started"
        else:
            self.of[line["test"]] = line["outcome"]
            self.seconds[line["test"]] = line["seconds"]
            if line["outcome"] == "failed":
                self.messages[line["test"]] = line["message"]
            if line["outcome"] == "skipped":
                self.reasons[line["message"][0]] += 1

    def crash(self, shard: set[str], how: str) -> None:
        """Name the tests of a dead worker that had started and did not end."""
        for test in shard:
            if self.of.get(test) == "started":
                self.of[test], self.messages[test] = "crashed", [how]

    def table(self) -> dict[str, Any]:
        """Counts per file, the failures, why tests were skipped, and which took longest."""
        files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        for test in sorted(self.selected | set(self.of)):
            outcome = self.of.get(test, "unfinished")
            files[test.partition("::")[0]]["unfinished" if outcome == "started" else outcome] += 1
        bad = [test for test, outcome in self.of.items() if outcome in ("failed", "crashed")]
        slowest = sorted(self.seconds, key=lambda test: -self.seconds[test])[:8]
        return {
            "counts": dict(sum(files.values(), collections.Counter())),
            "files": {name: dict(counts) for name, counts in sorted(files.items())},
            "failures": [
                {"test": test, "outcome": self.of[test], "message": self.messages[test]} for test in bad[:_FAILURES]
            ],
            "skipped": dict(self.reasons),
            "slowest": {test: round(self.seconds[test], 1) for test in slowest},
        }


def run_tests(files: list[str], sheet: Sheet, *, processes: int, seconds: float = math.inf) -> Outcomes:
    """Run test files in shards, keeping the sheet up to date."""
    outcomes, restarts = Outcomes(), collections.Counter()
    shards: dict[str, set[str]] = {f"{i}/{processes}": set() for i in range(processes)}

    def write() -> None:
        sheet.content |= outcomes.table()
        sheet.write()

    write_often = at_most_every(_WRITE_EVERY_S, write)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Workers(seconds=seconds, at_once=processes, meanwhile=write_often) as workers,
    ):

        def start(shard: str) -> None:
            done = Path(scratch) / shard.replace("/", "-")
            done.write_text("\n".join(test for test in shards[shard] if test in outcomes.of))
            workers.start(shard, shard_command(files), {SHARD: shard, DONE: str(done)})

        for shard in shards:
            start(shard)
        try:
            for shard, heard in workers:
                if not isinstance(heard, Ended):
                    shards[shard] |= set(heard.get("selected", ()))
                    outcomes.hear(heard)
                elif heard.code not in (0, 1, 5, None):
                    how = f"the process ended with {heard.code}"
                    outcomes.crash(shards[shard], how)
                    sheet.content.setdefault("errors", []).append(f"{how}: {heard.tail[-600:]}")
                    if shards[shard] - set(outcomes.of) and restarts[shard] < _RESTARTS:
                        restarts[shard] += 1
                        start(shard)
        finally:
            # also when this process is told to end
            write()
    return outcomes


def shard_command(files: list[str], python: str | None = None) -> list[str]:
    """How a shard runs test files, by this interpreter or another one."""
    plugins = ["-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    quiet = ["-q", "--no-header", "--tb=short", "--continue-on-collection-errors"]
    return [python or sys.executable, "-m", "pytest", *plugins, *quiet, f"--rootdir={TESTS.parent}", *files]


def pytest_configure(config):
    """Do not outlive the process that started this shard."""
    if SHARD in os.environ:
        end_with_parent()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Keep this shard's tests, without those that an earlier process finished."""
    if SHARD not in os.environ:
        return
    mine = share(items, os.environ[SHARD])
    note(selected=[item.nodeid for item in mine])
    done = set(Path(os.environ[DONE]).read_text().splitlines())
    items[:] = [item for item in mine if item.nodeid not in done]


def pytest_runtest_logstart(nodeid, location):
    """Say that a test begins: if nothing follows, the process died in it."""
    if SHARD in os.environ:
        note(test=nodeid, outcome="started")


def pytest_runtest_logreport(report):
    """Hand over the outcome of a test; leave the process when its CUDA context is lost."""
    if SHARD not in os.environ or (report.when != "call" and report.passed):
        return
    text = report.longreprtext if report.failed else ""
    # of a skipped test: file, line, reason; one that was expected to fail has its traceback in their place
    skipped = report.skipped and isinstance(report.longrepr, tuple)
    message = [report.longrepr[2] if skipped else "expected to fail"] if report.skipped else _first_lines(text)
    note(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)
    if _STICKY.search(text):
        pytest.exit("the CUDA context is lost", returncode=3)


def pytest_collectreport(report):
    """A file that cannot be imported is a failure by its name, said once."""
    if SHARD in os.environ and report.failed and os.environ[SHARD].startswith("0/"):
        note(test=f"{report.nodeid}::import", outcome="failed", seconds=0.0, message=_first_lines(report.longreprtext))


def _first_lines(text: str) -> list[str]:
    errors = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-_MESSAGE_LINES:]
    return [line.removeprefix("E").strip()[:_LINE_WIDTH] for line in errors[:_MESSAGE_LINES]]


def main() -> int:
    """Run the part; exit code 0 only if every test that ran passed and all ran."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tests")
    parser.add_argument("files", nargs="*", default=operator_tests())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--processes", type=int, default=min(10, os.cpu_count() or 1))
    options = parser.parse_args()
    end_on_sigterm()
    end_with_parent()
    sheet = Sheet(options.out)
    run_tests(options.files, sheet, seconds=options.seconds, processes=options.processes)
    counts = sheet.content["counts"]
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no test ran")
    return int(set(counts) - {"passed", "skipped"} != set() or "errors" in sheet.content)


if __name__ == "__main__":
    sys.exit(main())
