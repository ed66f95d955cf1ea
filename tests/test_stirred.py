"""The benchmarks' model: no parameter at its start, and the same one each time."""

import dataclasses

import torch

from bench.stirred import stirred_model
from perceiver.model import Perceiver
from tests.small_models import SMALL
from tests.tiny_runs import tiny_recipe


def test_every_parameter_is_moved_a_little_and_each_time_alike():
    recipe = dataclasses.replace(tiny_recipe(), model=SMALL)
    start = Perceiver(SMALL, seed=recipe.seed)
    once, again = (stirred_model(recipe).state_dict() for _ in range(2))
    for name, parameter in start.named_parameters():
        moved = (once[name] - parameter).abs()
        assert moved.mean() > 0 and moved.max() < 0.2, name
        assert torch.equal(once[name], again[name])
