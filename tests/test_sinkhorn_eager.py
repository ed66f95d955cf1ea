"""The CPU's form of `sinkhorn`: what must not leak into it, beside what `test_sinkhorn` shows of both forms."""

import math

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.sinkhorn import sinkhorn
from tests.sinkhorn_problems import KINDS, assert_without_drift, balanced, cast, problem

SETTINGS = {"eps": 0.4, "iterations": 3}
FORMS = (("eager", "log"), ("eager", "scaling"), ("triton", "auto"))


def gradients(arguments, upstream, **options):
    leaves = [value for value in arguments.values() if torch.is_tensor(value) and value.requires_grad]
    return torch.autograd.grad(list(sinkhorn(**arguments, **SETTINGS, **options)), leaves, upstream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("impl", "path"), FORMS)
def test_nothing_in_the_padding_of_an_upstream_gradient_leaks(impl, path, kind, device):
    arguments = cast(problem(kind), torch.float32, device)
    clean = [torch.ones(shape, device=device) for shape in ((3, 9, 13), (3, 9), (3, 13))]
    row, col = (_counting(arguments, *names) for names in (("rows_B", "log_a_BN", 9), ("cols_B", "log_b_BM", 13)))
    padding = (~(row[:, :, None] & col[:, None]), ~row, ~col)
    dirty = [x.masked_fill(hidden, math.nan) for x, hidden in zip(clean, padding, strict=True)]
    for found, expected in zip(
        *(gradients(arguments, upstream, impl=impl, _path=path) for upstream in (dirty, clean)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("impl", "path", "problems"), [("eager", "log", 40), ("eager", "scaling", 40), ("triton", "auto", 3)]
)
def test_rounding_does_not_add_up_in_the_gradients_of_weights(impl, path, problems, device):
    """d log a sums to 0, so that only rounding is left in it of a part that no iteration damps."""
    for seed in range(problems):
        N, M = 2 + seed % 5, 2 + seed % 7
        assert_without_drift(balanced(N, M, seed), device, impl=impl, _path=path)


@pytest.mark.parametrize("number", [numpy.float32(0.25), numpy.float64(0.25), numpy.int64(2), 2])
def test_the_dustbin_may_be_any_number(number):
    cost = torch.rand(2, 3, 4)
    found, expected = (sinkhorn(cost, **SETTINGS, dustbin=dustbin) for dustbin in (number, torch.tensor(float(number))))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_no_value_is_read_where_tensors_are_fake():
    with FakeTensorMode():
        arguments = cast(problem("full"), torch.float32)
        plan, *_ = sinkhorn(**arguments, **SETTINGS)
        plan.sum().backward()
    assert arguments["cost_BNM"].grad.shape == plan.shape == (3, 9, 13)


def _counting(arguments, count, weights, size):
    if weights in arguments:
        return arguments[weights] != -math.inf
    return torch.arange(size, device=arguments[count].device) < arguments[count][:, None]
