"""Sums over fixed segments of rows, in a fixed order: what a gradient of a weight shared by all rows ends with.

A kernel that adds up rows cuts them into segments of a constant length, whatever the GPU, and stores one partial sum
per segment. `sum_segments` adds those: no atomics, and the number of multiprocessors has no influence on the bits.
"""

import torch
import triton
import triton.language as tl

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
    out_X = partial_SX.new_empty(partial_SX.shape[1:])
    S, N = len(partial_SX), out_X.numel()
    if N:
        lanes = min(BLOCK_S, triton.next_power_of_2(max(S, 8)))
        columns = TILE // lanes
        _sum_segments_kernel[(triton.cdiv(N, columns),)](
            partial_SX, out_X, S, N, BLOCK_S=lanes, BLOCK_N=columns, UNROLL=min(UNROLL, max(1, S // lanes)),
            num_warps=WARPS,
        )  # fmt: skip
    return out_X


@triton.jit(do_not_specialize=["S", "N"])
def _sum_segments_kernel(
    partial_ptr, out_ptr, S, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lanes = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in tl.range(0, S, BLOCK_S, loop_unroll_factor=UNROLL):
        rows = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        keep = (rows < S)[:, None] & mask_n[None, :]
        lanes += tl.load(partial_ptr + rows[:, None] * N + offs_n[None, :], mask=keep, other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(lanes, 0), mask=mask_n)
