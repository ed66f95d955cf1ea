"""Batched, ragged entropic optimal transport with a dustbin, solved and differentiated in a fixed number of iterations.

Per item with n = rows, m = cols, s = n + m, Z = -C / eps, z = -dustbin / eps (also the corner):

    a_i = b_j = 1/s;   slack "full": a_bin = m/s, b_bin = n/s;   "minimal": a_bin = max(m-n, 0)/s, b_bin = max(n-m, 0)/s
    v = 0, v_bin = 0;   `iterations` times, rows then columns, bins included; a bin without mass takes no part:
        u_i = log a_i - LSE_j(Z_ij + v_j, z + v_bin),   u_bin = log a_bin - LSE_j(z + v_j, z + v_bin)
        v_j = log b_j - LSE_i(Z_ij + u_i, z + u_bin),   v_bin = log b_bin - LSE_i(z + u_i, z + u_bin)
    plan = s exp(Z + u + v),   row_slack_i = s exp(z + u_i + v_bin),   col_slack_j = s exp(z + u_bin + v_j)

A fully matched row has mass 1. Columns are exact after the last half-step, rows only at convergence.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import resolve, values_are_readable

MAX_SIZE = 2048
SLACKS = ("full", "minimal")
PATHS = ("auto", "log", "scaling")


class Transport(NamedTuple):
    """A transport plan and what each row and column leaves in the dustbin."""

    plan_BNM: Tensor
    row_slack_BN: Tensor
    col_slack_BM: Tensor


def sinkhorn(
    cost_BNM: Tensor,
    *,
    rows_B: Tensor | None = None,
    cols_B: Tensor | None = None,
    eps: float,
    iterations: int,
    dustbin: Tensor | float | None = None,
    slack: str = "full",
    log_a_BN: Tensor | None = None,
    log_b_BM: Tensor | None = None,
    impl: str = "auto",
    _path: str = "auto",
) -> Transport:
    """Solve a batch of ragged transport problems by Sinkhorn's iteration, differentiably."""
    _check(cost_BNM, rows_B, cols_B, eps, iterations, dustbin, slack, log_a_BN, log_b_BM, _path)
    impl = resolve(impl, cost_BNM.device)
    return sinkhorn_reference(
        cost_BNM,
        rows_B=rows_B,
        cols_B=cols_B,
        eps=eps,
        iterations=iterations,
        dustbin=dustbin,
        slack=slack,
        log_a_BN=log_a_BN,
        log_b_BM=log_b_BM,
    )


def sinkhorn_reference(
    cost_BNM: Tensor,
    *,
    rows_B: Tensor | None = None,
    cols_B: Tensor | None = None,
    eps: float,
    iterations: int,
    dustbin: Tensor | float | None = None,
    slack: str = "full",
    log_a_BN: Tensor | None = None,
    log_b_BM: Tensor | None = None,
) -> Transport:
    """Compute the formula of this module in the log domain with autograd, in any float dtype: the meaning."""
    B, N, M = cost_BNM.shape
    log_a, log_b, total_B = log_masses(cost_BNM, rows_B, cols_B, dustbin is not None, slack, log_a_BN, log_b_BM)
    valid = (log_a > -math.inf)[:, :, None] & (log_b > -math.inf)[:, None]

    # the bin is the last row and the last column
    z = torch.as_tensor(0.0 if dustbin is None else dustbin).to(cost_BNM) / -eps
    Z = torch.where(valid[:, :N, :M], cost_BNM, 0) / -eps
    Z = torch.cat([torch.cat([Z, z.expand(B, N, 1)], 2), z.expand(B, 1, M + 1)], 1)

    v = torch.zeros_like(log_b)
    for _ in range(iterations):
        u = _half_step(log_a, Z + v[:, None], valid, 2)
        v = _half_step(log_b, Z + u[:, :, None], valid, 1)
    P = total_B[:, None, None] * torch.exp((Z + u[:, :, None] + v[:, None]).masked_fill(~valid, -math.inf))
    return Transport(P[:, :N, :M], P[:, :N, M], P[:, N, :M])


def log_masses(
    cost_BNM: Tensor,
    rows_B: Tensor | None,
    cols_B: Tensor | None,
    has_bin: bool,
    slack: str,
    log_a_BN: Tensor | None,
    log_b_BM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log a [B, N+1], log b [B, M+1] (the bin last, -inf where there is no mass) and the plan's factor [B]."""
    B, N, M = cost_BNM.shape
    weighted = log_a_BN is not None or log_b_BM is not None
    n, m = _count(rows_B, B, N, cost_BNM), _count(cols_B, B, M, cost_BNM)
    total = n + m if has_bin and not weighted else torch.ones_like(n)
    log_a = _uniform(n, N, total if has_bin and not weighted else n) if log_a_BN is None else log_a_BN.to(cost_BNM)
    log_b = _uniform(m, M, total if has_bin and not weighted else m) if log_b_BM is None else log_b_BM.to(cost_BNM)
    if not has_bin:
        a_bin = b_bin = torch.full_like(n, -math.inf)
    elif weighted:
        a_bin, b_bin = _log_total(log_b), _log_total(log_a)
    else:
        a_bin, b_bin = (m, n) if slack == "full" else ((m - n).clamp(min=0), (n - m).clamp(min=0))
        a_bin, b_bin = torch.log(a_bin / total.clamp(min=1)), torch.log(b_bin / total.clamp(min=1))
    return torch.cat([log_a, a_bin[:, None]], 1), torch.cat([log_b, b_bin[:, None]], 1), total


def _count(count_B: Tensor | None, B: int, size: int, like: Tensor) -> Tensor:
    if count_B is None:
        return torch.full((B,), size, dtype=like.dtype, device=like.device)
    return count_B.clamp(0, size).to(like.dtype)


def _uniform(count_B: Tensor, size: int, total_B: Tensor) -> Tensor:
    real = torch.arange(size, device=count_B.device) < count_B[:, None]
    return torch.where(real, -torch.log(total_B.clamp(min=1))[:, None], -math.inf)


def _log_total(log_mass: Tensor) -> Tensor:
    """Return log sum exp over the last axis; -inf, without a gradient, where nothing has mass."""
    some = (log_mass > -math.inf).any(1) | log_mass.isnan().any(1)
    total = torch.logsumexp(torch.where(some[:, None], log_mass, 0), 1) if log_mass.shape[1] else log_mass.sum(1)
    return torch.where(some, total, -math.inf)


def _half_step(log_mass: Tensor, x: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return log mass - LSE of x over its valid entries; 0 where there is none."""
    some = valid.any(dim)
    x = torch.where(valid, x, -math.inf)
    return torch.where(some, log_mass - torch.logsumexp(torch.where(some.unsqueeze(dim), x, 0), dim), 0)


def _check(cost, rows, cols, eps, iterations, dustbin, slack, log_a, log_b, path) -> None:
    """Refuse what no form of the operator takes."""
    if cost.dim() != 3:
        raise ValueError(f"cost must be [B, N, M], got shape {tuple(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"cost must be float32, bfloat16, float16 or float64, got {cost.dtype}")
    B, N, M = cost.shape
    if max(N, M) > MAX_SIZE:
        raise ValueError(f"cost must have at most {MAX_SIZE} rows and columns, got {N} and {M}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be an integer of at least 1, got {iterations!r}")
    if slack not in SLACKS:
        raise ValueError(f"slack must be one of {', '.join(SLACKS)}, got {slack!r}")
    if path not in PATHS:
        raise ValueError(f"_path must be one of {', '.join(PATHS)}, got {path!r}")
    if slack == "minimal" and (dustbin is None or log_a is not None or log_b is not None):
        raise ValueError("slack='minimal' must come with a dustbin and without log_a and log_b")
    _check_dustbin(dustbin, cost)
    for name, count, size, weights in (("rows", rows, N, "log_a"), ("cols", cols, M, "log_b")):
        if count is not None and (log_a if name == "rows" else log_b) is not None:
            raise ValueError(f"{name} must be None where {weights} is given: its -inf entries are the padding")
        _check_counts(name, count, B, size, cost.device)
    _check_weights("log_a", log_a, (B, N), cost.device)
    _check_weights("log_b", log_b, (B, M), cost.device)
    if dustbin is None and (log_a is not None or log_b is not None) and values_are_readable(cost):
        _check_totals(cost, rows, cols, log_a, log_b)


def _check_dustbin(dustbin, cost) -> None:
    if isinstance(dustbin, Tensor):
        if dustbin.dim() != 0 or not dustbin.is_floating_point() or dustbin.device != cost.device:
            raise ValueError(
                f"dustbin must be a number or a float tensor of shape [] on {cost.device}, "
                f"got {dustbin.dtype} of shape {tuple(dustbin.shape)} on {dustbin.device}"
            )
    elif dustbin is not None and not math.isfinite(dustbin):
        raise ValueError(f"dustbin must be finite, got {dustbin}")


def _check_counts(name: str, count: Tensor | None, B: int, size: int, device: torch.device) -> None:
    if count is None:
        return
    if count.shape != (B,) or count.dtype not in (torch.int32, torch.int64) or count.device != device:
        raise ValueError(
            f"{name} must be int32 or int64 of shape [{B}] on {device}, "
            f"got {count.dtype} of shape {tuple(count.shape)} on {count.device}"
        )
    if values_are_readable(count) and bool(((count < 0) | (count > size)).any()):
        raise ValueError(f"{name} must lie in [0, {size}], got {count.tolist()}")


def _check_weights(name: str, weights: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if weights is None:
        return
    if weights.shape != shape or not weights.is_floating_point() or weights.device != device:
        raise ValueError(
            f"{name} must be float of shape {list(shape)} on {device}, "
            f"got {weights.dtype} of shape {tuple(weights.shape)} on {weights.device}"
        )


def _check_totals(cost, rows, cols, log_a, log_b) -> None:
    """Without a dustbin both sides must hold the same mass, item by item."""
    with torch.no_grad():
        a, b, _ = log_masses(cost.float(), rows, cols, False, "full", log_a, log_b)
        gap = (_log_total(a) - _log_total(b)).abs()
    slop = max(1e-3, *(16 * torch.finfo(w.dtype).eps for w in (log_a, log_b) if w is not None))
    if bool(((gap > slop) & gap.isfinite()).any()):
        raise ValueError(f"log_a and log_b must have equal totals without a dustbin, got log ratios {gap.tolist()}")
