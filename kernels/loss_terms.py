"""The training loss from what the matching gives: its terms, their total and the pulse of the run, one launch each way.

    total    = transport + conf_weight conf + endpoint_weight endpoint
    conf     = mean over items and queries of  log(1 + exp(-x)) t + log(1 + exp(x)) (1 - t)
    transport, endpoint = means over items

with x the logit of a query's confidence and t its target: the mass it was matched with, or whether it has a partner.
Shapes in names: B items, N queries.

One program of the forward walks through all numbers, a tile at a time in ascending order. Each place of the tile adds
up its own; then the rows are added, and last the lanes. The compiler is told neither sizes nor how addresses are
aligned, so that B and N alone decide the order. With e = exp(-|x|) and t in [0, 1] no digits are lost to differences:

    cross-entropy   (1 - t) x or -t x, the one that is not negative, + log(1 + e)
    its slope       (1 - t) - e / (1 + e) for x > 0, e / (1 + e) - t otherwise
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kernels.dispatch import cdiv, require_tensors, resolve, values_are_readable
from kernels.log1p_tile import cross_entropy
from kernels.registration import operator

CONF_TARGETS = ("mass", "partner")
# rows and lanes of the tile that the one program of the forward walks with, and its warps
ROWS, LANES, WARPS = 8, 256, 8
# numbers of a program of the backward, and its warps
BLOCK, BACKWARD_WARPS = 512, 4


class Loss(NamedTuple):
    """Scalars: the total, its terms before weighting, and the pulse of the run. Only the total has a gradient.

    mass: matched mass per true segment, 1 when every one is matched.
    kept: queries with a confidence above 0.5 per true segment.
    dustbin: share of the queries' mass that went to the dustbin.
    """

    total: Tensor
    transport: Tensor
    conf: Tensor
    endpoint: Tensor
    mass: Tensor
    kept: Tensor
    dustbin: Tensor


def loss_terms(
    transport_B: Tensor,
    endpoint_B: Tensor,
    matched_BN: Tensor,
    partner_BN: Tensor,
    conf_BN: Tensor,
    gt_count_B: Tensor,
    *,
    conf_weight: float,
    endpoint_weight: float,
    conf_target: str = "mass",
    impl: str = "auto",
) -> Loss:
    """Return the total of the training loss, its terms and its pulse; the formulas stand at the top of this module.

    Args:
        transport_B, endpoint_B, matched_BN, partner_BN: those of `kernels.matching.Match`; float32 (float64 where the
            eager form runs), partner int64. No gradient goes to the last two.
        conf_BN: logits, of transport's dtype, bfloat16 or float16.
        gt_count_B: how many true segments each item has, int32 or int64, at least 0; where values may not be read
            (`kernels.dispatch`), less counts as 0.
        conf_weight, endpoint_weight: of the terms, at least 0.
        conf_target: what a confidence learns, "mass" (matched, in [0, 1]) or "partner" (1 with a partner, else 0).
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        Loss, in transport's dtype. A mean over nothing is NaN. Without true segments the pulse is that of one.
    Raises:
        ValueError: a shape, dtype, device, count or option is not as above.

    Determinism: repeats bit for bit; sums are taken in an order that depends on B and N alone. Triton: an item's
        gradients depend on its own values, B and N.
    """
    _check(transport_B, endpoint_B, matched_BN, partner_BN, conf_BN, gt_count_B)
    _check_options(gt_count_B, conf_weight, endpoint_weight, conf_target)
    tensors = (transport_B, endpoint_B, matched_BN, partner_BN, conf_BN, gt_count_B)
    if resolve(impl, transport_B.device) == "eager":
        weights = {"conf_weight": conf_weight, "endpoint_weight": endpoint_weight}
        return loss_terms_reference(*tensors, **weights, conf_target=conf_target)
    if transport_B.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    total, terms_6 = _forward(*tensors, conf_weight, endpoint_weight, conf_target)
    return Loss(total, *terms_6.unbind())


def loss_terms_reference(
    transport_B: Tensor,
    endpoint_B: Tensor,
    matched_BN: Tensor,
    partner_BN: Tensor,
    conf_BN: Tensor,
    gt_count_B: Tensor,
    *,
    conf_weight: float,
    endpoint_weight: float,
    conf_target: str = "mass",
) -> Loss:
    """The meaning of `loss_terms`, in plain PyTorch; in float64 the truth."""
    dtype = transport_B.dtype
    matched_BN, conf_BN = matched_BN.detach(), conf_BN.to(dtype)
    target_BN = matched_BN if conf_target == "mass" else (partner_BN >= 0).to(dtype)
    conf = binary_cross_entropy_with_logits(conf_BN, target_BN)
    transport, endpoint = transport_B.mean(), endpoint_B.mean()
    true_segments = gt_count_B.clamp(min=0).sum().clamp(min=1)
    return Loss(
        total=transport + conf_weight * conf + endpoint_weight * endpoint,
        transport=transport.detach(),
        conf=conf.detach(),
        endpoint=endpoint.detach(),
        mass=matched_BN.sum() / true_segments,
        kept=(conf_BN.detach() > 0).sum().to(dtype) / true_segments,
        dustbin=1 - matched_BN.mean(),
    )


@operator("ridgeline::loss_terms_forward")
def _forward(
    transport_B: Tensor,
    endpoint_B: Tensor,
    matched_BN: Tensor,
    partner_BN: Tensor,
    conf_BN: Tensor,
    gt_count_B: Tensor,
    conf_weight: float,
    endpoint_weight: float,
    conf_target: str,
) -> tuple[Tensor, Tensor]:
    """The total, and the six other fields of a Loss."""
    total, terms_6 = transport_B.new_empty(()), transport_B.new_empty(6)
    tensors = (transport_B, endpoint_B, matched_BN, partner_BN, conf_BN, gt_count_B)
    _loss_terms_fwd_kernel[(1,)](
        *(tensor.contiguous() for tensor in tensors), total, terms_6, len(conf_BN), conf_BN.numel(),
        conf_weight, endpoint_weight, BY_PARTNER=conf_target == "partner", ROWS=ROWS, LANES=LANES, num_warps=WARPS,
    )  # fmt: skip
    return total, terms_6


@_forward.register_fake
def _(transport_B, endpoint_B, matched_BN, partner_BN, conf_BN, gt_count_B, conf_weight, endpoint_weight, conf_target):
    return transport_B.new_empty(()), transport_B.new_empty(6)


@operator("ridgeline::loss_terms_backward")
def _backward(
    dtotal: Tensor, source_BN: Tensor, conf_BN: Tensor, conf_weight: float, endpoint_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dtransport_B, dendpoint_B and dconf_BN; targets are made of `source`: partners, or else matched mass."""
    B, N = conf_BN.shape
    dtransport_B, dendpoint_B, dconf_BN = dtotal.new_empty(B), dtotal.new_empty(B), conf_BN.new_empty(B, N)
    if B:
        _loss_terms_bwd_kernel[(cdiv(B * max(N, 1), BLOCK),)](
            dtotal, source_BN.contiguous(), conf_BN.contiguous(), dtransport_B, dendpoint_B, dconf_BN, B, B * N,
            conf_weight, endpoint_weight, BY_PARTNER=not source_BN.is_floating_point(),
            BLOCK=BLOCK, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    return dtransport_B, dendpoint_B, dconf_BN


@_backward.register_fake
def _(dtotal, source_BN, conf_BN, conf_weight, endpoint_weight):
    B, N = conf_BN.shape
    return dtotal.new_empty(B), dtotal.new_empty(B), conf_BN.new_empty(B, N)


def _setup_context(ctx, inputs, output):
    _, _, matched_BN, partner_BN, conf_BN, _, ctx.conf_weight, ctx.endpoint_weight, conf_target = inputs
    # the terms have no gradient, not one of zeros
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(partner_BN if conf_target == "partner" else matched_BN, conf_BN)


def _gradients(ctx, dtotal, _):
    dtransport_B, dendpoint_B, dconf_BN = _backward(dtotal, *ctx.saved_tensors, ctx.conf_weight, ctx.endpoint_weight)
    return dtransport_B, dendpoint_B, None, None, dconf_BN, *[None] * 4


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _check(transport_B, endpoint_B, matched_BN, partner_BN, conf_BN, gt_count_B) -> None:
    """Refuse tensors that do not fit each other."""
    require_tensors(transport=transport_B, conf=conf_BN)
    if conf_BN.dim() != 2:
        raise ValueError(f"conf must be [B, N], got shape {tuple(conf_BN.shape)}")
    single, dtype = (torch.float32, torch.float64), transport_B.dtype
    B, N = conf_BN.shape
    # name -> tensor, shape, dtypes
    rules = {
        "transport": (transport_B, (B,), single),
        "endpoint": (endpoint_B, (B,), (dtype,)),
        "matched": (matched_BN, (B, N), (dtype,)),
        "partner": (partner_BN, (B, N), (torch.int64,)),
        "conf": (conf_BN, (B, N), (dtype, torch.bfloat16, torch.float16)),
        "gt_count": (gt_count_B, (B,), (torch.int32, torch.int64)),
    }
    for name, (tensor, shape, dtypes) in rules.items():
        require_tensors(**{name: tensor})
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for a conf of {(B, N)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be one of {dtypes}, got {tensor.dtype}")
        if tensor.device != conf_BN.device:
            raise ValueError(f"{name} must be on the device of conf, {conf_BN.device}, got {tensor.device}")


def _check_options(gt_count_B, conf_weight, endpoint_weight, conf_target) -> None:
    for name, weight in (("conf_weight", conf_weight), ("endpoint_weight", endpoint_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {weight}")
    if conf_target not in CONF_TARGETS:
        raise ValueError(f"conf_target must be one of {', '.join(CONF_TARGETS)}, got {conf_target!r}")
    if values_are_readable(gt_count_B) and bool((gt_count_B < 0).any()):
        raise ValueError(f"gt_count must be at least 0, got {gt_count_B.tolist()}")


_INPUTS = [f"{name}_ptr" for name in ("transport", "endpoint", "matched", "partner", "conf", "gt_count")]


@triton.jit(do_not_specialize=["B", "BN"], do_not_specialize_on_alignment=_INPUTS)
def _loss_terms_fwd_kernel(
    transport_ptr, endpoint_ptr, matched_ptr, partner_ptr, conf_ptr, gt_count_ptr, total_ptr, terms_ptr,
    B, BN, conf_weight, endpoint_weight, BY_PARTNER: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    tile = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    transport = tl.zeros([ROWS, LANES], tl.float32)
    endpoint, count, conf, mass, kept, unmatched = transport, transport, transport, transport, transport, transport
    for start in tl.range(0, tl.maximum(B, BN), ROWS * LANES):
        offs = (start + tile).to(tl.int64)
        mask_b, mask_bn = offs < B, offs < BN
        transport += tl.load(transport_ptr + offs, mask=mask_b, other=0.0)
        endpoint += tl.load(endpoint_ptr + offs, mask=mask_b, other=0.0)
        count += tl.maximum(tl.load(gt_count_ptr + offs, mask=mask_b, other=0), 0).to(tl.float32)
        matched = tl.load(matched_ptr + offs, mask=mask_bn, other=0.0)
        x = tl.load(conf_ptr + offs, mask=mask_bn, other=0.0).to(tl.float32)
        target = matched
        if BY_PARTNER:
            target = (tl.load(partner_ptr + offs, mask=mask_bn, other=-1) >= 0).to(tl.float32)
        conf += tl.where(mask_bn, _cross_entropy(x, target), 0.0)
        mass += matched
        kept += (x > 0).to(tl.float32)
        # dustbin = 1 - mean(matched), without losing the digits of a small difference
        unmatched += tl.where(mask_bn, 1.0 - matched, 0.0)
    sums = _sum_seven(transport, conf, endpoint, mass, kept, unmatched, count)
    transport, conf, endpoint, mass, kept, unmatched, count = sums
    transport, conf, endpoint = transport / B, conf / BN, endpoint / B
    true_segments = tl.maximum(count, 1.0)
    tl.store(total_ptr, transport + conf_weight * conf + endpoint_weight * endpoint)
    tl.store(terms_ptr, transport)
    tl.store(terms_ptr + 1, conf)
    tl.store(terms_ptr + 2, endpoint)
    tl.store(terms_ptr + 3, mass / true_segments)
    tl.store(terms_ptr + 4, kept / true_segments)
    tl.store(terms_ptr + 5, unmatched / BN)


@triton.jit(do_not_specialize=["B", "BN"])
def _loss_terms_bwd_kernel(
    dtotal_ptr, source_ptr, conf_ptr, dtransport_ptr, dendpoint_ptr, dconf_ptr,
    B, BN, conf_weight, endpoint_weight, BY_PARTNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_b, mask_bn = offs < B, offs < BN
    dtotal = tl.load(dtotal_ptr)
    # transport and endpoint are means over items
    tl.store(dtransport_ptr + offs, dtotal / B, mask=mask_b)
    tl.store(dendpoint_ptr + offs, dtotal * endpoint_weight / B, mask=mask_b)
    # dconf = conf_weight (sigmoid(x) - target) / BN
    x = tl.load(conf_ptr + offs, mask=mask_bn, other=0.0).to(tl.float32)
    target = tl.load(source_ptr + offs, mask=mask_bn, other=0)
    if BY_PARTNER:
        target = (target >= 0).to(tl.float32)
    dconf = (dtotal * conf_weight / BN) * _cross_entropy_slope(x, target)
    tl.store(dconf_ptr + offs, dconf.to(dconf_ptr.dtype.element_ty), mask=mask_bn)


@triton.jit
def _cross_entropy(x, t):
    return cross_entropy(x, t, _exp_minus_abs(x))


@triton.jit
def _cross_entropy_slope(x, t):
    """sigmoid(x) - t."""
    e = _exp_minus_abs(x)
    q = e / (1.0 + e)
    return tl.where(x > 0, (1.0 - t) - q, q - t)


@triton.jit
def _exp_minus_abs(x):
    """exp(-|x|) to a few roundings: a GPU's own exponential errs by as many as |x|."""
    a = tl.abs(x)
    # beyond this it is 0; not a minimum, which may drop NaN
    a = tl.where(a > 128.0, 128.0, a)
    # a = n ln 2 + r; ln 2 in two parts, so that n times the first is exact
    n = tl.floor(a * 1.4426950408889634 + 0.5)
    r = (a - n * 0.693145751953125) - n * 1.4286068203094172e-06
    return tl.exp2(-n) * tl.exp(-r)


@triton.jit
def _sum_seven(a, b, c, d, e, f, g):
    """The sums of seven tiles in one reduction, whose barriers would come seven times."""
    tile = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, g)))
    abcd, efgg = tl.split(tl.sum(tl.sum(tile, 0), 0))
    ab, cd = tl.split(abcd)
    ef, gg = tl.split(efgg)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    e, f = tl.split(ef)
    g, _ = tl.split(gg)
    return a, b, c, d, e, f, g
