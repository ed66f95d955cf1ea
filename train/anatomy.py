"""The anatomy of an update: all that is computed between its rows and its weights, by kind, in forward order.

It is taken by hooks on the model's seams, which are there only while an update is watched, and copied to the CPU. Where
kernels run a stack of layers without calling its blocks, the seams are the operators that end a block.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

import perceiver.fused
import perceiver.model
from perceiver.blocks import AttentionBlock, FeedForwardBlock
from perceiver.model import Perceiver

# what an update computes, in this order; "before" is the state that it starts from
KINDS = ("before", "rows", "activation", "loss", "gradient", "after")
Anatomy = dict[str, dict[str, torch.Tensor]]


@contextlib.contextmanager
def watch_update(model: Perceiver) -> Iterator[Anatomy]:
    """Note the rows, activations and gradients of the update that is made inside the `with`.

    Yields:
        {"rows": the augmented batch; "activation": the memory, the output of each block under the block's name, the
        predicted segments; "gradient": of each parameter, before clipping}: filled by the update.
    Determinism: watching reads and copies; the update's bits are those it has alone.
    """
    seen: Anatomy = {"rows": {}, "activation": {}, "gradient": {}}
    gradients: dict[str, torch.Tensor] = {}

    def rows(_module, arguments) -> None:
        seen["rows"].update(copies(vars(arguments[0])))

    def activation(name: str):
        return lambda _module, _arguments, output: seen["activation"].update(copies({name: output}))

    def segments(_module, _arguments, output) -> None:
        seen["activation"].update(copies(output._asdict()))

    def gradient(name: str):
        return lambda parameter: gradients.update(copies({name: parameter.grad}))

    places: dict[int, str] = {}

    def block_ended(answer: Any, arguments: Mapping[str, Any]) -> None:
        # the place of its dropout tells which block; the first call normalises the table
        if "place" in arguments:
            seen["activation"].update(copies({places[arguments["place"]]: answer.new_BTC}))

    handles = [model.register_forward_pre_hook(rows), model.register_forward_hook(segments)]
    for name, module in model.named_modules():
        if isinstance(module, AttentionBlock | FeedForwardBlock):
            places[module.place] = name
            handles.append(module.register_forward_hook(activation(name)))
    for name, parameter in model.named_parameters():
        handles.append(parameter.register_post_accumulate_grad_hook(gradient(name)))
    try:
        with (
            _heard(perceiver.model, "point_embedding", lambda answer, _: activation("memory")(None, None, answer)),
            _heard(perceiver.fused, "residual_norm", block_ended),
        ):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
    # they come in the order of the backward pass
    seen["gradient"].update({name: gradients[name] for name, _ in model.named_parameters() if name in gradients})


@contextlib.contextmanager
def _heard(module: ModuleType, name: str, hear: Callable[[Any, Mapping[str, Any]], None]) -> Iterator[None]:
    """Let `hear` see what a function that a module uses returns, and with which keywords it was called."""
    function = getattr(module, name)

    def inner(*args, **kwargs):
        answer = function(*args, **kwargs)
        hear(answer, kwargs)
        return answer

    setattr(module, name, inner)
    try:
        yield
    finally:
        setattr(module, name, function)


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU as they are now."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def differing_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> list[str]:
    """Say of each tensor whose bytes differ how many elements do, and by how much; in the order of `a`."""
    found = []
    for name in {**a, **b}:
        if name not in a or name not in b:
            found.append(f"{name} is in one run only")
        elif a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            found.append(
                f"{name} is {a[name].dtype} {tuple(a[name].shape)} against {b[name].dtype} {tuple(b[name].shape)}"
            )
        else:
            same = _bytes(a[name]) == _bytes(b[name])
            if not same.all():
                elements = int((~same).reshape(max(a[name].numel(), 1), -1).any(dim=1).sum())
                much = float((a[name].double() - b[name].double()).abs().max())
                found.append(f"{name}: {elements:,} of {a[name].numel():,} elements differ, at most by {much:.3g}")
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
