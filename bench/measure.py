"""How a case is measured: one clock per device, and what is noted beside a time.

    wall time      on every device, from the call to the end of its last kernel
    device time    on a GPU, between CUDA events; the L2 cache is flushed before each call

Errors are relative to the largest true value of their tensor. Peak memory is what PyTorch's allocator holds at most
during one call, inputs not counted.
"""

import contextlib
import importlib.metadata
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
LONG_S, LONG_ROUNDS = 2.0, 3
# larger than any L2 cache; clearing it takes long enough for the launches behind it to be queued
_FLUSHED_BYTES = 512 << 20

Run = Callable[[], Sequence[Tensor]]


def synchronized(run: Callable[[], object]) -> Callable[[], None]:
    """Return `run` as a wall clock must time it: with the wait for the device."""

    def timed() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    return timed


def device_seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Time `run` between CUDA events, from a flushed L2 cache; gaps between kernels count."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=DEVICE)
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        flushed.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)]


def choose_rounds(call_s: float, budget_s: float) -> int:
    """Return how many rounds of `call_s` fit into `budget_s`, from 5 to 50; for calls of seconds 3."""
    if call_s > LONG_S:
        return LONG_ROUNDS
    return int(min(max(budget_s / max(call_s, 1e-9), LEAST_ROUNDS), MOST_ROUNDS))


def record(run: Run) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """Record `run` into a CUDA graph, after it has run three times on a stream of its own; return its results too.

    Raises:
        RuntimeError: `run` does what a graph cannot hold, or there is no GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        with refused_waits():
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = run()
    return graph, outputs


@contextlib.contextmanager
def refused_waits() -> Iterator[None]:
    """Let what waits for the GPU raise `RuntimeError`: a recording that fails of it leaves PyTorch on its stream."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graphed(run: Run) -> Run:
    """Return the replay of a graph into which `run` is recorded; see `record`."""
    graph, outputs = record(run)

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and the distance of the quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return significant(median), significant(high - low)


def significant(value: float) -> float:
    """Round to four digits."""
    return float(f"{value:.4g}")


def root(error: BaseException) -> str:
    """What an error is about: the first line of the one that caused it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


def largest_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest error of the first tensors of `found`, infinite if one is not finite.

    Args:
        truth: float64, one tensor per tensor of `found` that is judged; a true value of 0 counts as 1.
    """
    errors = [0.0]
    for x, y in zip(found[: len(truth)], truth, strict=True):
        difference = (x.detach().double() - y).abs()
        size = float(y.abs().max()) if y.numel() else 0.0
        worst = float(difference.max()) if y.numel() else 0.0
        errors.append(worst / (size or 1.0) if difference.isfinite().all() else float("inf"))
    return max(errors)


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two results agree byte by byte."""
    pairs = zip(first, second, strict=True)
    return all(x.shape == y.shape and torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most memory that one call held at a time beyond what was held before."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    # acc_events: without it PyTorch 2.11 warns
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    held = peak = 0
    # every allocation and release in order, which the public tables only show as sums per operator
    events: Any = profile.profiler and profile.profiler.kineto_results
    for event in events.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Return what reading or writing each tensor once moves."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def installed_version(package: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
