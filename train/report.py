"""The page of a run: `python -m train.report RUN_DIR` writes RUN_DIR/report.html, one file that needs no network.

Everything on it comes from the run directory: config.json, metrics.jsonl, speed.jsonl, scores.json, examples.json and
certificate.json. What is not there yet, or cannot be read, is said on the page instead.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from train.checkpoint import write_atomically
from train.plots import POINT_CLASSES, PREDICTION_COLOR, TRUTH_COLOR, Figure, draw_curves, draw_scene, finite

TEMPLATE = Path(__file__).with_name("report_page.html")

# steps, dev HSS and corner F1 after each stage of the run that made the published checkpoint
PUBLISHED = ((125_000, 0.281, 0.156), (135_000, 0.351, 0.190), (170_000, 0.382, 0.411))
PUBLISHED_DATA = "hf://usm3d/s23dr-2026-sampled"
SCORES = {"hss_mean": "HSS", "corner_f1_mean": "corner F1", "edge_iou_mean": "edge IoU"}
QUANTILES = {"hss_q5": "HSS 5 %", "hss_q25": "25 %", "hss_q50": "50 %", "hss_q75": "75 %", "hss_q95": "95 %"}
YARDSTICKS = {
    "truth_through_postprocessing": "the truth, through the post-processing",
    "label_clusters": "label clusters: a heuristic that learns nothing",
}


@dataclass(kw_only=True)
class RunFiles:
    """What a run directory holds; `problems` says what is missing or cannot be read."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: list[Mapping[str, Any]] = field(default_factory=list)
    speed: list[Mapping[str, Any]] = field(default_factory=list)
    scores: Mapping[str, Any] = field(default_factory=dict)
    examples: list[Any] = field(default_factory=list)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self, kind: str) -> list[Mapping[str, Any]]:
        """The lines of metrics.jsonl of one kind."""
        return [line for line in self.metrics if line.get("kind") == kind]

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """The stages of the recipe."""
        return [stage for stage in _list(self.config.get("stages")) if isinstance(stage, Mapping)]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, of a finished run or one that is under way.

    Returns:
        The path of the page.
    Raises:
        ValueError: `run_dir` is no directory.
        ImportError: plotly is not installed.
        OSError: the page cannot be written; an older one stays whole.
    Determinism: equal files in the directory give equal bytes.
    """
    from plotly.offline import get_plotlyjs

    run = read_run(run_dir)
    scenes, captions = _draw_scenes(run)
    curves = draw_curves(run.metrics, run.speed, _yardstick(run, "label_clusters"))
    parts = {
        "title": escape(f"{run.name} - report"),
        "body": "\n".join([_head(run), _stages(run), _curves(curves), _scenes(captions), _evidence(run)]),
        "plotly": get_plotlyjs(),
        "figures": _embedded({"curves": curves, "scenes": scenes}),
    }
    # one pass: what a part holds is never taken for a place to fill
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text())
    path = Path(run_dir) / "report.html"
    write_atomically(path, page.encode())
    return path


def read_run(run_dir: str | Path) -> RunFiles:
    """Read what a run directory holds.

    Raises:
        ValueError: `run_dir` is no directory.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise ValueError(f"run_dir must be the directory of a run, got {str(run_dir)!r}")
    run = RunFiles(name=directory.resolve().name)
    for name, kind in (("config", dict), ("scores", dict), ("examples", list), ("certificate", dict)):
        path = directory / f"{name}.json"
        if not path.exists():
            if name != "certificate":
                run.problems.append(f"{path.name} is not there")
            continue
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            run.problems.append(f"{path.name} cannot be read ({error})")
            continue
        if isinstance(value, kind):
            setattr(run, name, value)
        else:
            run.problems.append(f"{path.name} holds no {kind.__name__}")
    for name in ("metrics", "speed"):
        path = directory / f"{name}.jsonl"
        if path.exists():
            setattr(run, name, _read_lines(path, run.problems))
        else:
            run.problems.append(f"{path.name} is not there")
    return run


def _read_lines(path: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    values, bad = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        else:
            bad += 1
    if bad:
        problems.append(f"{path.name}: {bad} lines cannot be read")
    return values


def _head(run: RunFiles) -> str:
    """Title, state of the run, the main numbers, and what has to be said about them."""
    step = max((int(s) for line in run.metrics if (s := finite(line.get("step"))) is not None), default=0)
    until = max((int(s) for stage in run.stages if (s := finite(stage.get("until"))) is not None), default=0)
    state = f"step {step:,}" + (f" of {until:,}" if until else "")
    complete = bool(run.stages) and any(line.get("stage") == len(run.stages) for line in run.lines("stage"))
    facts = [f"complete, {step:,} steps" if complete else f"unfinished: {state}"]
    seconds = sum(finite(line.get("seconds")) or 0 for line in run.speed)
    if seconds:
        facts.append(f"{_duration(seconds)} of training steps")
    facts += [f"{key} {run.config[key]}" for key in ("seed", "threads", "precision", "impl") if key in run.config]
    recipe = str(run.config.get("name", run.name))
    title = recipe if recipe == run.name else f"{run.name} (recipe {recipe})"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(" · ".join(facts))}</p>', _tiles(run)]
    parts += [f'<p class="callout">{sentence}</p>' for sentence in _plain_words(run)]
    if run.problems:
        parts.append(f'<p class="note">Not on this page: {escape("; ".join(run.problems))}.</p>')
    return "\n".join(parts)


def _tiles(run: RunFiles) -> str:
    scored = [line for line in (*run.lines("eval"), *run.lines("stage")) if finite(line.get("hss_mean")) is not None]
    if not scored:
        return '<p class="note">No evaluation yet.</p>'
    last = max(scored, key=lambda line: finite(line.get("step")) or 0)
    values = [(f"dev HSS, {last.get('scenes', '?')} scenes", last.get("hss_mean"), "main")]
    values += [(SCORES[key], last.get(key), "") for key in ("corner_f1_mean", "edge_iou_mean")]
    values += [
        (f"HSS of {label}", _yardstick(run, key), "")
        for key, label in (
            ("label_clusters", "label clusters"),
            ("truth_through_postprocessing", "truth, post-processed"),
        )
    ]
    tiles = [f'<div class="tile {c}"><b>{_number(v)}</b><span>{escape(n)}</span></div>' for n, v, c in values]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _plain_words(run: RunFiles) -> list[str]:
    """What a reader must not overlook."""
    model = finite(_mapping(run.scores.get("summary")).get("hss_mean"))
    heuristic = _yardstick(run, "label_clusters")
    if model is None or heuristic is None or heuristic <= model:
        return []
    return [
        f"On these scenes the label-cluster heuristic, which learns nothing, is better: HSS {heuristic:.3f} against "
        f"{model:.3f} of the trained model. It joins points that are already labelled as corners and edges, and does "
        "as well as the labels are clean."
    ]


def _stages(run: RunFiles) -> str:
    """The table of stages beside the published one, and the yardsticks."""
    header = ["stage", "data", "steps", "dev scenes", *SCORES.values(), "steps", "HSS", "corner F1"]
    rows = []
    for number, stage in enumerate(run.stages, start=1):
        line = next((line for line in run.lines("stage") if line.get("stage") == number), {})
        published = PUBLISHED[number - 1] if number <= len(PUBLISHED) else (None, None, None)
        rows.append(
            [
                f"{number} · {escape(str(stage.get('name', '')))}",
                f"<code>{escape(str(stage.get('data', '')))}</code>",
                _number(stage.get("until"), 0),
                _number(line.get("scenes"), 0),
                *(_number(line.get(key)) for key in SCORES),
                *(_number(value, digits) for value, digits in zip(published, (0, 3, 3), strict=True)),
            ]
        )
    parts = ["<h2>Stages</h2>"]
    if rows:
        parts += [_table(header, rows, beside=3, group="published"), f'<p class="note">{_published_note(run)}</p>']
    else:
        parts.append('<p class="note">No stages: config.json is missing.</p>')
    yardsticks = _mapping(run.scores.get("yardsticks"))
    measured = {"this run": run.scores.get("summary"), **{YARDSTICKS.get(k, k): v for k, v in yardsticks.items()}}
    if run.scores:
        title = f"Yardsticks: {run.scores.get('set', '')} set, {run.scores.get('scenes', '?')} scenes"
        columns = SCORES | QUANTILES
        lines = [[escape(k), *(_number(_mapping(v).get(c)) for c in columns)] for k, v in measured.items()]
        parts += [f"<h2>{escape(title)}</h2>", _table(["", *columns.values()], lines)]
    return "\n".join(parts)


def _published_note(run: RunFiles) -> str:
    data = [str(stage.get("data", "")) for stage in run.stages]
    if all(uri.startswith(PUBLISHED_DATA) for uri in data):
        return (
            "Published: the single run that made the published checkpoint, on the same dev slice. "
            "Runs of the published code again end between 0.342 and 0.379."
        )
    return (
        "Published: the full-size model after 170,000 steps on the challenge's real scenes. That is another data "
        "set, a bigger model and other settings: the columns show how the stages behave there and "
        "<strong>cannot be compared</strong> with this run's numbers."
    )


def _curves(curves: Sequence[Figure]) -> str:
    cards = [
        f'<div class="card"><h3>{escape(figure["title"])}</h3><p class="note">{escape(figure["note"])}</p>'
        f'<div class="plot" id="curve{index}"></div></div>'
        for index, figure in enumerate(curves)
    ]
    note = "Dotted verticals: ends of stages." if cards else "Nothing is logged yet."
    return f'<h2>Curves</h2><p class="note">{note}</p><div class="figures curves">{"".join(cards)}</div>'


def _draw_scenes(run: RunFiles) -> tuple[list[Figure], list[str]]:
    """The scenes that can be drawn, and a caption for each; one that cannot is a problem of the run."""
    figures, captions = [], []
    for index, example in enumerate(run.examples):
        try:
            figures.append(draw_scene(example))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            run.problems.append(f"examples.json: scene {index + 1} cannot be drawn ({type(error).__name__}: {error})")
            continue
        place = finite(example.get("percentile"))
        where = f" · {place:.0f}th percentile of the dev scores" if place is not None else ""
        counts = " · ".join(
            f"{kind}: {len(example[kind]['vertices'])} vertices, {len(example[kind]['edges'])} edges"
            for kind in ("truth", "prediction")
        )
        title = f"HSS {_number(example.get('hss'))}"
        captions.append(
            f"<h3>{title}</h3><p class='note'>{escape(str(example.get('order_id', '')))}{where}<br>{counts}</p>"
        )
    return figures, captions


def _scenes(captions: Sequence[str]) -> str:
    if not captions:
        return '<h2>Scenes</h2><p class="note">No scenes: they are saved when the last stage ends.</p>'
    layers = (("truth", TRUTH_COLOR), ("prediction", PREDICTION_COLOR), *POINT_CLASSES)
    buttons = [
        f'<button type="button" aria-pressed="true" data-layer="{escape(name)}">'
        f'<i style="background:{color}"></i>{escape(name)}</button>'
        for name, color in layers
    ]
    cards = [
        f'<div class="card">{caption}<div class="plot" id="scene{index}"></div></div>'
        for index, caption in enumerate(captions)
    ]
    return (
        '<h2>Scenes</h2><p class="note">Dev scenes, never trained on. Drag to turn, scroll to zoom; the buttons switch '
        f'layers in all of them.</p><div class="layers">{"".join(buttons)}</div>'
        f'<div class="figures scenes">{"".join(cards)}</div>'
    )


def _evidence(run: RunFiles) -> str:
    """Digests of data and weights, the certificate, and the resolved recipe."""
    digests = [
        [f"rows trained on, stage {line.get('stage')}", line.get("train_digest"), line.get("trained_on")]
        for line in run.lines("data")
    ]
    digests += [
        [f"dev rows, stage {line.get('stage')}", line.get("dev_digest"), line.get("dev")] for line in run.lines("data")
    ]
    digests += [[f"weights after stage {line.get('stage')}", line.get("weights"), None] for line in run.lines("stage")]
    rows = [
        [escape(name), _number(count, 0) if count is not None else "", f'<span class="digest">{escape(str(d))}</span>']
        for name, d, count in digests
    ]
    parts = ["<h2>Evidence</h2>"]
    if rows:
        parts.append(_table(["of", "rows", "SHA-256"], rows))
    for title, value in (("Certificate", _without_sources(run.certificate)), ("Recipe, resolved", run.config)):
        if value:
            parts.append(f"<details><summary>{title}</summary>{_tree(value)}</details>")
        else:
            parts.append(f'<p class="note">{title}: not in the run directory.</p>')
    return "\n".join(parts)


def _without_sources(certificate: Mapping[str, Any]) -> Mapping[str, Any]:
    """A certificate with the number of its sources in place of their digests."""
    code = certificate.get("code")
    if not isinstance(code, Mapping) or not isinstance(code.get("files"), Mapping):
        return certificate
    return {**certificate, "code": {**code, "files": len(code["files"])}}


def _tree(value: Any) -> str:
    """Nested values as nested lists."""
    if isinstance(value, Mapping):
        items = "".join(f"<dt>{escape(str(k))}</dt><dd>{_tree(v)}</dd>" for k, v in value.items())
        return f"<dl>{items}</dl>"
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return "".join(_tree(item) for item in value)
    return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, beside: int = 0, group: str = "") -> str:
    """Cells are HTML; the last `beside` columns are set apart under the title `group`."""
    numeric = [all(re.fullmatch(r"[\d.,]*|-", row[i]) for row in rows) for i in range(len(header))]

    def attributes(i: int) -> str:
        names = [name for name, on in (("number", numeric[i]), ("beside", i >= len(header) - beside)) if on]
        return f' class="{" ".join(names)}"' if names else ""

    lines = []
    if group:
        lines.append(
            f'<tr><th colspan="{len(header) - beside}"></th><th class="beside" colspan="{beside}">{group}</th></tr>'
        )
    lines.append("<tr>" + "".join(f"<th{attributes(i)}>{escape(h)}</th>" for i, h in enumerate(header)) + "</tr>")
    lines += ["<tr>" + "".join(f"<td{attributes(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _yardstick(run: RunFiles, name: str) -> float | None:
    return finite(_mapping(_mapping(run.scores.get("yardsticks")).get(name)).get("hss_mean"))


def _number(value: Any, digits: int = 3) -> str:
    number = finite(value)
    return "-" if number is None else f"{number:,.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else []


def _embedded(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a run and print where it is; exit code 1 if it cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Write the page of a run.")
    parser.add_argument("run_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(f"report: {write_report(options.run_dir)}")
    except (ValueError, ImportError, OSError) as error:
        print(f"train.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
