"""A model small enough for float64 finite differences, and scenes for it."""

import torch

from perceiver.model import Perceiver, PerceiverConfig
from perceiver.scene import SceneBatch, stack_scenes
from tests.random_scenes import random_scenes

SMALL = PerceiverConfig(
    hidden=32,
    ff=48,
    num_heads=2,
    kv_heads_cross=1,
    kv_heads_self=1,
    latent_tokens=6,
    latent_layers=2,
    decoder_layers=1,
    segments=8,
    dropout=0.1,
    fourier_scale=1.0,
)


def small_batch(scenes: int = 3, points: int = 24) -> SceneBatch:
    """Rows of random numbers."""
    return stack_scenes(random_scenes(scenes, points=points))


def stirred(model: Perceiver, spread: float = 0.1) -> Perceiver:
    """Move every parameter off its initial value, so that zero-initialised projections do not hide their gradients."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model
