"""Processes with a time bound that hand over what they have found line by line, so that a crash or a hang loses only
the rest; and the JSON files into which their parents put it, whole at every moment.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

# names the file to which a worker appends its lines, and the one whose appearance is its turn
LINES, TURN = "RIDGELINE_LINES", "RIDGELINE_TURN"
_HELD = {"held": True}
_TAIL_BYTES, _GRACE_S, _POLL_S = 2000, 5.0, 0.1

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
    rest: str = field(default="")
    held: bool = False


class Workers:
    """Start commands and hear from them until all have ended or the time is up; then the rest is killed.

        with Workers(seconds=60, at_once=8) as workers:
            workers.start("one", [sys.executable, "-m", "bench.something"])
            for name, heard in workers:          # a line that `note` wrote, or at last an Ended

    A worker that times something first prepares it, side by side with the others, and then calls `wait_for_turn`. When
    all that run wait so, they get their turns one after the other, in the order of their start, each alone.

    Args:
        seconds: for all of them together; of those that wait for their turn, from the first turn on.
        at_once: how many run at the same time; the others wait. More may be started while they are heard.
        prepare: what neither waits for its turn nor has ended after so many seconds is cut.
    """

    def __init__(self, *, seconds: float, at_once: int, prepare: float = math.inf):
        self._seconds, self._at_once = seconds, at_once
        self._prepared_by = time.monotonic() + prepare
        self._deadline = time.monotonic() + seconds + (prepare if prepare < math.inf else 0)
        self._waiting: list[tuple[str, Sequence[str], Mapping[str, str], float]] = []
        self._running: dict[str, _Worker] = {}
        self._scratch = tempfile.TemporaryDirectory()
        self._started = 0
        # whose turn it is and when it ends, once turns are given
        self._turn: tuple[str, float] | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running.values():
            _kill(worker.process)
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
    ) -> None:
        """Queue a command; `environment` is added to this process's, `turn_s` bounds its turn."""
        self._waiting.append((name, command, environment or {}, turn_s))

    def left(self) -> float:
        """Seconds until the time is up."""
        return self._deadline - time.monotonic()

    def __iter__(self) -> Iterator[tuple[str, Line | Ended]]:
        while self._waiting or self._running:
            self._start_waiting()
            yield from self._hear()
            yield from self._give_turns()
            if self.left() <= 0:
                yield from self._cut(list(self._running))
                return
            time.sleep(_POLL_S)

    def _start_waiting(self) -> None:
        busy = sum(not worker.held for worker in self._running.values())
        while self._waiting and busy < self._at_once and self.left() > 0:
            self._spawn(*self._waiting.pop(0))
            busy += 1

    def _spawn(self, name: str, command: Sequence[str], environment: Mapping[str, str], turn_s: float) -> None:
        self._started += 1
        base = Path(self._scratch.name) / str(self._started)
        lines, output, turn = (base.with_suffix(suffix) for suffix in (".lines", ".out", ".turn"))
        lines.touch()
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment, LINES: str(lines), TURN: str(turn)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = _Worker(process=process, lines=lines.open(), output=output, turn=turn, turn_s=turn_s)

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
            else:
                yield name, line

    def _give_turns(self) -> Iterator[tuple[str, Line | Ended]]:
        """Give the next worker its turn, if all are prepared and nobody has it."""
        held = [name for name, worker in self._running.items() if worker.held]
        if self._turn is None:
            preparing = [name for name in self._running if name not in held]
            if time.monotonic() < self._prepared_by and (preparing or self._waiting or not held):
                return
            yield from self._cut(preparing)
            if not held:
                return
            wait_for_turn()
            self._deadline = time.monotonic() + self._seconds
        elif self._turn[0] in self._running:
            if time.monotonic() < self._turn[1]:
                return
            yield from self._cut([self._turn[0]])
            held.remove(self._turn[0])
        if held:
            worker = self._running[held[0]]
            self._turn = held[0], time.monotonic() + worker.turn_s
            worker.turn.touch()

    def _end(self, name: str, code: int | None) -> Ended:
        worker = self._running.pop(name)
        _kill(worker.process)
        worker.lines.close()
        return Ended(code=code, tail=worker.output.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace").strip())

    def _cut(self, names: Sequence[str]) -> Iterator[tuple[str, Line | Ended]]:
        """End workers that run, and give up those that have not been started."""
        for name in names:
            _signal(self._running[name].process, signal.SIGTERM)
        end = time.monotonic() + _GRACE_S
        for name in names:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running[name].process.wait(max(end - time.monotonic(), 0.0))
            _kill(self._running[name].process)
            yield from self._lines_of(name)
            yield name, self._end(name, None)
        for name, *_ in self._waiting:
            yield name, Ended(code=None, tail="there was no time to start it")
        self._waiting.clear()


def wait_for_turn() -> None:
    """Say that all is prepared and wait until it is this process's turn; at once where nobody gives turns."""
    if TURN not in os.environ:
        return
    note(**_HELD)
    parent = os.getppid()
    while not Path(os.environ[TURN]).exists():
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


def side_by_side(
    commands: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    at_once: int,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run commands whose lines nobody needs; return what went wrong, by name."""
    wrong = {}
    with Workers(seconds=seconds, at_once=at_once) as workers:
        for name, command in commands.items():
            workers.start(name, command, environment)
        for name, heard in workers:
            if isinstance(heard, Ended) and heard.code != 0:
                wrong[name] = f"{'cut' if heard.code is None else heard.code}: {heard.tail[-300:]}"
    return wrong


def share(things: Sequence[T], part: str) -> Sequence[T]:
    """Every n-th of some things, from the i-th on, for the part "i/n"."""
    number, _, count = part.partition("/")
    return things[int(number) :: int(count)]


def end_on_sigterm() -> None:
    """Leave by an exception when told to end, so that workers of this process are killed on the way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Sheet:
    """A JSON file that is whole after every change."""

    def __init__(self, path: Path, **content: Any):
        self.path, self.content = path, content
        self.write()

    def write(self) -> None:
        """Replace the file by the content."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)


def _new_lines(worker: _Worker) -> Iterator[Line]:
    text = worker.rest + worker.lines.read()
    *whole, worker.rest = text.split("\n")
    for line in whole:
        yield json.loads(line)


def _kill(process: subprocess.Popen) -> None:
    """Kill a worker and whatever it left running in its session."""
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
