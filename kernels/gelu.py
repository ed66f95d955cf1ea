"""Bias and exact GELU in one launch, forward and backward.

    z = x + bias,   y = z Phi(z),   dx = dy (Phi(z) + z phi(z)),   dbias = sum over rows of dx

Phi and phi are the standard normal distribution and its density. Shapes in names: B batch, T rows of an item, C
channels. Inside everything is float32. Nothing but x and bias is kept for the backward.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.dispatch import cdiv, require_tensors, resolve
from kernels.gelu_tile import gelu_slope, normal_cdf
from kernels.reduce import JointSums, Summand, joined, sum_segments
from kernels.registration import operator

INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows and columns of a tile, warps, in both passes; a program of the backward takes SEGMENT rows and loads STAGES - 1
# tiles ahead
ROWS, COLUMNS, WARPS, SEGMENT, STAGES = 2, 512, 4, 32, 3


def bias_gelu(
    x_BTC: torch.Tensor, bias_C: torch.Tensor, *, sums: JointSums | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Return GELU(x + bias), exact: z Phi(z), in the dtype of x.

    Args:
        x_BTC: float32, bfloat16 or float16 (float64 where the eager form runs), any strides.
        bias_C: one number per channel.
        sums: where the Triton form's gradient of bias is added up, together with those of other operators.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        Of the shape and dtype of x.
    Raises:
        ValueError: a shape, dtype, device or option outside of the above.

    Determinism: repeats bit for bit. Triton: an item's bits do not depend on the batch; the gradient of bias is a sum
        over all rows in an order that depends on their number alone.
    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016).
    """
    _check(x_BTC, bias_C)
    if resolve(impl, x_BTC.device) == "eager":
        return bias_gelu_reference(x_BTC, bias_C)
    if x_BTC.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    if joined(sums):
        return _Summed.apply(x_BTC, *sums.take(bias_C, _segments(x_BTC)))
    return _forward(x_BTC, bias_C)


def bias_gelu_reference(x_BTC: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """The meaning of `bias_gelu`, in plain PyTorch; in float64 the truth."""
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    return torch.nn.functional.gelu(x_BTC.to(dtype) + bias_C.to(dtype)).to(x_BTC.dtype)


@operator("ridgeline::bias_gelu_forward")
def _forward(x_BTC: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """y_BTC."""
    y_BTC = x_BTC.new_empty(x_BTC.shape)
    if x_BTC.numel():
        C = x_BTC.shape[-1]
        rows = x_BTC.numel() // C
        _bias_gelu_fwd_kernel[(cdiv(rows, ROWS), cdiv(C, COLUMNS))](
            x_BTC.contiguous(), bias_C.contiguous(), y_BTC, rows, C,
            PRECISION="ieee" if x_BTC.dtype == torch.float32 else "tf32", ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return y_BTC


@_forward.register_fake
def _(x_BTC, bias_C):
    return x_BTC.new_empty(x_BTC.shape)


@operator("ridgeline::bias_gelu_backward")
def _backward(dy_BTC: torch.Tensor, x_BTC: torch.Tensor, bias_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dx_BTC, and dbias_C in float32."""
    partials_SC = x_BTC.new_empty(_segments(x_BTC), x_BTC.shape[-1], dtype=torch.float32)
    return _bias_gelu_bwd(dy_BTC, x_BTC, bias_C, partials_SC), sum_segments(partials_SC)


def _segments(x_BTC: torch.Tensor) -> int:
    return -(-(x_BTC.shape[0] * x_BTC.shape[1]) // SEGMENT)


def _bias_gelu_bwd(dy_BTC, x_BTC, bias_C, partials_SC) -> torch.Tensor:
    """Return dx_BTC; the partial sums of dbias go to contiguous rows."""
    dx_BTC = x_BTC.new_empty(x_BTC.shape)
    if x_BTC.numel():
        segments, C = partials_SC.shape
        _bias_gelu_bwd_kernel[(segments, cdiv(C, COLUMNS))](
            dy_BTC.contiguous(), x_BTC.contiguous(), bias_C.contiguous(), dx_BTC, partials_SC,
            x_BTC.numel() // C, C, SEGMENT=SEGMENT, ROWS=ROWS, COLUMNS=COLUMNS, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return dx_BTC


@_backward.register_fake
def _(dy_BTC, x_BTC, bias_C):
    return x_BTC.new_empty(x_BTC.shape), bias_C.new_empty(bias_C.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy_BTC):
    x_BTC, bias_C = ctx.saved_tensors
    dx_BTC, dbias_C = _backward(dy_BTC, x_BTC, bias_C)
    return dx_BTC, dbias_C.to(bias_C.dtype)


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Summed(torch.autograd.Function):
    """What the operator is, with the place of the gradient of bias in joint sums."""

    @staticmethod
    def forward(ctx, x_BTC, bias_C, dbias: Summand):
        ctx.dbias = dbias
        ctx.save_for_backward(x_BTC, bias_C)
        return _forward(x_BTC, bias_C)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        dx_BTC = _bias_gelu_bwd(*gradients, *ctx.saved_tensors, ctx.dbias.partial_SC)
        return dx_BTC, ctx.dbias.sum_C, None


def _check(x_BTC, bias_C) -> None:
    """Refuse tensors that do not fit each other."""
    require_tensors(x=x_BTC, bias=bias_C)
    if x_BTC.dim() != 3:
        raise ValueError(f"x must be [B, T, C], got shape {tuple(x_BTC.shape)}")
    if bias_C.shape != x_BTC.shape[-1:]:
        raise ValueError(f"bias must be [{x_BTC.shape[-1]}], got shape {tuple(bias_C.shape)}")
    for name, tensor in (("x", x_BTC), ("bias", bias_C)):
        if tensor.dtype not in (*INPUT_TYPES, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if bias_C.device != x_BTC.device:
        raise ValueError(f"bias must be on the device of x, {x_BTC.device}, got {bias_C.device}")


@triton.jit
def _tile(start, rows, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets into a dense [rows, C], and which elements are inside."""
    row = start + tl.arange(0, ROWS)
    offs_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row.to(tl.int64)[:, None] * C + offs_c[None, :], (row < rows)[:, None] & (offs_c < C)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, rows, C, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    offs, mask = _tile(tl.program_id(0) * ROWS, rows, C, ROWS, COLUMNS)
    offs_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    # y = z Phi(z)
    y = z * normal_cdf(z, PRECISION)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, partials_ptr, rows, C,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)
    # the rows of a tile stay apart until the end: only then do threads have to meet
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, SEGMENT, ROWS, num_stages=STAGES):
        offs, mask = _tile(tl.program_id(0) * SEGMENT + start, rows, C, ROWS, COLUMNS)
        z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # dx = dy (Phi(z) + z phi(z))
        # exact in float32 whatever the dtype of x: the gradient of the bias is float32
        dx = dy * gelu_slope(z, "ieee")
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    tl.store(partials_ptr + segment * C + offs_c, tl.sum(dbias, 0), mask=offs_c < C)
