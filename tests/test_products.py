"""Products of a stack: the bits of `linear`, and weight gradients that a second stream computes and joins in time."""

import contextlib
import weakref

import pytest
import torch
from torch import nn

from perceiver import products
from perceiver.products import Products


def layers(device, width=32):
    """Five projections of one width, as three groups."""
    generator = torch.Generator().manual_seed(0)
    found = [nn.Linear(width, width, bias=False) for _ in range(5)]
    for projection in found:
        with torch.no_grad():
            projection.weight.copy_(torch.randn(width, width, generator=generator) / width**0.5)
    a, b, c, d, e = (projection.to(device) for projection in found)
    return [(a,), (b, c, d), (e,)]


def run(groups, x_BTC, linear):
    """Gradients of the rows and of all matrices through three products, one after the other."""
    x_BTC = x_BTC.detach().requires_grad_()
    first, middle, last = groups
    wide_BTX = linear(linear(x_BTC, *first), *middle)
    out_BTC = linear(sum(wide_BTX.chunk(3, -1)).sin(), *last)
    weights = [projection.weight for group in groups for projection in group]
    return torch.autograd.grad(out_BTC.float().square().sum(), [x_BTC, *weights])


def one_after_the_other(x_BTC, *group):
    return nn.functional.linear(x_BTC, torch.cat([projection.weight for projection in group]).to(x_BTC.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_bits_of_linear(dtype, device):
    groups, x_BTC = layers(device), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = run(groups, x_BTC, one_after_the_other)
    found = run(groups, x_BTC, Products(groups, dtype).linear)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])


def test_a_matrix_without_gradient_has_none(device):
    groups = layers(device)
    for projection in groups[1]:
        projection.weight.requires_grad_(False)
    stack, x_BTC = Products(groups, torch.float32), torch.randn(1, 3, 32, device=device)
    stack.linear(x_BTC, *groups[1]).sum()
    stack.linear(x_BTC, *groups[0]).sum().backward()
    assert groups[0][0].weight.grad is not None
    assert groups[1][0].weight.grad is None


class Recorded:
    """A stream that is not there: says who waits for whom."""

    def __init__(self, name, log):
        self.name, self.log, self.device = name, log, torch.device("cpu")

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    """What is launched where, and the waits."""
    log = []
    main, side, current = Recorded("main", log), Recorded("side", log), ["main"]

    @contextlib.contextmanager
    def entered(stream):
        current.append(stream.name)
        yield
        current.pop()

    def noted(name, function):
        def inner(*args, **options):
            log.append(f"{name} on {current[-1]}")
            return function(*args, **options)

        return inner

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch, "mm", noted("product", torch.mm))
    monkeypatch.setattr(torch.Tensor, "new_empty", noted("memory", torch.Tensor.new_empty))
    monkeypatch.setattr(torch.ops.aten, "_foreach_copy_", noted("copy", torch.ops.aten._foreach_copy_))

    def start(self, device):
        self._forked_from, self._in_use, self._stream = None, [], side

    monkeypatch.setattr(products.SideStream, "__init__", start)
    return log


# the second stream also waits for what was done before with the memory of its product
BACKWARD = ["memory on main", "side waits for main", "product on side", "product on main"]
COPY = "copy on main"


def test_each_weight_gradient_waits_for_what_it_reads_and_is_read_after_the_join(log):
    groups, x_BTC = layers("cpu"), torch.randn(2, 9, 32)
    expected = run(groups, x_BTC, one_after_the_other)
    stack = Products(groups, torch.float32)
    del log[: log.index(COPY) + 1]
    found = run(groups, x_BTC, stack.linear)
    assert log == [*BACKWARD, *BACKWARD, *BACKWARD, "main waits for side", COPY]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not stack._side._in_use


def test_what_the_side_stream_uses_is_kept_until_the_join(log, monkeypatch):
    groups, x_BTC = layers("cpu"), torch.randn(2, 9, 32)
    stack, kept = Products(groups, torch.float32), []
    join = products.SideStream.join
    monkeypatch.setattr(products.SideStream, "join", lambda side: kept.extend(map(id, side._in_use)) or join(side))
    run(groups, x_BTC, stack.linear)
    # both operands and the gradient of three products, each a tensor of its own
    assert len(set(kept)) == 9


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("planted")


def test_a_backward_that_fails_joins_when_its_graph_is_dropped(log):
    groups = layers("cpu")
    stack = Products(groups, torch.float32)
    side = weakref.ref(stack._side)
    x_BTC = stack.linear(torch.randn(2, 9, 32), *groups[0])
    out_BTC = stack.linear(stack.linear(Failing.apply(x_BTC), *groups[1])[..., :32], *groups[2])
    with pytest.raises(RuntimeError, match="planted"):
        out_BTC.sum().backward()
    backward = log[log.index(COPY) + 1 :]
    assert backward == [*BACKWARD, *BACKWARD]
    del stack, x_BTC, out_BTC
    assert side() is None and log[-1] == "main waits for side"


def test_a_group_is_used_once(device):
    groups = layers(device)
    stack, x_BTC = Products(groups, torch.float32), torch.zeros(1, 3, 32, device=device)
    stack.linear(x_BTC, *groups[0])
    for group in (groups[0], groups[1][:2]):
        with pytest.raises(ValueError, match="group must be one of the products and used once, got Linear"):
            stack.linear(x_BTC, *group)


@pytest.mark.gpu
def test_one_stream_and_two_give_the_same_bits_time_and_again(device, monkeypatch):
    groups, x_BTC = layers(device, 256), torch.randn(32, 256, 256, device=device).bfloat16()
    results = []
    for side_stream in (False, *[True] * 20):
        monkeypatch.setattr(products, "SIDE_STREAM", side_stream)
        results.append(run(groups, x_BTC, Products(groups, torch.bfloat16).linear))
    assert all(torch.equal(x, y) for found in results for x, y in zip(found, results[0], strict=True))
