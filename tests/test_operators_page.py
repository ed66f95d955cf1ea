"""The code of docs/operators.md runs, and what the page says of it holds."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "operators.md").read_text()


@pytest.fixture(scope="module")
def names():
    found = {}
    exec(textwrap.dedent("\n\n".join(re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE))), found)
    return found


def test_segments_learn_with_a_dustbin_above_their_first_cost(names):
    assert names["matched"] > 0.99 and names["loss"] < 0.1


def test_with_a_low_dustbin_the_loss_is_lower_and_half_is_not_matched(names):
    generator = torch.Generator().manual_seed(0)
    torch.rand(1, 12, 2, 3, generator=generator)
    with torch.no_grad():
        names["raw"].copy_(0.3 * torch.randn(1, 32, 7, generator=generator))
    names["optimizer"].state.clear()
    for _ in range(200):
        loss, matched = names["step"](dustbin=0.1)
    assert loss < names["loss"] and 0.3 < matched < 0.7


@pytest.mark.parametrize("dustbin", [0.25, 0.5])
def test_the_dustbin_is_a_threshold(names, dustbin):
    for cost, matched in ((dustbin * 0.9, True), (dustbin * 1.1, False)):
        plan, *_ = names["sinkhorn"](torch.full((1, 1, 1), cost), eps=0.002, iterations=50, dustbin=dustbin)
        assert plan.item() > 0.9 if matched else plan.item() < 0.1


def test_segments_in_another_unit_are_matched_alike(names):
    draw = torch.Generator().manual_seed(1)
    mid, length = torch.rand(1, 5, 3, generator=draw), torch.rand(1, 5, generator=draw)
    direction = torch.nn.functional.normalize(torch.randn(1, 5, 3, generator=draw), dim=-1)
    true, count = names["true"], names["count"]
    options = {"cost_scale": 5.0, "dustbin": 0.8, "direction_weight": 0.3}
    first = names["match_segments"](mid, direction, length, true, count, **options)
    options |= {"cost_scale": 2.5, "dustbin": 1.6, "direction_weight": 0.6}
    second = names["match_segments"](2 * mid, direction, 2 * length, 2 * true, count, **options)
    torch.testing.assert_close(first.matched_BN, second.matched_BN)
    torch.testing.assert_close(first.transport_B, second.transport_B)


def test_rows_come_to_their_mass_with_more_iterations(names):
    far, near = (
        names["sinkhorn"](names["cost"], eps=0.01, iterations=iterations, dustbin=0.4) for iterations in (3, 500)
    )
    miss = [float((plan.sum(2) + slack - 1).abs().max()) for plan, slack, _ in (far, near)]
    assert 10 * miss[1] < miss[0] and float(names["left"].abs().max()) < 0.01


def test_a_pair_of_infinite_cost_is_not_matched(names):
    cost = torch.zeros(1, 2, 2)
    cost[0, 0, 0] = float("inf")
    plan, *_ = names["sinkhorn"](cost, eps=0.1, iterations=20, dustbin=1.0)
    assert plan[0, 0, 0] == 0 and plan[0, 0, 1] > 0.9
