"""The output heads of a set of queries: rows of C channels to segments and their confidence.

    [m | d | z] = W x + b,   mid = m + offset,   dir = d / max(|d|, 1e-12),   len = softplus(z) / 10,
    conf = conf_weight x + conf_bias

Shapes in names: B batch, N queries of an item, C channels; 7 = 3 + 3 + 1 are the columns of m, d and z. Inside
everything is float32, whatever autocast says: millimetres on a roof of ten metres need more than bfloat16.
"""

import torch
from torch.nn.functional import linear, softplus

from kernels.dispatch import require_tensors, resolve
from kernels.heads_triton import UNITS, WIDEST, segment_heads_backward, segment_heads_forward
from kernels.registration import operator

INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
Segmented = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def segment_heads(
    x_BNC: torch.Tensor,
    weight_7C: torch.Tensor,
    bias_7: torch.Tensor,
    conf_weight_1C: torch.Tensor,
    conf_bias_1: torch.Tensor,
    offsets_N23: torch.Tensor,
    *,
    impl: str = "auto",
) -> Segmented:
    """Return the midpoints, unit directions, lengths and confidence logits of a set of queries.

        [m | d | z] = W x + b,   mid = m + offset,   dir = d / max(|d|, 1e-12),   len = softplus(z) / 10

    Args:
        x_BNC: float32, bfloat16 or float16 (float64 where the eager form runs), any strides; C is 1 to 1024.
        weight_7C, bias_7: the layer that gives m, d and z, in one of these dtypes.
        conf_weight_1C, conf_bias_1: the layer that gives the confidence.
        offsets_N23: the first three numbers of a query are its offset, the others have no effect: their gradient is 0.
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        mid_BN3, dir_BN3, len_BN and conf_BN in float32 (float64 for float64), under autocast too.
    Raises:
        ValueError: a shape, dtype, device or option outside of the above.

    Determinism: repeats bit for bit. Triton: an item's bits do not depend on the batch; the gradients of the layers are
        sums over all rows and those of the offsets sums over the items, in an order that depends on their number alone.
    """
    tensors = (x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23)
    _check(*tensors)
    if resolve(impl, x_BNC.device) == "eager":
        return segment_heads_reference(*tensors)
    if x_BNC.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    return _forward(*tensors)[:4]


def segment_heads_reference(
    x_BNC: torch.Tensor,
    weight_7C: torch.Tensor,
    bias_7: torch.Tensor,
    conf_weight_1C: torch.Tensor,
    conf_bias_1: torch.Tensor,
    offsets_N23: torch.Tensor,
) -> Segmented:
    """The meaning of `segment_heads`, in plain PyTorch; in float64 the truth."""
    tensors = (x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23)
    dtype = torch.promote_types(x_BNC.dtype, torch.float32)
    x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23 = (tensor.to(dtype) for tensor in tensors)
    with torch.autocast(x_BNC.device.type, enabled=False):
        # one split and not slices: its backward is one call
        mid_BN3, direction_BN3, length_BN1 = linear(x_BNC, weight_7C, bias_7).split([3, 3, 1], dim=-1)
        norm_BN1 = torch.linalg.vector_norm(direction_BN3, dim=-1, keepdim=True).clamp(min=1e-12)
        return (
            mid_BN3 + offsets_N23[:, 0],
            direction_BN3 / norm_BN1,
            0.1 * softplus(length_BN1.squeeze(-1)),
            linear(x_BNC, conf_weight_1C, conf_bias_1).squeeze(-1),
        )


@operator("ridgeline::segment_heads_forward")
def _forward(
    x_BNC: torch.Tensor,
    weight_7C: torch.Tensor,
    bias_7: torch.Tensor,
    conf_weight_1C: torch.Tensor,
    conf_bias_1: torch.Tensor,
    offsets_N23: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """mid_BN3, dir_BN3, len_BN, conf_BN and, for the backward, [d | z] as raw_BN4."""
    outputs = _empty_outputs(x_BNC)
    if x_BNC.numel():
        segment_heads_forward(x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23, outputs)
    return outputs


@_forward.register_fake
def _(x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23):
    return _empty_outputs(x_BNC)


def _empty_outputs(x_BNC):
    mid_BN3, dir_BN3, len_BN, conf_BN, raw_BN4 = (
        x_BNC.new_empty((*x_BNC.shape[:2], *tail), dtype=torch.float32) for tail in ((3,), (3,), (), (), (4,))
    )
    return mid_BN3, dir_BN3, len_BN, conf_BN, raw_BN4


@operator("ridgeline::segment_heads_backward")
def _backward(
    dmid_BN3: torch.Tensor,
    ddir_BN3: torch.Tensor,
    dlen_BN: torch.Tensor,
    dconf_BN: torch.Tensor,
    raw_BN4: torch.Tensor,
    x_BNC: torch.Tensor,
    weight_7C: torch.Tensor,
    conf_weight_1C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx_BNC, and in float32 the offsets' gradient and those of the layers: 8 rows of C weights, then 8 biases."""
    dx_BNC, doffsets_N23, sums_X = _empty_gradients(x_BNC)
    if x_BNC.numel() == 0:
        return dx_BNC, doffsets_N23.zero_(), sums_X.zero_()
    upstream = (dmid_BN3, ddir_BN3, dlen_BN, dconf_BN)
    sums_X = segment_heads_backward(upstream, raw_BN4, x_BNC, weight_7C, conf_weight_1C, dx_BNC, doffsets_N23)
    return dx_BNC, doffsets_N23, sums_X


@_backward.register_fake
def _(dmid_BN3, ddir_BN3, dlen_BN, dconf_BN, raw_BN4, x_BNC, weight_7C, conf_weight_1C):
    return _empty_gradients(x_BNC)


def _empty_gradients(x_BNC):
    _, N, C = x_BNC.shape
    doffsets_N23, sums_X = (x_BNC.new_empty(size, dtype=torch.float32) for size in ((N, 2, 3), (UNITS * (C + 1),)))
    return x_BNC.new_empty(x_BNC.shape), doffsets_N23, sums_X


def _setup_context(ctx, inputs, output):
    x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23 = inputs
    raw_BN4 = output[-1]
    ctx.dtypes = [tensor.dtype for tensor in (weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23)]
    # the backward's copy gets no gradient, not a tensor of zeros
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(raw_BN4)
    ctx.save_for_backward(raw_BN4, x_BNC, weight_7C, conf_weight_1C)


def _gradients(ctx, dmid_BN3, ddir_BN3, dlen_BN, dconf_BN, _):
    raw_BN4, x_BNC, *_ = ctx.saved_tensors
    C = x_BNC.shape[-1]
    upstream = [
        raw_BN4.new_zeros((*x_BNC.shape[:2], *tail)) if gradient is None else gradient
        for gradient, tail in ((dmid_BN3, (3,)), (ddir_BN3, (3,)), (dlen_BN, ()), (dconf_BN, ()))
    ]
    dx_BNC, doffsets_N23, sums_X = _backward(*upstream, *ctx.saved_tensors)
    dweight_7C, dconf_weight_1C = sums_X[: UNITS * C].view(UNITS, C).split([UNITS - 1, 1])
    dbias_7, dconf_bias_1 = sums_X[UNITS * C :].split([UNITS - 1, 1])
    gradients = (dweight_7C, dbias_7, dconf_weight_1C, dconf_bias_1, doffsets_N23)
    return dx_BNC, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _check(x_BNC, weight_7C, bias_7, conf_weight_1C, conf_bias_1, offsets_N23) -> None:
    """Refuse tensors that do not fit each other."""
    require_tensors(x=x_BNC)
    if x_BNC.dim() != 3 or not 1 <= x_BNC.shape[-1] <= WIDEST:
        raise ValueError(f"x must be [B, N, C] with C in [1, {WIDEST}], got shape {tuple(x_BNC.shape)}")
    _, N, C = x_BNC.shape
    for name, tensor, shape in (
        ("weight", weight_7C, (7, C)),
        ("bias", bias_7, (7,)),
        ("conf_weight", conf_weight_1C, (1, C)),
        ("conf_bias", conf_bias_1, (1,)),
        ("offsets", offsets_N23, (N, 2, 3)),
    ):
        require_tensors(**{name: tensor})
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (*INPUT_TYPES, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != x_BNC.device:
            raise ValueError(f"{name} must be on the device of x, {x_BNC.device}, got {tensor.device}")
    if x_BNC.dtype not in (*INPUT_TYPES, torch.float64):
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x_BNC.dtype}")
