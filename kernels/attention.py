"""Grouped-query attention with L2-normalised queries and keys and a learned temperature per head.

    o_i = sum_j p_ij v_j,   p_i = softmax_j( exp(log_scale) <q_i/|q_i|, k_j/|k_j|> )   over the valid keys of the item

Shapes in names: B batch, H query heads, G key/value heads (H = R G, query head h reads kv head h // R), T queries,
S keys, D head width.
"""

import math

import torch

from kernels.attention_backward import attention_backward, segments
from kernels.attention_eager import NORM_EPS, attention_eager, attention_eager_backward, compute_dtype
from kernels.attention_forward import attention_forward
from kernels.attention_tile import dense_rows, keys_to_loop_over
from kernels.dispatch import require_tensors, require_tensors_or_none, resolve, values_are_readable
from kernels.reduce import sum_segments
from kernels.registration import operator

HEAD_WIDTHS = (16, 32, 64, 128)
# exp of 62, over the shortest norm, is no number of float32
LARGEST_LOG_SCALE = 60


def gqa_attention(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    log_scale_H: torch.Tensor,
    *,
    key_count_B: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    softmax: str = "static",
    precision: str = "tf32",
    split: int = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Attend with L2-normalised queries and keys, grouped heads and a learned temperature.

        o_i = sum_j softmax_j( exp(log_scale_h) q_i.k_j / (max(|q_i|, 1e-12) max(|k_j|, 1e-12)) ) v_j

    Args:
        q_BHTD: queries; float32, bfloat16, float16, or float64 where the eager form runs. Any strides.
        k_BGSD, v_BGSD: keys and values, H a multiple of G; D is 16, 32, 64 or 128.
        log_scale_H: natural logarithm of the temperature of each query head, float32 or the dtype of q, from -60 to 60.
        key_count_B: integers in [0, S]: the first keys of an item that count. On a GPU they are clamped.
        key_mask_BS: bool, True where a key counts. At most one of count and mask; neither: every key counts.
            Keys and values that do not count may hold anything, also NaN.
        softmax: "static" bounds every logit by exp(log_scale), which may then be at most 60 (float16: 10);
            "online" keeps a running maximum and takes any. The backward makes the weights anew, from logits of size
            exp(log_scale): they err by 1e-7 exp(log_scale) of themselves, from log_scale = 16 on by all of it; so do
            the gradients of q, k and log_scale, those of v on a GPU.
        precision: of the products of float32 inputs on a GPU: "tf32" or "ieee".
        split: how many programs share the keys of one block of queries on a GPU. No influence on the result's bits.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.

    Returns:
        o_BHTD in the dtype of q; 0, with gradients 0, for an item without a valid key.

    Raises:
        ValueError: a shape, dtype, device, count, temperature or option outside of the above.

    Determinism: repeats bit for bit. Triton: an item's bits do not depend on the batch, on padding or on `split`.
    Source: Henry et al. 2020, Query-Key Normalization; Ainslie et al. 2023, GQA.
    """
    _check(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS)
    _check_options(q_BHTD, log_scale_H, softmax, precision, split)
    form = resolve(impl, q_BHTD.device)
    if form == "triton" and q_BHTD.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    if form == "eager" and q_BHTD.device.type not in ("cpu", "meta"):
        with torch.autocast(q_BHTD.device.type, enabled=False):
            return gqa_attention_reference(
                q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B=key_count_B, key_mask_BS=key_mask_BS
            )
    return _forward(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS, softmax, precision, split, form)[0]


def gqa_attention_reference(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    log_scale_H: torch.Tensor,
    *,
    key_count_B: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning of `gqa_attention`, in plain PyTorch; in float64 the truth."""
    dtype = compute_dtype(q_BHTD.dtype)
    (B, H, _, _), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    valid_BS = _valid_keys(key_count_B, key_mask_BS, S)
    if valid_BS is None:
        valid_BS = torch.ones(B, S, dtype=torch.bool, device=q_BHTD.device)
    counts_B11S, counts_B1S1 = valid_BS[:, None, None, :], valid_BS[:, None, :, None]
    k_BHSD = k_BGSD.to(dtype).masked_fill(~counts_B1S1, 0).repeat_interleave(H // G, dim=1)
    v_BHSD = v_BGSD.to(dtype).masked_fill(~counts_B1S1, 0).repeat_interleave(H // G, dim=1)
    q_BHTD, dtype_out = q_BHTD.to(dtype), q_BHTD.dtype

    unit_q_BHTD = torch.nn.functional.normalize(q_BHTD, dim=-1, eps=NORM_EPS)
    unit_k_BHSD = torch.nn.functional.normalize(k_BHSD, dim=-1, eps=NORM_EPS)
    logits_BHTS = log_scale_H.to(dtype).exp()[:, None, None] * (unit_q_BHTD @ unit_k_BHSD.transpose(-1, -2))
    logits_BHTS = logits_BHTS.masked_fill(~counts_B11S, torch.finfo(dtype).min)
    p_BHTS = logits_BHTS.softmax(dim=-1).masked_fill(~counts_B11S, 0)
    return (p_BHTS @ v_BHSD).to(dtype_out)


@operator("ridgeline::gqa_attention_forward")
def _forward(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    log_scale_H: torch.Tensor,
    key_count_B: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    softmax: str,
    precision: str,
    split: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """o_BHTD, and what the backward needs: logarithms of the softmax sums, inverse norms of queries and of keys."""
    if 0 in (q_BHTD.numel(), k_BGSD.numel()):
        o_BHTD, lse_BHT, rq_BHT, rk_BGS = _empty_outputs(q_BHTD, k_BGSD, impl)
        return o_BHTD.zero_(), lse_BHT.zero_(), rq_BHT.zero_(), rk_BGS.zero_()
    if impl == "triton":
        inputs = _kernel_inputs(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS)
        return attention_forward(*inputs, softmax, precision, split)
    valid_BS = _valid_keys(key_count_B, key_mask_BS, k_BGSD.shape[2])
    return attention_eager(q_BHTD, k_BGSD, v_BGSD, log_scale_H, valid_BS)


@_forward.register_fake
def _(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS, softmax, precision, split, impl):
    return _empty_outputs(q_BHTD, k_BGSD, impl)


def _kernel_inputs(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS):
    rows = (dense_rows(x) for x in (q_BHTD, k_BGSD, v_BGSD))
    return *rows, log_scale_H.contiguous(), *keys_to_loop_over(key_count_B, key_mask_BS)


def _like(x, impl: str):
    """What the result that belongs to x is laid out as: the kernels write rows whose elements lie side by side."""
    return dense_rows(x) if impl == "triton" else x


def _empty_outputs(q_BHTD, k_BGSD, impl: str):
    dtype, shape_BHT = compute_dtype(q_BHTD.dtype), q_BHTD.shape[:3]
    lse_BHT, rq_BHT = (q_BHTD.new_empty(shape_BHT, dtype=dtype) for _ in range(2))
    return torch.empty_like(_like(q_BHTD, impl)), lse_BHT, rq_BHT, k_BGSD.new_empty(k_BGSD.shape[:3], dtype=dtype)


@operator("ridgeline::gqa_attention_backward")
def _backward(
    do_BHTD: torch.Tensor,
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    log_scale_H: torch.Tensor,
    key_count_B: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    o_BHTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    rq_BHT: torch.Tensor,
    rk_BGS: torch.Tensor,
    precision: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v and log_scale."""
    if 0 in (q_BHTD.numel(), k_BGSD.numel()):
        dq_BHTD, dk_BGSD, dv_BGSD = (torch.zeros_like(_like(x, impl)) for x in (q_BHTD, k_BGSD, v_BGSD))
        return dq_BHTD, dk_BGSD, dv_BGSD, torch.zeros_like(log_scale_H)
    if impl == "triton":
        inputs = _kernel_inputs(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS)
        dlog_scale_SH = lse_BHT.new_empty(segments(q_BHTD, precision), q_BHTD.shape[1])
        needed = (o_BHTD, lse_BHT, rq_BHT, rk_BGS, precision)
        gradients = attention_backward(dense_rows(do_BHTD), *inputs, *needed, dlog_scale_SH)
        return *gradients, sum_segments(dlog_scale_SH).to(log_scale_H.dtype)
    valid_BS = _valid_keys(key_count_B, key_mask_BS, k_BGSD.shape[2])
    return attention_eager_backward(
        do_BHTD, q_BHTD, k_BGSD, v_BGSD, log_scale_H, valid_BS, o_BHTD, lse_BHT, rq_BHT, rk_BGS
    )


@_backward.register_fake
def _(do_BHTD, q_BHTD, k_BGSD, v_BGSD, log_scale_H, *rest):
    *_, impl = rest
    return *(torch.empty_like(_like(x, impl)) for x in (q_BHTD, k_BGSD, v_BGSD)), torch.empty_like(log_scale_H)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.precision, _, ctx.impl = inputs
    # what is kept for the backward has no gradients, not tensors of zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, do_BHTD, *_):
    if do_BHTD is None:
        return (None,) * 10
    gradients = _backward(do_BHTD, *ctx.saved_tensors, ctx.precision, ctx.impl)
    return (*gradients, *[None] * 6)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _valid_keys(key_count_B, key_mask_BS, S: int) -> torch.Tensor | None:
    """Which keys count, [B, S] bool; None: all."""
    if key_count_B is not None:
        return torch.arange(S, device=key_count_B.device) < key_count_B[:, None]
    return key_mask_BS


def _check(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS) -> None:
    """Refuse tensors that do not fit each other."""
    require_tensors(q=q_BHTD, k=k_BGSD, v=v_BGSD, log_scale=log_scale_H)
    require_tensors_or_none(key_count=key_count_B, key_mask=key_mask_BS)
    for name, tensor in (("q", q_BHTD), ("k", k_BGSD), ("v", v_BGSD)):
        letters = "B, H, T, D" if name == "q" else "B, G, S, D"
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [{letters}], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.dtype != q_BHTD.dtype or tensor.device != q_BHTD.device:
            raise ValueError(
                f"{name} must have the dtype and device of q, {q_BHTD.dtype} on {q_BHTD.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    (B, H, _, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    if D not in HEAD_WIDTHS:
        raise ValueError(f"q must have head width {', '.join(map(str, HEAD_WIDTHS))}, got {D}")
    if k_BGSD.shape != (B, G, S, D):
        raise ValueError(f"k must be [{B}, G, S, {D}] as q is {tuple(q_BHTD.shape)}, got shape {tuple(k_BGSD.shape)}")
    if v_BGSD.shape != k_BGSD.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k_BGSD.shape)}, got {tuple(v_BGSD.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"q must have a multiple of the {G} heads of k, got {H} heads")
    if log_scale_H.shape != (H,) or log_scale_H.dtype not in (torch.float32, q_BHTD.dtype):
        raise ValueError(
            f"log_scale must be [{H}] and floating point, float32 or of q's dtype, "
            f"got shape {tuple(log_scale_H.shape)}, {log_scale_H.dtype}"
        )
    if log_scale_H.device != q_BHTD.device:
        raise ValueError(f"log_scale must be on the device of q, {q_BHTD.device}, got {log_scale_H.device}")
    _check_keys(key_count_B, key_mask_BS, B, S, q_BHTD.device)


def _check_keys(key_count_B, key_mask_BS, B: int, S: int, device: torch.device) -> None:
    """Refuse counts or masks that do not fit, and counts out of range where values may be read."""
    if key_count_B is not None and key_mask_BS is not None:
        raise ValueError("key_count and key_mask must not both be given")
    if key_mask_BS is not None:
        if key_mask_BS.shape != (B, S) or key_mask_BS.dtype != torch.bool:
            raise ValueError(
                f"key_mask must be [{B}, {S}] of bool, got shape {tuple(key_mask_BS.shape)}, {key_mask_BS.dtype}"
            )
        if key_mask_BS.device != device:
            raise ValueError(f"key_mask must be on the device of q, {device}, got {key_mask_BS.device}")
    if key_count_B is not None:
        if key_count_B.shape != (B,) or key_count_B.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"key_count must be [{B}] of int32 or int64, got shape {tuple(key_count_B.shape)}, {key_count_B.dtype}"
            )
        if key_count_B.device != device:
            raise ValueError(f"key_count must be on the device of q, {device}, got {key_count_B.device}")
        if B and values_are_readable(key_count_B):
            low, high = (int(value) for value in key_count_B.aminmax())
            if low < 0 or high > S:
                raise ValueError(f"key_count must be in [0, {S}], got {low} to {high}")


def _check_options(q_BHTD, log_scale_H, softmax: str, precision: str, split: int) -> None:
    """Refuse unknown options, and temperatures that the softmax cannot take where values may be read."""
    if softmax not in ("static", "online"):
        raise ValueError(f"softmax must be static or online, got {softmax!r}")
    if precision not in ("tf32", "ieee"):
        raise ValueError(f"precision must be tf32 or ieee, got {precision!r}")
    if split < 1:
        raise ValueError(f"split must be at least 1, got {split}")
    if log_scale_H.numel() and values_are_readable(log_scale_H):
        smallest, largest = (float(value) for value in log_scale_H.detach().aminmax())
        if not -LARGEST_LOG_SCALE <= smallest <= largest <= LARGEST_LOG_SCALE:
            raise ValueError(
                f"log_scale must be finite and in [-{LARGEST_LOG_SCALE}, {LARGEST_LOG_SCALE}], "
                f"got {smallest} to {largest}"
            )
        limit = 10 if q_BHTD.dtype == torch.float16 else 60
        if softmax == "static" and largest > math.log(limit) + 1e-6:
            raise ValueError(
                f"log_scale must be at most log {limit} with softmax='static', got log {math.exp(largest):g}"
            )
