"""The training loss: optimal transport between predicted and true segments, a confidence, the endpoints.

    total = transport + conf_weight * BCE(conf, target) + cost_scale * endpoint_weight * endpoint

`match_segments` (kernels/matching.py) gives transport, endpoint, matched mass and partner per scene; every term is the
mean over the batch. The matched mass is also the run's pulse: a transport loss collapses in silence, by sending every
segment to the dustbin.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from kernels.matching import match_segments
from perceiver.model import Segments


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the cost and of the terms. eps and dustbin are in units of cost_scale * cost.

    Raises:
        ValueError: conf_target is unknown, conf_weight is negative, or the operator would refuse a value.
    """

    direction_weight: float = 0.3
    length_weight: float = 1.0
    cost_scale: float = 5.0
    eps: float = 0.1
    iterations: int = 20
    dustbin: float = 0.3
    slack: Literal["full", "minimal"] = "full"
    plan_gradient: Literal["detached", "exact"] = "detached"
    conf_weight: float = 0.1
    conf_target: Literal["mass", "partner"] = "mass"

    def __post_init__(self):
        if self.conf_target not in ("mass", "partner"):
            raise ValueError(f"conf_target must be 'mass' or 'partner', got {self.conf_target!r}")
        if not 0 <= self.conf_weight < math.inf:
            raise ValueError(f"conf_weight must be finite and at least 0, got {self.conf_weight}")
        for name in ("eps", "cost_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")


class Loss(NamedTuple):
    """Scalars: the total, its terms before weighting, and the pulse of the run.

    mass: matched mass per true segment, 1 when every one is matched.
    kept: queries with a confidence above 0.5 per true segment.
    dustbin: share of the queries' mass that went to the dustbin.
    """

    total: torch.Tensor
    transport: torch.Tensor
    conf: torch.Tensor
    endpoint: torch.Tensor
    mass: torch.Tensor
    kept: torch.Tensor
    dustbin: torch.Tensor


def segment_loss(
    predicted: Segments,
    gt_BM23: torch.Tensor,
    gt_count_B: torch.Tensor,
    config: LossConfig,
    *,
    endpoint_weight: float,
    impl: str = "auto",
) -> Loss:
    """Compare predicted with true segments, both in normalised units.

    Args:
        predicted: float32 segments of B scenes.
        gt_BM23: true endpoints in any order, padded; the first gt_count_B of each scene count.
        gt_count_B: int32 [B].
        config: weights.
        endpoint_weight: 0 switches the endpoint term off.
        impl: of the matching operator.
    Returns:
        Loss; gradients flow from `total` only.
    """
    match = match_segments(
        predicted.mid_BN3,
        predicted.dir_BN3,
        predicted.len_BN,
        gt_BM23,
        gt_count_B,
        direction_weight=config.direction_weight,
        length_weight=config.length_weight,
        cost_scale=config.cost_scale,
        eps=config.eps,
        iterations=config.iterations,
        dustbin=config.dustbin,
        slack=config.slack,
        plan_gradient=config.plan_gradient,
        impl=impl,
    )
    matched_BN = match.matched_BN.detach()
    target_BN = matched_BN if config.conf_target == "mass" else (match.partner_BN >= 0).to(matched_BN.dtype)
    conf = nn.functional.binary_cross_entropy_with_logits(predicted.conf_BN, target_BN)
    transport, endpoint = match.transport_B.mean(), match.endpoint_B.mean()
    total = transport + config.conf_weight * conf + config.cost_scale * endpoint_weight * endpoint
    true_segments = gt_count_B.sum().clamp(min=1)
    return Loss(
        total=total,
        transport=transport.detach(),
        conf=conf.detach(),
        endpoint=endpoint.detach(),
        mass=matched_BN.sum() / true_segments,
        kept=(predicted.conf_BN.detach() > 0).sum() / true_segments,
        dustbin=1 - matched_BN.mean(),
    )
