"""Segment matching on a GPU: one launch gives the losses and all their gradients, the backward's only weights them.

One program per item, the tile of all pairs in registers (`kernels.sinkhorn_layout` says how it lies there): cost, plan,
losses and gradients follow from each other without a number of size N x M in memory. Coordinates are read one axis at a
time from the cache, and the cost is computed again after the solve, so that few tiles are alive at once.

Sums are those of `sinkhorn_layout`. An item's bits depend on its own values and on the tile that its capacity
asks for, up to 64 or up to 128 rows and columns: not on the batch, its neighbours or the padding inside a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reduce import rounded
from kernels.sinkhorn_layout import INF, col_offsets, max_over, row_offsets, sum_over, sum_rows_of_both
from kernels.sinkhorn_tile import AUTO, reverse_tile, solve_tile, uniform_log_masses

# by tile: rows and columns side by side in the threads of a program; for every architecture and mode. The bound of the
# registers is what a thread can have at most: without it the compiler would rather spill than use more than half
LAYOUT = {
    64: {"N0": 16, "M0": 16, "num_warps": 8, "num_stages": 1, "maxnreg": 255},
    128: {"N0": 32, "M0": 16, "num_warps": 16, "num_stages": 1},
}


def match_segments_forward_triton(
    mid_BN3: Tensor, dir_BN3: Tensor, len_BN: Tensor, gt_BM23: Tensor, gt_count_B: Tensor, settings, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return transport, endpoint, matched, partner, and the gradients [B, 2, 7, N] (of size 0 without need_grad)."""
    (B, N), M = len_BN.shape, gt_BM23.shape[1]
    transport_B, endpoint_B = len_BN.new_empty(B, dtype=torch.float32), len_BN.new_empty(B, dtype=torch.float32)
    matched_BN = len_BN.new_empty(B, N, dtype=torch.float32)
    partner_BN = len_BN.new_empty(B, N, dtype=torch.int64)
    grads_B27N = len_BN.new_empty((B, 2, 7, N) if need_grad else 0, dtype=torch.float32)
    exact = need_grad and settings.plan_gradient == "exact"
    history = len_BN.new_empty((B, N + M + 2, settings.iterations + 1) if exact else 0, dtype=torch.float32)
    block_n, block_m = 64 if N <= 64 else 128, 64 if M <= 64 else 128
    if B:
        _match_segments_fwd_kernel[(B,)](
            mid_BN3.contiguous(), dir_BN3.contiguous(), len_BN.contiguous(), gt_BM23.contiguous(),
            gt_count_B.contiguous(), transport_B, endpoint_B, matched_BN, partner_BN, grads_B27N, history,
            N, M, settings.iterations, settings.direction_weight, settings.length_weight, settings.cost_scale,
            -1 / settings.eps, -settings.cost_scale * settings.dustbin / settings.eps,
            MINIMAL=settings.slack == "minimal", NEED_GRAD=need_grad, EXACT=exact,
            BLOCK_N=block_n, BLOCK_M=block_m, **LAYOUT[max(block_n, block_m)],
        )  # fmt: skip
    return transport_B, endpoint_B, matched_BN, partner_BN, grads_B27N


def match_segments_backward_triton(
    grad_transport_B: Tensor, grad_endpoint_B: Tensor, grads_B27N: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of mid, dir and len."""
    B, _, _, N = grads_B27N.shape
    mid_BN3, dir_BN3 = grads_B27N.new_empty(B, N, 3, dtype=dtype), grads_B27N.new_empty(B, N, 3, dtype=dtype)
    len_BN = grads_B27N.new_empty(B, N, dtype=dtype)
    if B * N:
        _match_segments_bwd_kernel[(B,)](
            grad_transport_B, grad_endpoint_B, grads_B27N, mid_BN3, dir_BN3, len_BN,
            grad_transport_B.stride(0), grad_endpoint_B.stride(0), N, BLOCK_N=128, num_warps=4,
        )  # fmt: skip
    return mid_BN3, dir_BN3, len_BN


@triton.jit(do_not_specialize=["N", "M", "iterations"])
def _match_segments_fwd_kernel(
    mid_ptr, dir_ptr, len_ptr, gt_ptr, gt_count_ptr,
    transport_ptr, endpoint_ptr, matched_ptr, partner_ptr, grads_ptr, history_ptr,
    N, M, iterations, direction_weight, length_weight, cost_scale, neg_inv_eps, z,
    MINIMAL: tl.constexpr, NEED_GRAD: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, N0: tl.constexpr, M0: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    offs_n, offs_m = row_offsets(BLOCK_N, N0), col_offsets(BLOCK_M, M0)
    scalar = tl.zeros([1, 1, 1, 1], tl.int32)
    m = tl.minimum(tl.maximum(tl.load(gt_count_ptr + item), 0), M).to(tl.int32)
    mask_n, mask_m = offs_n < N, offs_m < m
    predicted = (mid_ptr + item * N * 3, dir_ptr + item * N * 3, len_ptr + item * N, offs_n, mask_n)
    true = (gt_ptr + item * M * 6, offs_m, mask_m)
    weights = (direction_weight, length_weight, cost_scale)
    history = (history_ptr + item * (N + M + 2) * (iterations + 1), N, M, iterations)
    grads_ptr += item * 14 * N
    share = 1.0 / tl.maximum(m, 1).to(tl.float32)

    # plan = sinkhorn(cost)
    _, _, _, _, cost = _compare(predicted, true, weights)
    cost = tl.where(mask_n & mask_m, cost, _anchor(gt_ptr + item * M, M, offs_n, offs_m, M0))
    masses, factor = uniform_log_masses(N, m, offs_n, offs_m, True, MINIMAL)
    P, _, _, scales = solve_tile(cost * neg_inv_eps, z, masses, history, not MINIMAL, AUTO, EXACT)
    P *= factor
    mass = sum_over(P, 1)
    # matched = min(sum_j plan, 1)
    tl.store(matched_ptr + item * N + offs_n, tl.where(mass > 1, 1.0, mass), mask_n)
    # partner = lowest j whose best i is i; indices counted from the end, so that the lowest is the largest
    best = max_over(tl.where(max_over(P, 0) == P, BLOCK_N - offs_n, 0), 0)
    first = max_over(tl.where((best == BLOCK_N - offs_n) & mask_m, BLOCK_M - offs_m, 0), 1)
    tl.store(partner_ptr + item * N + offs_n, tl.where(first > 0, BLOCK_M - first, -1), mask_n)

    # endpoint = sum(plan distance) / max(sum plan, 1e-6)
    total = sum_over(mass, 0)
    total = tl.where(total < 1e-6, 1e-6, total)
    distance, order = _endpoint_distance(P, predicted, true)
    endpoint = sum_over(P * distance, 1)
    if NEED_GRAD:
        _endpoint_grads(P * (0.5 / total), order, predicted, true, grads_ptr + 7 * N, N)

    if EXACT:
        # d transport / d cost through the plan; the barrier shows each thread the history that the others stored
        tl.debug_barrier()
        _, _, _, _, cost = _compare(predicted, true, weights)
        G = tl.where(mask_n & mask_m, cost * (factor * share), 0.0)
        Gr, Gc = tl.zeros_like(masses[0]), tl.zeros_like(masses[2])
        dZ, _, _, _, _, _ = reverse_tile(G, Gr, Gc, cost * neg_inv_eps, z, masses, history, scales, not MINIMAL)
        indirect = dZ * (cost_scale * neg_inv_eps)

    # transport = sum(plan cost) / max(m, 1)
    delta2, facing, chord2, gap, cost = _compare(predicted, true, weights)
    transport, endpoint = sum_rows_of_both(sum_over(P * cost, 1), endpoint)
    tl.store(transport_ptr + item + scalar, transport * share)
    tl.store(endpoint_ptr + item + scalar, endpoint / total)
    if NEED_GRAD:
        pull = P * (cost_scale * share)
        if EXACT:
            pull += indirect
        _transport_grads(pull, delta2, facing, chord2, gap, predicted, true, weights, grads_ptr, N)


@triton.jit(do_not_specialize=["N"])
def _match_segments_bwd_kernel(
    grad_transport_ptr, grad_endpoint_ptr, grads_ptr, mid_ptr, dir_ptr, len_ptr,
    stride_t, stride_e, N, BLOCK_N: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    mask = offs < N
    grad_transport = tl.load(grad_transport_ptr + item * stride_t)
    grad_endpoint = tl.load(grad_endpoint_ptr + item * stride_e)
    grads_ptr += item * 14 * N + offs
    # grad = upstream of transport * its gradient + upstream of endpoint * its gradient
    for row in tl.static_range(7):
        grad = grad_transport * tl.load(grads_ptr + row * N, mask) + grad_endpoint * tl.load(
            grads_ptr + (7 + row) * N, mask
        )
        if row < 3:
            tl.store(mid_ptr + (item * N + offs) * 3 + row, grad, mask)
        elif row < 6:
            tl.store(dir_ptr + (item * N + offs) * 3 + (row - 3), grad, mask)
        else:
            tl.store(len_ptr + item * N + offs, grad, mask)


@triton.jit
def _anchor(gt_ptr, M, offs_n, offs_m, M0: tl.constexpr):
    """Return a tile, for the padding, that was read from memory: its values have no meaning.

    Only loads decide how tiles lie in the threads. Without one of a tile's shape the solver's vectors lie as those that
    the costs are made of, and every sum of an iteration ends in a change of layout. Addresses rise along m0 and, over
    shorter stretches, n0: these two lie across threads, m0 first, as in tiles that no load decides.
    """
    at = offs_n % (M0 // 2) + offs_m % M0
    return tl.load(gt_ptr + at, at < M, 0.0).to(tl.float32)


@triton.jit
def _compare(predicted, true, weights):
    """Return |m_i - m_j|^2, the sign, |w_ij|^2, l_i - l_j and the scaled cost."""
    direction_weight, length_weight, cost_scale = weights
    true_len = _true_lengths(true)
    gap = _lengths(predicted) - true_len
    delta2, dot, chord2 = tl.zeros_like(gap), tl.zeros_like(gap), tl.zeros_like(gap)
    for axis in range(3):
        mid, true_mid = _midpoints(predicted, true, axis)
        along, true_along = _directions(predicted, true, axis)
        delta = mid - true_mid
        delta2 += delta * delta
        dot += along * true_along
    # sign = +1 if u_i.u_j >= 0 else -1
    facing = tl.where(dot >= 0, 1.0, -1.0)
    for axis in range(3):
        along, true_along = _directions(predicted, true, axis)
        chord = along - facing * _unit(true_along, true_len)
        chord2 += chord * chord
    cost = cost_scale * (tl.sqrt(delta2) + direction_weight * tl.sqrt(chord2) + length_weight * tl.abs(gap))
    return delta2, facing, chord2, gap, cost


@triton.jit
def _transport_grads(pull, delta2, facing, chord2, gap, predicted, true, weights, grads_ptr, N):
    """Store what `pull`, the gradient of the cost before its scale, is for mid, dir and len."""
    direction_weight, length_weight, _ = weights
    offs_n, mask_n = predicted[3], predicted[4]
    tl.store(grads_ptr + 6 * N + offs_n, length_weight * sum_over(rounded(pull * _sign(gap)), 1), mask_n)
    true_len = _true_lengths(true)
    delta_pull = pull * _inverse_root(delta2)
    for axis in range(3):
        mid, true_mid = _midpoints(predicted, true, axis)
        tl.store(grads_ptr + axis * N + offs_n, sum_over(rounded(delta_pull * (mid - true_mid)), 1), mask_n)
    chord_pull = pull * (direction_weight * _inverse_root(chord2))
    for axis in range(3):
        along, true_along = _directions(predicted, true, axis)
        chord = along - facing * _unit(true_along, true_len)
        tl.store(grads_ptr + (3 + axis) * N + offs_n, sum_over(rounded(chord_pull * chord), 1), mask_n)


@triton.jit
def _endpoint_distance(P, predicted, true):
    """Return d_ij and +1 where the endpoints are paired in the given order, else -1.

    With x = m_i - m_j and y = h_i - h_j, half vectors, |p_i - p_j| + |q_i - q_j| = |x - y| + |x + y| = 2 max(|x|, |y|).
    """
    same, swapped = tl.zeros_like(P), tl.zeros_like(P)
    half_len = _lengths(predicted) * 0.5
    for axis in range(3):
        mid, true_mid = _midpoints(predicted, true, axis)
        along, true_along = _directions(predicted, true, axis)
        x, half, true_half = tl.abs(mid - true_mid), along * half_len, true_along * 0.5
        y_same, y_swapped = tl.abs(half - true_half), tl.abs(half + true_half)
        same += tl.where(x > y_same, x, y_same)
        swapped += tl.where(x > y_swapped, x, y_swapped)
    return tl.where(same <= swapped, same, swapped), tl.where(same <= swapped, 1.0, -1.0)


@triton.jit
def _endpoint_grads(pull, order, predicted, true, grads_ptr, N):
    """Store the gradients of sum(pull (|p_i - p_j| + |q_i - q_j|)) for mid, dir and len."""
    offs_n, mask_n = predicted[3], predicted[4]
    length = _lengths(predicted)
    grad_len = tl.zeros_like(length)
    for axis in range(3):
        mid, true_mid = _midpoints(predicted, true, axis)
        along, true_along = _directions(predicted, true, axis)
        x, y = mid - true_mid, along * length * 0.5 - order * (true_along * 0.5)
        grad_start, grad_end = sum_over(pull * _sign(x - y), 1), sum_over(pull * _sign(x + y), 1)
        grad_half = (grad_end - grad_start) * 0.5
        tl.store(grads_ptr + axis * N + offs_n, grad_start + grad_end, mask_n)
        tl.store(grads_ptr + (3 + axis) * N + offs_n, grad_half * length, mask_n)
        grad_len += grad_half * along
    tl.store(grads_ptr + 6 * N + offs_n, grad_len, mask_n)


@triton.jit
def _midpoints(predicted, true, axis):
    """Return one coordinate of all midpoints; 0 in the padding."""
    mid = tl.load(predicted[0] + predicted[3] * 3 + axis, predicted[4], 0.0).to(tl.float32)
    start, end = _true_endpoints(true, axis)
    return mid, (start + end) * 0.5


@triton.jit
def _directions(predicted, true, axis):
    """Return one coordinate of the predicted directions, and of the true vectors from end to end; 0 in the padding."""
    along = tl.load(predicted[1] + predicted[3] * 3 + axis, predicted[4], 0.0).to(tl.float32)
    start, end = _true_endpoints(true, axis)
    return along, end - start


@triton.jit
def _true_endpoints(true, axis):
    gt_ptr, offs_m, mask_m = true
    start = tl.load(gt_ptr + offs_m * 6 + axis, mask_m, 0.0).to(tl.float32)
    end = tl.load(gt_ptr + offs_m * 6 + 3 + axis, mask_m, 0.0).to(tl.float32)
    return start, end


@triton.jit
def _lengths(predicted):
    return tl.load(predicted[2] + predicted[3], predicted[4], 0.0).to(tl.float32)


@triton.jit
def _true_lengths(true):
    squares = tl.zeros_like(true[1]).to(tl.float32)
    for axis in range(3):
        start, end = _true_endpoints(true, axis)
        squares += (end - start) * (end - start)
    return tl.sqrt(squares)


@triton.jit
def _unit(along, length):
    return along / tl.where(length > 1e-12, length, 1e-12)


@triton.jit
def _inverse_root(x):
    """Return 1 / sqrt(x), and 0 where x is no normal number: the gradient of a norm at 0."""
    return tl.rsqrt(tl.where(x > 1e-36, x, INF))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
