"""One update: the golden numbers of the published model, and what an update may depend on."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from bench.static_step import Recorder
from perceiver.model import Perceiver
from perceiver.scene import stack_scenes
from tests.small_models import SMALL, small_batch, stirred
from train.checkpoint import tensors_digest
from train.config import load_recipe
from train.determinism import enter, fingerprint
from train.optim import build_optimizer
from train.roofs import generate_scenes
from train.step import mean_loss, predict_and_compare, update

GOLDEN = Path(__file__).parent / "golden" / "step.json"


def machine(precision="fp32"):
    return enter(threads=1, precision=precision, impl="eager", device="cpu")


def golden_step() -> dict[str, float | str]:
    """Two updates of the published model on two generated scenes, with dropout and augmentation."""
    recipe = load_recipe("s23dr")
    model = Perceiver(recipe.model, seed=recipe.seed)
    optimizer = build_optimizer(model, recipe.optim)
    batch = stack_scenes(generate_scenes(2, seed=0, points=128, setting="easy"))
    stage = dataclasses.replace(recipe.stages[2], lr=1e-3)
    for step in (1, 2):
        result = update(model, optimizer, batch, step=step, stage=stage, recipe=recipe, machine=machine())
    numbers = {name: float(value) for name, value in result.loss._asdict().items()}
    numbers["grad_norm"] = float(result.grad_norm)
    numbers |= {"weights": tensors_digest(model.state_dict())}
    return numbers


@pytest.mark.filterwarnings("default:no golden bits")
def test_golden_numbers_of_a_step():
    golden = json.loads(GOLDEN.read_text())
    numbers = golden_step()
    weights = numbers.pop("weights")
    for name, value in numbers.items():
        assert value == pytest.approx(golden["numbers"][name], rel=1e-4), name
    known = golden["weights"].get(fingerprint())
    if known is None:
        warnings.warn(f"no golden bits for {fingerprint()}, found {weights}", stacklevel=1)
    else:
        assert weights == known, "the numbers agree, the bits do not"


def small_recipe(**model_changes):
    recipe = load_recipe("tiny")
    return dataclasses.replace(recipe, model=dataclasses.replace(SMALL, **model_changes))


def one_update(step=3, precision="fp32", batch=None, **model_changes):
    recipe = small_recipe(**model_changes)
    model = stirred(Perceiver(recipe.model))
    optimizer = build_optimizer(model, recipe.optim)
    stage = recipe.stages[2]
    result = update(
        model,
        optimizer,
        small_batch() if batch is None else batch,
        step=step,
        stage=stage,
        recipe=recipe,
        machine=machine(precision),
    )
    return tensors_digest(model.state_dict()), result


def test_equal_inputs_give_equal_bits():
    assert one_update()[0] == one_update()[0]


def test_the_step_keys_dropout_and_augmentation():
    assert one_update(step=3)[0] != one_update(step=4)[0]


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = one_update()[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert one_update()[0] == first


def test_the_learning_rate_of_the_step_is_applied():
    recipe = small_recipe()
    model = stirred(Perceiver(recipe.model))
    optimizer = build_optimizer(model, recipe.optim)
    stage = dataclasses.replace(recipe.stages[0], lr=1e-2, warmup=10)
    update(model, optimizer, small_batch(), step=5, stage=stage, recipe=recipe, machine=machine())
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] == 5e-3


def test_bfloat16_stays_close_to_float32():
    exact, rounded = one_update()[1].loss.total.item(), one_update(precision="bf16")[1].loss.total.item()
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)


def test_gradients_of_a_step_agree_with_float64():
    recipe = small_recipe(dropout=0.0)
    stage = recipe.stages[2]
    grads = []
    for dtype in (torch.float32, torch.float64):
        model = stirred(Perceiver(recipe.model)).to(dtype)
        batch = small_batch()
        batch = type(batch)(**{n: v.to(dtype) if v.is_floating_point() else v for n, v in vars(batch).items()})
        _, loss = predict_and_compare(model, batch, recipe, machine(), endpoint_weight=stage.endpoint_weight)
        loss.total.backward()
        grads.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_an_update_finds_the_gradient_of_its_loss_ready():
    one_update()
    with Recorder() as recorder:
        one_update()
    calls = [name for name, _ in recorder.calls]
    assert calls and "ones_like" not in calls


def test_mean_loss_is_that_of_the_first_rows_without_noise():
    recipe = small_recipe()
    recipe = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, scenes=5, batch=2))
    model, rows = stirred(Perceiver(recipe.model)), small_batch(scenes=7)
    found = mean_loss(model, rows, recipe=recipe, machine=machine(), endpoint_weight=0.1)
    with torch.no_grad():
        _, loss = predict_and_compare(model, rows.rows(torch.arange(5)), recipe, machine(), endpoint_weight=0.1)
    # the confidence and the rest are means over scenes, so batches of 2, 2 and 1 weigh by their size
    assert found == pytest.approx(loss.total.item(), rel=1e-5)


def regenerate() -> None:
    """Write the golden file anew: python -m tests.test_step."""
    numbers = golden_step()
    weights = numbers.pop("weights")
    known = json.loads(GOLDEN.read_text())["weights"] if GOLDEN.exists() else {}
    content = {"numbers": numbers, "weights": known | {fingerprint(): weights}}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    regenerate()
