"""Tables and charts of all result files, as `python -m bench report` writes them into docs/.

Written are docs/benchmarks.md and, per device, a chart of ratios and a scaling curve per operator. Equal result files
give equal bytes. A ratio is the peer's median over ours: above 1 ours is faster; one inside both spreads is noise.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from bench.charts import Bar, Point, ratio_chart, scaling_chart
from bench.peers import OURS, balanced_peers
from bench.results import Case, Results, measured, read_results
from bench.spread import judge

OPERATORS = {
    "sinkhorn": "Sinkhorn",
    "matching": "Segment matching",
    "attention": "Attention",
    "points": "Point embedding",
    "residual": "Residual blocks",
    "step": "Training step",
    "attention_step": "Training step by its attention",
    "data": "Data",
    "evaluate": "Evaluation",
    "trace": "Evidence",
}
_GRAPH = ", CUDA graph"
_HEAD = """# Benchmarks

Made by `python -m bench report` from the files in `bench/results`; do not edit. Every row first showed its result to be
right, against float64. A ratio is the peer's median over ours in the same table: above 1 ours is faster. Spread is the
distance of the quartiles; a ratio inside both spreads is noise. The error is the largest one of any output or gradient,
relative to its largest true value. Memory is what a call held at most beside its inputs. "First call" includes
compilation.
"""


def read_devices(folder: Path) -> dict[str, Results]:
    """Read the result files of suites, by device name; other files in the folder hold runs and machine code.

    Raises:
        ValueError: there is none.
    """
    devices = {}
    for path in sorted(folder.glob("*.json")):
        if '"cases": [' in path.read_text():
            devices[path.stem] = read_results(path)
    if not devices:
        raise ValueError(f"{folder} must hold at least one result file of a suite")
    return devices


def write_report(devices: Mapping[str, Results]) -> dict[str, str]:
    """Return the files of the report by name."""
    files, page = {}, [_HEAD]
    for device, results in devices.items():
        page += [f"## {device}", "", _describe(results), ""]
        named = [(group.removesuffix(", forward and backward"), rows) for group, rows in tables(results["cases"])]
        bars = [(name, bars) for name, rows in named if (bars := _bars(rows))]
        if bars:
            title = f"{device}: time of the peer over ours, forward and backward"
            files[f"{device}-ratios.svg"] = ratio_chart(title, bars)
            page += [f"![ratios]({device}-ratios.svg)", ""]
        for suite, cases in groupby(sorted(results["cases"], key=_place), key=lambda case: case["suite"]):
            cases = list(cases)
            page += [f"### {OPERATORS.get(suite, suite)}", ""]
            if chart := _scaling(f"{device}: {suite}, forward and backward", cases):
                files[f"{device}-{suite}-scaling.svg"] = chart
                page += [f"![scaling]({device}-{suite}-scaling.svg)", ""]
            for group, rows in tables(cases):
                page += [f"**{group}**", "", *_table(rows, results["cases"]), ""]
    page += ["## Peers", "", *_peer_table(devices), ""]
    return {"benchmarks.md": "\n".join(page), **files}


def tables(cases: Iterable[Case]) -> list[tuple[str, list[Case]]]:
    """The cases by group, in the order of the operators; sweeps have curves instead."""
    rows = sorted((case for case in cases if "sweep" not in case), key=_place)
    return [(group, list(members)) for group, members in groupby(rows, key=lambda case: case["group"])]


def _place(case: Case) -> tuple:
    """Operators in the order of the page; in a table ours first, then those with a number, the fastest first."""
    order = list(OPERATORS)
    suite = order.index(case["suite"]) if case["suite"] in order else len(order)
    numbers = (not case["peer"].startswith(OURS.name), case.get("median_s", float("inf")), case["peer"])
    return suite, case["suite"], case["group"], numbers


def _baseline(case: Case, rows: Sequence[Case]) -> Case | None:
    """Ours in the same table: in a CUDA graph if the peer is in one."""
    name = OURS.name + (_GRAPH if case["peer"].endswith(_GRAPH) else "")
    return next((row for row in measured(rows) if row["peer"] == name), None)


def _ratio(case: Case, rows: Sequence[Case]) -> tuple[float, bool] | None:
    """Return the peer's time over ours and whether it is noise; none for ours or without a number."""
    ours = _baseline(case, rows)
    if ours is None or "median_s" not in case or case["peer"].startswith(OURS.name):
        return None
    return case["median_s"] / ours["median_s"], judge(ours, case) == "noise"


def _bars(rows: Sequence[Case]) -> list[Bar]:
    if not rows[0]["group"].endswith(("forward and backward", "balanced and dense, forward")):
        return []
    ratios = [(case["peer"], _ratio(case, rows)) for case in rows]
    return [Bar(peer, *ratio) for peer, ratio in ratios if ratio]


def _scaling(title: str, cases: Sequence[Case]) -> str | None:
    panels: dict[str, dict[str, list[Point]]] = {}
    for case in measured(cases):
        if "sweep" in case:
            point = Point(case["size"], case["median_s"], case["iqr_s"])
            panels.setdefault(case["sweep"], {}).setdefault(case["peer"], []).append(point)
    return scaling_chart(title, sorted(panels.items())) if panels else None


def _table(rows: Sequence[Case], everything: Sequence[Case]) -> list[str]:
    on_device = any("device_median_s" in case for case in rows)
    head = ["who", "median", "spread", "ratio", *(["on the device"] if on_device else [])]
    head += ["error", "same bits twice", "memory", "first call", "note"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 2), '---'])} |"]
    for case in rows:
        if "median_s" not in case:
            reason = case.get("refused") or f"**red: {case.get('red', 'no result')}**"
            lines.append(f"| {case['peer']} |{' |' * (len(head) - 2)} {_cell(reason)} |")
            continue
        ratio = _ratio(case, rows)
        cells = [case["peer"], time_text(case["median_s"]), time_text(case["iqr_s"])]
        cells.append("" if ratio is None else f"{ratio[0]:.2f} (noise)" if ratio[1] else f"**{ratio[0]:.2f}**")
        cells += [time_text(case["device_median_s"]) if "device_median_s" in case else ""] if on_device else []
        cells += [case.get("error", ""), {True: "yes", False: "no", None: ""}[case.get("same_bits")]]
        cells += [f"{case['peak_mb']:.1f} MB" if "peak_mb" in case else ""]
        cells += [f"{case['first_call_s']:.2f} s" if "first_call_s" in case else "", _note(case, everything)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _note(case: Case, everything: Sequence[Case]) -> str:
    """What else a number says: rates, a share of a step, a time per row."""
    notes, seconds = [], case["median_s"]
    if "clock" in case:
        notes.append(f"clock: {case['clock']}")
    if "wall_median_s" in case:
        notes.append(f"launched one by one {time_text(case['wall_median_s'])}")
    if "flops" in case:
        notes.append(f"{case['flops'] / seconds / 1e9:.3g} GFLOP/s")
    if "bytes" in case:
        notes.append(f"{case['bytes'] / seconds / 1e9:.3g} GB/s")
    if "scenes" in case and case["suite"] == "evaluate":
        notes.append(f"{time_text(seconds / case['scenes'])} per scene")
    if "rows" in case and case["suite"] == "data":
        notes.append(f"{time_text(seconds / case['rows'])} per row")
    step = [c for c in measured(everything) if c["group"] == case.get("share_of") and c["peer"] == OURS.name]
    if step:
        notes.append(f"{100 * seconds / step[0]['median_s']:.2g} % of {case['share_of']}")
    if "trace_every" in case:
        notes.append(f"once in {case['trace_every']} steps")
    return ", ".join(notes)


def time_text(seconds: float) -> str:
    """Return a time with three digits in a unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{float(f'{seconds / factor:.3g}'):g} {unit}"
    return f"{float(f'{seconds / 1e-6:.3g}'):g} µs"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:160]


def _describe(results: Results) -> str:
    machine = results["machine"]
    what = [machine.get("gpu"), machine.get("cpu"), f"{machine['cores']} cores" if "cores" in machine else None]
    lines = [", ".join(str(x) for x in [*what, machine.get("driver") and f"driver {machine['driver']}"] if x) + "."]
    for suite, at in results.get("suites", {}).items():
        commit = f", commit {at['commit'][:10]}{'+' * at['commit'].endswith('+')}" if "commit" in at else ""
        versions = f"torch {at['torch']}, Triton {at['triton']}, Python {at['python']}"
        older = "; some of its cases are older" if at.get("part") else ""
        lines.append(f"- {suite}: {at['date']}, {versions}{commit}{older}")
    return "\n".join([lines[0], "", *lines[1:]])


def _peer_table(devices: Mapping[str, Results]) -> list[str]:
    """The libraries that are peers; plain PyTorch and torch.compile compute identical mathematics."""
    cases = [case for results in devices.values() for case in results["cases"]]
    found = {case["peer"]: case.get("version") or case.get("refused") for case in cases}
    lines = ["| peer | package | version | licence | what differs |", "| --- | --- | --- | --- | --- |"]
    for peer in balanced_peers():
        version = found.get(peer.name) or "not measured"
        lines.append(f"| {peer.name} | {peer.package} | {version} | {peer.licence} | {peer.differs} |")
    return [*lines, "", "All other peers are PyTorch (BSD-3-Clause), with identical mathematics."]
