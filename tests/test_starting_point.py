"""Weights from a run, a checkpoint of ours or the published file; what does not fit is refused."""

import dataclasses

import pytest
import torch

from perceiver.model import Perceiver
from perceiver.published import config_from_args
from perceiver.wireframe import PostprocessConfig
from tests.small_models import SMALL, stirred
from tests.test_published import ARGS
from train.checkpoint import Checkpoint, CheckpointError, save_checkpoint, tensors_digest
from train.config import load_recipe, recipe_to_dict
from train.starting_point import load_model, load_start

RECIPE = dataclasses.replace(load_recipe("tiny"), model=SMALL, postprocess=PostprocessConfig(snap=False))


@pytest.fixture
def model():
    return stirred(Perceiver(SMALL))


def save(path, model):
    values = recipe_to_dict(RECIPE)
    save_checkpoint(
        path, Checkpoint(step=8, model=model.state_dict(), optimizer={"state": {}}, recipe=values, machine={})
    )


def same_weights(a, b):
    return tensors_digest(a.state_dict()) == tensors_digest(b.state_dict())


@pytest.mark.parametrize("name", ["checkpoint.pt", "."])
def test_a_run_and_its_checkpoint_give_the_same_model(tmp_path, model, name):
    save(tmp_path / "checkpoint.pt", model)
    loaded = load_model(tmp_path / name)
    assert same_weights(loaded.model, model)
    assert loaded.postprocess == PostprocessConfig(snap=False)
    assert loaded.record["step"] == 8
    assert loaded.record["weights"] == tensors_digest(model.state_dict())
    assert loaded.optimizer == {"state": {}}


def test_an_older_checkpoint_does_not_stand_in_for_a_damaged_one_unasked(tmp_path, model):
    for _ in range(2):
        save(tmp_path / "checkpoint.pt", model)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a checkpo")
    with pytest.raises(
        CheckpointError, match=r"pt is damaged: .*; name .*checkpoint\.pt\.previous to take the one .* step 8"
    ):
        load_model(tmp_path)
    assert same_weights(load_model(tmp_path / "checkpoint.pt.previous").model, model)


def test_the_published_file_gives_a_model_without_optimizer(tmp_path):
    model = stirred(Perceiver(config_from_args(ARGS)))
    torch.save({"model": model.state_dict(), "args": ARGS}, tmp_path / "checkpoint.pt")
    loaded = load_model(tmp_path / "checkpoint.pt")
    assert same_weights(loaded.model, model)
    assert loaded.optimizer is None
    assert loaded.record["step"] is None


def test_a_stage_can_be_started_from_fitting_weights_only(tmp_path, model):
    save(tmp_path / "checkpoint.pt", model)
    assert load_start(tmp_path / "checkpoint.pt", 3, RECIPE).stage == 3
    with pytest.raises(ValueError, match="--start-stage must be 1 to 3, got 4"):
        load_start(tmp_path / "checkpoint.pt", 4, RECIPE)
    with pytest.raises(ValueError, match=r"another architecture than the recipe: .*latent_tokens"):
        load_start(tmp_path / "checkpoint.pt", 1, load_recipe("tiny"))


def test_nothing_to_load_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "checkpoint.pt")
