"""Sinkhorn in PyTorch with a hand-written reverse pass: the CPU's form of `kernels.sinkhorn`.

The bin is the last row and the last column of every tensor here. Z is -cost / eps, log a and log b are the masses
(-inf: no mass, takes no part, whatever Z is there), T iterations. Two paths give the same result; an item takes what
its own values allow:

scaling    K = exp(Z - rho - sigma), then only products: u = a / (K v), v = b / (K^T u), started at v = exp(sigma).
           With a shift z: rho = z, sigma = 0, legal if max(Z - z) is in range. Without: rho, sigma are the row and then
           the column maxima, legal if max u max v stayed in range.
log        u = log a - LSE(Z + v), v = log b - LSE(Z + u): always legal.

A history keeps (u, v) of every iteration from the start on, [B, T+1, N+1 + M+1]. Vectors stand left of a matrix, where
PyTorch's batched product is several times faster; the reverse pass leaves its 2 T outer products per item to the end,
where they are one product. Sums are taken by PyTorch.
"""

import math

import torch
from torch import Tensor

RANGE = 60.0  # nats that a product of scalings may span in float32
MASS_RANGE = 12.0  # nats below 1 that a mass may have on top of that


def solve(
    Z: Tensor, log_a: Tensor, log_b: Tensor, iterations: int, shift: Tensor | None, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plan, its history, and which items took the scaling path [B].

    Args:
        shift: -dustbin / eps where every bin has mass, else None.
        path: "auto", or "log" or "scaling" for all items.
    """
    if path == "log":
        return *_solve_log(Z, log_a, log_b, iterations), torch.zeros_like(log_a[:, 0], dtype=torch.bool)
    P, history, legal = _solve_scaling(Z, log_a, log_b, iterations, shift)
    legal = legal | (path == "scaling")
    if not legal.all():
        redo = ~legal
        P[redo], history[redo] = _solve_log(Z[redo], log_a[redo], log_b[redo], iterations)
    return P, history, legal


def reverse(
    G: Tensor, Z: Tensor, log_a: Tensor, log_b: Tensor, shift: Tensor | None, history: Tensor, scaling_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exact gradients of sum(G * plan) after the stored iterations, with respect to Z, log a and log b."""
    if scaling_B.all():
        return _reverse_scaling(G, Z, log_a, log_b, shift, history)
    grads = torch.zeros_like(Z), torch.zeros_like(log_a), torch.zeros_like(log_b)
    for items, step in ((scaling_B, _reverse_scaling), (~scaling_B, _reverse_log)):
        if items.any():
            part = step(G[items], Z[items], log_a[items], log_b[items], shift, history[items])
            for whole, piece in zip(grads, part, strict=True):
                whole[items] = piece
    return grads


def without_drift(grad_log_a: Tensor, grad_log_b: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the log masses of problems without a bin, less the rounding that has added up in them.

    A shift of log a changes no plan, so d log a sums to 0. What an iteration's rounding makes of this sum all further
    ones hand on undamped, to rows as their masses and, negated, to columns as theirs. With a bin it cancels: the mass
    of a bin is the total of the other side.
    """
    drift = grad_log_a.sum(1, keepdim=True)
    return grad_log_a - drift * _shares(log_a), grad_log_b + drift * _shares(log_b)


def _solve_scaling(Z, log_a, log_b, iterations, shift):
    K, start = _absorb(Z, log_a, log_b, shift)
    (a, no_a), (b, no_b) = _masses(log_a), _masses(log_b)
    history, U, V = _history(Z, iterations)
    U[:, :1], V[:, :1] = 0, start
    us, vs = U.split(1, 1), V.split(1, 1)
    for t in range(iterations):
        # a row without mass divides 0 by 1
        torch.div(a, torch.baddbmm(no_a, vs[t], K.mT), out=us[t + 1])
        torch.div(b, torch.baddbmm(no_b, us[t + 1], K), out=vs[t + 1])
    span = U.amax((1, 2)) * V.amax((1, 2)) if shift is None else K.amax((1, 2))
    legal = (span <= math.exp(RANGE)) & (torch.minimum(_least(log_a), _least(log_b)) >= -MASS_RANGE)
    return K.mul_(us[-1].mT).mul_(vs[-1]), history, legal


def _reverse_scaling(G, Z, log_a, log_b, shift, history):
    K, _ = _absorb(Z, log_a, log_b, shift)
    (a, no_a), (b, no_b) = _masses(log_a), _masses(log_b)
    U, V = history.split([a.shape[2], b.shape[2]], 2)
    U, V, W = U[:, 1:], V[:, 1:], V[:, :-1]
    # v / b before the second v: v squared overflows first
    share_U, share_V = U / (a + no_a).neg_(), V / (b + no_b).neg_()
    grad_U, grad_V, P, Q = (torch.empty_like(x) for x in (share_U, share_V, share_U, share_V))
    us, vs, shares_u, shares_v, grads_u, grads_v, ps, qs = (
        x.split(1, 1) for x in (U, V, share_U, share_V, grad_U, grad_V, P, Q)
    )
    GK = G * K
    grad_u, grad_v = torch.bmm(vs[-1], GK.mT), torch.bmm(us[-1], GK)
    for t in reversed(range(len(us))):
        torch.mul(torch.mul(grad_v, vs[t], out=grads_v[t]), shares_v[t], out=qs[t])
        grad_u = torch.bmm(qs[t], K.mT).add_(grad_u)
        torch.mul(torch.mul(grad_u, us[t], out=grads_u[t]), shares_u[t], out=ps[t])
        grad_u, grad_v = 0, torch.bmm(ps[t], K)
    S = (G * us[-1].mT).mul_(vs[-1]).baddbmm_(U.mT, Q).baddbmm_(P.mT, W)
    return S.mul_(K), grad_U.sum(1), grad_V.sum(1)


def _solve_log(Z, log_a, log_b, iterations):
    row, col, Z = log_a != -math.inf, log_b != -math.inf, _masked(Z, log_a, log_b)
    history, U, V = _history(Z, iterations)
    U[:, 0], V[:, 0] = 0, 0
    for t in range(1, iterations + 1):
        U[:, t] = torch.where(row, log_a - torch.logsumexp(Z + V[:, t - 1, None], 2), 0)
        V[:, t] = torch.where(col, log_b - torch.logsumexp(Z + U[:, t, :, None], 1), 0)
    return torch.exp(Z + U[:, -1, :, None] + V[:, -1, None]), history


def _reverse_log(G, Z, log_a, log_b, shift, history):
    U, V = history.split([log_a.shape[1], log_b.shape[1]], 2)
    Z = _masked(Z, log_a, log_b)
    grad_Z = G * torch.exp(Z + U[:, -1, :, None] + V[:, -1, None])
    alpha, beta = grad_Z.sum(2), grad_Z.sum(1)
    grad_log_a, grad_log_b = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for t in reversed(range(1, U.shape[1])):
        Zu = Z + U[:, t, :, None]
        grad_log_b += beta
        E = torch.exp(Zu + V[:, t, None])
        # the sum itself, not the mass it should be: that error would grow with every iteration
        Q = E * _ratio(beta, E.sum(1))[:, None]
        grad_Z -= Q
        alpha = alpha - Q.sum(2)
        grad_log_a += alpha
        E = torch.exp(Zu + V[:, t - 1, None])
        Q = E * _ratio(alpha, E.sum(2))[:, :, None]
        grad_Z -= Q
        alpha, beta = 0, -Q.sum(1)
    return grad_Z, grad_log_a, grad_log_b


def _absorb(Z, log_a, log_b, shift):
    """Return K = exp(Z - rho - sigma), and the v [B, 1, M+1] that stands for zero potentials."""
    col = (log_b != -math.inf)[:, None]
    if shift is not None:
        return only_massive(torch.sub(Z, shift).exp_(), log_a, log_b), col.to(Z)
    Z = _masked(Z, log_a, log_b)
    Z -= _finite(Z.amax(2, keepdim=True))
    sigma = _finite(Z.amax(1, keepdim=True))
    return Z.sub_(sigma).exp_(), torch.where(col, sigma.exp(), 0)


def _masked(Z, log_a, log_b):
    """Return Z with -inf where a row or a column has no mass."""
    Z = only_massive(Z.clone(), log_a, log_b)
    for log_mass in (log_a[:, :, None], log_b[:, None]):
        Z += torch.where(log_mass == -math.inf, log_mass, 0)
    return Z


def only_massive(x, log_a, log_b):
    """Set to 0, in place, where a row or a column has no mass, whatever is there."""
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    for log_mass in (log_a[:, :, None], log_b[:, None]):
        # a product would keep NaN and masks are ten times slower: keep all bits of a number, or none
        x.view(bits).bitwise_and_(-(log_mass != -math.inf).to(bits))
    return x


def _history(Z, iterations):
    """Return room for a history, and its parts u and v."""
    B, N1, M1 = Z.shape
    history = Z.new_empty(B, iterations + 1, N1 + M1)
    return history, history[:, :, :N1], history[:, :, N1:]


def _masses(log_mass):
    """Return masses [B, 1, *], and 1 where there is none, else 0."""
    mass = log_mass.exp()[:, None]
    return mass, (mass == 0).to(mass)


def _shares(log_mass):
    """Return mass / total mass, 0 where there is none."""
    return log_mass.softmax(1).masked_fill(log_mass == -math.inf, 0)


def _least(log_mass):
    return log_mass.masked_fill(log_mass == -math.inf, math.inf).amin(1)


def _finite(x):
    return torch.where(x == -math.inf, 0, x)


def _ratio(x, y):
    """Return x / y, and 0 where y is 0: there is no mass."""
    return torch.where(y == 0, 0, x / y)
