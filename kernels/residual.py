"""The seam of two residual blocks in one launch: dropout, residual sum, RMSNorm, and a copy for the next products.

    new = x + Dropout(y + bias),   normed = new / sqrt(mean(new^2) + eps) * gain,   copy = new rounded

Shapes in names: B batch, T rows of an item, C channels. Inside everything is float32.
"""

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kernels.dispatch import require_tensors, require_tensors_or_none, resolve
from kernels.philox import Counter, check_key_and_counters, dropout_keep
from kernels.philox_tile import signed_seed
from kernels.reduce import JointSums, Summand, joined, sum_each
from kernels.registration import operator
from kernels.residual_triton import WIDEST, residual_norm_backward, residual_norm_forward, segments
from kernels.rms_norm import EPS

PRODUCT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Residual(NamedTuple):
    """The residual stream after a block, and what the next block's products read; None where not asked for."""

    new_BTC: torch.Tensor
    normed_BTC: torch.Tensor | None
    copy_BTC: torch.Tensor | None


def residual_norm(
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor | None = None,
    gain_C: torch.Tensor | None = None,
    *,
    bias_C: torch.Tensor | None = None,
    rate: float = 0.0,
    seed: int = 0,
    step: Counter = 0,
    scene_B: torch.Tensor | None = None,
    place: int = 0,
    dtype: torch.dtype | None = None,
    copy: bool = False,
    eps: float = EPS,
    sums: JointSums | None = None,
    impl: str = "auto",
) -> Residual:
    """Add a block's branch to the residual stream and normalise the sum for the next block.

        new = x + Dropout(y + bias),   normed = new / sqrt(mean(new^2) + eps) * gain,   copy = new in `dtype`

    Args:
        x_BTC: the stream, float32 (float64 where the eager form runs), any strides; C is 1 to 1024.
        y_BTC: the branch, float32, bfloat16 or float16; None before the first block: new is x.
        gain_C: of the next block's norm; None after the last block: normed is None.
        bias_C: of the branch's last product.
        rate: probability of dropping an element of the branch, in [0, 1).
        seed, step, scene_B, place: key and counters of the mask, see `kernels.philox.dropout_keep`; step is an int or
            an int64 tensor of one element on the device. scene_B is needed where the rate is not 0.
        dtype: of normed and copy, that of the next products; None: that of x.
        copy: whether the next products also read the stream as it is.
        eps: added to the mean square, positive.
        sums: where the Triton form's gradients of gain and bias are added up, together with those of other operators.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.

    Returns:
        Residual(new, normed, copy); copy is new itself where dtype is that of x.

    Raises:
        ValueError: a shape, dtype, device or option outside of the above.

    Determinism: repeats bit for bit. Triton: an item's bits do not depend on the batch; the gradients of gain and bias
        are sums over all rows in an order that depends on their number alone. Masks are recomputed, never stored.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    require_tensors(x=x_BTC)
    require_tensors_or_none(y=y_BTC, gain=gain_C, bias=bias_C)
    dtype = x_BTC.dtype if dtype is None else dtype
    _check(x_BTC, y_BTC, gain_C, bias_C, dtype)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    _check_draws(x_BTC, rate, seed, step, scene_B, place)
    draws = {"rate": rate, "seed": seed, "step": step, "scene_B": scene_B, "place": place}
    settings = {"bias_C": bias_C, "dtype": dtype, "copy": copy, "eps": eps, **draws}
    if resolve(impl, x_BTC.device) == "triton":
        return _fused(x_BTC, y_BTC, gain_C, sums=sums, **settings)
    return residual_norm_reference(x_BTC, y_BTC, gain_C, **settings)


def residual_norm_reference(
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor | None = None,
    gain_C: torch.Tensor | None = None,
    *,
    bias_C: torch.Tensor | None = None,
    rate: float = 0.0,
    seed: int = 0,
    step: Counter = 0,
    scene_B: torch.Tensor | None = None,
    place: int = 0,
    dtype: torch.dtype | None = None,
    copy: bool = False,
    eps: float = EPS,
) -> Residual:
    """The meaning of `residual_norm`, in plain PyTorch; in float64 the truth."""
    dtype, new_BTC = dtype or x_BTC.dtype, x_BTC
    if y_BTC is not None:
        y_BTC = y_BTC.to(x_BTC.dtype) if bias_C is None else y_BTC.to(x_BTC.dtype) + bias_C.to(x_BTC.dtype)
        if rate > 0:
            assert scene_B is not None
            keep_BTC = dropout_keep(tuple(y_BTC.shape), rate, seed=seed, step=step, scene_B=scene_B, place=place)
            y_BTC = torch.where(keep_BTC, y_BTC * (1 / (1 - rate)), 0.0)
        new_BTC = x_BTC + y_BTC
    normed_BTC = None
    if gain_C is not None:
        normed_BTC = torch.nn.functional.rms_norm(new_BTC, new_BTC.shape[-1:], gain_C.to(new_BTC.dtype), eps).to(dtype)
    return Residual(new_BTC, normed_BTC, new_BTC.to(dtype) if copy else None)


def _fused(x_BTC, y_BTC, gain_C, *, bias_C, rate, seed, step, scene_B, place, dtype, copy, eps, sums) -> Residual:
    """The Triton form: what an operator cannot return, its input, is put in its place here."""
    if x_BTC.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    if rate == 0 or y_BTC is None:
        rate, step, scene_B = 0.0, None, None
    elif not isinstance(step, torch.Tensor):
        step = torch.full((1,), step, device=x_BTC.device)
    rounds = copy and dtype != x_BTC.dtype
    new_BTC, normed_BTC, copy_BTC = x_BTC, None, None
    if y_BTC is not None or gain_C is not None or rounds:
        options = (step, scene_B, rate, signed_seed(seed), place, dtype, rounds, eps)
        if joined(sums):
            new_BTC, normed_BTC, copy_BTC, _ = _summed_with_others(sums, x_BTC, y_BTC, gain_C, bias_C, *options)
        else:
            new_BTC, normed_BTC, copy_BTC, _ = _forward(x_BTC, y_BTC, gain_C, bias_C, *options)
    new_BTC = x_BTC if y_BTC is None else new_BTC
    copy_BTC = copy_BTC if rounds else new_BTC
    return Residual(new_BTC, None if gain_C is None else normed_BTC, copy_BTC if copy else None)


@operator("ridgeline::residual_norm_forward")
def _forward(
    x_BTC: torch.Tensor,
    y_BTC: torch.Tensor | None,
    gain_C: torch.Tensor | None,
    bias_C: torch.Tensor | None,
    step_1: torch.Tensor | None,
    scene_B: torch.Tensor | None,
    rate: float,
    seed: int,
    place: int,
    dtype: torch.dtype,
    copy: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """new_BTC, normed_BTC, copy_BTC and the inverse roots r_BT; empty where there is none."""
    if x_BTC.numel() == 0:
        return _empty_outputs(x_BTC, y_BTC, gain_C, dtype, copy)
    return residual_norm_forward(x_BTC, y_BTC, gain_C, bias_C, (rate, seed, place, step_1, scene_B), dtype, copy, eps)


@_forward.register_fake
def _(x_BTC, y_BTC, gain_C, bias_C, step_1, scene_B, rate, seed, place, dtype, copy, eps):
    return _empty_outputs(x_BTC, y_BTC, gain_C, dtype, copy)


def _empty_outputs(x_BTC, y_BTC, gain_C, dtype, copy):
    def empty(asked, shape, dtype):
        return x_BTC.new_empty(shape if asked else 0, dtype=dtype)

    return (
        empty(y_BTC is not None, x_BTC.shape, x_BTC.dtype),
        empty(gain_C is not None, x_BTC.shape, dtype),
        empty(copy, x_BTC.shape, dtype),
        empty(gain_C is not None, x_BTC.shape[:2], x_BTC.dtype),
    )


@operator("ridgeline::residual_norm_backward")
def _backward(
    dnew_BTC: torch.Tensor | None,
    dnormed_BTC: torch.Tensor | None,
    dcopy_BTC: torch.Tensor | None,
    new_BTC: torch.Tensor,
    r_BT: torch.Tensor,
    gain_C: torch.Tensor | None,
    step_1: torch.Tensor | None,
    scene_B: torch.Tensor | None,
    rate: float,
    seed: int,
    place: int,
    y_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x and y (empty without a y), and those of gain and bias as rows, where they have any."""
    if new_BTC.numel() == 0:
        dx_BTC, dy_BTC, sums_PC = _empty_gradients(new_BTC, dnormed_BTC, y_dtype, has_bias)
        return dx_BTC, dy_BTC, sums_PC.zero_()
    B, T, C = new_BTC.shape
    asked = (dnormed_BTC is not None) + has_bias
    partials_PSC = new_BTC.new_empty(asked, segments(B * T), C)
    dgain_SC = None if dnormed_BTC is None else partials_PSC[0]
    dbias_SC = partials_PSC[-1] if has_bias else None
    dropout = (rate, seed, place, step_1, scene_B)
    dx_BTC, dy_BTC = residual_norm_backward(
        dnew_BTC, dnormed_BTC, dcopy_BTC, new_BTC, r_BT, gain_C, dropout, y_dtype, dgain_SC, dbias_SC
    )
    return dx_BTC, dy_BTC, sum_each(partials_PSC)


@_backward.register_fake
def _(dnew_BTC, dnormed_BTC, dcopy_BTC, new_BTC, r_BT, gain_C, step_1, scene_B, rate, seed, place, y_dtype, has_bias):
    return _empty_gradients(new_BTC, dnormed_BTC, y_dtype, has_bias)


def _empty_gradients(new_BTC, dnormed_BTC, y_dtype, has_bias):
    dy_BTC = new_BTC.new_empty(0) if y_dtype is None else new_BTC.new_empty(new_BTC.shape, dtype=y_dtype)
    sums_PC = new_BTC.new_empty((dnormed_BTC is not None) + has_bias, new_BTC.shape[-1])
    return new_BTC.new_empty(new_BTC.shape), dy_BTC, sums_PC


def _setup_context(ctx, inputs, output):
    x_BTC, y_BTC, gain_C, bias_C, step_1, scene_B, ctx.rate, ctx.seed, ctx.place, _, ctx.copies, _ = inputs
    new_BTC, _, _, r_BT = output
    # a gradient that nobody asks for is None, not a tensor of zeros to read
    ctx.set_materialize_grads(False)
    ctx.y_dtype, ctx.bias_dtype = (None if x is None else x.dtype for x in (y_BTC, bias_C))
    ctx.save_for_backward(x_BTC if y_BTC is None else new_BTC, r_BT, gain_C, step_1, scene_B)


def _gradients(ctx, dnew_BTC, dnormed_BTC, dcopy_BTC, _):
    new_BTC, r_BT, gain_C, step_1, scene_B = ctx.saved_tensors
    dnew_BTC, dnormed_BTC, dcopy_BTC = _asked_for(ctx, gain_C, dnew_BTC, dnormed_BTC, dcopy_BTC)
    dx_BTC, dy_BTC, sums_PC = _backward(
        dnew_BTC, dnormed_BTC, dcopy_BTC, new_BTC, r_BT, gain_C, step_1, scene_B,
        ctx.rate, ctx.seed, ctx.place, ctx.y_dtype, ctx.bias_dtype is not None,
    )  # fmt: skip
    dgain_C = None if gain_C is None or dnormed_BTC is None else sums_PC[0].to(gain_C.dtype)
    dbias_C = None if ctx.bias_dtype is None else sums_PC[-1].to(ctx.bias_dtype)
    return dx_BTC, None if ctx.y_dtype is None else dy_BTC, dgain_C, dbias_C, *[None] * 8


def _asked_for(ctx, gain_C, dnew_BTC, dnormed_BTC, dcopy_BTC, *_):
    """Outputs that were not asked for are empty, and so may be their gradients: None in their place."""
    return (
        None if ctx.y_dtype is None else dnew_BTC,
        None if gain_C is None else dnormed_BTC,
        dcopy_BTC if ctx.copies else None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _summed_with_others(sums: JointSums, x_BTC, y_BTC, gain_C, bias_C, *options):
    """The operator, whose gradients of gain and bias are added up together with those of others."""
    count = segments(x_BTC.shape[0] * x_BTC.shape[1])
    gain_C, dgain = (None, None) if gain_C is None else sums.take(gain_C, count)
    bias_C, dbias = (None, None) if bias_C is None else sums.take(bias_C, count)
    return _Summed.apply((dgain, dbias), x_BTC, y_BTC, gain_C, bias_C, *options)


class _Summed(torch.autograd.Function):
    """What the operator is, with the places of the gradients of gain and bias in joint sums."""

    @staticmethod
    def forward(ctx, summands: tuple[Summand | None, Summand | None], *inputs):
        ctx.summands, outputs = summands, _forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        new_BTC, r_BT, gain_C, step_1, scene_B = ctx.saved_tensors
        dnew_BTC, dnormed_BTC, dcopy_BTC = _asked_for(ctx, gain_C, *gradients)
        dgain, dbias = ctx.summands
        dgain = None if dnormed_BTC is None else dgain
        partials = [None if summand is None else summand.partial_SC for summand in (dgain, dbias)]
        if new_BTC.numel() == 0:
            dx_BTC, dy_BTC, _ = _empty_gradients(new_BTC, None, ctx.y_dtype, False)
        else:
            dropout = (ctx.rate, ctx.seed, ctx.place, step_1, scene_B)
            dx_BTC, dy_BTC = residual_norm_backward(
                dnew_BTC, dnormed_BTC, dcopy_BTC, new_BTC, r_BT, gain_C, dropout, ctx.y_dtype, *partials
            )
        dgain_C, dbias_C = (None if summand is None else summand.sum_C for summand in (dgain, dbias))
        return None, dx_BTC, None if ctx.y_dtype is None else dy_BTC, dgain_C, dbias_C, *[None] * 8


def _check(x_BTC, y_BTC, gain_C, bias_C, dtype) -> None:
    """Refuse tensors that do not fit each other."""
    if x_BTC.dim() != 3 or not 1 <= x_BTC.shape[-1] <= WIDEST:
        raise ValueError(f"x must be [B, T, C] with C in [1, {WIDEST}], got shape {tuple(x_BTC.shape)}")
    if x_BTC.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, got {x_BTC.dtype}")
    if dtype not in (*PRODUCT_TYPES, x_BTC.dtype):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or that of x, got {dtype}")
    if y_BTC is not None and y_BTC.shape != x_BTC.shape:
        raise ValueError(f"y must have the shape of x, {tuple(x_BTC.shape)}, got {tuple(y_BTC.shape)}")
    if bias_C is not None and y_BTC is None:
        raise ValueError("bias must have a y that it is added to")
    for name, vector_C in (("gain", gain_C), ("bias", bias_C)):
        if vector_C is not None and vector_C.shape != x_BTC.shape[-1:]:
            raise ValueError(f"{name} must be [{x_BTC.shape[-1]}], got shape {tuple(vector_C.shape)}")
    for name, tensor in (("y", y_BTC), ("gain", gain_C), ("bias", bias_C)):
        if tensor is not None and tensor.dtype not in (*PRODUCT_TYPES, x_BTC.dtype):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor is not None and tensor.device != x_BTC.device:
            raise ValueError(f"{name} must be on the device of x, {x_BTC.device}, got {tensor.device}")


def _check_draws(x_BTC, rate, seed, step, scene_B, place) -> None:
    """Refuse a key or counters that do not fit."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    check_key_and_counters(seed)
    device = x_BTC.device
    if rate == 0:
        return
    if scene_B is None:
        raise ValueError("scene must be given where rate is not 0")
    require_tensors(scene=scene_B)
    for name, counter, count in (("scene", scene_B, len(x_BTC)), ("step", step, 1)):
        if not isinstance(counter, torch.Tensor):
            continue
        misshaped = counter.shape != (count,) if name == "scene" else counter.numel() != count
        if misshaped or counter.dtype != torch.int64 or counter.device != device:
            got = f"shape {tuple(counter.shape)}, {counter.dtype} on {counter.device}"
            raise ValueError(f"{name} must be {count} of int64 on {device}, got {got}")
    check_key_and_counters(seed, step=step, scene=scene_B, place=place)
