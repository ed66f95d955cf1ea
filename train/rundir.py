"""A run's directory: locked by one process, its recipe fixed, its logs cut back to the checkpoint on resume.

config.json    the resolved recipe         metrics.jsonl     deterministic values only; trace.jsonl likewise
speed.jsonl    times, rates, memory        checkpoint.pt     the newest state; stage<k>.pt the state after stage k
processes.jsonl  code, environment and     certificate.json  what a stranger needs to check the run
               machine code of each process that computed it
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint import write_atomically
from train.config import Recipe, differing_keys, read_object, recipe_to_dict


class RunRefused(RuntimeError):
    """A run that cannot be in this directory: says why and what to do."""


class RunDirectory:
    """Paths of a run and its logs.

    Args:
        path: made if it is not there.
    Raises:
        RunRefused: it cannot be made or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunRefused(f"run directory {self.path} cannot be made: {error.strerror}") from error
        if not os.access(self.path, os.W_OK):
            raise RunRefused(f"run directory {self.path} cannot be written")
        self.checkpoint = self.path / "checkpoint.pt"

    def stage_checkpoint(self, stage: int) -> Path:
        """The state at the end of stage `stage`, counted from 1."""
        return self.path / f"stage{stage}.pt"

    def stage_tail(self, stage: int) -> Path:
        """The state a few updates before the end of stage `stage`, counted from 1: a certificate replays from it."""
        return self.path / f"stage{stage}_tail.pt"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: a second process is refused. The lock dies with the process."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunRefused(f"run directory {self.path} is in use by another process") from None
            yield

    def fix_recipe(self, recipe: Recipe) -> None:
        """Save the recipe, or check that it is the one the directory already has.

        A directory without a checkpoint, or a state that stays, has nothing to lose: its recipe may be corrected.

        Raises:
            RunRefused: the directory holds a run of another recipe; names the values that differ.
        """
        path, values = self.path / "config.json", recipe_to_dict(recipe)
        if not path.exists() or not (any(self.path.glob("checkpoint.pt*")) or self.kept_states()):
            write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())
            return
        self.refuse_other(read_object(path), recipe)

    def refuse_other(self, values: Mapping[str, Any], recipe: Recipe) -> None:
        """Refuse a recipe other than the one, as plain values, that the directory's run has.

        Raises:
            RunRefused: names the values that differ.
        """
        different = differing_keys(values, recipe_to_dict(recipe))
        if different:
            raise RunRefused(
                f"run directory {self.path} holds a run of another recipe (different: {', '.join(different)}); "
                "take another --name, or remove the directory"
            )

    def require_results(self, *, scored: bool) -> None:
        """Check that a finished run has what it leaves beside its states.

        Raises:
            RunRefused: names a file that is gone, and how it is made again.
        """
        anew = "train it anew under another --name"
        again = "remove checkpoint.pt and checkpoint.pt.previous: the same command then makes the run's end again"
        cures = {"metrics.jsonl": anew, "trace.jsonl": anew, "certificate.json": again}
        for name, cure in (cures | ({"scores.json": again} if scored else {})).items():
            if not (self.path / name).is_file():
                raise RunRefused(f"{self.path / name} is gone from a finished run: put it back, or {cure}")

    def require_states(self, lost: Mapping[str, str]) -> None:
        """Check that a finished run has the states of its stages.

        Args:
            lost: names of files that are gone or damaged, and why each could not be made again.
        Raises:
            RunRefused: there are some; says what can be done without them.
        """
        if lost:
            are, them, they = ("are", "them", "they") if len(lost) > 1 else ("is", "it", "it")
            reasons = "; ".join(f"{name} could not be made again: {reason}" for name, reason in lost.items())
            raise RunRefused(
                f"{', '.join(lost)} of the finished run {self.path} {are} gone or damaged, and what {they} would show "
                f"of the ends of its stages, to `compare` and `verify`: put {them} back, or train the run anew under "
                f"another --name. Its scores, weights and metrics are there. {reasons}"
            )

    def kept_states(self) -> list[Path]:
        """See `kept_states`."""
        return kept_states(self.path)

    def append(self, log: str, **values: Any) -> None:
        """Append one line to `<log>.jsonl`; see `extend`."""
        self.extend(log, [values])

    def extend(self, log: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to `<log>.jsonl`.

        Raises:
            OSError: the disk refused, naming the file; half a line may be left, which `cut_logs` drops.
        """
        path = self.path / f"{log}.jsonl"
        try:
            with path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def flush_logs(self) -> None:
        """Make the logs safe on the disk before a checkpoint claims their steps."""
        for path in self.path.glob("*.jsonl"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def clear_logs(self) -> None:
        """Remove the logs of a run that never came to its first checkpoint."""
        for path in self.path.glob("*.jsonl"):
            path.unlink()

    def cut_logs(self, step: int) -> None:
        """Drop what the logs say of steps after `step`, and a line that a crash left half-written."""
        for path in sorted(self.path.glob("*.jsonl")):
            kept = [
                line for line, found in zip(whole_lines(path), read_log(path), strict=True) if found["step"] <= step
            ]
            write_atomically(path, "".join(kept).encode())

    def read(self, log: str) -> list[dict[str, Any]]:
        """The lines of `<log>.jsonl`; empty where there is no such file."""
        path = self.path / f"{log}.jsonl"
        return read_log(path) if path.exists() else []


def kept_states(path: Path, *, tails: bool = False) -> list[Path]:
    """The states that stay beside a run's newest checkpoint, in the order of stages and of steps.

    They are the ends of stages, with `tails` also the states a few updates before them, and those of `keep_every`.
    """
    pattern = r"stage\d+(_tail)?|step\d+" if tails else r"(stage|step)\d+"
    found = [file for file in path.glob("*.pt") if re.fullmatch(pattern, file.stem)]
    return sorted(found, key=lambda file: (len(file.name), file.name))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log as values, without one that a crash left half-written.

    Raises:
        ValueError: a line is damaged; names the file and the line.
    """
    found = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is damaged: {error}") from error
        if not isinstance(found[-1], dict) or "step" not in found[-1]:
            raise ValueError(f"{path} line {number} is damaged: it must hold an object with a step")
    return found


def whole_lines(path: Path) -> list[str]:
    """The lines of a log, without one that a crash left half-written."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
