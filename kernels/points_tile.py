"""What the Triton kernels of `point_embedding` share: the launch table, the columns of the features, products."""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.dispatch import family
from kernels.gelu_tile import gelu

# columns of a point's features in the kernels: a power of two; the last is 1 for a point that counts and carries bias1
WIDTH = 128
# rows of a buffer are padded to this; every block of points divides it
ROWS = 128
# points of one partial sum
SEGMENT = 4096

# columns of a slice of a product without matrix units
SLICE = tl.constexpr(16)

# (family, products) -> (points and hidden units of a tile, warps, stages) of the kernels.
# Found by offline compilation: the largest tiles without spills; sm_90 bf16 measured on an H200 (bench/LOG.md).
TILES = {
    ("sm_80", "bf16"): ((128, 16, 8, 3), (16, 128, 8, 3), (16, 128, 8, 3)),
    ("sm_80", "tf32"): ((64, 16, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    ("sm_80", "ieee"): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_89", "bf16"): ((128, 16, 8, 3), (16, 64, 4, 3), (16, 64, 4, 2)),
    ("sm_89", "tf32"): ((64, 16, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
    ("sm_89", "ieee"): ((32, 32, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_90", "bf16"): ((128, 64, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2)),
    ("sm_90", "tf32"): ((64, 16, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    ("sm_90", "ieee"): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_100", "bf16"): ((128, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2)),
    ("sm_100", "tf32"): ((64, 16, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2)),
    ("sm_100", "ieee"): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
}
KERNELS = ("forward", "weight2", "weight1")


def launch_options(kernel: str, tensor: torch.Tensor, precision: str) -> dict[str, Any]:
    """The block sizes, warps, stages and products of a launch: they decide its bits, so they are kept here by hand."""
    launches = TILES[family(tensor), precision][KERNELS.index(kernel)]
    options = dict(zip(("BLOCK_P", "BLOCK_J", "num_warps", "num_stages"), launches, strict=True))
    # how bfloat16 is multiplied has no choices; here it means a GELU no more exact than the products
    return options | {"PRECISION": "ieee" if precision == "ieee" else "tf32"}


def hidden_block(tensor: torch.Tensor, precision: str) -> int:
    """What the number of hidden units is padded to: whole blocks of every kernel."""
    return max(launch_options(kernel, tensor, precision)["BLOCK_J"] for kernel in KERNELS)


def whole_block(C: int) -> int:
    """Channels of a tile: a power of two, and enough for a product."""
    return 1 << max(4, (C - 1).bit_length())


@triton.jit
def add_gelu_products(
    y, a_ptr, row, b_ptr, c_ptr, begin, end, rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y + sum_i gelu(<a, b_i>) c_i for BLOCK_A rows of a, the sum over rows of b and c from begin to end, in blocks.

    Skewed by a block, so that the matrix units have the sum of one while GELU of the next is computed.
    """
    last = rows - BLOCK
    a = load_tile(a_ptr, row, BLOCK_A, WIDTH)
    h = gelu(products(a, a_ptr, row, b_ptr, begin, BLOCK_A, BLOCK, WIDTH, PRECISION), PRECISION)
    second = tl.minimum(begin + BLOCK, last)
    x = products(a, a_ptr, row, b_ptr, second, BLOCK_A, BLOCK, WIDTH, PRECISION)
    for i in tl.range(begin, end, BLOCK):
        # rounded here and not where it is made: so it goes from registers to the matrix units, without a wait
        y = tl.dot(h.to(a.dtype), load_tile(c_ptr, i, BLOCK, COLUMNS), y, input_precision=PRECISION)
        h = gelu(x, PRECISION)
        ahead = tl.minimum(i + 2 * BLOCK, last)
        x = products(a, a_ptr, row, b_ptr, ahead, BLOCK_A, BLOCK, WIDTH, PRECISION)
    return y


@triton.jit
def products(
    a, a_ptr, row_a, b_ptr, row_b,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T for a block of rows of b; `a` is the block at row_a of a_ptr."""
    if PRECISION == "ieee":
        # not on matrix units: a thread would hold whole rows in registers, so by slices of their columns
        x = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for k in tl.range(0, WIDTH, SLICE, num_stages=1):
            a_slice = tl.load(_tile_ptrs(a_ptr + k, row_a, BLOCK_A, SLICE, WIDTH))
            b_slice = tl.load(_tile_ptrs(b_ptr + k, row_b, BLOCK_B, SLICE, WIDTH))
            x = tl.dot(a_slice, tl.trans(b_slice), x, input_precision=PRECISION)
        return x
    else:
        return tl.dot(a, tl.trans(load_tile(b_ptr, row_b, BLOCK_B, WIDTH)), input_precision=PRECISION)


@triton.jit
def load_tile(ptr, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows start .. start + ROWS of a dense matrix of COLUMNS columns."""
    return tl.load(_tile_ptrs(ptr, start, ROWS, COLUMNS, COLUMNS))


@triton.jit
def store_tile(ptr, start, stride, keep, values):
    """Store `values` in its dtype from row `start` of a matrix, where kept."""
    ptrs = _tile_ptrs(ptr, start, values.shape[0], values.shape[1], stride)
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def _tile_ptrs(ptr, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, stride):
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None] * stride
    return ptr + tl.cast(start, tl.int64) * stride + (rows + tl.arange(0, COLUMNS)[None, :])
