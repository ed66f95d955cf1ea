"""Sinkhorn at the size of the training loss, in two tables.

identical    ragged with a dustbin: the same iterations in plain PyTorch, in the log and in the scaling domain, and
             both under torch.compile; gradients are the exact ones of these iterations. 32 items, on a GPU 64.
balanced     dense without a dustbin: POT and GeomLoss, plans only. They iterate differently, so each gets the number
             of iterations that brings its plan close to the converged one.

Before a row is timed its result is compared with float64; a peer that is not installed or cannot be compiled here is
skipped with its reason.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.sinkhorn import sinkhorn, sinkhorn_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITEMS, SIZE, ITERATIONS = 64 if DEVICE.type == "cuda" else 32, 64, 20
EPS, DUSTBIN = 0.1, 1.5
ROUNDS = 50 if DEVICE.type == "cuda" else 15
# the largest error of a plan or a gradient, relative to the largest true value
TOLERANCE, BALANCED_TOLERANCE = 1e-4, 1e-2


@functools.cache
def _problem() -> tuple[Tensor, Tensor, Tensor]:
    """Return cost, counts of true columns and the upstream gradient of the plan, in float64."""
    generator = torch.Generator().manual_seed(0)
    cost_BNM = 5 * torch.rand(ITEMS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    cols_B = torch.randint(15, 36, (ITEMS,), generator=generator)
    grad_BNM = torch.randn(ITEMS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return cost_BNM.to(DEVICE), cols_B.to(DEVICE), grad_BNM.to(DEVICE)


def _bordered(cost_BNM: Tensor, cols_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Z with its bin, log a, log b (-inf is padding) and the plan's factor."""
    n, m = float(SIZE), cols_B[:, None].to(cost_BNM)
    real = torch.arange(SIZE, device=DEVICE) < cols_B[:, None]
    log_a = torch.cat([torch.zeros_like(cost_BNM[:, :, 0]), m.log()], 1) - (n + m).log()
    log_b = torch.cat([torch.where(real, 0.0, -math.inf), torch.full_like(m, math.log(n))], 1) - (n + m).log()
    return torch.nn.functional.pad(cost_BNM, (0, 1, 0, 1), value=DUSTBIN) / -EPS, log_a, log_b, (n + m)[:, :, None]


def _ridgeline(cost_BNM: Tensor, cols_B: Tensor) -> Tensor:
    return sinkhorn(cost_BNM, cols_B=cols_B, eps=EPS, iterations=ITERATIONS, dustbin=DUSTBIN).plan_BNM


def _log_domain(cost_BNM: Tensor, cols_B: Tensor) -> Tensor:
    Z, log_a, log_b, factor = _bordered(cost_BNM, cols_B)
    v = torch.where(log_b == -math.inf, log_b, 0)
    for _ in range(ITERATIONS):
        u = log_a - torch.logsumexp(Z + v[:, None], 2)
        v = log_b - torch.logsumexp(Z + u[:, :, None], 1)
    return (factor * torch.exp(Z + u[:, :, None] + v[:, None]))[:, :-1, :-1]


def _scaling_domain(cost_BNM: Tensor, cols_B: Tensor) -> Tensor:
    Z, log_a, log_b, factor = _bordered(cost_BNM, cols_B)
    K, a, b = torch.exp(Z + DUSTBIN / EPS), log_a.exp(), log_b.exp()
    v = (b > 0).to(b)
    for _ in range(ITERATIONS):
        u = a / (K * v[:, None]).sum(2)
        v = b / (K * u[:, :, None]).sum(1)
    return (factor * K * u[:, :, None] * v[:, None])[:, :-1, :-1]


def _compiled(solve: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return _compile(solve)(*tensors)


@functools.cache
def _compile(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(solve, fullgraph=True)


IDENTICAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ridgeline": _ridgeline,
    "log domain": _log_domain,
    "scaling domain": _scaling_domain,
    "log domain, torch.compile": functools.partial(_compiled, _log_domain),
    "scaling domain, torch.compile": functools.partial(_compiled, _scaling_domain),
}


def _balanced(cost_BNM: Tensor, iterations: int) -> Tensor:
    return sinkhorn(cost_BNM, eps=EPS, iterations=iterations).plan_BNM


def _pot(cost_BNM: Tensor, iterations: int, method: str) -> Tensor:
    batch = pytest.importorskip("ot.batch")
    return batch.solve_batch(cost_BNM, EPS, max_iter=iterations, tol=0.0, method=method, grad="detach").plan


def _geomloss(cost_BNM: Tensor, iterations: int) -> Tensor:
    return pytest.importorskip("geomloss.ot").solve_batch(cost_BNM, reg=EPS, max_iter=iterations).plan


# who -> (how, iterations that reach the tolerance)
BALANCED: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "ridgeline": (_balanced, 20),
    "POT, log_sinkhorn": (functools.partial(_pot, method="log_sinkhorn"), 20),
    "POT, sinkhorn": (functools.partial(_pot, method="sinkhorn"), 20),
    "GeomLoss": (_geomloss, 1000),
}


@functools.cache
def _identical_truth() -> list[Tensor]:
    cost_BNM, cols_B, grad_BNM = _problem()
    cost_BNM = cost_BNM.clone().requires_grad_()
    settings = {"eps": EPS, "iterations": ITERATIONS, "dustbin": DUSTBIN}
    plan_BNM = sinkhorn_reference(cost_BNM, cols_B=cols_B, **settings).plan_BNM
    return [plan_BNM.detach(), *torch.autograd.grad(plan_BNM, cost_BNM, grad_BNM)]


@functools.cache
def _balanced_truth() -> list[Tensor]:
    return [sinkhorn(_problem()[0], eps=EPS, iterations=5000, impl="eager").plan_BNM]


def _time(benchmark, run: Callable[[], list[Tensor]], truth: list[Tensor], tolerance: float, **notes) -> None:
    """Time `run` once its result is right."""
    try:
        found = run()
    except RuntimeError as refusal:
        pytest.skip(str(refusal).strip().partition("\n")[0])
    pairs = list(zip(found, truth, strict=True))
    error = max(float((x.detach().double() - y).abs().max() / y.abs().max()) for x, y in pairs)
    assert error <= tolerance, f"relative error {error:.1e}"

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    sizes = {"items": ITEMS, "rows": SIZE, "cols": SIZE, "dtype": "float32", "threads": torch.get_num_threads()}
    benchmark.extra_info.update(**notes, **sizes, error=f"{error:.1e}")
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=2)


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("peer", IDENTICAL)
def bench_sinkhorn_identical(benchmark, peer, passes):
    cost_BNM, cols_B, grad_BNM = (x.float() if x.is_floating_point() else x for x in _problem())
    cost_BNM.requires_grad_(passes != "forward")

    def run() -> list[Tensor]:
        plan_BNM = IDENTICAL[peer](cost_BNM, cols_B)
        return [plan_BNM] if passes == "forward" else [plan_BNM, *torch.autograd.grad(plan_BNM, cost_BNM, grad_BNM)]

    benchmark.group = f"sinkhorn, identical mathematics, {passes}"
    truth = _identical_truth()[: 1 if passes == "forward" else 2]
    _time(benchmark, run, truth, TOLERANCE, peer=peer, iterations=ITERATIONS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", BALANCED)
def bench_sinkhorn_balanced(benchmark, peer):
    solve, iterations = BALANCED[peer]
    cost_BNM = _problem()[0].float()
    benchmark.group = "sinkhorn, balanced and dense, forward"
    notes = {"peer": peer, "iterations": iterations}
    _time(benchmark, lambda: [solve(cost_BNM, iterations)], _balanced_truth(), BALANCED_TOLERANCE, **notes)
