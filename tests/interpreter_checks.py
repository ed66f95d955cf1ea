"""A memory and race checker inside Triton's CPU interpreter: faults that a GPU would hide become test failures.

Refused, with the program and the tensor named:
    an access outside every tensor of the launch, or in the gaps of a strided view, or not aligned
    two programs, or two lanes of one store, storing to the same element, even the same value
    a program reading what another program of the launch stores, in whatever order the two run
    a program reading what it stored itself with no `tl.debug_barrier()` between: the threads of a program see each
        other's stores to global memory only after a barrier, and the compiler inserts none
    a failing `tl.device_assert`
    atomic operations: their order, and so the bits of a sum, changes from run to run

Each tensor's span is covered by three maps with one entry per element: may be touched, stamp of the last store, reader.
A stamp is a number that grows with every program and every barrier, so that one comparison tells whose store it was.
`install` is called once, after triton was imported with TRITON_INTERPRET=1.
"""

import bisect
import dataclasses
import functools

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_NOBODY, _SEVERAL = -1, -2


def install() -> None:
    """Patch the interpreter of this process."""
    # debug switches device_assert on; integer overflow stays legal: Philox wraps on purpose
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    GridExecutor._init_args_hst = _new_launch(GridExecutor._init_args_hst)
    InterpreterBuilder.set_grid_idx = _new_program(InterpreterBuilder.set_grid_idx)
    InterpreterBuilder.create_barrier = lambda self: self.launch.next_stamp()
    InterpreterBuilder.create_masked_load = _checked_load(InterpreterBuilder.create_masked_load)
    InterpreterBuilder.create_masked_store = _checked_store(InterpreterBuilder.create_masked_store)
    InterpreterBuilder.create_atomic_rmw = _refuse_atomic
    InterpreterBuilder.create_atomic_cas = _refuse_atomic


class _Region:
    """A stretch of memory covered by one tensor of the launch, or by several that overlap."""

    def __init__(self, tensors: list[tuple[str, int, int, object]]):
        self.names = "/".join(name for name, *_ in tensors)
        self.start = tensors[0][1]
        self.stop = max(stop for _, _, stop, _ in tensors)
        self.unit = min(tensor.element_size() for *_, tensor in tensors)
        size = (self.stop - self.start) // self.unit
        self.legal = np.zeros(size, dtype=bool)
        self.stamp = np.full(size, _NOBODY, dtype=np.int64)
        self.reader = np.full(size, _NOBODY, dtype=np.int64)
        for _, start, _, tensor in tensors:
            units = tensor.element_size() // self.unit
            legal = np.lib.stride_tricks.as_strided(
                self.legal[(start - self.start) // self.unit :],
                (*tensor.shape, units),
                (*(stride * units for stride in tensor.stride()), 1),
            )
            legal[...] = True

    def elements(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Return the indices into the maps of all elements under accesses of `width` bytes."""
        first = (addresses - np.uint64(self.start)).astype(np.int64) // self.unit
        if width <= self.unit:
            return first
        return (first[:, None] + np.arange(width // self.unit)).reshape(-1)


class _Launch:
    """What the programs of one launch have read and stored so far."""

    def __init__(self, tensors: dict[str, object]):
        self.regions = [_Region(group) for group in _overlapping(tensors)]
        self.starts = np.array([region.start for region in self.regions], dtype=np.uint64)
        self.stops = np.array([region.stop for region in self.regions] + [0], dtype=np.uint64)
        self.stamp = 0
        self.program = 0
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
        for region, index in self._elements(addresses, width, "load"):
            stamp = region.stamp[index]
            foreign = (stamp != _NOBODY) & (stamp < self.program)
            if foreign.any():
                self._race(region, f"reads what program {self._who(stamp[foreign][0])} stored")
            if (stamp == self.stamp).any():
                self._race(region, "reads what it stored itself with no tl.debug_barrier() between")
            reader = region.reader[index]
            region.reader[index] = np.where((reader == _NOBODY) | (reader == self.program), self.program, _SEVERAL)

    def store(self, addresses: np.ndarray, width: int) -> None:
        for region, index in self._elements(addresses, width, "store"):
            stamp = region.stamp[index]
            foreign = (stamp != _NOBODY) & (stamp < self.program)
            if foreign.any():
                self._race(region, f"stores where program {self._who(stamp[foreign][0])} stored")
            reader = region.reader[index]
            if ((reader != _NOBODY) & (reader != self.program)).any():
                self._race(region, "stores what another program read")
            lanes = np.arange(index.size)
            region.stamp[index] = lanes
            if (region.stamp[index] != lanes).any():
                self._race(region, "stores two lanes of one store to the same element")
            region.stamp[index] = self.stamp

    def _elements(self, addresses: np.ndarray, width: int, what: str):
        """Yield (region, indices) for the accesses after checking that each one may be made."""
        which = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (which < 0) | (addresses + np.uint64(width) > self.stops[which])
        if outside.any():
            near = self.regions[max(which[outside][0], 0)].names if self.regions else "no tensor"
            lanes = f"{int(outside.sum())} of {addresses.size} lanes"
            raise IndexError(f"out of bounds: program {self._here()} {what}s {lanes} outside all tensors, near {near}")
        if (addresses % np.uint64(width)).any():
            raise IndexError(f"misaligned: program {self._here()} {what}s {width} bytes at an address between")
        for number in np.unique(which):
            region = self.regions[number]
            index = region.elements(addresses[which == number], width)
            if not region.legal[index].all():
                raise IndexError(f"out of bounds: program {self._here()} {what}s in a gap of {region.names}")
            yield region, index

    def _race(self, region: _Region, what: str) -> None:
        raise RuntimeError(f"race: program {self._here()} {what}, in {region.names}")

    def _here(self) -> tuple[int, int, int]:
        return self.grid_indices[-1]

    def _who(self, stamp: int) -> tuple[int, int, int]:
        return self.grid_indices[bisect.bisect_right(self.first_stamps, stamp) - 1]


def _overlapping(tensors: dict[str, object]) -> list[list[tuple[str, int, int, object]]]:
    """Group (name, first byte, byte after the last, tensor) so that groups do not overlap, in ascending order."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((name, start, start + (last + 1) * tensor.element_size(), tensor))
    groups: list[list] = []
    stop = 0
    for span in sorted(spans, key=lambda span: span[1:3]):
        if span[1] >= stop:
            groups.append([])
        groups[-1].append(span)
        stop = max(stop, span[2])
    return groups


def _tensors(name: str, argument) -> dict[str, object]:
    """Return the tensors in a kernel argument by name: itself, the base of a descriptor, or those of a tuple."""
    if isinstance(argument, tuple):
        return {k: v for i, item in enumerate(argument) for k, v in _tensors(f"{name}[{i}]", item).items()}
    argument = interpreter._unwrap_tensor(getattr(argument, "base", argument))
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


def _new_program(method):
    @functools.wraps(method)
    def wrapped(self, x, y, z):
        method(self, x, y, z)
        self.launch.next_program((x, y, z))

    return wrapped


def _active(pointers, mask) -> tuple[np.ndarray, int]:
    """Return the addresses of the lanes that are on, and the width of an element in bytes."""
    on = np.asarray(mask.data, dtype=bool)
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return np.broadcast_to(pointers.data, on.shape)[on], width


def _checked_load(method):
    @functools.wraps(method)
    def wrapped(self, pointers, mask, *rest, **keywords):
        self.launch.load(*_active(pointers, mask))
        return method(self, pointers, mask, *rest, **keywords)

    return wrapped


def _checked_store(method):
    @functools.wraps(method)
    def wrapped(self, pointers, value, mask, *rest, **keywords):
        self.launch.store(*_active(pointers, mask))
        return method(self, pointers, value, mask, *rest, **keywords)

    return wrapped


def _refuse_atomic(self, *arguments):
    raise RuntimeError("atomic operations are not allowed: the order of their sums changes from run to run")
