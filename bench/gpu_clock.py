"""How long a call takes on the device: replays of a CUDA graph between events; on a CPU, wall time.

graph    many replays between two events, divided: launches cost nothing, inputs may stay in the L2 cache
cold     one replay at a time, after the L2 cache has been overwritten
wall     launch by launch, until the device is done: what a caller without a graph waits
wall_one_thread    the same with the backward pass on the caller's thread: autograd has a thread for each device, and
         handing work to it and back is most of what a short backward pass waits for
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.measure import device_seconds, quartiles, record, significant

ROUNDS, WARM_UP = 15, 5
# rounds of calls that take longer than this are fewer, so that they take about so long together
LONG_S, _LONG_ROUNDS_S, _LEAST_ROUNDS = 0.1, 1.5, 3
# a round is so long that the resolution of events (0.5 us) does not show
_ROUND_S = 2e-3
_MOST_REPLAYS = 200


def measure(run: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> dict[str, Any]:
    """Time a call; the medians and quartile distances are seconds.

    Returns:
        clock: "graph", or "stream" where the call could not be recorded and is timed launch by launch between events,
        or "wall" on a CPU. median_s, iqr_s, rounds; on a GPU also cold_median_s, wall_median_s, wall_iqr_s,
        wall_one_thread_median_s and wall_one_thread_iqr_s.
    """
    wall = _wall_seconds(run, device)
    if device.type != "cuda":
        return {"clock": "wall", **_summary(wall), "rounds": len(wall)}
    with torch.autograd.set_multithreading_enabled(False):
        one_thread = _wall_seconds(run, device)
    try:
        graph, _ = record(run)
        clock, replay = "graph", graph.replay
    except RuntimeError as refusal:
        torch.cuda.synchronize()
        clock, replay = f"stream: {str(refusal).partition(chr(10))[0][:120]}", run
    once = statistics.median(_event_seconds(replay, 1, 3))
    rounds, replays = rounds_of(once), int(min(max(_ROUND_S / max(once, 1e-7), 1), _MOST_REPLAYS))
    return {
        "clock": clock,
        **_summary(_event_seconds(replay, replays, rounds)),
        "rounds": rounds,
        "cold_median_s": significant(statistics.median(device_seconds(replay, rounds))),
        **_summary(wall, "wall_"),
        **_summary(one_thread, "wall_one_thread_"),
    }


def rounds_of(call_s: float) -> int:
    """How many rounds a call is timed, by how long it takes."""
    return ROUNDS if call_s <= LONG_S else max(int(_LONG_ROUNDS_S / call_s), _LEAST_ROUNDS)


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
    # the first call may load and compile, which says nothing about the others
    _wall(run, device)
    once = _wall(run, device)
    for _ in range(WARM_UP if once <= LONG_S else 0):
        once = _wall(run, device)
    return [_wall(run, device) for _ in range(rounds_of(once))]


def _wall(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _summary(seconds: Sequence[float], clock: str = "") -> dict[str, float]:
    median, spread = quartiles(seconds)
    return {f"{clock}median_s": median, f"{clock}iqr_s": spread}
