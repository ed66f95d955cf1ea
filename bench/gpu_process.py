"""Processes with a time bound that hand over what they have found line by line, so that a crash or a hang loses only
the rest; and the JSON files into which their parents put it, whole at every moment.

Deadlines are moments of `time.monotonic()`, which all processes of a machine share, and are handed down: a worker that
itself has workers ends them a little before it is ended, however long it took to load.
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

# names the file to which a worker appends its lines, and the one that appears for its turn and holds the turn's end
LINES, TURN = "RIDGELINE_LINES", "RIDGELINE_TURN"
# when a worker is to be prepared, or to have ended, and the process that started it
PREPARED_BY, ENDS_BY, PARENT = "RIDGELINE_PREPARED_BY", "RIDGELINE_ENDS_BY", "RIDGELINE_PARENT"
# how long before its own end a worker ends its workers; shorter in its turn, of which every second counts
MARGIN_S, TURN_MARGIN_S = 10.0, 3.0
_HELD, _DONE = {"held": True}, {"done": True}
_TAIL_BYTES, _GRACE_S, _KILLED_S, _POLL_S = 2000, 5.0, 10.0, 0.1
_PR_SET_PDEATHSIG = 1

Line = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker ended: its exit code (negative: the signal), None if it was cut; the end of what it printed."""

    code: int | None
    tail: str


@dataclass(kw_only=True)
class _Worker:
    process: subprocess.Popen
    lines: IO[str]
    output: Path
    turn: Path
    turn_s: float
    turn_share: float
    rest: str = ""
    held: bool = False
    done: bool = False


class Workers:
    """Start commands and hear from them until all have ended or the time is up; then the rest is killed.

        with Workers(seconds=60, at_once=8) as workers:
            workers.start("one", [sys.executable, "-m", "bench.something"])
            for name, heard in workers:          # a line that `note` wrote, or at last an Ended

    A worker that times something first prepares it, side by side with the others, and then calls `wait_for_turn`. When
    all that run wait so, they get their turns one after the other, in the order of their start, each alone. One that
    calls `stay` in its turn hands it on without ending, and is ended with the others when all turns are over.

    Args:
        at_once: how many run at the same time; the others wait. More may be started while they are heard.
        seconds: for all of them together; of those that wait for their turn, after the time to prepare, also where that
            was not needed, or from the first turn on if it has no bound.
        prepare: what neither waits for its turn nor has ended after so many seconds is cut.
        meanwhile: called several times a second while they are heard.

    A process that is itself a worker has the deadlines that it was told, where these are earlier.
    """

    def __init__(
        self,
        *,
        at_once: int,
        seconds: float = math.inf,
        prepare: float = math.inf,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        now = time.monotonic()
        self._seconds, self._at_once, self._meanwhile = seconds, at_once, meanwhile
        self._prepared_by = min(now + prepare, _told(PREPARED_BY) - MARGIN_S)
        begin = self._prepared_by if self._prepared_by < math.inf else now
        self._deadline = min(begin + seconds, _told(ENDS_BY) - MARGIN_S)
        self._waiting: list[tuple[str, Sequence[str], Mapping[str, str], float, float | None]] = []
        self._running: dict[str, _Worker] = {}
        self._scratch = tempfile.TemporaryDirectory()
        self._started = 0
        # whose turn it is and when it ends, once turns are given
        self._turn: tuple[str, float] | None = None
        # how long all turns may take, once they are given
        self._turns_s = math.inf

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._terminate(list(self._running))
        for worker in self._running.values():
            worker.lines.close()
        self._running.clear()
        self._scratch.cleanup()

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        turn_s: float = math.inf,
        turn_share: float | None = None,
    ) -> None:
        """Queue a command; `environment` is added to this process's.

        Args:
            turn_s: what its turn gets; it may last longer as long as those after it can have theirs.
            turn_share: of the time for all turns, bounds its turn too. A worker for which either is given is told by
                when to be prepared, another one by when to have ended.
        """
        self._waiting.append((name, command, environment or {}, turn_s, turn_share))

    def kill(self, name: str) -> bool:
        """Kill a worker as `kill -9` does; it is heard to have ended so. False if it does not run."""
        if runs := name in self._running:
            self._running[name].process.kill()
        return runs

    def left(self) -> float:
        """Seconds until the time is up."""
        return self._deadline - time.monotonic()

    def __iter__(self) -> Iterator[tuple[str, Line | Ended]]:
        while self._waiting or self._running:
            self._start_waiting()
            yield from self._hear()
            yield from self._give_turns()
            self._meanwhile()
            if self.left() <= 0:
                yield from self._cut(list(self._running))
                return
            time.sleep(_POLL_S)

    def _start_waiting(self) -> None:
        busy = sum(not worker.held and not worker.done for worker in self._running.values())
        while self._waiting and busy < self._at_once and self.left() > 0:
            self._spawn(*self._waiting.pop(0))
            busy += 1

    def _spawn(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], turn_s: float, turn_share: float | None
    ) -> None:
        self._started += 1
        base = Path(self._scratch.name) / str(self._started)
        lines, output, turn = (base.with_suffix(suffix) for suffix in (".lines", ".out", ".turn"))
        lines.touch()
        told = {LINES: str(lines), TURN: str(turn), PARENT: str(os.getpid())}
        if turn_s < math.inf or turn_share is not None:
            told |= {PREPARED_BY: repr(self._prepared_by), ENDS_BY: repr(math.inf)}
        else:
            told |= {PREPARED_BY: repr(math.inf), ENDS_BY: repr(min(self._prepared_by, self._deadline))}
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment, **told},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = _Worker(
            process=process, lines=lines.open(), output=output, turn=turn, turn_s=turn_s, turn_share=turn_share or 1.0
        )

    def _hear(self) -> Iterator[tuple[str, Line | Ended]]:
        # ended before its lines are read: nothing is written after
        ended = {name: worker.process.poll() for name, worker in self._running.items()}
        for name, code in ended.items():
            yield from self._lines_of(name)
            if code is not None:
                yield name, self._end(name, code)

    def _lines_of(self, name: str) -> Iterator[tuple[str, Line]]:
        worker = self._running[name]
        for line in _new_lines(worker):
            if line == _HELD:
                worker.held = True
            elif line == _DONE:
                worker.done = True
            else:
                yield name, line

    def _give_turns(self) -> Iterator[tuple[str, Line | Ended]]:
        """Give the next worker its turn, if all are prepared and nobody has it."""
        if self._turn is None:
            preparing = [name for name, worker in self._running.items() if not worker.held]
            none_held = len(preparing) == len(self._running)
            if time.monotonic() < self._prepared_by and (preparing or self._waiting or none_held):
                return
            yield from self._cut(preparing)
            if none_held:
                return
            ends = wait_for_turn()
            now = time.monotonic()
            begin = max(now, self._prepared_by) if self._prepared_by < math.inf else now
            self._deadline = min(begin + self._seconds, ends - TURN_MARGIN_S)
            self._turns_s = self._deadline - now
        elif self._turn[0] in self._running and not self._running[self._turn[0]].done:
            if time.monotonic() < self._turn[1]:
                return
            yield from self._cut([self._turn[0]])
        if held := [name for name, worker in self._running.items() if worker.held]:
            worker, now = self._running[held[0]], time.monotonic()
            later_s = sum(self._running[name].turn_s for name in held[1:])
            bound = max(now + worker.turn_s, self._deadline - later_s if later_s < math.inf else now)
            self._turn = held[0], min(bound, now + worker.turn_share * self._turns_s, self._deadline)
            worker.held = False
            _write_whole(worker.turn, repr(self._turn[1]))
        else:
            yield from self._cut(list(self._running))

    def _end(self, name: str, code: int | None) -> Ended:
        worker = self._running.pop(name)
        _kill(worker.process)
        worker.lines.close()
        return Ended(code=code, tail=worker.output.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace").strip())

    def _cut(self, names: Sequence[str]) -> Iterator[tuple[str, Line | Ended]]:
        """End workers that run, and give up those that have not been started."""
        self._terminate(names)
        for name in names:
            yield from self._lines_of(name)
            yield name, self._end(name, 0 if self._running[name].done else None)
        for name, *_ in self._waiting:
            yield name, Ended(code=None, tail="there was no time to start it")
        self._waiting.clear()

    def _terminate(self, names: Sequence[str]) -> None:
        """Tell workers to end, wait a little for all of them together, and kill what is left of them."""
        processes = [self._running[name].process for name in names]
        for process in processes:
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + _GRACE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.0))
        for process in processes:
            _signal(process, signal.SIGKILL)
        for process in processes:
            _kill(process)


def _told(name: str) -> float:
    """A moment that this process was told."""
    return float(os.environ.get(name, math.inf))


def seconds_to_prepare(most: float = math.inf) -> float:
    """Seconds that are left to prepare what will be timed; at most as many as are given."""
    return min(most, _told(PREPARED_BY) - MARGIN_S - time.monotonic())


def wait_for_turn() -> float:
    """Say that all is prepared, wait until it is this process's turn and return when that ends.

    Where nobody gives turns it begins at once and does not end.
    """
    if TURN not in os.environ:
        return math.inf
    note(**_HELD)
    _wait_for_parent(turn := Path(os.environ[TURN]))
    ends = float(turn.read_text())
    turn.unlink()
    return ends


def stay() -> None:
    """Hand the turn on and stay until all are over: a process that leaves a GPU takes a second or two to be gone."""
    if TURN in os.environ:
        note(**_DONE)
        _wait_for_parent(Path(os.environ[TURN]))


def _wait_for_parent(file: Path) -> None:
    """Wait until the parent has written a file; leave when it is gone."""
    parent = os.getppid()
    while not file.exists():
        if os.getppid() != parent:
            sys.exit(f"{sys.argv[0]}: who gives the turns is gone")
        time.sleep(_POLL_S)


def note(**line: Any) -> None:
    """Hand a line to the parent; prints it where nobody listens."""
    text = json.dumps(line)
    if LINES not in os.environ:
        print(text)
        return
    with open(os.environ[LINES], "a") as file:
        file.write(text + "\n")


def share(things: Sequence[T], part: str) -> Sequence[T]:
    """Every n-th of some things, from the i-th on, for the part "i/n"."""
    number, _, count = part.partition("/")
    return things[int(number) :: int(count)]


def at_most_every(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    """A call that acts if its last act was at least so long ago."""
    last = time.monotonic()

    def perhaps() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            act()
            last = time.monotonic()

    return perhaps


def end_on_sigterm() -> None:
    """Leave by an exception when told to end, so that workers of this process are ended on the way."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)


def end_with_parent() -> None:
    """Be killed when the process that started this worker is gone, however it went."""
    if PARENT not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit(f"{sys.argv[0]}: who started it is gone")


class Sheet:
    """A JSON file that is whole after every change."""

    def __init__(self, path: Path, **content: Any):
        self.path, self.content = path, content
        self.write()

    def write(self) -> None:
        """Replace the file by the content."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _new_lines(worker: _Worker) -> Iterator[Line]:
    text = worker.rest + worker.lines.read()
    *whole, worker.rest = text.split("\n")
    for line in whole:
        yield json.loads(line)


def _kill(process: subprocess.Popen) -> None:
    """Kill a worker and whatever it left running in its session."""
    _signal(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILLED_S)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
