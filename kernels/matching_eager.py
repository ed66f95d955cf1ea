"""Segment matching in PyTorch: planes [B, N, M], the gradients of both losses written by hand beside them.

Coordinates come first, [3, B, N, M], so that every operation runs over whole planes. Columns that are padding in every
item are cut off where the counts may be read. Sums are taken by PyTorch over one axis at a time.
"""

import math

import torch
from torch import Tensor

from kernels.dispatch import values_are_readable
from kernels.sinkhorn import sinkhorn_backward, sinkhorn_forward


def match_segments_forward_eager(
    mid_BN3: Tensor, dir_BN3: Tensor, len_BN: Tensor, gt_BM23: Tensor, gt_count_B: Tensor, settings, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return transport, endpoint, matched, partner, and the gradients [B, 2, 7, N] (of size 0 without need_grad)."""
    dtype = torch.promote_types(mid_BN3.dtype, torch.float32)
    mid_BN3, dir_BN3, len_BN = mid_BN3.to(dtype), dir_BN3.to(dtype), len_BN.to(dtype)
    if values_are_readable(gt_count_B):
        gt_BM23 = gt_BM23[:, : max(gt_count_B.tolist(), default=0)]
    (B, N), M = len_BN.shape, gt_BM23.shape[1]
    gt_count_B = gt_count_B.clamp(0, M)
    grads_B27N = len_BN.new_zeros((B, 2, 7, N) if need_grad else 0)
    if not B * N * M:
        partner_BN = torch.full((B, N), -1, device=len_BN.device)
        return len_BN.new_zeros(B), len_BN.new_zeros(B), torch.zeros_like(len_BN), partner_BN, grads_B27N
    valid_BM = torch.arange(M, device=gt_BM23.device) < gt_count_B[:, None]
    start_BM3, end_BM3 = torch.where(valid_BM[:, :, None, None], gt_BM23.to(dtype), 0).unbind(2)
    gt_len_BM = torch.linalg.vector_norm(end_BM3 - start_BM3, dim=-1)
    gt_dir_BM3 = (end_BM3 - start_BM3) / gt_len_BM.clamp(min=1e-12)[:, :, None]

    delta_3BNM = _rows(mid_BN3) - _columns((start_BM3 + end_BM3) / 2)
    sign_BNM = (dir_BN3 @ gt_dir_BM3.mT >= 0).to(dtype).mul_(2).sub_(1)
    chord_3BNM = _rows(dir_BN3) - _columns(gt_dir_BM3) * sign_BNM
    gap_BNM = len_BN[:, :, None] - gt_len_BM[:, None]
    distance_BNM, angle_BNM = _length(delta_3BNM), _length(chord_3BNM)
    cost_BNM = distance_BNM + settings.direction_weight * angle_BNM + settings.length_weight * gap_BNM.abs()
    cost_BNM *= settings.cost_scale

    share_B11 = 1 / gt_count_B.clamp(min=1).to(dtype)[:, None, None]
    exact = need_grad and settings.plan_gradient == "exact"
    plan_BNM, indirect_BNM = _solve(cost_BNM, gt_count_B, settings, cost_BNM * share_B11 if exact else None)
    transport_B = (plan_BNM * cost_BNM).sum((1, 2)) * share_B11[:, 0, 0]
    if need_grad:
        pull_BNM = settings.cost_scale * (plan_BNM * share_B11 + indirect_BNM)
        grads_B27N[:, 0, :3] = _over_columns(_unit(delta_3BNM, distance_BNM) * pull_BNM)
        grads_B27N[:, 0, 3:6] = _over_columns(_unit(chord_3BNM, angle_BNM) * (settings.direction_weight * pull_BNM))
        grads_B27N[:, 0, 6] = (gap_BNM.sign_() * (settings.length_weight * pull_BNM)).sum(2)
    endpoint_B = _endpoint(plan_BNM, delta_3BNM, dir_BN3, len_BN, (end_BM3 - start_BM3) / 2, grads_B27N)
    return transport_B, endpoint_B, plan_BNM.sum(2).clamp_(max=1), _partner(plan_BNM, valid_BM), grads_B27N


def match_segments_backward_eager(
    grad_transport_B: Tensor, grad_endpoint_B: Tensor, grads_B27N: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of mid, dir and len."""
    upstream_B211 = torch.stack([grad_transport_B, grad_endpoint_B], 1)[:, :, None, None]
    grad_BN7 = (upstream_B211 * grads_B27N).sum(1).mT
    mid_BN3, dir_BN3, len_BN1 = (
        grad.to(dtype, copy=True, memory_format=torch.contiguous_format) for grad in grad_BN7.split([3, 3, 1], 2)
    )
    return mid_BN3, dir_BN3, len_BN1[:, :, 0]


def _solve(cost_BNM: Tensor, gt_count_B: Tensor, settings, upstream_BNM: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Return the plan, and the gradient of sum(upstream * plan) with respect to the cost: 0 without an upstream."""
    eps, slack = settings.eps, settings.slack
    problem = (None, gt_count_B, cost_BNM.new_full((), settings.cost_scale * settings.dustbin), None, None)
    plan_BNM, row_slack_BN, col_slack_BM, *state = sinkhorn_forward(
        cost_BNM, *problem, eps, settings.iterations, slack, "auto", "eager"
    )
    if upstream_BNM is None:
        return plan_BNM, 0
    no_slack = torch.zeros_like(row_slack_BN), torch.zeros_like(col_slack_BM)
    grad_cost_BNM, *_ = sinkhorn_backward(upstream_BNM, *no_slack, cost_BNM, *problem, *state, eps, slack, "eager")
    return plan_BNM, grad_cost_BNM


def _endpoint(
    plan_BNM: Tensor, delta_3BNM: Tensor, dir_BN3: Tensor, len_BN: Tensor, gt_half_BM3: Tensor, grads_B27N: Tensor
) -> Tensor:
    """Return the endpoint loss [B], and fill in its gradients where there is room for them.

    With x = m_i - m_j and y = h_i - h_j, half vectors, |p_i - p_j| + |q_i - q_j| = |x - y| + |x + y| = 2 max(|x|, |y|).
    """
    half_3BN1, gt_half_3B1M = _rows(dir_BN3 * len_BN[:, :, None] / 2), _columns(gt_half_BM3)
    x_3BNM = delta_3BNM.abs()
    same_BNM = torch.maximum(x_3BNM, (half_3BN1 - gt_half_3B1M).abs_()).sum(0)
    swapped_BNM = torch.maximum(x_3BNM, (half_3BN1 + gt_half_3B1M).abs_()).sum(0)
    share_B11 = 1 / plan_BNM.sum((1, 2), keepdim=True).clamp_(min=1e-6)
    endpoint_B = (plan_BNM * torch.minimum(same_BNM, swapped_BNM)).sum((1, 2)) * share_B11[:, 0, 0]
    if grads_B27N.numel():
        order_BNM = (same_BNM <= swapped_BNM).to(plan_BNM.dtype).mul_(2).sub_(1)
        y_3BNM = half_3BN1 - gt_half_3B1M * order_BNM
        pull_BNM = plan_BNM * (share_B11 / 2)
        start_B3N = _over_columns((delta_3BNM - y_3BNM).sign_() * pull_BNM)
        end_B3N = _over_columns((delta_3BNM + y_3BNM).sign_() * pull_BNM)
        half_B3N = (end_B3N - start_B3N) / 2
        grads_B27N[:, 1, :3] = start_B3N + end_B3N
        grads_B27N[:, 1, 3:6] = half_B3N * len_BN[:, None]
        grads_B27N[:, 1, 6] = (half_B3N * dir_BN3.mT).sum(1)
    return endpoint_B


def _partner(plan_BNM: Tensor, valid_BM: Tensor) -> Tensor:
    """Return the lowest valid column whose largest entry (lowest row on ties) lies in each row, else -1."""
    (N, M), like = plan_BNM.shape[1:], {"dtype": plan_BNM.dtype, "device": plan_BNM.device}
    # indices counted from the end, so that the lowest is the largest: amax takes a tenth of the time of argmax
    row_N1, col_M = torch.arange(N, 0, -1, **like)[:, None], torch.arange(M, 0, -1, **like)
    best_B1M = ((plan_BNM == plan_BNM.amax(1, keepdim=True)) * row_N1).amax(1, keepdim=True)
    first_BN = ((best_B1M == row_N1) * (col_M * valid_BM)[:, None]).amax(2)
    return torch.where(first_BN > 0, M - first_BN, -1).long()


def _rows(x_BN3: Tensor) -> Tensor:
    return x_BN3.movedim(2, 0).contiguous()[:, :, :, None]


def _columns(x_BM3: Tensor) -> Tensor:
    return x_BM3.movedim(2, 0).contiguous()[:, :, None]


def _over_columns(x_3BNM: Tensor) -> Tensor:
    """Return the sum over the true segments, [B, 3, N]."""
    return x_3BNM.sum(3).movedim(0, 1)


def _length(x_3BNM: Tensor) -> Tensor:
    """Return the norm over the first axis, where `vector_norm` is 70 times slower."""
    return (x_3BNM * x_3BNM).sum(0).sqrt_()


def _unit(x_3BNM: Tensor, length_BNM: Tensor) -> Tensor:
    """Return x / |x|, and 0 where |x| is at most 1e-18, as the Triton form: beyond, squares lose digits."""
    return x_3BNM / length_BNM.masked_fill(length_BNM <= 1e-18, math.inf)
