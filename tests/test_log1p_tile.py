"""`kernels.log1p_tile`: how exact the forms that kernels call are."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.log1p_tile import cross_entropy, softplus


@triton.jit
def _log1p_kernel(t_ptr, softplus_ptr, cross_entropy_ptr, BLOCK: tl.constexpr):
    """Both forms where all that log(1 + t) is added to is 0."""
    offs = tl.arange(0, BLOCK)
    t = tl.load(t_ptr + offs)
    zero = tl.zeros([BLOCK], tl.float32)
    tl.store(softplus_ptr + offs, softplus(zero, t))
    tl.store(cross_entropy_ptr + offs, cross_entropy(zero, zero, t))


# in units of 2^-24 of the result; a plain quotient is that of PTX's div.full, wrong by up to 2 units in the last place:
# such errors in either direction give up to 7.8, and 3.7 where the quotient is rounded
@pytest.mark.parametrize(("form", "units"), [(0, 4), (1, 8)], ids=["softplus", "cross_entropy"])
def test_the_forms_give_log1p_to_a_few_roundings_from_0_to_1(form, units, device):
    # from where quotients are no subnormal numbers, whose digits are fewer
    t = torch.cat([torch.linspace(0, 1, 768), torch.logspace(-37, 0, 256)]).to(device)
    found = torch.empty_like(t), torch.empty_like(t)
    _log1p_kernel[(1,)](t, *found, BLOCK=1024, num_warps=4)
    truth = t.double().log1p()
    error = (found[form].double() - truth).abs()
    assert (error <= units * 2.0**-24 * truth).all(), (error / truth.clamp(min=1e-300)).max()
