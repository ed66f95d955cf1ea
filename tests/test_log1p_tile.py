"""`kernels.log1p_tile`: how exact the series is where it is used."""

import torch
import triton
import triton.language as tl

from kernels.log1p_tile import artanh_series


@triton.jit
def _log1p_kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    t = tl.load(t_ptr + offs)
    s = t / (2.0 + t)
    g = s * s
    tl.store(out_ptr + offs, 2.0 * (s + s * (g * artanh_series(g))))


def test_the_series_gives_log1p_to_a_few_roundings_from_0_to_1(device):
    t = torch.cat([torch.linspace(0, 1, 768), torch.logspace(-38, 0, 256)]).to(device)
    out = torch.empty_like(t)
    _log1p_kernel[(1,)](t, out, BLOCK=1024, num_warps=4)
    truth = t.double().log1p()
    error = (out.double() - truth).abs()
    assert (error <= 4 * 2.0**-24 * truth).all(), (error / truth.clamp(min=1e-300)).max()
