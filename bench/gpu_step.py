"""A training step of the published model on the GPU: ours in several forms, and PyTorch's ways to it.

Each way has a process of its own for each shape, and shows the loss of float64 before it is timed; a way of
torch.compile shows that of what it compiles, and its rows have no error: see `bench.gpu_step_ways.plain_way`. All are
prepared side by side and timed one after the other, alone; ours is profiled, too. Rows are generated roofs.
"""

import argparse
import itertools
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_process import Ended, Sheet, Workers, end_on_sigterm, end_with_parent, note, stay, wait_for_turn
from bench.gpu_step_ways import COMPILED, OURS, UNBOUNDED, WAYS, build_way, checked_error
from bench.measure import quartiles, significant
from train.determinism import CUBLAS_WORKSPACE

SHAPES = {"32 x 2048": (32, 2048), "64 x 4096": (64, 4096)}
# the relative error of the loss that bf16 may show
TOLERANCE = 3e-2
WARM_UP, SETTLE, ROUNDS, PROFILED, KERNELS = 8, 5, 20, 3, 40
_PROCESSES = 20
# many processes compile side by side: each starts few of its own; more where many kernels are tried out
_COMPILER_THREADS = {True: "8", False: "3"}
# of the time that one way at one shape may take when it is its turn
TURN_SHARE = 0.2


def asked_for(ways: Sequence[str], shapes: Sequence[str]) -> list[tuple[str, str]]:
    """Ways and shapes in the order of their turns; what tries out kernels at the first shape only."""
    return [(way, shape) for way in ways for shape in (shapes[:1] if _tries_out(way) else shapes)]


def _tries_out(way: str) -> bool:
    return "max-autotune" in way


def warm_up(one_step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Make the first steps, which load, compile and record; return how long the first one took."""
    started = time.perf_counter()
    one_step()
    _finish(device)
    first_call_s = time.perf_counter() - started
    for _ in range(WARM_UP):
        one_step()
    _finish(device)
    return {"first_call_s": round(first_call_s, 1)}


def time_steps(one_step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Time whole steps, one after the other as in training."""
    on_gpu = device.type == "cuda"
    for _ in range(SETTLE):
        one_step()
    _finish(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)] if on_gpu else []
    if events:
        events[0].record()
    walls = [time.perf_counter()]
    for number in range(ROUNDS):
        one_step()
        if events:
            events[number + 1].record()
        walls.append(time.perf_counter())
    _finish(device)
    total_s = time.perf_counter() - walls[0]
    between = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    median, spread = quartiles(between or [b - a for a, b in itertools.pairwise(walls)])
    return {
        "median_s": median,
        "iqr_s": spread,
        "rounds": ROUNDS,
        "wall_mean_s": significant(total_s / ROUNDS),
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(one_step: Callable[[], object]) -> dict[str, Any]:
    """Device time of a step by kernel name: milliseconds and launches, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        for _ in range(PROFILED):
            one_step()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in recorded.events() or ():
        if event.device_type.name == "CUDA":
            totals[event.name][0] += event.time_range.elapsed_us() / 1e3 / PROFILED
            totals[event.name][1] += 1 / PROFILED
    longest = sorted(totals.items(), key=lambda pair: -pair[1][0])
    return {
        "device_ms": round(sum(ms for ms, _ in totals.values()), 4),
        "launches": round(sum(count for _, count in totals.values())),
        "kernels": [[name[:100], round(ms, 4), round(count, 1)] for name, (ms, count) in longest[:KERNELS]],
    }


def _work(way: str, shape: str) -> int:
    """Be a worker: prepare, wait for the turn, note what was measured; of ours also a profile."""
    end_with_parent()
    at, machine, one_step, loss = build_way(way, SHAPES[shape])
    case = _case(way, shape)
    error = checked_error(at, machine, loss)
    if not error <= TOLERANCE:
        note(case={**case, "red": f"the loss errs by {error:.1e} against float64"})
        return 1
    # from the first step on: what a replay of a graph uses belongs to the graph and does not count as allocated
    torch.cuda.reset_peak_memory_stats()
    case |= warm_up(one_step, machine.device)
    case |= {"peak_mb": round(torch.cuda.max_memory_allocated() / 1e6), "precision": machine.precision}
    case |= notes_of(way, error)
    torch.cuda.empty_cache()
    note(case={**case, "refused": "prepared, but had no turn"})
    wait_for_turn()
    note(case=case | time_steps(one_step, machine.device))
    if way == OURS:
        note(profile={shape: profile(one_step)})
    torch.cuda.empty_cache()
    stay()
    return 0


def notes_of(way: str, error: float) -> dict[str, Any]:
    """What a way's row says beside its times.

    Returns:
        error: of the loss, where the code that was checked is what is timed; of torch.compile, whose code was not, how
        many graphs it made of the step, and how many of them it could not record as a CUDA graph.
    """
    if not way.startswith(COMPILED):
        return {"error": f"{error:.1e}"}
    from torch._dynamo.utils import counters

    skips = counters["inductor"]["cudagraph_skips"]
    return {"graphs": counters["stats"]["unique_graphs"], "cudagraph_skips": skips}


def time_ways(
    ways: Sequence[str],
    shapes: Sequence[str],
    sheet: Sheet,
    *,
    at_once: int,
    seconds: float = math.inf,
    prepare: float = math.inf,
) -> None:
    """Time each way at each shape in a process of its own, keeping the sheet up to date."""
    cases: dict[str, dict[str, Any]] = {}
    content = sheet.content
    content |= {"cases": [], "profiles": {}, "errors": []}
    sheet.write()
    module = [sys.executable, "-m", "bench.gpu_step", "--worker"]
    both = {f"{way}, {shape}": (way, shape) for way, shape in asked_for(ways, shapes)}
    with Workers(seconds=seconds, at_once=at_once, prepare=prepare) as workers:
        for name, (way, shape) in both.items():
            threads = {"TORCHINDUCTOR_COMPILE_THREADS": _COMPILER_THREADS[_tries_out(way)]}
            environment = {"CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE, **threads}
            workers.start(name, [*module, way, "--shapes", shape], environment, turn_share=TURN_SHARE)
        for name, heard in workers:
            if not isinstance(heard, Ended):
                cases |= {name: heard["case"]} if "case" in heard else {}
                content["profiles"] |= heard.get("profile", {})
            elif heard.code != 0:
                how = "cut by the clock" if heard.code is None else f"exit {heard.code}"
                content["errors"].append(f"{name}: {how}: {heard.tail[-600:]}")
                case = cases.setdefault(name, _case(*both[name]))
                if not {"median_s", "red"} & set(case):
                    case["refused"] = how
            content["cases"] = list(cases.values())
            sheet.write()


def _case(way: str, shape: str) -> dict[str, Any]:
    return {"suite": "step", "group": f"training step, {shape}", "name": way, "peer": way}


def main() -> int:
    """Run the part; exit code 0 only if ours was timed at every shape, or all that was asked for without ours."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_step")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for timing, at most")
    parser.add_argument("--prepare", type=float, default=math.inf, help="seconds for compiling before that, at most")
    usual = [way for way in WAYS if way != UNBOUNDED]
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=usual, metavar="WAY", help="; ".join(WAYS))
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--processes", type=int, default=_PROCESSES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.worker, *options.shapes)
    end_on_sigterm()
    end_with_parent()
    sheet = Sheet(options.out)
    limits = {"seconds": options.seconds, "prepare": options.prepare}
    time_ways(options.ways, options.shapes, sheet, at_once=options.processes, **limits)
    timed = [(case["peer"], case["group"]) for case in sheet.content["cases"] if "median_s" in case]
    asked = asked_for(options.ways, options.shapes)
    print(f"{len(timed)} of {len(asked)} steps timed")
    needed = [pair for pair in asked if pair[0] == OURS or OURS not in options.ways]
    return int(any((way, f"training step, {shape}") not in timed for way, shape in needed))


if __name__ == "__main__":
    sys.exit(main())
