"""Sinkhorn for 129 to 2,048 rows or columns: two launches per iteration, always in the log domain.

Every half-step is one launch: a program owns a few rows (or columns) of one item and walks over all columns (or rows),
many at a time: what it waits for are costs and potentials from the L2 cache. Bins are row N and column M. The reverse
pass walks back the same way and keeps only vectors; a last launch puts the gradient of every cost together from those
of all iterations:

    E_t = exp(Z + u_t + v_t),  F_t = exp(Z + u_t + v_{t-1}),  W = G E_T,  from t = T down to 1:
        beta_t  = colsum W, later -colsum(F_{t+1} p_{t+1});    q_t = beta_t / colsum E_t
        alpha_t = (t = T: rowsum W) - rowsum(E_t q_t);         p_t = alpha_t / rowsum F_t
    dZ = W - sum_t (E_t q_t + F_t p_t),  d log a = sum_t alpha_t,  d log b = sum_t beta_t

Sums run over blocks of fixed size in ascending order, element by element, then inside a block, then comes the bin: an
item's bits depend on its own values alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sinkhorn_layout import INF, col_offsets, row_offsets
from kernels.sinkhorn_small import load_masses

# rows (or columns) of a program of a half-step, columns (or rows) that it takes at a time, and the side of a tile where
# every cost has one program; iterations whose numbers such a tile loads together
OWN, OTHER, TILE, UNROLL, WARPS = 16, 128, 32, 4, 8
UNSPECIALIZED = ["N", "M", "T", "cost_b", "cost_n", "cost_m", "grad_b", "grad_n", "grad_m", "t"]


def sinkhorn_large_forward(
    cost: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    dustbin: Tensor | None,
    log_a: Tensor | None,
    log_b: Tensor | None,
    eps: float,
    iterations: int,
    slack: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return plan, row slack, column slack, (u, v) from the start on and who scales: nobody [B].

    The potentials have the small form's shape, [B, N+1 + M+1, T+1], and another order: those of one time side by side.
    """
    B, N, M = cost.shape
    plan, row_slack, col_slack = cost.new_empty(B, N, M), cost.new_empty(B, N), cost.new_empty(B, M)
    history = cost.new_empty(B, iterations + 1, N + M + 2, dtype=torch.float32)
    history[:, 0] = 0
    if B:
        problem, factor = _problem(cost, rows, cols, dustbin, log_a, log_b, iterations, history, eps, slack)
        for t in range(1, iterations + 1):
            for axis, grid in _half_steps(B, N, M):
                _sinkhorn_large_fwd_kernel[grid](*problem, t, AXIS=axis, OWN=OWN, OTHER=OTHER, num_warps=WARPS)
        _sinkhorn_large_plan_kernel[_tiles(B, N, M)](*problem, factor, plan, row_slack, col_slack, TILE=TILE)
    potentials = history.view(B, N + M + 2, iterations + 1)
    return plan, row_slack, col_slack, potentials, cost.new_zeros(B, dtype=torch.bool)


def sinkhorn_large_backward(
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
    eps: float,
    slack: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of cost, dustbin [B], log a and log b (shape [0] where there are none), item by item."""
    B, N, M = cost.shape
    grad_cost = cost.new_empty(B, N, M)
    shapes = (B,), (0,) if log_a is None else (B, N), (0,) if log_b is None else (B, M)
    grad_dustbin, grad_a, grad_b = (cost.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if B:
        T = potentials.shape[2] - 1
        problem, factor = _problem(cost, rows, cols, dustbin, log_a, log_b, T, potentials, eps, slack)
        slacks = grad_row_slack.contiguous(), grad_col_slack.contiguous()
        upstream = (grad_plan, *grad_plan.stride(), *slacks, factor)
        coefficients, grad_masses, grad_bins = torch.empty_like(potentials), *potentials.new_empty(2, B, N + M + 2)
        for t in range(T, 0, -1):
            for axis, grid in reversed(_half_steps(B, N, M)):
                _sinkhorn_large_bwd_kernel[grid](
                    *problem,
                    *upstream,
                    coefficients,
                    grad_masses,
                    t,
                    AXIS=axis,
                    LAST=t == T,
                    OWN=OWN,
                    OTHER=OTHER,
                    num_warps=WARPS,
                )
        _sinkhorn_large_grad_kernel[_tiles(B, N, M)](
            *problem, *upstream, coefficients, grad_cost, grad_bins, TILE=TILE, UNROLL=UNROLL
        )
        grads = None if log_a is None else grad_a, None if log_b is None else grad_b
        _sinkhorn_large_vectors_kernel[(B,)](*problem, grad_bins, grad_masses, grad_dustbin, *grads, BLOCK=OTHER)
    return grad_cost, grad_dustbin, grad_a, grad_b


def _problem(cost, rows, cols, dustbin, log_a, log_b, T, history, eps, slack):
    """Return the arguments that say what is to be solved, and the plan's factor [B]."""
    B, N, M = cost.shape
    vectors = [None if x is None else x.contiguous() for x in (rows, cols, log_a, log_b)]
    mass_a, mass_b, factor = (cost.new_empty(shape, dtype=torch.float32) for shape in ((B, N + 1), (B, M + 1), (B,)))
    sizes = {"BLOCK_N": max(16, triton.next_power_of_2(N)), "BLOCK_M": max(16, triton.next_power_of_2(M))}
    _sinkhorn_large_masses_kernel[(B,)](
        *vectors, dustbin, N, M, mass_a, mass_b, factor, MINIMAL=slack == "minimal", **sizes
    )
    return (cost, *cost.stride(), mass_a, mass_b, history, dustbin, N, M, T, -1.0 / eps), factor


def _half_steps(B: int, N: int, M: int) -> list[tuple[int, tuple]]:
    """Return (axis that is summed over, grid) of the row half-step and of the column half-step; bins included."""
    return [(1, (B, triton.cdiv(N + 1, OWN))), (0, (B, triton.cdiv(M + 1, OWN)))]


def _tiles(B: int, N: int, M: int) -> tuple:
    return B, triton.cdiv(N + 1, TILE), triton.cdiv(M + 1, TILE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_masses_kernel(
    rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, N, M, mass_a_ptr, mass_b_ptr, factor_ptr,
    MINIMAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    row, col, bin = row_offsets(BLOCK_N, 16), col_offsets(BLOCK_M, 16), tl.zeros([1, 1, 1, 1], tl.int32)
    masses, factor = load_masses(item, rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, row, col, N, M, MINIMAL)
    tl.store(mass_a_ptr + item * (N + 1) + row, masses[0], mask=row < N)
    tl.store(mass_a_ptr + item * (N + 1) + N + bin, masses[1])
    tl.store(mass_b_ptr + item * (M + 1) + col, masses[2], mask=col < M)
    tl.store(mass_b_ptr + item * (M + 1) + M + bin, masses[3])
    tl.store(factor_ptr + item, factor)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_fwd_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    t, AXIS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    own, size = tl.program_id(1) * OWN + tl.arange(0, OWN), M if AXIS == 1 else N
    # u_t = log a - LSE(Z + v_{t-1}), or v_t = log b - LSE(Z + u_t), with the true maximum
    since = t - AXIS
    row_last, col_last = _indices(own, tl.full([1], size, tl.int32), AXIS)
    x_bin = _seen(problem, row_last, col_last, since, AXIS)
    zeros = _zeros(OWN, OTHER, AXIS)
    top, total = zeros - INF, zeros
    for start in range(0, size, OTHER):
        row, col = _indices(own, _block(start, size, OTHER), AXIS)
        top = tl.maximum(top, _seen(problem, row, col, since, AXIS))
    highest = tl.maximum(tl.max(top, AXIS, keep_dims=True), x_bin)
    highest = tl.where(highest == -INF, 0.0, highest)
    for start in range(0, size, OTHER):
        row, col = _indices(own, _block(start, size, OTHER), AXIS)
        total += tl.exp(_seen(problem, row, col, since, AXIS) - highest)
    lse = highest + tl.log(tl.sum(total, AXIS, keep_dims=True) + tl.exp(x_bin - highest))
    log_a, log_b = _log_masses(problem, row_last, col_last)
    log_mass = log_a if AXIS == 1 else log_b
    at, inside = _vector(problem[5], row_last, col_last, t, N, M, AXIS)
    tl.store(at, tl.where(log_mass == -INF, 0.0, log_mass - lse), inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_plan_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    factor_ptr, plan_ptr, row_slack_ptr, col_slack_ptr, TILE: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    item, row, col = _tile(TILE)
    u, v = _number(problem[5], row, col, T, N, M, 1), _number(problem[5], row, col, T, N, M, 0)
    P = tl.load(factor_ptr + item) * tl.exp(_exponents(problem, row, col) + u + v)
    tl.store(plan_ptr + (item * N + row) * M + col, P, (row < N) & (col < M))
    tl.store(row_slack_ptr + item * N + row + col * 0, P, (row < N) & (col == M))
    tl.store(col_slack_ptr + item * M + col + row * 0, P, (row == N) & (col < M))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_bwd_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr,
    coefficients_ptr, grad_masses_ptr, t, AXIS: tl.constexpr, LAST: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M)
    coefficients_at = _of_item(coefficients_ptr, N, M, T)
    own, size = tl.program_id(1) * OWN + tl.arange(0, OWN), M if AXIS == 1 else N
    row_last, col_last = _indices(own, tl.full([1], size, tl.int32), AXIS)
    adjoint_bin, total_bin = _adjoint(problem, upstream, coefficients_at, row_last, col_last, t, AXIS, LAST)
    adjoint, total = _zeros(OWN, OTHER, AXIS), _zeros(OWN, OTHER, AXIS)
    for start in range(0, size, OTHER):
        row, col = _indices(own, _block(start, size, OTHER), AXIS)
        adjoint_part, total_part = _adjoint(problem, upstream, coefficients_at, row, col, t, AXIS, LAST)
        adjoint += adjoint_part
        total += total_part
    adjoint_sum = tl.sum(adjoint, AXIS, keep_dims=True) + adjoint_bin
    total_sum = tl.sum(total, AXIS, keep_dims=True) + total_bin
    # alpha / rowsum F, or beta / colsum E
    at, inside = _vector(coefficients_at, row_last, col_last, t, N, M, AXIS)
    tl.store(at, tl.where(total_sum == 0, 0.0, adjoint_sum / total_sum), inside)
    at, inside = _vector(_of_item(grad_masses_ptr, N, M, 0), row_last, col_last, 0, N, M, AXIS)
    if not LAST:
        adjoint_sum += tl.load(at, inside, other=0.0)
    tl.store(at, adjoint_sum, inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_grad_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr,
    coefficients_ptr, grad_cost_ptr, grad_bins_ptr, TILE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M)
    history_at, coefficients_at = problem[5], _of_item(coefficients_ptr, N, M, T)
    item, row, col = _tile(TILE)
    Z = _exponents(problem, row, col)
    u, v = _number(history_at, row, col, T, N, M, 1), _number(history_at, row, col, T, N, M, 0)
    # dZ = W - sum_t (E_t q_t + F_t p_t)
    dZ = _load_upstream(problem, upstream, row, col) * tl.exp(Z + u + v)
    for back in tl.range(0, T, loop_unroll_factor=UNROLL):
        t = T - back
        q, p = _number(coefficients_at, row, col, t, N, M, 0), _number(coefficients_at, row, col, t, N, M, 1)
        E = tl.exp(Z + u + v)
        v = _number(history_at, row, col, t - 1, N, M, 0)
        dZ -= E * q + tl.exp(Z + u + v) * p
        u = _number(history_at, row, col, t - 1, N, M, 1)
    tl.store(grad_cost_ptr + (item * N + row) * M + col, neg_inv_eps * dZ, (row < N) & (col < M))
    bins_at = _of_item(grad_bins_ptr, N, M, 0)
    tl.store(bins_at + row + col * 0, dZ, (row <= N) & (col == M))
    tl.store(bins_at + N + 1 + col + row * 0, dZ, (row == N) & (col < M))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_vectors_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_bins_ptr, grad_masses_ptr, grad_dustbin_ptr, grad_a_ptr, grad_b_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    item = tl.program_id(0).to(tl.int64)
    # d dustbin = -(sum of dZ over the bin's column, row and corner) / eps
    bins_at = _of_item(grad_bins_ptr, N, M, 0)
    dZr, dZc = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    offs = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        dZr += tl.load(bins_at + start + offs, start + offs < N, other=0.0)
    for start in range(0, M, BLOCK):
        dZc += tl.load(bins_at + N + 1 + start + offs, start + offs < M, other=0.0)
    tl.store(grad_dustbin_ptr + item, neg_inv_eps * (tl.sum(dZr) + tl.sum(dZc) + tl.load(bins_at + N)))
    # with weights and a dustbin, a_bin = sum b and b_bin = sum a
    grad_a_at = _of_item(grad_masses_ptr, N, M, 0)
    grad_b_at = grad_a_at + N + 1
    log_a_bin, log_b_bin = tl.load(problem[3] + N), tl.load(problem[4] + M)
    if grad_a_ptr is not None:
        for start in range(0, N, BLOCK):
            _weights_grad(start, N, item, grad_a_at, tl.load(grad_b_at + M), problem[3], log_b_bin, grad_a_ptr, BLOCK)
    if grad_b_ptr is not None:
        for start in range(0, M, BLOCK):
            _weights_grad(start, M, item, grad_b_at, tl.load(grad_a_at + N), problem[4], log_a_bin, grad_b_ptr, BLOCK)


@triton.jit
def _weights_grad(start, size, item, own_at, grad_bin, log_mass_at, log_bin, grad_ptr, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    log_mass = tl.load(log_mass_at + offs, offs < size, other=-INF)
    share = tl.where(log_mass == -INF, 0.0, tl.where(log_bin == -INF, 0.0, tl.exp(log_mass - log_bin)))
    tl.store(grad_ptr + item * size + offs, tl.load(own_at + offs, offs < size) + grad_bin * share, offs < size)


@triton.jit
def _adjoint(problem, upstream, coefficients_at, row, col, t, AXIS: tl.constexpr, LAST: tl.constexpr):
    """Return what is summed to alpha_t and to rowsum F_t, or to beta_t and to colsum E_t."""
    history_at, N, M = problem[5], problem[8], problem[9]
    Z = _exponents(problem, row, col)
    u, v = _number(history_at, row, col, t, N, M, 1), _number(history_at, row, col, t, N, M, 0)
    E = tl.exp(Z + u + v)
    if AXIS == 1:
        adjoint = -E * _number(coefficients_at, row, col, t, N, M, 0)
        if LAST:
            adjoint += _load_upstream(problem, upstream, row, col) * E
        total = tl.exp(Z + u + _number(history_at, row, col, t - 1, N, M, 0))
    else:
        if LAST:
            adjoint = _load_upstream(problem, upstream, row, col) * E
        else:
            F = tl.exp(Z + _number(history_at, row, col, t + 1, N, M, 1) + v)
            adjoint = -F * _number(coefficients_at, row, col, t + 1, N, M, 1)
        total = E
    return adjoint, total


@triton.jit
def _seen(problem, row, col, t, AXIS: tl.constexpr):
    """Return what a row half-step takes the maximum and the sum of, Z + v, or a column half-step, Z + u."""
    return _exponents(problem, row, col) + _number(problem[5], row, col, t, problem[8], problem[9], 1 - AXIS)


@triton.jit
def _exponents(problem, row, col):
    """Return Z, -inf where either side has no mass.

    Costs are read before it is known where there is mass: no load waits for another one.
    """
    cost_at, cost_n, cost_m, _, _, _, z, neg_inv_eps, N, M = problem
    log_a, log_b = _log_masses(problem, row, col)
    at = cost_at + row.to(tl.int64) * cost_n + col.to(tl.int64) * cost_m
    Z = tl.load(at, (row < N) & (col < M), other=0.0).to(tl.float32) * neg_inv_eps
    Z = tl.where((row == N) | (col == M), z, Z)
    return tl.where((log_a != -INF) & (log_b != -INF), Z, -INF)


@triton.jit
def _load_upstream(problem, upstream, row, col):
    """Return G: the upstream gradients of plan, row slack and column slack, times the plan's factor."""
    grad_at, grad_n, grad_m, grad_row_at, grad_col_at, factor = upstream
    N, M = problem[8], problem[9]
    log_a, log_b = _log_masses(problem, row, col)
    taken = (log_a != -INF) & (log_b != -INF)
    at = grad_at + row.to(tl.int64) * grad_n + col.to(tl.int64) * grad_m
    G = tl.load(at, taken & (row < N) & (col < M), other=0.0).to(tl.float32)
    G += tl.load(grad_row_at + row + col * 0, taken & (row < N) & (col == M), other=0.0).to(tl.float32)
    G += tl.load(grad_col_at + col + row * 0, taken & (row == N) & (col < M), other=0.0).to(tl.float32)
    return factor * G


@triton.jit
def _log_masses(problem, row, col):
    """Return log a of rows and log b of columns, -inf beyond the bin."""
    N, M = problem[8], problem[9]
    return tl.load(problem[3] + row, row <= N, other=-INF), tl.load(problem[4] + col, col <= M, other=-INF)


@triton.jit
def _number(at, row, col, t, N, M, AXIS: tl.constexpr):
    """Return the numbers of time t that rows (1) or columns (0) have, 0 where there are none."""
    at, inside = _vector(at, row, col, t, N, M, AXIS)
    return tl.load(at, inside, other=0.0)


@triton.jit
def _vector(at, row, col, t, N, M, AXIS: tl.constexpr):
    """Return where rows (1) or columns (0) have their number of time t, and which of them exist."""
    at += tl.cast(t, tl.int64) * (N + M + 2)
    if AXIS == 1:
        at, inside = at + row, row <= N
    else:
        at, inside = at + (N + 1 + col), col <= M
    return at, inside


@triton.jit
def _of_item(pointer, N, M, T):
    """Return where an item's numbers [T+1, N+1 + M+1] begin."""
    return pointer + tl.program_id(0).to(tl.int64) * (N + M + 2) * (T + 1)


@triton.jit
def _problem_of_item(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
):  # fmt: skip
    item, z = tl.program_id(0).to(tl.int64), 0.0
    if dustbin_ptr is not None:
        z = tl.load(dustbin_ptr).to(tl.float32) * neg_inv_eps
    cost_at, mass_a_at, mass_b_at = cost_ptr + item * cost_b, mass_a_ptr + item * (N + 1), mass_b_ptr + item * (M + 1)
    history_at = _of_item(history_ptr, N, M, T)
    return cost_at, cost_n, cost_m, mass_a_at, mass_b_at, history_at, z, neg_inv_eps, N, M


@triton.jit
def _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M):
    item = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + item)
    return grad_ptr + item * grad_b, grad_n, grad_m, grad_row_ptr + item * N, grad_col_ptr + item * M, factor


@triton.jit
def _tile(TILE: tl.constexpr):
    """Return the item, rows and columns of this program."""
    row, col = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(2) * TILE + tl.arange(0, TILE)
    return tl.program_id(0).to(tl.int64), row[:, None], col[None, :]


@triton.jit
def _zeros(OWN: tl.constexpr, OTHER: tl.constexpr, AXIS: tl.constexpr):
    """Return zeros for a block: own rows by other columns (1), or the reverse (0)."""
    return tl.zeros([OWN, OTHER] if AXIS == 1 else [OTHER, OWN], tl.float32)


@triton.jit
def _indices(own, other, AXIS: tl.constexpr):
    """Return row and column indices of a block: own rows by other columns (1), or the reverse (0)."""
    if AXIS == 1:
        row, col = own[:, None], other[None, :]
    else:
        row, col = other[:, None], own[None, :]
    return row, col


@triton.jit
def _block(start, size, BLOCK: tl.constexpr):
    """Return the indices of a block, those past the end moved past the bin, which comes by itself."""
    offs = start + tl.arange(0, BLOCK)
    return tl.where(offs < size, offs, size + 1)
