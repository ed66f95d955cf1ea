"""Global gradient norm, clipping and AdamW over a list of tensors, in few launches and near the bytes they must move.

    norm = sqrt(sum of all squares of gradients),   factor = min(1, limit / (norm + 1e-6)),   g = factor * gradient
    t += 1,   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    squares     the sum of squares of each segment of a gradient; the first segment of a tensor counts its update
    norm        the norm and the factor, from the sums of all segments
    update      p, m and v of each segment, in one pass

Gradients are not rewritten, and read where they are; one that lies off 16 bytes is copied first. Pointers are arguments
of the launches: inside a CUDA graph they are those of the recording, and nothing is copied from the host. A launch
takes as many tensors as its arguments have room for. Shapes in names: P tensors, K segments.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from kernels.dispatch import require_tensors, resolve
from kernels.registration import operator

Tensors = Sequence[torch.Tensor]
# elements of a tensor that a program takes, and of its tiles: the search for the tensor costs as much as a few. An
# update that loads its tiles ahead is slower
SEGMENT, SQUARES_TILE, UPDATE_TILE, WARPS = 16384, 2048, 1024, 4
# sums that the norm takes at a time, and its warps
SUMS, NORM_WARPS = 1024, 8
# what every CUDA driver lets a launch's arguments have, less what is no pointer of a tensor in a list
ARGUMENT_BYTES = 4096 - 128


def adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: torch.Tensor,
    decays: Sequence[float],
    limit: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    impl: str = "auto",
) -> torch.Tensor:
    """Clip the gradients to the global L2 norm `limit` and make one update of AdamW in place; see the module.

    Args:
        params, exp_avgs, exp_avg_sqs: p, m and v; contiguous float32 on one device (float64 where the eager form runs).
        grads: like params; neither written nor kept.
        steps: updates made so far of each parameter, t; one-element float32 tensors, counted up.
        lr: a one-element tensor of the dtype of params; read on the device.
        decays: weight decay of each parameter, decoupled from the moments.
        limit: bound of the norm, positive.
        betas, eps: in [0, 1), and positive.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        The norm before clipping, a scalar tensor; 0 without parameters. As in PyTorch a gradient that is NaN makes all
        parameters NaN.
    Raises:
        ValueError: lists of different lengths, or a shape, dtype, layout, device or option outside of the above.

    Determinism: repeats bit for bit; sums are taken in an order that the sizes of the tensors and their order fix.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, steps, lr, decays)
    _check_options(decays, limit, betas, eps)
    options = {"decays": list(decays), "limit": limit, "beta1": betas[0], "beta2": betas[1], "eps": eps}
    if resolve(impl, lr.device) == "eager":
        return adamw_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, **options)
    if lr.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    with torch.no_grad():
        lists = (list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps))
        return _adamw(*lists, lr, **options)


@torch.no_grad()
def adamw_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: torch.Tensor,
    decays: Sequence[float],
    limit: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.Tensor:
    """The meaning of `adamw`, in plain PyTorch; in float64 the truth."""
    if not params:
        return lr.new_zeros(())
    lr = lr.reshape(())
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    for p, grad, m, v, step, decay in zip(params, grads, exp_avgs, exp_avg_sqs, steps, decays, strict=True):
        step += 1
        # powers near 1 cancel: float64 whatever the dtype
        correction1, correction2 = (1 - beta ** step.double().reshape(()) for beta in (beta1, beta2))
        g = grad * factor
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        rate, root = (lr / correction1).to(p.dtype), correction2.sqrt().to(p.dtype)
        p.copy_((1 - lr * decay) * p - rate * m / (v.sqrt() / root + eps))
    return norm


@operator("ridgeline::adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps"))
def _adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    lr: torch.Tensor,
    decays: list[float],
    limit: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.Tensor:
    """The norm before clipping."""
    # sums depend on how they are loaded, and that on the alignment: the same for all
    grads = [grad if grad.data_ptr() % 16 == 0 else grad.clone() for grad in grads]
    sizes = [param.numel() for param in params]
    sums_K = lr.new_empty(sum(map(_segments, sizes)))
    corrections_P2 = lr.new_empty(len(params), 2)
    norm, factor = lr.new_empty(()), lr.new_empty(())
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    start = 0
    for some, places in _launches(sizes, decays, pointers=2):
        segments = sum(map(_segments, sizes[some]))
        _adamw_squares_kernel[(segments,)](
            tuple(grads[some]), tuple(steps[some]), sums_K[start:], corrections_P2[some], PLACES=places,
            LOG_BETA1=logs[0], LOG_BETA2=logs[1], SEGMENT=SEGMENT, TILE=SQUARES_TILE, num_warps=WARPS,
        )  # fmt: skip
        start += segments
    _adamw_norm_kernel[(1,)](sums_K, norm, factor, len(sums_K), limit, SUMS=SUMS, num_warps=NORM_WARPS)
    for some, places in _launches(sizes, decays, pointers=4):
        _adamw_update_kernel[(sum(map(_segments, sizes[some])),)](
            *(tuple(tensors[some]) for tensors in (params, grads, exp_avgs, exp_avg_sqs)),
            corrections_P2[some], lr, factor, eps, PLACES=places,
            BETA1=beta1, BETA2=beta2, SEGMENT=SEGMENT, TILE=UPDATE_TILE, num_warps=WARPS,
        )  # fmt: skip
    return norm


@_adamw.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, steps, lr, decays, limit, beta1, beta2, eps):
    return lr.new_empty(())


def _segments(size: int) -> int:
    # a tensor without elements counts its updates too
    return max(1, -(-size // SEGMENT))


def _launches(sizes, decays, *, pointers: int) -> Iterator[tuple[slice, tuple[tuple[int, int, float], ...]]]:
    """Cut the tensors into launches; yield which, and for each the launch's first segment of it, its size and decay."""
    at_once = ARGUMENT_BYTES // (8 * pointers)
    for begin in range(0, len(sizes), at_once):
        some = slice(begin, begin + at_once)
        firsts = itertools.accumulate(map(_segments, sizes[some]), initial=0)
        yield some, tuple(zip(firsts, sizes[some], decays[some], strict=False))


def _check(params, grads, exp_avgs, exp_avg_sqs, steps, lr, decays) -> None:
    """Refuse tensors that do not fit each other."""
    require_tensors(lr=lr)
    if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lr must be one number of float32 or float64, got shape {tuple(lr.shape)}, {lr.dtype}")
    named = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "decays": decays}
    for name, values in named.items():
        if len(values) != len(params):
            raise ValueError(f"{name} must be one for each of {len(params)} params, got {len(values)}")
    for name, tensors in {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}.items():
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            require_tensors(**{f"{name}[{i}]": tensor})
            if tensor.dtype != lr.dtype or tensor.device != lr.device:
                raise ValueError(
                    f"{name}[{i}] must be {lr.dtype} on {lr.device} like lr, got {tensor.dtype} on {tensor.device}"
                )
            if tensor.shape != param.shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous with the shape of its parameter, {tuple(param.shape)}, got "
                    f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
    for i, step in enumerate(steps):
        require_tensors(**{f"steps[{i}]": step})
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != lr.device:
            got = f"shape {tuple(step.shape)}, {step.dtype} on {step.device}"
            raise ValueError(f"steps[{i}] must be one number of float32 on {lr.device}, got {got}")


def _check_options(decays, limit, betas, eps) -> None:
    """Refuse numbers out of their range."""
    for i, decay in enumerate(decays):
        if not decay >= 0:
            raise ValueError(f"decays[{i}] must be at least 0, got {decay}")
    for name, value in (("limit", limit), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"betas must be in [0, 1), got {beta}")


@triton.jit
def _locate(segment, PLACES: tl.constexpr, LOW: tl.constexpr, COUNT: tl.constexpr, SEGMENT: tl.constexpr):
    """The tensor that a segment of the launch belongs to, among COUNT from number LOW: its number, the segment's start
    in it, its size and decay.

    Halves the list until one is left. The tensors' pointers are picked afterwards: all at once need more registers.
    """
    if COUNT == 1:
        start = (segment - PLACES[LOW][0]).to(tl.int64) * SEGMENT
        size, decay = tl.full([], PLACES[LOW][1], tl.int64), tl.full([], PLACES[LOW][2], tl.float32)
        return tl.full([], LOW, tl.int32), start, size, decay
    else:
        HALF: tl.constexpr = COUNT // 2
        if segment < PLACES[LOW + HALF][0]:
            found = _locate(segment, PLACES, LOW, HALF, SEGMENT)
        else:
            found = _locate(segment, PLACES, LOW + HALF, COUNT - HALF, SEGMENT)
        return found


@triton.jit
def _pick(number, pointers):
    """The pointer of a number: of each pair one is kept, by the lowest bit of the number, until one is left.

    Branches would take fewer steps and, as compiled, twice as many registers.
    """
    if len(pointers) == 1:
        return pointers[0]
    else:
        kept = ()
        for i in tl.static_range(len(pointers) // 2):
            kept = kept + (tl.where(number % 2 == 1, pointers[2 * i + 1], pointers[2 * i]),)  # noqa: RUF005
        if len(pointers) % 2 == 1:
            kept = kept + (pointers[len(pointers) - 1],)  # noqa: RUF005
        return _pick(number // 2, kept)


@triton.jit
def _squares(grad_ptr, left, TILE: tl.constexpr):
    offs = tl.arange(0, TILE)
    grad = tl.load(grad_ptr + offs, mask=offs < left, other=0.0)
    return grad * grad


@triton.jit
def _adamw_squares_kernel(
    grad_ptrs, step_ptrs, sums_ptr, corrections_ptr, PLACES: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number, start, size, _ = _locate(tl.program_id(0), PLACES, 0, len(grad_ptrs), SEGMENT)
    grad_ptr = _pick(number, grad_ptrs) + start
    left = tl.minimum(size - start, SEGMENT).to(tl.int32)
    lanes = tl.zeros([TILE], tl.float32)
    for done in tl.range(0, left, TILE):
        # a whole tile has a constant bound: only then are four elements loaded at a time
        if left - done >= TILE:
            lanes += _squares(grad_ptr + done, TILE, TILE)
        else:
            lanes += _squares(grad_ptr + done, left - done, TILE)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(lanes))
    if start == 0:
        # t += 1
        step_ptr = _pick(number, step_ptrs)
        step = tl.load(step_ptr) + 1
        tl.store(step_ptr, step)
        # 1 - beta1^t,  1 - beta2^t: powers near 1 cancel, so in float64
        t = step.to(tl.float64)
        correction1 = 1 - tl.exp(t * tl.full([], LOG_BETA1, tl.float64))
        correction2 = 1 - tl.exp(t * tl.full([], LOG_BETA2, tl.float64))
        tl.store(corrections_ptr + number * 2, correction1.to(tl.float32))
        tl.store(corrections_ptr + number * 2 + 1, correction2.to(tl.float32))


@triton.jit(do_not_specialize=["K"])
def _adamw_norm_kernel(sums_ptr, norm_ptr, factor_ptr, K, limit, SUMS: tl.constexpr):
    offs = tl.arange(0, SUMS)
    lanes = tl.zeros([SUMS], tl.float32)
    for start in tl.range(0, K, SUMS):
        lanes += tl.load(sums_ptr + start + offs, mask=start + offs < K, other=0.0)
    norm = tl.sqrt_rn(tl.sum(lanes))
    # factor = min(1, limit / (norm + 1e-6)), NaN where the norm is NaN
    factor = tl.div_rn(limit, norm + 1e-6)
    tl.store(norm_ptr, norm)
    tl.store(factor_ptr, tl.where(factor > 1, 1.0, factor))


@triton.jit
def _update_tile(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, left, keep, rate, root, factor, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, TILE)
    mask = offs < left
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0) * factor
    # m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    m = BETA1 * tl.load(exp_avg_ptr + offs, mask=mask, other=0.0) + (1 - BETA1) * g
    v = BETA2 * tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0) + (1 - BETA2) * g * g
    # p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    p = keep * tl.load(param_ptr + offs, mask=mask, other=0.0)
    p -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(param_ptr + offs, p, mask=mask)
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)


@triton.jit
def _adamw_update_kernel(
    param_ptrs, grad_ptrs, exp_avg_ptrs, exp_avg_sq_ptrs, corrections_ptr, lr_ptr, factor_ptr, eps,
    PLACES: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number, start, size, decay = _locate(tl.program_id(0), PLACES, 0, len(param_ptrs), SEGMENT)
    param_ptr = _pick(number, param_ptrs) + start
    grad_ptr = _pick(number, grad_ptrs) + start
    exp_avg_ptr = _pick(number, exp_avg_ptrs) + start
    exp_avg_sq_ptr = _pick(number, exp_avg_sq_ptrs) + start
    # 1 - lr decay,  lr / (1 - beta1^t),  sqrt(1 - beta2^t)
    lr = tl.load(lr_ptr)
    keep = 1 - lr * decay
    rate = tl.div_rn(lr, tl.load(corrections_ptr + number * 2))
    root = tl.sqrt_rn(tl.load(corrections_ptr + number * 2 + 1))
    factor = tl.load(factor_ptr)
    left = tl.minimum(size - start, SEGMENT).to(tl.int32)
    # a whole tile has a constant bound: only then are four elements loaded and stored at a time
    whole = left // TILE * TILE
    for done in tl.range(0, whole, TILE):
        _update_tile(
            param_ptr + done, grad_ptr + done, exp_avg_ptr + done, exp_avg_sq_ptr + done, TILE,
            keep, rate, root, factor, eps, BETA1, BETA2, TILE,
        )  # fmt: skip
    if whole < left:
        _update_tile(
            param_ptr + whole, grad_ptr + whole, exp_avg_ptr + whole, exp_avg_sq_ptr + whole, left - whole,
            keep, rate, root, factor, eps, BETA1, BETA2, TILE,
        )  # fmt: skip
