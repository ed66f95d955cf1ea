"""One update: augment, forward, loss, backward, clip, AdamW. A pure function of the state, the batch and the step."""

from functools import cache
from typing import NamedTuple

import torch

from kernels.philox import Counter
from perceiver.blocks import DropoutKey
from perceiver.loss import Loss, segment_loss
from perceiver.model import Perceiver, Segments
from perceiver.scene import SceneBatch
from train.augment import augment
from train.config import Recipe, StageConfig
from train.determinism import Machine
from train.optim import clip_and_step, learning_rate, set_learning_rate


class StepResult(NamedTuple):
    """The loss of an update, and the gradient norm before clipping; scalar tensors on the device."""

    loss: Loss
    grad_norm: torch.Tensor


def predict_and_compare(
    model: Perceiver,
    batch: SceneBatch,
    recipe: Recipe,
    machine: Machine,
    *,
    endpoint_weight: float,
    drop: DropoutKey | None = None,
) -> tuple[Segments, Loss]:
    """Run the model in the machine's precision and the loss in float32."""
    with machine.autocast():
        predicted = model(batch, drop=drop, impl=machine.impl)
    loss = segment_loss(
        predicted, batch.gt_BM23, batch.gt_count_B, recipe.loss, endpoint_weight=endpoint_weight, impl=machine.impl
    )
    return predicted, loss


def update(
    model: Perceiver,
    optimizer: torch.optim.Optimizer,
    batch: SceneBatch,
    *,
    step: int,
    stage: StageConfig,
    recipe: Recipe,
    machine: Machine,
) -> StepResult:
    """Make update `step` (1, 2, ...) in place.

    Args:
        batch: rows as stored, on the machine's device; this function augments them.
        step: keys the augmentation and the dropout, and gives the learning rate.
    Determinism: equal weights, optimizer state, batch and step give equal bits on one kind of machine.
    """
    set_learning_rate(optimizer, learning_rate(step, stage))
    return advance(model, optimizer, batch, step=step, stage=stage, recipe=recipe, machine=machine)


def advance(
    model: Perceiver,
    optimizer: torch.optim.Optimizer,
    batch: SceneBatch,
    *,
    step: Counter,
    stage: StageConfig,
    recipe: Recipe,
    machine: Machine,
) -> StepResult:
    """Make an update at the learning rate that the optimizer has; `step` may be a tensor, as in a recorded graph."""
    batch = augment(batch, recipe.augment, seed=recipe.seed, step=step, impl=machine.impl)
    drop = None
    if recipe.model.dropout:
        drop = DropoutKey(rate=recipe.model.dropout, seed=recipe.seed, step=step, scene_B=batch.scene_B)
    _, loss = predict_and_compare(model, batch, recipe, machine, endpoint_weight=stage.endpoint_weight, drop=drop)
    optimizer.zero_grad(set_to_none=True)
    loss.total.backward(_one(loss.total.device, loss.total.dtype))
    grad_norm = clip_and_step(model, optimizer, recipe.optim.clip)
    return StepResult(loss._replace(total=loss.total.detach()), grad_norm)


@cache
def _one(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The gradient that a loss has of itself: `backward` would fill a new tensor with it in every update."""
    return torch.ones((), dtype=dtype, device=device)


@torch.no_grad()
def mean_loss(model: Perceiver, rows: SceneBatch, *, recipe: Recipe, machine: Machine, endpoint_weight: float) -> float:
    """Return the loss of the first `recipe.evaluate.scenes` rows as they are: no augmentation, no dropout."""
    total, count = 0.0, min(len(rows), recipe.evaluate.scenes)
    for begin in range(0, count, recipe.evaluate.batch):
        index_B = torch.arange(begin, min(begin + recipe.evaluate.batch, count), device=rows.scene_B.device)
        batch = rows.rows(index_B).to(machine.device)
        _, loss = predict_and_compare(model, batch, recipe, machine, endpoint_weight=endpoint_weight)
        total += float(loss.total) * len(index_B)
    return total / count
