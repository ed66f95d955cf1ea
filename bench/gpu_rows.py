"""What the GPU suites time: problems at the model's shapes, whom they are put to, and the truth in float64.

Errors are relative to the largest true value of their tensor; truths are computed in blocks of items. Inputs are built
for the groups that are wanted only.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import EPS, ITERATIONS, Tensors, attention_inputs, segment_inputs, transport_inputs
from bench.gpu_cases_layers import LAYERS as LAYER_WEIGHTS
from bench.gpu_cases_layers import TABLES, embed_points, point_inputs
from bench.peers import Peer, attention_peers, balanced_peers, dustbin_peers, matching_peers, with_compile
from kernels.attention import gqa_attention, gqa_attention_reference
from kernels.matching import match_segments, match_segments_reference
from kernels.sinkhorn import sinkhorn, sinkhorn_reference

OURS = "ridgeline"
PASSES = ("forward and backward", "forward")
_TRUTH_ITEMS = 8
# what a call gives is right up to this error, relative to the largest true value
BF16_TOLERANCE, FP32_TOLERANCE, POINTS_TOLERANCE, BALANCED_TOLERANCE = 3e-2, 1e-4, 5e-2, 1e-2
# iterations of balanced problems: of the truth, and of those that 20 do not bring within the tolerance
CONVERGED, MORE = 200, {"GeomLoss": 200}
Wanted = Callable[[str], bool]
# name -> (items, shape of the inputs)
Shapes = Mapping[str, tuple[int, Mapping[str, Any]]]
ATTENTION: Shapes = {
    "cross 256x2048": (32, {"T": 256, "S": 2048, "limit": "count"}),
    "cross 256x4096": (64, {"T": 256, "S": 4096, "limit": "count"}),
    "self 256x256": (32, {"T": 256, "S": 256}),
    "decoder 64x256": (32, {"T": 64, "S": 256}),
}
# name -> (items, points)
LAYERS = {"32 x 2048": (32, 2048), "64 x 4096": (64, 4096)}
TRANSPORT: Shapes = {"64x64": (64, {"N": 64, "M": 64}), "512x512": (8, {"N": 512, "M": 512})}
MATCHING_SETTINGS = {"eps": EPS, "iterations": ITERATIONS, "cost_scale": 5.0, "dustbin": 0.3, "direction_weight": 0.3}
TRANSPORT_SETTINGS = {"eps": EPS, "iterations": ITERATIONS, "dustbin": 1.5}


def every_group(group: str) -> bool:
    """All groups are wanted."""
    return True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What all peers of a row compute.

    Args:
        group: the table of the rows.
        leaves: what gradients are asked for; results are outputs, then their gradients in the backward pass.
        finish: results from the peer's call.
        truth: the results in float64.
    """

    suite: str
    group: str
    leaves: Sequence[Tensor]
    finish: Callable[[Callable[..., Any]], list[Tensor]]
    truth: Callable[[], list[Tensor]]
    tolerance: float
    notes: dict[str, Any] = field(default_factory=dict)


def attention_rows(
    device: torch.device, wanted: Wanted = every_group, shapes: Shapes = ATTENTION
) -> Iterator[tuple[Problem, list[Peer]]]:
    """Attention in bfloat16 at the model's shapes."""
    ours = Peer(name=OURS, solve=lambda *x: gqa_attention(*x[:4], key_count_B=x[4]), package=None)
    for (name, (items, shape)), passes in itertools.product(shapes.items(), PASSES):
        if not wanted(group := f"attention, {name}, {passes}"):
            continue
        tensors = attention_inputs(items, device, **shape)
        leaves = [tensors[n] for n in ("q_BHTD", "k_BGSD", "v_BGSD", "log_scale_H")]
        count_B = tensors.get("key_count_B")
        mask_BS = None if count_B is None else torch.arange(shape["S"], device=device) < count_B[:, None]

        def finish(solve, leaves=leaves, rest=(count_B, mask_BS), do=tensors["do_BHTD"]) -> list[Tensor]:
            o_BHTD = solve(*leaves, *rest)
            return [o_BHTD, *(torch.autograd.grad(o_BHTD, leaves, do) if leaves[0].requires_grad else ())]

        yield (
            Problem(
                suite="attention",
                group=group,
                leaves=leaves,
                finish=finish,
                truth=functools.partial(_attention_truth, tensors, passes),
                tolerance=BF16_TOLERANCE,
                notes={"items": items, "queries": shape["T"], "keys": shape["S"], "dtype": "bfloat16"},
            ),
            [ours, *attention_peers()],
        )


def _attention_truth(tensors: Tensors, passes: str) -> list[Tensor]:
    """Output and gradients in float64, a few items at a time; the gradient of log_scale is their sum."""
    blocks = []
    for first in range(0, len(tensors["q_BHTD"]), _TRUTH_ITEMS):
        part = {n: x[first : first + _TRUTH_ITEMS] if "_B" in n else x for n, x in tensors.items()}
        leaves = [part[n].detach().double().requires_grad_() for n in ("q_BHTD", "k_BGSD", "v_BGSD", "log_scale_H")]
        o_BHTD = gqa_attention_reference(*leaves, key_count_B=part.get("key_count_B"))
        gradients = torch.autograd.grad(o_BHTD, leaves, part["do_BHTD"].double()) if passes != "forward" else ()
        blocks.append([o_BHTD.detach(), *gradients])
    columns = list(zip(*blocks, strict=True))
    return [*(torch.cat(column) for column in columns[:4]), *(torch.stack(column).sum(0) for column in columns[4:])]


def sinkhorn_rows(
    device: torch.device, wanted: Wanted = every_group, shapes: Shapes = TRANSPORT
) -> Iterator[tuple[Problem, list[Peer]]]:
    """The plan of ragged problems with a dustbin, and its exact gradient."""

    def solve(cost_BNM: Tensor, cols_B: Tensor) -> Tensor:
        return sinkhorn(cost_BNM, cols_B=cols_B, **TRANSPORT_SETTINGS).plan_BNM

    for (name, (items, shape)), passes in itertools.product(shapes.items(), PASSES):
        if not wanted(group := f"sinkhorn, {name}, {passes}"):
            continue
        tensors = transport_inputs(items, device, **shape)
        cost_BNM, cols_B, upstream_BNM = (tensors[n] for n in ("cost_BNM", "cols_B", "dplan_BNM"))

        def finish(solve, cost_BNM=cost_BNM, cols_B=cols_B, upstream_BNM=upstream_BNM) -> list[Tensor]:
            plan = solve(cost_BNM, cols_B)
            return [plan, *(torch.autograd.grad(plan, cost_BNM, upstream_BNM) if cost_BNM.requires_grad else ())]

        def truth(cost_BNM=cost_BNM, cols_B=cols_B, upstream_BNM=upstream_BNM, passes=passes) -> list[Tensor]:
            cost = cost_BNM.detach().double().requires_grad_()
            plan = sinkhorn_reference(cost, cols_B=cols_B, **TRANSPORT_SETTINGS).plan_BNM
            return [plan.detach(), *(torch.autograd.grad(plan, cost, upstream_BNM) if passes != "forward" else ())]

        yield (
            Problem(
                suite="sinkhorn",
                group=group,
                leaves=[cost_BNM],
                finish=finish,
                truth=truth,
                tolerance=FP32_TOLERANCE,
                notes={"items": items, "rows": shape["N"], "cols": shape["M"], "dtype": "float32"},
            ),
            [Peer(name=OURS, solve=solve, package=None), *dustbin_peers(**TRANSPORT_SETTINGS)],
        )


def matching_rows(
    device: torch.device, wanted: Wanted = every_group, items: int = 64
) -> Iterator[tuple[Problem, list[Peer]]]:
    """The matching loss with plan gradients detached, as in training, then exact (both passes only)."""
    ours = Peer(name=OURS, solve=functools.partial(match_segments, **MATCHING_SETTINGS), package=None)
    for plan_gradient, passes in (("detached", PASSES[0]), ("detached", PASSES[1]), ("exact", PASSES[0])):
        if not wanted(group := f"match_segments, 64x64, {plan_gradient}, {passes}"):
            continue
        tensors = segment_inputs(items, device)
        leaves = [tensors[n] for n in ("mid_BN3", "dir_BN3", "len_BN")]
        rest = [tensors[n] for n in ("gt_BM23", "count_B", "dtransport_B", "dendpoint_B")]
        settings = MATCHING_SETTINGS | {"plan_gradient": plan_gradient}

        def finish(solve, leaves=leaves, rest=rest, plan_gradient=plan_gradient) -> list[Tensor]:
            return _losses_and_gradients(functools.partial(solve, plan_gradient=plan_gradient), leaves, rest)

        def truth(leaves=leaves, rest=rest, settings=settings, passes=passes) -> list[Tensor]:
            exact = [x.detach().double().requires_grad_(passes != "forward") for x in leaves]
            reference = functools.partial(match_segments_reference, **settings)
            return _losses_and_gradients(reference, exact, [rest[0].double(), *rest[1:]])

        yield (
            Problem(
                suite="matching",
                group=group,
                leaves=leaves,
                finish=finish,
                truth=truth,
                tolerance=FP32_TOLERANCE,
                notes={"items": items, "rows": 64, "cols": 64, "dtype": "float32"},
            ),
            [ours, *matching_peers(**MATCHING_SETTINGS)],
        )


def point_rows(
    device: torch.device, wanted: Wanted = every_group, sizes: Mapping[str, tuple[int, int]] = LAYERS
) -> Iterator[tuple[Problem, list[Peer]]]:
    """Points to rows in bfloat16, against PyTorch's layers under autocast, features included."""
    for (name, (items, points)), passes in itertools.product(sizes.items(), PASSES):
        if not wanted(group := f"point_embedding, {name}, {passes}"):
            continue
        tensors = point_inputs(items, device, T=points)
        weights = {n: tensors[n] for n in (*TABLES, *LAYER_WEIGHTS)}

        def finish(solve, tensors=tensors, weights=weights) -> list[Tensor]:
            memory_BTC = solve(tensors, weights)
            upstream = tensors["dmemory_BTC"].to(memory_BTC.dtype)
            leaves = list(weights.values())
            return [memory_BTC, *(torch.autograd.grad(memory_BTC, leaves, upstream) if leaves[0].requires_grad else ())]

        yield (
            Problem(
                suite="points",
                group=group,
                leaves=list(weights.values()),
                finish=finish,
                truth=functools.partial(_embedding_truth, tensors, passes),
                tolerance=POINTS_TOLERANCE,
                notes={"items": items, "points": points, "dtype": "bfloat16"},
            ),
            _point_peers(),
        )


def _point_peers() -> list[Peer]:
    ours = Peer(name=OURS, solve=functools.partial(embed_points, precision="bf16", impl="triton"), package=None)
    eager = Peer(name="eager", solve=functools.partial(embed_points, precision="bf16", impl="eager"))
    return [ours, eager, with_compile(eager)]


def _embedding_truth(tensors: Tensors, passes: str) -> list[Tensor]:
    """Rows and the gradients of weights in float64, a few items at a time."""
    rows, sums = [], []
    for first in range(0, len(tensors["xyz_BT3"]), _TRUTH_ITEMS):
        part = {n: x[first : first + _TRUTH_ITEMS] if "_B" in n else x for n, x in tensors.items()}
        part = {n: x.double() if x.is_floating_point() else x for n, x in part.items()}
        weights = {n: part[n].detach().requires_grad_() for n in (*TABLES, *LAYER_WEIGHTS)}
        memory_BTC = embed_points(part, weights, precision="ieee", impl="eager")
        rows.append(memory_BTC.detach())
        if passes != "forward":
            sums.append(torch.autograd.grad(memory_BTC, list(weights.values()), part["dmemory_BTC"]))
    return [torch.cat(rows), *(torch.stack(column).sum(0) for column in zip(*sums, strict=True))]


def _losses_and_gradients(solve: Callable[..., Any], leaves: Sequence[Tensor], rest: Sequence[Tensor]) -> list[Tensor]:
    transport_B, endpoint_B, matched_BN = solve(*leaves, *rest[:2])[:3]
    values = [transport_B, endpoint_B, matched_BN]
    if not leaves[0].requires_grad:
        return values
    upstream = [weight_B.to(transport_B.dtype) for weight_B in rest[2:]]
    gradients = torch.autograd.grad([transport_B, endpoint_B], leaves, upstream)
    return [*(value.detach() for value in values), *gradients]


def balanced_rows(
    device: torch.device, wanted: Wanted = every_group, items: int = 64, size: int = 64
) -> Iterator[tuple[Problem, list[Peer]]]:
    """Plans of dense problems without a dustbin, by packages that solve no others; each near the converged plan."""
    if not wanted(group := "sinkhorn, balanced and dense, forward"):
        return
    generator = torch.Generator().manual_seed(0)
    x_BN3, y_BM3 = torch.rand(2, items, size, 3, generator=generator).to(device)
    cost_BNM = (x_BN3[:, :, None] - y_BM3[:, None]).square().sum(3)

    def finish(solve) -> list[Tensor]:
        return [solve(x_BN3, y_BM3, cost_BNM, EPS)]

    def truth() -> list[Tensor]:
        return [sinkhorn_reference(cost_BNM.double(), eps=EPS, iterations=CONVERGED).plan_BNM]

    yield (
        Problem(
            suite="sinkhorn",
            group=group,
            leaves=[cost_BNM],
            finish=finish,
            truth=truth,
            tolerance=BALANCED_TOLERANCE,
            notes={"items": items, "rows": size, "cols": size, "dtype": "float32"},
        ),
        [
            Peer(name=OURS, solve=functools.partial(_balanced, iterations=ITERATIONS), package=None),
            *(
                replace(peer, solve=functools.partial(peer.solve, iterations=MORE.get(peer.name, ITERATIONS)))
                for peer in balanced_peers()
            ),
        ],
    )


def _balanced(x_BND: Tensor, y_BMD: Tensor, cost_BNM: Tensor, eps: float, iterations: int) -> Tensor:
    return sinkhorn(cost_BNM, eps=eps, iterations=iterations).plan_BNM


def transport_rows(device: torch.device, wanted: Wanted = every_group) -> Iterator[tuple[Problem, list[Peer]]]:
    """All that `sinkhorn` is put to."""
    return itertools.chain(sinkhorn_rows(device, wanted), balanced_rows(device, wanted))


SUITES: dict[str, Callable[..., Iterator[tuple[Problem, list[Peer]]]]] = {
    "attention": attention_rows,
    "sinkhorn": transport_rows,
    "matching": matching_rows,
    "points": point_rows,
}
