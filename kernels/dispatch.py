"""Which form of an operator runs, and for which GPUs its launches are: the one place that decides.

Also the checks and the arithmetic that launchers share.

"eager"    PyTorch on whatever device the tensors are on
"triton"   the kernels: on a CUDA device, or on CPU tensors under the interpreter or the offline driver
"auto"     triton on CUDA and under the offline driver, where CPU tensors stand for those of a GPU; else eager
"""

import functools
import operator
import os
import reprlib
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

IMPLEMENTATIONS = ("auto", "eager", "triton")


def resolve(impl: str, device: torch.device) -> str:
    """Return "eager" or "triton" for tensors on `device`.

    Raises:
        ValueError: `impl` is none of auto, eager, triton; or it is triton and nothing can run a kernel on `device`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        return "triton" if device.type == "cuda" or _stands_for_gpu() else "eager"
    if impl == "triton" and device.type != "cuda" and not (device.type == "cpu" and kernels_accept_cpu()):
        raise ValueError(
            f"impl='triton' must have CUDA tensors (CPU ones only with TRITON_INTERPRET=1), got device {device}"
        )
    return impl


def require_tensors(**arguments: Any) -> None:
    """Refuse what is no tensor, before its shape is asked for.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {reprlib.repr(value)}")


def require_tensors_or_none(**arguments: Any) -> None:
    """Refuse what is neither a tensor nor left out, see `require_tensors`."""
    require_tensors(**{name: value for name, value in arguments.items() if value is not None})


def as_number(name: str, value: Any) -> float:
    """Return a number, numpy's floats included, as the plain float that an operator takes.

    Raises:
        ValueError: naming the argument; of a tensor too, which would lose its gradient on the way into the operator.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {_described(value)}")
    try:
        return float(value)
    except OverflowError:
        # too long to print
        raise ValueError(f"{name} must be in the range of floats, got {type(value).__name__} beyond it") from None


def as_count(name: str, value: Any) -> int:
    """Return an integer of at least 1, numpy's included, as the plain int that an operator takes.

    Raises:
        ValueError: naming the argument.
    """
    try:
        count = 0 if isinstance(value, bool | torch.Tensor) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {_described(value)}")
    return count


def _described(value: Any) -> str:
    # to print the values of a GPU's tensor would wait for it
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else reprlib.repr(value)


def kernels_accept_cpu() -> bool:
    """Whether a Triton launch on CPU tensors means something here: the interpreter, or a driver that only compiles."""
    return os.environ.get("TRITON_INTERPRET") == "1" or _stands_for_gpu()


def values_are_readable(tensor: torch.Tensor) -> bool:
    """Whether an operator may look at the values of `tensor` to refuse bad ones: on a GPU that would wait for it.

    Not inside of a vmap either, where values are as on a GPU: out of range they are clamped, or up to the caller.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    # one tensor of a vmap is many, of which none can be asked
    if torch._C._are_functorch_transforms_active():
        return False
    if tensor.is_cpu and not _stands_for_gpu():
        return True
    return os.environ.get("KERNELS_CHECK") == "1" and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one for a while: Triton launches on that, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def family(tensor: torch.Tensor) -> str:
    """The architectures that share launches: by shared memory and matrix instructions."""
    if tensor.is_cuda:
        major, minor = _capability(tensor.device)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        return "sm_90"
    else:
        target: Any = triton.runtime.driver.active.get_current_target()
        major, minor = divmod(target.arch, 10)
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_89"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cdiv(x: int, y: int) -> int:
    """Return x / y rounded up: `triton.cdiv`, which the host calls through a wrapper that costs more than the rest."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """Return the least power of two that is at least x, which is positive: `triton.next_power_of_2`, see `cdiv`."""
    return 1 << (x - 1).bit_length()


def _stands_for_gpu() -> bool:
    """Whether CPU tensors stand for those of a GPU that is not there, see `bench.offline`."""
    return os.environ.get("KERNELS_OFFLINE") == "1"
