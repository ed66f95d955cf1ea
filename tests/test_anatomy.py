"""An update watched: every tensor of it, in forward order, and no other bits than unwatched."""

import dataclasses

import torch

from perceiver.model import Perceiver
from tests.small_models import small_batch, stirred
from tests.tiny_runs import tiny_recipe
from train.anatomy import differing_tensors, watch_update
from train.checkpoint import tensors_digest
from train.determinism import enter
from train.optim import build_optimizer
from train.step import predict_and_compare, update

RECIPE = tiny_recipe(optim=dataclasses.replace(tiny_recipe().optim, clip=1e-3))


def one_update(device, *, watched):
    """Weights after an update, what was seen, and the model."""
    machine = enter(threads=1, precision="fp32", impl="eager", device=device.type)
    model = stirred(Perceiver(RECIPE.model)).to(device)
    optimizer = build_optimizer(model, RECIPE.optim)
    batch, seen = small_batch().to(device), {}
    stage = RECIPE.stages[2]
    if watched:
        with watch_update(model) as seen:
            update(model, optimizer, batch, step=3, stage=stage, recipe=RECIPE, machine=machine)
    else:
        update(model, optimizer, batch, step=3, stage=stage, recipe=RECIPE, machine=machine)
    return tensors_digest(model.state_dict()), seen, model


def test_watching_changes_no_bit(device):
    alone, _, _ = one_update(device, watched=False)
    watched, _, model = one_update(device, watched=True)
    assert watched == alone
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_activations_come_in_forward_order_and_rows_are_the_augmented_ones():
    _, seen, model = one_update(torch.device("cpu"), watched=True)
    blocks = [f"latent_layers.{i}.{part}" for i in (0, 1) for part in ("cross", "self_attn", "ffn")]
    blocks += [f"decoder_layers.0.{part}" for part in ("cross", "self_attn", "ffn")]
    names = ["memory", *(f"segmenter.{name}" for name in blocks)]
    assert list(seen["activation"]) == [*names, "mid_BN3", "dir_BN3", "len_BN", "conf_BN"]
    assert seen["activation"]["segmenter.latent_layers.1.ffn"].shape == (3, RECIPE.model.latent_tokens, 32)
    rows, stored = seen["rows"], vars(small_batch())
    assert list(rows) == list(stored)
    assert differing_tensors(rows, stored)[0].startswith("xyz_BT3: ")
    assert list(seen["gradient"]) == [name for name, _ in model.named_parameters()]


def test_gradients_are_those_before_clipping():
    _, seen, _ = one_update(torch.device("cpu"), watched=True)
    machine = enter(threads=1, precision="fp32", impl="eager", device="cpu")
    model = stirred(Perceiver(RECIPE.model))
    with watch_update(model) as other:
        _, loss = predict_and_compare(model, small_batch(), RECIPE, machine, endpoint_weight=0.1)
        loss.total.backward()
    assert differing_tensors(other["gradient"], {name: p.grad for name, p in model.named_parameters()}) == []
    norm = torch.stack([g.norm() for g in seen["gradient"].values()]).norm()
    assert norm > 10 * RECIPE.optim.clip


def test_differing_tensors_are_counted_and_measured():
    a = {"w": torch.zeros(2, 3), "v": torch.ones(4), "only": torch.ones(1), "shape": torch.ones(2)}
    b = {"w": torch.zeros(2, 3), "v": torch.tensor([1, 1.5, 1, 0]), "shape": torch.ones(3)}
    assert differing_tensors(a, b) == [
        "v: 2 of 4 elements differ, at most by 1",
        "only is in one run only",
        "shape is torch.float32 (2,) against torch.float32 (3,)",
    ]
    assert differing_tensors({"w": torch.zeros(1)}, {"w": -torch.zeros(1)}) == [
        "w: 1 of 1 elements differ, at most by 0"
    ]
    nan = {"w": torch.tensor([float("nan")])}
    assert differing_tensors(nan, nan) == []


def test_fused_layers_have_the_same_seams(device):
    model = stirred(Perceiver(dataclasses.replace(RECIPE.model, latent_layers=1)))
    shapes = []
    for impl, place in (("eager", torch.device("cpu")), ("triton", device)):
        with watch_update(model.to(place)) as seen, torch.no_grad():
            model(small_batch(1).to(place), impl=impl)
        shapes.append([(name, x.shape) for name, x in seen["activation"].items()])
    assert shapes[0] == shapes[1]
