"""Augmentation: one rotation about Y and one mirror per scene, points and ground truth alike.

The draws are Philox at (seed; place, step, scene): the same scene at the same step moves the same way in any batch.
"""

from dataclasses import dataclass
from typing import Literal

from kernels.philox import Counter
from kernels.turn import turn
from perceiver.scene import SceneBatch


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """rotate: about Y round the normalised origin, by a uniform angle, by 0 or pi, or not. flip: mirror x, p = 1/2."""

    rotate: Literal["uniform", "half_turn", "none"] = "uniform"
    flip: bool = True


def augment(batch: SceneBatch, config: AugmentConfig, *, seed: int, step: Counter, impl: str = "auto") -> SceneBatch:
    """Return the batch with every scene turned and mirrored as its counters say, see `kernels.turn`.

    Determinism: depends on (seed, step, scene) only. Sines are those of the form that `impl` names.
    """
    xyz_BT3, gt_BM23 = turn(
        batch.xyz_BT3, batch.gt_BM23, batch.scene_B,
        rotate=config.rotate, flip=config.flip, seed=seed, step=step, impl=impl,
    )  # fmt: skip
    return batch.with_geometry(xyz_BT3, gt_BM23)
