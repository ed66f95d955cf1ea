"""RMSNorm on a CPU: PyTorch composes it of nine passes over the rows forward and back, here are five.

    y = x r gain,   r = 1 / sqrt(mean(x^2) + eps)
    dx = r (h - x r mean(h x r)),   h = dy gain

The backward is PyTorch's fused one of LayerNorm with a mean of 0, which also takes r mean(h) away: it is given back.
"""

import torch
from torch import Tensor

from kernels.dispatch import require_tensors
from kernels.registration import operator

# of `torch.nn.RMSNorm` in float32; in float64 too, so that there it is the truth of the same function
EPS = torch.finfo(torch.float32).eps
BLOCK = 1024
# elements from which on calling it pays
SMALL = 1 << 17


def rms_norm(x: Tensor, gain_C: Tensor) -> Tensor:
    """Divide the rows of x by the root of their mean square, times a gain: `torch.nn.functional.rms_norm` with EPS.

    Args:
        x: [*, C], float32 or float64; where it is small or on another device PyTorch's own form runs.
        gain_C: of x's dtype.
    Returns:
        [*, C], a new tensor.
    Raises:
        ValueError: another dtype, or a gain that does not fit.
    Determinism: repeats bit for bit with the same number of threads.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    require_tensors(x=x, gain=gain_C)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, got {x.dtype}")
    if gain_C.shape != x.shape[-1:] or gain_C.dtype != x.dtype:
        raise ValueError(f"gain must be {list(x.shape[-1:])} of {x.dtype}, got {list(gain_C.shape)} of {gain_C.dtype}")
    if x.device.type != "cpu" or x.numel() < SMALL:
        return torch.nn.functional.rms_norm(x, gain_C.shape, gain_C, EPS)
    return _forward(x, gain_C)[0]


@operator("ridgeline::rms_norm_forward")
def _forward(x: Tensor, gain_C: Tensor) -> tuple[Tensor, Tensor]:
    """y and the inverse roots r [*, 1]."""
    y, r = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1))
    for x_RC, y_RC, r_R1 in _blocks(x, y, r):
        torch.linalg.vector_norm(x_RC, dim=-1, keepdim=True, out=r_R1)
        r_R1.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
        torch.mul(x_RC, r_R1, out=y_RC).mul_(gain_C)
    return y, r


@operator("ridgeline::rms_norm_backward")
def _backward(dy: Tensor, x: Tensor, r: Tensor, gain_C: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the gain."""
    dx, dgain_C = x.new_empty(x.shape), torch.zeros_like(gain_C)
    for dy_RC, x_RC, r_R1, dx_RC in _blocks(dy, x, r, dx):
        part_RC, part_C, _ = torch.ops.aten.native_layer_norm_backward(
            dy_RC, x_RC, gain_C.shape, torch.zeros_like(r_R1), r_R1, gain_C, None, (True, True, False)
        )
        with torch.autocast("cpu", enabled=False):
            taken_R1 = (dy_RC @ gain_C).unsqueeze(-1).mul_(r_R1).div_(x.shape[-1])
        torch.add(part_RC, taken_R1, out=dx_RC)
        dgain_C += part_C
    return dx, dgain_C


@_forward.register_fake
def _(x, gain_C):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1))


@_backward.register_fake
def _(dy, x, r, gain_C):
    return x.new_empty(x.shape), torch.empty_like(gain_C)


def _save(ctx, inputs, output) -> None:
    x, gain_C = inputs
    ctx.save_for_backward(x, output[1], gain_C)
    ctx.mark_non_differentiable(output[1])


_forward.register_autograd(lambda ctx, dy, _: _backward(dy, *ctx.saved_tensors), setup_context=_save)


def _blocks(*tensors):
    """Split [*, C] tensors into blocks of rows that stay in the cache; the gain's gradient is a sum of short sums."""
    return zip(*(x.reshape(-1, x.shape[-1]).split(BLOCK) for x in tensors), strict=True)
