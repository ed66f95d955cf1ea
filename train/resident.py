"""The rows of a set as they are trained on: decoded once, kept on the disk, mapped into memory, moved to the device.

RIDGELINE_CACHE names the directory where stacked rows are kept; without it that is `ridgeline` in $XDG_CACHE_HOME or
in ~/.cache. RIDGELINE_CACHE=off keeps them in memory only. It may be deleted at any time. Nothing of it is part of the
bits of a run: rows come back as they went in, or are decoded anew.

An entry is a directory `<set>-<key>`: one .npy per column of `SceneBatch`, and set.json with the SHA-256 of each file,
what belongs to the rows, and the SHA-256 of all that. The key is the SHA-256 of everything the rows depend on. Every
byte is checked when an entry is read. An entry is written beside its place and renamed; it is the only one of its set
that is read or written at a time, and the newest few of a set are kept.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from perceiver.scene import SceneBatch
from train.progress import progress_bar

VARIABLE = "RIDGELINE_CACHE"
Facts = dict[str, Any]
_log = logging.getLogger(__name__)
_COLUMNS = tuple(field.name for field in fields(SceneBatch))
# entries of a set: the same rows under other lists of bad samples, or made by an older version of the code
_KEPT = 3
_UPLOAD_ROWS = 2048


class Columns(Protocol):
    """Where stacked rows go, chunk by chunk, in their order."""

    def append(self, batch: SceneBatch) -> None:
        """Add rows."""


class _Damaged(Exception):
    """An entry whose bytes are not those that were written."""


class _DiskRefused(Exception):
    """The cache cannot be used; nothing is wrong with the rows."""


def cache_directory() -> Path | None:
    """Return where rows are kept, or None where they are not."""
    setting = os.environ.get(VARIABLE)
    if setting == "off":
        return None
    if setting:
        return Path(setting).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ridgeline"
    except RuntimeError as error:
        _log.warning("decoded rows are not kept: %s %s=DIR names a place for them", error, VARIABLE)
        return None


def keep_rows(
    name: str, depends_on: str, count: int, fill: Callable[[Columns], Facts], *, progress: bool = False
) -> tuple[SceneBatch, Facts]:
    """Return stacked rows from the cache, or make and keep them.

    Args:
        name: of the set, for people; entries of one name make way for each other.
        depends_on: everything the rows and facts depend on.
        count: rows that `fill` appends at most.
        fill: makes the rows and returns what belongs to them, in JSON values; what it raises is raised, and nothing is
            kept then.
        progress: show a bar while rows are checked.
    Returns:
        The rows, memory-mapped where they are kept, on the CPU; and what belongs to them.
    Determinism: equal to what `fill` makes. A damaged entry, or a disk that refuses, is said and costs time only.
    """
    directory = cache_directory()
    if directory is not None:
        try:
            return _kept(directory, name, depends_on, count, fill, progress)
        except _DiskRefused as error:
            advice = f"{VARIABLE}=DIR names another directory, {VARIABLE}=off none"
            _log.warning(
                "%s: its rows cannot be kept in %s (%s) and stay in memory; %s", name, directory, error, advice
            )
    rows = _InMemory(count)
    facts = fill(rows)
    return rows.finish(), facts


def to_device(rows: SceneBatch, device: torch.device, *, title: str = "", progress: bool = False) -> SceneBatch:
    """Return rows on a device, copied a few thousand rows at a time; rows that are there are returned as they are."""
    here = rows.scene_B.device
    if here.type == device.type and device.index in (None, here.index):
        return rows
    columns = {name: getattr(rows, name) for name in _COLUMNS}
    total = sum(x.nbytes for x in columns.values())
    with progress_bar(title=title, total=total, unit="B", unit_scale=True, show=progress) as bar:
        moved = {name: torch.empty_like(column, device=device) for name, column in columns.items()}
        for name, column in columns.items():
            for target, part in zip(moved[name].split(_UPLOAD_ROWS), column.split(_UPLOAD_ROWS), strict=True):
                target.copy_(part)
                bar.update(part.nbytes)
    return SceneBatch(**moved)


def _kept(
    directory: Path, name: str, depends_on: str, count: int, fill: Callable[[Columns], Facts], progress: bool
) -> tuple[SceneBatch, Facts]:
    key = hashlib.sha256(depends_on.encode()).hexdigest()
    # the end of a long path says more than its beginning
    place = directory / re.sub(r"[^\w.]+", "-", name)[-100:].strip("-.")
    entry, partial = place.with_name(f"{place.name}-{key[:16]}"), place.with_name(f"{place.name}.partial")
    with _alone(place.with_name(f"{place.name}.lock"), name):
        if entry.is_dir():
            try:
                return _read(entry, key, name, progress)
            except _Damaged as damage:
                _log.warning("%s: its rows in %s are damaged (%s) and are made anew", name, entry, damage)
        try:
            columns = _OnDisk(partial, count)
            contents = columns.finish(key, fill(columns))
            with _disk():
                shutil.rmtree(entry, ignore_errors=True)
                partial.rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _forget_old(place)
        with _disk():
            return _map(entry, contents)


class _InMemory:
    def __init__(self, count: int):
        self._count, self._filled = count, 0
        self._columns: dict[str, torch.Tensor] = {}

    def append(self, batch: SceneBatch) -> None:
        for name in _COLUMNS:
            rows = getattr(batch, name)
            if name not in self._columns:
                self._columns[name] = rows.new_empty((self._count, *rows.shape[1:]))
            self._columns[name][self._filled : self._filled + len(batch)] = rows
        self._filled += len(batch)

    def finish(self) -> SceneBatch:
        return SceneBatch(**{name: column[: self._filled] for name, column in self._columns.items()})


class _OnDisk:
    """The files of an entry, written row after row; what is in memory is one chunk."""

    def __init__(self, directory: Path, count: int):
        self._directory, self._count, self._filled = directory, count, 0
        self._digests = {name: hashlib.sha256() for name in _COLUMNS}
        self._row_bytes = dict.fromkeys(_COLUMNS, 0)
        with _disk():
            # left by a process that was killed
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()

    def append(self, batch: SceneBatch) -> None:
        with _disk():
            for name in _COLUMNS:
                rows = getattr(batch, name).numpy()
                if not self._filled:
                    self._write(name, _header(self._count, rows))
                    self._row_bytes[name] = rows[0].nbytes
                self._write(name, rows.tobytes())
        self._filled += len(batch)

    def finish(self, key: str, facts: Facts) -> Facts:
        """Write set.json, last; return its contents."""
        with _disk():
            for name, size in self._row_bytes.items():
                # the header promises `count` rows; those that could not be decoded are missing
                for _ in range(self._count - self._filled):
                    self._write(name, bytes(size))
            files = {name: digest.hexdigest() for name, digest in self._digests.items()}
            contents = {"key": key, "rows": self._filled, "files": files, "facts": facts}
            document = {"sha256": _digest(contents), "contents": contents}
            (self._directory / "set.json").write_text(json.dumps(document))
        return contents

    def _write(self, name: str, data: bytes) -> None:
        self._digests[name].update(data)
        with (self._directory / f"{name}.npy").open("ab") as file:
            file.write(data)


def _header(count: int, rows: np.ndarray) -> bytes:
    """The header of an .npy file of `count` such rows."""
    with io.BytesIO() as buffer:
        layout = {"descr": rows.dtype.str, "fortran_order": False, "shape": (count, *rows.shape[1:])}
        np.lib.format.write_array_header_1_0(buffer, layout)
        return buffer.getvalue()


def _read(entry: Path, key: str, name: str, progress: bool) -> tuple[SceneBatch, Facts]:
    """Check every byte of an entry and map it."""
    try:
        document = json.loads((entry / "set.json").read_bytes())
        contents = document["contents"]
        if document["sha256"] != _digest(contents) or contents["key"] != key:
            raise _Damaged("set.json is not what was written")
        files = {column: np.memmap(entry / f"{column}.npy", np.uint8, mode="r") for column in _COLUMNS}
        size = sum(file.nbytes for file in files.values())
        bar = progress_bar(title=f"{name}: checking", total=size, unit="B", unit_scale=True, show=progress)
        with bar, ThreadPoolExecutor() as threads:
            found = threads.map(lambda file: hashlib.sha256(file).hexdigest(), files.values())
            for column, digest in zip(_COLUMNS, found, strict=True):
                if digest != contents["files"][column]:
                    raise _Damaged(f"{column}.npy is not what was written")
                bar.update(files[column].nbytes)
        # the entry used last is the last to go
        os.utime(entry)
        return _map(entry, contents)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error


def _map(entry: Path, contents: Facts) -> tuple[SceneBatch, Facts]:
    # private copies of pages on writing: the file stays as it is whatever is done to the tensors
    arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="c") for name in _COLUMNS}
    rows = SceneBatch(**{name: torch.from_numpy(array[: contents["rows"]]) for name, array in arrays.items()})
    return rows, contents["facts"]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _forget_old(place: Path) -> None:
    """Remove all but the newest entries of a set; a process that has one mapped keeps its pages."""
    pattern = re.compile(re.escape(place.name) + r"-[0-9a-f]{16}")
    entries = [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime_ns)[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(lock: Path, name: str) -> Iterator[None]:
    """Wait until no other process reads or writes entries of this set. The lock dies with the process."""
    with _disk():
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    with file:
        with _disk():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("%s: another process is reading or making these rows; waiting for it", name)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskRefused(f"{error.strerror or error}") from error
