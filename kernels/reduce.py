"""Sums over fixed segments of rows, in a fixed order: what a gradient of a weight shared by all rows ends with.

A kernel that adds up rows cuts them into segments of a constant length, whatever the GPU, and stores one partial sum
per segment. `sum_segments` adds those: no atomics, and the number of multiprocessors has no influence on the bits.

In a stack of layers each of many backward passes ends with such a sum: a launch of its own, though only the optimizer
waits for it. Through `JointSums` all that are of one shape share a launch, after the last of these backward passes.
"""

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.dispatch import cdiv, next_power_of_2

# lanes of a sum at most, elements of a tile, warps: with many segments few columns, so that there are programs enough
BLOCK_S, TILE, WARPS = 128, 2048, 4
# rounds of the lanes whose loads are under way at a time
UNROLL = 4


def sum_segments(partial_SX: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis in float32.

        sum_s partial_s: lanes i = 0 .. L - 1 first add s = i, i + L, ... each in ascending order, then a tree adds the
        lanes; L is the power of two from S on, between 8 and 128

    Args:
        partial_SX: contiguous float32 [S, ...], on a device where Triton kernels run.
    Returns:
        float32 [...]; zeros if S is 0.
    Determinism: the bits depend on the values and on S, on nothing else.
    """
    S, *X = partial_SX.shape
    return sum_each(partial_SX.view(1, S, math.prod(X))).view(X)


def sum_each(partial_VSN: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """Return `sum_segments` of each of V contiguous matrices, [V, N], from one launch; in the tensor `into`, if any."""
    V, S, N = partial_VSN.shape
    out_VN = partial_VSN.new_empty(V, N) if into is None else into
    if V * N:
        lanes = min(BLOCK_S, next_power_of_2(max(S, 8)))
        columns = TILE // lanes
        _sum_segments_kernel[(cdiv(N, columns), V)](
            partial_VSN, out_VN, S, N, BLOCK_S=lanes, BLOCK_N=columns, UNROLL=min(UNROLL, max(1, S // lanes)),
            num_warps=WARPS,
        )  # fmt: skip
    return out_VN


def joined(sums: "JointSums | None") -> TypeGuard["JointSums"]:
    """Whether an operator's gradients are to be added up with those of others."""
    return sums is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class JointSums:
    """Gradients of vectors that many operators read, in one launch for all of one length and number of segments.

    An operator takes its vector; its backward fills `Summand.partial_SC` and returns `Summand.sum_C` to autograd, which
    runs the launch when no operator is left. Nothing may read the gradient before, so detecting anomalies finds any.
    A compiler would read it: what torch.compile traces ends in sums of its own.

    Args:
        vectors: float32 [C], each for one operator.
    Raises:
        ValueError: a vector is not float32 or has not one axis.
    Determinism: each gradient has the bits of `sum_segments`.
    """

    def __init__(self, vectors: Sequence[torch.Tensor]):
        for vector_C in vectors:
            if vector_C.dim() != 1 or vector_C.dtype != torch.float32:
                raise ValueError(f"vectors must be float32 [C], got {vector_C.dtype}, shape {tuple(vector_C.shape)}")
        self._groups: dict[tuple[int, int], _Group] = {}
        passed_on = _PassOn.apply(self._groups, *vectors) if vectors else ()
        # the vector beside what stands for it: an id is one only of what lives
        self._waiting = {id(pair[0]): pair for pair in zip(vectors, passed_on, strict=True)}

    def take(self, vector_C: torch.Tensor, segments: int) -> tuple[torch.Tensor, "Summand"]:
        """Return the vector as the operator is to hand it to autograd, and the place of its gradient.

        Raises:
            ValueError: it is none of the vectors, or taken before: autograd would add what is not written yet.
        """
        _, passed_on_C = self._waiting.pop(id(vector_C), (None, None))
        if passed_on_C is None:
            raise ValueError(f"vector must be a joint one and taken once, got another of shape {tuple(vector_C.shape)}")
        group = self._groups.setdefault((segments, len(vector_C)), _Group())
        group.count += 1
        return passed_on_C, Summand(group, group.count - 1, segments, passed_on_C.detach())


class _Group:
    """The partial sums and sums of some vectors of one shape, from the first backward to the launch."""

    def __init__(self):
        self.count = 0
        self.partial_VSC: torch.Tensor | None = None
        self.sum_VC: torch.Tensor | None = None

    def add_up(self) -> None:
        if self.partial_VSC is not None and self.sum_VC is not None:
            sum_each(self.partial_VSC, self.sum_VC)
        # another backward through the same operators has gradients of its own
        self.partial_VSC = self.sum_VC = None


class Summand:
    """Where the gradient of a vector is added up."""

    def __init__(self, group: _Group, index: int, segments: int, like_C: torch.Tensor):
        self._group, self._index, self._segments, self._like_C = group, index, segments, like_C

    @property
    def partial_SC(self) -> torch.Tensor:
        """The partial sums, contiguous float32, for the backward to fill."""
        group, C = self._group, len(self._like_C)
        if group.partial_VSC is None:
            group.partial_VSC = self._like_C.new_empty(group.count, self._segments, C)
            group.sum_VC = self._like_C.new_empty(group.count, C)
        return group.partial_VSC[self._index]

    @property
    def sum_C(self) -> torch.Tensor:
        """Their sum, once it is written; `partial_SC` comes first."""
        assert self._group.sum_VC is not None
        return self._group.sum_VC[self._index]


class _PassOn(torch.autograd.Function):
    """The vectors themselves. Its backward runs after those of all operators that took one of them."""

    @staticmethod
    def forward(ctx, groups: dict[tuple[int, int], _Group], *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return tuple(vector_C.view_as(vector_C) for vector_C in vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor | None):
        for group in ctx.groups.values():
            group.add_up()
        return None, *gradients


@triton.jit(do_not_specialize=["S", "N"])
def _sum_segments_kernel(
    partial_ptr, out_ptr, S, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr
):
    v = tl.program_id(1).to(tl.int64)
    partial_ptr += v * S * N
    out_ptr += v * N
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lanes = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in tl.range(0, S, BLOCK_S, loop_unroll_factor=UNROLL):
        rows = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        keep = (rows < S)[:, None] & mask_n[None, :]
        lanes += tl.load(partial_ptr + rows[:, None] * N + offs_n[None, :], mask=keep, other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(lanes, 0), mask=mask_n)


@triton.jit
def rounded(x):
    """Return a product that is to be summed as a number of its own.

    In a sum over lanes each lane adds the number of another one to its own. The compiler would fuse a product with
    that: a lane's own product would not be rounded, the other's would, and the copies of the sum would differ in bits.
    Of copies that go through shared memory it is not defined which one arrives.
    """
    return x + 0.0
