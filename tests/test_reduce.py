"""`sum_segments`: a sum over rows in one order."""

import pytest
import torch

from kernels.reduce import BLOCK_S, sum_segments


@pytest.mark.parametrize("S, C", [(1, 1), (3, 40), (16, 300), (BLOCK_S, 16), (3 * BLOCK_S + 5, 20), (9 * BLOCK_S, 3)])
def test_rows_are_added_to_float32_accuracy(S, C, device):
    partial_SN = torch.randn(S, C, generator=torch.Generator().manual_seed(0)).to(device)
    exact = partial_SN.double().sum(0)
    bound = 2**-24 * (S // BLOCK_S + 9) * partial_SN.double().abs().sum(0)
    assert ((sum_segments(partial_SN).double() - exact).abs() <= bound).all()


def test_a_lane_adds_in_ascending_order(device):
    # 1 is lost beside 2^26, so what is left tells when it was added
    partial_SN = torch.zeros(3 * BLOCK_S, 2, device=device)
    partial_SN[0], partial_SN[BLOCK_S], partial_SN[2 * BLOCK_S] = (
        torch.tensor(row, device=device) for row in ([2.0**26, 1.0], [1.0, 2.0**26], [-(2.0**26), -(2.0**26)])
    )
    assert sum_segments(partial_SN).tolist() == [0.0, 0.0]
    assert sum_segments(partial_SN.flip(0)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("S", [12, BLOCK_S + 1])
def test_columns_do_not_meet(S, device):
    partial_SN = torch.randn(S, 33, generator=torch.Generator().manual_seed(0)).to(device)
    alone = torch.cat([sum_segments(partial_SN[:, c : c + 1].contiguous()) for c in range(33)])
    assert torch.equal(sum_segments(partial_SN), alone)


def test_nothing_adds_up_to_zero(device):
    assert sum_segments(torch.empty(0, 3, device=device)).tolist() == [0.0, 0.0, 0.0]
    assert sum_segments(torch.empty(5, 0, device=device)).shape == (0,)
