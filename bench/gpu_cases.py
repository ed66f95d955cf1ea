"""The calls that the GPU suites repeat and time: operators at the model's shapes, forward and backward.

Inputs and results are named by the repository's alphabet: a name with `_B` has the items first, one after the other.
A new operator is one more line in `bench.gpu_repeats.cases`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import gqa_attention
from kernels.matching import match_segments
from kernels.sinkhorn import sinkhorn

HEADS, KV_HEADS, WIDTH = 4, 2, 64
EPS, ITERATIONS = 0.1, 20
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OperatorCase:
    """One configuration of an operator.

    Args:
        make: inputs for a number of items, upstream gradients among them, on a device.
        solve: outputs and gradients by name, from those inputs.
        items: how many the bitwise sweep takes.
        trained: whether training launches it; fresh processes recompile those only.
    """

    operator: str
    name: str
    make: Callable[[int, torch.device], Tensors]
    solve: Callable[[Tensors], Tensors]
    items: int = 8
    trained: bool = False


def item(tensors: Tensors, number: int) -> Tensors:
    """One item of inputs or results; what belongs to no item is left as it is."""
    return {name: x[number : number + 1] if "_B" in name else x for name, x in tensors.items()}


def attention_inputs(
    items: int,
    device: torch.device,
    *,
    T: int,
    S: int,
    D: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    limit: str | None = None,
) -> Tensors:
    """Queries, keys and values in a projection's layout; limit: "count", "mask" or None for all keys."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q_BHTD": (T, HEADS), "k_BGSD": (S, KV_HEADS), "v_BGSD": (S, KV_HEADS), "do_BHTD": (T, HEADS)}
    tensors = {
        name: torch.randn(items, n, heads, D, generator=generator).to(device, dtype).transpose(1, 2)
        for name, (n, heads) in sizes.items()
    }
    tensors["log_scale_H"] = torch.full((HEADS,), math.log(D) / 2, device=device)
    if limit == "count":
        tensors["key_count_B"] = torch.randint(S * 3 // 4, S + 1, (items,), generator=generator).to(device)
    if limit == "mask":
        tensors["key_mask_BS"] = (torch.rand(items, S, generator=generator) > 0.3).to(device)
    return tensors


def _attend(tensors: Tensors, **options) -> Tensors:
    keys = {name: x for name, x in tensors.items() if name.startswith("key_")}
    leaves = [tensors[n].detach().requires_grad_() for n in ("q_BHTD", "k_BGSD", "v_BGSD", "log_scale_H")]
    o_BHTD = gqa_attention(*leaves, **keys, **options, impl="triton")
    gradients = torch.autograd.grad(o_BHTD, leaves, tensors["do_BHTD"])
    names = ("dq_BHTD", "dk_BGSD", "dv_BGSD", "dlog_scale_H")
    return {"o_BHTD": o_BHTD.detach(), **dict(zip(names, gradients, strict=True))}


def transport_inputs(items: int, device: torch.device, *, N: int, M: int) -> Tensors:
    """Costs of up to 5, three quarters to all of the columns real, and upstream gradients of the three results."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "cost_BNM": 5 * torch.rand(items, N, M, generator=generator),
        "cols_B": torch.randint(M * 3 // 4, M + 1, (items,), generator=generator),
        "dplan_BNM": torch.randn(items, N, M, generator=generator),
        "drow_BN": torch.randn(items, N, generator=generator),
        "dcol_BM": torch.randn(items, M, generator=generator),
        "dustbin": torch.tensor(1.5),
    }
    return {name: x.to(device) for name, x in tensors.items()}


def _transport(tensors: Tensors, *, dustbin: bool = True, **options) -> Tensors:
    cost_BNM, bin_cost = (tensors[name].detach().requires_grad_() for name in ("cost_BNM", "dustbin"))
    plan = sinkhorn(
        cost_BNM, cols_B=tensors["cols_B"], dustbin=bin_cost if dustbin else None, eps=EPS, iterations=ITERATIONS,
        impl="triton", **options,
    )  # fmt: skip
    count, leaves = (3, [cost_BNM, bin_cost]) if dustbin else (1, [cost_BNM])
    upstream = [tensors[name] for name in ("dplan_BNM", "drow_BN", "dcol_BM")][:count]
    gradients = torch.autograd.grad(list(plan[:count]), leaves, upstream)
    results = {name: x.detach() for name, x in plan._asdict().items()}
    return {**results, **dict(zip(("dcost_BNM", "ddustbin"), gradients, strict=False))}


def segment_inputs(items: int, device: torch.device, *, N: int = 64, M: int = 64) -> Tensors:
    """Predictions, half of them near true segments, 15 to M of which are real; upstream gradients of both losses."""
    generator = torch.Generator().manual_seed(0)
    gt_BM23 = torch.rand(items, M, 2, 3, generator=generator) - 0.5
    ends_BN23 = torch.rand(items, N, 2, 3, generator=generator) - 0.5
    near = min(N // 2, M)
    ends_BN23[:, :near] = gt_BM23[:, :near] + 0.1 * ends_BN23[:, :near]
    along_BN3 = ends_BN23[:, :, 1] - ends_BN23[:, :, 0]
    len_BN = along_BN3.norm(dim=2)
    tensors = {
        "mid_BN3": ends_BN23.mean(2),
        "dir_BN3": along_BN3 / len_BN[:, :, None],
        "len_BN": len_BN,
        "gt_BM23": gt_BM23,
        "count_B": torch.randint(min(15, M), M + 1, (items,), generator=generator),
        "dtransport_B": torch.rand(items, generator=generator),
        "dendpoint_B": torch.rand(items, generator=generator),
    }
    return {name: x.to(device) for name, x in tensors.items()}


def _match(tensors: Tensors, **options) -> Tensors:
    mid, dir_, length = (tensors[name].detach().requires_grad_() for name in ("mid_BN3", "dir_BN3", "len_BN"))
    truth = tensors["gt_BM23"], tensors["count_B"]
    match = match_segments(mid, dir_, length, *truth, iterations=ITERATIONS, impl="triton", **options)
    losses, upstream = [match.transport_B, match.endpoint_B], [tensors["dtransport_B"], tensors["dendpoint_B"]]
    gradients = torch.autograd.grad(losses, [mid, dir_, length], upstream)
    results = {name: x.detach() for name, x in match._asdict().items()}
    return {**results, **dict(zip(("dmid_BN3", "ddir_BN3", "dlen_BN"), gradients, strict=True))}


def _attention_cases() -> list[OperatorCase]:
    shapes = {
        "cross 256x2048": {"T": 256, "S": 2048, "limit": "count"},
        "self 256x256": {"T": 256, "S": 256},
        "decoder 64x256": {"T": 64, "S": 256},
        "decoder 64x64": {"T": 64, "S": 64},
    }
    # name -> (shape, inputs' changes, options, whether training launches it)
    table = {f"{name} bf16": (shape, {}, {}, True) for name, shape in shapes.items()}
    for name in ("cross 256x2048", "self 256x256"):
        for precision in ("tf32", "ieee"):
            wide = {"dtype": torch.float32}
            table[f"{name} {precision}"] = (shapes[name], wide, {"precision": precision}, False)
    cross = shapes["cross 256x2048"]
    table |= {
        "cross 256x4096 bf16": (cross | {"S": 4096}, {}, {}, False),
        "cross 256x2048 bf16 split": (cross, {}, {"split": 4}, False),
        "cross 256x2048 bf16 mask": (cross, {"limit": "mask"}, {}, False),
        "cross 256x2048 bf16 online": (cross, {}, {"softmax": "online"}, False),
        "cross 256x2048 fp16": (cross, {"dtype": torch.float16}, {}, False),
    }
    return [
        OperatorCase(
            operator="gqa_attention",
            name=name,
            make=functools.partial(attention_inputs, **shape | changes),
            solve=functools.partial(_attend, **options),
            trained=trained,
        )
        for name, (shape, changes, options, trained) in table.items()
    ]


def _sinkhorn_cases() -> list[OperatorCase]:
    # name -> (size, options)
    table = {
        "512x512": ((512, 512), {}),
        **{
            f"64x64 {slack} {path}": ((64, 64), {"slack": slack, "_path": path})
            for slack in ("full", "minimal")
            for path in ("auto", "log")
        },
        "64x64 no bin": ((64, 64), {"dustbin": False}),
        "100x128": ((100, 128), {}),
    }
    return [
        OperatorCase(
            operator="sinkhorn",
            name=name,
            make=functools.partial(transport_inputs, N=N, M=M),
            solve=functools.partial(_transport, **options),
        )
        for name, ((N, M), options) in table.items()
    ]


def _matching_cases() -> list[OperatorCase]:
    return [
        OperatorCase(
            operator="match_segments",
            name=f"64x64 {slack} {gradient}",
            make=segment_inputs,
            solve=functools.partial(_match, slack=slack, plan_gradient=gradient),
            items=64,
            trained=slack == "full" and gradient == "detached",
        )
        for slack in ("full", "minimal")
        for gradient in ("detached", "exact")
    ]


def core_cases() -> list[OperatorCase]:
    """The configurations of Sinkhorn, matching and attention, in the order in which they are repeated."""
    return [*_sinkhorn_cases(), *_matching_cases(), *_attention_cases()]
