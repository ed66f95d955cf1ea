"""`sum_segments`: a sum over rows in one order."""

import pytest
import torch

from kernels.reduce import TREE, sum_segments


@pytest.mark.parametrize("S, C", [(1, 1), (3, 40), (TREE, 16), (3 * TREE + 5, 20)])
def test_rows_are_added_to_float32_accuracy(S, C, device):
    partials_SC = torch.randn(S, C, generator=torch.Generator().manual_seed(0)).to(device)
    exact = partials_SC.double().sum(0)
    bound = 2**-24 * (S // TREE + 9) * partials_SC.double().abs().sum(0)
    assert ((sum_segments(partials_SC).double() - exact).abs() <= bound).all()


def test_trees_are_added_in_ascending_order(device):
    # 1 is lost beside 2^26, so what is left tells when it was added
    partials_SC = torch.zeros(3 * TREE, 2, device=device)
    partials_SC[0], partials_SC[TREE], partials_SC[2 * TREE] = (
        torch.tensor(row, device=device) for row in ([2.0**26, 1.0], [1.0, 2.0**26], [-(2.0**26), -(2.0**26)])
    )
    assert sum_segments(partials_SC).tolist() == [0.0, 0.0]
    assert sum_segments(partials_SC.flip(0)).tolist() == [0.0, 1.0]


def test_columns_do_not_meet(device):
    partials_SC = torch.randn(TREE + 1, 33, generator=torch.Generator().manual_seed(0)).to(device)
    alone = torch.cat([sum_segments(partials_SC[:, c : c + 1].contiguous()) for c in range(33)])
    assert torch.equal(sum_segments(partials_SC), alone)


def test_nothing_adds_up_to_zero(device):
    assert sum_segments(torch.empty(0, 3, device=device)).tolist() == [0.0, 0.0, 0.0]
    assert sum_segments(torch.empty(5, 0, device=device)).shape == (0,)
