"""Sinkhorn for tiles to 128x128: one launch solves the batch, one differentiates it; one program per item.

An item's bits depend on its own values and on the tile that holds N and M, not on the batch, its neighbours or strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sinkhorn_tile import (
    AUTO,
    INF,
    LOG,
    SCALING,
    col_offsets,
    max_over,
    reverse_tile,
    row_offsets,
    solve_tile,
    sum_over,
    uniform_log_masses,
)

MAX_TILE = 128
# (rows, columns) of the tile -> warps of the forward, warps of the backward
WARPS = {(64, 64): (4, 4), (64, 128): (4, 8), (128, 64): (4, 8), (128, 128): (8, 16)}
PATHS = {"auto": AUTO.value, "log": LOG.value, "scaling": SCALING.value}


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
    """Return plan, row slack, column slack, (u, v) of every iteration [B, T, N+1 + M+1] and who scales [B]."""
    B, N, M = cost.shape
    plan, row_slack, col_slack = cost.new_empty(B, N, M), cost.new_empty(B, N), cost.new_empty(B, M)
    history = cost.new_empty(B, iterations, N + M + 2, dtype=torch.float32)
    scales = cost.new_empty(B, dtype=torch.bool)
    if B:
        problem, settings = _problem(cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack)
        _sinkhorn_fwd_kernel[(B,)](
            *problem, plan, row_slack, col_slack, history, scales,
            **settings, PATH=PATHS[path], num_warps=WARPS[_tile(N, M)][0],
        )  # fmt: skip
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
    """Return the gradients of cost, dustbin [B], log a [B, N] and log b [B, M], item by item."""
    B, N, M = cost.shape
    grad_cost = cost.new_empty(B, N, M)
    grad_dustbin, grad_a, grad_b = (cost.new_empty(shape, dtype=torch.float32) for shape in ((B,), (B, N), (B, M)))
    if B:
        upstream = [grad.contiguous() for grad in (grad_plan, grad_row_slack, grad_col_slack)]
        problem, settings = _problem(cost, rows, cols, dustbin, log_a, log_b, eps, history.shape[1], slack)
        _sinkhorn_bwd_kernel[(B,)](
            *upstream, *problem, history, scales, grad_cost, grad_dustbin, grad_a, grad_b,
            **settings, num_warps=WARPS[_tile(N, M)][1],
        )  # fmt: skip
    return grad_cost, grad_dustbin, grad_a, grad_b


def _tile(N: int, M: int) -> tuple[int, int]:
    return 64 if N <= 64 else 128, 64 if M <= 64 else 128


def _problem(cost, rows, cols, dustbin, log_a, log_b, eps, iterations, slack):
    """Return the arguments that say what is to be solved, and the compile-time ones."""
    N, M = cost.shape[1:]
    cost = cost.contiguous()
    log_a, log_b = (None if w is None else w.contiguous() for w in (log_a, log_b))
    problem = (cost, rows, cols, dustbin, log_a, log_b, N, M, iterations, -1.0 / eps)
    block_n, block_m = _tile(N, M)
    return problem, {"MINIMAL": slack == "minimal", "BLOCK_N": block_n, "BLOCK_M": block_m, "N0": 16, "M0": 8}


@triton.jit(do_not_specialize=["N", "M", "iterations"])
def _sinkhorn_fwd_kernel(
    cost_ptr,
    rows_ptr,
    cols_ptr,
    dustbin_ptr,
    log_a_ptr,
    log_b_ptr,
    N,
    M,
    iterations,
    neg_inv_eps,
    plan_ptr,
    row_slack_ptr,
    col_slack_ptr,
    history_ptr,
    scales_ptr,
    MINIMAL: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N0: tl.constexpr,
    M0: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    offs_n, offs_m = row_offsets(BLOCK_N, N0), col_offsets(BLOCK_M, M0)
    SHIFT: tl.constexpr = dustbin_ptr is not None and not MINIMAL
    Z, z, masses, factor = _load_problem(
        item,
        (N, M),
        cost_ptr,
        rows_ptr,
        cols_ptr,
        dustbin_ptr,
        log_a_ptr,
        log_b_ptr,
        neg_inv_eps,
        MINIMAL,
        BLOCK_N,
        BLOCK_M,
        N0,
        M0,
    )
    history = (history_ptr + item * iterations * (N + M + 2), N, M, iterations)
    P, r, c, scales = solve_tile(Z, z, masses, history, SHIFT, PATH, SAVE=True)
    mask_n, mask_m = offs_n < N, offs_m < M
    # plan = factor P
    tl.store(plan_ptr + (item * N + offs_n) * M + offs_m, factor * P, mask_n & mask_m)
    tl.store(row_slack_ptr + item * N + offs_n, factor * r, mask_n)
    tl.store(col_slack_ptr + item * M + offs_m, factor * c, mask_m)
    tl.store(scales_ptr + item, scales == 1)


@triton.jit(do_not_specialize=["N", "M", "iterations"])
def _sinkhorn_bwd_kernel(
    grad_plan_ptr,
    grad_row_slack_ptr,
    grad_col_slack_ptr,
    cost_ptr,
    rows_ptr,
    cols_ptr,
    dustbin_ptr,
    log_a_ptr,
    log_b_ptr,
    N,
    M,
    iterations,
    neg_inv_eps,
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
    offs_n, offs_m = row_offsets(BLOCK_N, N0), col_offsets(BLOCK_M, M0)
    SHIFT: tl.constexpr = dustbin_ptr is not None and not MINIMAL
    Z, z, masses, factor = _load_problem(
        item,
        (N, M),
        cost_ptr,
        rows_ptr,
        cols_ptr,
        dustbin_ptr,
        log_a_ptr,
        log_b_ptr,
        neg_inv_eps,
        MINIMAL,
        BLOCK_N,
        BLOCK_M,
        N0,
        M0,
    )
    log_a, log_a_bin, log_b, log_b_bin = masses
    row, col = log_a != -INF, log_b != -INF
    # the factor of the plan belongs to the upstream gradients
    offs = (item * N + offs_n) * M + offs_m
    G = factor * tl.load(grad_plan_ptr + offs, mask=row & col, other=0.0).to(tl.float32)
    Gr = factor * tl.load(grad_row_slack_ptr + item * N + offs_n, mask=row, other=0.0).to(tl.float32)
    Gc = factor * tl.load(grad_col_slack_ptr + item * M + offs_m, mask=col, other=0.0).to(tl.float32)
    scales = tl.load(scales_ptr + item).to(tl.int32)
    history = (history_ptr + item * iterations * (N + M + 2), N, M, iterations)
    dZ, dz, da, da_bin, db, db_bin = reverse_tile(G, Gr, Gc, Z, z, masses, history, scales, SHIFT)
    mask_n, mask_m = offs_n < N, offs_m < M
    tl.store(grad_cost_ptr + offs, neg_inv_eps * dZ, mask_n & mask_m)
    tl.store(grad_dustbin_ptr + item + tl.zeros([1, 1, 1, 1], tl.int32), neg_inv_eps * dz)
    # with weights, a_bin = sum b and b_bin = sum a
    if dustbin_ptr is not None:
        da += db_bin * tl.where(row, tl.exp(log_a - log_b_bin), 0.0)
        db += da_bin * tl.where(col, tl.exp(log_b - log_a_bin), 0.0)
    tl.store(grad_log_a_ptr + item * N + offs_n, da, mask_n)
    tl.store(grad_log_b_ptr + item * M + offs_m, db, mask_m)


@triton.jit
def _load_problem(
    item, size, cost_ptr, rows_ptr, cols_ptr, dustbin_ptr, log_a_ptr, log_b_ptr, neg_inv_eps,
    MINIMAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, N0: tl.constexpr, M0: tl.constexpr,
):  # fmt: skip
    """Return Z, z, the masses and the plan's factor."""
    N, M = size
    offs_n, offs_m = row_offsets(BLOCK_N, N0), col_offsets(BLOCK_M, M0)
    n, m = _count(rows_ptr, item, N), _count(cols_ptr, item, M)
    HAS_BIN: tl.constexpr = dustbin_ptr is not None
    WEIGHTED: tl.constexpr = log_a_ptr is not None or log_b_ptr is not None
    masses, factor = uniform_log_masses(n, m, offs_n, offs_m, HAS_BIN and not WEIGHTED, MINIMAL)
    log_a, log_a_bin, log_b, log_b_bin = masses
    if WEIGHTED:
        log_a = _log_weights(log_a_ptr, item, n, N, offs_n)
        log_b = _log_weights(log_b_ptr, item, m, M, offs_m)
        if HAS_BIN:
            log_a_bin, log_b_bin = _log_total(log_b, 1), _log_total(log_a, 0)
        else:
            both = (max_over(log_a, 0) != -INF) & (max_over(log_b, 1) != -INF)
            log_a, log_b = tl.where(both, log_a, -INF), tl.where(both, log_b, -INF)
    row, col = log_a != -INF, log_b != -INF
    offs = (item * N + offs_n) * M + offs_m
    cost = tl.load(cost_ptr + offs, mask=row & col, other=0.0).to(tl.float32)
    z = 0.0
    if HAS_BIN:
        z = tl.load(dustbin_ptr).to(tl.float32) * neg_inv_eps
    return cost * neg_inv_eps, z, (log_a, log_a_bin, log_b, log_b_bin), factor


@triton.jit
def _count(count_ptr, item, size):
    """Return how many rows or columns of an item count: all without counts, and never more than there are."""
    if count_ptr is None:
        count = size
    else:
        count = tl.minimum(tl.maximum(tl.load(count_ptr + item), 0), size).to(tl.int32)
    return count


@triton.jit
def _log_weights(weights_ptr, item, count, size, offs):
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
