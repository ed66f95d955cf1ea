"""Sinkhorn for 129 to 2,048 rows or columns: two launches per iteration, always in the log domain.

Every half-step is one launch: a program owns a few rows (or columns) of one item and walks over all columns (or rows),
many at a time, since its time goes into waiting for costs and potentials from the L2 cache. Bins are row N and
column M. The reverse pass makes the same launches from t = T down to 1 and keeps only vectors; then one launch puts
the gradient of every cost together from those of all iterations. With G, the upstream gradients of plan and slacks
times the plan's factor:

    E_t = exp(Z + u_t + v_t),  F_t = exp(Z + u_t + v_{t-1}),  W = G E_T,  from t = T down to 1:
        beta_t  = (t = T: colsum W, t < T: -colsum(F_{t+1} p_{t+1}));   q_t = beta_t / colsum E_t
        alpha_t = (t = T: rowsum W, t < T: 0) - rowsum(E_t q_t);        p_t = alpha_t / rowsum F_t
    dZ = W - sum_t (E_t q_t + F_t p_t),  d log a = sum_t alpha_t,  d log b = sum_t beta_t

Sums run over blocks of fixed size in ascending order, element by element, then inside a block, then comes the bin: an
item's bits depend on its own values alone. What a program reads of its item stands in `kernels.sinkhorn_blocks`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv, next_power_of_2
from kernels.sinkhorn_blocks import (
    block_indices,
    block_offsets,
    exponents,
    load_col_vector,
    load_log_masses,
    load_row_vector,
    load_upstream,
    own_vector_at,
    problem_of_item,
    tile_indices,
    upstream_of_item,
    vectors_of_item,
)
from kernels.sinkhorn_layout import INF, col_offsets, divide_or_zero, row_offsets
from kernels.sinkhorn_small import load_masses

# rows (or columns) that a program of a half-step owns
OWN = 16
# columns (or rows) that such a program takes at a time
OTHER = 128
# warps of such a program; all others have Triton's four
WARPS = 8
# rows, and columns, of a tile of the plan or of the costs' gradient, which has a program to itself
TILE = 32
# iterations whose vectors a tile of the gradient loads together
UNROLL = 4
# sizes and strides, were they specialised on, would make other machine code and with it other bits
UNSPECIALIZED = ["N", "M", "T", "cost_b", "cost_n", "cost_m", "upstream_b", "upstream_n", "upstream_m", "t"]


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

    The potentials lie as [B, T+1, N+1 + M+1], those of one time side by side, and are returned under the shape that the
    operator's fake gives to the potentials of all kernels, [B, N+1 + M+1, T+1].
    """
    B, N, M = cost.shape
    plan, row_slack, col_slack = cost.new_empty(B, N, M), cost.new_empty(B, N), cost.new_empty(B, M)
    history = cost.new_empty(B, iterations + 1, N + M + 2, dtype=torch.float32)
    history[:, 0] = 0
    if B:
        problem, factor = _launch_masses(cost, rows, cols, dustbin, log_a, log_b, iterations, history, eps, slack)
        for t in range(1, iterations + 1):
            for of_rows, grid in _half_steps(B, N, M):
                _sinkhorn_large_fwd_kernel[grid](*problem, t, ROWS=of_rows, OWN=OWN, OTHER=OTHER, num_warps=WARPS)
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
    grad_dustbin, grad_log_a, grad_log_b = (cost.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if B:
        T = potentials.shape[2] - 1
        problem, factor = _launch_masses(cost, rows, cols, dustbin, log_a, log_b, T, potentials, eps, slack)
        slacks = grad_row_slack.contiguous(), grad_col_slack.contiguous()
        upstream = (grad_plan, *grad_plan.stride(), *slacks, factor)
        # p of rows and q of columns, as potentials lie; time 0 is neither written nor read
        coefficients = torch.empty_like(potentials)
        # of rows and columns, bins included: alpha and beta summed over time, and dZ of the bins' column and row
        grad_log_masses, grad_bins = potentials.new_empty(2, B, N + M + 2).unbind()
        for t in range(T, 0, -1):
            for of_rows, grid in reversed(_half_steps(B, N, M)):
                _sinkhorn_large_bwd_kernel[grid](
                    *problem, *upstream, coefficients, grad_log_masses, t,
                    ROWS=of_rows, LAST=t == T, OWN=OWN, OTHER=OTHER, num_warps=WARPS,
                )  # fmt: skip
        _sinkhorn_large_grad_kernel[_tiles(B, N, M)](
            *problem, *upstream, coefficients, grad_cost, grad_bins, TILE=TILE, UNROLL=UNROLL
        )
        weights = None if log_a is None else grad_log_a, None if log_b is None else grad_log_b
        _sinkhorn_large_marginals_kernel[(B,)](
            *problem, grad_bins, grad_log_masses, grad_dustbin, *weights, BLOCK=OTHER
        )
    return grad_cost, grad_dustbin, grad_log_a, grad_log_b


def _launch_masses(cost, rows, cols, dustbin, log_a, log_b, T, history, eps, slack):
    """Compute the log masses, and return the arguments by which a kernel knows the problem and the plan's factor [B].

    The backward does so again: the operator hands on no masses.
    """
    B, N, M = cost.shape
    vectors = [None if x is None else x.contiguous() for x in (rows, cols, log_a, log_b)]
    log_mass_a, log_mass_b, factor = (
        cost.new_empty(shape, dtype=torch.float32) for shape in ((B, N + 1), (B, M + 1), (B,))
    )
    sizes = {"BLOCK_N": max(16, next_power_of_2(N)), "BLOCK_M": max(16, next_power_of_2(M))}
    _sinkhorn_large_masses_kernel[(B,)](
        *vectors, dustbin, N, M, log_mass_a, log_mass_b, factor, MINIMAL=slack == "minimal", **sizes
    )
    return (cost, *cost.stride(), log_mass_a, log_mass_b, history, dustbin, N, M, T, -1.0 / eps), factor


def _half_steps(B: int, N: int, M: int) -> list[tuple[bool, tuple]]:
    """Return (whether rows are owned, grid) of the row half-step and of the column half-step; bins included."""
    return [(True, (B, cdiv(N + 1, OWN))), (False, (B, cdiv(M + 1, OWN)))]


def _tiles(B: int, N: int, M: int) -> tuple:
    """Return the grid of tiles that cover costs and bins."""
    return B, cdiv(N + 1, TILE), cdiv(M + 1, TILE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_masses_kernel(
    rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, N, M, log_mass_a_ptr, log_mass_b_ptr, factor_ptr,
    MINIMAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store the log masses of an item's rows and columns, bins last, and its plan's factor."""
    item = tl.program_id(0).to(tl.int64)
    row, col, bin = row_offsets(BLOCK_N, 16), col_offsets(BLOCK_M, 16), tl.zeros([1, 1, 1, 1], tl.int32)
    masses, factor = load_masses(item, rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, row, col, N, M, MINIMAL)
    log_a, log_a_bin, log_b, log_b_bin = masses
    tl.store(log_mass_a_ptr + item * (N + 1) + row, log_a, mask=row < N)
    tl.store(log_mass_a_ptr + item * (N + 1) + N + bin, log_a_bin)
    tl.store(log_mass_b_ptr + item * (M + 1) + col, log_b, mask=col < M)
    tl.store(log_mass_b_ptr + item * (M + 1) + M + bin, log_b_bin)
    tl.store(factor_ptr + item, factor)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_fwd_kernel(
    cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    t, ROWS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One half-step: store u_t of the rows that this program owns (ROWS), or v_t of its columns."""
    problem = problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    AXIS: tl.constexpr = 1 if ROWS else 0
    own, size = tl.program_id(1) * OWN + tl.arange(0, OWN), M if ROWS else N
    # u_t = log a - LSE(Z + v_{t-1}), or v_t = log b - LSE(Z + u_t), with the true maximum
    bin_row, bin_col = block_indices(own, tl.full([1], size, tl.int32), ROWS)
    x_bin = _log_summands(problem, bin_row, bin_col, t, ROWS)
    zeros = _zeros(OWN, OTHER, ROWS)
    top, total = zeros - INF, zeros
    for start in range(0, size, OTHER):
        row, col = block_indices(own, block_offsets(start, size, OTHER), ROWS)
        top = tl.maximum(top, _log_summands(problem, row, col, t, ROWS))
    highest = tl.maximum(tl.max(top, AXIS, keep_dims=True), x_bin)
    # without any mass it is -inf, and -inf - -inf would be NaN
    highest = tl.where(highest == -INF, 0.0, highest)
    for start in range(0, size, OTHER):
        row, col = block_indices(own, block_offsets(start, size, OTHER), ROWS)
        total += tl.exp(_log_summands(problem, row, col, t, ROWS) - highest)
    lse = highest + tl.log(tl.sum(total, AXIS, keep_dims=True) + tl.exp(x_bin - highest))
    log_a, log_b = load_log_masses(problem, bin_row, bin_col)
    log_mass = log_a if ROWS else log_b
    _, _, history_at, _, _ = problem
    at, exists = own_vector_at(history_at, bin_row, bin_col, t, N, M, ROWS)
    # 0 where there is no mass: Z is -inf there already, and log mass - LSE would be NaN
    tl.store(at, tl.where(log_mass == -INF, 0.0, log_mass - lse), exists)


@triton.jit
def _log_summands(problem, row, col, t, ROWS: tl.constexpr):
    """Return Z + v_{t-1}, of which the row half-step (ROWS) takes the LSE, or Z + u_t, as the column half-step does."""
    _, _, history_at, N, M = problem
    Z = exponents(problem, row, col)
    if ROWS:
        potential = load_col_vector(history_at, col, t - 1, N, M)
    else:
        potential = load_row_vector(history_at, row, t, N, M)
    return Z + potential


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_plan_kernel(
    cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    factor_ptr, plan_ptr, row_slack_ptr, col_slack_ptr, TILE: tl.constexpr,
):  # fmt: skip
    """Store a tile of the plan, or of the slacks where it lies on a bin."""
    problem = problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    _, _, history_at, _, _ = problem
    item, row, col = tile_indices(TILE)
    # plan = factor exp(Z + u_T + v_T)
    u, v = load_row_vector(history_at, row, T, N, M), load_col_vector(history_at, col, T, N, M)
    P = tl.load(factor_ptr + item) * tl.exp(exponents(problem, row, col) + u + v)
    tl.store(plan_ptr + (item * N + row) * M + col, P, (row < N) & (col < M))
    tl.store(row_slack_ptr + item * N + row + col * 0, P, (row < N) & (col == M))
    tl.store(col_slack_ptr + item * M + col + row * 0, P, (row == N) & (col < M))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_bwd_kernel(
    cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    upstream_ptr, upstream_b, upstream_n, upstream_m, upstream_row_ptr, upstream_col_ptr, factor_ptr,
    coefficients_ptr, grad_log_masses_ptr, t, ROWS: tl.constexpr, LAST: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """One half-step back: p_t of own rows (ROWS) or q_t of own columns; adds alpha_t or beta_t up. LAST: t = T."""
    problem = problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = upstream_of_item(
        upstream_ptr, upstream_b, upstream_n, upstream_m, upstream_row_ptr, upstream_col_ptr, factor_ptr, N, M
    )
    coefficients_at = vectors_of_item(coefficients_ptr, N, M, T)
    AXIS: tl.constexpr = 1 if ROWS else 0
    own, size = tl.program_id(1) * OWN + tl.arange(0, OWN), M if ROWS else N
    bin_row, bin_col = block_indices(own, tl.full([1], size, tl.int32), ROWS)
    adjoint_bin, total_bin = _adjoint(problem, upstream, coefficients_at, bin_row, bin_col, t, ROWS, LAST)
    adjoint, total = _zeros(OWN, OTHER, ROWS), _zeros(OWN, OTHER, ROWS)
    for start in range(0, size, OTHER):
        row, col = block_indices(own, block_offsets(start, size, OTHER), ROWS)
        adjoint_part, total_part = _adjoint(problem, upstream, coefficients_at, row, col, t, ROWS, LAST)
        adjoint += adjoint_part
        total += total_part
    adjoint_sum = tl.sum(adjoint, AXIS, keep_dims=True) + adjoint_bin
    total_sum = tl.sum(total, AXIS, keep_dims=True) + total_bin
    # p_t = alpha_t / rowsum F_t, or q_t = beta_t / colsum E_t
    at, exists = own_vector_at(coefficients_at, bin_row, bin_col, t, N, M, ROWS)
    tl.store(at, divide_or_zero(adjoint_sum, total_sum), exists)
    # d log a += alpha_t, or d log b += beta_t; of sums over time there is one, at time 0
    at, exists = own_vector_at(vectors_of_item(grad_log_masses_ptr, N, M, 0), bin_row, bin_col, 0, N, M, ROWS)
    if not LAST:
        adjoint_sum += tl.load(at, exists, other=0.0)
    tl.store(at, adjoint_sum, exists)


@triton.jit
def _adjoint(problem, upstream, coefficients_at, row, col, t, ROWS: tl.constexpr, LAST: tl.constexpr):
    """Return what is summed to alpha_t and to rowsum F_t (ROWS), or to beta_t and to colsum E_t."""
    _, _, history_at, N, M = problem
    Z = exponents(problem, row, col)
    u, v = load_row_vector(history_at, row, t, N, M), load_col_vector(history_at, col, t, N, M)
    E = tl.exp(Z + u + v)
    if ROWS:
        # alpha_t = (t = T: rowsum W, t < T: 0) - rowsum(E_t q_t)
        adjoint = -E * load_col_vector(coefficients_at, col, t, N, M)
        if LAST:
            adjoint += load_upstream(problem, upstream, row, col) * E
        total = tl.exp(Z + u + load_col_vector(history_at, col, t - 1, N, M))
    else:
        # beta_t = (t = T: colsum W, t < T: -colsum(F_{t+1} p_{t+1}))
        if LAST:
            adjoint = load_upstream(problem, upstream, row, col) * E
        else:
            F = tl.exp(Z + load_row_vector(history_at, row, t + 1, N, M) + v)
            adjoint = -F * load_row_vector(coefficients_at, row, t + 1, N, M)
        total = E
    return adjoint, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_grad_kernel(
    cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    upstream_ptr, upstream_b, upstream_n, upstream_m, upstream_row_ptr, upstream_col_ptr, factor_ptr,
    coefficients_ptr, grad_cost_ptr, grad_bins_ptr, TILE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Store a tile of the gradient of the costs, and dZ where it lies on a bin."""
    problem = problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    upstream = upstream_of_item(
        upstream_ptr, upstream_b, upstream_n, upstream_m, upstream_row_ptr, upstream_col_ptr, factor_ptr, N, M
    )
    _, _, history_at, _, _ = problem
    coefficients_at = vectors_of_item(coefficients_ptr, N, M, T)
    item, row, col = tile_indices(TILE)
    Z = exponents(problem, row, col)
    u, v = load_row_vector(history_at, row, T, N, M), load_col_vector(history_at, col, T, N, M)
    # dZ = W - sum_t (E_t q_t + F_t p_t)
    dZ = load_upstream(problem, upstream, row, col) * tl.exp(Z + u + v)
    for back in tl.range(0, T, loop_unroll_factor=UNROLL):
        t = T - back
        q, p = load_col_vector(coefficients_at, col, t, N, M), load_row_vector(coefficients_at, row, t, N, M)
        E = tl.exp(Z + u + v)
        v = load_col_vector(history_at, col, t - 1, N, M)
        dZ -= E * q + tl.exp(Z + u + v) * p
        u = load_row_vector(history_at, row, t - 1, N, M)
    # Z = -cost / eps
    tl.store(grad_cost_ptr + (item * N + row) * M + col, neg_inv_eps * dZ, (row < N) & (col < M))
    bins_at = vectors_of_item(grad_bins_ptr, N, M, 0)
    tl.store(bins_at + row + col * 0, dZ, (row <= N) & (col == M))
    tl.store(bins_at + N + 1 + col + row * 0, dZ, (row == N) & (col < M))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_large_marginals_kernel(
    cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps,
    grad_bins_ptr, grad_log_masses_ptr, grad_dustbin_ptr, grad_log_a_ptr, grad_log_b_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store an item's gradients of the dustbin and of the given log masses."""
    problem = problem_of_item(
        cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
    )
    _, log_masses, _, _, _ = problem
    log_mass_a_at, log_mass_b_at = log_masses
    item = tl.program_id(0).to(tl.int64)
    # d dustbin = -(sum of dZ over the bin's column, row and corner) / eps
    bins_at = vectors_of_item(grad_bins_ptr, N, M, 0)
    dZr, dZc = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    offs = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        dZr += tl.load(bins_at + start + offs, start + offs < N, other=0.0)
    for start in range(0, M, BLOCK):
        dZc += tl.load(bins_at + N + 1 + start + offs, start + offs < M, other=0.0)
    tl.store(grad_dustbin_ptr + item, neg_inv_eps * (tl.sum(dZr) + tl.sum(dZc) + tl.load(bins_at + N)))
    alpha_at = vectors_of_item(grad_log_masses_ptr, N, M, 0)
    beta_at = alpha_at + N + 1
    if dustbin_ptr is not None:
        # with weights a_bin = sum b and b_bin = sum a
        to_a, to_b = tl.load(beta_at + M), tl.load(alpha_at + N)
        log_total_a, log_total_b = tl.load(log_mass_b_at + M), tl.load(log_mass_a_at + N)
    else:
        # d log a sums to 0 but for rounding, see `sinkhorn_eager.without_drift`
        to_b, log_total_a = _sum_of_marginal(alpha_at, log_mass_a_at, N, BLOCK)
        to_a = -to_b
        _, log_total_b = _sum_of_marginal(beta_at, log_mass_b_at, M, BLOCK)
    if grad_log_a_ptr is not None:
        for start in range(0, N, BLOCK):
            _store_weights_grad(grad_log_a_ptr, start, N, item, alpha_at, log_mass_a_at, to_a, log_total_a, BLOCK)
    if grad_log_b_ptr is not None:
        for start in range(0, M, BLOCK):
            _store_weights_grad(grad_log_b_ptr, start, M, item, beta_at, log_mass_b_at, to_b, log_total_b, BLOCK)


@triton.jit
def _sum_of_marginal(own_at, log_mass_at, size, BLOCK: tl.constexpr):
    """Return the sum of a side's gradients of log masses, and the logarithm of its mass."""
    own, mass = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        own += tl.load(own_at + offs, offs < size, other=0.0)
        mass += tl.exp(tl.load(log_mass_at + offs, offs < size, other=-INF))
    return tl.sum(own), tl.log(tl.sum(mass))


@triton.jit
def _store_weights_grad(grad_ptr, start, size, item, own_at, log_mass_at, shared, log_total, BLOCK: tl.constexpr):
    """Store a block's gradient of log weights: its own and its share, as d log total / d log a_i, of another number."""
    offs = start + tl.arange(0, BLOCK)
    log_mass = tl.load(log_mass_at + offs, offs < size, other=-INF)
    # 0 where there is no mass or no bin
    share = tl.where(log_mass == -INF, 0.0, tl.where(log_total == -INF, 0.0, tl.exp(log_mass - log_total)))
    tl.store(grad_ptr + item * size + offs, tl.load(own_at + offs, offs < size) + shared * share, offs < size)


@triton.jit
def _zeros(OWN: tl.constexpr, OTHER: tl.constexpr, ROWS: tl.constexpr):
    """Return zeros for a block: own rows by other columns (ROWS), or other rows by own columns."""
    return tl.zeros([OWN, OTHER] if ROWS else [OTHER, OWN], tl.float32)
