"""Gather the same rows of several tensors in one launch: the batch of an update, out of a set held in device memory.

    gathered_k[b] = tensor_k[index_b]   for each tensor k

A copy of bytes, whatever they mean: a row is read in the widest integers that it consists of. A program copies one
block of one row of one tensor. Shapes in names: R rows held, B gathered, X whatever a row is made of.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.dispatch import cdiv, require_tensors, resolve, values_are_readable
from kernels.registration import operator

MOST = 12
WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
# words of a program, warps
BLOCK, WARPS = 512, 4


def gather_rows(tensors_RX: Sequence[torch.Tensor], index_B: torch.Tensor, *, impl: str = "auto") -> list[torch.Tensor]:
    """Return tensor[index] for each of `tensors`.

    Args:
        tensors_RX: 1 to 12 tensors [R, ...] of any dtypes, on one device; contiguous where the kernel runs.
        index_B: int64 in [0, R), any order, rows may repeat. Values are checked where they may be read and clamped
            elsewhere.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        Tensors [B, ...] of the dtypes of `tensors`; they have no gradient.
    Raises:
        ValueError: a shape, dtype, device, value or option outside of the above; a tensor that requires a gradient.
    Determinism: the bits of the rows, in both forms.
    """
    _check(tensors_RX, index_B)
    if resolve(impl, index_B.device) == "eager":
        return gather_rows_reference(tensors_RX, index_B)
    for k, tensor in enumerate(tensors_RX):
        if not tensor.is_contiguous():
            raise ValueError(f"tensors[{k}] must be contiguous for the kernel, got strides {tensor.stride()}")
    return _gather_rows(tensors_RX, index_B)


def gather_rows_reference(tensors_RX: Sequence[torch.Tensor], index_B: torch.Tensor) -> list[torch.Tensor]:
    """The meaning of `gather_rows`, in plain PyTorch."""
    index_B = index_B.clamp(0, len(tensors_RX[0]) - 1)
    return [tensor[index_B] for tensor in tensors_RX]


@operator("ridgeline::gather_rows")
def _gather_rows(tensors_RX: Sequence[torch.Tensor], index_B: torch.Tensor) -> list[torch.Tensor]:
    """The gathered rows of each tensor."""
    gathered_BX = [_rows_like(tensor, index_B) for tensor in tensors_RX]
    pairs = [pair for pair in zip(tensors_RX, gathered_BX, strict=True) if pair[1].numel()]
    if pairs:
        sources, targets = zip(*(_in_words(*pair) for pair in pairs), strict=True)
        widths = tuple(target.numel() // len(index_B) for target in targets)
        parts = sum(cdiv(width, BLOCK) for width in widths)
        _gather_rows_kernel[(len(index_B) * parts,)](
            sources, targets, widths, index_B.contiguous(), len(tensors_RX[0]), parts, BLOCK=BLOCK, num_warps=WARPS
        )
    return gathered_BX


@_gather_rows.register_fake
def _(tensors_RX, index_B):
    return [_rows_like(tensor, index_B) for tensor in tensors_RX]


def _rows_like(tensor: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(len(index_B), *tensor.shape[1:])


def _in_words(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as flat tensors of the widest integers that rows consist of, aligned in memory; the target is new."""
    size = source.element_size()
    # PyTorch wants a view aligned in its storage, a GPU wants a word aligned in memory
    places = (source.storage_offset() * size, source.data_ptr(), math.prod(source.shape[1:]) * size)
    word = next(word for word in WORDS if not any(place % word.itemsize for place in places))
    return source.view(-1).view(word), target.view(-1).view(word)


def _check(tensors_RX, index_B) -> None:
    """Refuse tensors that do not fit each other, and rows that are not there."""
    if not 1 <= len(tensors_RX) <= MOST:
        raise ValueError(f"tensors must be 1 to {MOST}, got {len(tensors_RX)}")
    require_tensors(index=index_B, **{f"tensors[{k}]": tensor for k, tensor in enumerate(tensors_RX)})
    if index_B.dim() != 1 or index_B.dtype != torch.int64:
        raise ValueError(f"index must be [B] of int64, got shape {tuple(index_B.shape)}, {index_B.dtype}")
    for k, tensor in enumerate(tensors_RX):
        if tensor.dim() == 0 or len(tensor) != len(tensors_RX[0]):
            raise ValueError(f"tensors[{k}] must be [R, ...] with one R for all, got shape {tuple(tensor.shape)}")
        if tensor.device != index_B.device:
            raise ValueError(f"tensors[{k}] must be on the device of index, {index_B.device}, got {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"tensors[{k}] must not require a gradient, got requires_grad=True")
    R = len(tensors_RX[0])
    if len(index_B) and R == 0:
        raise ValueError(f"index must be empty where the tensors have no rows, got {len(index_B)} entries")
    if len(index_B) and values_are_readable(index_B):
        low, high = (int(bound) for bound in index_B.aminmax())
        if low < 0 or high >= R:
            raise ValueError(f"index must be in [0, {R}), got {low if low < 0 else high}")


@triton.jit(do_not_specialize=["rows", "parts"])
def _gather_rows_kernel(source_ptrs, target_ptrs, widths, index_ptr, rows, parts, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    b, part = (pid // parts).to(tl.int64), pid % parts
    row = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), rows - 1)
    # the parts of a row of the first tensor come first, then those of the second
    for k in tl.static_range(len(widths)):
        blocks = tl.cdiv(widths[k], BLOCK)
        if (part >= 0) & (part < blocks):
            # gathered_k[b] = tensor_k[index_b]
            offs = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < widths[k]
            word = tl.load(source_ptrs[k] + row * widths[k] + offs, mask=mask)
            tl.store(target_ptrs[k] + b * widths[k] + offs, word, mask=mask)
        part -= blocks
