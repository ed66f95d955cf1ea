"""Augmentation: one rotation about Y and one mirror per scene, points and ground truth alike.

The draws are Philox at (seed; place, step, scene): the same scene at the same step moves the same way in any batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.philox import Counter, Place, philox_4x32, unit_interval
from perceiver.scene import SceneBatch


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """rotate: about Y round the normalised origin, by a uniform angle, by 0 or pi, or not. flip: mirror x, p = 1/2."""

    rotate: Literal["uniform", "half_turn", "none"] = "uniform"
    flip: bool = True


def augment(batch: SceneBatch, config: AugmentConfig, *, seed: int, step: Counter) -> SceneBatch:
    """Return the batch with every scene turned and mirrored as its counters say.

        (x, y, z) -> (c m x + s z, y, -s m x + c z),   m = -1 if mirrored else 1

    Determinism: depends on (seed, step, scene) only. Sines are the device's own.
    """
    rotation = _rotations(batch.scene_B, config, seed, step)
    return batch.with_geometry(_turn(batch.xyz_BT3, rotation), _turn(batch.gt_BM23, rotation))


def _rotations(scene_B: torch.Tensor, config: AugmentConfig, seed: int, step: Counter) -> tuple[torch.Tensor, ...]:
    """cos, sin and mirror sign per scene."""
    turn, mirror, _, _ = philox_4x32(0, Place.AUGMENTATION, step, scene_B, seed=seed)
    one_B = torch.ones(len(scene_B), device=scene_B.device)
    sign_B = torch.where(mirror >> 31 == 1, -one_B, one_B) if config.flip else one_B
    if config.rotate == "uniform":
        angle_B = 2 * math.pi * unit_interval(turn)
        return angle_B.cos(), angle_B.sin(), sign_B
    cos_B = torch.where(turn >> 31 == 1, -one_B, one_B) if config.rotate == "half_turn" else one_B
    return cos_B, torch.zeros_like(one_B), sign_B


def _turn(xyz: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
    cos, sin, sign = (r.reshape(-1, *[1] * (xyz.dim() - 2)) for r in rotation)
    x, y, z = sign * xyz[..., 0], xyz[..., 1], xyz[..., 2]
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], dim=-1)
