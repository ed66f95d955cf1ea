"""What the Triton kernels of `gqa_attention` share: the launch table, and how rows and keys are read.

Tiles are [BLOCK_T, D] of queries and [BLOCK_S, D] of keys. A key that does not count is loaded as 0 and its weight is
exactly 0, so that neither garbage in it nor the number of such keys has an influence.
"""

import torch
import triton
import triton.language as tl

from kernels.dispatch import family

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-12)
# inverse norms from here on are those of vectors shorter than NORM_EPS, up to rounding
SHORT = tl.constexpr(0.9999e12)
INF = tl.constexpr(float("inf"))


# (family, products, D) -> (queries and keys of a tile, warps, stages) of the forward, the dq and the dkv kernel.
# Found by offline compilation: the largest tiles without spills, then the fewest instructions per matrix cycle. sm_100:
# where a tile of dq or dkv is large enough for the fifth-generation matrix instructions, Triton 3.7 mostly fails.
KERNELS = ("forward", "dq", "dkv")
TILES = {
    ("sm_80", "half", 16): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
    ("sm_80", "half", 32): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
    ("sm_80", "half", 64): ((64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    ("sm_80", "half", 128): ((64, 64, 8, 3), (64, 32, 4, 3), (32, 32, 4, 2)),
    ("sm_80", "tf32", 16): ((64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_80", "tf32", 32): ((64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_80", "tf32", 64): ((64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_80", "tf32", 128): ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    ("sm_80", "ieee", 16): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_80", "ieee", 32): ((32, 32, 8, 2), (16, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_80", "ieee", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_80", "ieee", 128): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 4, 2)),
    ("sm_89", "half", 16): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
    ("sm_89", "half", 32): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
    ("sm_89", "half", 64): ((64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    ("sm_89", "half", 128): ((64, 64, 8, 3), (64, 32, 4, 3), (32, 32, 4, 2)),
    ("sm_89", "tf32", 16): ((64, 32, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_89", "tf32", 32): ((64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_89", "tf32", 64): ((64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_89", "tf32", 128): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    ("sm_89", "ieee", 16): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_89", "ieee", 32): ((32, 32, 8, 2), (16, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_89", "ieee", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_89", "ieee", 128): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_90", "half", 16): ((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm_90", "half", 32): ((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm_90", "half", 64): ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("sm_90", "half", 128): ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", "tf32", 16): ((64, 64, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2)),
    ("sm_90", "tf32", 32): ((64, 64, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2)),
    ("sm_90", "tf32", 64): ((64, 64, 4, 2), (64, 32, 4, 3), (32, 64, 4, 2)),
    ("sm_90", "tf32", 128): ((64, 16, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", "ieee", 16): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2)),
    ("sm_90", "ieee", 32): ((32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_90", "ieee", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_90", "ieee", 128): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 32, 4, 2)),
    ("sm_100", "half", 16): ((64, 128, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "half", 32): ((64, 64, 4, 3), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "half", 64): ((64, 64, 4, 3), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "half", 128): ((128, 64, 8, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "tf32", 16): ((128, 64, 8, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "tf32", 32): ((64, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "tf32", 64): ((64, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    ("sm_100", "tf32", 128): ((64, 32, 4, 3), (32, 32, 4, 2), (32, 32, 4, 1)),
    ("sm_100", "ieee", 16): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_100", "ieee", 32): ((32, 64, 8, 2), (32, 16, 8, 2), (32, 32, 8, 2)),
    ("sm_100", "ieee", 64): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_100", "ieee", 128): ((16, 16, 8, 2), (16, 16, 8, 2), (16, 32, 4, 2)),
}


def launch_options(kernel: str, q_BHTD: torch.Tensor, precision: str) -> dict[str, int]:
    """The block sizes, warps and stages of a launch. They decide its bits, so they are found by hand and kept here."""
    products = precision if q_BHTD.dtype == torch.float32 else "half"
    T, S, warps, stages = TILES[family(q_BHTD), products, q_BHTD.shape[-1]][KERNELS.index(kernel)]
    return {"BLOCK_T": T, "BLOCK_S": S, "num_warps": warps, "num_stages": stages}


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of items, heads and rows."""
    items, heads, rows, _ = x.stride()
    return items, heads, rows


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but within a row."""
    return x if x.stride(-1) == 1 else x.contiguous()


def keys_to_loop_over(key_count_B, key_mask_BS):
    """Return how many keys of each item the loops run over, and the mask as bytes; None: all of them, no mask."""
    if key_mask_BS is None:
        return None if key_count_B is None else key_count_B.contiguous(), None
    ends_S = torch.arange(1, key_mask_BS.shape[1] + 1, device=key_mask_BS.device, dtype=torch.int32)
    return torch.where(key_mask_BS, ends_S, 0).amax(1), key_mask_BS.contiguous().view(torch.uint8)


@triton.jit
def locate(pid, length, heads: tl.constexpr, BLOCK: tl.constexpr):
    """Return item, head and first row of program `pid`, of those of one head and then of one item side by side."""
    blocks = tl.cdiv(length, BLOCK)
    return (pid // blocks // heads).to(tl.int64), (pid // blocks % heads).to(tl.int64), pid % blocks * BLOCK


@triton.jit
def row_ptrs(ptr, stride, start, ROWS: tl.constexpr, D: tl.constexpr):
    """Where rows start .. start + ROWS of a [*, D] matrix are."""
    rows = tl.arange(0, ROWS).to(tl.int64)
    return ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + tl.arange(0, D)[None, :])


@triton.jit
def load_rows(ptr, stride, start, keep, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows of a [*, D] matrix; 0 where not kept (keep None: all are)."""
    ptrs = row_ptrs(ptr, stride, start, ROWS, D)
    if keep is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=keep[:, None], other=0.0)


@triton.jit
def load_vector(ptrs, mask):
    """Read numbers of one row or key each, inside a loop.

    A load of fewer elements than threads would be made in the layout of its use, that of a product's rows or columns,
    in which every thread of a warpgroup's product reads half of them. So from 64 on, each is read twice or four times,
    by one thread or two, and handed on.
    """
    if ptrs.shape[0] < 64:
        return tl.load(ptrs, mask=mask)
    else:
        ptrs = ptrs[:, None] + tl.zeros([1, 2], tl.int32)
        mask = None if mask is None else mask[:, None]
        if ptrs.shape[0] < 128:
            ptrs = ptrs[:, :, None] + tl.zeros([1, 1, 2], tl.int32)
            mask = None if mask is None else mask[:, :, None]
        values = tl.load(ptrs, mask=mask)
        if ptrs.shape[0] < 128:
            values, _ = tl.split(values)
        values, _ = tl.split(values)
        return values


@triton.jit
def store_rows(ptr, stride, start, keep, values, ROWS: tl.constexpr, D: tl.constexpr):
    """Store rows of a [*, D] matrix in its dtype, where kept."""
    tl.store(row_ptrs(ptr, stride, start, ROWS, D), values.to(ptr.dtype.element_ty), mask=keep[:, None])


@triton.jit
def finite(values, dtype: tl.constexpr):
    """As operand of a product; float16 saturates, as infinity times the 0 of a short q or k would be NaN."""
    if dtype == tl.float16:
        values = tl.clamp(values, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)


@triton.jit
def count_of(key_count_ptr, b, S):
    """How many keys an item's loops run over."""
    if key_count_ptr is None:
        return S
    else:
        return tl.minimum(tl.maximum(tl.load(key_count_ptr + b), 0), S).to(tl.int32)


@triton.jit
def valid_keys(key_mask_ptr, b, S, count, start, BLOCK_S: tl.constexpr):
    """Which keys of a tile count."""
    offs_s = start + tl.arange(0, BLOCK_S)
    valid = offs_s < count
    if key_mask_ptr is not None:
        valid = valid & (tl.load(key_mask_ptr + b * S + offs_s, mask=valid, other=0) != 0)
    return valid
