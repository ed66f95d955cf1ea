"""One Sinkhorn problem in registers: solved and differentiated by one program, as Triton device functions.

Shared by `kernels.sinkhorn_small` and `kernels.matching`. A tile is [N, M], with row vectors [N], column vectors [M];
the bin is a scalar beside each vector, never a row of the tile.

    Z          -cost / eps; anything in the padding
    z          -dustbin / eps; 0 without a bin
    masses     (log_a, log_a_bin, log_b, log_b_bin); -inf is what takes no part: padding, a bin without mass
    history    (pointer, N_out, M_out, T) of a buffer [T, N_out + 1 + M_out + 1]: u, u_bin, v, v_bin of every iteration

Each item takes the scaling path where its own values allow that, else the log path; they give the same result:

    scaling    u = a / (K v + kr v_bin),  u_bin = a_bin / (kc.v + kk v_bin)  with K = exp(Z - rho - sigma), the same for
               the bin's column kr, row kc and corner kk, started at v = exp(sigma).
               SHIFT: rho = z, sigma = 0, legal if max(Z - z) <= RANGE; every row and column needs a bin with mass.
               Otherwise rho, sigma are the row, then the column maxima, legal if max u max v stays <= exp(RANGE).
    log        u = log a - LSE(Z + v, z + v_bin)

Sums run over one axis of the tile at a time, in the order of its layout.
"""

import triton
import triton.language as tl

RANGE = tl.constexpr(60.0)
MASS_RANGE = tl.constexpr(12.0)
LARGEST = tl.constexpr(1.1420073898156842e26)  # exp(RANGE)
INF = tl.constexpr(float("inf"))

AUTO = tl.constexpr(0)
LOG = tl.constexpr(1)
SCALING = tl.constexpr(2)


@triton.jit
def uniform_log_masses(n, m, offs_n, offs_m, HAS_BIN: tl.constexpr, MINIMAL: tl.constexpr):
    """Return (masses, the plan's factor) for n rows and m columns that count alike."""
    if HAS_BIN:
        log_s = tl.log(tl.maximum(n + m, 1).to(tl.float32))
        log_a = tl.where(offs_n < n, -log_s, -INF)
        log_b = tl.where(offs_m < m, -log_s, -INF)
        if MINIMAL:
            log_a_bin = _log_count(m - n, log_s)
            log_b_bin = _log_count(n - m, log_s)
        else:
            log_a_bin = _log_count(m, log_s)
            log_b_bin = _log_count(n, log_s)
        factor = (n + m).to(tl.float32)
    else:
        both = (n > 0) & (m > 0)
        log_a = tl.where((offs_n < n) & both, -tl.log(tl.maximum(n, 1).to(tl.float32)), -INF)
        log_b = tl.where((offs_m < m) & both, -tl.log(tl.maximum(m, 1).to(tl.float32)), -INF)
        log_a_bin = tl.cast(-INF, tl.float32)
        log_b_bin = tl.cast(-INF, tl.float32)
        factor = 1.0
    return (log_a, log_a_bin, log_b, log_b_bin), factor


@triton.jit
def solve_tile(Z, z, masses, history, SHIFT: tl.constexpr, PATH: tl.constexpr, SAVE: tl.constexpr):
    """Return the plan [N, M], row slack [N], column slack [M], all without the factor, and 1 if scaling solved it.

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

    They are with respect to Z [N, M], z, log_a [N], log_a_bin, log_b [M], log_b_bin, in this order.

    Args:
        G, Gr, Gc: 0 in the padding; the plan's factor is in them.
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
    u, u_bin = tl.zeros_like(a), 0.0
    most_u, most_v = u, tl.zeros_like(b)
    for t in range(history[3]):
        # u = a / (K v)
        u = _spread(a, tl.sum(K * v[None, :], 1) + kr * v_bin)
        u_bin = _spread(a_bin, tl.sum(kc * v, 0) + kk * v_bin)
        # v = b / (K^T u)
        v = _spread(b, tl.sum(K * u[:, None], 0) + kc * u_bin)
        v_bin = _spread(b_bin, tl.sum(kr * u, 0) + kk * u_bin)
        if not SHIFT:
            most_u = tl.maximum(most_u, tl.maximum(u, u_bin))
            most_v = tl.maximum(most_v, tl.maximum(v, v_bin))
        if SAVE:
            _store(history, t, u, u_bin, v, v_bin)
    in_range = 1
    if not SHIFT:
        in_range = (tl.max(most_u, 0) * tl.max(most_v, 0) <= LARGEST).to(tl.int32)
    return K * u[:, None] * v[None, :], kr * u * v_bin, kc * u_bin * v, in_range


@triton.jit
def _reverse_scaling(G, Gr, Gc, bordered, z, masses, history, SHIFT: tl.constexpr):
    K, kr, kc, kk, v0, v0_bin = _absorb(bordered, z, masses, SHIFT)
    a, a_bin, b, b_bin = _exp(masses)
    T = history[3]
    u, u_bin, v, v_bin = _load(history, T - 1, masses)
    # S = G u v^T;  gu = (G K) v;  gv = (G K)^T u
    S, Sr, Sc = G * u[:, None] * v[None, :], Gr * u * v_bin, Gc * u_bin * v
    gu, gu_bin = tl.sum(G * K * v[None, :], 1) + Gr * kr * v_bin, tl.sum(Gc * kc * v, 0)
    gv, gv_bin = tl.sum(G * K * u[:, None], 0) + Gc * kc * u_bin, tl.sum(Gr * kr * u, 0)
    Sk, da, da_bin, db, db_bin = 0.0, tl.zeros_like(a), 0.0, tl.zeros_like(b), 0.0
    for i in range(T):
        t = T - 1 - i
        u_next, u_next_bin, w, w_bin = _load(history, t - 1, masses)
        w = tl.where(t > 0, w, v0)
        w_bin = tl.where(t > 0, w_bin, v0_bin)
        # db += gv v;  q = -(gv v) (v / b);  S += u q^T;  gu += K q
        db += gv * v
        db_bin += gv_bin * v_bin
        q, q_bin = -(gv * v) * _over(v, b), -(gv_bin * v_bin) * _over(v_bin, b_bin)
        S += u[:, None] * q[None, :]
        Sr += u * q_bin
        Sc += u_bin * q
        Sk += u_bin * q_bin
        gu += tl.sum(K * q[None, :], 1) + kr * q_bin
        gu_bin += tl.sum(kc * q, 0) + kk * q_bin
        # da += gu u;  p = -(gu u) (u / a);  S += p w^T;  gv = K^T p
        da += gu * u
        da_bin += gu_bin * u_bin
        p, p_bin = -(gu * u) * _over(u, a), -(gu_bin * u_bin) * _over(u_bin, a_bin)
        S += p[:, None] * w[None, :]
        Sr += p * w_bin
        Sc += p_bin * w
        Sk += p_bin * w_bin
        gv, gv_bin = tl.sum(K * p[:, None], 0) + kc * p_bin, tl.sum(kr * p, 0) + kk * p_bin
        gu, gu_bin = tl.zeros_like(gu), 0.0
        u, u_bin, v, v_bin = u_next, u_next_bin, w, w_bin
    dz = tl.sum(kr * Sr, 0) + tl.sum(kc * Sc, 0) + kk * Sk
    return K * S, dz, da, da_bin, db, db_bin


@triton.jit
def _solve_log(bordered, masses, history, SAVE: tl.constexpr):
    Z, zr, zc, zk = bordered
    log_a, log_a_bin, log_b, log_b_bin = masses
    u, v = tl.zeros_like(log_a), tl.zeros_like(log_b)
    u_bin, v_bin = 0.0, 0.0
    for t in range(history[3]):
        # u = log a - LSE(Z + v)
        u = _minus_lse(log_a, Z + v[None, :], zr + v_bin, 1)
        u_bin = _minus_lse(log_a_bin, zc + v, zk + v_bin, 0)
        # v = log b - LSE(Z + u)
        v = _minus_lse(log_b, Z + u[:, None], zc + u_bin, 0)
        v_bin = _minus_lse(log_b_bin, zr + u, zk + u_bin, 0)
        if SAVE:
            _store(history, t, u, u_bin, v, v_bin)
    return tl.exp(Z + u[:, None] + v[None, :]), tl.exp(zr + u + v_bin), tl.exp(zc + u_bin + v)


@triton.jit
def _reverse_log(G, Gr, Gc, bordered, masses, history):
    Z, zr, zc, _ = bordered
    T = history[3]
    u, u_bin, v, v_bin = _load(history, T - 1, masses)
    # dZ = G P;  da, db: its row and column sums
    dZ = G * tl.exp(Z + u[:, None] + v[None, :])
    dZr, dZc = Gr * tl.exp(zr + u + v_bin), Gc * tl.exp(zc + u_bin + v)
    gu, gu_bin = tl.sum(dZ, 1) + dZr, tl.sum(dZc, 0)
    gv, gv_bin = tl.sum(dZ, 0) + dZc, tl.sum(dZr, 0)
    dZk, da, da_bin, db, db_bin = 0.0, tl.zeros_like(u), 0.0, tl.zeros_like(v), 0.0
    for i in range(T):
        t = T - 1 - i
        u_next, u_next_bin, w, w_bin = _load(history, t - 1, masses)
        # E = exp(Z + u + v);  Q = E gv / colsum E;  dZ -= Q;  gu -= rowsum Q
        db += gv
        db_bin += gv_bin
        E, Er, Ec, Ek = _plan(bordered, u, u_bin, v, v_bin)
        q, q_bin = _over(gv, tl.sum(E, 0) + Ec), _over(gv_bin, tl.sum(Er, 0) + Ek)
        dZ -= E * q[None, :]
        dZr -= Er * q_bin
        dZc -= Ec * q
        dZk -= Ek * q_bin
        gu -= tl.sum(E * q[None, :], 1) + Er * q_bin
        gu_bin -= tl.sum(Ec * q, 0) + Ek * q_bin
        # E = exp(Z + u + v of the iteration before);  Q = E gu / rowsum E;  dZ -= Q;  gv = -colsum Q
        da += gu
        da_bin += gu_bin
        E, Er, Ec, Ek = _plan(bordered, u, u_bin, w, w_bin)
        p, p_bin = _over(gu, tl.sum(E, 1) + Er), _over(gu_bin, tl.sum(Ec, 0) + Ek)
        dZ -= E * p[:, None]
        dZr -= Er * p
        dZc -= Ec * p_bin
        dZk -= Ek * p_bin
        gv, gv_bin = -tl.sum(E * p[:, None], 0) - Ec * p_bin, -tl.sum(Er * p, 0) - Ek * p_bin
        gu, gu_bin = tl.zeros_like(gu), 0.0
        u, u_bin, v, v_bin = u_next, u_next_bin, w, w_bin
    return dZ, tl.sum(dZr, 0) + tl.sum(dZc, 0) + dZk, da, da_bin, db, db_bin


@triton.jit
def _border(Z, z, masses):
    """Return Z and its bin's column, row and corner, -inf where either side has no mass."""
    log_a, log_a_bin, log_b, log_b_bin = masses
    row, col = log_a != -INF, log_b != -INF
    Z = tl.where(row[:, None] & col[None, :], Z, -INF)
    zr = tl.where(row, tl.where(log_b_bin != -INF, z, -INF), -INF)
    zc = tl.where(col, tl.where(log_a_bin != -INF, z, -INF), -INF)
    zk = tl.where(log_a_bin != -INF, tl.where(log_b_bin != -INF, z, -INF), -INF)
    return Z, zr, zc, zk


@triton.jit
def _absorb(bordered, z, masses, SHIFT: tl.constexpr):
    """Return K, its bin's column, row and corner, and the v and v_bin that stand for zero potentials."""
    Z, zr, zc, zk = bordered
    log_b, log_b_bin = masses[2], masses[3]
    if SHIFT:
        K, kr, kc, kk = tl.exp(Z - z), tl.exp(zr - z), tl.exp(zc - z), tl.exp(zk - z)
        v, v_bin = tl.where(log_b != -INF, 1.0, 0.0), tl.where(log_b_bin != -INF, 1.0, 0.0)
    else:
        rho = _finite(tl.maximum(tl.max(Z, 1), zr))
        rho_bin = _finite(tl.maximum(tl.max(zc, 0), zk))
        Z -= rho[:, None]
        zr -= rho
        zc -= rho_bin
        zk -= rho_bin
        sigma = _finite(tl.maximum(tl.max(Z, 0), zc))
        sigma_bin = _finite(tl.maximum(tl.max(zr, 0), zk))
        K, kr, kc, kk = tl.exp(Z - sigma[None, :]), tl.exp(zr - sigma_bin), tl.exp(zc - sigma), tl.exp(zk - sigma_bin)
        v = tl.where(log_b != -INF, tl.exp(sigma), 0.0)
        v_bin = tl.where(log_b_bin != -INF, tl.exp(sigma_bin), 0.0)
    return K, kr, kc, kk, v, v_bin


@triton.jit
def _may_scale(bordered, z, masses, SHIFT: tl.constexpr):
    """Return 1 if the scaling path may be tried."""
    log_a, log_a_bin, log_b, log_b_bin = masses
    least_a = tl.minimum(tl.min(_no_mass_is_inf(log_a), 0), _no_mass_is_inf(log_a_bin))
    least_b = tl.minimum(tl.min(_no_mass_is_inf(log_b), 0), _no_mass_is_inf(log_b_bin))
    legal = tl.minimum(least_a, least_b) >= -MASS_RANGE
    if SHIFT:
        legal &= tl.max(tl.max(bordered[0], 1), 0) - z <= RANGE
    return legal.to(tl.int32)


@triton.jit
def _plan(bordered, u, u_bin, v, v_bin):
    Z, zr, zc, zk = bordered
    E = tl.exp(Z + u[:, None] + v[None, :])
    return E, tl.exp(zr + u + v_bin), tl.exp(zc + u_bin + v), tl.exp(zk + u_bin + v_bin)


@triton.jit
def _minus_lse(log_mass, x, x_bin, AXIS: tl.constexpr):
    """Return log mass - log sum exp of x along an axis and of x_bin; 0 without mass."""
    top = _finite(tl.maximum(tl.max(x, AXIS), x_bin))
    if AXIS == 1:
        total = tl.sum(tl.exp(x - top[:, None]), 1)
    elif len(x.shape) == 2:
        total = tl.sum(tl.exp(x - top[None, :]), 0)
    else:
        total = tl.sum(tl.exp(x - top), 0)
    return tl.where(log_mass == -INF, 0.0, log_mass - top - tl.log(total + tl.exp(x_bin - top)))


@triton.jit
def _over(x, y):
    """Return x / y, and 0 where y is 0: there is no mass."""
    return tl.where(y == 0, 0.0, x / y)


@triton.jit
def _spread(mass, total):
    """Return mass / total, and 0 without mass; inf, so that the path is found illegal, where the total underflows."""
    return tl.where(mass == 0, 0.0, mass / total)


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
def _log_count(count, log_s):
    return tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)) - log_s, -INF)


@triton.jit
def _store(history, t, u, u_bin, v, v_bin):
    at_u, at_v, N_out, M_out = _at(history, t)
    offs_n, offs_m = tl.arange(0, u.shape[0]), tl.arange(0, v.shape[0])
    tl.store(at_u + offs_n, u, mask=offs_n < N_out)
    tl.store(at_u + N_out, u_bin)
    tl.store(at_v + offs_m, v, mask=offs_m < M_out)
    tl.store(at_v + M_out, v_bin)


@triton.jit
def _load(history, t, masses):
    """Return u, u_bin, v, v_bin of iteration t; zeros before the first."""
    at_u, at_v, N_out, M_out = _at(history, t)
    offs_n, offs_m = tl.arange(0, masses[0].shape[0]), tl.arange(0, masses[2].shape[0])
    u = tl.load(at_u + offs_n, mask=(offs_n < N_out) & (t >= 0), other=0.0)
    u_bin = tl.load(at_u + N_out, mask=t >= 0, other=0.0)
    v = tl.load(at_v + offs_m, mask=(offs_m < M_out) & (t >= 0), other=0.0)
    v_bin = tl.load(at_v + M_out, mask=t >= 0, other=0.0)
    return u, u_bin, v, v_bin


@triton.jit
def _at(history, t):
    """Return where u and v of iteration t begin, and how long they are."""
    pointer, N_out, M_out, _ = history
    at_u = pointer + t * (N_out + M_out + 2)
    return at_u, at_u + N_out + 1, N_out, M_out
