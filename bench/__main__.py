"""python -m bench [SUITE ...] [--out FILE]: run benchmark suites and keep their medians in a small file.

A suite is a file bench/bench_<suite>.py of pytest-benchmark cases. Each case checks its result before it is timed; a
case whose check fails has no number.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.results import condense, default_name, format_results, write_results

SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run suites; exit code 0 only if every check was green."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file of the medians (default: runs/bench-<device>.json)")
    options = parser.parse_args(arguments)
    unknown = [suite for suite in options.suites if suite not in SUITES]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    out = options.out or Path("runs") / f"bench-{default_name()}.json"
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.json"
        code = _run_pytest(options.suites or SUITES, raw)
        if not raw.exists() or not raw.stat().st_size:
            return code or 1
        results = condense(json.loads(raw.read_text()))
    write_results(out, results)
    print(format_results(results))
    print(f"medians written to {out}")
    return code


def _run_pytest(suites: Sequence[str], raw: Path) -> int:
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    files = [str(Path(__file__).parent / f"bench_{suite}.py") for suite in suites]
    options = [
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_files=bench_*.py",
        "-o",
        "python_functions=bench_*",
    ]
    return int(pytest.main([*files, *options, "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={raw}"]))


if __name__ == "__main__":
    sys.exit(main())
