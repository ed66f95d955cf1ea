"""One Sinkhorn problem in registers: solved and differentiated by one program, as Triton device functions.

Shared by `kernels.sinkhorn_small` and `kernels.matching_triton`. A tile of N rows and M columns has four axes, so that
a thread holds a few rows by a few columns: row = n1 * N0 + n0 and column = m1 * M0 + m0, with n1, m1 inside a thread,
m0 across the lanes of a warp, n0 across lanes and warps.

    tile [N1, M1, N0, M0],  row vector [N1, 1, N0, 1],  column vector [1, M1, 1, M0],  their bins [1, 1, 1, 1]

These broadcast as they are. `sum_over(x, 0)` sums rows and `sum_over(x, 1)` columns, and both keep all axes; the order
is n1 or m1 inside a thread, then n0 or m0 between threads.

    Z          -cost / eps; anything in the padding
    z          -dustbin / eps, a scalar; 0 without a bin
    masses     (log_a, log_a_bin, log_b, log_b_bin); -inf is what takes no part: padding, a bin without mass
    history    (pointer, N_out, M_out, T) of a buffer [N_out + 1 + M_out + 1, T + 1]: u, u_bin, v, v_bin at the start
               (u is 0) and after every iteration

Each item takes the scaling path where its own values allow that, else the log path; they give the same result:

    scaling    u = a / (K v + kr v_bin),  u_bin = a_bin / (kc.v + kk v_bin)  with K = exp(Z - rho - sigma), the same for
               the bin's column kr, row kc and corner kk, started at v = exp(sigma).
               SHIFT: rho = z, sigma = 0, legal if max(Z - z) <= RANGE; every row and column needs a bin with mass.
               Otherwise rho, sigma are the row, then the column maxima, legal if max u max v stays <= exp(RANGE).
    log        u = log a - LSE(Z + v, z + v_bin)
"""

import triton
import triton.language as tl

RANGE = tl.constexpr(60.0)
LARGEST = tl.constexpr(1.1420073898156842e26)  # exp(RANGE)
MASS_RANGE = tl.constexpr(12.0)  # nats below 1 that a mass may have on top of that
INF = tl.constexpr(float("inf"))

AUTO = tl.constexpr(0)
LOG = tl.constexpr(1)
SCALING = tl.constexpr(2)


@triton.jit
def row_offsets(BLOCK_N: tl.constexpr, N0: tl.constexpr):
    """Return the indices of a tile's rows, a row vector."""
    return tl.arange(0, BLOCK_N // N0)[:, None, None, None] * N0 + tl.arange(0, N0)[None, None, :, None]


@triton.jit
def col_offsets(BLOCK_M: tl.constexpr, M0: tl.constexpr):
    """Return the indices of a tile's columns, a column vector."""
    return tl.arange(0, BLOCK_M // M0)[None, :, None, None] * M0 + tl.arange(0, M0)[None, None, None, :]


@triton.jit
def sum_over(x, AXIS: tl.constexpr):
    """Return the sum over all rows (0) or all columns (1)."""
    return tl.sum(tl.sum(x, AXIS, keep_dims=True), AXIS + 2, keep_dims=True)


@triton.jit
def sum_rows_of_both(x, y):
    """Return the sums over all rows of a tile and of a row vector, a copy of it in each column, in one reduction."""
    x, y = tl.broadcast(tl.sum(x, 0, keep_dims=True), tl.sum(y, 0, keep_dims=True))
    return tl.reduce((x, y), 2, _add_both, keep_dims=True)


@triton.jit
def _add_both(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def max_over(x, AXIS: tl.constexpr):
    """Return the maximum over all rows (0) or all columns (1)."""
    return tl.max(tl.max(x, AXIS, keep_dims=True), AXIS + 2, keep_dims=True)


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
        scales = _may_scale(bordered, z, masses, SHIFT)
    if PATH == LOG:
        scales = 0
    if scales == 1:
        P, r, c, in_range = _solve_scaling(bordered, z, masses, history, SHIFT, SAVE)
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
        dZ, dz, da, da_bin, db, db_bin = _reverse_scaling(G, Gr, Gc, bordered, z, masses, history, SHIFT)
    else:
        dZ, dz, da, da_bin, db, db_bin = _reverse_log(G, Gr, Gc, bordered, masses, history)
    return dZ, dz, da, da_bin, db, db_bin


@triton.jit
def _solve_scaling(bordered, z, masses, history, SHIFT: tl.constexpr, SAVE: tl.constexpr):
    K, kr, kc, kk, v, v_bin = _absorb(bordered, z, masses, SHIFT)
    a, a_bin, b, b_bin = _exp(masses)
    # added to the totals of what has no mass, which are 0
    pad_a, pad_a_bin, pad_b, pad_b_bin = _is_zero(a), _is_zero(a_bin), _is_zero(b), _is_zero(b_bin)
    if SHIFT:
        # a total holds the other side's bin, so that only without that bin it can be 0
        pad_a, pad_b = pad_b_bin, pad_a_bin
    u, u_bin, most_u, most_v = tl.zeros_like(a), tl.zeros_like(a_bin), tl.zeros_like(a), tl.zeros_like(b)
    # each column has a copy of v_bin, since to make one of them takes as long as a sum over columns
    v_bin += tl.zeros_like(v)
    if SAVE:
        _store(history, 0, u, u_bin, v, max_over(v_bin, 1))
    for t in range(history[3]):
        # u = a / (K v)
        share = _share_of_copies(v_bin)
        u = _quotient(a, tl.sum(tl.sum(K * v, 1, keep_dims=True) + kr * share, 3, keep_dims=True) + pad_a)
        u_bin = _quotient(a_bin, tl.sum(tl.sum(kc * v, 1, keep_dims=True) + kk * share, 3, keep_dims=True) + pad_a_bin)
        # v = b / (K^T u)
        total, total_bin = sum_rows_of_both(K * u, kr * u)
        v = _quotient(b, total + kc * u_bin + pad_b)
        v_bin = _quotient(b_bin, total_bin + kk * u_bin + pad_b_bin)
        if not SHIFT:
            most_u = tl.maximum(most_u, tl.maximum(u, u_bin))
            most_v = tl.maximum(most_v, tl.maximum(v, v_bin))
        if SAVE:
            _store(history, t + 1, u, u_bin, v, max_over(v_bin, 1))
    in_range = 1
    if not SHIFT:
        in_range = (tl.max(most_u) * tl.max(most_v) <= LARGEST).to(tl.int32)
    return K * u * v, kr * u * max_over(v_bin, 1), kc * u_bin * v, in_range


@triton.jit
def _share_of_copies(x):
    """Return [1, 1, 1, M0] with the sum x from a column vector whose elements all are x."""
    share = tl.sum(x, 1, keep_dims=True) * (1.0 / x.shape[1])
    return tl.where(tl.arange(0, x.shape[3])[None, None, None, :] == 0, share, 0.0)


@triton.jit
def _reverse_scaling(G, Gr, Gc, bordered, z, masses, history, SHIFT: tl.constexpr):
    K, kr, kc, kk, _, _ = _absorb(bordered, z, masses, SHIFT)
    a, a_bin, b, b_bin = _exp(masses)
    T = history[3]
    u, u_bin, v, v_bin = _load(history, T, masses)
    # S = G u v^T;  gu = (G K) v;  gv = (G K)^T u
    S = G * u * v
    gu, gu_bin = sum_over(G * K * v, 1) + Gr * kr * v_bin, sum_over(Gc * kc * v, 1)
    gv, gv_bin = sum_over(G * K * u, 0) + Gc * kc * u_bin, sum_over(Gr * kr * u, 0)
    dz = gu_bin * u_bin + gv_bin * v_bin
    da, da_bin, db, db_bin = tl.zeros_like(a), tl.zeros_like(a_bin), tl.zeros_like(b), tl.zeros_like(b_bin)
    for i in range(T):
        u_next, u_next_bin, w, w_bin = _load(history, T - 1 - i, masses)
        # db += gv v;  q = -(gv v) (v / b), since v^2 could overflow;  S += u q^T;  gu += K q
        db += gv * v
        db_bin += gv_bin * v_bin
        q, q_bin = -(gv * v) * _over(v, b), -(gv_bin * v_bin) * _over(v_bin, b_bin)
        S += u * q
        kc_q = sum_over(kc * q, 1)
        gu += sum_over(K * q, 1) + kr * q_bin
        gu_bin += kc_q + kk * q_bin
        # da += gu u;  p = -(gu u) (u / a);  S += p w^T;  gv = K^T p
        da += gu * u
        da_bin += gu_bin * u_bin
        p, p_bin = -(gu * u) * _over(u, a), -(gu_bin * u_bin) * _over(u_bin, a_bin)
        S += p * w
        kr_p = sum_over(kr * p, 0)
        gv, gv_bin = sum_over(K * p, 0) + kc * p_bin, kr_p + kk * p_bin
        # the bin's row and column of S, times those of K: what is not here cancels against da_bin and db_bin below
        dz += u_bin * kc_q + w_bin * kr_p
        gu, gu_bin = tl.zeros_like(gu), tl.zeros_like(gu_bin)
        u, u_bin, v, v_bin = u_next, u_next_bin, w, w_bin
    return K * S, dz - da_bin - db_bin, da, da_bin, db, db_bin


@triton.jit
def _solve_log(bordered, masses, history, SAVE: tl.constexpr):
    Z, zr, zc, zk = bordered
    log_a, log_a_bin, log_b, log_b_bin = masses
    u, u_bin = tl.zeros_like(log_a), tl.zeros_like(log_a_bin)
    v, v_bin = tl.zeros_like(log_b), tl.zeros_like(log_b_bin)
    if SAVE:
        _store(history, 0, u, u_bin, v, v_bin)
    for t in range(history[3]):
        # u = log a - LSE(Z + v)
        u = _minus_lse(log_a, Z + v, zr + v_bin, 1)
        u_bin = _minus_lse(log_a_bin, zc + v, zk + v_bin, 1)
        # v = log b - LSE(Z + u)
        v = _minus_lse(log_b, Z + u, zc + u_bin, 0)
        v_bin = _minus_lse(log_b_bin, zr + u, zk + u_bin, 0)
        if SAVE:
            _store(history, t + 1, u, u_bin, v, v_bin)
    return tl.exp(Z + u + v), tl.exp(zr + u + v_bin), tl.exp(zc + u_bin + v)


@triton.jit
def _reverse_log(G, Gr, Gc, bordered, masses, history):
    T = history[3]
    u, u_bin, v, v_bin = _load(history, T, masses)
    # dZ = G P;  gu, gv: its row and column sums
    E, Er, Ec, _ = _plan(bordered, u, u_bin, v, v_bin)
    dZ, dZr, dZc = G * E, Gr * Er, Gc * Ec
    gu, gu_bin = sum_over(dZ, 1) + dZr, sum_over(dZc, 1)
    gv, gv_bin = sum_over(dZ, 0) + dZc, sum_over(dZr, 0)
    dz = gu_bin + gv_bin
    da, da_bin, db, db_bin = tl.zeros_like(u), tl.zeros_like(u_bin), tl.zeros_like(v), tl.zeros_like(v_bin)
    for i in range(T):
        u_next, u_next_bin, w, w_bin = _load(history, T - 1 - i, masses)
        # db += gv;  E = exp(Z + u + v);  Q = E gv / colsum E;  dZ -= Q;  gu -= rowsum Q
        db += gv
        db_bin += gv_bin
        E, Er, Ec, Ek = _plan(bordered, u, u_bin, v, v_bin)
        q, q_bin = _over(gv, sum_over(E, 0) + Ec), _over(gv_bin, sum_over(Er, 0) + Ek)
        dZ -= E * q
        Ec_q = sum_over(Ec * q, 1)
        gu -= sum_over(E * q, 1) + Er * q_bin
        gu_bin -= Ec_q + Ek * q_bin
        # da += gu;  E = exp(Z + u + w);  Q = E gu / rowsum E;  dZ -= Q;  gv = -colsum Q
        da += gu
        da_bin += gu_bin
        E, Er, Ec, Ek = _plan(bordered, u, u_bin, w, w_bin)
        p, p_bin = _over(gu, sum_over(E, 1) + Er), _over(gu_bin, sum_over(Ec, 1) + Ek)
        dZ -= E * p
        Er_p = sum_over(Er * p, 0)
        gv, gv_bin = -sum_over(E * p, 0) - Ec * p_bin, -Er_p - Ek * p_bin
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
def _absorb(bordered, z, masses, SHIFT: tl.constexpr):
    """Return K, its bin's column, row and corner, and the v and v_bin that stand for zero potentials."""
    Z, zr, zc, zk = bordered
    v, v_bin = tl.where(masses[2] != -INF, 1.0, 0.0), tl.where(masses[3] != -INF, 1.0, 0.0)
    if SHIFT:
        # a bin without mass has potential 0, so that 1 will do
        kr, kc, kk = 1.0, 1.0, 1.0
        Z -= z
    else:
        rho, rho_bin = _finite(tl.maximum(max_over(Z, 1), zr)), _finite(tl.maximum(max_over(zc, 1), zk))
        Z, zr, zc, zk = Z - rho, zr - rho, zc - rho_bin, zk - rho_bin
        sigma, sigma_bin = _finite(tl.maximum(max_over(Z, 0), zc)), _finite(tl.maximum(max_over(zr, 0), zk))
        Z, zr, zc, zk = Z - sigma, zr - sigma_bin, zc - sigma, zk - sigma_bin
        kr, kc, kk = tl.exp(zr), tl.exp(zc), tl.exp(zk)
        v, v_bin = v * tl.exp(sigma), v_bin * tl.exp(sigma_bin)
    return tl.exp(Z), kr, kc, kk, v, v_bin


@triton.jit
def _may_scale(bordered, z, masses, SHIFT: tl.constexpr):
    """Return 1 if the scaling path may be tried: nothing exceeds its range."""
    log_a, log_a_bin, log_b, log_b_bin = masses
    least_a = tl.minimum(_no_mass_is_inf(log_a), _no_mass_is_inf(log_a_bin))
    excess = -MASS_RANGE - tl.minimum(least_a, tl.minimum(_no_mass_is_inf(log_b), _no_mass_is_inf(log_b_bin)))
    if SHIFT:
        excess = tl.maximum(excess, bordered[0] - z - RANGE)
    return (tl.max(excess) <= 0).to(tl.int32)


@triton.jit
def _plan(bordered, u, u_bin, v, v_bin):
    """Return exp(Z + u + v) and its bin's column, row and corner."""
    Z, zr, zc, zk = bordered
    return tl.exp(Z + u + v), tl.exp(zr + u + v_bin), tl.exp(zc + u_bin + v), tl.exp(zk + u_bin + v_bin)


@triton.jit
def _minus_lse(log_mass, x, x_bin, AXIS: tl.constexpr):
    """Return log mass - log sum exp of x over rows (0) or columns (1) and of x_bin; 0 without mass."""
    top = _finite(tl.maximum(max_over(x, AXIS), x_bin))
    total = sum_over(tl.exp(x - top), AXIS) + tl.exp(x_bin - top)
    return tl.where(log_mass == -INF, 0.0, log_mass - top - tl.log(total))


@triton.jit
def _is_zero(mass):
    return tl.where(mass == 0, 1.0, 0.0)


@triton.jit
def _quotient(x, y):
    """Return x / y for y > 0, to 2 ulp: a root and two products take fewer steps than a division."""
    root = tl.rsqrt(y)
    return x * (root * root)


@triton.jit
def _over(x, y):
    """Return x / y, and 0 where y is 0: there is no mass."""
    return tl.where(y == 0, 0.0, x / y)


@triton.jit
def _log_share(count, total):
    """Return log(count / total), -inf for a count of 0 or less."""
    log_count = tl.log(tl.maximum(count, 1).to(tl.float32))
    return tl.where(count > 0, log_count - tl.log(tl.maximum(total, 1).to(tl.float32)), -INF)


@triton.jit
def _exp(masses):
    return tl.exp(masses[0]), tl.exp(masses[1]), tl.exp(masses[2]), tl.exp(masses[3])


@triton.jit
def _finite(x):
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def _no_mass_is_inf(log_mass):
    return tl.where(log_mass == -INF, INF, log_mass)


@triton.jit
def _store(history, t, u, u_bin, v, v_bin):
    pointer, N_out, M_out, T = history
    offs_n, offs_m, bin = _offsets(u, v)
    # every thread of a row holds its u: to say which one stores it spares a change of layout
    lane_n, lane_m = tl.arange(0, u.shape[2])[None, None, :, None], tl.arange(0, v.shape[3])[None, None, None, :]
    row, col = offs_n + lane_m * 0, offs_m + lane_n * 0
    at = pointer + t
    tl.store(at + row * (T + 1), tl.broadcast_to(u, row.shape), mask=(row < N_out) & (lane_m == 0))
    tl.store(at + (N_out + bin) * (T + 1), u_bin)
    at += (N_out + 1) * (T + 1)
    tl.store(at + col * (T + 1), tl.broadcast_to(v, col.shape), mask=(col < M_out) & (lane_n == 0))
    tl.store(at + (M_out + bin) * (T + 1), v_bin)


@triton.jit
def _load(history, t, masses):
    """Return u, u_bin, v, v_bin after t iterations."""
    pointer, N_out, M_out, T = history
    row, col, bin = _offsets(masses[0], masses[2])
    at = pointer + t
    u = tl.load(at + row * (T + 1), mask=row < N_out, other=0.0)
    u_bin = tl.load(at + (N_out + bin) * (T + 1))
    at += (N_out + 1) * (T + 1)
    v = tl.load(at + col * (T + 1), mask=col < M_out, other=0.0)
    v_bin = tl.load(at + (M_out + bin) * (T + 1))
    return u, u_bin, v, v_bin


@triton.jit
def _offsets(u, v):
    """Return the indices of the elements of a row vector, of a column vector and of a bin."""
    offs_n = row_offsets(u.shape[0] * u.shape[2], u.shape[2])
    offs_m = col_offsets(v.shape[1] * v.shape[3], v.shape[3])
    return offs_n, offs_m, tl.zeros([1, 1, 1, 1], tl.int32)
