"""The calls that the GPU suites repeat and time, continued: what a step launches beside attention and matching."""

import functools
import math

import torch

from bench.gpu_cases import OperatorCase, Tensors, segment_inputs
from kernels.adamw import adamw
from kernels.attention_columns import KeyValueColumns
from kernels.gather import gather_rows
from kernels.gelu import bias_gelu
from kernels.heads import segment_heads
from kernels.loss_terms import loss_terms
from kernels.matching import match_segments
from kernels.points import point_embedding
from kernels.residual import residual_norm
from kernels.turn import turn

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
    return point_embedding(*points, frequencies_F3=tensors["frequencies_F3"], **weights, **settings)


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
    seam = residual_norm(x_BTC, y_BTC, gain_C, bias_C=bias_C, dtype=dtype, copy=True, impl="triton", **draws)
    upstream = [tensors["dnew_BTC"], tensors["dnormed_BTC"]]
    assert seam.normed_BTC is not None
    gradients = torch.autograd.grad([seam.new_BTC, seam.normed_BTC], leaves, upstream)
    found = {name: x.detach() for name, x in seam._asdict().items()}
    return {**found, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


def _gelu(tensors: Tensors) -> Tensors:
    y_BTC, bias_C = (tensors[name].detach().requires_grad_() for name in ("y_BTC", "bias_C"))
    out_BTC = bias_gelu(y_BTC, bias_C, impl="triton")
    dy_BTC, dbias_C = torch.autograd.grad(out_BTC, [y_BTC, bias_C], tensors["dnormed_BTC"])
    return {"out_BTC": out_BTC.detach(), "dy_BTC": dy_BTC, "dbias_C": dbias_C}


def head_inputs(items: int, device: torch.device, *, N: int = 64, C: int = CHANNELS) -> Tensors:
    """Rows of queries, the layers and offsets of the heads, and upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x_BNC": (items, N, C),
        "weight_7C": (7, C),
        "bias_7": (7,),
        "conf_weight_1C": (1, C),
        "conf_bias_1": (1,),
        "offsets_N23": (N, 2, 3),
        "dmid_BN3": (items, N, 3),
        "ddir_BN3": (items, N, 3),
        "dlen_BN": (items, N),
        "dconf_BN": (items, N),
    }
    return {name: torch.randn(*shape, generator=generator).to(device) for name, shape in shapes.items()}


def _heads(tensors: Tensors) -> Tensors:
    outputs = ("mid_BN3", "dir_BN3", "len_BN", "conf_BN")
    upstream = {name: tensors[f"d{name}"] for name in outputs}
    names = [name for name in tensors if name.removeprefix("d") not in upstream]
    leaves = [tensors[name].detach().requires_grad_() for name in names]
    found = dict(zip(outputs, segment_heads(*leaves, impl="triton"), strict=True))
    gradients = torch.autograd.grad(list(found.values()), leaves, list(upstream.values()))
    found = {name: output.detach() for name, output in found.items()}
    return {**found, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


def column_inputs(items: int, device: torch.device, *, T: int = 256, S: int = 2048) -> Tensors:
    """Queries of two attentions, the product with the keys and values of both, and upstream gradients; bfloat16."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, width = 4, 2, 64
    tensors = {
        name: torch.randn(items, heads, T, width, generator=generator).bfloat16()
        for name in ("first_BHTD", "second_BHTD", "dfirst_BHTD", "dsecond_BHTD")
    }
    tensors["kv_BSX"] = torch.randn(items, S, 4 * kv_heads * width, generator=generator).bfloat16()
    tensors["count_B"] = S * 3 // 4 + torch.randint(S - S * 3 // 4 + 1, (items,), generator=generator)
    tensors["log_scale_H"] = torch.full((heads,), math.log(width) / 2)
    return {name: x.to(device) for name, x in tensors.items()}


def _attend_columns(tensors: Tensors) -> Tensors:
    names = ("first_BHTD", "second_BHTD", "kv_BSX", "log_scale_H")
    first_BHTD, second_BHTD, kv_BSX, log_scale_H = leaves = [tensors[n].detach().requires_grad_() for n in names]
    columns = KeyValueColumns(kv_BSX)
    settings = {"kv_heads": 2, "key_count_B": tensors["count_B"]}
    outputs = [columns.attend(q_BHTD, log_scale_H, **settings) for q_BHTD in (first_BHTD, second_BHTD)]
    gradients = torch.autograd.grad(outputs, leaves, [tensors["dfirst_BHTD"], tensors["dsecond_BHTD"]])
    found = {f"o{i}_BHTD": o_BHTD.detach() for i, o_BHTD in enumerate(outputs)}
    return {**found, **{f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


def turn_inputs(items: int, device: torch.device) -> Tensors:
    """Points, segments and scenes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "xyz_BT3": torch.randn(items, 2048, 3, generator=generator),
        "gt_BM23": torch.randn(items, 64, 2, 3, generator=generator),
        "scene_B": torch.randint(1 << 32, (items,), generator=generator),
    }
    return {name: x.to(device) for name, x in tensors.items()}


def _turn(tensors: Tensors) -> Tensors:
    xyz_BT3, gt_BM23 = turn(
        tensors["xyz_BT3"], tensors["gt_BM23"], tensors["scene_B"], seed=DROPOUT["seed"], step=7, impl="triton"
    )
    return {"xyz_BT3": xyz_BT3, "gt_BM23": gt_BM23}


def _loss_terms(tensors: Tensors, *, target: str) -> Tensors:
    mid_BN3, dir_BN3, len_BN = (tensors[name] for name in ("mid_BN3", "dir_BN3", "len_BN"))
    match = match_segments(mid_BN3, dir_BN3, len_BN, tensors["gt_BM23"], tensors["count_B"], impl="triton")
    # anything will do for a logit
    transport_B, endpoint_B, conf_BN = leaves = [
        x.detach().requires_grad_() for x in (match.transport_B, match.endpoint_B, 4 * mid_BN3[:, :, 0])
    ]
    loss = loss_terms(
        transport_B, endpoint_B, match.matched_BN, match.partner_BN, conf_BN, tensors["count_B"], conf_weight=0.1,
        endpoint_weight=0.5, conf_target=target, impl="triton",
    )  # fmt: skip
    gradients = torch.autograd.grad(loss.total, leaves)
    found = {name: x.detach() for name, x in loss._asdict().items()}
    # means over the batch: an item alone has others
    return {**found, **dict(zip(("dtransport", "dendpoint", "dconf"), gradients, strict=True))}


def weight_inputs(items: int, device: torch.device) -> Tensors:
    """Weights of a layer's sizes, their gradients and moments; `items` does not matter."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1024, 256), (256, 1024), (1024,), (256,), (4,), (1,)) * 4
    return {
        f"{name}{i}": torch.rand(size, generator=generator).to(device)
        for name in ("p", "g", "m", "v")
        for i, size in enumerate(sizes)
    }


def _adamw(tensors: Tensors) -> Tensors:
    count = len(tensors) // 4
    p, g, m, v = ([tensors[f"{name}{i}"].clone() for i in range(count)] for name in ("p", "g", "m", "v"))
    steps = [torch.full((), 7.0, device=x.device) for x in p]
    lr = torch.full((), 1e-3, device=p[0].device)
    norm = adamw(p, g, m, v, steps, lr=lr, decays=[0.01] * count, limit=1.0, impl="triton")
    changed = {f"{name}{i}": x for name, xs in (("p", p), ("m", m), ("v", v)) for i, x in enumerate(xs)}
    return changed | {"norm": norm.reshape(1), "steps": torch.stack(steps)}


def rows_inputs(items: int, device: torch.device) -> Tensors:
    """A set of points, classes, segments and counts; and which of its rows to gather."""
    generator = torch.Generator().manual_seed(0)
    rows = 64
    tensors = {
        "xyz_RT3": torch.randn(rows, 2048, 3, generator=generator),
        "class_RT": torch.randint(13, (rows, 2048), generator=generator).byte(),
        "gt_RM23": torch.randn(rows, 64, 2, 3, generator=generator),
        "point_count_R": torch.randint(2048, (rows,), generator=generator).int(),
        "index_B": torch.randint(rows, (items,), generator=generator),
    }
    return {name: x.to(device) for name, x in tensors.items()}


def _gather(tensors: Tensors) -> Tensors:
    names = ("xyz_RT3", "class_RT", "gt_RM23", "point_count_R")
    gathered = gather_rows([tensors[name] for name in names], tensors["index_B"], impl="triton")
    return {name.replace("_R", "_B"): x for name, x in zip(names, gathered, strict=True)}


def layer_cases() -> list[OperatorCase]:
    """The configurations of these operators."""
    single = {"dtype": torch.float32}
    # operator, name, inputs, call, whether training launches it
    table = [
        *(
            ("point_embedding", f"2048 {kind}", point_inputs, functools.partial(_embed, precision=kind), kind == "bf16")
            for kind in ("bf16", "tf32", "ieee")
        ),
        ("residual_norm", "256x256 bf16", seam_inputs, _seam, True),
        ("residual_norm", "256x256 fp32", functools.partial(seam_inputs, **single), _seam, False),
        ("bias_gelu", "256x1024 bf16", functools.partial(seam_inputs, C=UNITS), _gelu, True),
        ("bias_gelu", "256x1024 fp32", functools.partial(seam_inputs, C=UNITS, **single), _gelu, False),
        ("segment_heads", "64x256 fp32", head_inputs, _heads, True),
        ("attention columns", "2 x 256x2048 bf16", column_inputs, _attend_columns, True),
        ("gather_rows", "2048", rows_inputs, _gather, True),
        ("turn", "2048 fp32", turn_inputs, _turn, True),
        ("loss_terms", "64x64 mass", segment_inputs, functools.partial(_loss_terms, target="mass"), True),
        ("loss_terms", "64x64 partner", segment_inputs, functools.partial(_loss_terms, target="partner"), False),
        ("adamw", "24 tensors fp32", weight_inputs, _adamw, True),
    ]
    return [
        OperatorCase(operator=operator, name=name, make=make, solve=solve, trained=trained)
        for operator, name, make, solve, trained in table
    ]
