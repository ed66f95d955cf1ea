"""The schedule of the published recipe, the two weight decays, the clip."""

import pytest
import torch

from perceiver.model import Perceiver
from tests.small_models import SMALL
from train.config import load_recipe
from train.optim import OptimConfig, build_optimizer, clip_gradients, learning_rate, set_learning_rate

STAGES = load_recipe("s23dr").stages


@pytest.mark.parametrize(
    ("stage", "step", "rate"),
    [
        (0, 1, 3e-8),
        (0, 5_000, 1.5e-4),
        (0, 10_000, 3e-4),
        (0, 125_000, 3e-4),
        (1, 125_001, 3e-5),
        (2, 150_000, 3e-5),
        (2, 160_000, 1.5e-5),
        (2, 170_000, 0.0),
        (2, 180_000, 0.0),
    ],
)
def test_learning_rate_follows_the_published_schedule(stage, step, rate):
    assert learning_rate(step, STAGES[stage]) == pytest.approx(rate, rel=1e-12)


def test_weight_decay_acts_alone_where_there_is_no_gradient():
    model = Perceiver(SMALL)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1, conf_head_weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.5 if name == "segmenter.conf_head.weight" else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.01 * decay), msg=name)


def test_every_parameter_is_in_one_group():
    model = Perceiver(SMALL)
    groups = build_optimizer(model, OptimConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(("scale", "clipped"), [(10.0, True), (1e-6, False)])
def test_clip_bounds_the_global_norm_and_reports_it(scale, clipped):
    model = Perceiver(SMALL)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, scale)
    norm = scale * sum(p.numel() for p in model.parameters()) ** 0.5
    assert clip_gradients(model, 1.0).item() == pytest.approx(norm, rel=1e-4)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert after == pytest.approx(1.0 if clipped else norm, rel=1e-3)
