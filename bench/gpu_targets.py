"""What was promised of an H200, and how far the results of a run of `bench.gpu` are from it.

Another GPU may be measured as well; its targets would be others. Times of operators are device time by graph replay,
unless they are called wall times: of calls launched one by one, Python included. Those of the step are between the ends
of steps. Where two times differ by no more than both spreads together, their ratio is noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.spread import Ratio, within_spread

Results = Mapping[str, Mapping[str, Any]]
OURS = "ridgeline"
# updates of the published recipe at each shape
RECIPE_STEPS = {"32 x 2048": 125_000, "64 x 4096": 45_000}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One promise.

    Args:
        measure: the measured value, or ratio, from the parts' results; None where they do not have it.
        least: the value must be at least the target, otherwise at most.
    """

    name: str
    unit: str
    target: float
    measure: Callable[[Results], float | Ratio | None]
    least: bool = False

    def row(self, results: Results) -> dict[str, Any]:
        """Target, measured value, their ratio, whether it is met, and whether that is noise."""
        found = self.measure(results)
        measured, noise = found[:2] if isinstance(found, Ratio) else (found, False)
        ratio = None if measured is None or not self.target else measured / self.target
        met = None if measured is None else (measured >= self.target if self.least else measured <= self.target)
        return {"name": self.name, "unit": self.unit, "target": self.target, "least": self.least} | {
            "measured": measured,
            "ratio": ratio,
            "met": met,
            # a ratio near 1 says nothing of who is faster, but that it is not 10
            "noise": noise and self.target == 1,
        }


def seconds(part: str, group: str) -> Callable[[Results], float | None]:
    """Our time in a group of rows."""

    def find(results: Results) -> float | None:
        rows = results.get(part, {}).get("cases", ())
        return next((row.get("median_s") for row in rows if row["group"] == group and row["peer"] == OURS), None)

    return find


def scaled(find: Callable[[Results], float | None], factor: float) -> Callable[[Results], float | None]:
    """The same in another unit."""

    def measure(results: Results) -> float | None:
        value = find(results)
        return None if value is None else value * factor

    return measure


def times_faster(part: str, group: str, peer: str | None, clock: str = "") -> Callable[[Results], Ratio | None]:
    """How many times longer than ours a peer takes; None: the fastest of all peers. Clocks as in `within_spread`."""

    def measure(results: Results) -> Ratio | None:
        median = f"{clock}median_s"
        rows = [r for r in results.get(part, {}).get("cases", ()) if r["group"] == group and r.get(median)]
        ours = [row for row in rows if row["peer"] == OURS]
        others = [row for row in rows if not row["peer"].startswith(OURS) and peer in (None, row["peer"])]
        if not ours or not others:
            return None
        fastest = min(others, key=lambda row: row[median])
        return Ratio(fastest[median] / ours[0][median], within_spread(ours[0], fastest, clock))

    return measure


def counted(part: str, count: Callable[[Mapping[str, Any]], float | None]) -> Callable[[Results], float | None]:
    """A number from a part's own file."""
    return lambda results: count(results[part]) if results.get(part) else None


def recipe_minutes(results: Results) -> float | None:
    """All updates of the published recipe at the measured time of a step."""
    steps = {name: seconds("step", f"training step, {name}")(results) for name in RECIPE_STEPS}
    times = [count * step for (name, count) in RECIPE_STEPS.items() if (step := steps[name]) is not None]
    return sum(times) / 60 if len(times) == len(RECIPE_STEPS) else None


def _failed(tests: Mapping[str, Any]) -> float:
    return sum(n for outcome, n in tests["counts"].items() if outcome not in ("passed", "skipped"))


def _differing(repeats: Mapping[str, Any]) -> float | None:
    if not repeats["swept"]:
        return None
    swept = sum(bool(line["differing"] or line["alone_differs"] or line["not_finite"]) for line in repeats["swept"])
    processes = repeats["processes"]
    return swept + len(processes["differing_digests"]) + len(processes["differing_cubins"])


_MATCH, _BOTH = "match_segments, 64x64, detached", "forward and backward"
_CROSS = {"32 x 2048": "attention, cross 256x2048", "64 x 4096": "attention, cross 256x4096"}
# with autograd's thread for the device, as a caller has it, and without
_WALLS = {"wall time": "wall_", "wall time on one thread": "wall_one_thread_"}
TARGETS = (
    Target(name="tests that fail", unit="", target=0, measure=counted("tests", _failed)),
    Target(name="configurations whose bits move", unit="", target=0, measure=counted("repeats", _differing)),
    Target(
        name=f"match_segments, B = 64, {_BOTH}", unit="us", target=25,
        measure=scaled(seconds("matching", f"{_MATCH}, {_BOTH}"), 1e6),
    ),
    *(
        Target(
            name=f"match_segments: {name} takes, {told}", unit="x", target=target, least=True,
            measure=times_faster("matching", f"{_MATCH}, {_BOTH}", peer, clock),
        )
        for told, clock in _WALLS.items()
        for name, peer, target in (
            ("eager log domain", "log domain", 40), ("torch.compile", "log domain, torch.compile", 10)
        )
    ),
    Target(
        name=f"cross-attention, 32 x 2048, {_BOTH}", unit="ms", target=0.35,
        measure=scaled(seconds("attention", f"{_CROSS['32 x 2048']}, {_BOTH}"), 1e3),
    ),
    Target(
        name=f"cross-attention, 64 x 4096, {_BOTH}", unit="ms", target=1.2,
        measure=scaled(seconds("attention", f"{_CROSS['64 x 4096']}, {_BOTH}"), 1e3),
    ),
    *(
        Target(
            name=f"{group}, {_BOTH}: the fastest peer timed takes{told}", unit="x", target=1, least=True,
            measure=times_faster("attention", f"{group}, {_BOTH}", None, clock),
        )
        for told, clock in (("", ""), (", wall time", "wall_"))
        for group in (*_CROSS.values(), "attention, self 256x256", "attention, decoder 64x256")
    ),
    Target(
        name="training step, 32 x 2048", unit="ms", target=4,
        measure=scaled(seconds("step", "training step, 32 x 2048"), 1e3),
    ),
    Target(
        name="training step, 64 x 4096", unit="ms", target=8.5,
        measure=scaled(seconds("step", "training step, 64 x 4096"), 1e3),
    ),
    Target(name="170,000 steps of the recipe at these times", unit="min", target=15, measure=recipe_minutes),
    *(
        Target(
            name=f"training step, {name}: {told} takes", unit="x", target=target, least=True,
            measure=times_faster("step", f"training step, {name}", peer),
        )
        for told, peer, target in (("torch.compile", "torch.compile", 3), ("the fastest peer timed", None, 1))
        for name in RECIPE_STEPS
    ),
)  # fmt: skip


def compare(results: Results) -> list[dict[str, Any]]:
    """Every promise with what was measured of it."""
    return [target.row(results) for target in TARGETS]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the table for people."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [f"{'':{width}}  {'target':>12}  {'measured':>10}  {'ratio':>6}"]
    for row in rows:
        bound = f"{'>=' if row['least'] else '<='} {row['target']:g} {row['unit']}".strip()
        if row["measured"] is None:
            lines.append(f"{row['name']:{width}}  {bound:>12}  {'-':>10}  {'-':>6}  not measured")
            continue
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        met = "noise" if row["noise"] else "met" if row["met"] else "MISSED"
        lines.append(f"{row['name']:{width}}  {bound:>12}  {row['measured']:10.4g}  {ratio:>6}  {met}")
    return "\n".join(lines)
