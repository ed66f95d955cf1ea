"""Sinkhorn in PyTorch with a hand-written reverse pass: the CPU's form of `kernels.sinkhorn`.

The bin is the last row and the last column of every tensor here. Z is -cost / eps, log a and log b are the masses
(-inf: no mass, takes no part), T iterations. Two paths give the same result; an item takes what its own values allow:

scaling    K = exp(Z - rho - sigma), then only multiply-adds: u = a / (K v), v = b / (K^T u), started at v = exp(sigma).
           With a shift z: rho = z, sigma = 0, legal if max(Z - z) is in range. Without: rho, sigma are the row and then
           the column maxima, legal if max u max v stayed in range.
log        u = log a - LSE(Z + v), v = log b - LSE(Z + u): always legal.

Sums are taken by PyTorch over one axis at a time.
"""

import math

import torch
from torch import Tensor

RANGE = 60.0  # nats that a product of scalings may span in float32
MASS_RANGE = 12.0  # nats below 1 that a mass may have on top of that


def solve(
    Z: Tensor, log_a: Tensor, log_b: Tensor, iterations: int, shift: Tensor | None, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plan, (u, v) from the start on [B, N+1 + M+1, T+1], and which items took the scaling path [B].

    Args:
        shift: -dustbin / eps where every bin has mass, else None.
        path: "auto", or "log" or "scaling" for all items.
    """
    if path == "log":
        return *_solve_log(Z, log_a, log_b, iterations), torch.zeros_like(log_a[:, 0], dtype=torch.bool)
    P, history = _solve_scaling(Z, log_a, log_b, iterations, shift)
    legal = _legal(Z, log_a, log_b, history, shift) | (path == "scaling")
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


def _solve_scaling(Z, log_a, log_b, iterations, shift):
    K, v = _absorb(Z, log_a, log_b, shift)
    a, b = log_a.exp(), log_b.exp()
    history = [torch.cat([torch.zeros_like(a), v], 1)]
    for _ in range(iterations):
        u = torch.where(a == 0, 0, a / (K * v[:, None]).sum(2))
        v = torch.where(b == 0, 0, b / (K * u[:, :, None]).sum(1))
        history.append(torch.cat([u, v], 1))
    return K * u[:, :, None] * v[:, None], torch.stack(history, 2)


def _reverse_scaling(G, Z, log_a, log_b, shift, history):
    K, _ = _absorb(Z, log_a, log_b, shift)
    a, b = log_a.exp(), log_b.exp()
    U, V = _unstack(history, a.shape[1])
    u, v = U[-1], V[-1]
    S = G * u[:, :, None] * v[:, None]
    grad_u, grad_v = (G * K * v[:, None]).sum(2), (G * K * u[:, :, None]).sum(1)
    grad_log_a, grad_log_b = torch.zeros_like(a), torch.zeros_like(b)
    for t in reversed(range(1, len(U))):
        u, v, w = U[t], V[t], V[t - 1]
        grad_log_b += grad_v * v
        # v / b before the second v: v squared overflows first
        q = -(grad_v * v) * _ratio(v, b)
        S.addcmul_(u[:, :, None], q[:, None])
        grad_u = grad_u + (K * q[:, None]).sum(2)
        grad_log_a += grad_u * u
        p = -(grad_u * u) * _ratio(u, a)
        S.addcmul_(p[:, :, None], w[:, None])
        grad_v, grad_u = (K * p[:, :, None]).sum(1), 0
    return K * S, grad_log_a, grad_log_b


def _solve_log(Z, log_a, log_b, iterations):
    row, col = log_a != -math.inf, log_b != -math.inf
    Z = Z.masked_fill(~(row[:, :, None] & col[:, None]), -math.inf)
    v = torch.zeros_like(log_b)
    history = [torch.cat([torch.zeros_like(log_a), v], 1)]
    for _ in range(iterations):
        u = torch.where(row, log_a - torch.logsumexp(Z + v[:, None], 2), 0)
        v = torch.where(col, log_b - torch.logsumexp(Z + u[:, :, None], 1), 0)
        history.append(torch.cat([u, v], 1))
    return torch.exp(Z + u[:, :, None] + v[:, None]), torch.stack(history, 2)


def _reverse_log(G, Z, log_a, log_b, shift, history):
    row, col = log_a != -math.inf, log_b != -math.inf
    Z = Z.masked_fill(~(row[:, :, None] & col[:, None]), -math.inf)
    U, V = _unstack(history, log_a.shape[1])
    grad_Z = G * torch.exp(Z + U[-1][:, :, None] + V[-1][:, None])
    alpha, beta = grad_Z.sum(2), grad_Z.sum(1)
    grad_log_a, grad_log_b = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for t in reversed(range(1, len(U))):
        Zu = Z + U[t][:, :, None]
        grad_log_b += beta
        E = torch.exp(Zu + V[t][:, None])
        # the sum itself, not the mass it should be: that error would grow with every iteration
        Q = E * _ratio(beta, E.sum(1))[:, None]
        grad_Z -= Q
        alpha = alpha - Q.sum(2)
        grad_log_a += alpha
        E = torch.exp(Zu + V[t - 1][:, None])
        Q = E * _ratio(alpha, E.sum(2))[:, :, None]
        grad_Z -= Q
        alpha, beta = 0, -Q.sum(1)
    return grad_Z, grad_log_a, grad_log_b


def _absorb(Z, log_a, log_b, shift):
    """Return K = exp(Z - rho - sigma) and the v that stands for zero potentials."""
    row, col = log_a != -math.inf, log_b != -math.inf
    Z = Z.masked_fill(~(row[:, :, None] & col[:, None]), -math.inf)
    if shift is not None:
        return torch.exp(Z - shift), col.to(Z)
    Z = Z - _finite(Z.amax(2))[:, :, None]
    sigma = _finite(Z.amax(1))
    return torch.exp(Z - sigma[:, None]), torch.where(col, sigma.exp(), 0)


def _legal(Z, log_a, log_b, history, shift):
    """Return which items stayed in range [B]: NaN does not."""
    least = torch.minimum(_least(log_a), _least(log_b))
    if shift is not None:
        valid = (log_a != -math.inf)[:, :, None] & (log_b != -math.inf)[:, None]
        inside = (Z - shift).masked_fill(~valid, -math.inf).amax((1, 2)) <= RANGE
    else:
        u, v = history.split([log_a.shape[1], log_b.shape[1]], 1)
        inside = u.amax((1, 2)) * v.amax((1, 2)) <= math.exp(RANGE)
    return inside & (least >= -MASS_RANGE)


def _unstack(history, rows):
    """Return u [T+1, B, N+1] and v [T+1, B, M+1]."""
    steps = history.permute(2, 0, 1)
    return steps[..., :rows].contiguous(), steps[..., rows:].contiguous()


def _least(log_mass):
    return log_mass.masked_fill(log_mass == -math.inf, math.inf).amin(1)


def _finite(x):
    return torch.where(x == -math.inf, 0, x)


def _ratio(x, y):
    """Return x / y, and 0 where y is 0: there is no mass."""
    return torch.where(y == 0, 0, x / y)
