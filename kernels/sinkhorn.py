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
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import sinkhorn_eager, sinkhorn_large, sinkhorn_small
from kernels.dispatch import as_count, as_number, require_tensors, require_tensors_or_none, resolve, values_are_readable
from kernels.registration import operator

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
    """Solve a batch of ragged transport problems by Sinkhorn's iteration, differentiably.

    The formula stands at the head of this file. The gradient is exact for the result of `iterations` steps (neither
    implicit nor an envelope), from all three outputs, with respect to cost, dustbin, log_a and log_b.

    Args:
        cost_BNM: costs; float32, bfloat16, float16, or float64 where the eager form runs; N, M from 0 to 2048. A NaN
            that counts makes NaN of its item's plan, slacks and gradients and of the dustbin's gradient, of no other's.
        rows_B, cols_B: integers in [0, N] and [0, M]: how many rows and columns of an item count; None: all. The rest
            is padding and may hold anything, also NaN. On a GPU they are clamped.
        eps: the regularisation, a number > 0, in the unit of the cost.
        iterations: >= 1, always all of them.
        dustbin: cost of leaving a row or column unmatched, a number or a scalar tensor: pairs that cost less match.
            None: no dustbin, the plan sums to 1 and the slacks are 0.
        slack: "full" lets every row and column go to the dustbin; "minimal" only as many as must.
        log_a_BN, log_b_BM: logarithms of masses in place of the uniform ones of that side, -inf is padding; without a
            dustbin their totals must agree.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`. `_path` forces "log" or "scaling" in tests.
    Returns:
        Transport, in the dtype of cost. Where a side is empty the plan and the gradient of cost are 0, and slacks are
            as solved: with a dustbin all mass of the other side lies in it. Where both are empty all is 0.
    Raises:
        ValueError: a shape, dtype, device, count, total or option outside of the above.
    Determinism: repeats bit for bit. Triton: an item's bits do not depend on the batch or on padding, as long as N and
        M stay within the same tile: up to 64, up to 128, or beyond.
    Names elsewhere: cost is M (POT, GeomLoss) or C (OTT); eps is reg (POT, GeomLoss) or epsilon (OTT); iterations is
        max_iter; dustbin is SuperGlue's bin score, negated.
    Source: Cuturi 2013; Sarlin et al. 2020, SuperGlue (marginals of the dustbin).
    """
    _check(cost_BNM, rows_B, cols_B, dustbin, slack, log_a_BN, log_b_BM, _path)
    eps, iterations = as_number("eps", eps), as_count("iterations", iterations)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be finite and positive, got {eps}")
    impl = resolve(impl, cost_BNM.device)
    if impl == "triton" and cost_BNM.dtype == torch.float64:
        raise ValueError("cost must not be float64 with impl='triton'")
    if isinstance(dustbin, Real):
        dustbin = cost_BNM.new_full((), float(dustbin), dtype=_inner(cost_BNM.dtype))
    marginals = (rows_B, cols_B, dustbin, log_a_BN, log_b_BM)
    return Transport(*sinkhorn_forward(cost_BNM, *marginals, eps, iterations, slack, _path, impl)[:3])


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
    N, M = cost_BNM.shape[1:]
    log_a, log_b, total_B = log_masses(cost_BNM, rows_B, cols_B, dustbin is not None, slack, log_a_BN, log_b_BM)
    valid = (log_a != -math.inf)[:, :, None] & (log_b != -math.inf)[:, None]
    Z = _exponents(cost_BNM, valid, dustbin, eps)
    v = torch.zeros_like(log_b)
    for _ in range(iterations):
        u = _half_step(log_a, Z + v[:, None], valid, 2)
        v = _half_step(log_b, Z + u[:, :, None], valid, 1)
    P = total_B[:, None, None] * torch.exp((Z + u[:, :, None] + v[:, None]).masked_fill(~valid, -math.inf))
    return Transport(P[:, :N, :M], P[:, :N, M], P[:, N, :M])


def _exponents(cost_BNM: Tensor, valid: Tensor, dustbin: Tensor | float | None, eps: float) -> Tensor:
    """Return Z [B, N+1, M+1]: -cost / eps, the bin as the last row and the last column, 0 in the padding."""
    B, N, M = cost_BNM.shape
    z = torch.as_tensor(0.0 if dustbin is None else dustbin).to(cost_BNM) / -eps
    Z = torch.where(valid[:, :N, :M], cost_BNM, 0) / -eps
    return torch.cat([torch.cat([Z, z.expand(B, N, 1)], 2), z.expand(B, 1, M + 1)], 1)


def _half_step(log_mass: Tensor, x: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return log mass - LSE of x over its valid entries; 0 where there is none."""
    some = valid.any(dim)
    x = torch.where(valid, x, -math.inf)
    return torch.where(some, log_mass - torch.logsumexp(torch.where(some.unsqueeze(dim), x, 0), dim), 0)


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
        # an item with an empty side has nowhere to send its mass
        both = ~(log_a == -math.inf).all(1) & ~(log_b == -math.inf).all(1)
        log_a, log_b = log_a.masked_fill(~both[:, None], -math.inf), log_b.masked_fill(~both[:, None], -math.inf)
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
    some = ~(log_mass == -math.inf).all(1)
    total = torch.logsumexp(torch.where(some[:, None], log_mass, 0), 1)
    return torch.where(some, total, -math.inf)


@operator("ridgeline::sinkhorn_forward")
def sinkhorn_forward(
    cost: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    dustbin: Tensor | None,
    log_a: Tensor | None,
    log_b: Tensor | None,
    eps: float,
    iterations: int,
    slack: str,
    path: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return plan, row slack, column slack, (u, v) from the start on and who scales [B].

    Potentials are for the backward: [B, N+1 + M+1, T+1], in large problems in another order; eager [B, T+1, N+1 + M+1].
    """
    N, M = cost.shape[1:]
    if impl == "triton" and max(N, M) <= sinkhorn_small.MAX_TILE:
        return sinkhorn_small.sinkhorn_small_forward(
            cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack, path
        )
    if impl == "triton":
        return sinkhorn_large.sinkhorn_large_forward(cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack)
    Z, log_mass_a, log_mass_b, total, shift = _problem(cost, rows, cols, dustbin, log_a, log_b, eps, slack)
    with torch.autocast(cost.device.type, enabled=False):
        P, potentials, scales = sinkhorn_eager.solve(Z, log_mass_a, log_mass_b, iterations, shift, path)
    plan, row_slack, col_slack = (
        (part * factor).to(cost.dtype)
        for part, factor in ((P[:, :N, :M], total), (P[:, :N, M], total[:, 0]), (P[:, N, :M], total[:, 0]))
    )
    return plan, row_slack, col_slack, potentials, scales


@operator("ridgeline::sinkhorn_backward")
def sinkhorn_backward(
    grad_plan: Tensor,
    grad_row_slack: Tensor,
    grad_col_slack: Tensor,
    cost: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    dustbin: Tensor | None,
    log_a: Tensor | None,
    log_b: Tensor | None,
    potentials: Tensor,
    scales: Tensor,
    eps: float,
    slack: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of cost, dustbin [B], log a and log b (shape [0] where there are none), item by item."""
    N, M = cost.shape[1:]
    upstream, inputs = (grad_plan, grad_row_slack, grad_col_slack), (cost, rows, cols, dustbin, log_a, log_b)
    if impl == "triton" and max(N, M) <= sinkhorn_small.MAX_TILE:
        return sinkhorn_small.sinkhorn_small_backward(*upstream, *inputs, potentials, scales, eps, slack)
    if impl == "triton":
        return sinkhorn_large.sinkhorn_large_backward(*upstream, *inputs, potentials, eps, slack)
    Z, log_mass_a, log_mass_b, total, shift = _problem(cost, rows, cols, dustbin, log_a, log_b, eps, slack)
    G = torch.zeros_like(Z)
    for part, grad, factor in zip(
        (G[:, :N, :M], G[:, :N, M], G[:, N, :M]), upstream, (total, total[:, 0], total[:, 0]), strict=True
    ):
        torch.mul(grad, factor, out=part)
    # 0 times what is in the padding of an upstream is NaN where that is
    sinkhorn_eager.only_massive(G, log_mass_a, log_mass_b)
    with torch.autocast(cost.device.type, enabled=False):
        grad_Z, grad_a, grad_b = sinkhorn_eager.reverse(G, Z, log_mass_a, log_mass_b, shift, potentials, scales)
    if dustbin is None:
        grad_a, grad_b = sinkhorn_eager.without_drift(grad_a, grad_b, log_mass_a, log_mass_b)
    grad_cost = (grad_Z[:, :N, :M] / -eps).to(cost.dtype)
    grad_dustbin = (grad_Z[:, :, M].sum(1) + grad_Z[:, N, :M].sum(1)) / -eps
    # with weights a bin's mass is the total of the other side
    grad_a, grad_a_bin = grad_a[:, :N] + _share(log_mass_a[:, :N], log_mass_b[:, M:]) * grad_b[:, M:], grad_a[:, N:]
    grad_b = grad_b[:, :M] + _share(log_mass_b[:, :M], log_mass_a[:, N:]) * grad_a_bin
    nothing = cost.new_empty(0, dtype=grad_a.dtype)
    return grad_cost, grad_dustbin, nothing if log_a is None else grad_a, nothing.clone() if log_b is None else grad_b


def _problem(cost, rows, cols, dustbin, log_a, log_b, eps, slack):
    """Return Z, log a, log b with their bins, the plan's factor [B, 1, 1] and the shift that the eager form takes."""
    cost = cost.to(_inner(cost.dtype))
    log_a, log_b, total = log_masses(cost, rows, cols, dustbin is not None, slack, log_a, log_b)
    B, N, M = cost.shape
    Z = cost.new_empty(B, N + 1, M + 1)
    torch.div(cost, -eps, out=Z[:, :N, :M])
    z = 0.0 if dustbin is None else dustbin.to(Z) / -eps
    Z[:, N], Z[:, :, M] = z, z
    return Z, log_a, log_b, total[:, None, None], z if dustbin is not None and slack == "full" else None


def _share(log_mass: Tensor, log_total: Tensor) -> Tensor:
    """Return mass / total, 0 where there is no mass or no bin."""
    return torch.where((log_mass == -math.inf) | (log_total == -math.inf), 0, torch.exp(log_mass - log_total))


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@sinkhorn_forward.register_fake
def _(cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack, path, impl):
    B, N, M = cost.shape
    length, times = N + M + 2, iterations + 1
    return (
        cost.new_empty(B, N, M),
        cost.new_empty(B, N),
        cost.new_empty(B, M),
        cost.new_empty((B, times, length) if impl == "eager" else (B, length, times), dtype=_inner(cost.dtype)),
        cost.new_empty(B, dtype=torch.bool),
    )


@sinkhorn_backward.register_fake
def _(grad_plan, grad_row_slack, grad_col_slack, cost, rows, cols, dustbin, log_a, log_b, *rest):
    (B, N, M), dtype = cost.shape, _inner(cost.dtype)
    return (
        cost.new_empty(B, N, M),
        cost.new_empty(B, dtype=dtype),
        cost.new_empty((0,) if log_a is None else (B, N), dtype=dtype),
        cost.new_empty((0,) if log_b is None else (B, M), dtype=dtype),
    )


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, _, ctx.slack, _, ctx.impl = inputs
    # what is kept for the backward has no gradients, not tensors of zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, *gradients):
    saved = ctx.saved_tensors
    cost, _, _, dustbin, log_a, log_b, *_ = saved
    B, N, M = cost.shape
    shapes = ((B, N, M), (B, N), (B, M))
    upstream = (cost.new_zeros(shape) if g is None else g for g, shape in zip(gradients, shapes, strict=False))
    grad_cost, grad_dustbin, grad_log_a, grad_log_b = sinkhorn_backward(*upstream, *saved, ctx.eps, ctx.slack, ctx.impl)
    return (
        grad_cost, None, None, grad_dustbin.sum().to(dustbin.dtype) if ctx.needs_input_grad[3] else None,
        None if log_a is None else grad_log_a.to(log_a.dtype), None if log_b is None else grad_log_b.to(log_b.dtype),
        *[None] * 5,
    )  # fmt: skip


sinkhorn_forward.register_autograd(_backward, setup_context=_save)


def _check(cost, rows, cols, dustbin, slack, log_a, log_b, path) -> None:
    """Refuse what no form of the operator takes."""
    require_tensors(cost=cost)
    require_tensors_or_none(rows=rows, cols=cols, log_a=log_a, log_b=log_b)
    if cost.dim() != 3:
        raise ValueError(f"cost must be [B, N, M], got shape {tuple(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"cost must be float32, bfloat16, float16 or float64, got {cost.dtype}")
    B, N, M = cost.shape
    if max(N, M) > MAX_SIZE:
        raise ValueError(f"cost must have at most {MAX_SIZE} rows and columns, got {N} and {M}")
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
    elif dustbin is not None and (isinstance(dustbin, bool) or not isinstance(dustbin, Real)):
        raise ValueError(f"dustbin must be a number or a tensor, got {dustbin!r}")
    elif dustbin is not None and not -math.inf < as_number("dustbin", dustbin) < math.inf:
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
    if weights is not None and (weights.shape != shape or not weights.is_floating_point() or weights.device != device):
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
