"""What an attention costs inside a training step on a CPU: the published model, 4 scenes of 2,048 points.

ridgeline         `gqa_attention`, the operator of the model
sdpa, expanded    the same function by PyTorch: normalised queries and keys, heads expanded, a mask of keys

Before a row is timed, the loss of its step is compared with float64.
"""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from bench.peers import OURS, Peer, by_name
from bench.stirred import stirred_model
from kernels.attention import gqa_attention
from perceiver import blocks
from perceiver.model import Perceiver
from perceiver.scene import SceneBatch, stack_scenes
from train.config import Recipe, StageConfig, load_recipe
from train.determinism import Machine, enter
from train.optim import build_optimizer
from train.roofs import generate_scenes
from train.step import predict_and_compare, update

SCENES, POINTS = 4, 2048
# relative error of the loss that each precision may show
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def _sdpa_expanded(q_BHTD, k_BGSD, v_BGSD, log_scale_H, *, key_count_B=None, key_mask_BS=None, impl="auto"):
    (H, G, S), mask = (q_BHTD.shape[1], *k_BGSD.shape[1:3]), None
    if key_count_B is not None:
        mask = (torch.arange(S) < key_count_B[:, None])[:, None, None]
    unit_q_BHTD = normalize(q_BHTD, dim=-1) * log_scale_H.exp()[:, None, None].to(q_BHTD.dtype)
    k_BHSD, v_BHSD = (x.repeat_interleave(H // G, 1) for x in (normalize(k_BGSD, dim=-1), v_BGSD))
    return scaled_dot_product_attention(unit_q_BHTD.to(v_BHSD.dtype), k_BHSD, v_BHSD, attn_mask=mask, scale=1.0)


# on the processor, also where there is a GPU
ATTENTIONS = by_name(dataclasses.replace(OURS, solve=gqa_attention), Peer(name="sdpa, expanded", solve=_sdpa_expanded))


@torch.no_grad()
def _loss(model: Perceiver, batch: SceneBatch, recipe: Recipe, machine: Machine, stage: StageConfig) -> torch.Tensor:
    weight = stage.endpoint_weight
    return predict_and_compare(model, batch, recipe, machine, endpoint_weight=weight)[1].total.reshape(1)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("peer", ATTENTIONS)
def bench_attention_step(measure, monkeypatch, peer, precision):
    recipe = load_recipe("s23dr")
    stage = dataclasses.replace(recipe.stages[2], lr=1e-4)
    batch = stack_scenes(generate_scenes(SCENES, seed=0, points=POINTS, setting="easy"))
    exact = SceneBatch(**{name: x.double() if x.is_floating_point() else x for name, x in vars(batch).items()})
    machine = enter(threads=recipe.threads, precision="fp32", impl="eager", device="cpu")
    truth = _loss(stirred_model(recipe).double(), exact, recipe, machine, stage)

    machine, model = dataclasses.replace(machine, precision=precision), stirred_model(recipe)
    monkeypatch.setattr(blocks, "gqa_attention", ATTENTIONS[peer].solve)
    optimizer, steps = build_optimizer(model, recipe.optim), iter(range(1, 1_000_000))
    measure(
        lambda: update(model, optimizer, batch, step=next(steps), stage=stage, recipe=recipe, machine=machine),
        check=lambda: [_loss(model, batch, recipe, machine, stage)],
        group=f"attention_step, {precision}, forward and backward",
        peer=ATTENTIONS[peer],
        truth=[truth],
        tolerance=TOLERANCE[precision],
        scenes=SCENES,
        points=POINTS,
        precision=precision,
    )
