"""What PyTorch is told of an operator, and the short way to call it.

`torch.library.custom_op` makes a function an operator that is traced, exported and checked as one piece. The host pays
for that on every call, more than for the launch itself. Where nobody looks on (no tracer, profiler, mode or transform,
no tensors of another class), an `Operator` runs the same function, and for the gradient the same pair of functions,
without it: the same launches of the same kernels in the same order, so the same bits.

A default device is a mode to PyTorch: with `torch.set_default_device` every call takes the long way. An
`ExecutionTraceObserver` without a profiler cannot be noticed, and sees no operators.

Either way the function runs with the GPU of its tensors as the current one: Triton launches there.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any, cast

import torch
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from kernels.dispatch import on

PLAIN = (torch.Tensor, torch.nn.Parameter)
VALUES = (float, int, bool, str)


def operator(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable], "Operator"]:
    """Make the decorated function the operator `name`, called as before."""
    return lambda function: Operator(name, function, mutates_args)


class Operator:
    """A function of tensors that PyTorch knows as an operator.

    Args:
        name: "namespace::name".
        function: of annotated arguments, from which the operator's schema is read; returns new tensors.
        mutates_args: names of the arguments that it writes.
    Determinism: that of the function; the way it is called has no influence.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Iterable[str] = ()):
        self._name, self._function = name, _beside_its_tensors(function)
        self._registered = torch.library.custom_op(name, self._function, mutates_args=mutates_args)
        # PyTorch counts the writes to a tensor where it registered them
        self._direct = not tuple(mutates_args)
        self._apply: Callable | None = None
        kinds = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
        self._count, self._values = len(kinds), [(place, kind) for place, kind in enumerate(kinds) if kind in VALUES]
        self._may_hold_tensors = [kind not in VALUES for kind in kinds]
        functools.update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"Operator({self._name!r})"

    def register_fake(self, fake: Callable) -> Callable:
        """Say what tensors the function returns, for tracers: `torch.library.CustomOpDef.register_fake`."""
        return self._registered.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Say how gradients go back: `torch.library.CustomOpDef.register_autograd`.

        Where `backward` calls an operator without a gradient, a second derivative is refused.
        """
        self._registered.register_autograd(backward, setup_context=setup_context)

        # a setup_context of its own would have PyTorch read the signature on every call
        def forward(ctx, *inputs: Any) -> Any:
            output = self._function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        kind = type(self._name.rpartition(":")[2], (torch.autograd.Function,), members)
        # what the own `apply` of a Function ends in after looking for transforms, of which there are none here
        self._apply = cast(Any, super(torch.autograd.Function, kind)).apply

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # a compiler that traces this call comes here first, and reads no further
        if torch.compiler.is_compiling() or not self._direct or len(arguments) != self._count:
            return self._registered(*arguments, **named)
        if _observed(tensors := _tensors(compress(arguments, self._may_hold_tensors))):
            self._refuse_tangents(tensors)
            return self._registered(*arguments)
        # a number of another type would be another kernel to Triton; PyTorch makes it the one that it knows
        for place, kind in self._values:
            if type(arguments[place]) is not kind:
                return self._registered(*arguments)
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return self._function(*arguments)
        return (self._apply or self._registered)(*arguments)

    def _refuse_tangents(self, tensors: list[torch.Tensor]) -> None:
        """PyTorch would drop them without a word."""
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise NotImplementedError(f"{self._name} has derivatives by backward only, got an input with a tangent")


def _observed(tensors: list[torch.Tensor]) -> bool:
    """Whether somebody is to see the operator, and not what it does."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or any(map(_is_other, tensors))
    )


def _is_other(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not what lies in its memory: of another class, without values, negated, or many in one.

    Or what a transform wrapped, which may have left it behind.
    """
    return (
        type(tensor) not in PLAIN
        or tensor.is_meta
        or tensor.is_neg()
        or is_legacy_batchedtensor(tensor)
        or is_functorch_wrapped_tensor(tensor)
    )


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += _tensors(argument)
    return found


def _beside_its_tensors(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        # the first will do: an operator's tensors are on one device, and not all of them in lists
        with on(next(filter(torch.is_tensor, arguments)).device):
            return function(*arguments)

    return run
