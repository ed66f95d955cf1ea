"""Attention at the model's shapes, against what PyTorch offers for the same result, normalisations included.

On a CPU 4 items in float32, on a GPU 32 in bfloat16. Before a row is timed, its output and its gradients are compared
with float64; a peer that refuses the input or cannot be compiled here is skipped with its reason.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention

from kernels.attention import gqa_attention, gqa_attention_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ITEMS = 32 if DEVICE.type == "cuda" else 4
# the largest error of an output or a gradient, relative to the largest true value
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[DTYPE]
ROUNDS = 50 if DEVICE.type == "cuda" else 9
HEADS, KV_HEADS = 4, 2
# name -> (items, queries, keys, head width, keys counted per item)
SHAPES = {
    "cross 256x2048": (ITEMS, 256, 2048, 64, True),
    "self 256x256": (ITEMS, 256, 256, 64, False),
    "decoder 64x256": (ITEMS, 64, 256, 64, False),
    "demo cross 32x256": (32, 32, 256, 16, True),
    "demo self 32x32": (32, 32, 32, 16, False),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    q_BHTD: torch.Tensor
    k_BGSD: torch.Tensor
    v_BGSD: torch.Tensor
    log_scale_H: torch.Tensor
    do_BHTD: torch.Tensor
    key_count_B: torch.Tensor | None
    key_mask_BS: torch.Tensor | None

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.q_BHTD, self.k_BGSD, self.v_BGSD, self.log_scale_H]


@functools.cache
def _problem(shape: str) -> Problem:
    B, T, S, D, ragged = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = ((T, HEADS), (S, KV_HEADS), (S, KV_HEADS), (T, HEADS))
    rows = (torch.randn(B, n, h, D, generator=generator).to(DEVICE, DTYPE).transpose(1, 2) for n, h in sizes)
    q_BHTD, k_BGSD, v_BGSD, do_BHTD = rows
    key_count_B = torch.randint(S * 3 // 4, S + 1, (B,), generator=generator).to(DEVICE) if ragged else None
    return Problem(
        q_BHTD=q_BHTD,
        k_BGSD=k_BGSD,
        v_BGSD=v_BGSD,
        log_scale_H=torch.full((HEADS,), math.log(D) / 2, device=DEVICE),
        do_BHTD=do_BHTD,
        key_count_B=key_count_B,
        key_mask_BS=None if key_count_B is None else torch.arange(S, device=DEVICE) < key_count_B[:, None],
    )


def _unit(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normalised, scaled queries; normalised keys; values."""
    q_BHTD = normalize(problem.q_BHTD, dim=-1) * problem.log_scale_H.exp()[:, None, None].to(DTYPE)
    return q_BHTD, normalize(problem.k_BGSD, dim=-1), problem.v_BGSD


def _mask(problem: Problem) -> torch.Tensor | None:
    return None if problem.key_mask_BS is None else problem.key_mask_BS[:, None, None]


def _ridgeline(problem: Problem) -> torch.Tensor:
    return gqa_attention(*problem.leaves, key_count_B=problem.key_count_B)


def _einsum(problem: Problem) -> torch.Tensor:
    return gqa_attention_reference(*problem.leaves, key_count_B=problem.key_count_B)


def _sdpa_grouped(problem: Problem) -> torch.Tensor:
    return scaled_dot_product_attention(*_unit(problem), attn_mask=_mask(problem), scale=1.0, enable_gqa=True)


def _sdpa_expanded(problem: Problem, backend: SDPBackend | None = None) -> torch.Tensor:
    q_BHTD, *keys = _unit(problem)
    k_BHSD, v_BHSD = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in keys)
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=_mask(problem), scale=1.0)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)


def _einsum_compiled(problem: Problem) -> torch.Tensor:
    return _compiled(gqa_attention_reference)(*problem.leaves, key_count_B=problem.key_count_B)


def _flex(problem: Problem, **kernel_options: int) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, T, S, _, _ = _sizes(problem)
    count_B = problem.key_count_B
    blocks = None
    if count_B is not None:
        blocks = create_block_mask(lambda b, h, t, s: s < count_B[b], B, None, T, S, device=DEVICE.type)
    return _compiled(flex_attention)(
        *_unit(problem), block_mask=blocks, scale=1.0, enable_gqa=True, kernel_options=kernel_options or None
    )


def _sizes(problem: Problem) -> tuple[int, int, int, int, int]:
    (B, H, T, D), S = problem.q_BHTD.shape, problem.k_BGSD.shape[2]
    return B, T, S, D, H


PEERS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "ridgeline": _ridgeline,
    "einsum": _einsum,
    "einsum, torch.compile": _einsum_compiled,
    "sdpa, grouped": _sdpa_grouped,
    "sdpa, expanded": _sdpa_expanded,
    "flex": _flex,
}
if DEVICE.type == "cuda":
    PEERS |= {
        f"sdpa, expanded, {backend.name}": functools.partial(_sdpa_expanded, backend=backend)
        for backend in (
            SDPBackend.MATH,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        )
    }
    PEERS["flex, pinned"] = functools.partial(_flex, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)


@functools.cache
def _truth(shape: str) -> list[torch.Tensor]:
    problem = _problem(shape)
    leaves = [x.detach().double().requires_grad_() for x in problem.leaves]
    o = gqa_attention_reference(*leaves, key_count_B=problem.key_count_B)
    return [o.detach(), *torch.autograd.grad(o, leaves, problem.do_BHTD.double())]


def _error(actual: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest error of any of the tensors, relative to its largest true value."""
    pairs = zip(actual, truth, strict=True)
    return max(float((x.detach().double() - y).abs().max() / y.abs().max()) for x, y in pairs)


def _root(error: BaseException) -> str:
    """What a compiler's error is about: the first line of the error below it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return str(error).strip().partition("\n")[0]


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_attention(benchmark, shape, peer, passes):
    problem, attend = _problem(shape), PEERS[peer]
    for leaf in problem.leaves:
        leaf.requires_grad_(passes != "forward")

    def run() -> list[torch.Tensor]:
        o = attend(problem)
        return [o] if passes == "forward" else [o, *torch.autograd.grad(o, problem.leaves, problem.do_BHTD)]

    try:
        found = run()
    except (RuntimeError, NotImplementedError) as refusal:
        pytest.skip(f"{peer} refuses {shape}, {passes}: {_root(refusal)}")
    error = _error(found, _truth(shape)[: len(found)])
    assert error <= TOLERANCE, f"relative error {error:.1e}"

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    B, T, S, D, H = _sizes(problem)
    benchmark.group = f"attention, {shape}, {passes}"
    benchmark.extra_info.update(
        peer=peer, items=B, queries=T, keys=S, heads=H, kv_heads=KV_HEADS, width=D, dtype=str(DTYPE).split(".")[1],
        threads=torch.get_num_threads(), error=f"{error:.1e}",
    )  # fmt: skip
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=2)
