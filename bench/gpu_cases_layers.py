"""The calls that the GPU suites repeat and time, continued: points to rows, and the seams of the residual blocks."""

import functools
from importlib import import_module
from importlib.util import find_spec

import torch

from bench.gpu_cases import OperatorCase, Tensors

UNITS, CHANNELS, FREQUENCIES = 1024, 256, 32
# name of the table -> its rows and columns
TABLES = {"label_table": (13, 16), "source_table": (2, 2), "behind_table": (29, 8)}
LAYERS = ("weight1", "bias1", "weight2", "bias2", "gain")
DROPOUT = {"rate": 0.1, "seed": 353, "step": 7, "place": 1024}


def point_inputs(items: int, device: torch.device, *, T: int = 2048, units: int = UNITS) -> Tensors:
    """Labelled points, three quarters to all of them real, the weights of the embedding and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def whole(most: int, *size: int) -> torch.Tensor:
        return torch.randint(most, size, generator=generator)

    width = 3 + 2 * FREQUENCIES + sum(columns for _, columns in TABLES.values()) + 2
    tensors = {
        "xyz_BT3": normal(items, T, 3),
        "class_BT": whole(13, items, T).byte(),
        "source_BT": whole(2, items, T).byte(),
        "behind_BT": whole(29, items, T).byte(),
        "votes_BT2": normal(items, T, 2),
        "point_count_B": T * 3 // 4 + whole(T - T * 3 // 4 + 1, items),
        "dmemory_BTC": normal(items, T, CHANNELS),
        "frequencies_F3": 10 * normal(FREQUENCIES, 3),
        **{name: normal(*size) for name, size in TABLES.items()},
        "weight1": normal(units, width) / width**0.5,
        "bias1": normal(units),
        "weight2": normal(CHANNELS, units) / units**0.5,
        "bias2": normal(CHANNELS),
        "gain": normal(CHANNELS),
    }
    return {name: x.to(device) for name, x in tensors.items()}


def embed_points(tensors: Tensors, weights: Tensors, *, precision: str, impl: str) -> torch.Tensor:
    """Call the operator on the inputs, with `weights` in the place of the tables and layers among them."""
    points = [tensors[name] for name in ("xyz_BT3", "class_BT", "source_BT", "behind_BT", "votes_BT2")]
    settings = {"point_count_B": tensors["point_count_B"], "precision": precision, "impl": impl}
    return import_module("kernels.points").point_embedding(
        *points, frequencies_F3=tensors["frequencies_F3"], **weights, **settings
    )


def _embed(tensors: Tensors, *, precision: str) -> Tensors:
    weights = {name: tensors[name].detach().requires_grad_() for name in (*TABLES, *LAYERS)}
    memory_BTC = embed_points(tensors, weights, precision=precision, impl="triton")
    upstream = tensors["dmemory_BTC"].to(memory_BTC.dtype)
    gradients = torch.autograd.grad(memory_BTC, list(weights.values()), upstream)
    return {"memory_BTC": memory_BTC.detach(), **{f"d{n}": g for n, g in zip(weights, gradients, strict=True)}}


def seam_inputs(items: int, device: torch.device, *, T: int = 256, C: int = CHANNELS, dtype=torch.bfloat16) -> Tensors:
    """A residual stream, a branch, the norm's gain, the branch's bias, scenes and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    names = ("x_BTC", "y_BTC", "dnew_BTC", "dnormed_BTC")
    tensors = {name: torch.randn(items, T, C, generator=generator) for name in names}
    tensors |= {"gain_C": torch.rand(C, generator=generator) + 0.5, "bias_C": torch.randn(C, generator=generator)}
    tensors["scene_B"] = torch.randint(1 << 32, (items,), generator=generator)
    for name in ("y_BTC", "dnormed_BTC"):
        tensors[name] = tensors[name].to(dtype)
    return {name: x.to(device) for name, x in tensors.items()}


def _seam(tensors: Tensors) -> Tensors:
    names = ("x_BTC", "y_BTC", "gain_C", "bias_C")
    x_BTC, y_BTC, gain_C, bias_C = leaves = [tensors[name].detach().requires_grad_() for name in names]
    draws = {**DROPOUT, "scene_B": tensors["scene_B"]}
    dtype = y_BTC.dtype
    seam = import_module("kernels.residual").residual_norm(
        x_BTC, y_BTC, gain_C, bias_C=bias_C, dtype=dtype, copy=True, impl="triton", **draws
    )
    upstream = [tensors["dnew_BTC"], tensors["dnormed_BTC"]]
    gradients = torch.autograd.grad([seam.new_BTC, seam.normed_BTC], leaves, upstream)
    found = {name: x.detach() for name, x in seam._asdict().items()}
    return {**found, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


def _gelu(tensors: Tensors) -> Tensors:
    y_BTC, bias_C = (tensors[name].detach().requires_grad_() for name in ("y_BTC", "bias_C"))
    out_BTC = import_module("kernels.gelu").bias_gelu(y_BTC, bias_C, impl="triton")
    dy_BTC, dbias_C = torch.autograd.grad(out_BTC, [y_BTC, bias_C], tensors["dnormed_BTC"])
    return {"out_BTC": out_BTC.detach(), "dy_BTC": dy_BTC, "dbias_C": dbias_C}


def layer_cases() -> list[OperatorCase]:
    """The configurations of those of the operators that this checkout has."""
    # operator -> (module, configurations: name -> inputs, call, whether training launches it)
    table = {
        "point_embedding": (
            "kernels.points",
            {
                f"2048 {precision}": (point_inputs, functools.partial(_embed, precision=precision), precision == "bf16")
                for precision in ("bf16", "tf32", "ieee")
            },
        ),
        "residual_norm": (
            "kernels.residual",
            {
                "256x256 bf16": (seam_inputs, _seam, True),
                "256x256 fp32": (functools.partial(seam_inputs, dtype=torch.float32), _seam, False),
            },
        ),
        "bias_gelu": (
            "kernels.gelu",
            {
                "256x1024 bf16": (functools.partial(seam_inputs, C=UNITS), _gelu, True),
                "256x1024 fp32": (functools.partial(seam_inputs, C=UNITS, dtype=torch.float32), _gelu, False),
            },
        ),
    }
    return [
        OperatorCase(operator=operator, name=name, make=make, solve=solve, trained=trained)
        for operator, (module, configurations) in table.items()
        if find_spec(module)
        for name, (make, solve, trained) in configurations.items()
    ]
