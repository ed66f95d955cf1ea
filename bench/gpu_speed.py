"""Operators on the GPU against their peers: device time of every row that first showed the right result.

Rows come in the order of what matters if the time runs out: ours, peers as they are, peers that must be compiled.
Errors are relative to the largest true value of their tensor, against float64 computed in blocks of items.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import EPS, ITERATIONS, Tensors, attention_inputs, segment_inputs, transport_inputs
from bench.gpu_cases_layers import LAYERS as LAYER_WEIGHTS
from bench.gpu_cases_layers import TABLES, embed_points, point_inputs
from bench.gpu_clock import measure
from bench.gpu_process import Sheet, end_on_sigterm, note, share, side_by_side
from bench.gpu_repeats import words
from bench.measure import largest_error
from bench.peers import Peer, attention_peers, dustbin_peers, matching_peers, with_compile
from kernels.attention import gqa_attention, gqa_attention_reference
from kernels.matching import match_segments, match_segments_reference
from kernels.sinkhorn import sinkhorn, sinkhorn_reference

PASSES = ("forward and backward", "forward")
BIT_REPEATS = 20
_TRUTH_ITEMS, _PROCESSES = 8, 12
# share of the time left after our own rows that compiling the others' may take
AHEAD = 0.5
OURS = "ridgeline"
# what a call gives is right up to this error, relative to the largest true value
BF16_TOLERANCE, FP32_TOLERANCE, POINTS_TOLERANCE = 3e-2, 1e-4, 5e-2
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


def attention_rows(device: torch.device, shapes: Shapes = ATTENTION) -> Iterator[tuple[Problem, list[Peer]]]:
    """Attention in bfloat16 at the model's shapes."""
    ours = Peer(name=OURS, solve=lambda *x: gqa_attention(*x[:4], key_count_B=x[4]), package=None)
    for (name, (items, shape)), passes in itertools.product(shapes.items(), PASSES):
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
                group=f"attention, {name}, {passes}",
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


def sinkhorn_rows(device: torch.device, shapes: Shapes = TRANSPORT) -> Iterator[tuple[Problem, list[Peer]]]:
    """The plan of ragged problems with a dustbin, and its exact gradient."""

    def solve(cost_BNM: Tensor, cols_B: Tensor) -> Tensor:
        return sinkhorn(cost_BNM, cols_B=cols_B, **TRANSPORT_SETTINGS).plan_BNM

    for (name, (items, shape)), passes in itertools.product(shapes.items(), PASSES):
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
                group=f"sinkhorn, {name}, {passes}",
                leaves=[cost_BNM],
                finish=finish,
                truth=truth,
                tolerance=FP32_TOLERANCE,
                notes={"items": items, "rows": shape["N"], "cols": shape["M"], "dtype": "float32"},
            ),
            [Peer(name=OURS, solve=solve, package=None), *dustbin_peers(**TRANSPORT_SETTINGS)],
        )


def matching_rows(device: torch.device, items: int = 64) -> Iterator[tuple[Problem, list[Peer]]]:
    """The matching loss with plan gradients detached, as in training, then exact (both passes only)."""
    ours = Peer(name=OURS, solve=functools.partial(match_segments, **MATCHING_SETTINGS), package=None)
    for plan_gradient, passes in (("detached", PASSES[0]), ("detached", PASSES[1]), ("exact", PASSES[0])):
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
                group=f"match_segments, 64x64, {plan_gradient}, {passes}",
                leaves=leaves,
                finish=finish,
                truth=truth,
                tolerance=FP32_TOLERANCE,
                notes={"items": items, "rows": 64, "cols": 64, "dtype": "float32"},
            ),
            [ours, *matching_peers(**MATCHING_SETTINGS)],
        )


def point_rows(
    device: torch.device, sizes: Mapping[str, tuple[int, int]] = LAYERS
) -> Iterator[tuple[Problem, list[Peer]]]:
    """Points to rows in bfloat16, against PyTorch's layers under autocast, features included."""
    for (name, (items, points)), passes in itertools.product(sizes.items(), PASSES):
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
                group=f"point_embedding, {name}, {passes}",
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


SUITES = {
    "attention": attention_rows,
    "sinkhorn": sinkhorn_rows,
    "matching": matching_rows,
    "points": point_rows,
}


def ordered(rows: Iterable[tuple[Problem, list[Peer]]]) -> list[tuple[Problem, Peer]]:
    """All rows: ours first, and last those that must be compiled, of which Flex is the fastest."""
    pairs = [(problem, peer) for problem, peers in rows for peer in peers if not peer.graph]
    return sorted(pairs, key=lambda pair: (pair[1].name != OURS, pair[1].compiled, not pair[1].name.startswith("flex")))


def time_rows(
    pairs: Sequence[tuple[Problem, Peer]],
    sheet: Sheet,
    device: torch.device,
    seconds: float,
    compile_ahead: Callable[[float], object] | None = None,
) -> None:
    """Check and time rows in their order, keeping the sheet up to date; a row without a time says why.

    Args:
        compile_ahead: called with seconds to take at most, before the first row that is not ours.
    """
    deadline = time.monotonic() + seconds
    truths: dict[str, list[Tensor]] = {}
    cases = sheet.content["cases"] = []
    for problem, peer in pairs:
        if compile_ahead and peer.name != OURS:
            compile_ahead(AHEAD * (deadline - time.monotonic()))
            compile_ahead = None
        if peer.compiled:
            # each row is compiled by itself: what is kept of other shapes counts as recompilation
            torch.compiler.reset()
        case = {"suite": problem.suite, "group": problem.group, "name": peer.name, "peer": peer.name, **problem.notes}
        if time.monotonic() > deadline:
            cases.append({**case, "refused": "no time was left"})
            continue
        try:
            if problem.group not in truths:
                truths[problem.group] = [x.cpu() for x in problem.truth()]
            case |= _time_row(problem, peer, truths[problem.group], device)
        except Exception as refusal:
            case["refused"] = _root(refusal)
        cases.append(case)
        sheet.write()
    sheet.write()


def _time_row(problem: Problem, peer: Peer, truth: list[Tensor], device: torch.device) -> dict[str, Any]:
    """Return the time of a row, or under "red" why its result is wrong."""
    _require_gradients(problem)
    run = functools.partial(problem.finish, peer.solve)
    started = time.perf_counter()
    found = [x.detach().clone() for x in run()]
    first_call_s = time.perf_counter() - started
    error = largest_error(found, [x.to(device) for x in truth])
    if not error <= problem.tolerance:
        return {"red": f"relative error {error:.1e}, must be at most {problem.tolerance:.0e}"}
    return {
        **measure(run, device),
        "error": f"{error:.1e}",
        "same_bits": _repeats_agree(run, found),
        "first_call_s": round(first_call_s, 2),
    }


def _require_gradients(problem: Problem) -> None:
    for leaf in problem.leaves:
        leaf.requires_grad_("backward" in problem.group)


def _repeats_agree(run: Callable[[], list[Tensor]], found: list[Tensor]) -> bool:
    differing = sum((words(x) != words(y)).any() for _ in range(BIT_REPEATS) for x, y in zip(run(), found, strict=True))
    return not bool(differing)


def _root(error: BaseException) -> str:
    """The first line of what caused an error."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


def _compile(pairs: Sequence[tuple[Problem, Peer]]) -> int:
    """Run rows once, only to have them compiled."""
    for problem, peer in pairs:
        _require_gradients(problem)
        torch.compiler.reset()
        try:
            problem.finish(peer.solve)
        except Exception as refusal:
            note(refused=f"{problem.group}: {peer.name}", reason=_root(refusal))
    return 0


def main() -> int:
    """Run the part; exit code 0 only if our own rows are right and none of their bits moved."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_speed")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    device = torch.device("cuda")
    pairs = ordered(SUITES[options.suite](device))
    compiled = [(problem, peer) for problem, peer in pairs if peer.compiled]
    if options.worker:
        return _compile(share(compiled, options.worker))
    end_on_sigterm()
    sheet = Sheet(options.out)
    processes = min(len(compiled), _PROCESSES, os.cpu_count() or 1)

    def compile_ahead(seconds: float) -> None:
        """Fill the caches of compiled code from processes side by side."""
        command = [sys.executable, "-m", "bench.gpu_speed", options.suite, "--worker"]
        commands = {part: [*command, part] for part in (f"{i}/{processes}" for i in range(processes))}
        sheet.content["compiling"] = side_by_side(commands, seconds=seconds, at_once=processes)

    time_rows(pairs, sheet, device, options.seconds, compile_ahead)
    cases = sheet.content["cases"]
    print(f"{sum('median_s' in case for case in cases)} of {len(cases)} rows timed")
    return int(not all(case.get("same_bits") for case in cases if case["peer"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
