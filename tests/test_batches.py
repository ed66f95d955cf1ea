"""The rows of an update are a function of recipe, data and step."""

import dataclasses
import re

import pytest
import torch

import train.batches
from perceiver.model import Perceiver
from tests.tiny_runs import tiny_recipe, train_quietly
from train.batches import StageBatches, check_stages, stage_data
from train.config import load_recipe
from train.data import count_train_rows
from train.roofs import generate_scenes
from train.sources import SourceError, write_npz
from train.starting_point import LoadedModel, StartPoint


def batches(number=2):
    recipe = tiny_recipe()
    return StageBatches(recipe, number, stage_data(recipe, number), torch.device("cpu"))


def test_any_step_can_be_asked_for_alone():
    one_by_one = batches()
    scenes = {step: one_by_one.at(step).scene_B for step in range(9, 13)}
    for step in (12, 9, 11):
        assert torch.equal(batches().at(step).scene_B, scenes[step])


def test_an_epoch_visits_every_row_once():
    seen = torch.cat([batches(1).at(step).scene_B for step in range(1, 5)])
    assert len(seen.unique()) == len(seen) == 32


def test_a_batch_that_a_later_stage_has_no_rows_for_is_found_before_the_first_update(tmp_path):
    recipe = tiny_recipe()
    check_stages(recipe, 0)
    last = dataclasses.replace(recipe.stages[2], batch=33)
    recipe = dataclasses.replace(recipe, stages=(*recipe.stages[:2], last))
    with pytest.raises(ValueError, match=r"stages\.2\.batch must be at most 32, the rows that roofs:.* got 33"):
        train_quietly(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_stage_that_is_behind_is_not_checked_and_its_set_not_opened(tmp_path, monkeypatch):
    recipe = tiny_recipe()
    first = dataclasses.replace(recipe.stages[0], batch=33)
    recipe = dataclasses.replace(recipe, stages=(first, *recipe.stages[1:]))
    opened = []

    def counted(uri, **kwargs):
        opened.append(uri)
        return count_train_rows(uri, **kwargs)

    monkeypatch.setattr(train.batches, "count_train_rows", counted)
    with pytest.raises(ValueError, match=r"stages\.0\.batch must be at most 32"):
        check_stages(recipe, 7)
    opened.clear()
    check_stages(recipe, 8)
    assert opened == [recipe.stages[1].data]
    loaded = LoadedModel(
        model=Perceiver(recipe.model), postprocess=recipe.postprocess, record={"file": "x", "weights": ""}
    )
    assert train_quietly(recipe, tmp_path / "run", start=StartPoint(loaded=loaded, stage=2))


def with_last(**changes):
    recipe = tiny_recipe()
    return dataclasses.replace(recipe, stages=(*recipe.stages[:2], dataclasses.replace(recipe.stages[2], **changes)))


def test_a_stage_whose_cooldown_ends_before_it_is_refused_with_the_flag_that_helps(tmp_path):
    advice = r"stages\.2\.until is 400, .*, 16 \+ 4, is 20: .* learning rate is 0\. .* --stages\.2\.cooldown-start 396$"
    with pytest.raises(ValueError, match=advice):
        train_quietly(with_last(until=400), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_stages(with_last(until=400, cooldown_start=396), 0)
    check_stages(with_last(until=400, cooldown_start=0, cooldown_steps=0), 0)
    # what is trained already is only read
    check_stages(with_last(until=400), 400)


@pytest.mark.parametrize("name", ["demo", "s23dr", "tiny"])
def test_the_recipes_of_the_repository_learn_to_the_end_of_every_stage(name, monkeypatch):
    monkeypatch.setattr(train.batches, "count_train_rows", lambda _uri, **_kwargs: 4096)
    check_stages(load_recipe(name), 0)


def test_a_row_that_does_not_fit_is_named_with_its_stage_and_source(tmp_path):
    write_npz(
        (s for points in (64, 128) for s in generate_scenes(2, seed=points, points=points, setting="easy")),
        tmp_path / "set",
    )
    uri = f"npz:{tmp_path / 'set'}?dev=3"
    reason = (
        rf"^stages\.2\.data, {re.escape(uri)}: row '.*': field 'xyz_norm' must have 128 points as the others, has 64"
    )
    with pytest.raises(SourceError, match=reason):
        stage_data(with_last(data=uri), 3)


def test_rows_are_gathered_in_the_form_that_is_asked_for():
    with pytest.raises(ValueError, match="impl must be one of auto, eager, triton, got 'fast'"):
        batches().at(9, impl="fast")


def test_a_step_of_another_stage_is_refused():
    for step in (8, 13):
        with pytest.raises(ValueError, match=r"step must be in \[9, 12\]"):
            batches().at(step)
