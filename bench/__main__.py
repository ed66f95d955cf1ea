"""python -m bench [SUITE ...] [--out FILE]     run benchmark suites and keep their numbers in a small file
python -m bench report                       tables and charts of all committed results, into docs/ and README.md
python -m bench compare A B                  what became slower or faster from result file A to B (also --compare A B)

A suite is a file bench/bench_<suite>.py. Each case checks its result before it is timed; a case whose check fails has
no number. Each suite is a process of its own: one that fails or is interrupted keeps what it measured.
Exit code 0: every check was green; 1: one was red, or a suite broke; 2: misuse. Of compare, see `bench.spread`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.results import RESULTS, default_name, installed_versions, merge, read_lines, read_results, write_results

FOLDER = Path(__file__).parent
SUITES = tuple(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["report"]:
        return report(arguments[1:])
    if arguments[:1] in (["compare"], ["--compare"]):
        from bench.spread import main as compare

        return compare(arguments[1:])
    options = _parse(arguments)
    out = options.out or Path("runs") / f"bench-{default_name()}.json"
    machine, code = installed_versions(), 0
    for suite in options.suites or SUITES:
        with tempfile.TemporaryDirectory() as scratch:
            lines = Path(scratch) / "lines"
            try:
                code |= run_suite(FOLDER / f"bench_{suite}.py", lines, options.select, options.seconds)
            finally:
                if cases := read_lines(lines):
                    before = read_results(out) if out.exists() else None
                    write_results(out, merge(before, cases, machine, part=bool(options.select)))
                    print(f"{suite}: {len(cases)} cases kept in {out}", flush=True)
    return code


def report(arguments: Sequence[str]) -> int:
    """Write the page, its charts and the numbers of the README and of the GPU's page."""
    from bench.readme import GPU_PAGE, README, fill
    from bench.tables import read_devices, write_report

    parser = argparse.ArgumentParser(prog="python -m bench report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "docs", help="folder (default: %(default)s)")
    told = "files with regions of numbers (default: README.md and docs/gpu.md)"
    parser.add_argument("--pages", type=Path, nargs="+", default=[README, GPU_PAGE], metavar="FILE", help=told)
    options = parser.parse_args(arguments)
    try:
        files = {options.out / name: text for name, text in write_report(read_devices(options.results)).items()}
        for page in options.pages:
            files[page] = fill(page.read_text(), options.results)
    except (ValueError, OSError) as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text)
        print(f"written to {path}")
    return 0


def run_suite(path: Path, lines: Path, select: str | None = None, seconds: float = 0.5) -> int:
    """Run one suite in its own process; 0 if every check was green, else 1.

    Args:
        lines: receives a line of JSON per case, as soon as it is known.
        select: pytest's -k expression.
        seconds: how long the rounds of a case may take together.
    """
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "console_output_style=classic", "-rf"]
    options += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "--tb=short", "--benchmark-quiet"]
    options += [f"--benchmark-max-time={seconds}", f"--lines={lines}", *(["-k", select] if select else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", str(path), *options]
    code = subprocess.run(command, check=False, env=environment).returncode
    # pytest's 5: the expression selected nothing here
    return int(code not in (0, 5))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--out", type=Path, help="result file (default: runs/bench-<device>.json)")
    parser.add_argument("-k", dest="select", metavar="EXPRESSION", help="only the cases that match, as pytest -k")
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of a case (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [suite for suite in options.suites if suite not in SUITES]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
