"""Segment matching: the training loss between predicted and true segments, from cost to gradients.

Per item with N predicted segments i and m true segments j; midpoint m_i, unit direction u_i, length l_i, ends p_i, q_i:

    C_ij = |m_i - m_j| + direction_weight |w_ij| + length_weight |l_i - l_j|
    w_ij = u_i - sign u_j, sign = +1 if u_i.u_j >= 0 else -1
    P    = plan of `sinkhorn` for cost_scale C and cost_scale dustbin: a fully matched segment has mass 1
    transport = sum_ij P_ij cost_scale C_ij / max(m, 1)
    endpoint  = sum_ij P_ij d_ij / max(sum P, 1e-6), P constant
    d_ij = 1/2 min(|p_i - p_j|_1 + |q_i - q_j|_1, |p_i - q_j|_1 + |q_i - p_j|_1), p, q = m -/+ u l/2
    matched_i = min(sum_j P_ij, 1);  partner_i = lowest j whose best i (lowest on ties) is i, else -1

The gradients of both losses are made with the losses and only weighted in the backward, each by its own upstream value
per item: `matching_eager` does so on planes [B, N, M], `matching_triton` in one launch without any. A norm at 0 and an
absolute value at 0 have gradient 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import as_count, as_number, require_tensors, resolve, values_are_readable
from kernels.matching_eager import match_segments_backward_eager, match_segments_forward_eager
from kernels.matching_triton import match_segments_backward_triton, match_segments_forward_triton
from kernels.registration import operator
from kernels.sinkhorn import SLACKS, sinkhorn_reference

MAX_SEGMENTS = 128
PLAN_GRADIENTS = ("detached", "exact")


class Match(NamedTuple):
    """Two losses per item (differentiable), and who was matched (without gradient)."""

    transport_B: Tensor
    endpoint_B: Tensor
    matched_BN: Tensor
    partner_BN: Tensor


class Settings(NamedTuple):
    """What `match_segments` takes beside tensors."""

    direction_weight: float
    length_weight: float
    cost_scale: float
    eps: float
    iterations: int
    dustbin: float
    slack: str
    plan_gradient: str


def match_segments(
    mid_BN3: Tensor,
    dir_BN3: Tensor,
    len_BN: Tensor,
    gt_BM23: Tensor,
    gt_count_B: Tensor,
    *,
    direction_weight: float = 0.3,
    length_weight: float = 1.0,
    cost_scale: float = 5.0,
    eps: float = 0.1,
    iterations: int = 20,
    dustbin: float = 0.3,
    slack: str = "full",
    plan_gradient: str = "detached",
    impl: str = "auto",
) -> Match:
    """Match predicted to true segments by optimal transport with a dustbin, and return the losses of the matching.

    The formulas stand at the top of this module.

    Args:
        mid_BN3: midpoints of the predicted segments, in the unit of the true ones; float32, bfloat16 or float16
            (float32 inside), with impl="eager" also float64. All N <= 128 segments count.
        dir_BN3: their unit directions, of mid's dtype; the sign does not matter. They are not normalised here.
        len_BN: their lengths, of mid's dtype.
        gt_BM23: endpoints of the M <= 128 true segments in any order, of any of these dtypes; without gradient.
        gt_count_B: how many true segments each item has, int32 or int64 in [0, M]; the rest is padding and may be
            anything, NaN too. Where values may not be read (`kernels.dispatch`) it is clamped.
        direction_weight, length_weight: at least 0; what directions and lengths cost beside the distance.
        cost_scale, eps: positive; cost and dustbin are multiplied by cost_scale, eps is the temperature of the plan.
        iterations: of Sinkhorn, at least 1.
        dustbin: what leaving a segment unmatched costs: a pair is matched, all else being equal, if it costs less.
        slack: "full" (the dustbin can take everything) or "minimal" (only what the smaller side cannot take).
        plan_gradient: "detached" (the plan is a constant in transport) or "exact" (differentiated through the solve).
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        Match: transport_B, endpoint_B and matched_BN in [0, 1], float32 (float64 for float64); partner_BN, int64: the
        first true segment that a predicted one is best for, however little of it is matched, else -1. Without true
        segments: losses 0 with gradient 0, nobody matched.
    Raises:
        ValueError: a shape, dtype, device, count or setting is not as above; more than 128 segments; float64 with
            impl="triton".
    Determinism: triton: an item's bits depend on that item alone, not on the batch, other items or padding, as long as
        N and M stay within the same tile: up to 64 or up to 128. eager: equal calls give equal bits.
    Source: Cuturi 2013 (arXiv:1306.0895), Sinkhorn's iteration; Sarlin et al. 2020 (arXiv:1911.11763), the dustbin.
    """
    require_tensors(mid=mid_BN3, dir=dir_BN3, len=len_BN, gt=gt_BM23, gt_count=gt_count_B)
    impl = resolve(impl, mid_BN3.device)
    _check_tensors(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, impl)
    settings = _settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient)
    differentiable = mid_BN3.requires_grad or dir_BN3.requires_grad or len_BN.requires_grad
    need_grad = torch.is_grad_enabled() and differentiable
    transport_B, endpoint_B, matched_BN, partner_BN, _ = match_segments_forward(
        mid_BN3, dir_BN3, len_BN, gt_BM23.detach(), gt_count_B, *settings, need_grad, impl
    )
    return Match(transport_B, endpoint_B, matched_BN, partner_BN)


def match_segments_reference(
    mid_BN3: Tensor,
    dir_BN3: Tensor,
    len_BN: Tensor,
    gt_BM23: Tensor,
    gt_count_B: Tensor,
    *,
    direction_weight: float = 0.3,
    length_weight: float = 1.0,
    cost_scale: float = 5.0,
    eps: float = 0.1,
    iterations: int = 20,
    dustbin: float = 0.3,
    slack: str = "full",
    plan_gradient: str = "detached",
) -> Match:
    """Compute `match_segments` as its formulas say, with autograd; in float64 this is the truth."""
    dtype = torch.promote_types(mid_BN3.dtype, torch.float32)
    mid_BN3, dir_BN3, len_BN = mid_BN3.to(dtype), dir_BN3.to(dtype), len_BN.to(dtype)
    valid_BM = torch.arange(gt_BM23.shape[1], device=gt_BM23.device) < gt_count_B[:, None]
    gt_BM23 = torch.where(valid_BM[:, :, None, None], gt_BM23.detach().to(dtype), 0)

    start_BM3, end_BM3 = gt_BM23.unbind(2)
    gt_mid_BM3, gt_len_BM = (start_BM3 + end_BM3) / 2, torch.linalg.vector_norm(end_BM3 - start_BM3, dim=-1)
    gt_dir_BM3 = (end_BM3 - start_BM3) / gt_len_BM.clamp(min=1e-12)[:, :, None]
    sign_BNM = torch.where(dir_BN3 @ gt_dir_BM3.mT >= 0, 1.0, -1.0).to(dtype)
    chord_BNM3 = dir_BN3[:, :, None] - sign_BNM[..., None] * gt_dir_BM3[:, None]
    cost_BNM = cost_scale * (
        torch.linalg.vector_norm(mid_BN3[:, :, None] - gt_mid_BM3[:, None], dim=-1)
        + direction_weight * torch.linalg.vector_norm(chord_BNM3, dim=-1)
        + length_weight * (len_BN[:, :, None] - gt_len_BM[:, None]).abs()
    )
    plan_BNM, *_ = sinkhorn_reference(
        cost_BNM, cols_B=gt_count_B, eps=eps, iterations=iterations, dustbin=cost_scale * dustbin, slack=slack
    )
    if plan_gradient == "detached":
        plan_BNM = plan_BNM.detach()
    transport_B = (plan_BNM * cost_BNM).sum((1, 2)) / gt_count_B.clamp(min=1)
    plan_BNM = plan_BNM.detach()

    half_BN3 = dir_BN3 * len_BN[:, :, None] / 2
    first_BN13, second_BN13 = (mid_BN3 - half_BN3)[:, :, None], (mid_BN3 + half_BN3)[:, :, None]
    start_B1M3, end_B1M3 = start_BM3[:, None], end_BM3[:, None]
    same_BNM = (first_BN13 - start_B1M3).abs().sum(-1) + (second_BN13 - end_B1M3).abs().sum(-1)
    swapped_BNM = (first_BN13 - end_B1M3).abs().sum(-1) + (second_BN13 - start_B1M3).abs().sum(-1)
    # not torch.minimum: it splits the gradient of ties, and axis-aligned roofs make ties
    distance_BNM = torch.where(same_BNM <= swapped_BNM, same_BNM, swapped_BNM) / 2
    endpoint_B = (plan_BNM * distance_BNM).sum((1, 2)) / plan_BNM.sum((1, 2)).clamp(min=1e-6)
    return Match(transport_B, endpoint_B, plan_BNM.sum(2).clamp(max=1), _partner(plan_BNM, valid_BM))


def _partner(plan_BNM: Tensor, valid_BM: Tensor) -> Tensor:
    (N, M), device = plan_BNM.shape[1:], plan_BNM.device
    if not N or not M:
        return torch.full(plan_BNM.shape[:2], -1, device=device)
    best_BNM = (plan_BNM.argmax(1, keepdim=True) == torch.arange(N, device=device)[:, None]) & valid_BM[:, None]
    return torch.where(best_BNM.any(2), best_BNM.int().argmax(2), -1)


@operator("ridgeline::match_segments_forward")
def match_segments_forward(
    mid_BN3: Tensor,
    dir_BN3: Tensor,
    len_BN: Tensor,
    gt_BM23: Tensor,
    gt_count_B: Tensor,
    direction_weight: float,
    length_weight: float,
    cost_scale: float,
    eps: float,
    iterations: int,
    dustbin: float,
    slack: str,
    plan_gradient: str,
    need_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a Match, and the gradients [B, loss, 7, N] of (mid, dir, len): of size 0 without need_grad."""
    settings = Settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient)
    inputs = (mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, settings, need_grad)
    if impl == "triton":
        return match_segments_forward_triton(*inputs)
    with torch.autocast(mid_BN3.device.type, enabled=False):
        return match_segments_forward_eager(*inputs)


@match_segments_forward.register_fake
def _(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, *settings):
    (B, N), dtype = len_BN.shape, torch.promote_types(len_BN.dtype, torch.float32)
    *_, need_grad, _ = settings
    return (
        len_BN.new_empty(B, dtype=dtype),
        len_BN.new_empty(B, dtype=dtype),
        len_BN.new_empty(B, N, dtype=dtype),
        len_BN.new_empty(B, N, dtype=torch.int64),
        len_BN.new_empty((B, 2, 7, N) if need_grad else 0, dtype=dtype),
    )


@operator("ridgeline::match_segments_backward")
def match_segments_backward(
    grad_transport_B: Tensor, grad_endpoint_B: Tensor, grads_B27N: Tensor, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of mid, dir and len: those of the two losses, each times what arrives from above."""
    form = match_segments_backward_triton if impl == "triton" else match_segments_backward_eager
    return form(grad_transport_B, grad_endpoint_B, grads_B27N, dtype)


@match_segments_backward.register_fake
def _(grad_transport_B, grad_endpoint_B, grads_B27N, dtype, impl):
    B, _, _, N = grads_B27N.shape
    return tuple(grads_B27N.new_empty(shape, dtype=dtype) for shape in ((B, N, 3), (B, N, 3), (B, N)))


def _save(ctx, inputs, output) -> None:
    ctx.dtype, ctx.impl = inputs[0].dtype, inputs[-1]
    # the outputs without a gradient get none, not tensors of zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])
    # not the gradients, which would let a second derivative pass as 0
    ctx.mark_non_differentiable(*output[2:4])


def _backward(ctx, grad_transport_B, grad_endpoint_B, *_):
    (grads_B27N,) = ctx.saved_tensors
    upstream = (grads_B27N.new_zeros(len(grads_B27N)) if g is None else g for g in (grad_transport_B, grad_endpoint_B))
    grads = match_segments_backward(*upstream, grads_B27N, ctx.dtype, ctx.impl)
    return *grads, *[None] * 12


match_segments_forward.register_autograd(_backward, setup_context=_save)


def _check_tensors(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, impl) -> None:
    if mid_BN3.ndim != 3 or mid_BN3.shape[2] != 3:
        raise ValueError(f"mid must be [B, N, 3], got shape {tuple(mid_BN3.shape)}")
    (B, N, _), dtype, device = mid_BN3.shape, mid_BN3.dtype, mid_BN3.device
    if dir_BN3.shape != mid_BN3.shape:
        raise ValueError(f"dir must have mid's shape {tuple(mid_BN3.shape)}, got shape {tuple(dir_BN3.shape)}")
    if len_BN.shape != (B, N):
        raise ValueError(f"len must be [B, N] = {[B, N]}, got shape {tuple(len_BN.shape)}")
    if gt_BM23.ndim != 4 or gt_BM23.shape[0] != B or gt_BM23.shape[2:] != (2, 3):
        raise ValueError(f"gt must be [B, M, 2, 3] with B = {B}, got shape {tuple(gt_BM23.shape)}")
    if gt_count_B.shape != (B,):
        raise ValueError(f"gt_count must be [B] = {[B]}, got shape {tuple(gt_count_B.shape)}")
    M = gt_BM23.shape[1]
    if max(N, M) > MAX_SEGMENTS:
        raise ValueError(f"mid and gt must have at most {MAX_SEGMENTS} segments, got N = {N} and M = {M}")
    floats = (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if impl == "eager" else []))
    for name, tensor in (("mid", mid_BN3), ("gt", gt_BM23)):
        if tensor.dtype not in floats:
            raise ValueError(f"{name} must be one of {floats} for impl={impl!r}, got {tensor.dtype}")
    for name, tensor in (("dir", dir_BN3), ("len", len_BN)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must have mid's dtype {dtype}, got {tensor.dtype}")
    if gt_count_B.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gt_count must be int32 or int64, got {gt_count_B.dtype}")
    for name, tensor in (("dir", dir_BN3), ("len", len_BN), ("gt", gt_BM23), ("gt_count", gt_count_B)):
        if tensor.device != device:
            raise ValueError(f"{name} must be on mid's device {device}, got {tensor.device}")
    if values_are_readable(gt_count_B) and bool(((gt_count_B < 0) | (gt_count_B > M)).any()):
        raise ValueError(f"gt_count must lie in [0, M] = [0, {M}], got {gt_count_B.tolist()}")


def _settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient) -> Settings:
    """Return the settings as plain numbers, all of them in range."""
    settings = Settings(
        direction_weight=as_number("direction_weight", direction_weight),
        length_weight=as_number("length_weight", length_weight),
        cost_scale=as_number("cost_scale", cost_scale),
        eps=as_number("eps", eps),
        iterations=as_count("iterations", iterations),
        dustbin=as_number("dustbin", dustbin),
        slack=slack,
        plan_gradient=plan_gradient,
    )
    for name, weight in (("direction_weight", settings.direction_weight), ("length_weight", settings.length_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {weight}")
    for name, scale in (("cost_scale", settings.cost_scale), ("eps", settings.eps)):
        if not 0 < scale < math.inf:
            raise ValueError(f"{name} must be finite and positive, got {scale}")
    # compared, not math.isfinite, which a compiler cannot ask of a number that it does not know yet
    if not -math.inf < settings.dustbin < math.inf:
        raise ValueError(f"dustbin must be finite, got {settings.dustbin}")
    if slack not in SLACKS:
        raise ValueError(f"slack must be one of {', '.join(SLACKS)}, got {slack!r}")
    if plan_gradient not in PLAN_GRADIENTS:
        raise ValueError(f"plan_gradient must be one of {', '.join(PLAN_GRADIENTS)}, got {plan_gradient!r}")
    return settings
