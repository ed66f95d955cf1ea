"""Attention at the model's shapes, against what PyTorch offers for the same result, normalisations included.

On a CPU 4 items in float32, on a GPU 32 in bfloat16; the sweeps have more items and more keys. Outputs and gradients
are compared with float64.
"""

import functools
import math

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, ON_GPU
from bench.peers import attention_peers, by_name, ours
from kernels.attention import gqa_attention, gqa_attention_reference

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ITEMS = 32 if ON_GPU else 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[DTYPE]
HEADS, KV_HEADS = 4, 2
# name -> (items, queries, keys, head width, keys counted per item)
SHAPES = {
    "cross 256x2048": (ITEMS, 256, 2048, 64, True),
    "self 256x256": (ITEMS, 256, 256, 64, False),
    "decoder 64x256": (ITEMS, 64, 256, 64, False),
    "demo cross 32x256": (32, 32, 256, 16, True),
    "demo self 32x32": (32, 32, 32, 16, False),
}
# torch.compile takes longer than all else on a CPU
COMPILED_SHAPES = tuple(SHAPES) if ON_GPU else ("cross 256x2048",)
SWEPT = ("ridgeline", "einsum", "sdpa, expanded", "sdpa, grouped")
BATCHES = (1, 4, 16, 64, 256) if ON_GPU else (1, 2, 4, 8, 16)
KEYS = (256, 512, 1024, 2048, 4096)
PEERS = by_name(*ours(lambda *tensors: gqa_attention(*tensors[:4], key_count_B=tensors[4])), *attention_peers())


@functools.cache
def _problem(B: int, T: int, S: int, D: int, ragged: bool) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """Return q, k, v and log_scale; the upstream gradient; the counts of keys and their mask."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((T, HEADS), (S, KV_HEADS), (S, KV_HEADS), (T, HEADS))
    q_BHTD, k_BGSD, v_BGSD, do_BHTD = (
        torch.randn(B, n, h, D, generator=generator).to(DEVICE, DTYPE).transpose(1, 2) for n, h in sizes
    )
    log_scale_H = torch.full((HEADS,), math.log(D) / 2, device=DEVICE)
    count_B = torch.randint(S * 3 // 4, S + 1, (B,), generator=generator).to(DEVICE) if ragged else None
    mask_BS = None if count_B is None else torch.arange(S, device=DEVICE) < count_B[:, None]
    return [q_BHTD, k_BGSD, v_BGSD, log_scale_H], do_BHTD, count_B, mask_BS


@functools.cache
def _truth(*shape) -> list[Tensor]:
    leaves, do_BHTD, count_B, _ = _problem(*shape)
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    o_BHTD = gqa_attention_reference(*leaves, key_count_B=count_B)
    return [o_BHTD.detach(), *torch.autograd.grad(o_BHTD, leaves, do_BHTD.double())]


def _measure_attention(measure, shape, peer, passes, group, **notes):
    leaves, do_BHTD, count_B, mask_BS = _problem(*shape)
    for leaf in leaves:
        leaf.requires_grad_(passes != "forward")

    def run() -> list[Tensor]:
        o_BHTD = peer.solve(*leaves, count_B, mask_BS)
        return [o_BHTD] if passes == "forward" else [o_BHTD, *torch.autograd.grad(o_BHTD, leaves, do_BHTD)]

    B, T, S, D, _ = shape
    measure(
        run,
        group=f"attention, {group}, {passes}",
        peer=peer,
        truth=_truth(*shape)[: 1 if passes == "forward" else None],
        tolerance=TOLERANCE,
        inputs=leaves if passes == "forward" else [*leaves, do_BHTD],
        # two products forward, five backward
        flops=(4 if passes == "forward" else 14) * B * HEADS * T * S * D,
        items=B, queries=T, keys=S, heads=HEADS, kv_heads=KV_HEADS, width=D, dtype=str(DTYPE).split(".")[1],
        **notes,
    )  # fmt: skip


# peers warn while they are compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("shape", "peer"),
    [(shape, name) for shape in SHAPES for name in PEERS if shape in COMPILED_SHAPES or not PEERS[name].compiled],
)
def bench_attention(measure, shape, peer, passes):
    _measure_attention(measure, SHAPES[shape], PEERS[peer], passes, shape)


@pytest.mark.parametrize("peer", SWEPT)
@pytest.mark.parametrize(("sweep", "size"), [("batch", B) for B in BATCHES] + [("keys", S) for S in KEYS], ids=str)
def bench_attention_sweep(measure, sweep, size, peer):
    shape = (size, 256, 256, 64, False) if sweep == "batch" else (ITEMS, 256, size, 64, True)
    _measure_attention(
        measure, shape, PEERS[peer], "forward and backward", f"sweep in {sweep}, {size}", sweep=sweep, size=size
    )
