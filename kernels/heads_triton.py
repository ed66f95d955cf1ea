"""Triton form of `segment_heads`. A tile holds whole rows, and a row's numbers depend on that row alone.

    forward     r_j = <w_j, x> + b_j for the UNITS of both layers, j = 0 .. 6 and the confidence's, and what is made
                of them: m = r_0..2, d = r_3..5, z = r_6
    backward    u = d / n,  n = max(|d|, 1e-12):  dr = [dmid | (ddir - u <u, ddir>) / n | dlen sigmoid(z) / 10 | dconf]
                dx = sum over j of dr_j w_j,  dw_j = sum over rows of dr_j x,  db_j = sum over rows of dr_j
                doffset = sum over items of dmid

Where |d| < 1e-12, n is a constant and dd = ddir / n. A program of the backward takes SEGMENT rows and leaves their part
of all dw_j and db_j; `kernels.reduce` adds the parts. More programs of the same launch add up the offsets' gradient.
"""

import torch
import triton
import triton.language as tl

from kernels.dispatch import cdiv
from kernels.log1p_tile import softplus
from kernels.reduce import rounded, sum_segments

UNITS = 8
# widest row of the class -> rows of a forward tile, by one warp: no sum over channels waits for another warp
ROWS = {128: 8, 256: 4, 512: 2, 1024: 1}
WIDEST = max(ROWS)
# rows of a program of the backward; a warp to 128 channels: no sum over rows waits for another warp
SEGMENT = 8
# items and numbers of a tile of the offsets' gradient
ITEMS, NUMBERS = 32, 64


def segment_heads_forward(x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23, outputs) -> None:
    """Fill the outputs mid_BN3, dir_BN3, len_BN, conf_BN and raw_BN4."""
    B, N, C = x_BNC.shape
    inputs = (x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23)
    rows = next(rows for widest, rows in ROWS.items() if widest >= C)
    _segment_heads_fwd_kernel[(cdiv(B * N, rows),)](
        *(tensor.contiguous() for tensor in inputs), *outputs, B * N, N,
        C=C, ROWS=rows, BLOCK_C=_block(C), num_warps=1,
    )  # fmt: skip


def segment_heads_backward(upstream, raw_BN4, x_BNC, weight_7C, conf_weight_1C, dx_BNC, doffsets_N23) -> torch.Tensor:
    """Fill the gradients of x and the offsets; return those of the layers: UNITS rows of weights, then the biases."""
    B, N, C = x_BNC.shape
    segments = cdiv(B * N, SEGMENT)
    partials_SX = raw_BN4.new_empty(segments, UNITS * (C + 1))
    inputs = (*upstream, raw_BN4, x_BNC, weight_7C, conf_weight_1C)
    _segment_heads_bwd_kernel[(segments + cdiv(doffsets_N23.numel(), NUMBERS),)](
        *(tensor.contiguous() for tensor in inputs), dx_BNC, partials_SX, doffsets_N23, B, N,
        C=C, SEGMENT=SEGMENT, BLOCK_C=_block(C), ITEMS=ITEMS, NUMBERS=NUMBERS, num_warps=max(1, _block(C) // 128),
    )  # fmt: skip
    return sum_segments(partials_SX)


def _block(C: int) -> int:
    return 1 << max(3, (C - 1).bit_length())


@triton.jit(do_not_specialize=["rows", "N"])
def _segment_heads_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, conf_weight_ptr, conf_bias_ptr, offsets_ptr, mid_ptr, dir_ptr, len_ptr, conf_ptr,
    raw_ptr, rows, N, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    x, _, _ = _load_rows(x_ptr, row, in_rows, C, BLOCK_C)
    for axis in tl.static_range(3):
        # mid = m + offset
        offset = tl.load(offsets_ptr + row % N * 6 + axis, mask=in_rows, other=0.0).to(tl.float32)
        tl.store(mid_ptr + row * 3 + axis, _unit(x, weight_ptr, bias_ptr, axis, C, BLOCK_C) + offset, mask=in_rows)
    d0 = _unit(x, weight_ptr, bias_ptr, 3, C, BLOCK_C)
    d1 = _unit(x, weight_ptr, bias_ptr, 4, C, BLOCK_C)
    d2 = _unit(x, weight_ptr, bias_ptr, 5, C, BLOCK_C)
    z = _unit(x, weight_ptr, bias_ptr, 6, C, BLOCK_C)
    # dir = d / max(|d|, 1e-12)
    n, _ = _length(d0, d1, d2)
    for axis in tl.static_range(3):
        tl.store(dir_ptr + row * 3 + axis, tl.div_rn((d0, d1, d2)[axis], n), mask=in_rows)
    tl.store(len_ptr + row, 0.1 * _softplus(z), mask=in_rows)
    tl.store(conf_ptr + row, _unit(x, conf_weight_ptr, conf_bias_ptr, 0, C, BLOCK_C), mask=in_rows)
    for part in tl.static_range(4):
        tl.store(raw_ptr + row * 4 + part, (d0, d1, d2, z)[part], mask=in_rows)


@triton.jit(do_not_specialize=["B", "N"])
def _segment_heads_bwd_kernel(
    dmid_ptr, ddir_ptr, dlen_ptr, dconf_ptr, raw_ptr, x_ptr, weight_ptr, conf_weight_ptr, dx_ptr, partials_ptr,
    doffsets_ptr, B, N, C: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr, ITEMS: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    segments = tl.cdiv(B * N, SEGMENT)
    if segment < segments:
        row = segment.to(tl.int64) * SEGMENT + tl.arange(0, SEGMENT)
        in_rows = row < B * N
        dr = _units_bwd(dmid_ptr, ddir_ptr, dlen_ptr, dconf_ptr, raw_ptr, row, in_rows)
        x, offs, mask = _load_rows(x_ptr, row, in_rows, C, BLOCK_C)
        offs_c = tl.arange(0, BLOCK_C)
        partials_ptr += segment.to(tl.int64) * (8 * C + 8)
        dx = tl.zeros([SEGMENT, BLOCK_C], tl.float32)
        for j in tl.static_range(8):
            w_ptr = weight_ptr + j * C if j < 7 else conf_weight_ptr
            dx += dr[j][:, None] * tl.load(w_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
            tl.store(partials_ptr + j * C + offs_c, tl.sum(dr[j][:, None] * x, 0), mask=offs_c < C)
            tl.store(partials_ptr + 8 * C + j, tl.sum(rounded(dr[j]), 0))
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        _offsets_bwd(dmid_ptr, doffsets_ptr, (segment - segments) * NUMBERS, B, N, ITEMS, NUMBERS)


@triton.jit
def _load_rows(x_ptr, row, in_rows, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of a dense [rows, C] in float32, where they are and which elements are inside."""
    offs_c = tl.arange(0, BLOCK_C)
    offs, mask = row[:, None] * C + offs_c[None, :], in_rows[:, None] & (offs_c < C)[None, :]
    return tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32), offs, mask


@triton.jit
def _unit(x, weight_ptr, bias_ptr, unit: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """One unit of a layer, for every row of x."""
    offs_c = tl.arange(0, BLOCK_C)
    w = tl.load(weight_ptr + unit * C + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    return tl.sum(x * w[None, :], 1) + tl.load(bias_ptr + unit).to(tl.float32)


@triton.jit
def _length(d0, d1, d2):
    """max(|d|, 1e-12), NaN where d has one, and where it is the constant."""
    n = tl.sqrt_rn(d0 * d0 + d1 * d1 + d2 * d2)
    short = n < 1e-12
    return tl.where(short, 1e-12, n), short


@triton.jit
def _softplus(z):
    """log(1 + exp(z))."""
    return softplus(z, _exp_of_minus(tl.abs(z)))


@triton.jit
def _sigmoid(z):
    t = _exp_of_minus(tl.abs(z))
    return tl.div_rn(tl.where(z < 0, t, 1.0), 1.0 + t)


@triton.jit
def _exp_of_minus(a):
    """exp(-a) for a >= 0 without the multiples of log 2 in a: a large a log2(e) has no digits left for the rest."""
    a = tl.where(a > 128.0, 128.0, a)
    k = tl.floor(a * 1.4426950408889634 + 0.5)
    # log 2 in two parts; the products with the first, of ten bits, are exact
    rest = a - k * 0.693359375 + k * 2.1219444005469057e-04
    return tl.exp2(-k) * tl.exp2(rest * -1.4426950408889634)


@triton.jit
def _units_bwd(dmid_ptr, ddir_ptr, dlen_ptr, dconf_ptr, raw_ptr, row, in_rows):
    """The gradients of the eight units of rows."""
    d0 = tl.load(raw_ptr + row * 4, mask=in_rows, other=0.0)
    d1 = tl.load(raw_ptr + row * 4 + 1, mask=in_rows, other=0.0)
    d2 = tl.load(raw_ptr + row * 4 + 2, mask=in_rows, other=0.0)
    z = tl.load(raw_ptr + row * 4 + 3, mask=in_rows, other=0.0)
    g0 = tl.load(ddir_ptr + row * 3, mask=in_rows, other=0.0)
    g1 = tl.load(ddir_ptr + row * 3 + 1, mask=in_rows, other=0.0)
    g2 = tl.load(ddir_ptr + row * 3 + 2, mask=in_rows, other=0.0)
    # dd = (ddir - u <u, ddir>) / n
    n, short = _length(d0, d1, d2)
    r = tl.div_rn(1.0, n)
    u0, u1, u2 = d0 * r, d1 * r, d2 * r
    along = tl.where(short, 0.0, u0 * g0 + u1 * g1 + u2 * g2)
    return (
        tl.load(dmid_ptr + row * 3, mask=in_rows, other=0.0),
        tl.load(dmid_ptr + row * 3 + 1, mask=in_rows, other=0.0),
        tl.load(dmid_ptr + row * 3 + 2, mask=in_rows, other=0.0),
        (g0 - u0 * along) * r,
        (g1 - u1 * along) * r,
        (g2 - u2 * along) * r,
        0.1 * tl.load(dlen_ptr + row, mask=in_rows, other=0.0) * _sigmoid(z),
        tl.load(dconf_ptr + row, mask=in_rows, other=0.0),
    )


@triton.jit
def _offsets_bwd(dmid_ptr, doffsets_ptr, start, B, N, ITEMS: tl.constexpr, NUMBERS: tl.constexpr):
    """NUMBERS of the [N, 2, 3] gradient: sums over the items, 0 in the second half."""
    number = start + tl.arange(0, NUMBERS)
    inside, part = number < N * 6, number % 6
    lanes = tl.zeros([ITEMS, NUMBERS], tl.float32)
    for first in tl.range(0, B, ITEMS):
        item = (first + tl.arange(0, ITEMS)).to(tl.int64)
        keep = (item < B)[:, None] & (inside & (part < 3))[None, :]
        lanes += tl.load(dmid_ptr + item[:, None] * (N * 3) + (number // 6 * 3 + part)[None, :], mask=keep, other=0.0)
    tl.store(doffsets_ptr + number, tl.sum(lanes, 0), mask=inside)
