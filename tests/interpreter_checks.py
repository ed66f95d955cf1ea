"""A memory and race checker inside Triton's CPU interpreter: faults that a GPU would hide become test failures.

Refused, with the program and the tensor named:
    an access outside the tensor its pointer came from, or in the gaps of a strided view, or not aligned
    two programs, or two lanes of one store, storing to the same element, even the same value
    a program reading what another program of the launch stores, in whatever order the two run
    a program reading what it stored itself with no `tl.debug_barrier()` between: the threads of a program see each
        other's stores to global memory only after a barrier, and the compiler inserts none
    a failing `tl.device_assert`
    atomic operations: their order, and so the bits of a sum, changes from run to run

The pointer of each tensor carries the tensor's number in its highest byte, which pointer arithmetic leaves alone, until
it is used. Each stretch of memory has two maps with one entry per element: stamp of the last store, and reader. A stamp
grows with every program and every barrier, so that one comparison tells whose store it was.
`install` is called once, after triton was imported with TRITON_INTERPRET=1.
"""

import bisect
import dataclasses
import functools

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_TAG_SHIFT = np.uint64(56)
_ADDRESS = np.uint64(2**56 - 1)
_NOBODY, _SEVERAL = -1, -2


def install() -> None:
    """Patch the interpreter of this process."""
    # debug switches device_assert on; integer overflow stays legal: Philox wraps on purpose
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    GridExecutor._init_args_hst = _new_launch(GridExecutor._init_args_hst)
    interpreter._implicit_cvt = _tagged(interpreter._implicit_cvt)
    InterpreterBuilder.set_grid_idx = _new_program(InterpreterBuilder.set_grid_idx)
    InterpreterBuilder.create_barrier = lambda self: self.launch.next_stamp()
    InterpreterBuilder.create_masked_load = _checked_load(InterpreterBuilder.create_masked_load)
    InterpreterBuilder.create_masked_store = _checked_store(InterpreterBuilder.create_masked_store)
    InterpreterBuilder.create_atomic_rmw = _refuse_atomic
    InterpreterBuilder.create_atomic_cas = _refuse_atomic


class _Memory:
    """A stretch of memory that one tensor of the launch covers, or several that overlap: who stored and read it."""

    def __init__(self, start: int, stop: int, unit: int):
        self.start, self.unit = start, unit
        self.stamp = np.full((stop - start) // unit, _NOBODY, dtype=np.int64)
        self.reader = np.full((stop - start) // unit, _NOBODY, dtype=np.int64)


class _View:
    """A tensor argument: which elements of its memory may be touched through it."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.tensor, self.itemsize = name, tensor, tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.data_ptr()
        self.stop = self.start + (last + 1) * self.itemsize if tensor.numel() else self.start
        self.legal = np.zeros((self.stop - self.start) // self.itemsize, dtype=bool)
        np.lib.stride_tricks.as_strided(self.legal, tensor.shape, tensor.stride())[...] = True

    def slots(self, addresses: np.ndarray, width: int, program: str) -> np.ndarray:
        """Return the indices into the maps of the memory under accesses of `width` bytes, or say why not."""
        outside = (addresses < self.start) | (addresses + np.uint64(width) > self.stop)
        if outside.any():
            lanes = f"{int(outside.sum())} of {addresses.size} lanes"
            raise IndexError(f"out of bounds: {program} {lanes} outside {self.name}")
        if (addresses % np.uint64(width)).any():
            raise IndexError(f"misaligned: {program} {width} bytes at an address between elements of {self.name}")
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        if not self.legal[offsets // self.itemsize].all():
            raise IndexError(f"out of bounds: {program} in a gap of {self.name}")
        first = (offsets + (self.start - self.memory.start)) // self.memory.unit
        if width <= self.memory.unit:
            return first
        return (first[:, None] + np.arange(width // self.memory.unit)).reshape(-1)


class _Launch:
    """What the programs of one launch have read and stored so far."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.views = [_View(name, tensor) for name, tensor in tensors.items()]
        self.tags = {id(view.tensor): np.uint64(number) << _TAG_SHIFT for number, view in enumerate(self.views, 1)}
        for views in _overlapping(self.views):
            stop, unit = max(view.stop for view in views), min(view.itemsize for view in views)
            memory = _Memory(views[0].start, stop, unit)
            for view in views:
                view.memory = memory
        self.stamp = self.program = 0
        self.first_stamps: list[int] = []
        self.grid_indices: list[tuple[int, int, int]] = []

    def next_program(self, grid_index: tuple[int, int, int]) -> None:
        self.program = self.next_stamp()
        self.first_stamps.append(self.program)
        self.grid_indices.append(grid_index)

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def load(self, addresses: np.ndarray, width: int) -> None:
        for view, slots in self._touch(addresses, width, "loads"):
            stamp = view.memory.stamp[slots]
            foreign = (stamp != _NOBODY) & (stamp < self.program)
            if foreign.any():
                self._race(view, f"reads what program {self._who(stamp[foreign][0])} stored")
            if (stamp == self.stamp).any():
                self._race(view, "reads what it stored itself with no tl.debug_barrier() between")
            reader = view.memory.reader[slots]
            alone = (reader == _NOBODY) | (reader == self.program)
            view.memory.reader[slots] = np.where(alone, self.program, _SEVERAL)

    def store(self, addresses: np.ndarray, width: int) -> None:
        for view, slots in self._touch(addresses, width, "stores"):
            stamp = view.memory.stamp[slots]
            foreign = (stamp != _NOBODY) & (stamp < self.program)
            if foreign.any():
                self._race(view, f"stores where program {self._who(stamp[foreign][0])} stored")
            reader = view.memory.reader[slots]
            if ((reader != _NOBODY) & (reader != self.program)).any():
                self._race(view, "stores what another program read")
            lanes = np.arange(slots.size)
            view.memory.stamp[slots] = lanes
            if (view.memory.stamp[slots] != lanes).any():
                self._race(view, "stores two lanes of one store to the same element")
            view.memory.stamp[slots] = self.stamp

    def _touch(self, tagged: np.ndarray, width: int, verb: str):
        """Yield (tensor, slots in its memory) for tagged addresses, each checked to be a legal one."""
        program = f"program {self.grid_indices[-1]} {verb}"
        tags = (tagged >> _TAG_SHIFT).astype(np.int64)
        for tag in np.unique(tags):
            if not 1 <= tag <= len(self.views):
                raise IndexError(f"out of bounds: {program} through a pointer to none of the launch's tensors")
            view = self.views[tag - 1]
            yield view, view.slots(tagged[tags == tag] & _ADDRESS, width, program)

    def _race(self, view: _View, what: str) -> None:
        raise RuntimeError(f"race: program {self.grid_indices[-1]} {what}, in {view.name}")

    def _who(self, stamp: int) -> tuple[int, int, int]:
        return self.grid_indices[bisect.bisect_right(self.first_stamps, stamp) - 1]


def _overlapping(views: list[_View]) -> list[list[_View]]:
    """Group views so that those of different groups share no memory; each group in ascending order of address."""
    groups: list[list[_View]] = []
    stop = 0
    for view in sorted(views, key=lambda view: view.start):
        if view.start >= stop:
            groups.append([])
        groups[-1].append(view)
        stop = max(stop, view.stop)
    return groups


def _tensors(name: str, argument) -> dict[str, torch.Tensor]:
    """Return the tensors in a kernel argument by name: itself, the base of a descriptor, or those of a tuple."""
    if isinstance(argument, tuple):
        return {k: v for i, item in enumerate(argument) for k, v in _tensors(f"{name}[{i}]", item).items()}
    if isinstance(argument, interpreter.TensorDescriptor):
        argument = argument.base
    return {name: argument} if hasattr(argument, "data_ptr") else {}


def _new_launch(method):
    @functools.wraps(method)
    def wrapped(self, arguments, keywords):
        arguments_host, keywords_host = method(self, arguments, keywords)
        named = dict(zip(self.arg_names, arguments_host, strict=False)) | keywords_host
        tensors = {k: v for name, argument in named.items() for k, v in _tensors(name, argument).items()}
        interpreter.interpreter_builder.launch = _Launch(tensors)
        return arguments_host, keywords_host

    return wrapped


def _tagged(method):
    @functools.wraps(method)
    def wrapped(argument):
        converted = method(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.data = converted.handle.data | interpreter.interpreter_builder.launch.tags[id(argument)]
        return converted

    return wrapped


def _new_program(method):
    @functools.wraps(method)
    def wrapped(self, x, y, z):
        method(self, x, y, z)
        self.launch.next_program((x, y, z))

    return wrapped


def _on(pointers, mask) -> tuple[np.ndarray, int]:
    """Return the tagged addresses of the lanes that are on, and the width of an element in bytes."""
    lanes = np.asarray(mask.data, dtype=bool)
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return np.broadcast_to(pointers.data, lanes.shape)[lanes], width


def _untagged(pointers):
    return TensorHandle(pointers.data & _ADDRESS, pointers.dtype)


def _checked_load(method):
    @functools.wraps(method)
    def wrapped(self, pointers, mask, *rest, **keywords):
        self.launch.load(*_on(pointers, mask))
        return method(self, _untagged(pointers), mask, *rest, **keywords)

    return wrapped


def _checked_store(method):
    @functools.wraps(method)
    def wrapped(self, pointers, value, mask, *rest, **keywords):
        self.launch.store(*_on(pointers, mask))
        return method(self, _untagged(pointers), value, mask, *rest, **keywords)

    return wrapped


def _refuse_atomic(self, *arguments):
    raise RuntimeError("atomic operations are not allowed: the order of their sums changes from run to run")
