"""Recipes: the published numbers, what is refused, and the round trip through JSON."""

import dataclasses
import json
import re

import pytest

from perceiver.model import PerceiverConfig
from train import config
from train.config import differing_keys, load_recipe, recipe_from_dict, recipe_to_dict


def write(directory, name, **values):
    path = directory / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


STAGE = {"name": "one", "data": "roofs:easy", "until": 10, "batch": 2, "lr": 1e-3}


def test_published_recipe_has_the_published_numbers():
    recipe = load_recipe("s23dr")
    assert recipe.model == PerceiverConfig()
    assert recipe.seed == 353
    assert [(s.until, s.batch, s.lr, s.warmup, s.endpoint_weight) for s in recipe.stages] == [
        (125_000, 32, 3e-4, 10_000, 0.0),
        (135_000, 64, 3e-5, 0, 0.0),
        (170_000, 64, 3e-5, 0, 0.1),
    ]
    assert (recipe.stages[2].cooldown_start, recipe.stages[2].cooldown_steps) == (150_000, 20_000)
    assert [s.data.split("sampled_")[1] for s in recipe.stages] == ["2048_v2:train", "4096_v2:train", "4096_v2:train"]
    assert (recipe.loss.eps, recipe.loss.iterations, recipe.loss.dustbin, recipe.loss.conf_weight) == (
        0.1,
        20,
        0.3,
        0.1,
    )
    optim = recipe.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.conf_head_weight_decay) == (0.9, 0.95, 0.01, 0.1)
    assert (recipe.augment.rotate, recipe.augment.flip) == ("uniform", True)


@pytest.mark.parametrize("name", ["demo", "s23dr", "tiny"])
def test_a_recipe_survives_json(name):
    recipe = load_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    assert recipe.name == name


def test_a_recipe_stands_on_the_base_beside_it(tmp_path):
    write(tmp_path, "base", seed=7, model={"hidden": 64, "ff": 32})
    recipe = load_recipe(write(tmp_path, "mine", model={"ff": 16}, stages=[STAGE]))
    assert (recipe.seed, recipe.model.hidden, recipe.model.ff) == (7, 64, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "recipe has no key 'sed'; it knows augment, "),
        ({"model": {"widht": 1}}, r"recipe\.model has no key 'widht'"),
        ({"stages": [{**STAGE, "rate": 1}]}, r"recipe\.stages\.0 has no key 'rate'"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [{**STAGE, "lr": -1.0}]}, "lr must be positive"),
        ({"stages": [{**STAGE, "until": 0}]}, "until must be at least 1"),
        ({"stages": [STAGE, STAGE]}, "stages must end one after the other"),
        ({"stages": [{"name": "one"}]}, r"recipe\.stages\.0 must say data, until, batch, lr, got name"),
        ({"seed": "four"}, "recipe.seed must be int, got 'four'"),
        ({"precision": "fp8"}, "recipe.precision must be one of"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"seed": 1 << 64}, "seed must be below"),
        ({"evaluate": {"scenes": 0}}, r"evaluate\.scenes must be at least 1"),
        ({"evaluate": {"batch": 0}}, r"evaluate\.batch must be at least 1"),
        ({"optim": {"clip": 0.0}}, "clip must be positive"),
        ({"optim": {"beta2": 1.0}}, "beta2 must be in"),
        ({"optim": {"weight_decay": -0.1}}, "weight_decay must be at least 0"),
        ({"model": 3}, "recipe.model must be an object"),
    ],
)
def test_a_mistake_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, "mine", **{"stages": [STAGE], **change}))


def test_an_unknown_recipe_names_the_known_ones(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(config, "CONFIGS", tmp_path / "configs")
        with pytest.raises(ValueError, match=r"'demo' does not exist: .*configs is not there"):
            load_recipe("demo")
    with pytest.raises(ValueError, match="'demoo' does not exist; known recipes: demo, s23dr, tiny"):
        load_recipe("demoo")


def test_broken_json_is_named(tmp_path):
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_recipe(tmp_path / "mine.json")


def test_a_recipe_that_is_no_object_is_named(tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(ValueError, match=r"mine\.json must hold a JSON object, got list"):
        load_recipe(tmp_path / "mine.json")


def test_differences_are_named_with_their_path():
    a = load_recipe("tiny")
    b = dataclasses.replace(a, seed=1, model=dataclasses.replace(a.model, dropout=0.5))
    assert differing_keys(recipe_to_dict(a), recipe_to_dict(b)) == ["model.dropout", "seed"]


def test_a_stage_starts_where_the_one_before_ended():
    recipe = load_recipe("s23dr")
    assert [recipe.start_of(k) for k in range(3)] == [0, 125_000, 135_000]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"name": "mine"}, "recipe must say stages, got name"),
        (
            {"name": "mine", "stages": [{"data": "roofs:easy", "until": 4, "batch": 2}]},
            "recipe.stages.0 must say name, lr, got batch, data, until",
        ),
    ],
)
def test_what_a_recipe_lacks_is_named(values, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        recipe_from_dict(values)
