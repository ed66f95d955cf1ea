"""Ctrl-C and SIGTERM let the step finish: they are noted, and the loop looks at the notes."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any


class RunStopped(Exception):
    """A signal asked the run to stop; it has saved its state. exit_code is the shell's: 128 + the signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step:,}; the state is saved")
        self.exit_code = 128 + signal_number


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list; a second one of a kind has its usual effect at once."""
    caught: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        print("\nfinishing this step and saving; once more to stop at once", file=sys.stderr, flush=True)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
