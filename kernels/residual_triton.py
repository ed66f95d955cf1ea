"""Triton form of `residual_norm`. A tile holds whole rows, and a row's numbers depend on that row alone.

    forward     new = x + keep * scale * (y + bias),  r = 1 / sqrt(mean(new^2) + eps),  normed = new * r * gain
    backward    unit = new * r,  h = dnormed * gain
                dx = dnew + dcopy + (h - unit * mean(h * unit)) * r,  dy = keep * scale * dx
                dgain = sum over rows of dnormed * unit,  dbias = sum over rows of dy

The mask `keep` comes from its counters in both passes and is never stored. A program of the backward takes SEGMENT rows
and leaves their part of dgain and dbias; `kernels.reduce` adds the parts.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.dispatch import cdiv, next_power_of_2
from kernels.philox_tile import dropout_rows, kernel_draws

# widest row of the class -> (rows of a tile, warps), in both passes: eight elements a thread, one call of Philox, or
# where that was measured to be faster 16
LAUNCHES = {128: (8, 4), 256: (2, 1), 512: (4, 8), 1024: (2, 8)}
WIDEST = max(LAUNCHES)
# rows of a program of the backward, which loads STAGES - 1 tiles ahead
SEGMENT, STAGES = 8, 3


def residual_norm_forward(x_BTC, y_BTC, gain_C, bias_C, dropout, dtype, copy, eps):
    """Return new_BTC, normed_BTC and copy_BTC, and the inverse roots r_BT; empty where not asked for."""
    B, T, C = x_BTC.shape
    rate, seed, place, step_1, scene_B = dropout
    new_BTC = x_BTC.new_empty(0 if y_BTC is None else (B, T, C))
    normed_BTC, copy_BTC = (
        x_BTC.new_empty((B, T, C) if asked else 0, dtype=dtype) for asked in (gain_C is not None, copy)
    )
    r_BT = x_BTC.new_empty(0 if gain_C is None else (B, T))
    options = _tile(C)
    _residual_norm_fwd_kernel[(cdiv(B * T, options["ROWS"]),)](
        x_BTC, _dense(y_BTC), _dense(bias_C), _dense(gain_C), step_1, _dense(scene_B),
        *(tensor if tensor.numel() else None for tensor in (new_BTC, normed_BTC, copy_BTC, r_BT)),
        x_BTC.stride(), B * T, T, *kernel_draws(rate, seed, place), eps, C=C, **options,
    )  # fmt: skip
    return new_BTC, normed_BTC, copy_BTC, r_BT


def residual_norm_backward(
    dnew_BTC, dnormed_BTC, dcopy_BTC, new_BTC, r_BT, gain_C, dropout, y_dtype, dgain_SC, dbias_SC
):
    """Return dx_BTC and dy_BTC (empty without a y).

    The partial sums of the gradients of gain and bias go to contiguous tensors [`segments`, C]; None: not asked for.
    """
    B, T, C = new_BTC.shape
    rate, seed, place, step_1, scene_B = dropout
    dx_BTC = new_BTC.new_empty(B, T, C)
    dy_BTC = new_BTC.new_empty(0) if y_dtype is None else new_BTC.new_empty(B, T, C, dtype=y_dtype)
    norm = (None, None, None) if dnormed_BTC is None else (new_BTC, r_BT, _dense(gain_C))
    _residual_norm_bwd_kernel[(segments(B * T),)](
        _dense(dnew_BTC), _dense(dcopy_BTC), _dense(dnormed_BTC), *norm, step_1, _dense(scene_B),
        dx_BTC, dy_BTC if y_dtype is not None else None, dgain_SC, dbias_SC,
        new_BTC.stride(), B * T, T, *kernel_draws(rate, seed, place), C=C, SEGMENT=SEGMENT, STAGES=STAGES, **_tile(C),
    )  # fmt: skip
    return dx_BTC, dy_BTC


def segments(rows: int) -> int:
    """How many partial sums the backward leaves per channel."""
    return -(-rows // SEGMENT)


def _tile(C: int) -> dict[str, Any]:
    rows, warps = next(launch for widest, launch in LAUNCHES.items() if widest >= C)
    return {"ROWS": rows, "BLOCK_C": max(8, next_power_of_2(C)), "num_warps": warps}


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit
def _locate(row, rows, T, stride, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Items and rows in them, offsets into a dense and into a strided [B, T, C]."""
    row = tl.minimum(row, rows - 1)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    dense = row.to(tl.int64)[:, None] * C + offs_c[None, :]
    strided = (b * stride[0] + t * stride[1])[:, None] + (offs_c * stride[2])[None, :]
    return b, t, dense, strided


@triton.jit(do_not_specialize=["rows", "T", "seed_low", "seed_high", "place", "threshold"])
def _residual_norm_fwd_kernel(
    x_ptr, y_ptr, bias_ptr, gain_ptr, step_ptr, scene_ptr, new_ptr, normed_ptr, copy_ptr, r_ptr, stride_x, rows, T,
    seed_low, seed_high, place, threshold, scale, eps, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_c = tl.arange(0, BLOCK_C)
    in_C = offs_c < C
    mask = (row < rows)[:, None] & in_C[None, :]
    b, t, dense, strided = _locate(row, rows, T, stride_x, C, BLOCK_C)
    new = tl.load(x_ptr + strided, mask=mask, other=0.0)
    if y_ptr is not None:
        # new = x + keep * scale * (y + bias)
        y = tl.load(y_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_c, mask=in_C, other=0.0).to(tl.float32)[None, :]
        if scene_ptr is not None:
            keep = dropout_rows(step_ptr, scene_ptr, seed_low, seed_high, place, threshold, b, t, C, BLOCK_C)
            y = tl.where(keep, y * scale, 0.0)
        new += y
        tl.store(new_ptr + dense, new, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + dense, new.to(copy_ptr.dtype.element_ty), mask=mask)
    if gain_ptr is not None:
        # normed = new / sqrt(mean(new^2) + eps) * gain
        r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(new * new, 1) / C + eps))
        gain = tl.load(gain_ptr + offs_c, mask=in_C, other=0.0).to(tl.float32)
        normed = new * r[:, None] * gain[None, :]
        tl.store(r_ptr + row, r, mask=row < rows)
        tl.store(normed_ptr + dense, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "T", "seed_low", "seed_high", "place", "threshold"])
def _residual_norm_bwd_kernel(
    dnew_ptr, dcopy_ptr, dnormed_ptr, new_ptr, r_ptr, gain_ptr, step_ptr, scene_ptr, dx_ptr, dy_ptr,
    dgain_ptr, dbias_ptr, stride_new, rows, T, seed_low, seed_high, place, threshold, scale,
    C: tl.constexpr, SEGMENT: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    in_C = offs_c < C
    # the rows of a tile stay apart until the end: only then do threads have to meet
    dgain = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + offs_c, mask=in_C, other=0.0).to(tl.float32)
    for start in tl.range(0, SEGMENT, ROWS, num_stages=STAGES):
        row = segment * SEGMENT + start + tl.arange(0, ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_C[None, :]
        b, t, dense, strided = _locate(row, rows, T, stride_new, C, BLOCK_C)
        # dx = dnew + dcopy + (h - unit * mean(h * unit)) * r
        dx = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if dnew_ptr is not None:
            dx += tl.load(dnew_ptr + dense, mask=mask, other=0.0)
        if dcopy_ptr is not None:
            dx += tl.load(dcopy_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        if dnormed_ptr is not None:
            r = tl.load(r_ptr + row, mask=in_rows, other=0.0)[:, None]
            unit = tl.load(new_ptr + strided, mask=mask, other=0.0) * r
            dnormed = tl.load(dnormed_ptr + dense, mask=mask, other=0.0).to(tl.float32)
            h = dnormed * gain[None, :]
            dx += (h - unit * (tl.sum(h * unit, 1) / C)[:, None]) * r
            dgain += dnormed * unit
        tl.store(dx_ptr + dense, dx, mask=mask)
        if dy_ptr is not None:
            # dy = keep * scale * dx
            if scene_ptr is not None:
                keep = dropout_rows(step_ptr, scene_ptr, seed_low, seed_high, place, threshold, b, t, C, BLOCK_C)
                dx = tl.where(keep, dx * scale, 0.0)
            tl.store(dy_ptr + dense, dx.to(dy_ptr.dtype.element_ty), mask=mask)
            if dbias_ptr is not None:
                dbias += dx
    if dgain_ptr is not None:
        tl.store(dgain_ptr + segment * C + offs_c, tl.sum(dgain, 0), mask=in_C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + segment * C + offs_c, tl.sum(dbias, 0), mask=in_C)
