"""Segment matching, the training loss, against the same mathematics in plain PyTorch.

Peers solve in the log and in the scaling domain, so that what the algorithm gains is not taken for what the kernel
gains; both also under torch.compile and, on a GPU, inside a CUDA graph. Plan gradients are detached, as in training, or
exact. Before a row is timed, losses, matched masses and gradients are compared with float64.
"""

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels.matching import match_segments, match_segments_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 50 if DEVICE.type == "cuda" else 15
# name -> (items, predicted segments, capacity for true ones, fewest and most true ones)
SHAPES = {
    "demo 32x40": (32, 32, 64, 10, 40),
    "model 64x64": (64 if DEVICE.type == "cuda" else 32, 64, 64, 15, 64),
}
ITERATIONS, EPS, COST_SCALE, DUSTBIN, DIRECTION_WEIGHT = 20, 0.1, 5.0, 0.3, 0.3
# the largest error of a result, relative to the largest true value of its kind
TOLERANCE = 1e-4


@functools.cache
def _problem(shape: str) -> tuple[Tensor, ...]:
    """Return mid, dir, len, gt and its counts in float64: half of the predictions lie near true segments."""
    items, rows, cols, fewest, most = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    gt_BM23 = torch.rand(items, cols, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    ends_BN23 = torch.rand(items, rows, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    ends_BN23[:, ::2] = gt_BM23[:, : rows // 2] + 0.1 * ends_BN23[:, ::2]
    along_BN3 = ends_BN23[:, :, 1] - ends_BN23[:, :, 0]
    len_BN = along_BN3.norm(dim=2)
    count_B = torch.randint(fewest, most + 1, (items,), generator=generator)
    problem = (ends_BN23.mean(2), along_BN3 / len_BN[:, :, None], len_BN, gt_BM23, count_B)
    return tuple(tensor.to(DEVICE) for tensor in problem)


def _ridgeline(*segments: Tensor, plan_gradient: str) -> tuple[Tensor, ...]:
    return match_segments(*segments, plan_gradient=plan_gradient)[:3]


def _log_plan(Z: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    v = torch.where(log_b == -math.inf, log_b, 0)
    for _ in range(ITERATIONS):
        u = log_a - torch.logsumexp(Z + v[:, None], 2)
        v = log_b - torch.logsumexp(Z + u[:, :, None], 1)
    return torch.exp(Z + u[:, :, None] + v[:, None])


def _scaling_plan(Z: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    K, a, b = torch.exp(Z + COST_SCALE * DUSTBIN / EPS), log_a.exp(), log_b.exp()
    v = (b > 0).to(b)
    for _ in range(ITERATIONS):
        u = a / (K * v[:, None]).sum(2)
        v = b / (K * u[:, :, None]).sum(1)
    return K * u[:, :, None] * v[:, None]


def _plain(
    mid_BN3: Tensor,
    dir_BN3: Tensor,
    len_BN: Tensor,
    gt_BM23: Tensor,
    count_B: Tensor,
    *,
    solve: Callable[..., Tensor],
    plan_gradient: str,
) -> tuple[Tensor, ...]:
    """Return transport, endpoint and matched; coordinates come first, where PyTorch is fastest."""
    (_, N), M = len_BN.shape, gt_BM23.shape[1]
    real_BM = torch.arange(M, device=DEVICE) < count_B[:, None]
    start_3B1M, end_3B1M = gt_BM23.permute(2, 3, 0, 1).contiguous()[:, :, :, None]
    mid_3BN1, dir_3BN1 = (x.movedim(2, 0).contiguous()[..., None] for x in (mid_BN3, dir_BN3))
    gt_len_B1M = _norm(end_3B1M - start_3B1M)
    gt_dir_3B1M = (end_3B1M - start_3B1M) / gt_len_B1M
    sign_BNM = torch.where((dir_3BN1 * gt_dir_3B1M).sum(0) >= 0, 1.0, -1.0)
    distance_BNM = _norm(mid_3BN1 - (start_3B1M + end_3B1M) / 2)
    angle_BNM = _norm(dir_3BN1 - sign_BNM * gt_dir_3B1M)
    cost_BNM = COST_SCALE * (distance_BNM + DIRECTION_WEIGHT * angle_BNM + (len_BN[:, :, None] - gt_len_B1M).abs())

    m_B1 = count_B[:, None].to(cost_BNM)
    Z = torch.nn.functional.pad(cost_BNM, (0, 1, 0, 1), value=COST_SCALE * DUSTBIN) / -EPS
    log_a = torch.cat([torch.zeros_like(len_BN), m_B1.log()], 1) - (N + m_B1).log()
    log_b = torch.cat([torch.where(real_BM, 0.0, -math.inf), torch.full_like(m_B1, math.log(N))], 1)
    plan_BNM = (N + m_B1)[:, :, None] * solve(Z, log_a, log_b - (N + m_B1).log())[:, :-1, :-1]
    fixed_BNM = plan_BNM.detach()
    transport_B = ((fixed_BNM if plan_gradient == "detached" else plan_BNM) * cost_BNM).sum((1, 2)) / count_B

    half_3BN1 = dir_3BN1 * len_BN[:, :, None] / 2
    first_3BN1, second_3BN1 = mid_3BN1 - half_3BN1, mid_3BN1 + half_3BN1
    same_BNM = ((first_3BN1 - start_3B1M).abs() + (second_3BN1 - end_3B1M).abs()).sum(0)
    swapped_BNM = ((first_3BN1 - end_3B1M).abs() + (second_3BN1 - start_3B1M).abs()).sum(0)
    distance_BNM = torch.where(same_BNM <= swapped_BNM, same_BNM, swapped_BNM) / 2
    endpoint_B = (fixed_BNM * distance_BNM).sum((1, 2)) / fixed_BNM.sum((1, 2)).clamp(min=1e-6)
    return transport_B, endpoint_B, fixed_BNM.sum(2).clamp(max=1)


def _norm(x: Tensor) -> Tensor:
    return (x * x).sum(0).clamp(min=1e-30).sqrt()


PEERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "ridgeline": _ridgeline,
    "log domain": functools.partial(_plain, solve=_log_plan),
    "scaling domain": functools.partial(_plain, solve=_scaling_plan),
}
COMPILED = [f"{peer}, torch.compile" for peer in ("log domain", "scaling domain")]
GRAPHED = [f"{peer}, CUDA graph" for peer in PEERS] if DEVICE.type == "cuda" else []


@functools.cache
def _truth(shape: str, plan_gradient: str) -> list[Tensor]:
    reference = functools.partial(match_segments_reference, plan_gradient=plan_gradient)
    *predicted, gt_BM23, count_B = _problem(shape)
    predicted = [tensor.clone().requires_grad_() for tensor in predicted]
    return _values_and_gradients(lambda *s: reference(*s)[:3], predicted, gt_BM23, count_B)


def _values_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], predicted: Sequence[Tensor], gt_BM23: Tensor, count_B: Tensor
) -> list[Tensor]:
    """Return the results, and the gradients of the loss of a third training stage where they are asked for."""
    transport_B, endpoint_B, matched_BN = function(*predicted, gt_BM23, count_B)
    values = [transport_B, endpoint_B, matched_BN]
    if not predicted[0].requires_grad:
        return values
    loss = transport_B.mean() + 0.5 * endpoint_B.mean()
    return [*(value.detach() for value in values), *torch.autograd.grad(loss, predicted)]


def _graphed(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Record `run` into a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("plan_gradient", ["detached", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peer", [*PEERS, *COMPILED, *GRAPHED])
def bench_matching(benchmark, peer, shape, plan_gradient, passes):
    if plan_gradient == "exact" and (passes == "forward" or peer in COMPILED):
        pytest.skip("of exact gradients only both passes are timed, uncompiled: compiling them takes minutes")
    function = functools.partial(PEERS[peer.partition(", ")[0]], plan_gradient=plan_gradient)
    if peer in COMPILED:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    *predicted, gt_BM23, count_B = (x.float() if x.is_floating_point() else x for x in _problem(shape))
    predicted = [tensor.requires_grad_(passes != "forward") for tensor in predicted]
    run = functools.partial(_values_and_gradients, function, predicted, gt_BM23, count_B)
    try:
        run = _graphed(run) if peer in GRAPHED else run
        found = run()
    except RuntimeError as refusal:
        pytest.skip(str(refusal).strip().partition("\n")[0])
    pairs = zip(found, _truth(shape, plan_gradient), strict=False)
    error = max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)
    assert error <= TOLERANCE, f"relative error {error:.1e}"

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    sizes = {"items": SHAPES[shape][0], "dtype": "float32", "threads": torch.get_num_threads()}
    benchmark.group = f"match_segments {shape}, {plan_gradient}, {passes}"
    benchmark.extra_info.update(peer=peer, iterations=ITERATIONS, error=f"{error:.1e}", **sizes)
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=2)
