"""Triton backward of `point_embedding`: gradients of the weights; the hidden layer is computed once more.

    norm      one program per segment of rows:  du = dm gain,  dy = rinv (du - unit mean(du unit)),  stored
                  partial sums  d gain = sum dm unit,  d bias2 = sum dy
    weight2   one program per block of hidden units and segment of points, points in ascending order:
                  dW2c^T = sum_p gelu(<W1c, F_p>) dy_p: the sum of the forward with points in the place of units
    weight1   the same programs:  dW1c = sum_p <W2c^T, dy_p> gelu'(<W1c, F_p>) F_p

In one kernel, both sums would fill the registers: computing <W1c, F_p> twice is a sixth more products and no spills.
Segments have a fixed length, whatever the GPU; `kernels.reduce` adds their partial sums. Rows of points that do not
count are 0 in F and in dy: they add exactly 0. A segment ends at the last point of its last item that counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv
from kernels.gelu_tile import gelu_slope
from kernels.points_tile import (
    SEGMENT,
    WIDTH,
    add_gelu_products,
    launch_options,
    load_tile,
    products,
    store_tile,
)
from kernels.reduce import sum_segments

# rows of a partial sum and of a tile, warps: enough programs for a GPU at 65,536 points, in few rounds of loads each;
# loads are NORM_STAGES - 1 rounds ahead
NORM_SEGMENT, NORM_ROWS, NORM_WARPS, NORM_STAGES = 128, 4, 2, 3


def point_layers_backward(
    dmemory_PC: Tensor,
    features_PK: Tensor,
    weight1_JK: Tensor,
    weight2_JC: Tensor,
    gain_C: Tensor,
    unit_PC: Tensor,
    rinv_P: Tensor,
    point_count_B: Tensor | None,
    units: int,
    points_each: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight1_JK and weight2 [C, units], and those of gain and bias2 as [2, C], in float32.

    The weights are those of `kernels.points_weights.fold_weights`; there is a point at least.
    """
    C, P, rows = len(gain_C), len(dmemory_PC), len(features_PK)
    J, BLOCK_C = weight2_JC.shape
    dy_PC = torch.empty_like(unit_PC)
    sums_S2C = rinv_P.new_empty(cdiv(rows, NORM_SEGMENT), 2, C)
    _point_norm_bwd_kernel[(len(sums_S2C),)](
        dmemory_PC.contiguous(), gain_C.contiguous(), unit_PC, rinv_P, dy_PC, sums_S2C, P, rows,
        C=C, BLOCK_C=BLOCK_C, SEGMENT=NORM_SEGMENT, BLOCK_P=NORM_ROWS, STAGES=NORM_STAGES, num_warps=NORM_WARPS,
    )  # fmt: skip

    segments, settings = cdiv(rows, SEGMENT), {"J": J, "WIDTH": WIDTH, "BLOCK_C": BLOCK_C, "SEGMENT": SEGMENT}
    counts = None if point_count_B is None else point_count_B.contiguous()
    sums_SCJ = rinv_P.new_empty(segments, C, units)
    options = launch_options("weight2", features_PK, precision)
    _point_weight2_bwd_kernel[(J // options["BLOCK_J"], segments)](
        features_PK, dy_PC, weight1_JK, counts, sums_SCJ, P, points_each, rows, C=C, UNITS=units,
        **settings, **options,
    )  # fmt: skip
    dweight2_CJ = sum_segments(sums_SCJ)

    sums_SJK = rinv_P.new_empty(segments, J, WIDTH)
    options = launch_options("weight1", features_PK, precision)
    _point_weight1_bwd_kernel[(J // options["BLOCK_J"], segments)](
        features_PK, dy_PC, weight1_JK, weight2_JC, counts, sums_SJK, P, points_each, rows, **settings, **options,
    )  # fmt: skip
    return sum_segments(sums_SJK), dweight2_CJ, sum_segments(sums_S2C)


@triton.jit(do_not_specialize=["P", "rows"])
def _point_norm_bwd_kernel(
    dmemory_ptr, gain_ptr, unit_ptr, rinv_ptr, dy_ptr, sums_ptr, P, rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * SEGMENT
    offs_c = tl.arange(0, BLOCK_C)
    in_C = offs_c < C
    gain = tl.load(gain_ptr + offs_c, mask=in_C, other=0.0).to(tl.float32)
    dgain = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p in tl.range(begin, tl.minimum(begin + SEGMENT, rows), BLOCK_P, num_stages=STAGES):
        offs_p = tl.cast(p, tl.int64) + tl.arange(0, BLOCK_P)
        rinv = tl.load(rinv_ptr + offs_p)[:, None]
        dm_ptrs = dmemory_ptr + offs_p[:, None] * C + offs_c[None, :]
        dm = tl.load(dm_ptrs, mask=(offs_p < P)[:, None] & in_C[None, :], other=0.0).to(tl.float32)
        # of a point that does not count; chosen after the load, which so waits for no other
        dm = tl.where(rinv == -1.0, 0.0, dm)
        unit = load_tile(unit_ptr, p, BLOCK_P, BLOCK_C).to(tl.float32)
        # du = dm gain,  dy = rinv (du - unit mean(du unit))
        du = dm * gain[None, :]
        mean = tl.sum(du * unit, 1) / C
        dy = (du - unit * mean[:, None]) * rinv
        tl.store(dy_ptr + offs_p[:, None] * BLOCK_C + offs_c[None, :], dy.to(dy_ptr.dtype.element_ty))
        dgain += dm * unit
        dbias += dy
    sums_ptr += tl.program_id(0) * 2 * C + offs_c
    tl.store(sums_ptr, tl.sum(dgain, 0), mask=in_C)
    tl.store(sums_ptr + C, tl.sum(dbias, 0), mask=in_C)


@triton.jit(do_not_specialize=["P", "T", "rows"])
def _point_weight2_bwd_kernel(
    features_ptr, dy_ptr, weight1_ptr, count_ptr, sums_ptr, P, T, rows,
    C: tl.constexpr, UNITS: tl.constexpr, J: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    # dW2c^T = sum_p gelu(<W1c, F_p>) dy_p
    j = tl.program_id(0) * BLOCK_J
    begin, end = _segment(count_ptr, P, T, SEGMENT)
    dw2 = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    dw2 = add_gelu_products(
        dw2, weight1_ptr, j, features_ptr, dy_ptr, begin, end, rows, WIDTH, BLOCK_C, PRECISION, BLOCK_J, BLOCK_P
    )  # fmt: skip
    # as W2 lies, so that nothing is transposed after the sum over segments
    offs_c, offs_j = tl.arange(0, BLOCK_C), j + tl.arange(0, BLOCK_J)
    sums_ptr += tl.program_id(1).to(tl.int64) * C * UNITS
    keep = (offs_c < C)[:, None] & (offs_j < UNITS)[None, :]
    tl.store(sums_ptr + offs_c[:, None] * UNITS + offs_j[None, :], tl.trans(dw2), mask=keep)


@triton.jit(do_not_specialize=["P", "T", "rows"])
def _point_weight1_bwd_kernel(
    features_ptr, dy_ptr, weight1_ptr, weight2_ptr, count_ptr, sums_ptr, P, T, rows,
    J: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    # dW1c = sum_p dx_p F_p,  dx_p = <W2c^T, dy_p> gelu'(<W1c, F_p>)
    j = tl.program_id(0) * BLOCK_J
    begin, end = _segment(count_ptr, P, T, SEGMENT)
    w1 = load_tile(weight1_ptr, j, BLOCK_J, WIDTH)
    w2 = load_tile(weight2_ptr, j, BLOCK_J, BLOCK_C)
    dw1 = tl.zeros([BLOCK_J, WIDTH], tl.float32)
    dx = tl.zeros([BLOCK_J, BLOCK_P], tl.float32)
    x = tl.zeros([BLOCK_J, BLOCK_P], tl.float32)
    dh = tl.zeros([BLOCK_J, BLOCK_P], tl.float32)
    # skewed by two blocks, so that the matrix units have the sum of one while the slopes of the next are computed
    for p in tl.range(begin - 2 * BLOCK_P, end, BLOCK_P):
        f = load_tile(features_ptr, tl.maximum(p, begin), BLOCK_P, WIDTH)
        dw1 = tl.dot(dx.to(f.dtype), f, dw1, input_precision=PRECISION)
        dx = dh * gelu_slope(x, PRECISION)
        ahead = tl.minimum(p + 2 * BLOCK_P, rows - BLOCK_P)
        x = products(w1, weight1_ptr, j, features_ptr, ahead, BLOCK_J, BLOCK_P, WIDTH, PRECISION)
        dh = products(w2, weight2_ptr, j, dy_ptr, ahead, BLOCK_J, BLOCK_P, BLOCK_C, PRECISION)
    store_tile(sums_ptr, tl.program_id(1) * J + j, WIDTH, None, dw1)


@triton.jit
def _segment(count_ptr, P, T, SEGMENT: tl.constexpr):
    """The rows of this program's segment, to the last point of its last item that counts."""
    begin = tl.program_id(1) * SEGMENT
    end = tl.minimum(begin + SEGMENT, P)
    if count_ptr is not None:
        item = (end - 1) // T
        count = tl.maximum(tl.load(count_ptr + item), 0).to(tl.int32)
        end = tl.maximum(begin, tl.minimum(end, item * T + count))
    return begin, end
