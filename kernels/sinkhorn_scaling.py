"""The scaling path of a Sinkhorn problem in registers: one exponential per element, then products; and its reverse.

    u = a / (K v + kr v_bin),    u_bin = a_bin / (kc.v + kk v_bin)
    v = b / (K^T u + kc u_bin),  v_bin = b_bin / (kr.u + kk u_bin),   plan = u K v^T

with K = exp(Z - rho - sigma), the same for the bin's column kr, row kc and corner kk, started at v = exp(sigma). Back
from the last iteration to the first, with w the v before it, S = G u v^T, gu = (G K) v and gv = (G K)^T u:

    db += gv v,  q = -(gv v) (v / b),  S += u q^T,  gu += K q
    da += gu u,  p = -(gu u) (u / a),  S += p w^T,  gv = K^T p,  gu = 0;   dZ = K S

SHIFT: rho = z, sigma = 0, legal if max(Z - z) <= RANGE; every row and column needs a bin with mass. Otherwise rho and
sigma are the row, then the column maxima, legal if max u max v stays <= exp(RANGE). `kernels.sinkhorn_tile` says what
the arguments are, `kernels.sinkhorn_layout` how they lie.
"""

import triton
import triton.language as tl

from kernels.reduce import rounded
from kernels.sinkhorn_layout import (
    INF,
    along_rows,
    by_cols,
    by_rows,
    divide_or_zero,
    finite,
    form_vector,
    form_zeros,
    in_form,
    load_form_vectors,
    load_vectors,
    max_over,
    row_vector,
    store_form_vectors,
    store_vectors,
    sum_along,
    sum_over,
    sum_rows_of_both,
    tile_of_rows,
)

RANGE = tl.constexpr(60.0)
LARGEST = tl.constexpr(1.1420073898156842e26)  # exp(RANGE)
MASS_RANGE = tl.constexpr(12.0)  # nats below 1 that a mass may have on top of that
# the largest tile of which a thread has room for three forms
IN_FORMS = tl.constexpr(64)


@triton.jit
def may_scale(bordered, z, masses, SHIFT: tl.constexpr):
    """Return 1 if the scaling path may be tried: nothing exceeds its range."""
    log_a, log_a_bin, log_b, log_b_bin = masses
    least_a = tl.minimum(_no_mass_is_inf(log_a), _no_mass_is_inf(log_a_bin))
    excess = -MASS_RANGE - tl.minimum(least_a, tl.minimum(_no_mass_is_inf(log_b), _no_mass_is_inf(log_b_bin)))
    if SHIFT:
        excess = tl.maximum(excess, bordered[0] - z - RANGE)
    return (tl.max(excess) <= 0).to(tl.int32)


@triton.jit
def solve_scaling(bordered, z, masses, history, SHIFT: tl.constexpr, SAVE: tl.constexpr):
    """Return the plan, the row slack, the column slack, and 1 if all stayed in range."""
    K, kr, kc, kk, v, v_bin = _absorb(bordered, z, masses, SHIFT)
    a, a_bin, b, b_bin = _exp(masses)
    # added to the totals of what has no mass, which are 0
    pad_a, pad_a_bin, pad_b, pad_b_bin = _is_zero(a), _is_zero(a_bin), _is_zero(b), _is_zero(b_bin)
    if SHIFT:
        # a total holds the other side's bin, so that only without that bin it can be 0
        pad_a, pad_b = pad_b_bin, pad_a_bin
    kernel, masses, pads = (K, kr, kc, kk), (a, a_bin, b, b_bin), (pad_a, pad_a_bin, pad_b, pad_b_bin)
    if K.shape[0] * K.shape[2] == IN_FORMS and K.shape[1] * K.shape[3] == IN_FORMS:
        u, u_bin, v, v_bin, most = _iterate_in_forms(kernel, masses, pads, v, v_bin, history, SHIFT, SAVE)
    else:
        u, u_bin, v, v_bin, most = _iterate(kernel, masses, pads, v, v_bin, history, SHIFT, SAVE)
    in_range = 1
    if not SHIFT:
        in_range = (most <= LARGEST).to(tl.int32)
    return K * u * v, kr * u * v_bin, kc * u_bin * v, in_range


@triton.jit
def _iterate_in_forms(kernel, masses, pads, v, v_bin, history, SHIFT: tl.constexpr, SAVE: tl.constexpr):
    """Return u, u_bin, v, v_bin and the largest product of a u and a v; each sum where it stays in few lanes.

    Each element of a vector has a copy of the bin: a sum of a vector is made in every row.
    """
    K, kr, kc, kk = kernel
    N0: tl.constexpr = K.shape[2]
    M0: tl.constexpr = K.shape[3]
    T = history[3]
    zeros = form_zeros(K.shape[0] * N0, history)
    K_rows, K_cols = in_form(by_rows(K), zeros, T), in_form(by_cols(K), zeros, T)
    a, a_bin, b, b_bin = form_vector(masses[0]), tl.sum(masses[1]), form_vector(masses[2]), tl.sum(masses[3])
    pad_a, pad_a_bin, pad_b, pad_b_bin = pads
    pad_a_bin, pad_b_bin = tl.sum(pad_a_bin), tl.sum(pad_b_bin)
    kr_along, kc_along = kr, kc
    if SHIFT:
        pad_a, pad_b = tl.sum(pad_a), tl.sum(pad_b)
    else:
        pad_a, pad_b, kr, kc, kk = form_vector(pad_a), form_vector(pad_b), form_vector(kr), form_vector(kc), tl.sum(kk)
        kr_along, kc_along = in_form(along_rows(kr), zeros, T), in_form(along_rows(kc), zeros, T)
    u, v = tl.zeros_like(a), form_vector(v)
    u_bin, v_bin, most_u, most_v = u, u + tl.sum(v_bin), u, u
    if SAVE:
        store_form_vectors(history, 0, u, u_bin, v, v_bin)
    for t in range(T):
        # u = a / (K v)
        x = in_form(along_rows(v), zeros, t)
        u = _quotient(a, sum_along(K_rows * x) + kr * v_bin + pad_a)
        u_bin = _quotient(a_bin, sum_along(kc_along * x) + kk * v_bin + pad_a_bin)
        # v = b / (K^T u)
        x = in_form(along_rows(u), zeros, t)
        v = _quotient(b, sum_along(K_cols * x) + kc * u_bin + pad_b)
        v_bin = _quotient(b_bin, sum_along(kr_along * x) + kk * u_bin + pad_b_bin)
        if not SHIFT:
            most_u = tl.maximum(most_u, tl.maximum(u, u_bin))
            most_v = tl.maximum(most_v, tl.maximum(v, v_bin))
        if SAVE:
            store_form_vectors(history, t + 1, u, u_bin, v, v_bin)
    most = 0.0
    if not SHIFT:
        most = tl.max(most_u) * tl.max(most_v)
    u, v = row_vector(u, N0), tl.permute(row_vector(v, M0), (1, 0, 3, 2))
    return u, tl.max(u_bin), v, tl.max(v_bin), most


@triton.jit
def _iterate(kernel, masses, pads, v, v_bin, history, SHIFT: tl.constexpr, SAVE: tl.constexpr):
    """Return u, u_bin, v, v_bin and the largest product of a u and a v: all sums in the form of the tile."""
    K, kr, kc, kk = kernel
    a, a_bin, b, b_bin = masses
    pad_a, pad_a_bin, pad_b, pad_b_bin = pads
    u, u_bin, most_u, most_v = tl.zeros_like(a), tl.zeros_like(a_bin), tl.zeros_like(a), tl.zeros_like(b)
    # each column has a copy of v_bin, since to make one of them takes as long as a sum over columns
    v_bin += tl.zeros_like(v)
    if SAVE:
        store_vectors(history, 0, u, u_bin, v, max_over(v_bin, 1))
    for t in range(history[3]):
        # u = a / (K v)
        share = _share_of_copies(v_bin)
        Kv, kc_v = tl.sum(rounded(K * v), 1, keep_dims=True), tl.sum(rounded(kc * v), 1, keep_dims=True)
        u = _quotient(a, tl.sum(Kv + kr * share, 3, keep_dims=True) + pad_a)
        u_bin = _quotient(a_bin, tl.sum(kc_v + kk * share, 3, keep_dims=True) + pad_a_bin)
        # v = b / (K^T u)
        total, total_bin = sum_rows_of_both(rounded(K * u), rounded(kr * u))
        v = _quotient(b, total + kc * u_bin + pad_b)
        v_bin = _quotient(b_bin, total_bin + kk * u_bin + pad_b_bin)
        if not SHIFT:
            most_u = tl.maximum(most_u, tl.maximum(u, u_bin))
            most_v = tl.maximum(most_v, tl.maximum(v, v_bin))
        if SAVE:
            store_vectors(history, t + 1, u, u_bin, v, max_over(v_bin, 1))
    most = 0.0
    if not SHIFT:
        most = tl.max(most_u) * tl.max(most_v)
    return u, u_bin, v, max_over(v_bin, 1), most


@triton.jit
def _share_of_copies(x):
    """Return [1, 1, 1, M0] with the sum x from a column vector whose elements all are x."""
    share = tl.sum(x, 1, keep_dims=True) * (1.0 / x.shape[1])
    return tl.where(tl.arange(0, x.shape[3])[None, None, None, :] == 0, share, 0.0)


@triton.jit
def reverse_scaling(G, Gr, Gc, bordered, z, masses, history, SHIFT: tl.constexpr):
    """Return the gradients with respect to Z, z, log_a, log_a_bin, log_b and log_b_bin."""
    K, kr, kc, kk, _, _ = _absorb(bordered, z, masses, SHIFT)
    vectors = load_vectors(history, history[3], masses)
    u, u_bin, v, v_bin = vectors
    # S = G u v^T;  gu = (G K) v;  gv = (G K)^T u
    S = G * u * v
    gu, gu_bin = sum_over(rounded(G * K * v), 1) + Gr * kr * v_bin, sum_over(rounded(Gc * kc * v), 1)
    gv, gv_bin = sum_over(rounded(G * K * u), 0) + Gc * kc * u_bin, sum_over(rounded(Gr * kr * u), 0)
    kernel, gradients, masses = (K, kr, kc, kk), (S, gu, gu_bin, gv, gv_bin), _exp(masses)
    if K.shape[0] * K.shape[2] == IN_FORMS and K.shape[1] * K.shape[3] == IN_FORMS:
        dZ, dz, da, da_bin, db, db_bin = _reverse_in_forms(kernel, gradients, vectors, masses, history, SHIFT)
    else:
        dZ, dz, da, da_bin, db, db_bin = _reverse(kernel, gradients, vectors, masses, history)
    # the bin's row and column of S, times those of K: what is not in dz cancels against da_bin and db_bin
    dz += gu_bin * u_bin + gv_bin * v_bin - da_bin - db_bin
    return dZ, dz, da, da_bin, db, db_bin


@triton.jit
def _reverse_in_forms(kernel, gradients, vectors, masses, history, SHIFT: tl.constexpr):
    """Walk back through the iterations; each sum in the form that keeps it in few lanes, S in that of the rows."""
    K, kr, kc, kk = kernel
    N0: tl.constexpr = K.shape[2]
    M0: tl.constexpr = K.shape[3]
    T = history[3]
    zeros = form_zeros(K.shape[0] * N0, history)
    K_rows, K_cols, S = (
        in_form(by_rows(K), zeros, T),
        in_form(by_cols(K), zeros, T),
        in_form(by_rows(gradients[0]), zeros, T),
    )
    a, a_bin, b, b_bin = form_vector(masses[0]), tl.sum(masses[1]), form_vector(masses[2]), tl.sum(masses[3])
    u, u_bin, v, v_bin = form_vector(vectors[0]), tl.sum(vectors[1]), form_vector(vectors[2]), tl.sum(vectors[3])
    kr_along, kc_along = kr, kc
    if not SHIFT:
        kr, kc, kk = form_vector(kr), form_vector(kc), tl.sum(kk)
        kr_along, kc_along = in_form(along_rows(kr), zeros, T), in_form(along_rows(kc), zeros, T)
    gu, gv, none = form_vector(gradients[1]), form_vector(gradients[3]), tl.zeros_like(a)
    gu_bin, gv_bin = none + tl.sum(gradients[2]), none + tl.sum(gradients[4])
    da, da_bin, db, db_bin, dz = none, none, none, none, none
    for i in range(T):
        u_next, u_next_bin, w, w_bin, w_along = load_form_vectors(history, T - 1 - i, K.shape[0] * N0)
        # db += gv v;  q = -(gv v) (v / b), since v^2 could overflow;  S += u q^T;  gu += K q
        db += gv * v
        db_bin += gv_bin * v_bin
        q, q_bin = -(gv * v) * divide_or_zero(v, b), -(gv_bin * v_bin) * divide_or_zero(v_bin, b_bin)
        x = in_form(along_rows(q), zeros, i)
        S += u * x
        kc_q = sum_along(kc_along * x)
        gu += sum_along(K_rows * x) + kr * q_bin
        gu_bin += kc_q + kk * q_bin
        # da += gu u;  p = -(gu u) (u / a);  S += p w^T;  gv = K^T p
        da += gu * u
        da_bin += gu_bin * u_bin
        p, p_bin = -(gu * u) * divide_or_zero(u, a), -(gu_bin * u_bin) * divide_or_zero(u_bin, a_bin)
        S += p * w_along
        x = in_form(along_rows(p), zeros, i)
        kr_p = sum_along(kr_along * x)
        gv, gv_bin = sum_along(K_cols * x) + kc * p_bin, kr_p + kk * p_bin
        dz += u_bin * kc_q + w_bin * kr_p
        gu, gu_bin = none, none
        u, u_bin, v, v_bin = u_next, u_next_bin, w, w_bin
    dZ, da, db = tile_of_rows(K_rows * S, N0, M0), row_vector(da, N0), tl.permute(row_vector(db, M0), (1, 0, 3, 2))
    bin = tl.zeros_like(masses[1])
    return dZ, bin + tl.max(dz), da, bin + tl.max(da_bin), db, bin + tl.max(db_bin)


@triton.jit
def _reverse(kernel, gradients, vectors, masses, history):
    """Walk back through the iterations; all sums in the form of the tile."""
    K, kr, kc, kk = kernel
    S, gu, gu_bin, gv, gv_bin = gradients
    a, a_bin, b, b_bin = masses
    u, u_bin, v, v_bin = vectors
    T = history[3]
    da, da_bin, db, db_bin = tl.zeros_like(a), tl.zeros_like(a_bin), tl.zeros_like(b), tl.zeros_like(b_bin)
    dz = tl.zeros_like(a_bin)
    for i in range(T):
        u_next, u_next_bin, w, w_bin = load_vectors(history, T - 1 - i, masses)
        # db += gv v;  q = -(gv v) (v / b), since v^2 could overflow;  S += u q^T;  gu += K q
        db += gv * v
        db_bin += gv_bin * v_bin
        q, q_bin = -(gv * v) * divide_or_zero(v, b), -(gv_bin * v_bin) * divide_or_zero(v_bin, b_bin)
        S += u * q
        kc_q = sum_over(rounded(kc * q), 1)
        gu += sum_over(rounded(K * q), 1) + kr * q_bin
        gu_bin += kc_q + kk * q_bin
        # da += gu u;  p = -(gu u) (u / a);  S += p w^T;  gv = K^T p
        da += gu * u
        da_bin += gu_bin * u_bin
        p, p_bin = -(gu * u) * divide_or_zero(u, a), -(gu_bin * u_bin) * divide_or_zero(u_bin, a_bin)
        S += p * w
        kr_p = sum_over(rounded(kr * p), 0)
        gv, gv_bin = sum_over(rounded(K * p), 0) + kc * p_bin, kr_p + kk * p_bin
        dz += u_bin * kc_q + w_bin * kr_p
        gu, gu_bin = tl.zeros_like(gu), tl.zeros_like(gu_bin)
        u, u_bin, v, v_bin = u_next, u_next_bin, w, w_bin
    return K * S, dz, da, da_bin, db, db_bin


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
        rho, rho_bin = finite(tl.maximum(max_over(Z, 1), zr)), finite(tl.maximum(max_over(zc, 1), zk))
        Z, zr, zc, zk = Z - rho, zr - rho, zc - rho_bin, zk - rho_bin
        sigma, sigma_bin = finite(tl.maximum(max_over(Z, 0), zc)), finite(tl.maximum(max_over(zr, 0), zk))
        Z, zr, zc, zk = Z - sigma, zr - sigma_bin, zc - sigma, zk - sigma_bin
        kr, kc, kk = tl.exp(zr), tl.exp(zc), tl.exp(zk)
        v, v_bin = v * tl.exp(sigma), v_bin * tl.exp(sigma_bin)
    return tl.exp(Z), kr, kc, kk, v, v_bin


@triton.jit
def _is_zero(mass):
    return tl.where(mass == 0, 1.0, 0.0)


@triton.jit
def _quotient(x, y):
    """Return x / y for normal y > 0, to 2^-21: a root and two products take fewer steps than a division."""
    root = tl.rsqrt(y)
    return x * (root * root)


@triton.jit
def _exp(masses):
    return tl.exp(masses[0]), tl.exp(masses[1]), tl.exp(masses[2]), tl.exp(masses[3])


@triton.jit
def _no_mass_is_inf(log_mass):
    return tl.where(log_mass == -INF, INF, log_mass)
