"""RMSNorm by hand: as exact as PyTorch's, in both directions."""

import pytest
import torch

from kernels.rms_norm import EPS, rms_norm
from tests.accuracy import assert_accurate


@pytest.fixture(autouse=True)
def by_hand_at_any_size(monkeypatch):
    monkeypatch.setitem(rms_norm.__globals__, "SMALL", 0)


def differentiate(function, x, gain, dtype):
    x, gain = (t.detach().to(dtype).requires_grad_() for t in (x, gain))
    y = function(x, gain)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().view_as(y)
    return dict(zip(("y", "dx", "dgain"), (y, *torch.autograd.grad(y, (x, gain), dy.to(dtype))), strict=True))


def by_pytorch(x, gain):
    return torch.nn.functional.rms_norm(x, gain.shape, gain, EPS)


@pytest.mark.parametrize("shape", [(3, 50, 64), (7, 256), (5,), (2, 3, 1), (2, 4100, 8)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_it_is_as_exact_as_pytorch(shape, scale):
    generator = torch.Generator().manual_seed(0)
    x, gain = scale * (torch.randn(shape, generator=generator) + 0.5), torch.rand(shape[-1], generator=generator)
    truth, eager = (differentiate(by_pytorch, x, gain, dtype) for dtype in (torch.float64, torch.float32))
    # dx is a difference of numbers of the size of r dy gain, and of one column nothing is left of it
    largest = (gain.abs() / x.square().mean(-1, keepdim=True).sqrt()).max()
    floors = {"dx": float(largest) * torch.finfo(torch.float32).eps}
    for name, value in differentiate(rms_norm, x, gain, torch.float32).items():
        assert_accurate(value, truth=truth[name], eager=eager[name], name=name, floor=floors.get(name, 0.0))


def test_gradcheck():
    x, gain = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), gain.requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, gain.detach()), (x,))


def test_registration_and_compilation():
    x, gain = torch.randn(2, 3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    torch.library.opcheck(torch.ops.ridgeline.rms_norm_forward.default, (x, gain))
    y, r = torch.ops.ridgeline.rms_norm_forward(x.detach(), gain.detach())
    torch.library.opcheck(torch.ops.ridgeline.rms_norm_backward.default, (y, x.detach(), r, gain.detach()))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        torch.autograd.grad(compiled(x, gain).sum(), (x, gain)),
        torch.autograd.grad(rms_norm(x, gain).sum(), (x, gain)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_strides_rows_of_zeros_and_no_rows():
    row = torch.randn(1, 4, 8)
    gain = torch.rand(8)
    assert torch.equal(rms_norm(row.expand(3, 4, 8), gain), rms_norm(row, gain).expand(3, 4, 8))
    assert all(
        x.shape[:1] == (0,) or not x.any() for x in differentiate(rms_norm, row[:0], gain, torch.float32).values()
    )
    assert differentiate(rms_norm, torch.zeros(2, 8), gain, torch.float32)["dx"].isfinite().all()


def test_a_nan_stays_in_its_row():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    results = differentiate(rms_norm, x, torch.rand(8), torch.float32)
    assert [bool(results[name][row].isfinite().all()) for name in ("y", "dx") for row in range(3)] == 2 * [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("x", "gain", "message"),
    [
        (torch.zeros(2, 8).half(), torch.ones(8), "x must be float32 or float64, got torch.float16"),
        (torch.zeros(2, 8), torch.ones(4), "gain must be"),
        (torch.zeros(2, 8), torch.ones(8).double(), "gain must be"),
    ],
)
def test_what_does_not_fit_is_refused(x, gain, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, gain)
