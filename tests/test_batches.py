"""The rows of an update are a function of recipe, data and step."""

import pytest
import torch

from tests.tiny_runs import tiny_recipe
from train.batches import StageBatches, stage_data


def batches(number=2):
    recipe = tiny_recipe()
    return StageBatches(recipe, number, stage_data(recipe, number), torch.device("cpu"))


def test_any_step_can_be_asked_for_alone():
    one_by_one = batches()
    scenes = {step: one_by_one.at(step).scene_B for step in range(9, 13)}
    for step in (12, 9, 11):
        assert torch.equal(batches().at(step).scene_B, scenes[step])


def test_an_epoch_visits_every_row_once():
    seen = torch.cat([batches(1).at(step).scene_B for step in range(1, 5)])
    assert len(seen.unique()) == len(seen) == 32


def test_rows_are_gathered_in_the_form_that_is_asked_for():
    with pytest.raises(ValueError, match="impl must be one of auto, eager, triton, got 'fast'"):
        batches().at(9, impl="fast")


def test_a_step_of_another_stage_is_refused():
    for step in (8, 13):
        with pytest.raises(ValueError, match=r"step must be in \[9, 12\]"):
            batches().at(step)
