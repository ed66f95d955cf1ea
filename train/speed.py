"""How fast a run is: wall time of its steps without what happens between them."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


class StepClock:
    """Measures the time per step between two readings; pauses do not count.

    Args:
        step: the step after which the measurement begins.
    """

    def __init__(self, step: int):
        self._step, self._start, self._paused = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside (evaluation, checkpoints)."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def read(self, step: int, batch: int, device: torch.device) -> dict[str, float | int]:
        """Return the rates since the last reading, and the peak memory of the process (CPU) or device (GPU) so far."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            memory_mb = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        seconds = time.perf_counter() - self._start - self._paused
        rate = (step - self._step) / seconds
        self._step, self._start, self._paused = step, time.perf_counter(), 0.0
        return {
            "step": step,
            "seconds": round(seconds, 4),
            "steps_per_second": round(rate, 3),
            "scenes_per_second": round(rate * batch, 2),
            "memory_mb": round(memory_mb, 1),
        }
