"""The CPU form of `gqa_attention`: PyTorch's fused CPU attention on normalised queries and keys.

The heads of a group read the same keys, so they are stacked along the queries, [B, G, R T, D]: keys are never
expanded, and dk and dv come out summed over the group. The temperature is folded into the queries; the backward of
both norms is written by hand. float64 stays float64, everything else is float32 inside.

The fused operator is called by its internal name, which alone returns what its backward needs. It adds the keys of a
row in a fixed order within one thread, so that its bits repeat, and gives 0 where every key of a row has bias -inf.
"""

import math

import torch

NORM_EPS = 1e-12


def attention_eager(q_BHTD, k_BGSD, v_BGSD, log_scale_H, valid_BS):
    """Return o_BHTD, the logarithms of the softmax sums [B, H, T], and the inverse norms of q and k."""
    valid_BS = _unless_all(valid_BS)
    q_BGND, k_BSGD = _stacked(q_BHTD, k_BGSD.shape[1]), _rows(k_BGSD, valid_BS)
    rq, rk = _inverse_norm(q_BGND), _inverse_norm(k_BSGD)
    o_BGND, lse_BGN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BGND * (rq * _temperature(log_scale_H, q_BGND)),
        (k_BSGD * rk).transpose(1, 2),
        _rows(v_BGSD, valid_BS).transpose(1, 2),
        attn_mask=_bias(valid_BS, q_BGND.dtype),
        scale=1.0,
    )
    shape_BHT = q_BHTD.shape[:3]
    rk_BGS = rk.squeeze(-1).transpose(1, 2).contiguous()
    return _unstacked(o_BGND, q_BHTD), lse_BGN.reshape(shape_BHT), rq.view(shape_BHT), rk_BGS


def attention_eager_backward(do_BHTD, q_BHTD, k_BGSD, v_BGSD, log_scale_H, valid_BS, o_BHTD, lse_BHT, rq_BHT, rk_BGS):
    """Return the gradients of q, k, v and log_scale."""
    B, H, T, _ = q_BHTD.shape
    G, valid_BS = k_BGSD.shape[1], _unless_all(valid_BS)
    q_BGND, k_BSGD = _stacked(q_BHTD, G), _rows(k_BGSD, valid_BS)
    rq, rk = rq_BHT.view(B, G, -1, 1), rk_BGS.transpose(1, 2).unsqueeze(-1)
    tau = _temperature(log_scale_H, q_BGND)
    scaled_q_BGND, unit_k_BSGD = q_BGND * (rq * tau), k_BSGD * rk
    dq_BGND, dk_BGSD, dv_BGSD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _stacked(_where_some_key_counts(do_BHTD, valid_BS), G),
        scaled_q_BGND,
        unit_k_BSGD.transpose(1, 2),
        _rows(v_BGSD, valid_BS).transpose(1, 2),
        _stacked(o_BHTD, G),
        lse_BHT.view(B, G, -1),
        0.0,
        False,
        attn_mask=_bias(valid_BS, q_BGND.dtype),
        scale=1.0,
    )
    dq_BGND, dot = _norm_backward(dq_BGND, scaled_q_BGND, rq, tau)
    dk_BSGD, _ = _norm_backward(dk_BGSD.transpose(1, 2), unit_k_BSGD, rk, 1)
    return (
        _unstacked(dq_BGND, q_BHTD),
        _laid_out(dk_BSGD.transpose(1, 2), k_BGSD),
        _laid_out(dv_BGSD, v_BGSD),
        dot.view(B, H, T).sum((0, 2)).to(log_scale_H.dtype),
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything inside."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stacked(x_BHTD, G: int):
    """The heads of a group one after the other along the queries: [B, G, N, D] with N = R T."""
    B, _, _, D = x_BHTD.shape
    return x_BHTD.to(compute_dtype(x_BHTD.dtype)).reshape(B, G, -1, D)


def _unstacked(x_BGND, like_BHTD):
    """The inverse of `_stacked`, in the layout and dtype of `like`."""
    G, T = x_BGND.shape[1], like_BHTD.shape[2]
    x_BHTD = torch.empty_like(like_BHTD)
    x_BHTD.unflatten(1, (G, -1)).copy_(x_BGND.unflatten(2, (-1, T)))
    return x_BHTD


def _laid_out(x, like):
    """x in the layout and dtype of `like`."""
    same = x.dtype == like.dtype and x.stride() == torch.empty_like(like, device="meta").stride()
    return x if same else torch.empty_like(like).copy_(x)


def _unless_all(valid_BS):
    """Which keys count; None where all do."""
    return None if valid_BS is None or bool(valid_BS.all()) else valid_BS


def _rows(x_BGSD, valid_BS):
    """Keys or values as dense [B, S, G, D], the layout of a projection; 0 where a key does not count."""
    x_BSGD = x_BGSD.transpose(1, 2)
    dense_BSGD = x_BSGD.to(compute_dtype(x_BSGD.dtype)).contiguous()
    if valid_BS is None:
        return dense_BSGD
    if dense_BSGD is x_BSGD:
        dense_BSGD = x_BSGD.clone()
    # by the mask itself it takes 15 times as long
    dense_BSGD[torch.nonzero(~valid_BS, as_tuple=True)] = 0
    return dense_BSGD


def _where_some_key_counts(do_BHTD, valid_BS):
    """The upstream gradient, 0 for items without a key: 0 times what is there would be NaN where that is."""
    if valid_BS is None or bool((some_B := valid_BS.any(1)).all()):
        return do_BHTD
    return torch.where(some_B[:, None, None, None], do_BHTD, 0)


def _bias(valid_BS, dtype: torch.dtype):
    """What is added to the logits: -inf where a key does not count."""
    if valid_BS is None:
        return None
    return torch.zeros(valid_BS.shape, dtype=dtype).masked_fill_(~valid_BS, -math.inf)[:, None, None, :]


def _temperature(log_scale_H, q_BGND):
    """exp(log_scale) of every stacked query, [G, N, 1]."""
    G, N = q_BGND.shape[1:3]
    tau_H = log_scale_H.to(q_BGND.dtype).exp()
    return tau_H.repeat_interleave(G * N // tau_H.numel()).view(G, N, 1)


def _inverse_norm(x):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(NORM_EPS).reciprocal_()


def _norm_backward(dy, y, r, tau):
    """Turn the gradient of y = x r tau, r = 1/max(|x|, eps), in place into that of x; also return the rows' <dy, y>."""
    dot = (dy * y).sum(-1, keepdim=True)
    # shorter than eps, x is divided by a constant: nothing to take out
    return dy.addcmul_(y, dot * (r < 1 / NORM_EPS) / tau / tau, value=-1).mul_(r * tau), dot
