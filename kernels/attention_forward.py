"""Triton forward of `gqa_attention`: inverse norms of q and k in one launch, then one program per block of queries.

Neither q nor k is normalised; the logits are scaled. With raw products s, tau = exp(log_scale), c = tau log2(e):

    x = s rk_j (rq_i c) + mb_j,   mb = 0 where a key counts, else -inf
    static    p = exp2( x ),  l = sum_j p,  o = sum_j p v / l,  lse = log2 l
    online    p = exp2( x - m ) with the running maximum m of the row,  lse = m + log2 l
    a row without keys: o = 0, and lse = +inf, which makes its weights 0 in the backward

|x| <= c is a static bound: to tau = 60 all weights and sums are normal numbers of float32 and bfloat16 (to tau = 9.7 of
float16; at 10 the smallest weights lose a bit), so that nothing is subtracted and nothing rescaled.

Keys are added in chunks of CHUNK: each chunk from zero, then the chunks in ascending order. With `split` the chunks of
a block of queries are shared out to several programs and a second launch adds them in the same order: the same bits.
"""

import torch
import triton
import triton.language as tl

from kernels.attention_tile import (
    INF,
    LOG2E,
    NORM_EPS,
    count_of,
    launch_options,
    load_rows,
    load_vector,
    locate,
    store_rows,
    strides,
    valid_keys,
)
from kernels.dispatch import cdiv

CHUNK = 512
NORM_ROWS = 64


def attention_forward(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS, softmax, precision, split):
    """Return o_BHTD, log2 of the softmax sums [B, H, T], and the inverse norms of q and k."""
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    o_BHTD = torch.empty_like(q_BHTD)
    lse_BHT, rq_BHT = (q_BHTD.new_empty(B, H, T, dtype=torch.float32) for _ in range(2))
    rk_BGS = k_BGSD.new_empty(B, G, S, dtype=torch.float32)
    programs_q, programs_k = B * H * cdiv(T, NORM_ROWS), B * G * cdiv(S, NORM_ROWS)
    _attention_norms_kernel[(programs_q + programs_k,)](
        q_BHTD, k_BGSD, rq_BHT, rk_BGS, key_count_B, key_mask_BS, strides(q_BHTD), strides(k_BGSD),
        T, S, programs_q, H=H, G=G, D=D, ROWS=NORM_ROWS, num_warps=4,
    )  # fmt: skip

    options = launch_options("forward", q_BHTD, precision)
    blocks, chunks = B * H * cdiv(T, options["BLOCK_T"]), cdiv(S, CHUNK)
    split = min(split, chunks)
    settings = {"H": H, "D": D, "CHUNK": CHUNK, "ONLINE": softmax == "online"}
    partial = [None] * 3
    if split > 1:
        partial = [q_BHTD.new_empty(B, H, chunks, T, width, dtype=torch.float32) for width in (D, 1, 1)]
    _attention_fwd_kernel[(blocks, split)](
        q_BHTD, k_BGSD, v_BGSD, log_scale_H, rq_BHT, rk_BGS, key_count_B, key_mask_BS, o_BHTD, lse_BHT, *partial,
        strides(q_BHTD), strides(k_BGSD), strides(v_BGSD), strides(o_BHTD), T, S, cdiv(chunks, split),
        **settings, R=H // G, SPLIT=split > 1, PRECISION=precision, **options,
    )  # fmt: skip
    if split > 1:
        _attention_sum_kernel[(blocks,)](
            *partial, key_count_B, o_BHTD, lse_BHT, strides(o_BHTD), T, S,
            **settings, BLOCK_T=options["BLOCK_T"], num_warps=4,
        )  # fmt: skip
    return o_BHTD, lse_BHT, rq_BHT, rk_BGS


@triton.jit
def _inverse_norms(x_ptr, r_ptr, stride, b, h, start, length, keep, heads, ROWS: tl.constexpr, D: tl.constexpr):
    x = load_rows(x_ptr + b * stride[0] + h * stride[1], stride[2], start, keep, ROWS, D).to(tl.float32)
    r = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), NORM_EPS))
    offs = start + tl.arange(0, ROWS)
    tl.store(r_ptr + (b * heads + h) * length + offs, r, mask=offs < length)


@triton.jit(do_not_specialize=["T", "S", "programs_q"])
def _attention_norms_kernel(
    q_ptr, k_ptr, rq_ptr, rk_ptr, key_count_ptr, key_mask_ptr, stride_q, stride_k,
    T, S, programs_q, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # rq = 1 / max(|q|, eps), rk = 1 / max(|k|, eps)
    pid = tl.program_id(0)
    if pid < programs_q:
        b, h, start = locate(pid, T, H, ROWS)
        _inverse_norms(q_ptr, rq_ptr, stride_q, b, h, start, T, start + tl.arange(0, ROWS) < T, H, ROWS, D)
    else:
        b, g, start = locate(pid - programs_q, S, G, ROWS)
        valid = valid_keys(key_mask_ptr, b, S, count_of(key_count_ptr, b, S), start, ROWS)
        _inverse_norms(k_ptr, rk_ptr, stride_k, b, g, start, S, valid, G, ROWS, D)


@triton.jit(do_not_specialize=["T", "S", "chunks_each"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, log_scale_ptr, rq_ptr, rk_ptr, key_count_ptr, key_mask_ptr, o_ptr, lse_ptr,
    partial_o_ptr, partial_l_ptr, partial_m_ptr, stride_q, stride_k, stride_v, stride_o, T, S, chunks_each,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ONLINE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    b, h, t = locate(tl.program_id(0), T, H, BLOCK_T)
    g = h // R
    offs_t = t + tl.arange(0, BLOCK_T)
    in_T = offs_t < T
    row = (b * H + h) * T + offs_t
    q = load_rows(q_ptr + b * stride_q[0] + h * stride_q[1], stride_q[2], t, in_T, BLOCK_T, D)
    tau = tl.exp(tl.load(log_scale_ptr + h).to(tl.float32))
    scale = tl.load(rq_ptr + row, mask=in_T, other=0.0) * (tau * LOG2E)

    k_ptr += b * stride_k[0] + g * stride_k[1]
    v_ptr += b * stride_v[0] + g * stride_v[1]
    rk_ptr += (b * (H // R) + g) * S
    partial = ((b * H + h) * tl.cdiv(S, CHUNK)) * T + t
    count = count_of(key_count_ptr, b, S)
    # this program's chunks; all of them unless the keys are split
    begin = tl.program_id(1) * chunks_each * CHUNK
    end = tl.minimum(begin + chunks_each * CHUNK, count)
    full = end // BLOCK_S * BLOCK_S
    none = _no_keys(BLOCK_T, D)
    o_total, l_total, m_total = none
    o, l, m = none
    for s in tl.range(begin, full, BLOCK_S):
        o, l, m = _attend(
            q, scale, o, l, m, k_ptr, v_ptr, rk_ptr, key_mask_ptr, stride_k[2], stride_v[2], b, S, count, s,
            key_mask_ptr is not None, ONLINE, PRECISION, BLOCK_S, D,
        )  # fmt: skip
        done = (s + BLOCK_S) % CHUNK == 0
        if SPLIT:
            if done:
                line = partial + s // CHUNK * T
                _store_chunk(partial_o_ptr, partial_l_ptr, partial_m_ptr, line, in_T, o, l, m, BLOCK_T, D)
                o, l, m = none
        else:
            # both outcomes are there before the `if`, so it becomes a choice: across a branch, each instruction of a
            # product waits for the one before
            total = _add_chunk(o_total, l_total, m_total, o, l, m, ONLINE)
            if done:
                o_total, l_total, m_total = total
                o, l, m = none
    for s in tl.range(tl.maximum(begin, full), end, BLOCK_S, num_stages=1):
        o, l, m = _attend(
            q, scale, o, l, m, k_ptr, v_ptr, rk_ptr, key_mask_ptr, stride_k[2], stride_v[2], b, S, count, s,
            True, ONLINE, PRECISION, BLOCK_S, D,
        )  # fmt: skip
    # the item's last chunk, where it is a shorter one
    if SPLIT:
        if (begin < end) & (end % CHUNK > 0):
            line = partial + end // CHUNK * T
            _store_chunk(partial_o_ptr, partial_l_ptr, partial_m_ptr, line, in_T, o, l, m, BLOCK_T, D)
    else:
        o_total, l_total, m_total = _add_chunk(o_total, l_total, m_total, o, l, m, ONLINE)
        o_ptr += b * stride_o[0] + h * stride_o[1]
        _finish(o_ptr, lse_ptr + row, stride_o[2], t, in_T, o_total, l_total, m_total, ONLINE, BLOCK_T, D)


@triton.jit
def _attend(
    q, scale, o, l, m, k_ptr, v_ptr, rk_ptr, key_mask_ptr, stride_k, stride_v, b, S, count, s,
    MASKED: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the sums of a chunk. Only where MASKED may a key of the tile not count."""
    valid = valid_keys(key_mask_ptr, b, S, count, s, BLOCK_S) if MASKED else None
    k = load_rows(k_ptr, stride_k, s, valid, BLOCK_S, D)
    v = load_rows(v_ptr, stride_v, s, valid, BLOCK_S, D)
    rk = load_vector(rk_ptr + s + tl.arange(0, BLOCK_S), valid)
    # x = s rk rq c + mb,  p = exp2( x )
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * rk[None, :] * scale[:, None]
    if MASKED:
        x = tl.where(valid[None, :], x, -INF)
    if ONLINE:
        if not MASKED:
            # a choice that is never taken: else product and difference become one fma, in which the largest x is not
            # the rounded one that m is, and the largest p far from 1 where x is large
            x = tl.where((s + tl.arange(0, BLOCK_S) < count)[None, :], x, -INF)
        m_new = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(m_new > -INF, m_new, 0.0)
        fade = tl.exp2(m - shift)
        l *= fade
        o *= fade[:, None]
        m = m_new
        x -= shift[:, None]
    p = tl.exp2(x)
    # l = sum_j p,  o = sum_j p v
    l += tl.sum(p, 1)
    return tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION), l, m


@triton.jit
def _no_keys(BLOCK_T: tl.constexpr, D: tl.constexpr):
    """Sums o, l and maximum m of no keys."""
    return (
        # hidden from the compiler: for sm_100, Triton (3.6 to 3.9) turns a choice between a product's sum and a
        # constant 0 into "start from 0" of the next product, also where the loop ends and no such product follows
        tl.zeros([BLOCK_T, D], tl.int32).to(tl.float32, bitcast=True),
        tl.zeros([BLOCK_T], tl.float32),
        tl.full([BLOCK_T], -INF, tl.float32),
    )


@triton.jit
def _store_chunk(o_ptr, l_ptr, m_ptr, line, in_T, o, l, m, BLOCK_T: tl.constexpr, D: tl.constexpr):
    offs = line + tl.arange(0, BLOCK_T)
    store_rows(o_ptr, D, line, in_T, o, BLOCK_T, D)
    tl.store(l_ptr + offs, l, mask=in_T)
    tl.store(m_ptr + offs, m, mask=in_T)


@triton.jit(do_not_specialize=["T", "S"])
def _attention_sum_kernel(
    partial_o_ptr, partial_l_ptr, partial_m_ptr, key_count_ptr, o_ptr, lse_ptr, stride_o, T, S,
    H: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, ONLINE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    b, h, t = locate(tl.program_id(0), T, H, BLOCK_T)
    offs_t = t + tl.arange(0, BLOCK_T)
    in_T = offs_t < T
    o_total, l_total, m_total = _no_keys(BLOCK_T, D)
    for chunk in tl.range(0, tl.cdiv(count_of(key_count_ptr, b, S), CHUNK)):
        line = ((b * H + h) * tl.cdiv(S, CHUNK) + chunk) * T
        o = load_rows(partial_o_ptr, D, line + t, in_T, BLOCK_T, D)
        l = tl.load(partial_l_ptr + line + offs_t, mask=in_T, other=0.0)
        m = tl.load(partial_m_ptr + line + offs_t, mask=in_T, other=0.0)
        o_total, l_total, m_total = _add_chunk(o_total, l_total, m_total, o, l, m, ONLINE)
    o_ptr += b * stride_o[0] + h * stride_o[1]
    lse_ptr += (b * H + h) * T + offs_t
    _finish(o_ptr, lse_ptr, stride_o[2], t, in_T, o_total, l_total, m_total, ONLINE, BLOCK_T, D)


@triton.jit
def _add_chunk(o_total, l_total, m_total, o, l, m, ONLINE: tl.constexpr):
    """Add a chunk to the sums of the chunks before it."""
    if ONLINE:
        m_new = tl.maximum(m_total, m)
        shift = tl.where(m_new > -INF, m_new, 0.0)
        fade, scale = tl.exp2(m_total - shift), tl.exp2(m - shift)
        # spelled out as fma: the compiler may not choose in one kernel what it did not choose in another
        o_total = tl.fma(o_total, tl.broadcast_to(fade[:, None], o.shape), o * scale[:, None])
        l_total = tl.fma(l_total, fade, l * scale)
        m_total = m_new
    else:
        o_total += o
        l_total += l
    return o_total, l_total, m_total


@triton.jit
def _finish(
    o_ptr, lse_ptr, stride, t, in_T, o, l, m, ONLINE: tl.constexpr, BLOCK_T: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Store o / l and the logarithm of the sum; 0 and +inf for rows without keys."""
    some = l > 0
    l = tl.where(some, l, 1.0)
    lse = tl.log2(l)
    if ONLINE:
        lse += m
    store_rows(o_ptr, stride, t, in_T, o * tl.where(some, 1.0 / l, 0.0)[:, None], BLOCK_T, D)
    tl.store(lse_ptr, tl.where(some, lse, INF), mask=in_T)
