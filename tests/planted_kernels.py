"""Kernels with one fault each, and one without, as a table of cases for `bench.static`."""

import torch
import triton
import triton.language as tl

from bench.static_cases import Case
from kernels.reduce import rounded

SPILLS_ALLOWED = {}


@triton.jit
def _clean_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(x_ptr + tile), input_precision="tf32"))


@triton.jit
def _spill_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    x = tl.load(x_ptr + tile)
    x += tl.sum(x, axis=0)[None, :]
    x *= tl.sum(x, axis=1)[:, None]
    tl.store(out_ptr + tile, x)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE)), axis=0))


@triton.jit
def _fused_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, ROUNDED: tl.constexpr):
    offs = tl.arange(0, SIZE)
    product = tl.load(x_ptr + offs) * tl.load(out_ptr + offs)
    if ROUNDED:
        product = rounded(product)
    tl.store(out_ptr + offs, tl.sum(product, axis=0))


@triton.jit
def _scalar_dot_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    x = tl.load(x_ptr + tile)
    # sm_100 has no matrix instructions for float64
    scalar = tl.dot(x.to(tl.float64), x.to(tl.float64))
    tl.store(out_ptr + tile, tl.dot(x.to(tl.bfloat16), x.to(tl.bfloat16)) + scalar.to(tl.float32))


@triton.jit
def _greedy_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        at = tile + step * SIZE * SIZE
        total += tl.dot(tl.load(x_ptr + at), tl.load(out_ptr + at), input_precision="tf32")
    tl.store(out_ptr + tile, total)


def _memory() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1 << 16), torch.zeros(1 << 16)


def _broken() -> None:
    raise NotImplementedError("this operator has no kernel yet")


CASES = (
    Case(operator="clean", name="dot", run=lambda: _clean_kernel[(1,)](*_memory(), SIZE=64)),
    Case(operator="spill", name="tile", run=lambda: _spill_kernel[(1,)](*_memory(), SIZE=128, num_warps=2)),
    Case(operator="atomic", name="sum", run=lambda: _atomic_kernel[(4,)](*_memory(), SIZE=64)),
    Case(operator="fused", name="sum", run=lambda: _fused_kernel[(1,)](*_memory(), SIZE=128, ROUNDED=False)),
    Case(operator="rounded", name="sum", run=lambda: _fused_kernel[(1,)](*_memory(), SIZE=128, ROUNDED=True)),
    Case(operator="scalar_dot", name="float64", run=lambda: _scalar_dot_kernel[(1,)](*_memory(), SIZE=16)),
    Case(
        operator="greedy",
        name="stages",
        run=lambda: _greedy_kernel[(1,)](*_memory(), SIZE=128, STEPS=16, num_warps=8, num_stages=5),
    ),
    Case(operator="missing", name="raises", run=_broken),
    Case(operator="eager", name="nothing", run=lambda: torch.zeros(1) + 1),
)
