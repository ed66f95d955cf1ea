"""The point embedding at the model's width, against PyTorch's own layers for the same result, features included.

On a CPU 2 items of 256 points in float32, on a GPU the model's two shapes in bfloat16. Output and gradients are
compared with float64 on the first items.
"""

import functools

import pytest
import torch

from bench.measure import DEVICE, ON_GPU
from bench.peers import Peer, by_name, ours, with_compile
from kernels.points import point_embedding

PRECISION = "bf16" if ON_GPU else "ieee"
# the largest error of the output or a gradient, relative to the largest true value
TOLERANCE = {"ieee": 1e-4, "bf16": 5e-2}[PRECISION]
UNITS, CHANNELS, FREQUENCIES = 1024, 256, 32
CLASSES = {"label_table": (13, 16), "source_table": (2, 2), "behind_table": (29, 8)}
# name -> (items, points)
SHAPES = {"32x2048": (32, 2048), "64x4096": (64, 4096)} if ON_GPU else {"2x256": (2, 256)}
# items whose error is measured: float64 of all of them would not fit
CHECKED = 2

Problem = tuple[list[torch.Tensor], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]


@functools.cache
def _problem(shape: str) -> Problem:
    """Return points, weights, counts and an upstream gradient."""
    (B, T), generator = SHAPES[shape], torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    K = 3 + 2 * FREQUENCIES + sum(width for _, width in CLASSES.values()) + 2
    indices = [torch.randint(n, (B, T), generator=generator).byte().to(DEVICE) for n, _ in CLASSES.values()]
    weights = {"frequencies_F3": 10 * normal(FREQUENCIES, 3)} | {name: normal(*size) for name, size in CLASSES.items()}
    weights |= {"weight1": normal(UNITS, K) / K**0.5, "bias1": normal(UNITS)}
    weights |= {"weight2": normal(CHANNELS, UNITS) / UNITS**0.5, "bias2": normal(CHANNELS), "gain": normal(CHANNELS)}
    count_B = torch.randint(T * 3 // 4, T + 1, (B,), generator=generator).to(DEVICE)
    return [normal(B, T, 3), *indices, normal(B, T, 2)], weights, count_B, normal(B, T, CHANNELS)


def _first(problem: Problem, items: int) -> Problem:
    points, weights, count_B, dmemory_BTC = problem
    return [x[:items] for x in points], weights, count_B[:items], dmemory_BTC[:items]


def _ridgeline(points, weights, count_B) -> torch.Tensor:
    return point_embedding(*points, **weights, point_count_B=count_B, precision=PRECISION)


def _layers(points, weights, count_B) -> torch.Tensor:
    return point_embedding(*points, **weights, point_count_B=count_B, precision=PRECISION, impl="eager")


LAYERS = Peer(name="layers", solve=_layers)
PEERS = by_name(*ours(_ridgeline), LAYERS, with_compile(LAYERS))


def _run(embed, problem: Problem, *, backward: bool) -> list[torch.Tensor]:
    points, weights, count_B, dmemory_BTC = problem
    leaves = [x.requires_grad_(backward) for name, x in weights.items() if name != "frequencies_F3"]
    memory_BTC = embed(points, weights, count_B)
    if not backward:
        return [memory_BTC]
    return [memory_BTC, *torch.autograd.grad(memory_BTC, leaves, dmemory_BTC.to(memory_BTC.dtype))]


@functools.cache
def _truth(shape: str) -> list[torch.Tensor]:
    points, weights, count_B, dmemory_BTC = _first(_problem(shape), CHECKED)
    points = [x.double() if x.is_floating_point() else x for x in points]
    weights = {name: x.detach().double() for name, x in weights.items()}
    return [
        x.detach()
        for x in _run(
            lambda *arguments: point_embedding(*arguments[0], **arguments[1], point_count_B=arguments[2], impl="eager"),
            (points, weights, count_B, dmemory_BTC.double()),
            backward=True,
        )
    ]


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_points(measure, shape, peer, passes):
    problem, backward = _problem(shape), passes != "forward"
    items, points = SHAPES[shape]
    measure(
        lambda: _run(PEERS[peer].solve, problem, backward=backward),
        check=lambda: _run(PEERS[peer].solve, _first(problem, CHECKED), backward=backward),
        group=f"points, {shape}, {passes}",
        peer=PEERS[peer],
        truth=_truth(shape)[: None if backward else 1],
        tolerance=TOLERANCE,
        items=items, points=points, units=UNITS, channels=CHANNELS, precision=PRECISION,
    )  # fmt: skip
