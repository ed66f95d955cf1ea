"""What a program of Sinkhorn's large form reads of its item: Z, G, masses, and the vectors of a time, block by block.

Positions are row and column indices that broadcast, [n, 1] and [1, m]; row N and column M are the bins. Vectors of rows
and columns (u and v, p and q) lie together, [T+1, N+1 + M+1] for an item, those of one time side by side. A problem is
(costs, log masses, history, N, M) as `problem_of_item` makes it.
"""

import triton
import triton.language as tl

from kernels.sinkhorn_layout import INF


@triton.jit
def problem_of_item(
    cost_ptr, cost_b, cost_n, cost_m, log_mass_a_ptr, log_mass_b_ptr, history_ptr, dustbin_ptr, N, M, T, neg_inv_eps
):  # fmt: skip
    """Return where this program's item has its costs, log masses and potentials, and its sizes."""
    item, z = tl.program_id(0).to(tl.int64), 0.0
    if dustbin_ptr is not None:
        z = tl.load(dustbin_ptr).to(tl.float32) * neg_inv_eps
    costs = cost_ptr + item * cost_b, cost_n, cost_m, z, neg_inv_eps
    log_masses = log_mass_a_ptr + item * (N + 1), log_mass_b_ptr + item * (M + 1)
    return costs, log_masses, vectors_of_item(history_ptr, N, M, T), N, M


@triton.jit
def upstream_of_item(
    upstream_ptr, upstream_b, upstream_n, upstream_m, upstream_row_ptr, upstream_col_ptr, factor_ptr, N, M
):  # fmt: skip
    """Return where this program's item has its upstream gradients, and the plan's factor."""
    item = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + item)
    of_plan = upstream_ptr + item * upstream_b, upstream_n, upstream_m
    return of_plan, upstream_row_ptr + item * N, upstream_col_ptr + item * M, factor


@triton.jit
def exponents(problem, row, col):
    """Return Z, -inf where either side has no mass.

    Costs are read before it is known where there is mass: their loads do not wait for those of the masses.
    """
    costs, _, _, N, M = problem
    cost_at, cost_n, cost_m, z, neg_inv_eps = costs
    log_a, log_b = load_log_masses(problem, row, col)
    at = cost_at + row.to(tl.int64) * cost_n + col.to(tl.int64) * cost_m
    Z = tl.load(at, (row < N) & (col < M), other=0.0).to(tl.float32) * neg_inv_eps
    Z = tl.where((row == N) | (col == M), z, Z)
    return tl.where((log_a != -INF) & (log_b != -INF), Z, -INF)


@triton.jit
def load_upstream(problem, upstream, row, col):
    """Return G: the upstream gradients of plan, row slack and column slack, times the plan's factor.

    They are read only where there is mass, and so wait for the masses; it happens once per solve, not per iteration.
    """
    of_plan, row_slack_at, col_slack_at, factor = upstream
    plan_at, stride_n, stride_m = of_plan
    _, _, _, N, M = problem
    log_a, log_b = load_log_masses(problem, row, col)
    taken = (log_a != -INF) & (log_b != -INF)
    at = plan_at + row.to(tl.int64) * stride_n + col.to(tl.int64) * stride_m
    G = tl.load(at, taken & (row < N) & (col < M), other=0.0).to(tl.float32)
    G += tl.load(row_slack_at + row + col * 0, taken & (row < N) & (col == M), other=0.0).to(tl.float32)
    G += tl.load(col_slack_at + col + row * 0, taken & (row == N) & (col < M), other=0.0).to(tl.float32)
    return factor * G


@triton.jit
def load_log_masses(problem, row, col):
    """Return log a of rows and log b of columns, -inf beyond the bin."""
    _, log_masses, _, N, M = problem
    log_mass_a_at, log_mass_b_at = log_masses
    return tl.load(log_mass_a_at + row, row <= N, other=-INF), tl.load(log_mass_b_at + col, col <= M, other=-INF)


@triton.jit
def load_row_vector(vectors_at, row, t, N, M):
    """Return u_t, or p_t, 0 beyond the bin."""
    at, exists = row_vector_at(vectors_at, row, t, N, M)
    return tl.load(at, exists, other=0.0)


@triton.jit
def load_col_vector(vectors_at, col, t, N, M):
    """Return v_t, or q_t, 0 beyond the bin."""
    at, exists = col_vector_at(vectors_at, col, t, N, M)
    return tl.load(at, exists, other=0.0)


@triton.jit
def own_vector_at(vectors_at, row, col, t, N, M, ROWS: tl.constexpr):
    """Return where the vector of rows (ROWS) or of columns of time t lies, and which elements exist."""
    if ROWS:
        at, exists = row_vector_at(vectors_at, row, t, N, M)
    else:
        at, exists = col_vector_at(vectors_at, col, t, N, M)
    return at, exists


@triton.jit
def row_vector_at(vectors_at, row, t, N, M):
    """Return where u_t or p_t lies, or another vector of rows, and which elements exist, bin included."""
    return vectors_at + tl.cast(t, tl.int64) * (N + M + 2) + row, row <= N


@triton.jit
def col_vector_at(vectors_at, col, t, N, M):
    """Return where v_t or q_t lies, or another vector of columns, and which elements exist, bin included."""
    return vectors_at + tl.cast(t, tl.int64) * (N + M + 2) + (N + 1 + col), col <= M


@triton.jit
def vectors_of_item(pointer, N, M, T):
    """Return where the vectors [T+1, N+1 + M+1] of this program's item begin."""
    return pointer + tl.program_id(0).to(tl.int64) * (N + M + 2) * (T + 1)


@triton.jit
def tile_indices(TILE: tl.constexpr):
    """Return the item, rows and columns of this program."""
    row, col = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(2) * TILE + tl.arange(0, TILE)
    return tl.program_id(0).to(tl.int64), row[:, None], col[None, :]


@triton.jit
def block_indices(own, other, ROWS: tl.constexpr):
    """Return rows and columns of a block: own rows by other columns (ROWS), or other rows by own columns."""
    if ROWS:
        row, col = own[:, None], other[None, :]
    else:
        row, col = other[:, None], own[None, :]
    return row, col


@triton.jit
def block_offsets(start, size, BLOCK: tl.constexpr):
    """Return the indices of a block, those past the end moved past the bin, which comes by itself."""
    offs = start + tl.arange(0, BLOCK)
    return tl.where(offs < size, offs, size + 1)
