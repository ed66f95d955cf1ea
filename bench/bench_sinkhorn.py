"""Sinkhorn at the size of the training loss.

identical    ragged with a dustbin: the same iterations in plain PyTorch and the exact gradient of these iterations
balanced     dense without a dustbin: POT, GeomLoss and flash-sinkhorn, plans only. They iterate differently: each gets
             the number of iterations that brings its plan close to the converged one
sweep        the identical problem for more items and for larger ones

Plans and gradients are compared with float64.
"""

import functools

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, ON_GPU
from bench.peers import balanced_peers, by_name, dustbin_peers, ours
from kernels.sinkhorn import sinkhorn, sinkhorn_reference

ITEMS, SIZE, ITERATIONS = 64 if ON_GPU else 32, 64, 20
EPS, DUSTBIN = 0.1, 1.5
TOLERANCE, BALANCED_TOLERANCE = 1e-4, 1e-2
SETTINGS = {"eps": EPS, "iterations": ITERATIONS, "dustbin": DUSTBIN}
IDENTICAL = by_name(
    *ours(lambda cost_BNM, cols_B: sinkhorn(cost_BNM, cols_B=cols_B, **SETTINGS).plan_BNM), *dustbin_peers(**SETTINGS)
)
BALANCED = by_name(
    *ours(lambda x, y, cost_BNM, eps, iterations: sinkhorn(cost_BNM, eps=eps, iterations=iterations).plan_BNM),
    *balanced_peers(),
)
# iterations that reach the tolerance, where 20 do not
BALANCED_ITERATIONS = {"GeomLoss": 200}
# torch.compile takes half a minute a case on a CPU
CASES = [
    (peer, passes)
    for passes in ("forward", "forward and backward")
    for peer in IDENTICAL
    if ON_GPU or not IDENTICAL[peer].compiled or passes != "forward"
]
SWEPT = ("ridgeline", "log domain", "scaling domain")
BATCHES = (1, 8, 64, 256, 1024) if ON_GPU else (1, 4, 16, 64, 128)
SIZES = (32, 64, 128, 256, 512) if ON_GPU else (16, 32, 64, 128, 256)


@functools.cache
def _problem(items: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cost, counts of true columns and the upstream gradient of the plan, in float64."""
    generator = torch.Generator().manual_seed(0)
    cost_BNM = 5 * torch.rand(items, size, size, generator=generator, dtype=torch.float64)
    cols_B = torch.randint(size // 4, size // 2 + 4, (items,), generator=generator)
    grad_BNM = torch.randn(items, size, size, generator=generator, dtype=torch.float64)
    return cost_BNM.to(DEVICE), cols_B.to(DEVICE), grad_BNM.to(DEVICE)


@functools.cache
def _truth(items: int, size: int) -> list[Tensor]:
    cost_BNM, cols_B, grad_BNM = _problem(items, size)
    cost_BNM = cost_BNM.clone().requires_grad_()
    plan_BNM = sinkhorn_reference(cost_BNM, cols_B=cols_B, **SETTINGS).plan_BNM
    return [plan_BNM.detach(), *torch.autograd.grad(plan_BNM, cost_BNM, grad_BNM)]


def _measure_identical(measure, items, side, peer, passes, group, **notes):
    cost_BNM, cols_B, grad_BNM = (x.float() if x.is_floating_point() else x for x in _problem(items, side))
    cost_BNM.requires_grad_(passes != "forward")

    def run() -> list[Tensor]:
        plan_BNM = peer.solve(cost_BNM, cols_B)
        return [plan_BNM] if passes == "forward" else [plan_BNM, *torch.autograd.grad(plan_BNM, cost_BNM, grad_BNM)]

    measure(
        run,
        group=f"sinkhorn, {group}, {passes}",
        peer=peer,
        truth=_truth(items, side)[: 1 if passes == "forward" else None],
        tolerance=TOLERANCE,
        inputs=[cost_BNM, cols_B] if passes == "forward" else [cost_BNM, cols_B, grad_BNM],
        # two matrix-vector products an iteration, and backward these and two rank-1 updates
        flops=(4 if passes == "forward" else 12) * items * ITERATIONS * (side + 1) ** 2,
        items=items, rows=side, cols=side, iterations=ITERATIONS, dtype="float32",
        **notes,
    )  # fmt: skip


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("peer", "passes"), CASES)
def bench_sinkhorn_identical(measure, peer, passes):
    _measure_identical(measure, ITEMS, SIZE, IDENTICAL[peer], passes, "identical mathematics")


@pytest.mark.parametrize("peer", SWEPT)
@pytest.mark.parametrize(("sweep", "size"), [("batch", B) for B in BATCHES] + [("size", N) for N in SIZES], ids=str)
def bench_sinkhorn_sweep(measure, sweep, size, peer):
    items, side = (size, SIZE) if sweep == "batch" else (8, size)
    passes, group = "forward and backward", f"sweep in {sweep}, {size}"
    _measure_identical(measure, items, side, IDENTICAL[peer], passes, group, sweep=sweep, size=size)


@functools.cache
def _balanced_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Return points x and y in a cube and their squared distances, in float64."""
    generator = torch.Generator().manual_seed(0)
    x_BN3, y_BM3 = torch.rand(2, ITEMS, SIZE, 3, generator=generator, dtype=torch.float64).to(DEVICE)
    return x_BN3, y_BM3, (x_BN3[:, :, None] - y_BM3[:, None]).square().sum(3)


@functools.cache
def _balanced_truth() -> list[Tensor]:
    return [sinkhorn(_balanced_problem()[2], eps=EPS, iterations=200, impl="eager").plan_BNM]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", BALANCED)
def bench_sinkhorn_balanced(measure, peer):
    iterations, tensors = BALANCED_ITERATIONS.get(peer, ITERATIONS), [x.float() for x in _balanced_problem()]
    measure(
        lambda: [BALANCED[peer].solve(*tensors, EPS, iterations)],
        group="sinkhorn, balanced and dense, forward",
        peer=BALANCED[peer],
        truth=_balanced_truth(),
        tolerance=BALANCED_TOLERANCE,
        inputs=tensors[2:],
        flops=4 * ITEMS * ITERATIONS * SIZE**2,
        items=ITEMS, rows=SIZE, cols=SIZE, iterations=iterations, dtype="float32",
    )  # fmt: skip
