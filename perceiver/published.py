"""The published checkpoint: a file with `model`, a state dict, and `args`, the command line it was trained with."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from perceiver.model import Perceiver, PerceiverConfig

# arguments of the published code whose other values this model does not implement
_FIXED_ARGS: dict[str, Any] = {
    "arch": "perceiver",
    "rms_norm": True,
    "qk_norm": True,
    "segment_conf": True,
    "segment_param": "midpoint_dir_len",
    "activation": "gelu",
    "pre_encoder_layers": 0,
}
_COMPILED_PREFIX = "segmenter._orig_mod."


def load_published(path: str | Path) -> Perceiver:
    """Load the published `checkpoint.pt`, or any file of its form, strictly.

    Args:
        path: a `torch.save`d dict with `model` (names with or without `segmenter._orig_mod.`) and `args`, a dict or an
            `argparse.Namespace`.
    Returns:
        The model on the CPU in evaluation mode.
    Raises:
        ValueError: the file is not of this form, an argument asks for another model, or names or shapes differ.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping) or not {"model", "args"} <= content.keys():
        raise ValueError(f"{path} must hold a dict with 'model' and 'args'; it is not a published checkpoint")
    args = content["args"]
    model = Perceiver(config_from_args(vars(args) if isinstance(args, argparse.Namespace) else args))
    state = {name.replace(_COMPILED_PREFIX, "segmenter."): value for name, value in content["model"].items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is a checkpoint of another model: {reason}") from error
    return model.eval()


def config_from_args(args: Mapping[str, Any]) -> PerceiverConfig:
    """Translate the published arguments; those without effect on the weights' meaning are ignored.

    Raises:
        ValueError: an argument has a value that this model does not implement.
    """
    for name, value in _FIXED_ARGS.items():
        if name in args and args[name] != value:
            raise ValueError(f"args.{name} must be {value!r}, the checkpoint has {args[name]!r}")
    names = {field.name for field in fields(PerceiverConfig)}
    return PerceiverConfig(**{name: value for name, value in args.items() if name in names})
