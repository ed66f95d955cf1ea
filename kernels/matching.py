"""Segment matching: the training loss between predicted and true segments, from cost to gradients.

Per item with N predicted segments i and m true segments j (indices past `gt_count_B` are padding):

    C_ij = |m_i - m_j| + direction_weight |w_ij| + length_weight |l_i - l_j|
    w_ij = u_i - sign u_j, sign = +1 if u_i.u_j >= 0 else -1
    P    = plan of `sinkhorn` for cost_scale C and cost_scale dustbin: a fully matched segment has mass 1
    transport = sum_ij P_ij cost_scale C_ij / max(m, 1)
    endpoint  = sum_ij P_ij d_ij / max(sum P, 1e-6), P constant
    d_ij      = the smaller mean L1 distance between endpoints, over the two orders
    matched_i = min(sum_j P_ij, 1);  partner_i = lowest j whose best i (lowest on ties) is i, else -1
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import resolve, values_are_readable
from kernels.sinkhorn import SLACKS, log_masses, sinkhorn_reference
from kernels.sinkhorn_eager import reverse, solve

MAX_SEGMENTS = 128
PLAN_GRADIENTS = ("detached", "exact")


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


class Match(NamedTuple):
    """Two losses per item (differentiable), and who was matched (without gradient)."""

    transport_B: Tensor
    endpoint_B: Tensor
    matched_BN: Tensor
    partner_BN: Tensor


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
    """Match predicted to true segments by Sinkhorn with a dustbin, and return the losses of the matching."""
    settings = Settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient)
    _check_tensors(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B)
    _check_settings(settings)
    impl = resolve(impl, mid_BN3.device)
    predicted = (mid_BN3, dir_BN3, len_BN)
    need_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in predicted)
    transport_B, endpoint_B, matched_BN, partner_BN, _ = match_segments_forward(
        *predicted, gt_BM23.detach(), gt_count_B, *settings, need_grad, impl
    )
    return Match(transport_B, endpoint_B, matched_BN.detach(), partner_BN)


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
    """Compute `match_segments` as its formula says, with autograd; in float64 this is the truth."""
    dtype = torch.promote_types(mid_BN3.dtype, torch.float32)
    mid_BN3, dir_BN3, len_BN = mid_BN3.to(dtype), dir_BN3.to(dtype), len_BN.to(dtype)
    valid_BM = torch.arange(gt_BM23.shape[1], device=gt_BM23.device) < gt_count_B[:, None]
    gt_BM23 = torch.where(valid_BM[:, :, None, None], gt_BM23.detach().to(dtype), 0)

    start_BM3, end_BM3 = gt_BM23.unbind(2)
    gt_mid_BM3, gt_dir_BM3, gt_len_BM = _describe(start_BM3, end_BM3)
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
    distance_BNM = torch.where(same_BNM <= swapped_BNM, same_BNM, swapped_BNM) / 2
    endpoint_B = (plan_BNM * distance_BNM).sum((1, 2)) / plan_BNM.sum((1, 2)).clamp(min=1e-6)
    return Match(transport_B, endpoint_B, plan_BNM.sum(2).clamp(max=1), _partner(plan_BNM, valid_BM))


def _describe(start_BM3: Tensor, end_BM3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Midpoint, unit direction (0 without length) and length of segments given by their endpoints."""
    along_BM3 = end_BM3 - start_BM3
    len_BM = torch.linalg.vector_norm(along_BM3, dim=-1)
    return (start_BM3 + end_BM3) / 2, along_BM3 / len_BM.clamp(min=1e-12)[:, :, None], len_BM


def _partner(plan_BNM: Tensor, valid_BM: Tensor) -> Tensor:
    """The lowest valid column whose largest entry (lowest row on ties) lies in this row, else -1."""
    rows, cols = plan_BNM.shape[1:]
    if not rows or not cols:
        return torch.full(plan_BNM.shape[:2], -1, device=plan_BNM.device)
    # indices counted from the end, so that the lowest is the largest: amax is many times faster than argmax
    row_N1 = torch.arange(rows, 0, -1, device=plan_BNM.device, dtype=plan_BNM.dtype)[:, None]
    col_M = torch.arange(cols, 0, -1, device=plan_BNM.device, dtype=plan_BNM.dtype)
    best_B1M = ((plan_BNM == plan_BNM.amax(1, keepdim=True)) * row_N1).amax(1, keepdim=True)
    first_BN = ((best_B1M == row_N1) * (col_M * valid_BM)[:, None]).amax(2)
    return torch.where(first_BN > 0, cols - first_BN, -1).long()


@torch.library.custom_op("ridgeline::match_segments_forward", mutates_args=())
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
    """The four results, and the gradients [2, 7, B, N] of both losses for (mid, dir, len); empty without need_grad."""
    settings = Settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient)
    return _forward_eager(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, settings, need_grad)


@match_segments_forward.register_fake
def _(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, *settings):
    *_, need_grad, _ = settings
    batch, rows = len_BN.shape
    work = {"dtype": torch.promote_types(len_BN.dtype, torch.float32)}
    return (
        len_BN.new_empty(batch, **work),
        len_BN.new_empty(batch, **work),
        len_BN.new_empty(batch, rows, **work),
        len_BN.new_empty(batch, rows, dtype=torch.int64),
        len_BN.new_empty((2, 7, batch, rows) if need_grad else 0, **work),
    )


@torch.library.custom_op("ridgeline::match_segments_backward", mutates_args=())
def match_segments_backward(
    grad_transport_B: Tensor, grad_endpoint_B: Tensor, grads_27BN: Tensor, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of mid, dir and len: those of the two losses, weighted by what arrives from above."""
    upstream_21B1 = torch.stack([grad_transport_B, grad_endpoint_B])[:, None, :, None]
    grad_BN7 = (upstream_21B1 * grads_27BN).sum(0).movedim(0, 2)
    grads = (grad_BN7[..., :3], grad_BN7[..., 3:6], grad_BN7[..., 6])
    return tuple(grad.to(dtype, copy=True, memory_format=torch.contiguous_format) for grad in grads)


@match_segments_backward.register_fake
def _(grad_transport_B, grad_endpoint_B, grads_27BN, dtype, impl):
    _, _, batch, rows = grads_27BN.shape
    shapes = ((batch, rows, 3), (batch, rows, 3), (batch, rows))
    return tuple(grads_27BN.new_empty(shape, dtype=dtype) for shape in shapes)


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(output[-1])
    ctx.dtype, ctx.impl = inputs[0].dtype, inputs[-1]


def _backward(ctx, grad_transport_B, grad_endpoint_B, *_):
    grads = match_segments_backward(grad_transport_B, grad_endpoint_B, *ctx.saved_tensors, ctx.dtype, ctx.impl)
    return *grads, *[None] * 12


match_segments_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def _forward_eager(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, settings, need_grad):
    """The formulas of this module on planes [B, N, M], with the gradients made beside the losses."""
    dtype = torch.promote_types(mid_BN3.dtype, torch.float32)
    mid_BN3, dir_BN3, len_BN = mid_BN3.to(dtype), dir_BN3.to(dtype), len_BN.to(dtype)
    if values_are_readable(gt_count_B):
        gt_BM23 = gt_BM23[:, : max(gt_count_B.tolist(), default=0)]
    valid_BM = torch.arange(gt_BM23.shape[1], device=gt_BM23.device) < gt_count_B[:, None]
    start_BM3, end_BM3 = torch.where(valid_BM[:, :, None, None], gt_BM23.to(dtype), 0).unbind(2)
    gt_mid_BM3, gt_dir_BM3, gt_len_BM = _describe(start_BM3, end_BM3)
    grads_27BN = len_BN.new_zeros((2, 7, *len_BN.shape) if need_grad else 0)
    if not len_BN.numel() or not valid_BM.numel():
        zeros_B = len_BN.new_zeros(len(len_BN))
        return zeros_B, zeros_B.clone(), torch.zeros_like(len_BN), torch.full_like(len_BN, -1).long(), grads_27BN

    # cost_BNM = cost_scale * (|delta| + direction_weight * |chord| + length_weight * |gap|)
    delta_3BNM = _planes(mid_BN3)[..., None] - _planes(gt_mid_BM3)[:, :, None]
    facing_BNM = (dir_BN3 @ gt_dir_BM3.mT >= 0).to(dtype).mul_(2).sub_(1)
    chord_3BNM = _planes(dir_BN3)[..., None] - _planes(gt_dir_BM3)[:, :, None] * facing_BNM
    gap_BNM = len_BN[:, :, None] - gt_len_BM[:, None]
    distance_BNM, angle_BNM = _length(delta_3BNM), _length(chord_3BNM)
    cost_BNM = distance_BNM + settings.direction_weight * angle_BNM + settings.length_weight * gap_BNM.abs()
    cost_BNM *= settings.cost_scale

    share_B11 = 1 / gt_count_B.clamp(min=1)[:, None, None].to(dtype)
    exact = need_grad and settings.plan_gradient == "exact"
    plan_BNM, indirect_BNM = _solve(cost_BNM, gt_count_B, settings, cost_BNM * share_B11 if exact else None)
    transport_B = (plan_BNM * cost_BNM).sum((1, 2)) * share_B11[:, 0, 0]
    if need_grad:
        weight_BNM = settings.cost_scale * (plan_BNM * share_B11 + indirect_BNM)
        torch.sum(_unit(delta_3BNM, distance_BNM) * weight_BNM, -1, out=grads_27BN[0, :3])
        torch.sum(_unit(chord_3BNM, angle_BNM) * (settings.direction_weight * weight_BNM), -1, out=grads_27BN[0, 3:6])
        torch.sum(gap_BNM.sign() * (settings.length_weight * weight_BNM), -1, out=grads_27BN[0, 6])
    half_BN3, gt_half_BM3 = dir_BN3 * len_BN[:, :, None] / 2, (end_BM3 - start_BM3) / 2
    endpoint_B = _endpoint(plan_BNM, delta_3BNM, half_BN3, gt_half_BM3, dir_BN3, len_BN, grads_27BN)
    return transport_B, endpoint_B, plan_BNM.sum(2).clamp_(max=1), _partner(plan_BNM, valid_BM), grads_27BN


def _solve(cost_BNM, gt_count_B, settings, upstream_BNM):
    """The plan, and the gradient of sum(upstream * plan) with respect to the cost: 0 without an upstream."""
    B, N, M = cost_BNM.shape
    log_a, log_b, total_B = log_masses(cost_BNM, None, gt_count_B, True, settings.slack, None, None)
    z = -settings.cost_scale * settings.dustbin / settings.eps
    Z = cost_BNM.new_full((B, N + 1, M + 1), z)
    torch.div(cost_BNM, -settings.eps, out=Z[:, :N, :M])
    shift = Z.new_tensor(z) if settings.slack == "full" else None
    P, history, scaling_B = solve(Z, log_a, log_b, settings.iterations, shift, "auto")
    plan_BNM = P[:, :N, :M] * total_B[:, None, None]
    if upstream_BNM is None:
        return plan_BNM, 0
    G = torch.zeros_like(Z)
    torch.mul(upstream_BNM, total_B[:, None, None], out=G[:, :N, :M])
    grad_Z, _, _ = reverse(G, Z, log_a, log_b, shift, history, scaling_B)
    return plan_BNM, grad_Z[:, :N, :M] / -settings.eps


def _endpoint(plan_BNM, delta_3BNM, half_BN3, gt_half_BM3, dir_BN3, len_BN, grads_27BN):
    """The endpoint loss, and its gradients where there is room for them.

    With x = m_i - m_j and y = h_i - h_j, half vectors, |p_i - p_j| + |q_i - q_j| = |x - y| + |x + y| = 2 max(|x|, |y|).
    """
    half_3BN1, gt_half_3B1M = _planes(half_BN3)[..., None], _planes(gt_half_BM3)[:, :, None]
    reach_3BNM = delta_3BNM.abs()
    same_BNM = torch.maximum(reach_3BNM, (half_3BN1 - gt_half_3B1M).abs_()).sum(0)
    swapped_BNM = torch.maximum(reach_3BNM, (half_3BN1 + gt_half_3B1M).abs_()).sum(0)
    share_B11 = 1 / plan_BNM.sum((1, 2), keepdim=True).clamp_(min=1e-6)
    endpoint_B = (plan_BNM * torch.minimum(same_BNM, swapped_BNM)).sum((1, 2)) * share_B11[:, 0, 0]
    if grads_27BN.numel():
        order_BNM = (same_BNM <= swapped_BNM).to(plan_BNM.dtype).mul_(2).sub_(1)
        y_3BNM = half_3BN1 - gt_half_3B1M * order_BNM
        weight_BNM = plan_BNM * (share_B11 / 2)
        start_3BN = ((delta_3BNM - y_3BNM).sign_() * weight_BNM).sum(-1)
        end_3BN = ((delta_3BNM + y_3BNM).sign_() * weight_BNM).sum(-1)
        along_3BN = (end_3BN - start_3BN) / 2
        torch.add(start_3BN, end_3BN, out=grads_27BN[1, :3])
        torch.mul(along_3BN, len_BN, out=grads_27BN[1, 3:6])
        torch.sum(along_3BN * _planes(dir_BN3), 0, out=grads_27BN[1, 6])
    return endpoint_B


def _planes(x_BN3: Tensor) -> Tensor:
    return x_BN3.movedim(-1, 0).contiguous()


def _length(x_3BNM: Tensor) -> Tensor:
    """The norm over the first axis; `vector_norm` is 70 times slower there."""
    return (x_3BNM * x_3BNM).sum(0).sqrt_()


def _unit(x_3BNM: Tensor, length_BNM: Tensor) -> Tensor:
    """x / |x|, and 0 without length."""
    return x_3BNM / length_BNM.clamp(min=1e-30)


def _check_tensors(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B):
    if mid_BN3.ndim != 3 or mid_BN3.shape[2] != 3:
        raise ValueError(f"mid must be [B, N, 3], got shape {tuple(mid_BN3.shape)}")
    batch, rows = mid_BN3.shape[:2]
    if dir_BN3.shape != mid_BN3.shape:
        raise ValueError(f"dir must have mid's shape {tuple(mid_BN3.shape)}, got shape {tuple(dir_BN3.shape)}")
    if len_BN.shape != (batch, rows):
        raise ValueError(f"len must be [B, N] = {(batch, rows)}, got shape {tuple(len_BN.shape)}")
    if gt_BM23.ndim != 4 or gt_BM23.shape[0] != batch or gt_BM23.shape[2:] != (2, 3):
        raise ValueError(f"gt must be [B, M, 2, 3] with B = {batch}, got shape {tuple(gt_BM23.shape)}")
    if gt_count_B.shape != (batch,):
        raise ValueError(f"gt_count must be [B] = {(batch,)}, got shape {tuple(gt_count_B.shape)}")
    cols = gt_BM23.shape[1]
    if max(rows, cols) > MAX_SEGMENTS:
        raise ValueError(f"mid and gt must hold at most {MAX_SEGMENTS} segments, got N = {rows} and M = {cols}")
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, tensor in (("mid", mid_BN3), ("gt", gt_BM23)):
        if tensor.dtype not in floats:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    for name, tensor in (("dir", dir_BN3), ("len", len_BN)):
        if tensor.dtype != mid_BN3.dtype:
            raise ValueError(f"{name} must have mid's dtype {mid_BN3.dtype}, got {tensor.dtype}")
    if gt_count_B.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"gt_count must hold integers, got {gt_count_B.dtype}")
    for name, tensor in (("dir", dir_BN3), ("len", len_BN), ("gt", gt_BM23), ("gt_count", gt_count_B)):
        if tensor.device != mid_BN3.device:
            raise ValueError(f"{name} must be on mid's device {mid_BN3.device}, got {tensor.device}")
    if values_are_readable(gt_count_B) and ((gt_count_B < 0) | (gt_count_B > cols)).any():
        raise ValueError(f"gt_count must lie in [0, M] = [0, {cols}], got {gt_count_B.tolist()}")


def _check_settings(settings: Settings) -> None:
    for name in ("direction_weight", "length_weight"):
        if not 0 <= (value := getattr(settings, name)) < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    for name in ("cost_scale", "eps"):
        if not 0 < (value := getattr(settings, name)) < math.inf:
            raise ValueError(f"{name} must be finite and positive, got {value}")
    if not math.isfinite(settings.dustbin):
        raise ValueError(f"dustbin must be finite, got {settings.dustbin}")
    if not isinstance(settings.iterations, int) or settings.iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {settings.iterations!r}")
    if settings.slack not in SLACKS:
        raise ValueError(f"slack must be one of {', '.join(SLACKS)}, got {settings.slack!r}")
    if settings.plan_gradient not in PLAN_GRADIENTS:
        raise ValueError(f"plan_gradient must be one of {', '.join(PLAN_GRADIENTS)}, got {settings.plan_gradient!r}")
