"""A training step of the published model on the GPU: ours in several forms, and PyTorch's ways to it.

Each way has a process of its own for each shape, and shows the loss of float64 before it is timed. All are prepared
side by side and timed one after the other, alone. Rows are generated roofs; a step is augmentation, forward, loss,
backward, clipping and AdamW in bf16.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_process import Ended, Sheet, Workers, end_on_sigterm, note, wait_for_turn
from bench.gpu_rows import OURS
from bench.gpu_step_peers import PlainPerceiver, plain_loss
from bench.measure import quartiles, significant
from bench.stirred import stirred_model
from perceiver import products
from perceiver.model import Perceiver
from perceiver.scene import SceneBatch
from train.augment import augment
from train.batches import StageBatches, stage_data
from train.config import Recipe, StageConfig, load_recipe
from train.determinism import CUBLAS_WORKSPACE, Machine, enter
from train.graph import StageUpdates
from train.optim import build_optimizer
from train.step import predict_and_compare

SHAPES = {"32 x 2048": (32, 2048), "64 x 4096": (64, 4096)}
# rows whose loss is compared with float64, and the relative error that bf16 may show
CHECKED_ROWS, TOLERANCE = 8, 3e-2
WARM_UP, SETTLE, ROUNDS, PROFILED, KERNELS = 8, 5, 20, 3, 40
_PROCESSES = 16
# many processes compile side by side: each starts few of its own
COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
# of the time that one way at one shape may take when it is its turn
SHARE = 0.2
WAYS = (
    OURS,
    f"{OURS}, one stream",
    f"{OURS}, launch by launch",
    "eager",
    "eager, deterministic",
    "torch.compile",
    "torch.compile, max-autotune",
    "torch.compile, deterministic",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One shape of the training: recipe, stage and rows."""

    recipe: Recipe
    stage: StageConfig
    batches: StageBatches
    model: Perceiver


def setting(shape: tuple[int, int], machine: Machine, recipe: Recipe | None = None) -> Setting:
    """Build the published model off its start, where residual branches are 0, and rows for it."""
    scenes, points = shape
    recipe = recipe or load_recipe("s23dr")
    uri = f"roofs:real?points={points}&scenes={2 * scenes}"
    stage = dataclasses.replace(
        recipe.stages[-1], data=uri, until=1_000_000, batch=scenes, lr=1e-4, warmup=0, cooldown_steps=0
    )
    recipe = dataclasses.replace(recipe, stages=(stage,))
    model = stirred_model(recipe)
    batches = StageBatches(recipe, 1, stage_data(recipe, 1), machine.device)
    return Setting(recipe=recipe, stage=stage, batches=batches, model=model.to(machine.device))


def checked_error(at: Setting, machine: Machine, loss: Callable[[SceneBatch], torch.Tensor]) -> float:
    """Return the relative error of a way's loss, without dropout, against float64 on the first rows."""
    rows = at.batches.rows.rows(torch.arange(CHECKED_ROWS, device=machine.device))
    exact = {n: x.double() if x.is_floating_point() else x for n, x in vars(rows).items()}
    model = Perceiver(at.recipe.model, seed=0).to(machine.device).double()
    model.load_state_dict(at.model.state_dict())
    reference = Machine(device=machine.device, precision="fp32", impl="eager", threads=machine.threads)
    weight = at.stage.endpoint_weight
    with torch.no_grad():
        truth = predict_and_compare(model, SceneBatch(**exact), at.recipe, reference, endpoint_weight=weight)[1].total
        return float((loss(rows).double() - truth).abs() / truth.abs())


def our_way(at: Setting, machine: Machine, *, graph: bool) -> tuple[Callable[[], object], Callable]:
    """Return one step of ours, and its loss without dropout."""
    optimizer = build_optimizer(at.model, at.recipe.optim)
    updates = StageUpdates(
        at.model, optimizer, at.batches, stage=at.stage, recipe=at.recipe, machine=machine, graph=graph
    )
    steps = itertools.count(1)

    def loss(rows: SceneBatch) -> torch.Tensor:
        weight = at.stage.endpoint_weight
        return predict_and_compare(at.model, rows, at.recipe, machine, endpoint_weight=weight)[1].total

    return lambda: updates(next(steps)), loss


def plain_way(
    at: Setting, machine: Machine, *, compiled: Mapping[str, Any] | None = None, deterministic: bool = False
) -> tuple[Callable[[], object], Callable]:
    """Return one step in plain PyTorch, under torch.compile where options for it are given, and its loss.

    Of the backends of SDPA that take a mask, only MATH is deterministic.
    """
    model = PlainPerceiver(at.model, at.recipe.model.dropout)
    compute = plain_loss(at.recipe, at.stage)
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    backends = [SDPBackend.MATH] if deterministic else [*fast, SDPBackend.MATH]

    def total(rows: SceneBatch) -> torch.Tensor:
        with machine.autocast(), sdpa_kernel(backends):
            predicted = model(rows)
        return compute(*predicted, rows.gt_BM23, rows.gt_count_B)

    trained = total if compiled is None else torch.compile(total, dynamic=False, **compiled)
    optimizer = build_optimizer(at.model, at.recipe.optim)
    for group in optimizer.param_groups:
        group["lr"].fill_(at.stage.lr) if isinstance(group["lr"], torch.Tensor) else group.update(lr=at.stage.lr)
    steps = itertools.count(1)

    def one_step() -> None:
        step = next(steps)
        rows = augment(at.batches.at(step), at.recipe.augment, seed=at.recipe.seed, step=step)
        loss = trained(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(at.model.parameters(), at.recipe.optim.clip)
        optimizer.step()

    def loss(rows: SceneBatch) -> torch.Tensor:
        model.eval()
        try:
            return total(rows)
        finally:
            model.train()

    return one_step, loss


def build_way(way: str, shape: tuple[int, int], recipe: Recipe | None = None):
    """Put the process into the way's state and return the setting, its machine, one step and its loss."""
    machine = enter(threads=2, precision="bf16", impl="auto")
    if way.startswith(OURS):
        products.SIDE_STREAM = not way.endswith("one stream")
        at = setting(shape, machine, recipe)
        return at, machine, *our_way(at, machine, graph=not way.endswith("launch by launch"))
    deterministic = way.endswith("deterministic")
    if not deterministic:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.set_float32_matmul_precision("high")
    options: dict[str, Any] | None = None
    if way.startswith("torch.compile"):
        options = {"mode": "max-autotune"} if way.endswith("max-autotune") else {}
        if deterministic:
            options = {"options": {"deterministic": True}}
    at = setting(shape, machine, recipe)
    return at, machine, *plain_way(at, machine, compiled=options, deterministic=deterministic)


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
    with torch.profiler.profile(activities=activities) as recorded:
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
    at, machine, one_step, loss = build_way(way, SHAPES[shape])
    case = _case(way, shape)
    error = checked_error(at, machine, loss)
    if not error <= TOLERANCE:
        note(case={**case, "red": f"the loss errs by {error:.1e} against float64"})
        return 1
    # from the first step on: what a replay of a graph uses belongs to the graph and does not count as allocated
    torch.cuda.reset_peak_memory_stats()
    first = warm_up(one_step, machine.device)
    peak_mb = round(torch.cuda.max_memory_allocated() / 1e6)
    torch.cuda.empty_cache()
    wait_for_turn()
    times = time_steps(one_step, machine.device)
    note(case={**case, **times, **first, "peak_mb": peak_mb, "precision": machine.precision, "error": f"{error:.1e}"})
    if way == OURS:
        note(profile={shape: profile(one_step)})
    return 0


def time_ways(
    ways: list[str], shapes: list[str], sheet: Sheet, *, seconds: float, prepare: float, at_once: int
) -> None:
    """Time each way at each shape in a process of its own, keeping the sheet up to date."""
    content = sheet.content
    content |= {"cases": [], "profiles": {}, "errors": []}
    sheet.write()
    environment = {"CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE, **COMPILER}
    module = [sys.executable, "-m", "bench.gpu_step", "--worker"]
    both = {f"{way}, {shape}": (way, shape) for way in ways for shape in shapes}
    with Workers(seconds=seconds, at_once=at_once, prepare=prepare) as workers:
        for name, (way, shape) in both.items():
            workers.start(name, [*module, way, "--shapes", shape], environment, turn_s=SHARE * seconds)
        for name, heard in workers:
            if not isinstance(heard, Ended):
                content["cases"] += [heard["case"]] if "case" in heard else []
                content["profiles"] |= heard.get("profile", {})
            elif heard.code != 0:
                how = "cut by the clock" if heard.code is None else f"exit {heard.code}"
                content["errors"].append(f"{name}: {how}: {heard.tail[-600:]}")
                case = _case(*both[name])
                if case["name"] not in [c["name"] for c in content["cases"] if c["group"] == case["group"]]:
                    content["cases"].append({**case, "refused": how})
            sheet.write()


def _case(way: str, shape: str) -> dict[str, Any]:
    return {"suite": "step", "group": f"training step, {shape}", "name": way, "peer": way}


def main() -> int:
    """Run the part; exit code 0 only if ours was timed at every shape."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_step")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=110.0, help="for timing")
    parser.add_argument("--prepare", type=float, default=300.0, help="seconds for compiling and checking before that")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--processes", type=int, default=min(_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.worker, *options.shapes)
    end_on_sigterm()
    sheet = Sheet(options.out)
    time_ways(
        options.ways,
        options.shapes,
        sheet,
        seconds=options.seconds,
        prepare=options.prepare,
        at_once=options.processes,
    )
    cases = sheet.content["cases"]
    print(f"{sum('median_s' in case for case in cases)} of {len(options.ways) * len(options.shapes)} steps timed")
    return int(sum(case["peer"] == OURS and "median_s" in case for case in cases) < len(options.shapes))


if __name__ == "__main__":
    sys.exit(main())
