"""Who else computes the same: one function per peer, with its version, its licence and in what it means something else.

Formulas in plain PyTorch come in the log and in the scaling domain, so that what an algorithm gains is not taken for
what a kernel gains; `with_compile` and `with_graph` add torch.compile and CUDA graphs. A peer that is not installed
says so.
"""

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from bench.measure import ON_GPU, installed_version
from kernels.attention import gqa_attention_reference


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to compute what one of our operators computes.

    Args:
        name: as tables show it.
        solve: the call; it takes what its suite gives to every peer.
        package, licence: the distribution that does the work; None for this repository.
        differs: in what results or gradients mean something else; empty for identical mathematics.
        graph: replay all of the case from one CUDA graph.
        compiled: torch.compile makes its code.
    """

    name: str
    solve: Callable[..., Any]
    package: str | None = "torch"
    licence: str = "BSD-3-Clause"
    differs: str = ""
    graph: bool = False
    compiled: bool = False

    def version(self) -> str | None:
        """The installed version; None if it is not installed, or ours."""
        return installed_version(self.package) if self.package else None

    def require(self) -> None:
        """Check that the peer can be called at all.

        Raises:
            ImportError: it is not installed.
        """
        if self.package and self.version() is None:
            raise ImportError("not installed")


# POT imports every framework that it finds, of which JAX takes three quarters of a GPU's memory when it is imported
POT_ALONE = {f"POT_BACKEND_DISABLE_{name}": "1" for name in ("JAX", "TENSORFLOW", "CUPY")}
OURS = Peer(name="ridgeline", solve=lambda: None, package=None, licence="Apache-2.0")


def ours(solve: Callable[..., Any]) -> list[Peer]:
    """Our own operator, as the suites call it, on a GPU also replayed from a CUDA graph."""
    peer = replace(OURS, solve=solve)
    return [peer, with_graph(peer)] if ON_GPU else [peer]


def with_compile(peer: Peer, **options: Any) -> Peer:
    """The peer under torch.compile, compiled anew for each shape when it is first called."""

    @functools.cache
    def compile_once() -> Callable[..., Any]:
        return torch.compile(peer.solve, fullgraph=True, dynamic=False, **options)

    def solve(*arguments: Any, **settings: Any) -> Any:
        return compile_once()(*arguments, **settings)

    return replace(peer, name=f"{peer.name}, torch.compile", solve=solve, compiled=True)


def with_graph(peer: Peer) -> Peer:
    """The peer replayed from a CUDA graph."""
    return replace(peer, name=f"{peer.name}, CUDA graph", graph=True)


def by_name(*peers: Peer) -> dict[str, Peer]:
    """The peers of a suite by name; names must differ."""
    named = {peer.name: peer for peer in peers}
    assert len(named) == len(peers), "two peers have one name"
    return named


# Optimal transport: solve(Z, log a, log b, iterations, shift) -> exp(Z + u + v)


def log_domain(Z: Tensor, log_a: Tensor, log_b: Tensor, iterations: int, shift: float) -> Tensor:
    """Iterate Sinkhorn's half-steps on logarithms; -inf in log b is padding."""
    v = torch.where(log_b == -math.inf, log_b, 0)
    for _ in range(iterations):
        u = log_a - torch.logsumexp(Z + v[:, None], 2)
        v = log_b - torch.logsumexp(Z + u[:, :, None], 1)
    return torch.exp(Z + u[:, :, None] + v[:, None])


def scaling_domain(Z: Tensor, log_a: Tensor, log_b: Tensor, iterations: int, shift: float) -> Tensor:
    """Iterate Sinkhorn's half-steps as products; exp(Z + shift) must stay finite."""
    K, a, b = torch.exp(Z + shift), log_a.exp(), log_b.exp()
    v = (b > 0).to(b)
    for _ in range(iterations):
        u = a / (K * v[:, None]).sum(2)
        v = b / (K * u[:, :, None]).sum(1)
    return K * u[:, :, None] * v[:, None]


def with_dustbin(
    cost_BNM: Tensor, cols_B: Tensor, *, solve: Callable[..., Tensor], eps: float, iterations: int, dustbin: float
) -> Tensor:
    """Return the plan of `kernels.sinkhorn` (ragged columns, slack "full") by a solver in plain PyTorch."""
    n, m = float(cost_BNM.shape[1]), cols_B[:, None].to(cost_BNM)
    real = torch.arange(cost_BNM.shape[2], device=cost_BNM.device) < cols_B[:, None]
    log_a = torch.cat([torch.zeros_like(cost_BNM[:, :, 0]), m.log()], 1) - (n + m).log()
    log_b = torch.cat([torch.where(real, 0.0, -math.inf), torch.full_like(m, math.log(n))], 1) - (n + m).log()
    Z = pad(cost_BNM, (0, 1, 0, 1), value=dustbin) / -eps
    return ((n + m)[:, :, None] * solve(Z, log_a, log_b, iterations, dustbin / eps))[:, :-1, :-1]


def dustbin_peers(**settings: Any) -> list[Peer]:
    """Identical mathematics to `sinkhorn` with a dustbin: solve(cost_BNM, cols_B) -> plan."""
    plain = [
        Peer(name=name, solve=functools.partial(with_dustbin, solve=solve, **settings))
        for name, solve in (("log domain", log_domain), ("scaling domain", scaling_domain))
    ]
    return [*plain, *map(with_compile, plain), *(map(with_graph, plain) if ON_GPU else ())]


def balanced_peers() -> list[Peer]:
    """Dense problems without a dustbin: solve(x_BND, y_BMD, cost_BNM, eps, iterations) -> plan, cost = |x - y|^2."""
    same = "one number of iterations for the whole batch; an item with an empty side gives NaN"
    return [
        Peer(name="POT, log_sinkhorn", solve=_pot("log_sinkhorn"), package="POT", licence="MIT", differs=same),
        Peer(name="POT, sinkhorn", solve=_pot("sinkhorn"), package="POT", licence="MIT", differs=same),
        Peer(
            name="GeomLoss",
            solve=_geomloss,
            package="geomloss",
            licence="MIT",
            differs="symmetric averaged half-steps while eps falls to its value; an item depends on its neighbours",
        ),
        Peer(
            name="flash-sinkhorn",
            solve=_flash_sinkhorn,
            package="flash-sinkhorn",
            licence="MIT",
            differs="costs are |x - y|^2 of points, no matrix; one item a call; the plan is put together afterwards",
        ),
    ]


def _pot(method: str) -> Callable[..., Tensor]:
    def solve(x_BND: Tensor, y_BMD: Tensor, cost_BNM: Tensor, eps: float, iterations: int) -> Tensor:
        os.environ.update(POT_ALONE)
        batch: Any = importlib.import_module("ot.batch")
        # it makes the marginals on the default device
        with torch.device(cost_BNM.device):
            return batch.solve_batch(cost_BNM, eps, max_iter=iterations, tol=0.0, method=method, grad="detach").plan

    return solve


def _geomloss(x_BND: Tensor, y_BMD: Tensor, cost_BNM: Tensor, eps: float, iterations: int) -> Tensor:
    geomloss: Any = importlib.import_module("geomloss.ot")
    return geomloss.solve_batch(cost_BNM, reg=eps, max_iter=iterations).plan


def _flash_sinkhorn(x_BND: Tensor, y_BMD: Tensor, cost_BNM: Tensor, eps: float, iterations: int) -> Tensor:
    flash: Any = importlib.import_module("flash_sinkhorn")
    options = {"backend": "alternating", "use_epsilon_scaling": False, "autotune": False, "allow_tf32": False}
    solve = flash.SamplesLoss(eps=eps, n_iters=iterations, debias=False, potentials=True, **options)
    potentials = [solve(x_ND, y_MD) for x_ND, y_MD in zip(x_BND, y_BMD, strict=True)]
    f_BN, g_BM = (torch.stack(side) for side in zip(*potentials, strict=True))
    return torch.exp((f_BN[:, :, None] + g_BM[:, None] - cost_BNM) / eps) / (f_BN.shape[1] * g_BM.shape[1])


# Segment matching: solve(mid_BN3, dir_BN3, len_BN, gt_BM23, count_B, plan_gradient=...) -> transport, endpoint, matched


def matching_peers(**settings: Any) -> list[Peer]:
    """Identical mathematics to `match_segments`."""
    plain = [
        Peer(name=name, solve=functools.partial(match_plainly, solve=solve, **settings))
        for name, solve in (("log domain", log_domain), ("scaling domain", scaling_domain))
    ]
    return [*plain, *map(with_compile, plain), *(map(with_graph, plain) if ON_GPU else ())]


def match_plainly(
    mid_BN3: Tensor,
    dir_BN3: Tensor,
    len_BN: Tensor,
    gt_BM23: Tensor,
    count_B: Tensor,
    *,
    solve: Callable[..., Tensor],
    plan_gradient: str,
    eps: float,
    iterations: int,
    cost_scale: float,
    dustbin: float,
    direction_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return transport, endpoint and matched in plain PyTorch; coordinates come first, where it is fastest."""
    start_3B1M, end_3B1M = gt_BM23.permute(2, 3, 0, 1).contiguous()[:, :, :, None]
    mid_3BN1, dir_3BN1 = (x.movedim(2, 0).contiguous()[..., None] for x in (mid_BN3, dir_BN3))
    gt_len_B1M = _norm(end_3B1M - start_3B1M)
    gt_dir_3B1M = (end_3B1M - start_3B1M) / gt_len_B1M
    sign_BNM = torch.where((dir_3BN1 * gt_dir_3B1M).sum(0) >= 0, 1.0, -1.0)
    distance_BNM = _norm(mid_3BN1 - (start_3B1M + end_3B1M) / 2)
    angle_BNM = _norm(dir_3BN1 - sign_BNM * gt_dir_3B1M)
    cost_BNM = cost_scale * (distance_BNM + direction_weight * angle_BNM + (len_BN[:, :, None] - gt_len_B1M).abs())

    settings = {"eps": eps, "iterations": iterations, "dustbin": cost_scale * dustbin}
    plan_BNM = with_dustbin(cost_BNM, count_B, solve=solve, **settings)
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


# the tile of FlexAttention where its choice is taken from it
PINNED: Any = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}

# Attention: solve(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS) -> o_BHTD; each normalises first


def attention_peers() -> list[Peer]:
    """What PyTorch offers for the result of `gqa_attention`, normalisations included."""
    einsum = Peer(name="einsum", solve=_einsum)
    grouped = Peer(name="sdpa, grouped", solve=functools.partial(_sdpa, expand=False))
    peers = [
        einsum,
        with_compile(einsum),
        grouped,
        Peer(name="sdpa, expanded", solve=_sdpa),
        Peer(name="flex", solve=_flex, compiled=True),
    ]
    if not ON_GPU:
        return peers
    backends = ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION")
    forced = [
        Peer(name=f"sdpa, expanded, {name}", solve=functools.partial(_sdpa, backend=getattr(SDPBackend, name)))
        for name in backends
    ]
    # as a model has them: the normalisations belong to what is compiled
    whole = [
        Peer(name="flex, normalisation compiled", solve=_flex_whole, compiled=True),
        Peer(
            name="flex, pinned, normalisation compiled",
            solve=functools.partial(_flex_whole, pinned=True),
            compiled=True,
        ),
        with_compile(grouped),
    ]
    return [*peers, *forced, *whole, *map(with_graph, (einsum, peers[3], forced[1], peers[4]))]


def _einsum(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS) -> Tensor:
    return gqa_attention_reference(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B=key_count_B)


def _unit(q_BHTD: Tensor, k_BGSD: Tensor, log_scale_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised, scaled queries and normalised keys."""
    scale_H11 = log_scale_H.exp()[:, None, None].to(q_BHTD.dtype)
    return normalize(q_BHTD, dim=-1) * scale_H11, normalize(k_BGSD, dim=-1)


def _sdpa(
    q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS, *, expand=True, backend: SDPBackend | None = None
) -> Tensor:
    q_BHTD, k_BGSD = _unit(q_BHTD, k_BGSD, log_scale_H)
    mask_B11S = None if key_mask_BS is None else key_mask_BS[:, None, None]
    if expand:
        group = q_BHTD.shape[1] // k_BGSD.shape[1]
        k_BGSD, v_BGSD = (x.repeat_interleave(group, 1) for x in (k_BGSD, v_BGSD))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(
            q_BHTD, k_BGSD, v_BGSD, attn_mask=mask_B11S, scale=1.0, enable_gqa=not expand
        )


def _flex(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS) -> Tensor:
    blocks = _flex_mask(q_BHTD, k_BGSD, key_count_B)
    q_BHTD, k_BGSD = _unit(q_BHTD, k_BGSD, log_scale_H)
    return _flex_compiled()(q_BHTD, k_BGSD, v_BGSD, block_mask=blocks, scale=1.0, enable_gqa=True)


def _flex_whole(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, key_mask_BS, *, pinned: bool = False) -> Tensor:
    blocks = _flex_mask(q_BHTD, k_BGSD, key_count_B)
    return _flex_whole_compiled(pinned)(q_BHTD, k_BGSD, v_BGSD, log_scale_H, blocks)


@functools.cache
def _flex_compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@functools.cache
def _flex_whole_compiled(pinned: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    options = PINNED if pinned else None

    def attend(q_BHTD, k_BGSD, v_BGSD, log_scale_H, blocks):
        q_BHTD, k_BGSD = _unit(q_BHTD, k_BGSD, log_scale_H)
        return flex_attention(
            q_BHTD, k_BGSD, v_BGSD, block_mask=blocks, scale=1.0, enable_gqa=True, kernel_options=options
        )

    return torch.compile(attend, fullgraph=True, dynamic=False)


def _flex_mask(q_BHTD: Tensor, k_BGSD: Tensor, key_count_B: Tensor | None):
    B, _, T, _ = q_BHTD.shape
    return None if key_count_B is None else _flex_blocks(key_count_B, B, T, k_BGSD.shape[2])


@functools.cache
def _flex_blocks(key_count_B: Tensor, B: int, T: int, S: int):
    """The block mask; it is made once, as a model would for all of its layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, t, s: s < key_count_B[b], B, None, T, S, device=key_count_B.device.type)
