"""The published checkpoint's form loads strictly; anything else is refused with a reason."""

import argparse

import pytest
import torch

from perceiver.model import Perceiver, PerceiverConfig
from perceiver.published import config_from_args, load_published
from tests.small_models import SMALL, small_batch, stirred

ARGS = {
    "segments": 8,
    "hidden": 32,
    "num_heads": 2,
    "kv_heads_cross": 1,
    "kv_heads_self": 1,
    "ff": 48,
    "dropout": 0.1,
    "latent_tokens": 6,
    "latent_layers": 2,
    "decoder_layers": 1,
    "cross_attn_interval": 4,
    "rms_norm": True,
    "activation": "gelu",
    "segment_conf": True,
    "behind_emb_dim": 8,
    "vote_features": True,
    "arch": "perceiver",
    "encoder_layers": 4,
    "pre_encoder_layers": 0,
    "segment_param": "midpoint_dir_len",
    "qk_norm": True,
    "learning_rate": 3e-4,
}


def small_published() -> Perceiver:
    return stirred(Perceiver(config_from_args(ARGS)))


@pytest.mark.parametrize("args", [ARGS, argparse.Namespace(**ARGS)], ids=["dict", "namespace"])
@pytest.mark.parametrize("prefix", ["segmenter.", "segmenter._orig_mod."])
def test_checkpoint_loads_with_and_without_the_compiled_prefix(tmp_path, prefix, args):
    model = small_published()
    state = {name.replace("segmenter.", prefix): value for name, value in model.state_dict().items()}
    torch.save({"model": state, "args": args}, tmp_path / "checkpoint.pt")
    loaded = load_published(tmp_path / "checkpoint.pt")
    assert not loaded.training
    batch = small_batch()
    assert torch.equal(loaded(batch).mid_BN3, model(batch).mid_BN3)


def test_published_arguments_give_the_default_architecture():
    published = {**ARGS, "segments": 64, "hidden": 256, "num_heads": 4, "kv_heads_cross": 2, "kv_heads_self": 2}
    published |= {"ff": 1024, "latent_tokens": 256, "latent_layers": 7, "decoder_layers": 3}
    assert config_from_args(published) == PerceiverConfig()


@pytest.mark.parametrize(("name", "value"), [("qk_norm", False), ("arch", "transformer"), ("pre_encoder_layers", 2)])
def test_another_kind_of_model_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"args.{name} must be .*, the checkpoint has {value!r}"):
        config_from_args({**ARGS, name: value})


def test_missing_and_misshapen_weights_are_refused(tmp_path):
    state = small_published().state_dict()
    del state["segmenter.conf_head.bias"]
    torch.save({"model": state, "args": ARGS}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"another model.*conf_head\.bias"):
        load_published(tmp_path / "a.pt")
    torch.save({"model": Perceiver(SMALL).state_dict(), "args": {**ARGS, "ff": 64}}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="another model"):
        load_published(tmp_path / "b.pt")


def test_a_file_of_another_form_is_refused(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is not a published checkpoint"):
        load_published(tmp_path / "a.pt")
