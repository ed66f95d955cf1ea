"""Segment matching, the training loss, against the same mathematics in plain PyTorch.

Plan gradients are detached, as in training, or exact; the sweeps have more items and more segments. Losses, matched
masses and gradients are compared with float64.
"""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, ON_GPU
from bench.peers import by_name, matching_peers, ours
from kernels.matching import match_segments, match_segments_reference

ITEMS = 64 if ON_GPU else 32
# name -> (items, predicted segments, capacity for true ones, fewest and most true ones)
SHAPES = {"demo 32x40": (32, 32, 64, 10, 40), "model 64x64": (ITEMS, 64, 64, 15, 64)}
SETTINGS = {"eps": 0.1, "iterations": 20, "cost_scale": 5.0, "dustbin": 0.3, "direction_weight": 0.3}
TOLERANCE = 1e-4
PEERS = by_name(
    *ours(lambda *segments, plan_gradient: match_segments(*segments, plan_gradient=plan_gradient, **SETTINGS)[:3]),
    *matching_peers(**SETTINGS),
)
SWEPT = ("ridgeline", "log domain", "scaling domain")
BATCHES = (1, 8, 64, 256, 1024) if ON_GPU else (1, 4, 16, 64, 128)
SIZES = (16, 32, 64, 128)
# of exact gradients only both passes are timed, uncompiled: compiling them takes minutes; on a CPU half a minute a case
CASES = [
    (shape, peer, gradient, passes)
    for shape in SHAPES
    for gradient in ("detached", "exact")
    for passes in ("forward", "forward and backward")
    for peer in PEERS
    if gradient == "detached" or (passes != "forward" and not PEERS[peer].compiled)
    if ON_GPU or not PEERS[peer].compiled or (passes != "forward" and shape == "model 64x64")
]


@functools.cache
def _problem(items: int, rows: int, cols: int, fewest: int, most: int) -> tuple[Tensor, ...]:
    """Return mid, dir, len, gt and its counts in float64: half of the predictions lie near true segments."""
    generator = torch.Generator().manual_seed(0)
    gt_BM23 = torch.rand(items, cols, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    ends_BN23 = torch.rand(items, rows, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    ends_BN23[:, ::2] = gt_BM23[:, : rows // 2] + 0.1 * ends_BN23[:, ::2]
    along_BN3 = ends_BN23[:, :, 1] - ends_BN23[:, :, 0]
    len_BN = along_BN3.norm(dim=2)
    count_B = torch.randint(fewest, most + 1, (items,), generator=generator)
    problem = (ends_BN23.mean(2), along_BN3 / len_BN[:, :, None], len_BN, gt_BM23, count_B)
    return tuple(tensor.to(DEVICE) for tensor in problem)


@functools.cache
def _truth(shape: tuple[int, ...], plan_gradient: str) -> list[Tensor]:
    *predicted, gt_BM23, count_B = _problem(*shape)
    predicted = [tensor.clone().requires_grad_() for tensor in predicted]
    reference = functools.partial(match_segments_reference, plan_gradient=plan_gradient, **SETTINGS)
    return _values_and_gradients(lambda *segments: reference(*segments)[:3], predicted, gt_BM23, count_B)


def _values_and_gradients(
    solve: Callable[..., tuple[Tensor, ...]], predicted: Sequence[Tensor], gt_BM23: Tensor, count_B: Tensor
) -> list[Tensor]:
    """Return the results, and the gradients of the loss of a third training stage where they are asked for."""
    transport_B, endpoint_B, matched_BN = solve(*predicted, gt_BM23, count_B)
    values = [transport_B, endpoint_B, matched_BN]
    if not predicted[0].requires_grad:
        return values
    loss = transport_B.mean() + 0.5 * endpoint_B.mean()
    return [*(value.detach() for value in values), *torch.autograd.grad(loss, predicted)]


def _measure_matching(measure, shape, peer, plan_gradient, passes, group, **notes):
    *predicted, gt_BM23, count_B = (x.float() if x.is_floating_point() else x for x in _problem(*shape))
    predicted = [tensor.requires_grad_(passes != "forward") for tensor in predicted]
    solve = functools.partial(peer.solve, plan_gradient=plan_gradient)
    items, rows, cols, *_ = shape
    iterations = SETTINGS["iterations"]
    measure(
        functools.partial(_values_and_gradients, solve, predicted, gt_BM23, count_B),
        group=f"match_segments, {group}, {plan_gradient}, {passes}",
        peer=peer,
        truth=_truth(shape, plan_gradient)[: 3 if passes == "forward" else None],
        tolerance=TOLERANCE,
        inputs=[*predicted, gt_BM23, count_B],
        # the solve alone: two matrix-vector products an iteration; the exact gradient has these and two rank-1 updates
        flops=(12 if plan_gradient == "exact" else 4) * items * int(iterations) * (rows + 1) * (cols + 1),
        items=items, rows=rows, cols=cols, iterations=iterations, dtype="float32",
        **notes,
    )  # fmt: skip


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("shape", "peer", "plan_gradient", "passes"), CASES)
def bench_matching(measure, shape, peer, plan_gradient, passes):
    _measure_matching(measure, SHAPES[shape], PEERS[peer], plan_gradient, passes, shape)


@pytest.mark.parametrize("peer", SWEPT)
@pytest.mark.parametrize(("sweep", "size"), [("batch", B) for B in BATCHES] + [("size", N) for N in SIZES], ids=str)
def bench_matching_sweep(measure, sweep, size, peer):
    shape = (size, 64, 64, 15, 64) if sweep == "batch" else (ITEMS, size, size, size // 4, size)
    passes, group = "forward and backward", f"sweep in {sweep}, {size}"
    _measure_matching(measure, shape, PEERS[peer], "detached", passes, group, sweep=sweep, size=size)
