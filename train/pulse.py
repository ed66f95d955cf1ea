"""What stops a run that has nothing left to learn from: values that are not finite, a collapsed loss, a temperature.

Weights are checked before they are saved or evaluated, with the loss and the norm of the gradient that led to them; the
optimizer's moments are not.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch

from perceiver.model import Perceiver
from train.step import StepResult

COLLAPSED_MASS = 0.05
# so many updates of a stage, or its warm-up, a model has to begin to match before it is said to have collapsed
FIRST_STEPS = 500
# the kernels stop at 60, and at exp(-60)
MAX_TEMPERATURE, MIN_TEMPERATURE = 55.0, math.exp(-55.0)


class RunDiverged(RuntimeError):
    """Training cannot go on: says what was seen and what usually causes it."""


@contextlib.contextmanager
def stage_named(number: int) -> Iterator[None]:
    """Say in which stage, counted from 1, a run diverged."""
    try:
        yield
    except RunDiverged as reason:
        raise RunDiverged(f"stage {number}, {reason}") from reason


def temperatures(model: Perceiver) -> tuple[float, float]:
    """Return the smallest and the largest temperature of all attention heads; waits for the device."""
    scales = torch.cat([p.detach() for name, p in model.named_parameters() if name.endswith("log_scale")])
    return float(scales.min().exp()), float(scales.max().exp())


def require_finite(step: int, result: StepResult | None, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse update `step`, where its result is at hand, or weights after it, with a value that is not finite.

    Raises:
        RunDiverged: names the first such weight.
    """
    if result and not all(math.isfinite(float(x)) for x in (result.loss.total, result.grad_norm)):
        raise RunDiverged(f"step {step:,}: the loss or its gradient is not finite; lower the learning rate")
    # one answer of the device for all of them
    finite = torch.stack([x.isfinite().all() for x in weights.values()]).tolist() if weights else []
    if not all(finite):
        name = next(name for name, good in zip(weights, finite, strict=True) if not good)
        raise RunDiverged(f"step {step:,}: {name} is not finite; lower the learning rate")


def require_temperatures(step: int, least: float, largest: float) -> None:
    """Refuse temperatures that the kernels will not take.

    Raises:
        RunDiverged: one is below `MIN_TEMPERATURE` or above `MAX_TEMPERATURE`.
    """
    if largest > MAX_TEMPERATURE:
        raise RunDiverged(
            f"step {step:,}: a temperature reached {largest:.1f}, the kernels stop at 60; lower the learning rate"
        )
    if least < MIN_TEMPERATURE:
        raise RunDiverged(
            f"step {step:,}: a temperature fell to {least:.1g}, the kernels stop at exp(-60); lower the learning rate"
        )


def require_matching(step: int, mass: float, *, begun: int, warmup: int) -> None:
    """Refuse a loss that sends every segment to the dustbin, once the model had the time to begin.

    Args:
        mass: matched share of the mass of the true segments.
        begun: the step after which the stage began.
    Raises:
        RunDiverged: the mass is below `COLLAPSED_MASS` after the warm-up, and after `FIRST_STEPS` updates of the stage.
    """
    if mass < COLLAPSED_MASS and step > begun + max(warmup, FIRST_STEPS):
        raise RunDiverged(
            f"step {step:,}: only {mass:.3f} of the mass of the true segments is matched, the rest "
            "went to the dustbin: the loss has collapsed. Usual causes: a learning rate too high, cost_scale "
            "changed without dustbin, plan_gradient 'exact' at a low cost_scale"
        )
