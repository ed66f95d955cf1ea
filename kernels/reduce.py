"""Sums over rows in a fixed order: a kernel leaves one partial sum per fixed segment of rows, and this adds them.

Which rows make a segment is a constant of the kernel that wrote it, so the order of a sum depends on its length alone:
not on the number of multiprocessors, not on which program ends first.
"""

import torch
import triton
import triton.language as tl

# segments added as one tree, columns of a program, warps
TREE, COLUMNS, WARPS = 128, 16, 4


def sum_segments(partials_SC: torch.Tensor) -> torch.Tensor:
    """Add the rows of float32 partial sums: TREE of them as one tree, the trees in ascending order.

        for s in range(0, S, TREE): total_C += tree_sum(partials_SC[s : s + TREE])

    Args:
        partials_SC: contiguous float32, any S and C.
    Returns:
        total_C, float32; 0 where S is 0.
    Determinism: the order of the sum depends on S alone.
    """
    S, C = partials_SC.shape
    total_C = partials_SC.new_empty(C)
    if C:
        _sum_segments_kernel[(triton.cdiv(C, COLUMNS),)](
            partials_SC, total_C, S, C, TREE=TREE, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return total_C


@triton.jit(do_not_specialize=["S"])
def _sum_segments_kernel(partials_ptr, total_ptr, S, C, TREE: tl.constexpr, COLUMNS: tl.constexpr):
    offs_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_c = offs_c < C
    total = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, S, TREE):
        offs_s = start + tl.arange(0, TREE)
        ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * C + offs_c[None, :]
        # total += partials[s : s + TREE].sum(0)
        total += tl.sum(tl.load(ptrs, mask=(offs_s < S)[:, None] & mask_c[None, :], other=0.0), 0)
    tl.store(total_ptr + offs_c, total, mask=mask_c)
