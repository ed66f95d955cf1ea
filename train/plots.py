"""What the report page draws: curves over steps and scenes in space, as the values of plotly traces.

A figure is a dict that `report_page.html` reads: `traces` in plotly's terms, without colours of the page, and `axes`
or `box`. Values that are missing or not finite leave gaps, a curve without any value is left out, and so is a figure
without curves.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
Line = Mapping[str, Any]

BLUE, ORANGE, GREEN, VIOLET, GOLD, GREY = "#3f83c8", "#e2602c", "#2a9d78", "#9a6fd0", "#c08a1a", "#8a8f98"
TRUTH_COLOR, PREDICTION_COLOR = GREEN, ORANGE

# class_id -> name and colour: corners are vivid, edges follow them, surfaces stay behind
POINT_CLASSES = (
    ("apex", "#d7263d"),
    ("eave end point", "#e8b004"),
    ("flashing end point", "#c2185b"),
    ("rake", "#3f6fd8"),
    ("ridge", "#7b4fd0"),
    ("eave", "#4db3ea"),
    ("hip", "#5a8f29"),
    ("valley", "#8d6e2f"),
    ("flashing", "#d05fa8"),
    ("step flashing", "#a8577e"),
    ("roof", "#9aa7b8"),
    ("other house", "#b7a48c"),
    ("non-house", "#c3c6c9"),
)


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def draw_curves(metrics: Sequence[Line], speed: Sequence[Line], yardstick: float | None = None) -> list[Figure]:
    """Build the curves of a run.

    Args:
        metrics: lines of metrics.jsonl.
        speed: lines of speed.jsonl.
        yardstick: HSS of the label-cluster heuristic, drawn as a level.
    Returns:
        Figures with title, note, traces, axis titles and the steps at which stages ended.
    """
    train = [line for line in metrics if line.get("kind") == "train"]
    evals = [line for line in metrics if line.get("kind") == "eval"]
    stages = [line for line in metrics if line.get("kind") == "stage"]
    score = [
        _curve(evals, "hss_mean", "HSS", BLUE, markers=True),
        _curve(evals, "corner_f1_mean", "corner F1", VIOLET, markers=True),
        _curve(evals, "edge_iou_mean", "edge IoU", GREEN, markers=True),
        _curve(_level(evals, yardstick), "level", "HSS of label clusters", GREY, dash="dot"),
    ]
    losses = [
        _curve(evals, "train_loss", "training rows", BLUE, markers=True),
        _curve(evals, "dev_loss", "dev rows", ORANGE, markers=True),
        _curve(evals, "ratio", "dev / training (right)", GREY, dash="dot", right=True),
    ]
    parts = [
        _curve(train, "loss", "total", BLUE),
        _curve(train, "transport", "transport", GREEN),
        _curve(train, "conf", "confidence", VIOLET),
        _curve(train, "endpoint", "endpoint", GOLD),
    ]
    matching = [
        _curve(train, "mass", "matched mass per true segment", BLUE),
        _curve(train, "kept", "queries above 0.5 per true segment", ORANGE),
        _curve(train, "dustbin", "dustbin share", GREY),
    ]
    figures = [
        _figure("Score on dev scenes", "Between the ends of stages: the first dev scenes only.", score, "score"),
        _figure("Loss without noise", "No augmentation, no dropout. Another stage, another sum.", losses, "loss"),
        _figure("Loss of the training batches", "Parts before their weights.", parts, "loss", log=True),
        _figure("Matching", "Mass near 0 would be a collapse into the dustbin.", matching, "share"),
        _figure("Learning rate", "", [_curve(train, "lr", "learning rate", BLUE)], "learning rate"),
        _figure("Gradient norm", "Before clipping.", [_curve(train, "grad_norm", "norm", BLUE)], "norm", log=True),
        _figure("Temperature", "The largest of all attention heads.", [_curve(train, "tau", "tau", BLUE)], "tau"),
        _figure(
            "Speed",
            "Steps alone: evaluation and checkpoints are left out.",
            [
                _curve(speed, "scenes_per_second", "scenes per second", BLUE),
                _curve(speed, "memory_mb", "memory, MB (right)", GREY, dash="dot", right=True),
            ],
            "scenes / s",
        ),
    ]
    ends = [step for line in stages if (step := finite(line.get("step"))) is not None]
    return [{**figure, "ends": ends} for figure in figures if figure["traces"]]


def draw_scene(example: Line) -> Figure:
    """Build one dev scene in space: points by class, truth and prediction; metres, Z of the drawing is up.

    Raises:
        ValueError, TypeError, KeyError, IndexError: the example is not of the form that `train/examples.py` writes.
    """
    points, classes = [_upright(p) for p in example["points"]], example["class_id"]
    if len(points) != len(classes):
        raise ValueError(f"class_id must have {len(points)} values as points has, got {len(classes)}")
    if not points:
        raise ValueError("points must hold at least one point")
    traces = []
    for index, (name, color) in enumerate(POINT_CLASSES):
        members = [p for p, c in zip(points, classes, strict=True) if c == index]
        if members:
            size = 3.6 if index < 3 else 2.2
            marker = {"size": size, "color": color, "opacity": 0.9 if index < 10 else 0.75}
            traces.append({**_columns(members), "mode": "markers", "marker": marker, "name": name, "layer": name})
    wireframes = {
        "truth": ([_upright(v) for v in example["truth"]["vertices"]], example["truth"]["edges"], TRUTH_COLOR),
        "prediction": (
            [_upright(v) for v in example["prediction"]["vertices"]],
            example["prediction"]["edges"],
            PREDICTION_COLOR,
        ),
    }
    for name, (vertices, edges, color) in wireframes.items():
        look = {"mode": "lines+markers", "line": {"width": 5, "color": color}, "marker": {"size": 3.2, "color": color}}
        traces.append({**_columns(_joined(vertices, edges)), **look, "name": name, "layer": name})
    truth, prediction = wireframes["truth"][0], wireframes["prediction"][0]
    return {"traces": [{"type": "scatter3d", **trace} for trace in traces], "box": _box(points, truth, prediction)}


def _curve(
    lines: Iterable[Line],
    key: str,
    name: str,
    color: str,
    *,
    markers: bool = False,
    dash: str = "solid",
    right: bool = False,
) -> dict[str, Any] | None:
    """One trace, or None where no line has a value."""
    pairs = [(finite(line.get("step")), finite(line.get(key))) for line in lines]
    pairs = [(step, value) for step, value in pairs if step is not None]
    if all(value is None for _, value in pairs):
        return None
    return {
        "type": "scatter",
        "x": [step for step, _ in pairs],
        "y": [value for _, value in pairs],
        "name": name,
        "mode": "lines+markers" if markers else "lines",
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"size": 6},
        **({"yaxis": "y2"} if right else {}),
    }


def _level(lines: Sequence[Line], value: float | None) -> list[Line]:
    """The first and the last of the lines' steps, at one value."""
    return [{"step": line.get("step"), "level": value} for line in (*lines[:1], *lines[-1:])]


def _figure(title: str, note: str, traces: Iterable[Any], axis: str, *, log: bool = False) -> Figure:
    return {"title": title, "note": note, "traces": [t for t in traces if t], "axis": axis, "log": log}


def _upright(xyz: Sequence[float]) -> tuple[float, float, float]:
    """Y up to Z up, as a rotation."""
    x, y, z = map(float, xyz)
    return x, -z, y


def _columns(points: Sequence[Sequence[float | None]]) -> dict[str, list[float | None]]:
    return {axis: [point[i] for point in points] for i, axis in enumerate("xyz")}


def _joined(vertices: Sequence[Sequence[float]], edges: Iterable[Sequence[int]]) -> list[Sequence[float | None]]:
    """The ends of all edges with gaps between them, as one line."""
    gap = (None, None, None)
    return [point for start, end in edges for point in (vertices[start], vertices[end], gap)]


def _box(points: Sequence[Sequence[float]], *wireframes: Sequence[Sequence[float]]) -> list[list[float]]:
    """What is shown per axis: all vertices, and the points but for those that lie far out.

    Far out is farther from the middle 96 % of the points than half their width.
    """
    box = []
    for axis in range(3):
        values = sorted(point[axis] for point in points)
        cut = len(values) // 50
        far = (values[-1 - cut] - values[cut]) / 2
        near = [value for value in values if values[cut] - far <= value <= values[-1 - cut] + far]
        shown = [near[0], near[-1], *(vertex[axis] for wireframe in wireframes for vertex in wireframe)]
        margin = 0.03 * (max(shown) - min(shown)) + 0.1
        box.append([round(min(shown) - margin, 3), round(max(shown) + margin, 3)])
    return box
