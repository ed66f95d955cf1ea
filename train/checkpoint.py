"""Checkpoints that survive a crash: weights, optimizer, step and the recipe they belong to.

A checkpoint is written to `<name>.new`, flushed to the disk, and renamed; the one before it is kept as
`<name>.previous`. The file ends with the SHA-256 of its other bytes, as the comment of the zip archive that
`torch.save` writes: no crash can part the two. A damaged or half-written file is recognised by it and the previous one
is used. There is no random state to save: all randomness is a function of the step. Equal states give equal bytes,
whether they were computed or loaded.

Files of before 2026-11-27 have their digest beside them, as `<name>.sha256`, and are read as well.
"""

import dataclasses
import hashlib
import io
import os
import pickle
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_MARK = b"ridgeline sha256 "
_HEX = 64
_BEGIN = b"PK\3\4"
# the end of a zip archive without a comment: of files of before the seal, and of no sealed one
_NO_COMMENT = b"\0\0"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which and why."""


class CheckpointMissing(CheckpointError):
    """There is no such file, or a save has just moved it away."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after update `step`.

    recipe: the resolved recipe as plain values. machine: precision and implementation that computed it.
    """

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    recipe: Mapping[str, Any]
    machine: Mapping[str, str]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors in the mapping's order, as hex."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a crash at any moment, also one after another, leaves a usable one.

    Raises:
        OSError: the disk refused; the checkpoint that was there is untouched.
    """
    buffer = io.BytesIO()
    plain = {name: _interned(value) for name, value in checkpoint.__dict__.items() if name != "model"}
    torch.save({"format": FORMAT, "step": checkpoint.step, "model": checkpoint.model, **plain}, buffer)
    temporary, previous = path.with_name(path.name + ".new"), path.with_name(path.name + ".previous")
    if not path.exists() and is_usable(temporary):
        # a crash came between the renames below: this is the newest state there is
        _rename(temporary, path)
    _digest_file(temporary).unlink(missing_ok=True)
    _replace(temporary, _sealed(buffer.getvalue()))
    if path.exists():
        _rename(path, previous)
    _rename(temporary, path)
    _flush_directory(path.parent)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check it against its digest.

    Raises:
        CheckpointMissing: it does not exist.
        CheckpointError: it is damaged, or is not a checkpoint of this program.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointMissing(f"checkpoint {path} does not exist") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"checkpoint {path} is a directory") from error
    digests = _digests(path, data)
    if digests and digests[0] != digests[1]:
        raise CheckpointError(f"checkpoint {path} is damaged: its bytes do not have the digest {digests[2]}")
    if not data.startswith(_BEGIN):
        what = "by its first bytes it is not a checkpoint" if data else "it is empty"
        raise CheckpointError(f"checkpoint {path} is damaged: {what}")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file without this care
        raise CheckpointError(f"{path} is not a checkpoint: it holds more than tensors and plain values") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise CheckpointError(f"checkpoint {path} is damaged: it cannot be read ({reason})") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program, or of another format than {FORMAT}")
    if not digests and not data.endswith(_NO_COMMENT):
        raise CheckpointError(f"checkpoint {path} is damaged: the digest at its end is damaged or gone")
    names = {field.name for field in dataclasses.fields(Checkpoint)}
    if content.keys() != names:
        raise CheckpointError(f"checkpoint {path} must hold {', '.join(sorted(names))}; it holds other things")
    return Checkpoint(**content)


def is_usable(path: Path) -> bool:
    """Whether a file is a whole checkpoint."""
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def load_newest(path: Path) -> tuple[Checkpoint, str | None] | None:
    """Return the newest usable checkpoint: the one being renamed when a crash came, `path`, or the previous one.

    Returns:
        The checkpoint and, if a newer file was damaged, a sentence saying so; None where there is none at all.
    Raises:
        CheckpointError: there are files, and none is usable.
    """
    new, previous = (path.with_name(path.name + suffix) for suffix in (".new", ".previous"))
    problems: list[str] = []
    # the first save may end while the first look goes on
    for _ in range(2):
        problems.clear()
        # a half-written .new is what a crash leaves; it counts only where `path` has already been moved away
        # (a save moves files from left to right: none is missed)
        for candidate in (path, previous) if path.is_file() else (new, path, previous):
            try:
                checkpoint = load_checkpoint(candidate)
            except CheckpointMissing:
                continue
            except CheckpointError as error:
                problems.append(str(error))
                continue
            # where `path` is back, .new was read while a save wrote it
            return checkpoint, None if candidate == path else "; ".join(problems) or None
        if not (path.is_file() or previous.is_file()):
            return None
    raise CheckpointError("; ".join(problems))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones and nothing else."""
    temporary = path.with_name(path.name + ".tmp")
    _replace(temporary, data)
    os.replace(temporary, path)


def require_writable(directory: Path) -> None:
    """Make a directory where there is none, and check that files can be written in it.

    Raises:
        ValueError: they cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # the rights of a directory do not say whether its disk is read-only
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"{directory} cannot be written: {error.strerror}; name another place with --out") from error


def _replace(path: Path, data: bytes) -> None:
    """Write and flush a whole file; a failed write leaves no half of it and names the file."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _interned(value: Any) -> Any:
    """A copy in which equal strings are one object, and containers are not shared.

    Pickle writes an object once and refers to it after, so its bytes would tell a constant from a string that was read.
    """
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        return {_interned(name): _interned(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_interned, value))
    return value


def _rename(path: Path, to: Path) -> None:
    """Rename a checkpoint; the digest beside one of an earlier version goes before it."""
    if _digest_file(path).exists():
        os.replace(_digest_file(path), _digest_file(to))
    else:
        _digest_file(to).unlink(missing_ok=True)
    os.replace(path, to)


def _sealed(archive: bytes) -> bytes:
    """A zip archive without a comment, as `torch.save` writes it, with the SHA-256 of all before it as its comment."""
    assert archive.endswith(_NO_COMMENT)
    data = archive.removesuffix(_NO_COMMENT) + struct.pack("<H", len(_MARK) + _HEX) + _MARK
    return data + _sha256(data).encode()


def _digests(path: Path, data: bytes) -> tuple[str, str, str] | None:
    """The digest that a checkpoint should have, the one it has, and where the first stands; None if nowhere."""
    end = data.rfind(_MARK, max(len(data) - len(_MARK) - _HEX, 0)) + len(_MARK)
    if end >= len(_MARK):
        return data[end:].decode("ascii", "replace"), _sha256(data[:end]), "at their end"
    beside = _digest_file(path)
    if not beside.is_file():
        return None
    return beside.read_text("ascii", "replace").strip(), _sha256(data), f"in {beside.name}"


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
