"""A training step, from stored rows to new weights: the published model at full size, and the demo's.

On a CPU: 4 scenes of 2,048 points in float32 and in bfloat16, two threads. Before it is timed, a step's loss is
compared with that of the eager model in float64 on the same rows.
"""

import dataclasses

import pytest
import torch

from bench.measure import ON_GPU
from bench.peers import OURS, Peer, by_name
from bench.stirred import stirred_model
from perceiver.scene import SceneBatch, stack_scenes
from train.config import Recipe, load_recipe
from train.determinism import enter
from train.optim import build_optimizer
from train.roofs import generate_scenes
from train.step import predict_and_compare, update

CASES = {
    "published-fp32": ("s23dr", 2048, 4, "fp32"),
    "published-bf16": ("s23dr", 2048, 4, "bf16"),
    "demo-256-fp32": ("demo", 256, 32, "fp32"),
    "demo-512-fp32": ("demo", 512, 32, "fp32"),
}
# on a CPU both are the same
PEERS = by_name(OURS, *([Peer(name="eager operators", solve=update)] if ON_GPU else ()))
# relative error of the loss that each precision may show
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def _float64_loss(recipe: Recipe, batch: SceneBatch, endpoint_weight: float) -> float:
    machine = enter(threads=recipe.threads, precision="fp32", impl="eager", device="cpu")
    model = stirred_model(recipe).double()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in vars(batch).items()}
    with torch.no_grad():
        loss = predict_and_compare(model, SceneBatch(**exact), recipe, machine, endpoint_weight=endpoint_weight)[1]
    return float(loss.total)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
def bench_step(measure, case, peer):
    name, points, scenes, precision = CASES[case]
    recipe = load_recipe(name)
    stage = dataclasses.replace(recipe.stages[2], lr=1e-4)
    batch = stack_scenes(generate_scenes(scenes, seed=0, points=points, setting="easy"))
    truth = _float64_loss(recipe, batch, stage.endpoint_weight)
    machine = enter(threads=recipe.threads, precision=precision, impl="auto" if peer == OURS.name else "eager")
    model = stirred_model(recipe).to(machine.device)
    optimizer = build_optimizer(model, recipe.optim, impl=machine.impl)
    rows = batch.to(machine.device)
    steps = iter(range(1, 1_000_000))

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = predict_and_compare(model, rows, recipe, machine, endpoint_weight=stage.endpoint_weight)[1].total
        used = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [loss, *(x for x in torch.autograd.grad(loss, used, allow_unused=True) if x is not None)]

    measure(
        lambda: update(model, optimizer, rows, step=next(steps), stage=stage, recipe=recipe, machine=machine),
        check=loss_and_gradients,
        group=f"step, {case}",
        peer=PEERS[peer],
        truth=[torch.tensor(truth, dtype=torch.float64, device=machine.device)],
        tolerance=TOLERANCE[precision],
        recipe=name, points=points, scenes=scenes, precision=precision,
    )  # fmt: skip
