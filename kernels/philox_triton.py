"""Philox words in one launch, where `kernels.philox` would take a hundred: for counters on a GPU."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.dispatch import cdiv, on
from kernels.philox_tile import joined_seed, seed_words

BLOCK = 256


def philox_words(
    counters: Sequence[torch.Tensor | int], shape: torch.Size, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four words, int64 tensors of `shape`, as `kernels.philox.philox_4x32` does for checked counters."""
    words = torch.empty(4, *shape, dtype=torch.int64, device=device)
    count = words[0].numel()
    # a tensor of one element is read where it is: the step of a recorded update
    tensors = [c if isinstance(c, int) or c.numel() == 1 else c.expand(shape).contiguous() for c in counters]
    if count:
        low, high = seed_words(seed)
        with on(device):
            _philox_kernel[(cdiv(count, BLOCK),)](
                *(None if isinstance(c, int) else c for c in tensors),
                *(c if isinstance(c, int) else 0 for c in tensors),
                *(0 if isinstance(c, int) or c.numel() == 1 else 1 for c in tensors),
                words, count, low, high, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    w0, w1, w2, w3 = words.unbind(0)
    return w0, w1, w2, w3


VALUES = ["n0", "n1", "n2", "n3", "step0", "step1", "step2", "step3", "count", "low", "high"]


@triton.jit(do_not_specialize=VALUES)
def _philox_kernel(
    c0_ptr, c1_ptr, c2_ptr, c3_ptr, n0, n1, n2, n3, step0, step1, step2, step3, words_ptr, count, low, high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    seed = joined_seed(low, high)
    c0, c1 = _counter(c0_ptr, n0, step0, offs, mask), _counter(c1_ptr, n1, step1, offs, mask)
    c2, c3 = _counter(c2_ptr, n2, step2, offs, mask), _counter(c3_ptr, n3, step3, offs, mask)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words_ptr + offs, w0.to(tl.int64), mask)
    tl.store(words_ptr + count + offs, w1.to(tl.int64), mask)
    tl.store(words_ptr + 2 * count + offs, w2.to(tl.int64), mask)
    tl.store(words_ptr + 3 * count + offs, w3.to(tl.int64), mask)


@triton.jit
def _counter(pointer, value, step, offs, mask):
    """Return a counter's word for each element: read from memory, or the same number for all."""
    if pointer is None:
        word = tl.zeros_like(offs).to(tl.uint32) + value.to(tl.uint32)
    else:
        word = tl.load(pointer + offs * step, mask, 0).to(tl.uint32)
    return word
