"""The numbers of README.md and docs/gpu.md, from the committed result files: `python -m bench report` writes them.

They stand between marks:

<!-- numbers: NAME -->
... written by this module ...
<!-- end -->
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.peers import OURS
from bench.results import RESULTS, Case, Results, measured, read_results
from bench.spread import ratio
from bench.tables import name_of, read_devices, tables, time_text

README = Path(__file__).parent.parent / "README.md"
GPU_PAGE = README.parent / "docs" / "gpu.md"
_REGION = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# the model's shapes, as in training: of these the README shows the hardest rival, docs/benchmarks.md everything
_SUITES = ("sinkhorn", "matching", "attention", "points", "residual")
# of a GPU's targets the README shows those that the design set; docs/gpu.md shows all
_SHOWN = r"configurations|match_segments(?!.*one thread)|cross-attention|training step"


def fill(text: str, results: Path = RESULTS) -> str:
    """Return a text with all its regions written anew.

    Raises:
        ValueError: a region has a name that this module does not know, or a result file is missing.
    """

    def region(found: re.Match[str]) -> str:
        if found[2] not in REGIONS:
            raise ValueError(f"a region of numbers must be one of {', '.join(REGIONS)}, got {found[2]}")
        return f"{found[1]}\n{REGIONS[found[2]](results)}\n\n{found[3]}"

    return _REGION.sub(region, text)


def demo(results: Path) -> str:
    """The score of the embedded recipe after each stage, beside what needs no learning."""
    run = json.loads((results / "demo-cpu-2core.json").read_text())
    rows = [
        f"| {s['name']} | {s['until']:,} | {s['hss']:.3f} | {s['corner_f1']:.3f} | {s['edge_iou']:.3f} |"
        for s in run["stages"]
    ]
    titles = {
        "label_clusters": "label clusters, no learning",
        "truth_through_postprocessing": "truth through post-processing",
    }
    for name, title in titles.items():
        y = run["yardsticks"][name]
        rows.append(f"| *{title}* | | {y['hss']:.3f} | {y['corner_f1']:.3f} | {y['edge_iou']:.3f} |")
    minutes, machine = run["training_seconds"] / 60, run["machine"]
    when = f"({run['date']}, torch {machine['torch']})"
    rows += ["", f"Two cores train it in {minutes:.1f} minutes, evaluation not counted {when}."]
    return "\n".join(["| after stage | steps | HSS | corner F1 | edge IoU |", "| --- | --- | --- | --- | --- |", *rows])


def steps(results: Path) -> str:
    """A training step of the published model on a CPU."""
    rows = [
        f"| {case['precision']} | {case['median_s']:.2f} s | {case['iqr_s']:.2f} s | {case['error']} |"
        for case in measured(read_results(results / "cpu-2core.json")["cases"])
        if case["suite"] == "step" and case["recipe"] == "s23dr" and case["peer"] == OURS.name
    ]
    head = ["| precision | median | spread | error of the loss against float64 |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *sorted(rows, reverse=True)])


def operators(results: Path) -> str:
    """Each operator forward and backward against its fastest peer, per device."""
    rows = [
        f"| {device} | {_row(cases)} |"
        for device, found in read_devices(results).items()
        for group, cases in tables(found["cases"])
        if cases[0]["suite"] in _SUITES and re.search(r"^(?!.*(demo|exact)).*forward and backward$", group)
        if len(measured(cases)) > 1 and any(case["peer"] == OURS.name for case in measured(cases))
    ]
    if not rows:
        return "No operator has been timed yet."
    head = "| device | forward and backward | items | ours | fastest peer timed | it takes | same bits |"
    return "\n".join([head, f"|{' --- |' * 7}", *rows])


def _row(cases: list[Case]) -> str:
    ours = next(case for case in measured(cases) if case["peer"] == OURS.name)
    rival = min(
        (case for case in measured(cases) if not case["peer"].startswith(OURS.name)), key=lambda case: case["median_s"]
    )
    name, bits = name_of(ours["group"], [ours]), "yes" if ours.get("same_bits") else "no"
    items = " ".join(
        str(ours[key]).replace("bfloat", "bf").replace("float", "fp")
        for key in ("items", "dtype", "precision")
        if key in ours
    )
    takes = f"{found.value:.2f} times ours" if (found := ratio(ours, rival)) else ""
    return f"{name} | {items} | {time_text(ours['median_s'])} | {rival['peer']} | {takes} | {bits}"


def gpus(results: Path) -> str:
    """What was promised of a GPU and what was measured, per GPU that `reproduce.sh gpu` ran on."""
    parts = [
        "\n".join([*_targets(device, found, found["targets"]), *_ways(found["cases"]), *_bits(found)])
        for device, found in _measured_gpus(results)
    ]
    return "\n\n".join(parts) or "No GPU has been measured yet."


def gpu_summary(results: Path) -> str:
    """The targets that the design set, how many of all are met, and what was found of bits, per GPU."""
    parts = []
    for device, found in _measured_gpus(results):
        shown = [row for row in found["targets"] if re.match(_SHOWN, row["name"])]
        verdicts = [_verdict(row) for row in found["targets"]]
        told = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
        told = f"Of all {len(verdicts)} targets: {told}."
        parts.append("\n".join([*_targets(device, found, shown), "", told, *_bits(found)]))
    return "\n\n".join(parts) or "No GPU has been measured yet."


def _measured_gpus(results: Path) -> list[tuple[str, Results]]:
    return [(device, found) for device, found in read_devices(results).items() if found.get("targets")]


def _targets(device: str, found: Results, targets: list[Case]) -> list[str]:
    machine, software = found["machine"], next(iter(found["suites"].values()))
    versions = ", ".join(f"{name} {software[name]}" for name in ("torch", "triton", "date") if software.get(name))
    head = [f"{machine.get('gpu', device)} ({versions}):", "", "| | target | measured | |", "| --- | --- | --- | --- |"]
    return [*head, *map(_target, targets)]


def _ways(cases: list[Case]) -> list[str]:
    """A training step in every way that was timed, with its spread, as a table of ways by shapes."""
    steps = {
        (case["peer"], case["group"]): f"{time_text(case['median_s'])} ± {time_text(case['iqr_s'])}"
        for case in measured(cases)
        if case["suite"] == "step"
    }
    shapes, ways = sorted({group for _, group in steps}), dict.fromkeys(way for way, _ in steps)
    if not steps:
        return []
    head = ["", f"| {' | '.join(['a step of', *shapes])} |", "| --- |" + " --- |" * len(shapes)]
    return head + [f"| {way} | {' | '.join(steps.get((way, shape), '') for shape in shapes)} |" for way in ways]


def _bits(found: Results) -> list[str]:
    """What was found of bits, a sentence each."""
    checks = found.get("checks", {})
    repeats, train = checks.get("repeats"), checks.get("train")
    told = []
    if repeats:
        others = f"{len(repeats['differing'])} gave other bits, also of an item alone"
        what = f"{repeats['swept']} of {repeats['configurations']} configurations of the operators"
        told.append(f"{what} were called {repeats['repeats']:,} times under load: {others}.")
    if repeats and (fresh := repeats["processes"])["processes"]:
        moved = len(fresh["differing_digests"]) + len(fresh["differing_cubins"])
        what = f"{fresh['results']} results and the machine code of {fresh['kernels']} kernels"
        told.append(f"{fresh['processes']} processes with cold caches compared {what}: {moved} differ.")
    if train and train["same_bits"] is not None:
        told.append(_training(train))
    return ["", " ".join(told)] if told else []


def _training(train: Mapping[str, Any]) -> str:
    updates, dev = [f"{n:,}" for n in train["updates"]], train["dev_scores"]
    what = f"Three stages of {', '.join(updates[:-1])} and {updates[-1]} updates on {train['scenes']:,} roofs"
    twice = "trained twice"
    if train.get("killed_after"):
        twice += f", the second time killed after update {train['killed_after']:,}"
        twice += f" and resumed from {train['resumed_from']:,}"
    same = "the same bytes" if train["same_bits"] else "other bytes"
    scores = ", ".join(f"{score:.3f}" for score in dev["hss"])
    after = f"; HSS after each on {dev['scenes']} other roofs: {scores}" if scores else ""
    beside = ", ".join(f"{name.replace('_', ' ')} {score:.3f}" for name, score in dev.get("yardsticks", {}).items())
    return f"{what}, {twice}: {same}{after}{f' ({beside})' if beside else ''}."


def _target(row: Case) -> str:
    bound = f"{'at least' if row['least'] else 'at most'} {row['target']:g} {row['unit']}".rstrip()
    found = "" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}".rstrip()
    return f"| {row['name']} | {bound} | {found} | {_verdict(row)} |"


def _verdict(row: Case) -> str:
    if row["measured"] is None:
        return "not measured"
    return "noise" if row.get("noise") else "met" if row["met"] else "missed"


REGIONS: dict[str, Callable[[Path], str]] = {
    "demo": demo, "steps": steps, "operators": operators, "gpu_summary": gpu_summary, "gpus": gpus,
}  # fmt: skip
