"""Rows decoded in their order, by several processes where they are many: what comes out does not depend on how many.

The processes are plain ones that read pickled tasks and write pickled scenes. Those of `multiprocessing` would run the
caller's main module again, which a script without a guard does not survive. Each has one piece of rows in hand, so rows
do not pile up where decoding is faster than what is done with them.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from perceiver.scene import RowError, Scene

Task = Callable[[], Scene]
# so many rows cost more than it takes to start the processes
MANY = 2048
_PIECE = 32
_MOST_WORKERS = 16


def decode(tasks: Iterable[Task], count: int, *, workers: int | None = None) -> Iterator[Scene | RowError]:
    """Decode rows.

    Args:
        tasks: what decodes each row; picklable where there are several workers.
        count: how many tasks there are.
        workers: processes; 1 decodes in the calling process; None takes one per processor (16 at most) for many rows.
    Yields:
        The scene of each task, or why there is none, in the order of the tasks.
    Raises:
        ValueError: workers is less than 1.
        RuntimeError: a process ended before its rows were decoded.
        Exception: what a task raised beside RowError.
    Determinism: does not depend on `workers`.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS) if count >= MANY else 1
    if workers == 1:
        yield from map(_outcome, tasks)
        return
    tasks = iter(tasks)
    pieces = iter(lambda: list(islice(tasks, _PIECE)), [])
    with contextlib.ExitStack() as stack:
        busy: deque[_Worker] = deque()
        started = [stack.enter_context(_Worker()) for _ in range(workers)]
        for worker, piece in zip(started, pieces, strict=False):
            worker.send(piece)
            busy.append(worker)
        while busy:
            worker = busy.popleft()
            outcomes = worker.receive()
            if piece := next(pieces, None):
                worker.send(piece)
                busy.append(worker)
            yield from outcomes


def serve() -> None:
    """Decode pieces from standard input to standard output until there are no more: what a worker does."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            piece = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outcomes = [_outcome(task) for task in piece]
        # the caller raises it
        except Exception as error:
            outcomes = error
        pickle.dump(outcomes, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


class _Worker:
    """A process that decodes one piece at a time."""

    def __init__(self):
        code = f"import sys; sys.path[:] = {sys.path!r}; from train.decoding import serve; serve()"
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread},
            # Ctrl-C reaches every process of a terminal's group; the caller decides what it means
            process_group=0,
        )
        assert self._process.stdin and self._process.stdout
        self._tasks, self._outcomes = self._process.stdin, self._process.stdout

    def send(self, piece: Sequence[Task]) -> None:
        """Hand over a piece; the process has nothing to write while it reads, so neither waits for the other."""
        # that it has ended is seen by who waits for the outcomes
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(piece, self._tasks, protocol=pickle.HIGHEST_PROTOCOL)
            self._tasks.flush()

    def receive(self) -> list[Scene | RowError]:
        """Wait for the outcomes of the piece."""
        try:
            outcomes = pickle.load(self._outcomes)
        except (EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a process that decodes rows ended with exit code {self._process.wait()}") from error
        if isinstance(outcomes, Exception):
            raise outcomes
        return outcomes

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._outcomes.close()
        with contextlib.suppress(BrokenPipeError):
            self._tasks.close()


def _outcome(task: Task) -> Scene | RowError:
    try:
        return task()
    except RowError as error:
        return error
