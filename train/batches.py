"""Which rows an update trains on: a pure function of the recipe, the data and the step; for training and for replay."""

from typing import Any

import torch

from perceiver.scene import RowError, SceneBatch
from train.config import ROOT, Recipe
from train.data import StageData, count_train_rows, load_stage_data
from train.order import batch_indices, batches_per_epoch, epoch_order
from train.sources import SourceError


def stage_data(recipe: Recipe, number: int, *, progress: bool = False) -> StageData:
    """Load the rows of stage `number`, counted from 1.

    Raises:
        SourceError: see `load_stage_data`; or a row cannot be used, and which of which stage.
    """
    uri = recipe.stages[number - 1].data
    try:
        return load_stage_data(uri, strict=recipe.data.strict, progress=progress, **_kept_out(recipe))
    except RowError as error:
        raise SourceError(f"stages.{number - 1}.data, {uri}: {error}") from error


def check_stages(recipe: Recipe, step: int) -> None:
    """Check every stage that ends after update `step`, before it is trained: it learns to its end, and has rows.

    Raises:
        ValueError: a stage's cooldown ends before it, or it has fewer rows than its batch takes; names the values.
        SourceError: see `count_train_rows`.
    """
    ahead = {i: stage for i, stage in enumerate(recipe.stages) if stage.until > step}
    for i, stage in ahead.items():
        cooled = stage.cooldown_start + stage.cooldown_steps
        if stage.cooldown_steps and cooled < stage.until:
            raise ValueError(
                f"stages.{i}.until is {stage.until}, but cooldown_start + cooldown_steps, {stage.cooldown_start} + "
                f"{stage.cooldown_steps}, is {cooled}: from there on its learning rate is 0. To cool down at its end "
                f"add --stages.{i}.cooldown-start {stage.until - stage.cooldown_steps}"
            )
    sets = dict.fromkeys(stage.data for stage in ahead.values())
    rows = {uri: count_train_rows(uri, **_kept_out(recipe)) for uri in sets}
    for i, stage in ahead.items():
        if stage.batch > rows[stage.data]:
            raise ValueError(
                f"stages.{i}.batch must be at most {rows[stage.data]:,}, the rows that {stage.data} has to train on, "
                f"got {stage.batch:,}"
            )


def _kept_out(recipe: Recipe) -> dict[str, Any]:
    """What the stages of a recipe do not train on."""
    bad = recipe.data.bad_samples
    return {
        "dev_uris": [stage.data for stage in recipe.stages],
        "bad_samples": ROOT / bad if bad else None,
        "published_split": recipe.data.published_split,
    }


class StageBatches:
    """The batches of stage `number`, counted from 1; epochs count from the stage's start.

    `rows` are all rows of the stage on the device; a batch is gathered from them there.
    """

    def __init__(self, recipe: Recipe, number: int, data: StageData, device: torch.device, *, progress: bool = False):
        self._stage, self._first = recipe.stages[number - 1], recipe.start_of(number - 1)
        self._seed, self._order_ids, self._device = recipe.seed, data.train.order_ids, device
        self.rows = data.train.on(device, progress=progress)
        self._per_epoch = batches_per_epoch(len(data.train), self._stage.batch)
        self._epoch, self._order = -1, torch.empty(0)

    def at(self, step: int, *, impl: str = "auto") -> SceneBatch:
        """Return the rows of update `step`, as stored, on the device; `impl` is that of the gather.

        Raises:
            ValueError: the update belongs to another stage.
        """
        return self.rows.rows(self.index(step), impl=impl)

    def index(self, step: int) -> torch.Tensor:
        """Return the numbers of the rows of update `step` in `rows`, int64 [B] on the device.

        Raises:
            ValueError: the update belongs to another stage.
        """
        if not self._first < step <= self._stage.until:
            raise ValueError(f"step must be in [{self._first + 1}, {self._stage.until}], got {step}")
        epoch, place = divmod(step - 1 - self._first, self._per_epoch)
        if epoch != self._epoch:
            order = epoch_order(self._order_ids, self._seed, epoch)
            # a copy from pinned memory is queued behind the updates before it and does not wait for them
            order = order.pin_memory() if self._device.type == "cuda" else order
            self._epoch, self._order = epoch, order.to(self._device, non_blocking=True)
        return batch_indices(self._order, place, self._stage.batch)
