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
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import resolve, values_are_readable

MAX_SEGMENTS = 128


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
    _check_tensors(mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B)
    _check_settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient)
    resolve(impl, mid_BN3.device)
    return match_segments_reference(
        mid_BN3,
        dir_BN3,
        len_BN,
        gt_BM23,
        gt_count_B,
        direction_weight=direction_weight,
        length_weight=length_weight,
        cost_scale=cost_scale,
        eps=eps,
        iterations=iterations,
        dustbin=dustbin,
        slack=slack,
        plan_gradient=plan_gradient,
    )


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
    gt_mid_BM3, gt_len_BM = (start_BM3 + end_BM3) / 2, torch.linalg.vector_norm(end_BM3 - start_BM3, dim=-1)
    gt_dir_BM3 = (end_BM3 - start_BM3) / gt_len_BM.clamp(min=1e-12)[:, :, None]
    sign_BNM = torch.where(dir_BN3 @ gt_dir_BM3.mT >= 0, 1.0, -1.0).to(dtype)
    chord_BNM3 = dir_BN3[:, :, None] - sign_BNM[..., None] * gt_dir_BM3[:, None]
    cost_BNM = cost_scale * (
        torch.linalg.vector_norm(mid_BN3[:, :, None] - gt_mid_BM3[:, None], dim=-1)
        + direction_weight * torch.linalg.vector_norm(chord_BNM3, dim=-1)
        + length_weight * (len_BN[:, :, None] - gt_len_BM[:, None]).abs()
    )
    plan_BNM = _plan(cost_BNM, valid_BM, eps, iterations, cost_scale * dustbin, slack)
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


def _plan(cost_BNM, valid_BM, eps, iterations, dustbin, slack):
    """The plan of `sinkhorn` in the log domain, the bin as one more row and column."""
    rows, cols_B1 = cost_BNM.shape[1], valid_BM.sum(1, keepdim=True)
    none = -1e30
    if slack == "full":
        row_bin_B1, col_bin_B1 = cols_B1, torch.full_like(cols_B1, rows)
    else:
        row_bin_B1, col_bin_B1 = (cols_B1 - rows).clamp(min=0), (rows - cols_B1).clamp(min=0)
    ones_BN = cost_BNM.new_ones(cost_BNM.shape[:2])
    log_total_B1 = (cols_B1 + rows).clamp(min=1).to(cost_BNM.dtype).log()
    log_a, log_b = (
        torch.where(mass > 0, mass.to(cost_BNM.dtype).log() - log_total_B1, none)
        for mass in (torch.cat([ones_BN, row_bin_B1], 1), torch.cat([valid_BM, col_bin_B1], 1))
    )
    z = F.pad(-cost_BNM / eps, (0, 1, 0, 1), value=-dustbin / eps)
    v = torch.where(log_b > none, 0.0, none).to(z.dtype)
    for _ in range(iterations):
        u = torch.where(log_a > none, log_a - torch.logsumexp(z + v[:, None], 2), none)
        v = torch.where(log_b > none, log_b - torch.logsumexp(z + u[:, :, None], 1), none)
    plan = torch.exp(z + u[:, :, None] + v[:, None] + log_total_B1[:, :, None])
    return torch.where(valid_BM[:, None], plan[:, :-1, :-1], 0)


def _partner(plan_BNM, valid_BM):
    """The lowest valid column whose largest entry (lowest row on ties) lies in this row, else -1."""
    rows, cols = plan_BNM.shape[1:]
    if not rows or not cols:
        return torch.full(plan_BNM.shape[:2], -1, device=plan_BNM.device)
    row_N1 = torch.arange(rows, device=plan_BNM.device)[:, None]
    best_BNM = (plan_BNM.argmax(1, keepdim=True) == row_N1) & valid_BM[:, None]
    return torch.where(best_BNM.any(2), best_BNM.int().argmax(2), -1)


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


def _check_settings(direction_weight, length_weight, cost_scale, eps, iterations, dustbin, slack, plan_gradient):
    for name, value in (("direction_weight", direction_weight), ("length_weight", length_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    for name, value in (("cost_scale", cost_scale), ("eps", eps)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and positive, got {value}")
    if not math.isfinite(dustbin):
        raise ValueError(f"dustbin must be finite, got {dustbin}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}")
    if slack not in ("full", "minimal"):
        raise ValueError(f"slack must be 'full' or 'minimal', got {slack!r}")
    if plan_gradient not in ("detached", "exact"):
        raise ValueError(f"plan_gradient must be 'detached' or 'exact', got {plan_gradient!r}")
