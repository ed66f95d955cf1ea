"""Sinkhorn for 129 to 2,048 rows or columns: two launches per iteration, always in the log domain.

Every half-step is one launch: a program owns a block of rows (or columns) of one item and walks over all columns (or
rows), the costs coming from the L2 cache. Bins are row N and column M. The reverse pass walks back the same way and
keeps only vectors; a last launch puts the gradient of every cost together from those of all iterations:

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

BLOCK = 32
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
    """Return plan, row slack, column slack, (u, v) from the start on [B, N+1 + M+1, T+1] and who scales: nobody [B]."""
    B, N, M = cost.shape
    plan, row_slack, col_slack = cost.new_empty(B, N, M), cost.new_empty(B, N), cost.new_empty(B, M)
    history = cost.new_zeros(B, N + M + 2, iterations + 1, dtype=torch.float32)
    if B:
        problem, factor = _problem(cost, rows, cols, dustbin, log_a, log_b, history, eps, slack)
        for t in range(1, iterations + 1):
            for axis, grid in _half_steps(B, N, M):
                _sinkhorn_large_fwd_kernel[grid](*problem, t, AXIS=axis, BLOCK=BLOCK)
        _sinkhorn_large_plan_kernel[_tiles(B, N, M)](*problem, factor, plan, row_slack, col_slack, BLOCK=BLOCK)
    return plan, row_slack, col_slack, history, cost.new_zeros(B, dtype=torch.bool)


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
    history: Tensor,
    eps: float,
    slack: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of cost, dustbin [B], log a and log b (shape [0] where there are none), item by item."""
    B, N, M = cost.shape
    grad_cost = cost.new_empty(B, N, M)
    shapes = (B,), (0,) if log_a is None else (B, N), (0,) if log_b is None else (B, M)
    grad_dustbin, grad_a, grad_b = (cost.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if B:
        problem, factor = _problem(cost, rows, cols, dustbin, log_a, log_b, history, eps, slack)
        slacks = grad_row_slack.contiguous(), grad_col_slack.contiguous()
        upstream = (grad_plan, *grad_plan.stride(), *slacks, factor)
        coefficients, grad_masses = torch.zeros_like(history), history.new_zeros(B, N + M + 2)
        T = history.shape[2] - 1
        for t in range(T, 0, -1):
            for axis, grid in reversed(_half_steps(B, N, M)):
                _sinkhorn_large_bwd_kernel[grid](
                    *problem, *upstream, coefficients, grad_masses, t, AXIS=axis, LAST=t == T, BLOCK=BLOCK
                )
        _sinkhorn_large_grad_kernel[_tiles(B, N, M)](*problem, *upstream, coefficients, grad_cost, BLOCK=BLOCK)
        grads = None if log_a is None else grad_a, None if log_b is None else grad_b
        _sinkhorn_large_vectors_kernel[(B,)](
            *problem, *upstream, coefficients, grad_masses, grad_dustbin, *grads, BLOCK=BLOCK
        )
    return grad_cost, grad_dustbin, grad_a, grad_b


def _problem(cost, rows, cols, dustbin, log_a, log_b, history, eps, slack):
    """Return the arguments that say what is to be solved, and the plan's factor [B]."""
    B, N, M = cost.shape
    vectors = [None if x is None else x.contiguous() for x in (rows, cols, log_a, log_b)]
    mass_a, mass_b, factor = (cost.new_empty(shape, dtype=torch.float32) for shape in ((B, N + 1), (B, M + 1), (B,)))
    sizes = {"BLOCK_N": max(16, triton.next_power_of_2(N)), "BLOCK_M": max(16, triton.next_power_of_2(M))}
    _sinkhorn_large_masses_kernel[(B,)](
        *vectors, dustbin, N, M, mass_a, mass_b, factor, MINIMAL=slack == "minimal", **sizes
    )
    T = history.shape[2] - 1
    return (cost, *cost.stride(), mass_a, mass_b, history, dustbin, N, M, T, -1.0 / eps), factor


def _half_steps(B: int, N: int, M: int) -> list[tuple[int, tuple]]:
    """Return (axis that is summed over, grid) of the row half-step and of the column half-step; bins included."""
    return [(1, (B, triton.cdiv(N + 1, BLOCK))), (0, (B, triton.cdiv(M + 1, BLOCK)))]


def _tiles(B: int, N: int, M: int) -> tuple:
    return B, triton.cdiv(N + 1, BLOCK), triton.cdiv(M + 1, BLOCK)


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
    t, AXIS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    own, size = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), M if AXIS == 1 else N
    # u = log a - LSE(Z + v), or v = log b - LSE(Z + u), with the true maximum; potentials are 0 at time 0
    t_u, t_v = 0 if AXIS == 1 else t, t - 1 if AXIS == 1 else 0
    top, total = tl.full([BLOCK, BLOCK], -INF, tl.float32), tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        row, col = _indices(own, _block(start, size, BLOCK), AXIS)
        top = tl.maximum(top, _shifted(problem, row, col, t_u, t_v))
    row_last, col_last = _indices(own, tl.full([1], size, tl.int32), AXIS)
    x_bin = _shifted(problem, row_last, col_last, t_u, t_v)
    highest = tl.maximum(tl.max(top, AXIS, keep_dims=True), x_bin)
    highest = tl.where(highest == -INF, 0.0, highest)
    for start in range(0, size, BLOCK):
        row, col = _indices(own, _block(start, size, BLOCK), AXIS)
        total += tl.exp(_shifted(problem, row, col, t_u, t_v) - highest)
    lse = highest + tl.log(tl.sum(total, AXIS, keep_dims=True) + tl.exp(x_bin - highest))
    log_a, log_b = _log_masses(problem, row_last, col_last)
    log_mass = log_a if AXIS == 1 else log_b
    at, inside = _vector(history_ptr, row_last, col_last, t, N, M, T, AXIS)
    tl.store(at, tl.where(log_mass == -INF, 0.0, log_mass - lse), inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_plan_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    factor_ptr, plan_ptr, row_slack_ptr, col_slack_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    item, row, col = _tile(BLOCK)
    P = tl.load(factor_ptr + item) * tl.exp(_shifted(problem, row, col, T, T))
    tl.store(plan_ptr + (item * N + row) * M + col, P, (row < N) & (col < M))
    tl.store(row_slack_ptr + item * N + row + col * 0, P, (row < N) & (col == M))
    tl.store(col_slack_ptr + item * M + col + row * 0, P, (row == N) & (col < M))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_bwd_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr,
    coefficients_ptr, grad_masses_ptr, t, AXIS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M)
    own, size = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), M if AXIS == 1 else N
    adjoint, total = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        row, col = _indices(own, _block(start, size, BLOCK), AXIS)
        adjoint_part, total_part = _adjoint(problem, upstream, coefficients_ptr, row, col, t, AXIS, LAST)
        adjoint += adjoint_part
        total += total_part
    row_last, col_last = _indices(own, tl.full([1], size, tl.int32), AXIS)
    adjoint_bin, total_bin = _adjoint(problem, upstream, coefficients_ptr, row_last, col_last, t, AXIS, LAST)
    adjoint_sum = tl.sum(adjoint, AXIS, keep_dims=True) + adjoint_bin
    total_sum = tl.sum(total, AXIS, keep_dims=True) + total_bin
    # alpha / rowsum F, or beta / colsum E
    at, inside = _vector(coefficients_ptr, row_last, col_last, t, N, M, T, AXIS)
    tl.store(at, tl.where(total_sum == 0, 0.0, adjoint_sum / total_sum), inside)
    at, inside = _vector(grad_masses_ptr, row_last, col_last, 0, N, M, 0, AXIS)
    tl.store(at, tl.load(at, inside, other=0.0) + adjoint_sum, inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_grad_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr,
    coefficients_ptr, grad_cost_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M)
    item, row, col = _tile(BLOCK)
    dZ = _grad_exponents(problem, upstream, coefficients_ptr, row, col)
    tl.store(grad_cost_ptr + (item * N + row) * M + col, neg_inv_eps * dZ, (row < N) & (col < M))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_vectors_kernel(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr,
    coefficients_ptr, grad_masses_ptr, grad_dustbin_ptr, grad_a_ptr, grad_b_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = _problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M)
    item = tl.program_id(0).to(tl.int64)
    # d dustbin = -(sum of dZ over the bin's row, column and corner) / eps
    dZr, dZc = tl.zeros([BLOCK, 1], tl.float32), tl.zeros([1, BLOCK], tl.float32)
    bin_row, bin_col = tl.full([1, 1], N, tl.int32), tl.full([1, 1], M, tl.int32)
    for start in range(0, N, BLOCK):
        dZr += _grad_exponents(problem, upstream, coefficients_ptr, _block(start, N, BLOCK)[:, None], bin_col)
    for start in range(0, M, BLOCK):
        dZc += _grad_exponents(problem, upstream, coefficients_ptr, bin_row, _block(start, M, BLOCK)[None, :])
    dZk = tl.sum(_grad_exponents(problem, upstream, coefficients_ptr, bin_row, bin_col))
    tl.store(grad_dustbin_ptr + item, neg_inv_eps * (tl.sum(dZr) + tl.sum(dZc) + dZk))
    # with weights and a dustbin, a_bin = sum b and b_bin = sum a
    grad_a_at = grad_masses_ptr + item * (N + M + 2)
    grad_b_at = grad_a_at + N + 1
    log_a_bin, log_b_bin = _log_masses(problem, bin_row, bin_col)
    log_a_bin, log_b_bin = tl.sum(log_a_bin), tl.sum(log_b_bin)
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
def _adjoint(problem, upstream, coefficients_ptr, row, col, t, AXIS: tl.constexpr, LAST: tl.constexpr):
    """Return what is summed to alpha_t and to rowsum F_t, or to beta_t and to colsum E_t."""
    _, _, _, _, _, _, _, _, N, M, T = problem
    E = tl.exp(_shifted(problem, row, col, t, t))
    if AXIS == 1:
        adjoint = -E * _coefficient(coefficients_ptr, row, col, t, N, M, T, 0)
        if LAST:
            adjoint += _load_upstream(problem, upstream, row, col) * E
        total = tl.exp(_shifted(problem, row, col, t, t - 1))
    else:
        if LAST:
            adjoint = _load_upstream(problem, upstream, row, col) * E
        else:
            F = tl.exp(_shifted(problem, row, col, t + 1, t))
            adjoint = -F * _coefficient(coefficients_ptr, row, col, t + 1, N, M, T, 1)
        total = E
    return adjoint, total


@triton.jit
def _grad_exponents(problem, upstream, coefficients_ptr, row, col):
    """Return dZ = W - sum_t (E_t q_t + F_t p_t)."""
    _, _, _, _, _, _, _, _, N, M, T = problem
    dZ = _load_upstream(problem, upstream, row, col) * tl.exp(_shifted(problem, row, col, T, T))
    for i in range(T):
        t = T - i
        E, F = tl.exp(_shifted(problem, row, col, t, t)), tl.exp(_shifted(problem, row, col, t, t - 1))
        q = _coefficient(coefficients_ptr, row, col, t, N, M, T, 0)
        p = _coefficient(coefficients_ptr, row, col, t, N, M, T, 1)
        dZ -= E * q + F * p
    return dZ


@triton.jit
def _shifted(problem, row, col, t_u, t_v):
    """Return Z + u + v of two times, -inf where either side has no mass."""
    cost_at, cost_n, cost_m, _, _, history_ptr, z, neg_inv_eps, N, M, T = problem
    log_a, log_b = _log_masses(problem, row, col)
    taken = (log_a != -INF) & (log_b != -INF)
    real = taken & (row < N) & (col < M)
    at = cost_at + row.to(tl.int64) * cost_n + col.to(tl.int64) * cost_m
    Z = tl.where((row == N) | (col == M), z, tl.load(at, real, other=0.0).to(tl.float32) * neg_inv_eps)
    u = _coefficient(history_ptr, row, col, t_u, N, M, T, 1)
    v = _coefficient(history_ptr, row, col, t_v, N, M, T, 0)
    return tl.where(taken, Z + u + v, -INF)


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
def _coefficient(pointer, row, col, t, N, M, T, AXIS: tl.constexpr):
    at, inside = _vector(pointer, row, col, t, N, M, T, AXIS)
    return tl.load(at, inside, other=0.0)


@triton.jit
def _vector(pointer, row, col, t, N, M, T, AXIS: tl.constexpr):
    """Return where rows (1) or columns (0) have their number of time t, and which of them exist."""
    at = pointer + tl.program_id(0).to(tl.int64) * (N + M + 2) * (T + 1) + t
    if AXIS == 1:
        at, inside = at + row * (T + 1), row <= N
    else:
        at, inside = at + (N + 1 + col) * (T + 1), col <= M
    return at, inside


@triton.jit
def _problem_of_item(
    cost_ptr, cost_b, cost_n, cost_m, mass_a_ptr, mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
):  # fmt: skip
    item, z = tl.program_id(0).to(tl.int64), 0.0
    if dustbin_ptr is not None:
        z = tl.load(dustbin_ptr).to(tl.float32) * neg_inv_eps
    cost_at, mass_a_at, mass_b_at = cost_ptr + item * cost_b, mass_a_ptr + item * (N + 1), mass_b_ptr + item * (M + 1)
    return cost_at, cost_n, cost_m, mass_a_at, mass_b_at, history_ptr, z, neg_inv_eps, N, M, T


@triton.jit
def _upstream_of_item(grad_ptr, grad_b, grad_n, grad_m, grad_row_ptr, grad_col_ptr, factor_ptr, N, M):
    item = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + item)
    return grad_ptr + item * grad_b, grad_n, grad_m, grad_row_ptr + item * N, grad_col_ptr + item * M, factor


@triton.jit
def _tile(BLOCK: tl.constexpr):
    """Return the item, rows and columns of this program."""
    row, col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), row[:, None], col[None, :]


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
