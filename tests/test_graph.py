"""The updates of a stage: launch by launch they are those of `train.step.update`, and a graph has the same bits."""

import dataclasses

import pytest

from bench.measure import refused_waits
from perceiver import products
from perceiver.model import Perceiver
from tests.small_models import SMALL, stirred
from tests.tiny_runs import tiny_recipe
from train.batches import StageBatches, stage_data
from train.determinism import enter
from train.graph import WARM_UP, StageUpdates
from train.optim import build_optimizer
from train.step import update
from train.trace import digest, state_tensors

UPDATES = 2 * WARM_UP + 2


@pytest.fixture(scope="module")
def recipe():
    # one stage, long enough to replay; a warm-up makes the learning rate move from update to update
    first = dataclasses.replace(tiny_recipe().stages[0], until=UPDATES, warmup=UPDATES)
    return dataclasses.replace(tiny_recipe(), stages=(first,), model=SMALL)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return lambda device: enter(threads=1, precision="auto", impl="auto", device=device.type)


def _train(recipe, machine, make) -> tuple[str, list[dict[str, float]]]:
    """Return the digest of weights and optimizer after the stage, and the loss of every update."""
    model = stirred(Perceiver(recipe.model, seed=recipe.seed)).to(machine.device)
    optimizer = build_optimizer(model, recipe.optim, impl=machine.impl)
    batches = StageBatches(recipe, 1, stage_data(recipe, 1), machine.device)
    one_update = make(model, optimizer, batches)
    losses = []
    for step in range(1, UPDATES + 1):
        result = one_update(step)
        losses.append({name: float(x) for name, x in result.loss._asdict().items()} | {"norm": float(result.grad_norm)})
    return digest(state_tensors(model.state_dict(), optimizer.state_dict())), losses


def _by_stage_updates(recipe, machine, *, graph):
    def make(model, optimizer, batches):
        settings = {"stage": recipe.stages[0], "recipe": recipe, "machine": machine}
        return StageUpdates(model, optimizer, batches, graph=graph, **settings)

    return _train(recipe, machine, make)


def test_they_are_the_updates_of_a_step(recipe, machine, device):
    machine = machine(device)

    def make(model, optimizer, batches):
        settings = {"stage": recipe.stages[0], "recipe": recipe, "machine": machine}
        return lambda step: update(model, optimizer, batches.at(step), step=step, **settings)

    assert _train(recipe, machine, make) == _by_stage_updates(recipe, machine, graph=False)


@pytest.mark.gpu
def test_a_graph_changes_no_bit(recipe, machine, device):
    machine = machine(device)
    assert _by_stage_updates(recipe, machine, graph=True) == _by_stage_updates(recipe, machine, graph=False)


@pytest.mark.gpu
def test_a_new_epoch_does_not_wait_for_the_device(recipe, device):
    batches = StageBatches(recipe, 1, stage_data(recipe, 1), device)
    orders = [batches.index(step).tolist() for step in range(1, UPDATES + 1)]
    batches = StageBatches(recipe, 1, stage_data(recipe, 1), device)
    with refused_waits():
        found = [batches.index(step) for step in range(1, UPDATES + 1)]
    assert [index_B.tolist() for index_B in found] == orders


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_second_stream_changes_no_bit(graph, recipe, machine, device, monkeypatch):
    machine = machine(device)
    with_two = _by_stage_updates(recipe, machine, graph=graph)
    monkeypatch.setattr(products, "SIDE_STREAM", False)
    assert _by_stage_updates(recipe, machine, graph=graph) == with_two


def test_an_update_of_another_stage_is_refused(recipe, machine, device):
    machine = machine(device)
    with pytest.raises(ValueError, match="step must be in"):
        _train(recipe, machine, lambda model, optimizer, batches: lambda step: batches.index(UPDATES + 1))
