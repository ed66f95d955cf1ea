"""What evidence costs: a digest of all weights and optimizer states.

A digest is due every `trace_every` steps, so its share of a step is digest / (trace_every * step). Before it is timed,
the digest is shown to change with one bit.
"""

import pytest
import torch

from perceiver.model import Perceiver
from train.config import load_recipe
from train.determinism import enter
from train.optim import build_optimizer
from train.trace import digest, state_tensors


@pytest.mark.parametrize("name", ["s23dr", "demo"])
def bench_digest(measure, name):
    recipe = load_recipe(name)
    machine = enter(threads=recipe.threads, precision="auto", impl="auto")
    model = Perceiver(recipe.model, seed=recipe.seed).to(machine.device)
    optimizer = build_optimizer(model, recipe.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = state_tensors(model.state_dict(), optimizer.state_dict())

    def as_tensor() -> list[torch.Tensor]:
        return [torch.tensor(list(digest(state).encode()))]

    (before,) = as_tensor()
    with torch.no_grad():
        model.segmenter.latent_embed.weight.view(torch.int32)[0, 0] ^= 1
    assert not torch.equal(as_tensor()[0], before), "one flipped bit does not change the digest"
    measure(
        lambda: digest(state),
        check=as_tensor,
        group=f"trace, digest of weights and optimizer, {name}",
        inputs=list(state.values()),
        recipe=name,
        numbers=sum(tensor.numel() for tensor in state.values()),
        trace_every=recipe.trace_every,
    )
