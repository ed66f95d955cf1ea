"""What the one-launch Sinkhorn promises about bits, and that it reads any strides."""

import pytest
import torch

from kernels.sinkhorn import Transport, sinkhorn
from tests.sinkhorn_problems import cast, differentiate, problem, with_weightless

KINDS = ("full", "minimal", "weights")
SETTINGS = {"eps": 0.4, "iterations": 3, "impl": "triton"}


def _solve(arguments: dict, device, **options) -> dict[str, torch.Tensor]:
    """Return all outputs and gradients; the upstream gradients are ones, to be the same for every batch and padding."""
    arguments = cast(arguments, torch.float32, device)
    transport = sinkhorn(**arguments, **SETTINGS | options)
    names = [name for name, value in arguments.items() if torch.is_tensor(value) and value.requires_grad]
    loss = transport.plan_BNM.square().sum() + transport.row_slack_BN.sum() + transport.col_slack_BM.square().sum()
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names])
    return transport._asdict() | {f"d {name}": g for name, g in zip(names, gradients, strict=True) if g.dim()}


def _items(arguments: dict, items: list[int]) -> dict:
    return {
        name: value[items] if torch.is_tensor(value) and value.dim() else value for name, value in arguments.items()
    }


def _same_bits(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_gives_the_same_bits(kind, device):
    assert _same_bits(_solve(problem(kind), device), _solve(problem(kind), device))


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_has_the_same_bits_alone_and_in_any_batch(kind, device):
    arguments = problem(kind)
    together = _solve(arguments, device)
    for items in ([1], [2, 0, 1]):
        found = _solve(_items(arguments, items), device)
        assert _same_bits(found, {name: value[items] for name, value in together.items()})


@pytest.mark.parametrize("more", [(20, 33), (51, 0), (0, 55)], ids=["rows and columns", "columns", "rows"])
@pytest.mark.parametrize("kind", ["full", "minimal", "balanced"])
def test_more_padding_inside_a_tile_changes_no_bit(kind, more, device):
    arguments = problem(kind, B=1)
    arguments |= {"rows_B": torch.tensor([9]), "cols_B": torch.tensor([13])}
    cost = torch.nn.functional.pad(arguments["cost_BNM"], (0, more[0], 0, more[1]), value=torch.nan)
    padded = arguments | {"cost_BNM": cost}
    expected, found = _solve(arguments, device), _solve(padded, device)
    for name in expected:
        inside = tuple(slice(size) for size in expected[name].shape)
        assert torch.equal(found[name][inside], expected[name])


@pytest.mark.parametrize("kind", ["weights", "weights_with_dustbin"])
def test_more_rows_and_columns_without_mass_change_no_bit(kind, device):
    arguments = problem(kind)
    expected, found = _solve(arguments, device), _solve(with_weightless(arguments, rows=51, cols=33), device)
    for name in expected:
        inside = tuple(slice(size) for size in expected[name].shape)
        assert torch.equal(found[name][inside], expected[name])


def test_strides_change_no_bit(device):
    arguments = problem("full")
    expected = _solve(arguments, device)
    wide = torch.full((3, 2 * 9, 13 + 5), torch.nan, dtype=torch.float64)
    wide[:, ::2, 5:] = arguments["cost_BNM"]
    strided = cast(arguments, torch.float32, device)
    for cost in (wide.float().to(device)[:, ::2, 5:], strided["cost_BNM"].detach().mT.contiguous().mT):
        strided["cost_BNM"] = cost.requires_grad_()
        transport = sinkhorn(**strided, **SETTINGS)
        assert all(torch.equal(transport[i], expected[name]) for i, name in enumerate(transport._fields))
        # an upstream gradient without strides of its own
        (grad,) = torch.autograd.grad(transport.plan_BNM.sum(), cost)
        (same,) = torch.autograd.grad(
            (transport := sinkhorn(**strided, **SETTINGS)).plan_BNM, cost, torch.ones_like(transport.plan_BNM)
        )
        assert torch.equal(grad, same)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("name", Transport._fields)
def test_outputs_without_an_upstream_gradient_have_one_of_zeros(name, impl, device):
    arguments = cast(problem("full"), torch.float32, device)
    transport = sinkhorn(**arguments, **SETTINGS | {"impl": impl})
    leaves = [arguments["cost_BNM"], arguments["dustbin"]]
    upstream = [torch.ones_like(x) if x is getattr(transport, name) else torch.zeros_like(x) for x in transport]
    expected = torch.autograd.grad(list(transport), leaves, upstream, retain_graph=True)
    found = torch.autograd.grad(getattr(transport, name).sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(70, 9), (9, 70), (70, 70)], ids=str)
def test_tiles_of_all_sizes_agree_with_eager(shape, device):
    arguments = problem("full", B=1, N=shape[0], M=shape[1])
    settings = {"eps": 0.4, "iterations": 2}
    expected = differentiate(sinkhorn, cast(arguments, torch.float64), **settings)
    found = differentiate(sinkhorn, cast(arguments, torch.float32, device), **settings, impl="triton")
    for name, value in found.items():
        assert torch.allclose(value.cpu().double(), expected[name], atol=2e-5), name
