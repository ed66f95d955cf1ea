"""One Sinkhorn problem in registers: solved and differentiated by one program, as Triton device functions.

Shared by `kernels.sinkhorn_small` and `kernels.matching_triton`; `kernels.sinkhorn_layout` says how tile, row vectors,
column vectors and bins lie in the threads.

    Z          -cost / eps; anything in the padding
    z          -dustbin / eps, a scalar; 0 without a bin
    masses     (log_a, log_a_bin, log_b, log_b_bin); -inf is what takes no part: padding, a bin without mass
    history    (pointer, N_out, M_out, T) of a buffer [N_out + 1 + M_out + 1, T + 1]: u, u_bin, v, v_bin at the start
               (u is 0) and after every iteration

Each item takes the scaling path (`kernels.sinkhorn_scaling`) where its own values allow that, else the log path,

    u = log a - LSE(Z + v, z + v_bin),  v = log b - LSE(Z + u, z + u_bin),  plan = exp(Z + u + v)

and the bins likewise; they give the same result.
"""

import triton
import triton.language as tl

from kernels.reduce import rounded
from kernels.sinkhorn_layout import INF, divide_or_zero, finite, load_vectors, max_over, store_vectors, sum_over
from kernels.sinkhorn_scaling import may_scale, reverse_scaling, solve_scaling

AUTO = tl.constexpr(0)
LOG = tl.constexpr(1)
SCALING = tl.constexpr(2)


@triton.jit
def uniform_log_masses(n, m, offs_n, offs_m, HAS_BIN: tl.constexpr, MINIMAL: tl.constexpr):
    """Return (masses, the plan's factor) for n rows and m columns that count alike."""
    if HAS_BIN:
        n_total, m_total, factor = n + m, n + m, (n + m).to(tl.float32)
        a_bin, b_bin = m, n
        if MINIMAL:
            a_bin, b_bin = m - n, n - m
    else:
        # an item with an empty side has nowhere to send its mass
        n, m = tl.where(m > 0, n, 0), tl.where(n > 0, m, 0)
        n_total, m_total, factor = n, m, 1.0
        a_bin, b_bin = 0, 0
    log_a = _log_share(tl.where(offs_n < n, 1, 0), n_total)
    log_b = _log_share(tl.where(offs_m < m, 1, 0), m_total)
    bin = tl.zeros([1, 1, 1, 1], tl.int32)
    return (log_a, _log_share(bin + a_bin, n_total), log_b, _log_share(bin + b_bin, m_total)), factor


@triton.jit
def solve_tile(Z, z, masses, history, SHIFT: tl.constexpr, PATH: tl.constexpr, SAVE: tl.constexpr):
    """Return the plan, the row slack, the column slack, all without the factor, and 1 if scaling solved it.

    Args:
        SHIFT: slack is "full".
        PATH: AUTO, or LOG or SCALING whatever the values.
        SAVE: fill the history.
    """
    bordered = _border(Z, z, masses)
    P, r, c = tl.zeros_like(Z), tl.zeros_like(masses[0]), tl.zeros_like(masses[2])
    scales = 1
    if PATH == AUTO:
        scales = may_scale(bordered, z, masses, SHIFT)
    if PATH == LOG:
        scales = 0
    if scales == 1:
        P, r, c, in_range = solve_scaling(bordered, z, masses, history, SHIFT, SAVE)
        if PATH == AUTO:
            scales = in_range
    if scales == 0:
        P, r, c = _solve_log(bordered, masses, history, SAVE)
    return P, r, c, scales


@triton.jit
def reverse_tile(G, Gr, Gc, Z, z, masses, history, scales, SHIFT: tl.constexpr):
    """Return the gradients of sum(G plan) + sum(Gr row_slack) + sum(Gc col_slack), exact after T iterations.

    They are with respect to Z, z [1, 1, 1, 1], log_a, log_a_bin, log_b, log_b_bin, in this order.

    Args:
        G, Gr, Gc: a tile, a row and a column vector; 0 in the padding; the plan's factor is in them.
        history, scales: as filled and returned by `solve_tile`; in one launch `tl.debug_barrier()` comes between.
    """
    bordered = _border(Z, z, masses)
    if scales == 1:
        dZ, dz, da, da_bin, db, db_bin = reverse_scaling(G, Gr, Gc, bordered, z, masses, history, SHIFT)
    else:
        dZ, dz, da, da_bin, db, db_bin = _reverse_log(G, Gr, Gc, bordered, masses, history)
    return dZ, dz, da, da_bin, db, db_bin


@triton.jit
def _solve_log(bordered, masses, history, SAVE: tl.constexpr):
    Z, zr, zc, zk = bordered
    log_a, log_a_bin, log_b, log_b_bin = masses
    u, u_bin = tl.zeros_like(log_a), tl.zeros_like(log_a_bin)
    v, v_bin = tl.zeros_like(log_b), tl.zeros_like(log_b_bin)
    if SAVE:
        store_vectors(history, 0, u, u_bin, v, v_bin)
    for t in range(history[3]):
        # u = log a - LSE(Z + v)
        u = _minus_lse(log_a, Z + v, zr + v_bin, 1)
        u_bin = _minus_lse(log_a_bin, zc + v, zk + v_bin, 1)
        # v = log b - LSE(Z + u)
        v = _minus_lse(log_b, Z + u, zc + u_bin, 0)
        v_bin = _minus_lse(log_b_bin, zr + u, zk + u_bin, 0)
        if SAVE:
            store_vectors(history, t + 1, u, u_bin, v, v_bin)
    return tl.exp(Z + u + v), tl.exp(zr + u + v_bin), tl.exp(zc + u_bin + v)


@triton.jit
def _reverse_log(G, Gr, Gc, bordered, masses, history):
    T = history[3]
    u, u_bin, v, v_bin = load_vectors(history, T, masses)
    # dZ = G P;  gu, gv: its row and column sums
    E, Er, Ec, _ = _plan(bordered, u, u_bin, v, v_bin)
    dZ, dZr, dZc = G * E, Gr * Er, Gc * Ec
    gu, gu_bin = sum_over(rounded(dZ), 1) + dZr, sum_over(rounded(dZc), 1)
    gv, gv_bin = sum_over(rounded(dZ), 0) + dZc, sum_over(rounded(dZr), 0)
    dz = gu_bin + gv_bin
    da, da_bin, db, db_bin = tl.zeros_like(u), tl.zeros_like(u_bin), tl.zeros_like(v), tl.zeros_like(v_bin)
    for i in range(T):
        u_next, u_next_bin, w, w_bin = load_vectors(history, T - 1 - i, masses)
        # db += gv;  E = exp(Z + u + v);  Q = E gv / colsum E;  dZ -= Q;  gu -= rowsum Q
        db += gv
        db_bin += gv_bin
        E, Er, Ec, Ek = _plan(bordered, u, u_bin, v, v_bin)
        q, q_bin = divide_or_zero(gv, sum_over(E, 0) + Ec), divide_or_zero(gv_bin, sum_over(Er, 0) + Ek)
        dZ -= E * q
        Ec_q = sum_over(rounded(Ec * q), 1)
        gu -= sum_over(rounded(E * q), 1) + Er * q_bin
        gu_bin -= Ec_q + Ek * q_bin
        # da += gu;  E = exp(Z + u + w);  Q = E gu / rowsum E;  dZ -= Q;  gv = -colsum Q
        da += gu
        da_bin += gu_bin
        E, Er, Ec, Ek = _plan(bordered, u, u_bin, w, w_bin)
        p, p_bin = divide_or_zero(gu, sum_over(E, 1) + Er), divide_or_zero(gu_bin, sum_over(Ec, 1) + Ek)
        dZ -= E * p
        Er_p = sum_over(rounded(Er * p), 0)
        gv, gv_bin = -sum_over(rounded(E * p), 0) - Ec * p_bin, -Er_p - Ek * p_bin
        # a Q's sum over the bin's row or column is the gu_bin or gv_bin it came from: in da_bin and db_bin
        dz -= Ec_q + Er_p
        gu, gu_bin = tl.zeros_like(gu), tl.zeros_like(gu_bin)
        u, u_bin, v, v_bin = u_next, u_next_bin, w, w_bin
    return dZ, dz - da_bin - db_bin, da, da_bin, db, db_bin


@triton.jit
def _border(Z, z, masses):
    """Return Z and its bin's column, row and corner, -inf where either side has no mass."""
    log_a, log_a_bin, log_b, log_b_bin = masses
    row, col, row_bin, col_bin = log_a != -INF, log_b != -INF, log_a_bin != -INF, log_b_bin != -INF
    Z, zr = tl.where(row & col, Z, -INF), tl.where(row & col_bin, z, -INF)
    return Z, zr, tl.where(row_bin & col, z, -INF), tl.where(row_bin & col_bin, z, -INF)


@triton.jit
def _plan(bordered, u, u_bin, v, v_bin):
    """Return exp(Z + u + v) and its bin's column, row and corner."""
    Z, zr, zc, zk = bordered
    return tl.exp(Z + u + v), tl.exp(zr + u + v_bin), tl.exp(zc + u_bin + v), tl.exp(zk + u_bin + v_bin)


@triton.jit
def _minus_lse(log_mass, x, x_bin, AXIS: tl.constexpr):
    """Return log mass - log sum exp of x over rows (0) or columns (1) and of x_bin; 0 without mass."""
    top = finite(tl.maximum(max_over(x, AXIS), x_bin))
    total = sum_over(tl.exp(x - top), AXIS) + tl.exp(x_bin - top)
    return tl.where(log_mass == -INF, 0.0, log_mass - top - tl.log(total))


@triton.jit
def _log_share(count, total):
    """Return log(count / total), -inf for a count of 0 or less."""
    log_count = tl.log(tl.maximum(count, 1).to(tl.float32))
    return tl.where(count > 0, log_count - tl.log(tl.maximum(total, 1).to(tl.float32)), -INF)
