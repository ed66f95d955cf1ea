"""A training step, from stored rows to new weights: the published model at full size, and the demo's.

On a CPU: 4 scenes of 2,048 points in float32 and in bfloat16, two threads. Before it is timed, a step's loss is
compared with that of the eager model in float64 on the same rows.
"""

import dataclasses

import pytest
import torch

from kernels.philox import named_normal
from perceiver.model import Perceiver
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
# relative error of the loss that each precision may show
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@torch.no_grad()
def _stirred_model(recipe: Recipe) -> Perceiver:
    """The model moved off its start, where the residual branches are 0 and their arithmetic would not show."""
    model = Perceiver(recipe.model, seed=recipe.seed)
    for name, parameter in model.named_parameters():
        parameter += 0.02 * named_normal(f"stir {name}", tuple(parameter.shape), seed=1)
    return model


def _float64_loss(recipe: Recipe, batch: SceneBatch, endpoint_weight: float) -> float:
    machine = enter(threads=recipe.threads, precision="fp32", impl="eager", device="cpu")
    model = _stirred_model(recipe).double()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in vars(batch).items()}
    with torch.no_grad():
        loss = predict_and_compare(model, SceneBatch(**exact), recipe, machine, endpoint_weight=endpoint_weight)[1]
    return float(loss.total)


@pytest.mark.parametrize("case", CASES)
def bench_step(benchmark, case):
    name, points, scenes, precision = CASES[case]
    recipe = load_recipe(name)
    stage = dataclasses.replace(recipe.stages[2], lr=1e-4)
    batch = stack_scenes(generate_scenes(scenes, seed=0, points=points, setting="easy"))
    truth = _float64_loss(recipe, batch, stage.endpoint_weight)
    machine = enter(threads=recipe.threads, precision=precision, impl="auto")
    model = _stirred_model(recipe).to(machine.device)
    optimizer = build_optimizer(model, recipe.optim)
    rows = batch.to(machine.device)
    with torch.no_grad():
        found = float(predict_and_compare(model, rows, recipe, machine, endpoint_weight=stage.endpoint_weight)[1].total)
    error = abs(found - truth) / abs(truth)
    assert error <= TOLERANCE[precision], f"loss {found} against {truth} in float64"
    steps = iter(range(1, 1_000_000))

    def one_step() -> None:
        update(model, optimizer, rows, step=next(steps), stage=stage, recipe=recipe, machine=machine)
        if machine.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "training step"
    benchmark.extra_info.update(
        recipe=name,
        points=points,
        scenes=scenes,
        precision=precision,
        threads=recipe.threads,
        loss_error=f"{error:.1e}",
    )
    benchmark.pedantic(one_step, rounds=9, warmup_rounds=2)
