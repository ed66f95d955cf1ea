"""Triton backward of `gqa_attention` in two passes, without atomics or workspace.

    p = exp2( x - lse_i ) <= 1, x as in the forward,   ds = p (dp - delta_i),   dp = <do_i, v_j>,   delta = <do, o>

    dq    one program per block of queries:  dqh = tau sum_j ds rk_j k_j,  dot = <rq q, dqh>
              dq = rq (dqh - rq q dot),  d log_scale = sum over items and queries of dot, by `kernels.reduce`
    dkv   one program per block of keys of a kv head; heads of the group and queries in ascending order:
              B_j = sum_hi ds (rq_i tau) q_i,  dk = rk (B - rk k <rk k, B>),  dv = sum_hi p do

A q or k shorter than eps is divided by a constant: its projection term falls away.
"""

import torch
import triton
import triton.language as tl

from kernels.attention_tile import (
    INF,
    LOG2E,
    SHORT,
    count_of,
    finite,
    launch_options,
    load_rows,
    load_vector,
    locate,
    store_rows,
    strides,
    valid_keys,
)
from kernels.dispatch import cdiv
from kernels.reduce import rounded


def attention_backward(
    do_BHTD, q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS, o_BHTD, lse_BHT, rq_BHT, rk_BGS, precision,
    dlog_scale_SH, into=None,
):  # fmt: skip
    """Return the gradients of q, k and v, those of k and v in the tensors `into`, where given.

    The partial sums of the gradient of log_scale go to the contiguous float32 tensor [`segments`, H].
    """
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    dq_BHTD = torch.empty_like(q_BHTD)
    dk_BGSD, dv_BGSD = into or (torch.empty_like(k_BGSD), torch.empty_like(v_BGSD))
    delta_BHT, scale_BHT = torch.empty_like(lse_BHT), torch.empty_like(lse_BHT)
    settings = {"H": H, "R": H // G, "D": D, "PRECISION": precision}
    rows = [strides(x) for x in (q_BHTD, k_BGSD, v_BGSD, do_BHTD)]

    options = launch_options("dq", q_BHTD, precision)
    _attention_dq_kernel[(H * len(dlog_scale_SH),)](
        q_BHTD, k_BGSD, v_BGSD, do_BHTD, log_scale_H, rq_BHT, rk_BGS, lse_BHT, key_count_B, key_mask_BS,
        o_BHTD, dq_BHTD, delta_BHT, scale_BHT, dlog_scale_SH, *rows, strides(o_BHTD), strides(dq_BHTD), T, S,
        **settings, **options,
    )  # fmt: skip

    options = launch_options("dkv", q_BHTD, precision)
    _attention_dkv_kernel[(B * G * cdiv(S, options["BLOCK_S"]),)](
        q_BHTD, k_BGSD, v_BGSD, do_BHTD, scale_BHT, rk_BGS, lse_BHT, delta_BHT, key_count_B, key_mask_BS,
        dk_BGSD, dv_BGSD, *rows, strides(dk_BGSD), strides(dv_BGSD), T, S,
        **settings, RAGGED_T=T % options["BLOCK_T"] > 0, **options,
    )  # fmt: skip
    return dq_BHTD, dk_BGSD, dv_BGSD


def segments(q_BHTD: torch.Tensor, precision: str) -> int:
    """How many partial sums of the gradient of log_scale the backward leaves per head: one for a block of queries."""
    return len(q_BHTD) * -(-q_BHTD.shape[2] // launch_options("dq", q_BHTD, precision)["BLOCK_T"])


@triton.jit(do_not_specialize=["T", "S"])
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_scale_ptr, rq_ptr, rk_ptr, lse_ptr, key_count_ptr, key_mask_ptr,
    o_ptr, dq_ptr, delta_ptr, scale_ptr, dlog_scale_ptr, stride_q, stride_k, stride_v, stride_do, stride_o, stride_dq,
    T, S, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, h, t = locate(tl.program_id(0), T, H, BLOCK_T)
    g = h // R
    row = (b * H + h) * T + t + tl.arange(0, BLOCK_T)
    in_T = t + tl.arange(0, BLOCK_T) < T
    q = load_rows(q_ptr + b * stride_q[0] + h * stride_q[1], stride_q[2], t, in_T, BLOCK_T, D)
    do = load_rows(do_ptr + b * stride_do[0] + h * stride_do[1], stride_do[2], t, in_T, BLOCK_T, D)
    o = load_rows(o_ptr + b * stride_o[0] + h * stride_o[1], stride_o[2], t, in_T, BLOCK_T, D)
    # delta = <do, o>
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=in_T)
    tau = tl.exp(tl.load(log_scale_ptr + h).to(tl.float32))
    rq = tl.load(rq_ptr + row, mask=in_T, other=0.0)
    lse = tl.load(lse_ptr + row, mask=in_T, other=INF)
    tl.store(scale_ptr + row, rq * tau, mask=in_T)
    scale = rq * (tau * LOG2E)

    k_ptr += b * stride_k[0] + g * stride_k[1]
    v_ptr += b * stride_v[0] + g * stride_v[1]
    rk_ptr += (b * (H // R) + g) * S
    count = count_of(key_count_ptr, b, S)
    full = count // BLOCK_S * BLOCK_S
    dqh = tl.zeros([BLOCK_T, D], tl.float32)
    for s in tl.range(0, full, BLOCK_S):
        dqh = _add_dq(
            q, do, scale, lse, delta, dqh, k_ptr, v_ptr, rk_ptr, key_mask_ptr, stride_k[2], stride_v[2], b, S, count,
            s, key_mask_ptr is not None, PRECISION, BLOCK_S, D,
        )  # fmt: skip
    for s in tl.range(full, count, BLOCK_S, num_stages=1):
        dqh = _add_dq(
            q, do, scale, lse, delta, dqh, k_ptr, v_ptr, rk_ptr, key_mask_ptr, stride_k[2], stride_v[2], b, S, count,
            s, True, PRECISION, BLOCK_S, D,
        )  # fmt: skip

    # dot = <rq q, tau dqh>,  dq = rq (tau dqh - [|q| >= eps] rq q dot)
    dqh *= tau
    unit = q.to(tl.float32) * rq[:, None]
    dot = tl.sum(rounded(unit * dqh), 1)
    block = b * tl.cdiv(T, BLOCK_T) + t // BLOCK_T
    tl.store(dlog_scale_ptr + block * H + h, tl.sum(dot, 0))
    inside = tl.where(rq < SHORT, dot, 0.0)
    dq = (dqh - unit * inside[:, None]) * rq[:, None]
    store_rows(dq_ptr + b * stride_dq[0] + h * stride_dq[1], stride_dq[2], t, in_T, dq, BLOCK_T, D)


@triton.jit
def _add_dq(
    q, do, scale, lse, delta, dqh, k_ptr, v_ptr, rk_ptr, key_mask_ptr, stride_k, stride_v, b, S, count, s,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to dqh / tau. Only where MASKED may a key of the tile not count."""
    valid = valid_keys(key_mask_ptr, b, S, count, s, BLOCK_S) if MASKED else None
    k = load_rows(k_ptr, stride_k, s, valid, BLOCK_S, D)
    v = load_rows(v_ptr, stride_v, s, valid, BLOCK_S, D)
    rk = load_vector(rk_ptr + s + tl.arange(0, BLOCK_S), valid)
    # p = exp2( s rk rq c + mb - lse ),  dp = <do, v>
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * rk[None, :] * scale[:, None] - lse[:, None]
    if MASKED:
        x = tl.where(valid[None, :], x, -INF)
        rk = tl.where(valid, rk, 0.0)
    p = tl.exp2(x)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    # dqh = tau sum_j p (dp - delta) rk k
    ds = p * (dp - delta[:, None]) * rk[None, :]
    return tl.dot(finite(ds, k.dtype), k, dqh, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S"])
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, scale_ptr, rk_ptr, lse_ptr, delta_ptr, key_count_ptr, key_mask_ptr,
    dk_ptr, dv_ptr, stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, T, S,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, RAGGED_T: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, g, s = locate(tl.program_id(0), S, H // R, BLOCK_S)
    count = count_of(key_count_ptr, b, S)
    valid = valid_keys(key_mask_ptr, b, S, count, s, BLOCK_S)
    k = load_rows(k_ptr + b * stride_k[0] + g * stride_k[1], stride_k[2], s, valid, BLOCK_S, D)
    v = load_rows(v_ptr + b * stride_v[0] + g * stride_v[1], stride_v[2], s, valid, BLOCK_S, D)
    offs_s = s + tl.arange(0, BLOCK_S)
    rk = tl.load(rk_ptr + (b * (H // R) + g) * S + offs_s, mask=valid, other=0.0)
    dk = tl.zeros([BLOCK_S, D], tl.float32)
    dv = tl.zeros([BLOCK_S, D], tl.float32)
    blocks = tl.cdiv(T, BLOCK_T)
    for i in tl.range(0, tl.where(s < count, R * blocks, 0)):
        # the head i // blocks of the group, without a division in the loop
        r = 0
        for other in tl.static_range(1, R):
            r += (i >= other * blocks).to(tl.int32)
        h = g * R + r
        t = (i - r * blocks) * BLOCK_T
        offs_t = t + tl.arange(0, BLOCK_T)
        in_T = offs_t < T if RAGGED_T else None
        row = (b * H + h) * T + offs_t
        q = load_rows(q_ptr + b * stride_q[0] + h * stride_q[1], stride_q[2], t, in_T, BLOCK_T, D)
        do = load_rows(do_ptr + b * stride_do[0] + h * stride_do[1], stride_do[2], t, in_T, BLOCK_T, D)
        lse = load_vector(lse_ptr + row, in_T)
        delta = load_vector(delta_ptr + row, in_T)
        scale = load_vector(scale_ptr + row, in_T)
        if RAGGED_T:
            lse = tl.where(in_T, lse, INF)
            delta = tl.where(in_T, delta, 0.0)
            scale = tl.where(in_T, scale, 0.0)
        # p = exp2( s rk rq c - lse ), transposed; rows of keys that do not count hold anything until the end
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * rk[:, None] * (scale * LOG2E)[None, :]
        p = tl.exp2(x - lse[None, :])
        # dv = sum_i p do,  dp = <do, v>
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        # B = sum_i p (dp - delta) rq tau q
        ds = p * (dp - delta[None, :]) * scale[None, :]
        dk = tl.dot(finite(ds, q.dtype), q, dk, input_precision=PRECISION)

    # dk = rk (B - [|k| >= eps] rk k <rk k, B>)
    unit = k.to(tl.float32) * rk[:, None]
    dot = unit * dk
    if D == 16:
        # a row lies in as many lanes as it has numbers
        dot = rounded(dot)
    inside = tl.where(rk < SHORT, tl.sum(dot, 1), 0.0)
    dk = tl.where(valid[:, None], (dk - unit * inside[:, None]) * rk[:, None], 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    in_S = offs_s < S
    store_rows(dk_ptr + b * stride_dk[0] + g * stride_dk[1], stride_dk[2], s, in_S, dk, BLOCK_S, D)
    store_rows(dv_ptr + b * stride_dv[0] + g * stride_dv[1], stride_dv[2], s, in_S, dv, BLOCK_S, D)
