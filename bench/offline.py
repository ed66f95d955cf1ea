"""A GPU that is not there: the real launchers run on CPU tensors, every launch is compiled and none is executed.

A driver that only names an architecture takes the place of CUDA's. Each launch is specialised on the tensors it was
given exactly as on that GPU, so what is compiled is what would run. `prepare_environment` comes before triton is
imported. Output tensors keep what `torch.empty` left in them.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch: what was asked for and what the compiler made of it."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int
    tensor_bytes: int
    constants: dict[str, Any] = field(repr=False)
    ttir: str = field(repr=False)
    ttgir: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


def prepare_environment() -> None:
    """Set what must be set before triton is imported.

    Raises:
        RuntimeError: TRITON_INTERPRET is set; the interpreter compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET must not be set where kernels are compiled, got TRITON_INTERPRET=1")
    os.environ["KERNELS_OFFLINE"] = "1"
    # line numbers would make the machine code depend on comments and folders
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


class _Driver:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        # compiled kernels are kept per device index, so each architecture must be a device of its own
        return self.arch

    def get_current_stream(self, device=None) -> int:
        return 0


@contextlib.contextmanager
def gpu(arch: int) -> Iterator[list[Launch]]:
    """Compile every launch inside the `with` for sm_<arch> and list them in order.

    Example:
        with gpu(90) as launches:
            sinkhorn(cost_BNM, eps=0.1, iterations=20, impl="triton")
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid: Any, warmup=False, **keywords):
        compiled = run(self, *args, grid=grid, warmup=True, **keywords)
        arguments = dict(zip(self.arg_names, args, strict=False)) | keywords
        grid = grid(arguments) if callable(grid) else grid
        launches.append(_launch(self.__name__, compiled, arguments, grid))
        return compiled

    driver.set_active(cast(Any, _Driver(arch)))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = None


def memory_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of memory behind tensors: an expanded axis has none, and a tensor twice counts once."""
    sizes = {}
    for x in tensors:
        stored = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        sizes[x.data_ptr()] = max(sizes.get(x.data_ptr(), 0), stored * x.element_size())
    return sum(sizes.values())


def _launch(kernel: str, compiled, arguments: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    values = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
    return Launch(
        kernel=kernel,
        grid=tuple(grid),
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        tensor_bytes=memory_bytes(x for x in values if hasattr(x, "data_ptr")),
        constants={name: x for name, x in arguments.items() if isinstance(x, bool | int | str)},
        ttir=compiled.asm["ttir"],
        ttgir=compiled.asm["ttgir"],
        cubin=compiled.asm["cubin"],
    )
