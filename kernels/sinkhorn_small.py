"""Sinkhorn for tiles to 128x128: one launch solves the batch, one differentiates it; one program per item.

An item's bits depend on its own values and on the tile that its capacity asks for, up to 64 or up to 128 rows and
columns: not on the batch, its neighbours, strides or the padding inside a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sinkhorn_layout import INF, col_offsets, max_over, row_offsets, sum_over
from kernels.sinkhorn_tile import AUTO, LOG, SCALING, reverse_tile, solve_tile, uniform_log_masses

MAX_TILE = 128
# rows and columns side by side in the threads of a program, for every architecture, tile and direction
LAYOUT = {"N0": 16, "M0": 16, "num_warps": 8}
PATHS = {"auto": AUTO.value, "log": LOG.value, "scaling": SCALING.value}
# strides and sizes, were they specialised on, would choose the layout and with it the order of the sums
UNSPECIALIZED = ["N", "M", "iterations", *(f"{name}_{axis}" for name in ("cost", "grad") for axis in "bnm")]


def sinkhorn_small_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return plan, row slack, column slack, (u, v) from the start on [B, N+1 + M+1, T+1] and who scales [B]."""
    B, N, M = cost.shape
    plan, row_slack, col_slack = cost.new_empty(B, N, M), cost.new_empty(B, N), cost.new_empty(B, M)
    history = cost.new_empty(B, N + M + 2, iterations + 1, dtype=torch.float32)
    scales = cost.new_empty(B, dtype=torch.bool)
    if B:
        problem, settings = _problem(cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack)
        _sinkhorn_fwd_kernel[(B,)](*problem, plan, row_slack, col_slack, history, scales, PATH=PATHS[path], **settings)
    return plan, row_slack, col_slack, history, scales


def sinkhorn_small_backward(
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
    scales: Tensor,
    eps: float,
    slack: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of cost, dustbin [B], log a and log b (shape [0] where there are none), item by item."""
    B, N, M = cost.shape
    grad_cost = cost.new_empty(B, N, M)
    shapes = (B,), (0,) if log_a is None else (B, N), (0,) if log_b is None else (B, M)
    grad_dustbin, grad_a, grad_b = (cost.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if B:
        problem, settings = _problem(cost, rows, cols, dustbin, log_a, log_b, eps, history.shape[2] - 1, slack)
        _sinkhorn_bwd_kernel[(B,)](
            *problem, grad_plan, *grad_plan.stride(), grad_row_slack.contiguous(), grad_col_slack.contiguous(),
            history, scales, grad_cost, grad_dustbin, grad_a, grad_b, **settings,
        )  # fmt: skip
    return grad_cost, grad_dustbin, grad_a, grad_b


def _problem(cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack):
    """Return the arguments that say what is to be solved, and the compile-time ones."""
    N, M = cost.shape[1:]
    vectors = (None if x is None else x.contiguous() for x in (rows, cols, log_a, log_b))
    problem = (cost, *cost.stride(), *vectors, dustbin, N, M, iterations, -1.0 / eps)
    tile = {"BLOCK_N": 64 if N <= 64 else MAX_TILE, "BLOCK_M": 64 if M <= 64 else MAX_TILE}
    return problem, {"MINIMAL": slack == "minimal", **tile, **LAYOUT}


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_fwd_kernel(
    cost_ptr,
    cost_b,
    cost_n,
    cost_m,
    rows_ptr,
    cols_ptr,
    log_a_ptr,
    log_b_ptr,
    dustbin_ptr,
    N,
    M,
    iterations,
    neg_inv_eps,
    plan_ptr,
    row_slack_ptr,
    col_slack_ptr,
    history_ptr,
    scales_ptr,
    PATH: tl.constexpr,
    MINIMAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N0: tl.constexpr,
    M0: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    row, col = row_offsets(BLOCK_N, N0), col_offsets(BLOCK_M, M0)
    masses, factor = load_masses(item, rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, row, col, N, M, MINIMAL)
    Z, z = _exponents(item, cost_ptr, cost_b, cost_n, cost_m, dustbin_ptr, neg_inv_eps, row, col, masses)
    SHIFT: tl.constexpr = dustbin_ptr is not None and not MINIMAL
    history = (history_ptr + item * (N + M + 2) * (iterations + 1), N, M, iterations)
    P, r, c, scales = solve_tile(Z, z, masses, history, SHIFT, PATH, SAVE=True)
    # plan = factor P
    tl.store(plan_ptr + (item * N + row) * M + col, factor * P, (row < N) & (col < M))
    tl.store(row_slack_ptr + item * N + row, factor * r, row < N)
    tl.store(col_slack_ptr + item * M + col, factor * c, col < M)
    tl.store(scales_ptr + item, scales == 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sinkhorn_bwd_kernel(
    cost_ptr,
    cost_b,
    cost_n,
    cost_m,
    rows_ptr,
    cols_ptr,
    log_a_ptr,
    log_b_ptr,
    dustbin_ptr,
    N,
    M,
    iterations,
    neg_inv_eps,
    grad_ptr,
    grad_b,
    grad_n,
    grad_m,
    grad_row_slack_ptr,
    grad_col_slack_ptr,
    history_ptr,
    scales_ptr,
    grad_cost_ptr,
    grad_dustbin_ptr,
    grad_log_a_ptr,
    grad_log_b_ptr,
    MINIMAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N0: tl.constexpr,
    M0: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    row, col = row_offsets(BLOCK_N, N0), col_offsets(BLOCK_M, M0)
    masses, factor = load_masses(item, rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, row, col, N, M, MINIMAL)
    log_a, log_a_bin, log_b, log_b_bin = masses
    Z, z = _exponents(item, cost_ptr, cost_b, cost_n, cost_m, dustbin_ptr, neg_inv_eps, row, col, masses)
    # the factor of the plan goes into the upstream gradients
    G = factor * _load_tile(grad_ptr, item, grad_b, grad_n, grad_m, row, col, masses)
    Gr = factor * tl.load(grad_row_slack_ptr + item * N + row, mask=log_a != -INF, other=0.0).to(tl.float32)
    Gc = factor * tl.load(grad_col_slack_ptr + item * M + col, mask=log_b != -INF, other=0.0).to(tl.float32)
    SHIFT: tl.constexpr = dustbin_ptr is not None and not MINIMAL
    history = (history_ptr + item * (N + M + 2) * (iterations + 1), N, M, iterations)
    scales = tl.load(scales_ptr + item).to(tl.int32)
    dZ, dz, da, da_bin, db, db_bin = reverse_tile(G, Gr, Gc, Z, z, masses, history, scales, SHIFT)
    tl.store(grad_cost_ptr + (item * N + row) * M + col, neg_inv_eps * dZ, (row < N) & (col < M))
    tl.store(grad_dustbin_ptr + item + tl.zeros([1, 1, 1, 1], tl.int32), neg_inv_eps * dz)
    if dustbin_ptr is not None:
        # with weights a_bin = sum b and b_bin = sum a
        to_a, to_b, log_total_a, log_total_b = db_bin, da_bin, log_b_bin, log_a_bin
    else:
        # d log a sums to 0 but for rounding, see `sinkhorn_eager.without_drift`
        to_b = sum_over(da, 0)
        to_a, log_total_a, log_total_b = -to_b, _log_total(log_a, 0), _log_total(log_b, 1)
    if log_a_ptr is not None:
        da += to_a * tl.where(log_a != -INF, tl.exp(log_a - log_total_a), 0.0)
        tl.store(grad_log_a_ptr + item * N + row, da, row < N)
    if log_b_ptr is not None:
        db += to_b * tl.where(log_b != -INF, tl.exp(log_b - log_total_b), 0.0)
        tl.store(grad_log_b_ptr + item * M + col, db, col < M)


@triton.jit
def load_masses(
    item, rows_ptr, cols_ptr, log_a_ptr, log_b_ptr, dustbin_ptr, row, col, N, M, MINIMAL: tl.constexpr
):  # fmt: skip
    """Return the masses and the plan's factor, from the counts or from the given log masses."""
    n, m = _count(rows_ptr, item, N), _count(cols_ptr, item, M)
    WEIGHTED: tl.constexpr = log_a_ptr is not None or log_b_ptr is not None
    HAS_BIN: tl.constexpr = dustbin_ptr is not None
    masses, factor = uniform_log_masses(n, m, row, col, HAS_BIN and not WEIGHTED, MINIMAL)
    if WEIGHTED:
        log_a, log_a_bin, log_b, log_b_bin = masses
        log_a, log_b = _weights(log_a_ptr, item, n, N, row), _weights(log_b_ptr, item, m, M, col)
        total_a, total_b = _log_total(log_a, 0), _log_total(log_b, 1)
        if HAS_BIN:
            log_a_bin, log_b_bin = total_b, total_a
        else:
            # an item with an empty side has nowhere to send its mass
            log_a, log_b = tl.where(total_b != -INF, log_a, -INF), tl.where(total_a != -INF, log_b, -INF)
        masses = (log_a, log_a_bin, log_b, log_b_bin)
    return masses, factor


@triton.jit
def _exponents(item, cost_ptr, cost_b, cost_n, cost_m, dustbin_ptr, neg_inv_eps, row, col, masses):
    """Return Z = -cost / eps, 0 in the padding, and z = -dustbin / eps."""
    z = 0.0
    if dustbin_ptr is not None:
        z = tl.load(dustbin_ptr).to(tl.float32) * neg_inv_eps
    return _load_tile(cost_ptr, item, cost_b, cost_n, cost_m, row, col, masses) * neg_inv_eps, z


@triton.jit
def _load_tile(pointer, item, stride_b, stride_n, stride_m, row, col, masses):
    at = pointer + item * stride_b + row.to(tl.int64) * stride_n + col.to(tl.int64) * stride_m
    return tl.load(at, mask=(masses[0] != -INF) & (masses[2] != -INF), other=0.0).to(tl.float32)


@triton.jit
def _count(count_ptr, item, size):
    """Return how many rows or columns count: all of them without counts, never more than there are."""
    if count_ptr is None:
        count = size
    else:
        count = tl.minimum(tl.maximum(tl.load(count_ptr + item), 0), size).to(tl.int32)
    return count


@triton.jit
def _weights(weights_ptr, item, count, size, offs):
    """Return the given log masses, or uniform ones that total 1."""
    if weights_ptr is None:
        log_mass = tl.where(offs < count, -tl.log(tl.maximum(count, 1).to(tl.float32)), -INF)
    else:
        log_mass = tl.load(weights_ptr + item * size + offs, mask=offs < size, other=-INF).to(tl.float32)
    return log_mass


@triton.jit
def _log_total(log_mass, AXIS: tl.constexpr):
    top = max_over(log_mass, AXIS)
    return tl.where(top == -INF, -INF, top + tl.log(sum_over(tl.exp(log_mass - top), AXIS)))
