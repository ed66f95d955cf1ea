"""How long a call takes on the device: replays of a CUDA graph between events; on a CPU, wall time.

graph    many replays between two events, divided: launches cost nothing, inputs may stay in the L2 cache
cold     one replay at a time, after the L2 cache has been overwritten
wall     launch by launch, until the device is done: what a caller without a graph waits
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.measure import device_seconds, quartiles, record, significant

ROUNDS = 15
# a round is so long that the resolution of events (0.5 us) does not show
_ROUND_S = 2e-3
_MOST_REPLAYS = 200


def measure(run: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> dict[str, Any]:
    """Time a call; the medians and quartile distances are seconds.

    Returns:
        clock: "graph", or "stream" where the call could not be recorded and is timed launch by launch between events,
        or "wall" on a CPU. median_s, iqr_s; on a GPU also cold_median_s and wall_median_s.
    """
    wall = _wall_seconds(run, device)
    if device.type != "cuda":
        return {"clock": "wall", **_summary(wall)}
    try:
        graph, _ = record(run)
        clock, replay = "graph", graph.replay
    except RuntimeError as refusal:
        torch.cuda.synchronize()
        clock, replay = f"stream: {str(refusal).partition(chr(10))[0][:120]}", run
    once = statistics.median(_event_seconds(replay, 1, 3))
    replays = int(min(max(_ROUND_S / max(once, 1e-7), 1), _MOST_REPLAYS))
    notes = {"clock": clock, **_summary(_event_seconds(replay, replays, ROUNDS))}
    return notes | {
        "cold_median_s": significant(statistics.median(device_seconds(replay, ROUNDS))),
        "wall_median_s": significant(statistics.median(wall)),
    }


def _event_seconds(replay: Callable[[], object], replays: int, rounds: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 / replays for begin, end in events]


def _wall_seconds(run: Callable[[], object], device: torch.device) -> list[float]:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    median, spread = quartiles(seconds)
    return {"median_s": median, "iqr_s": spread, "rounds": len(seconds)}
