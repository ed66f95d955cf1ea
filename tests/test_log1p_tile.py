"""`kernels.log1p_tile`: how exact the series is where it is used."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.log1p_tile import artanh_series


@triton.jit
def _log1p_of_heads_kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    t = tl.load(t_ptr + offs)
    s = tl.div_rn(t, 2.0 + t)
    g = s * s
    tl.store(out_ptr + offs, 2.0 * (s + s * (g * artanh_series(g))))


@triton.jit
def _log1p_of_loss_terms_kernel(t_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    t = tl.load(t_ptr + offs)
    s = t / (2.0 + t)
    g = s * s
    tl.store(out_ptr + offs, 2.0 * s * (artanh_series(g) * g + 1.0))


# in units of 2^-24 of the result; a plain quotient is that of PTX's div.full, wrong by up to 2 units in the last place:
# such errors in either direction give up to 7.8, and 3.7 where the quotient is rounded
@pytest.mark.parametrize(("kernel", "units"), [(_log1p_of_heads_kernel, 4), (_log1p_of_loss_terms_kernel, 8)])
def test_the_series_gives_log1p_to_a_few_roundings_from_0_to_1(kernel, units, device):
    # from where quotients are no subnormal numbers, whose digits are fewer
    t = torch.cat([torch.linspace(0, 1, 768), torch.logspace(-37, 0, 256)]).to(device)
    out = torch.empty_like(t)
    kernel[(1,)](t, out, BLOCK=1024, num_warps=4)
    truth = t.double().log1p()
    error = (out.double() - truth).abs()
    assert (error <= units * 2.0**-24 * truth).all(), (error / truth.clamp(min=1e-300)).max()
