"""Sinkhorn in several launches: the same answers and the same promises about bits, in blocks."""

import pytest
import torch

from kernels import sinkhorn_large, sinkhorn_small
from kernels.sinkhorn import sinkhorn
from tests.accuracy import assert_accurate
from tests.sinkhorn_problems import (
    KINDS,
    assert_without_drift,
    balanced,
    cast,
    differentiate,
    problem,
    truth_and_eager,
    with_weightless,
)

SETTINGS = {"eps": 0.4, "iterations": 2}


@pytest.fixture
def no_tiles(monkeypatch):
    """Small problems, several blocks each way, go the way of the large ones."""
    monkeypatch.setattr(sinkhorn_small, "MAX_TILE", 0)
    monkeypatch.setattr(sinkhorn_large, "OTHER", 16)


def _solve(arguments: dict, device, **options) -> dict[str, torch.Tensor]:
    return differentiate(sinkhorn, cast(arguments, torch.float32, device), **SETTINGS | options, impl="triton")


def _assert_as_accurate_as_eager(arguments: dict, device, **options) -> None:
    """Check values and gradients of a problem in float32 against float64."""
    arguments, settings = cast(arguments, torch.float32), SETTINGS | options
    truth, eager = truth_and_eager(arguments, **settings)
    for name, value in _solve(arguments, device, **settings).items():
        floor = 4e-6 / settings["eps"] if name in ("d cost_BNM", "d dustbin") else 0.0
        assert_accurate(value, truth=truth[name], eager=eager[name], floor=floor, name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_as_accurate_as_eager_float32(kind, no_tiles, device):
    _assert_as_accurate_as_eager(problem(kind, B=2, N=34, M=40), device)


def test_so_are_those_of_problems_of_several_blocks_as_they_are_launched(device):
    columns = 2 * sinkhorn_large.OTHER + 5
    _assert_as_accurate_as_eager(problem("weights_with_dustbin", B=1, N=150, M=columns), device)


def test_iterations_that_do_not_fill_the_last_round_of_loads_count(no_tiles, device):
    iterations = sinkhorn_large.UNROLL + 2
    _assert_as_accurate_as_eager(problem("full", B=2, N=34, M=20), device, iterations=iterations)


def test_rounding_does_not_add_up_in_the_gradients_of_weights(no_tiles, device):
    """Of a problem in which more than the floor of it does, were it not taken out."""
    assert_without_drift(balanced(3, 5, seed=7), device, impl="triton")


def test_the_same_call_gives_the_same_bits(no_tiles, device):
    found, again = _solve(problem("full", B=2, N=34), device), _solve(problem("full", B=2, N=34), device)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_an_item_has_the_same_bits_alone_and_padded(no_tiles, device):
    """Outputs are compared under upstream gradients that do not depend on the batch: the plan itself."""

    def solve(cost, rows, cols):
        cost = cost.to(device, torch.float32).requires_grad_()
        counts = {"rows_B": rows.to(device), "cols_B": cols.to(device)}
        dustbin = torch.tensor(0.9, device=device, requires_grad=True)
        transport = sinkhorn(cost, **counts, dustbin=dustbin, **SETTINGS, impl="triton")
        total = transport.plan_BNM.square().sum() + transport.col_slack_BM.square().sum()
        return *transport, *torch.autograd.grad(total, (cost, dustbin))

    arguments = problem("full", B=2, N=20, M=30)
    cost, rows, cols = arguments["cost_BNM"], torch.tensor([20, 7]), torch.tensor([30, 30])
    together = solve(cost, rows, cols)
    padded = torch.nn.functional.pad(cost[:1], (0, 21, 0, 17), value=torch.nan)
    alone, alone_padded = (solve(costs, rows[:1], cols[:1]) for costs in (cost[:1], padded))
    assert torch.equal(alone[-1], alone_padded[-1])
    # the dustbin's gradient is a sum over all items
    for found in (alone, alone_padded):
        for actual, expected in zip(found[:-1], together[:-1], strict=True):
            inside = tuple(slice(size) for size in expected[:1].shape)
            assert torch.equal(actual[inside], expected[:1])


@pytest.mark.parametrize("kind", ["weights", "weights_with_dustbin"])
def test_more_rows_and_columns_without_mass_change_no_bit(kind, no_tiles, device):
    def solve(arguments):
        arguments = cast(arguments, torch.float32, device)
        transport = sinkhorn(**arguments, **SETTINGS, impl="triton")
        leaves = [arguments[name] for name in ("cost_BNM", "log_a_BN", "log_b_BM")]
        return *transport, *torch.autograd.grad(sum(x.square().sum() for x in transport), leaves)

    arguments = problem(kind, B=2, N=14, M=30)
    for found, expected in zip(solve(with_weightless(arguments, rows=21, cols=7)), solve(arguments), strict=True):
        assert torch.equal(found[tuple(slice(size) for size in expected.shape)], expected)


@pytest.mark.parametrize("kind", ["full", "balanced"])
def test_garbage_in_the_padding_and_empty_items_do_no_harm(kind, no_tiles, device):
    arguments = problem(kind, B=2, N=20, M=6) | {"rows_B": torch.tensor([13, 0]), "cols_B": torch.tensor([5, 6])}
    clean = _solve(arguments, device)
    arguments["cost_BNM"][0, 13:], arguments["cost_BNM"][:, :, 5:], arguments["cost_BNM"][1] = (
        torch.nan,
        torch.inf,
        torch.nan,
    )
    dirty = _solve(arguments, device)
    assert all(torch.equal(clean[name], dirty[name]) and clean[name].isfinite().all() for name in clean)
    assert dirty["plan_BNM"][1].abs().max() == dirty["d cost_BNM"][1].abs().max() == 0


def test_strided_costs_are_read_in_place(no_tiles, device):
    arguments = problem("full", B=1, N=20, M=36)
    expected = _solve(arguments, device)
    arguments["cost_BNM"] = arguments["cost_BNM"].mT.contiguous().mT
    found = _solve(arguments, device)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_more_than_128_columns_go_this_way(device):
    """And only they: the small form would say that it scaled."""
    cost = torch.rand(1, 2, 129, device=device)
    scales = [
        torch.ops.ridgeline.sinkhorn_forward(
            c, None, None, c.new_tensor(0.3), None, None, 0.4, 1, "full", "auto", "triton"
        )[4].item()
        for c in (cost, cost[..., :128])
    ]
    assert scales == [False, True]
    plan = sinkhorn(cost, dustbin=0.3, **SETTINGS, impl="triton").plan_BNM
    assert torch.allclose(plan, sinkhorn(cost, dustbin=0.3, **SETTINGS, impl="eager").plan_BNM, atol=1e-6)
