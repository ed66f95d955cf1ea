"""The model as the benchmarks of a step take it: off its start, where residual branches are 0 and would not show."""

import torch

from kernels.philox import named_normal
from perceiver.model import Perceiver
from train.config import Recipe


@torch.no_grad()
def stirred_model(recipe: Recipe) -> Perceiver:
    """Return a recipe's initial model on the CPU, every parameter moved by N(0, 0.02) draws of its name."""
    model = Perceiver(recipe.model, seed=recipe.seed)
    for name, parameter in model.named_parameters():
        parameter += 0.02 * named_normal(f"stir {name}", tuple(parameter.shape), seed=1)
    return model
