"""The launches that `bench.static` compiles: every operator, forward and backward, at the model's shapes.

A case makes its inputs, calls the public function with impl="triton" and asks for all gradients. Inputs are zeros: what
is compiled depends on shapes, strides, types and options, never on values.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench.offline import Launch
from bench.static_spills import SPILLS_ALLOWED as SPILLS_ALLOWED

HEADS, KV_HEADS = 4, 2
ITERATIONS = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operator.

    Args:
        full: compiled only on request.
        trips, main_loop: for the lower bound of a launch's time: how often its main loop runs, and what tells that loop
            from others, see `bench.cubin.time_bound_us`.
    """

    operator: str
    name: str
    run: Callable[[], object]
    full: bool = False
    trips: Callable[[Launch], int] = lambda launch: 1
    main_loop: Mapping[str, int] = field(default_factory=dict)


def _iterations(launch: Launch) -> int:
    # of the unrolled one the shortest loop is that of the iterations left over, one at a time
    whole = (
        "_sinkhorn_fwd_kernel",
        "_sinkhorn_bwd_kernel",
        "_sinkhorn_large_grad_kernel",
        "_match_segments_fwd_kernel",
    )
    return ITERATIONS if launch.kernel in whole else 1


def _sinkhorn_trips(size: int, launch: Launch) -> int:
    """A half-step of a problem beyond one tile walks over all blocks of the other side."""
    blocks = {
        "_sinkhorn_large_fwd_kernel": "OTHER",
        "_sinkhorn_large_bwd_kernel": "OTHER",
        "_sinkhorn_large_marginals_kernel": "BLOCK",
    }
    return -(-size // launch.constants[blocks[launch.kernel]]) if launch.kernel in blocks else _iterations(launch)


def _sinkhorn(B: int, N: int, M: int, dtype: torch.dtype, *, slack: str, dustbin: bool) -> None:
    from kernels.sinkhorn import sinkhorn

    cost_BNM = torch.zeros(B, N, M, dtype=dtype, requires_grad=True)
    bin_cost = torch.zeros((), requires_grad=True) if dustbin else None
    cols_B = torch.full((B,), M)
    solution = sinkhorn(
        cost_BNM, cols_B=cols_B, eps=0.1, iterations=ITERATIONS, dustbin=bin_cost, slack=slack, impl="triton"
    )
    inputs = [cost_BNM] if bin_cost is None else [cost_BNM, bin_cost]
    outputs = list(solution if dustbin else solution[:1])
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(output) for output in outputs])


def _sinkhorn_cases() -> list[Case]:
    # name -> (B, N, M, dtype, options, only on request)
    table = {
        "64x64": (64, 64, 64, torch.float32, {"slack": "full", "dustbin": True}, False),
        "64x64 minimal": (64, 64, 64, torch.float32, {"slack": "minimal", "dustbin": True}, False),
        "64x64 no bin": (64, 64, 64, torch.float32, {"slack": "full", "dustbin": False}, True),
        "64x64 bf16": (64, 64, 64, torch.bfloat16, {"slack": "full", "dustbin": True}, True),
        "32x32": (64, 32, 32, torch.float32, {"slack": "full", "dustbin": True}, True),
        "64x128": (64, 64, 128, torch.float32, {"slack": "full", "dustbin": True}, True),
        "128x128": (64, 128, 128, torch.float32, {"slack": "full", "dustbin": True}, True),
        "512x512": (8, 512, 512, torch.float32, {"slack": "full", "dustbin": True}, False),
    }
    return [
        Case(
            operator="sinkhorn",
            name=name,
            run=functools.partial(_sinkhorn, B, N, M, dtype, **options),
            full=full,
            trips=functools.partial(_sinkhorn_trips, max(N, M)),
            main_loop={"special": 4},
        )
        for name, (B, N, M, dtype, options, full) in table.items()
    ]


def _matching(B: int, N: int, M: int, *, plan_gradient: str, slack: str, gradients: bool) -> None:
    from kernels.matching import match_segments

    mid_BN3, dir_BN3, len_BN = (torch.zeros(B, N, *tail, requires_grad=gradients) for tail in ((3,), (3,), ()))
    match = match_segments(
        mid_BN3,
        dir_BN3,
        len_BN,
        torch.zeros(B, M, 2, 3),
        torch.full((B,), M),
        iterations=ITERATIONS,
        plan_gradient=plan_gradient,
        slack=slack,
        impl="triton",
    )
    if gradients:
        torch.autograd.grad([match.transport_B, match.endpoint_B], [mid_BN3, dir_BN3, len_BN], [torch.zeros(B)] * 2)


def _matching_cases() -> list[Case]:
    detached, exact = {"plan_gradient": "detached", "slack": "full"}, {"plan_gradient": "exact", "slack": "full"}
    # name -> (N, M, options, only on request)
    table = {
        "64x64": (64, 64, detached | {"gradients": True}, False),
        "64x64 exact": (64, 64, exact | {"gradients": True}, True),
        "64x64 no gradient": (64, 64, detached | {"gradients": False}, True),
        "64x64 minimal": (64, 64, detached | {"gradients": True, "slack": "minimal"}, True),
        "128x128": (128, 128, detached | {"gradients": True}, True),
        "128x128 exact": (128, 128, exact | {"gradients": True}, True),
    }
    return [
        Case(
            operator="match_segments",
            name=name,
            run=functools.partial(_matching, 64, N, M, **options),
            full=full,
            trips=_iterations,
            main_loop={"special": 4},
        )
        for name, (N, M, options, full) in table.items()
    ]


def _attention(B: int, T: int, S: int, D: int, dtype: torch.dtype, *, ragged: bool, **options) -> None:
    from kernels.attention import gqa_attention

    q_BHTD = torch.zeros(B, T, HEADS, D, dtype=dtype).transpose(1, 2).requires_grad_()
    k_BGSD, v_BGSD = (torch.zeros(B, S, KV_HEADS, D, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    log_scale_H = torch.zeros(HEADS, requires_grad=True)
    key_count_B = torch.full((B,), S) if ragged else None
    o_BHTD = gqa_attention(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B=key_count_B, impl="triton", **options)
    torch.autograd.grad(o_BHTD, [q_BHTD, k_BGSD, v_BGSD, log_scale_H], torch.zeros_like(o_BHTD))


def _attention_trips(T: int, S: int, launch: Launch) -> int:
    match launch.kernel:
        case "_attention_fwd_kernel" | "_attention_dq_kernel":
            return S // launch.constants["BLOCK_S"]
        case "_attention_dkv_kernel":
            return HEADS // KV_HEADS * T // launch.constants["BLOCK_T"]
    return 1


def _attention_cases() -> list[Case]:
    # name -> (B, queries, keys, keys counted per item)
    shapes = {
        "cross 256x2048": (32, 256, 2048, True),
        "cross 256x4096": (64, 256, 4096, True),
        "self 256x256": (64, 256, 256, False),
        "decoder 64x256": (64, 64, 256, False),
        "decoder 64x64": (64, 64, 64, False),
    }
    types = {
        "bf16": (torch.bfloat16, {}),
        "tf32": (torch.float32, {"precision": "tf32"}),
        "ieee": (torch.float32, {"precision": "ieee"}),
    }
    cross, self_ = shapes["cross 256x2048"], shapes["self 256x256"]
    # name -> (shape, D, dtype, options, only on request)
    table = {
        f"{name} {kind}": (shape, 64, dtype, options, False)
        for kind, (dtype, options) in types.items()
        for name, shape in shapes.items()
    }
    table |= {
        f"{name} {kind} D={D}": (shape, D, dtype, options, True)
        for D in (16, 32, 128)
        for kind, (dtype, options) in types.items()
        for name, shape in (("cross 256x2048", cross), ("self 256x256", self_))
    }
    table["cross 256x2048 fp16 online"] = (cross, 64, torch.float16, {"softmax": "online"}, True)
    table["cross 256x2048 bf16 online"] = (cross, 64, torch.bfloat16, {"softmax": "online"}, True)
    table["cross 256x4096 bf16 split"] = (shapes["cross 256x4096"], 64, torch.bfloat16, {"split": 2}, True)
    return [
        Case(
            operator="gqa_attention",
            name=name,
            run=functools.partial(_attention, *shape[:3], D, dtype, ragged=shape[3], **options),
            full=full,
            trips=functools.partial(_attention_trips, *shape[1:3]),
            main_loop={"matrix": 1} if "ieee" not in name else {},
        )
        for name, (shape, D, dtype, options, full) in table.items()
    ]


def _residual(B: int, T: int, C: int, dtype: torch.dtype, *, y=True, bias=True, norm=True, copy=True) -> None:
    from kernels.residual import residual_norm

    x_BTC, gain_C, bias_C = (torch.zeros(*shape, requires_grad=True) for shape in ((B, T, C), (C,), (C,)))
    y_BTC = torch.zeros(B, T, C, dtype=dtype, requires_grad=True)
    draws = {"rate": 0.1, "scene_B": torch.zeros(B, dtype=torch.int64)} if y else {}
    inputs = [x_BTC, *[y_BTC] * y, *[gain_C] * norm, *[bias_C] * bias]
    stream = residual_norm(
        x_BTC,
        y_BTC if y else None,
        gain_C if norm else None,
        bias_C=bias_C if bias else None,
        dtype=dtype,
        copy=copy,
        impl="triton",
        **draws,
    )
    outputs = [output for output in stream if output is not None and output is not x_BTC]
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(output) for output in outputs])


def _residual_cases() -> list[Case]:
    half, single = torch.bfloat16, torch.float32
    # name -> (B, T, C, dtype of the products, what this seam of two blocks lacks, only on request)
    table = {
        "feed-forward to self bf16": (64, 256, 256, half, {}, False),
        "feed-forward to self fp32": (64, 256, 256, single, {}, False),
        "feed-forward to cross bf16": (64, 256, 256, half, {"copy": False}, False),
        "cross to self bf16": (64, 256, 256, half, {"bias": False}, False),
        "self to feed-forward bf16": (64, 256, 256, half, {"bias": False, "copy": False}, False),
        "table to cross bf16": (1, 256, 256, half, {"y": False, "bias": False, "copy": False}, False),
        "latents to memory bf16": (64, 256, 256, half, {"norm": False}, False),
        "queries to heads bf16": (64, 64, 256, half, {"norm": False, "copy": False}, False),
        "wide bf16": (64, 256, 1024, half, {}, True),
        "odd bf16": (64, 256, 250, half, {}, True),
    }
    return [
        Case(operator="residual_norm", name=name, run=functools.partial(_residual, *sizes, **lacks), full=full)
        for name, (*sizes, lacks, full) in table.items()
    ]


def _gelu(B: int, T: int, C: int, dtype: torch.dtype) -> None:
    from kernels.gelu import bias_gelu

    x_BTC, bias_C = torch.zeros(B, T, C, dtype=dtype, requires_grad=True), torch.zeros(C, requires_grad=True)
    torch.autograd.grad(bias_gelu(x_BTC, bias_C, impl="triton"), [x_BTC, bias_C], torch.zeros(B, T, C, dtype=dtype))


def _gelu_cases() -> list[Case]:
    return [
        Case(operator="bias_gelu", name=name, run=functools.partial(_gelu, 64, 256, 1024, dtype))
        for name, dtype in (("latents bf16", torch.bfloat16), ("latents fp32", torch.float32))
    ]


def _heads(B: int, C: int) -> None:
    from kernels.heads import segment_heads

    shapes = ((B, 64, C), (7, C), (7,), (1, C), (1,), (64, 2, 3))
    inputs = [torch.zeros(*shape, requires_grad=True) for shape in shapes]
    outputs = segment_heads(*inputs, impl="triton")
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(output) for output in outputs])


def _heads_cases() -> list[Case]:
    table = {"64x64": (64, 256, False), "64x64 wide": (64, 1024, True), "64x64 odd": (64, 250, True)}
    return [
        Case(operator="segment_heads", name=name, run=functools.partial(_heads, *sizes), full=full)
        for name, (*sizes, full) in table.items()
    ]


def _turn() -> None:
    from kernels.turn import turn

    scene_B = torch.zeros(64, dtype=torch.int64)
    turn(torch.zeros(64, 4096, 3), torch.zeros(64, 64, 2, 3), scene_B, seed=353, step=1, impl="triton")


def _loss_terms(conf_target: str) -> None:
    from kernels.loss_terms import loss_terms

    B, N = 64, 64
    transport_B, endpoint_B, conf_BN = (torch.zeros(*shape, requires_grad=True) for shape in ((B,), (B,), (B, N)))
    matched_BN, partner_BN = torch.zeros(B, N), torch.zeros(B, N, dtype=torch.int64)
    loss = loss_terms(
        transport_B,
        endpoint_B,
        matched_BN,
        partner_BN,
        conf_BN,
        torch.zeros(B, dtype=torch.int32),
        conf_weight=0.1,
        endpoint_weight=0.5,
        conf_target=conf_target,
        impl="triton",
    )
    torch.autograd.grad(loss.total, [transport_B, endpoint_B, conf_BN])


def _loss_terms_cases() -> list[Case]:
    # name -> only on request
    table = {"mass": False, "partner": True}
    return [
        Case(
            operator="loss_terms",
            name=f"64x64 {target}",
            run=functools.partial(_loss_terms, target),
            full=full,
            trips=lambda launch: 2 if launch.kernel == "_loss_terms_fwd_kernel" else 1,
        )
        for target, full in table.items()
    ]


def _gather() -> None:
    from kernels.gather import gather_rows

    B, T = 64, 4096
    points = [torch.zeros(B, T, *size, dtype=dtype) for size, dtype in (((3,), torch.float32), ((), torch.uint8))]
    counts = [torch.zeros(B, dtype=dtype) for dtype in (torch.int32, torch.int64)]
    gather_rows([*points, torch.zeros(B, 64, 2, 3), *counts], torch.arange(B), impl="triton")


def _points(B: int, T: int, precision: str) -> None:
    from kernels.points import point_embedding

    J, C, F = 1024, 256, 32
    classes = {"label_table": (13, 16), "source_table": (2, 2), "behind_table": (29, 8)}
    K = 3 + 2 * F + sum(width for _, width in classes.values()) + 2
    shapes = classes | {"weight1": (J, K), "bias1": (J,), "weight2": (C, J), "bias2": (C,), "gain": (C,)}
    weights = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    indices = [torch.zeros(B, T, dtype=torch.uint8) for _ in classes]
    points = [torch.zeros(B, T, 3), *indices, torch.zeros(B, T, 2)]
    memory_BTC = point_embedding(
        *points,
        frequencies_F3=torch.zeros(F, 3),
        **weights,
        point_count_B=torch.full((B,), T, dtype=torch.int32),
        precision=precision,
        impl="triton",
    )
    torch.autograd.grad(memory_BTC, list(weights.values()), torch.zeros_like(memory_BTC))


def _points_trips(launch: Launch) -> int:
    match launch.kernel:
        case "_point_layers_fwd_kernel":
            return launch.constants["J"] // launch.constants["BLOCK_J"]
        case "_point_weight1_bwd_kernel" | "_point_weight2_bwd_kernel":
            return launch.constants["SEGMENT"] // launch.constants["BLOCK_P"]
    return 1


def _points_cases() -> list[Case]:
    return [
        Case(
            operator="point_embedding",
            name=f"64x4096 {precision}",
            run=functools.partial(_points, 64, 4096, precision),
            full=precision != "bf16",
            trips=_points_trips,
            main_loop={"matrix": 1} if precision != "ieee" else {},
        )
        for precision in ("bf16", "tf32", "ieee")
    ]


def _adamw() -> None:
    from kernels.adamw import adamw

    # as many tensors as the model has; few of them are long
    sizes = [262144, *[131072] * 60, *[256] * 80, *[4] * 17, 1, 7, 97280]
    params, grads, exp_avgs, exp_avg_sqs = ([torch.zeros(size) for size in sizes] for _ in range(4))
    steps, decays = [torch.zeros(()) for _ in sizes], [0.01] * len(sizes)
    options = {"lr": torch.zeros(()), "decays": decays, "limit": 1.0}
    adamw(params, grads, exp_avgs, exp_avg_sqs, steps, **options, impl="triton")


CASES = (
    *_sinkhorn_cases(),
    *_matching_cases(),
    *_attention_cases(),
    *_points_cases(),
    *_residual_cases(),
    *_gelu_cases(),
    *_heads_cases(),
    Case(operator="gather_rows", name="64x4096", run=_gather),
    Case(operator="turn", name="64x4096 fp32", run=_turn),
    *_loss_terms_cases(),
    Case(operator="adamw", name="161 tensors", run=_adamw),
)
