"""What stops a run, and what does not yet."""

import dataclasses
import json

import pytest
import torch

import train.graph
import train.loop
import train.pulse
from kernels.loss_terms import Loss
from perceiver.model import Perceiver
from tests.small_models import SMALL
from tests.tiny_runs import tiny_recipe, train_quietly
from train.checkpoint import load_checkpoint
from train.pulse import (
    FIRST_STEPS,
    MIN_TEMPERATURE,
    RunDiverged,
    require_finite,
    require_matching,
    require_temperatures,
    temperatures,
)
from train.step import StepResult, advance

NAN = float("nan")


def result(total=1.0, grad_norm=1.0):
    loss = Loss(*[torch.tensor(1.0)] * len(Loss._fields))._replace(total=torch.tensor(total))
    return StepResult(loss=loss, grad_norm=torch.tensor(grad_norm))


@pytest.mark.parametrize("bad", [result(total=NAN), result(grad_norm=float("inf"))])
def test_an_update_that_is_not_finite_is_refused(bad):
    with pytest.raises(RunDiverged, match="step 1,007: the loss or its gradient is not finite; lower the learning"):
        require_finite(1007, bad, {})


def test_a_weight_that_is_not_finite_is_refused_by_name():
    weights = {"a": torch.ones(3), "n": torch.tensor(3), "b": torch.tensor([1.0, -float("inf")])}
    with pytest.raises(RunDiverged, match="step 7: b is not finite"):
        require_finite(7, None, weights)
    require_finite(7, result(), weights | {"b": torch.ones(2)})


def test_the_temperatures_are_the_smallest_and_the_largest_of_all_heads():
    model = Perceiver(SMALL)
    scales = [p for name, p in model.named_parameters() if name.endswith("log_scale")]
    with torch.no_grad():
        scales[-1][0], scales[0][1] = 3.0, -2.0
    assert temperatures(model) == pytest.approx((0.135335, 20.0855), abs=1e-3)
    require_temperatures(4, MIN_TEMPERATURE, 55.0)
    with pytest.raises(RunDiverged, match=r"step 4: a temperature reached 55\.1, the kernels stop at 60; lower the"):
        require_temperatures(4, 1.0, 55.1)
    with pytest.raises(
        RunDiverged, match=r"step 4: a temperature fell to 1e-24, the kernels stop at exp\(-60\); lower"
    ):
        require_temperatures(4, 1e-24, 1.0)


def test_a_loss_can_only_collapse_after_the_warm_up_and_the_first_steps():
    for begun, warmup in ((0, 0), (0, FIRST_STEPS + 7), (1500, 20)):
        first = begun + max(warmup, FIRST_STEPS) + 1
        require_matching(first - 1, 0.01, begun=begun, warmup=warmup)
        require_matching(first, 0.05, begun=begun, warmup=warmup)
        with pytest.raises(RunDiverged, match=r"only 0\.010 of the mass .* went to the dustbin"):
            require_matching(first, 0.01, begun=begun, warmup=warmup)


def test_a_collapsed_loss_stops_the_run_with_an_explanation(tmp_path, monkeypatch):
    monkeypatch.setattr(train.pulse, "FIRST_STEPS", 1)
    stages = tuple(dataclasses.replace(stage, warmup=2) for stage in tiny_recipe().stages)
    with pytest.raises(RunDiverged, match=r"step 3: only 0.* of the mass .* went to the dustbin"):
        train_quietly(tiny_recipe(stages=stages), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        result = advance(*args, **kwargs)
        return result._replace(grad_norm=torch.tensor(float("nan")))

    monkeypatch.setattr(train.graph, "advance", broken)
    with pytest.raises(RunDiverged, match="not finite"):
        train_quietly(tiny_recipe(), tmp_path / "run")


def spoiled_at(monkeypatch, step, spoil):
    """Let an update change the model as training with too high a learning rate may."""

    def spoiled(model, *args, step, **kwargs):
        result = advance(model, *args, step=step, **kwargs)
        if step == at:
            with torch.no_grad():
                spoil(model)
        return result

    at = step
    monkeypatch.setattr(train.graph, "advance", spoiled)


def sparse(**changes):
    """A recipe that logs and evaluates at the ends of stages only."""
    recipe = tiny_recipe(log_every=100, **changes)
    return dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, every=0))


def to_nan(model):
    model.segmenter.conf_head.weight[0, 3] = float("nan")


def to_a_high_temperature(model):
    next(p for name, p in model.named_parameters() if name.endswith("log_scale")).fill_(6.0)


def to_a_low_temperature(model):
    next(p for name, p in model.named_parameters() if name.endswith("log_scale")).fill_(-1e6)


@pytest.mark.parametrize(
    ("step", "spoil", "reason"),
    [
        (3, to_nan, r"step 3: segmenter\.conf_head\.weight is not finite; lower the learning rate"),
        (5, to_nan, r"step 6: the loss or its gradient is not finite; lower the learning rate"),
        (8, to_nan, r"step 8: .* not finite"),
        (4, to_a_high_temperature, "step 4: a temperature reached 403"),
        (5, to_a_high_temperature, "^stage 1, step 5: a temperature reached 403"),
        (9, to_a_low_temperature, "^stage 2, step 9: a temperature fell to 0, .*; lower the learning rate$"),
    ],
)
def test_what_cannot_be_gone_on_from_is_named_with_its_step_and_never_saved(tmp_path, monkeypatch, step, spoil, reason):
    recipe, path = sparse(checkpoint_every=3, keep_every=2), tmp_path / "run"
    spoiled_at(monkeypatch, step, spoil)
    with pytest.raises(RunDiverged, match=reason):
        train_quietly(recipe, path)
    monkeypatch.undo()
    saved = [load_checkpoint(file) for file in path.glob("*.pt*")]
    assert saved and all(x.isfinite().all() for state in saved for x in state.model.values())
    train_quietly(recipe, path)
    assert load_checkpoint(path / "stage3.pt").step == 20


def test_a_refused_value_that_is_no_divergence_stays_what_it_is(tmp_path, monkeypatch):
    def refused(*_args, **_kwargs):
        raise ValueError("rows must be [B, T]")

    monkeypatch.setattr(train.graph, "advance", refused)
    with pytest.raises(ValueError, match=r"^rows must be"):
        train_quietly(tiny_recipe(), tmp_path / "run")


def test_a_model_that_has_not_begun_to_match_has_not_collapsed(tmp_path):
    stages = tuple(dataclasses.replace(stage, warmup=0, lr=1e-9) for stage in tiny_recipe().stages)
    assert train_quietly(tiny_recipe(stages=stages), tmp_path / "run")


def test_a_temperature_out_of_range_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train.pulse, "MAX_TEMPERATURE", 3.0)
    with pytest.raises(RunDiverged, match="a temperature reached 4"):
        train_quietly(tiny_recipe(), tmp_path / "run")


def test_a_loss_that_collapsed_to_nothing_is_logged(tmp_path, monkeypatch):
    # as with a learning rate of 1: no row finds a partner, and no confidence says so
    monkeypatch.setattr(train.loop, "mean_loss", lambda *_args, **_kwargs: 0.0)
    assert train_quietly(tiny_recipe(), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["ratio"] for line in lines if line["kind"] == "eval"} == {None}
