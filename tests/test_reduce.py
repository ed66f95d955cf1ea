"""Sums over segments: exact to rounding, in an order that depends on their number alone."""

import torch

from kernels.reduce import sum_segments


def test_segments_are_added_within_float32_rounding_and_repeat(device):
    partial = torch.randn(37, 3, 70, generator=torch.Generator().manual_seed(0))
    first, second = (sum_segments(partial.to(device)) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu(), partial.double().sum(0).float(), rtol=1e-6, atol=2e-6)


def test_an_element_has_the_bits_of_its_own_column(device):
    partial = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(sum_segments(partial)[211:214], sum_segments(partial[:, 211:214].contiguous()))


def test_no_segments_give_zeros(device):
    assert not sum_segments(torch.ones(0, 5, 3, device=device)).any()
