"""The training loss: optimal transport between predicted and true segments, a confidence, the endpoints.

    total = transport + conf_weight * BCE(conf, target) + cost_scale * endpoint_weight * endpoint

`match_segments` (kernels/matching.py) gives transport, endpoint, matched mass and partner per scene; `loss_terms`
(kernels/loss_terms.py) makes every term the mean over the batch. The matched mass is also the run's pulse: a transport
loss collapses in silence, by sending every segment to the dustbin.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.loss_terms import Loss, loss_terms
from kernels.matching import match_segments
from perceiver.model import Segments


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the cost and of the terms. dustbin is in units of the cost, eps in those of cost_scale * cost.

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
        impl: of both operators.
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
    return loss_terms(
        *match,
        predicted.conf_BN,
        gt_count_B,
        conf_weight=config.conf_weight,
        endpoint_weight=config.cost_scale * endpoint_weight,
        conf_target=config.conf_target,
        impl=impl,
    )
