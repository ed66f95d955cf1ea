"""Tables and charts of all result files, as `python -m bench report` writes them into docs/.

Written are docs/benchmarks.md and, per device, a chart of ratios and a scaling curve per operator. Equal result files
give equal bytes. A ratio is the peer's time over ours on a clock that both have (`bench.spread.ratio`).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from bench.charts import Bar, Point, ratio_chart, scaling_chart
from bench.peers import OURS, balanced_peers
from bench.results import Case, Results, measured, read_results
from bench.spread import Ratio, ratio, time_text

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
_GRAPH, _BOTH = ", CUDA graph", ", forward and backward"
_HEAD = """# Benchmarks

Made by `python -m bench report` from the files in `bench/results`; do not edit. Every row with an error first showed
its result to be right, against float64: the error is the largest one of any output or gradient, relative to its largest
true value. Spread is the distance of the quartiles. Memory is what a call held at most beside its inputs. "First call"
includes compilation. An empty cell was not measured or means nothing there; in a row without an error no result was
compared with float64.

On a CPU a median is the wall time of a call, and of a training step anywhere that of updates one after the other. Of an
operator on a GPU it is the time of replays of a CUDA graph ("clock: graph"): its kernels alone, with inputs that may
still lie in the L2 cache; "cold" is a replay from a flushed L2 cache, "launched one by one" the wall time of a call
without a graph, Python included. What no graph can hold is timed launch by launch ("clock: stream").

A ratio is the peer's median over ours in the same table: above 1 ours is faster; one inside both spreads is noise.
Where one of the two is no replay of a graph, wall times are divided ("wall"), whose spread older files did not keep;
where they are not known either there is no ratio.
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
        named = [(name_of(group, rows), rows) for group, rows in tables(results["cases"])]
        bars = [(name, bars) for name, rows in named if (bars := _bars(rows))]
        if bars:
            title = f"{device}: time of the peer over ours (operators: forward and backward, or as named)"
            files[f"{device}-ratios.svg"] = ratio_chart(title, bars)
            page += [f"![ratios]({device}-ratios.svg)", ""]
        for suite, cases in groupby(sorted(results["cases"], key=_place), key=lambda case: case["suite"]):
            cases = list(cases)
            page += [f"### {OPERATORS.get(suite, suite)}", ""]
            if chart := _scaling(f"{device}: {suite}{_BOTH}", cases):
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


def name_of(group: str, rows: Iterable[Case]) -> str:
    """What a table of times forward and backward is called elsewhere, with what must be known of our row."""
    notes = [case["note"] for case in rows if case["peer"] == OURS.name and "note" in case]
    return group.removesuffix(_BOTH) + "".join(f" ({note})" for note in notes)


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


def _ratio(case: Case, rows: Sequence[Case]) -> Ratio | None:
    """None for ours, without a number, or without a clock in common."""
    ours = _baseline(case, rows)
    if ours is None or "median_s" not in case or case["peer"].startswith(OURS.name):
        return None
    return ratio(ours, case)


def _bars(rows: Sequence[Case]) -> list[Bar]:
    if rows[0]["suite"] != "step" and not rows[0]["group"].endswith((_BOTH, "balanced and dense, forward")):
        return []
    ratios = [(case["peer"], _ratio(case, rows)) for case in rows]
    return [Bar(peer, *ratio) for peer, ratio in ratios if ratio]


def _scaling(title: str, cases: Sequence[Case]) -> str | None:
    panels: dict[str, dict[str, list[Point]]] = {}
    for case in measured(cases):
        if "sweep" in case:
            point = Point(case["size"], case["median_s"], case["iqr_s"])
            panels.setdefault(case["sweep"], {}).setdefault(case["peer"], []).append(point)
    if not panels:
        return None
    swept = {peer for curves in panels.values() for peer in curves}
    missing = sorted({peer for _, rows in tables(cases) if (peer := _fastest_peer(rows)) and peer not in swept})
    remark = f"fastest in a table below, but not swept: {'; '.join(missing)}" if missing else None
    return scaling_chart(title, sorted(panels.items()), remark)


def _fastest_peer(rows: Sequence[Case]) -> str | None:
    """Whom ours is put to forward and backward, as the curves are."""
    others = [case for case in measured(rows) if not case["peer"].startswith(OURS.name)]
    return others[0]["peer"] if others and rows[0]["group"].endswith(_BOTH) else None


def _table(rows: Sequence[Case], everything: Sequence[Case]) -> list[str]:
    clocks = {"on the device": "device_median_s", "cold": "cold_median_s"}
    clocks = {title: clock for title, clock in clocks.items() if any(clock in case for case in rows)}
    head = ["who", "median", "spread", "ratio", *clocks, "error", "same bits twice", "memory", "first call", "note"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 2), '---'])} |"]
    for case in rows:
        if "median_s" not in case:
            reason = case.get("refused") or f"**red: {case.get('red', 'no result')}**"
            notes = [_cell(reason), *([_escaped(case["note"])] if "note" in case else [])]
            lines.append(f"| {case['peer']} |{' |' * (len(head) - 2)} {', '.join(notes)} |")
            continue
        cells = [case["peer"], time_text(case["median_s"]), time_text(case["iqr_s"])]
        cells.append(_ratio_text(_ratio(case, rows)))
        cells += [time_text(case[clock]) if clock in case else "" for clock in clocks.values()]
        cells += [case.get("error", ""), {True: "yes", False: "no", None: ""}[case.get("same_bits")]]
        cells += [f"{case['peak_mb']:.1f} MB" if "peak_mb" in case else ""]
        cells += [f"{case['first_call_s']:.2f} s" if "first_call_s" in case else ""]
        cells += [_escaped(_note(case, everything))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    told = [word for word, holds in (("wall", ratio.wall), ("noise", ratio.noise)) if holds]
    return f"{ratio.value:.2f} ({', '.join(told)})" if told else f"**{ratio.value:.2f}**"


def _note(case: Case, everything: Sequence[Case]) -> str:
    """What else a number says: rates, a share of a step, a time per row; last what was noted by hand."""
    notes, seconds = [], case["median_s"]
    if "clock" in case:
        notes.append(f"clock: {case['clock']}")
    if "wall_median_s" in case:
        spread = f" ± {time_text(case['wall_iqr_s'])}" if "wall_iqr_s" in case else ""
        notes.append(f"launched one by one {time_text(case['wall_median_s'])}{spread}")
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
    return ", ".join([*notes, *([case["note"]] if "note" in case else [])])


def _cell(text: str) -> str:
    return _escaped(text[:160])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


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
    lines = ["| peer | package | version | licence | what differs |", "| --- | --- | --- | --- | --- |"]
    for peer in balanced_peers():
        version = _version([case for case in cases if case["peer"] == peer.name])
        cells = [peer.name, str(peer.package), version, peer.licence, peer.differs]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, "", "All other peers are PyTorch (BSD-3-Clause), with identical mathematics."]


def _version(cases: Sequence[Case]) -> str:
    """Every known version of those that were measured; without one, why there is none."""
    if versions := sorted({case["version"] for case in cases if "version" in case}):
        return ", ".join(versions)
    if measured(cases):
        return "not recorded"
    return next((case["refused"] for case in cases if "refused" in case), "not measured")
