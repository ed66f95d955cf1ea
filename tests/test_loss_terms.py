"""`loss_terms`: how exact it is, what has a gradient, what is refused, how it is registered."""

import math

import pytest
import torch
import triton
import triton.language as tl

from kernels.loss_terms import (
    LANES,
    ROWS,
    _cross_entropy,
    _cross_entropy_slope,
    _exp_minus_abs,
    loss_terms,
    loss_terms_reference,
)
from tests.accuracy import assert_accurate

NAMES = ("transport_B", "endpoint_B", "matched_BN", "partner_BN", "conf_BN", "gt_count_B")
OPTIONS = {"conf_weight": 0.1, "endpoint_weight": 0.5, "conf_target": "mass"}


def problem(B=5, N=7, dtype=torch.float32, scale=3.0, seed=0):
    """Return the inputs by name; some queries are matched, whole or in part, and some logits are sure."""
    generator = torch.Generator().manual_seed(seed)
    mass_BN = torch.rand(B, N, generator=generator)
    return {
        "transport_B": 3 * torch.rand(B, generator=generator),
        "endpoint_B": torch.rand(B, generator=generator),
        "matched_BN": torch.where(mass_BN < 0.2, 1.0, mass_BN),
        "partner_BN": torch.randint(-1, 2, (B, N), generator=generator),
        "conf_BN": (scale * torch.randn(B, N, generator=generator)).to(dtype),
        "gt_count_B": torch.randint(0, 60, (B,), generator=generator, dtype=torch.int32),
    }


def run(function, tensors, dtype=None, *, dtotal=1.0, **options):
    """Return the scalars by name, and the gradients of transport, endpoint and conf of `dtotal` times the total."""
    inputs = {n: x.to(dtype) if dtype and x.is_floating_point() else x for n, x in tensors.items()}
    leaves = [inputs[n].detach().requires_grad_() for n in ("transport_B", "endpoint_B", "conf_BN")]
    inputs |= dict(zip(("transport_B", "endpoint_B", "conf_BN"), leaves, strict=True))
    loss = function(**inputs, **OPTIONS | options)
    gradients = torch.autograd.grad(loss.total, leaves, loss.total.new_tensor(dtotal))
    found = {name: x.detach() for name, x in loss._asdict().items()}
    return found | dict(zip(("dtransport_B", "dendpoint_B", "dconf_BN"), gradients, strict=True))


def to_device(tensors, device):
    return {name: x.to(device) for name, x in tensors.items()}


def same_bits(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def check_accuracy(tensors, device, **options):
    truth, eager = (run(loss_terms_reference, tensors, dtype, **options) for dtype in (torch.float64, torch.float32))
    actual = run(loss_terms, to_device(tensors, device), impl="triton", **options)
    for name, x in actual.items():
        assert_accurate(x, truth=truth[name], eager=eager[name], name=name)


@pytest.mark.parametrize("target", ["mass", "partner"])
@pytest.mark.parametrize("sizes", [(5, 7), (1, 1), (64, 64), (3, 1001), (ROWS * LANES + 1, 1)])
def test_scalars_and_gradients_are_as_close_to_float64_as_eager(sizes, target, device):
    check_accuracy(problem(*sizes), device, conf_target=target, dtotal=-3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["mass", "partner"])
def test_logits_of_sixteen_bits_are_computed_in_float32(dtype, target, device):
    check_accuracy(problem(dtype=dtype), device, conf_target=target)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (2.0, 1e3)])
def test_any_weights_are_as_exact(weights, device):
    check_accuracy(problem(), device, conf_weight=weights[0], endpoint_weight=weights[1])


@pytest.mark.parametrize("logit", [1e-3, 5.0, 20.0])
def test_confidences_that_are_sure_and_right_keep_the_digits_of_a_small_loss(logit, device):
    tensors = problem()
    tensors["conf_BN"] = torch.where(tensors["partner_BN"] >= 0, logit, -logit)
    check_accuracy(tensors, device, conf_target="partner")


@pytest.mark.parametrize("logit", [-20.0, 20.0])
def test_targets_next_to_the_logits_keep_the_digits_of_a_small_loss(logit, device):
    tensors = problem()
    tensors["conf_BN"] = torch.full_like(tensors["conf_BN"], logit)
    tensors["matched_BN"] = float(logit > 0) - math.copysign(1e-3, logit) * tensors["matched_BN"]
    check_accuracy(tensors, device)


def test_inside_a_kernel_the_pieces_err_by_a_few_roundings_over_their_whole_range(device):
    @triton.jit
    def kernel(x_ptr, e_ptr, unsure_ptr, slope_ptr, SIZE: tl.constexpr):
        offs = tl.arange(0, SIZE)
        x = tl.load(x_ptr + offs)
        right = (x > 0).to(tl.float32)
        tl.store(e_ptr + offs, _exp_minus_abs(x))
        tl.store(unsure_ptr + offs, _cross_entropy(x, right))
        tl.store(slope_ptr + offs, _cross_entropy_slope(x, right))

    x = torch.cat([torch.linspace(-80, 80, 4091), torch.tensor([-1e-30, 0.0, 1e-30, 200.0, math.nan])])
    found = [torch.empty_like(x, device=device) for _ in range(3)]
    kernel[(1,)](x.to(device), *found, SIZE=4096)
    e = (-x.double().abs()).exp()
    truth = [e, e.log1p(), torch.where(x > 0, -1.0, 1.0) * e / (1 + e)]
    # exp2 of a GPU is documented to 2^-22, and two of them are multiplied; then two quotients of 2^-23
    for name, actual, expected in zip(("e", "cross-entropy", "slope"), found, truth, strict=True):
        error = (actual.cpu() / expected - 1).abs()
        assert error[:-2].max() <= 2.0**-20, name
        assert abs(actual[-2]) < 1e-37
        assert actual[-1].isnan()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_only_the_total_has_a_gradient_and_none_reaches_the_matching(impl, device):
    tensors = to_device(problem(), device)
    for name in ("conf_BN", "matched_BN"):
        tensors[name].requires_grad_()
    loss = loss_terms(**tensors, **OPTIONS, impl=impl)
    assert loss.total.requires_grad
    assert not any(x.requires_grad for x in loss[1:])
    loss.total.backward()
    assert tensors["matched_BN"].grad is None


def test_the_pulse_counts_what_it_says(device):
    tensors = {
        "transport_B": torch.tensor([1.0, 2.0]),
        "endpoint_B": torch.tensor([0.5, 0.0]),
        "matched_BN": torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 0.5, 0.0]]),
        "partner_BN": torch.tensor([[0, 1, -1, -1], [0, 1, 2, -1]]),
        "conf_BN": torch.tensor([[5.0, 1.0, 0.0, -1.0], [1e-6, -1e-6, 2.0, -9.0]]),
        "gt_count_B": torch.tensor([2, 3]),
    }
    loss = loss_terms(**to_device(tensors, device), **OPTIONS, impl="triton")
    assert loss.transport == 1.5
    assert loss.endpoint == 0.25
    assert loss.mass.item() == pytest.approx(4 / 5)
    assert loss.kept.item() == pytest.approx(4 / 5)
    assert loss.dustbin == 0.5


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_without_true_segments_the_pulse_is_per_one(impl, device):
    tensors = to_device(problem(), device)
    tensors["gt_count_B"] = torch.zeros_like(tensors["gt_count_B"])
    loss = loss_terms(**tensors, **OPTIONS, impl=impl)
    torch.testing.assert_close(loss.mass, tensors["matched_BN"].sum())
    assert loss.kept == (tensors["conf_BN"] > 0).sum()


def test_a_count_below_zero_that_may_not_be_read_is_zero(device):
    tensors = to_device(problem(), device)
    tensors["gt_count_B"][0] = -7
    rest = OPTIONS["conf_weight"], OPTIONS["endpoint_weight"], OPTIONS["conf_target"]
    unread = torch.ops.ridgeline.loss_terms_forward(*tensors.values(), *rest)[1]
    tensors["gt_count_B"][0] = 0
    assert torch.equal(unread, torch.stack(loss_terms(**tensors, **OPTIONS, impl="triton")[1:]))


def test_strides_and_addresses_change_no_bits(device):
    tensors = to_device(problem(9, 70), device)
    gaps = {name: torch.stack([x, x.clone().fill_(3)], -1)[..., 0] for name, x in tensors.items()}
    shifted = {name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for name, x in tensors.items()}
    dense = run(loss_terms, tensors, impl="triton")
    assert same_bits(dense, run(loss_terms, gaps, impl="triton"))
    assert same_bits(dense, run(loss_terms, shifted, impl="triton"))


def test_an_items_gradients_depend_on_no_other_item(device):
    tensors, others = (to_device(problem(seed=seed), device) for seed in (0, 1))
    mixed = {name: torch.cat([x[:2], others[name][2:]]) for name, x in tensors.items()}
    alike, apart = (run(loss_terms, x, impl="triton") for x in (tensors, mixed))
    for name in ("dtransport_B", "dendpoint_B", "dconf_BN"):
        assert torch.equal(alike[name][:2], apart[name][:2])
    assert not torch.equal(alike["dconf_BN"][2:], apart["dconf_BN"][2:])


def test_a_call_repeats_bit_for_bit(device):
    tensors = to_device(problem(40, 70), device)
    assert same_bits(run(loss_terms, tensors, impl="triton"), run(loss_terms, tensors, impl="triton"))


def test_nan_reaches_the_sums_it_is_in_and_its_own_gradient(device):
    tensors = to_device(problem(), device)
    tensors["conf_BN"][2, 3] = math.nan
    found = run(loss_terms, tensors, impl="triton")
    assert {name for name, x in found.items() if x.isnan().any()} == {"total", "conf", "dconf_BN"}
    assert found["dconf_BN"].isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (0, 0)])
def test_a_size_of_zero_gives_what_eager_gives(sizes, device):
    tensors = problem(*sizes)
    found, eager = run(loss_terms, to_device(tensors, device), impl="triton"), run(loss_terms_reference, tensors)
    for name, x in found.items():
        torch.testing.assert_close(x.cpu(), eager[name], equal_nan=True)


def test_gradcheck_in_float64():
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in problem(2, 3).items()}
    fixed = {name: tensors[name] for name in ("matched_BN", "partner_BN", "gt_count_B")}

    def total(transport_B, endpoint_B, conf_BN):
        return loss_terms(transport_B, endpoint_B, conf_BN=conf_BN, **fixed, **OPTIONS).total

    leaves = [tensors[name].requires_grad_() for name in ("transport_B", "endpoint_B", "conf_BN")]
    assert torch.autograd.gradcheck(total, leaves)
    assert all(x.dtype == torch.float64 for x in loss_terms(**tensors, **OPTIONS))


@pytest.mark.parametrize("target", ["mass", "partner"])
def test_registration_passes_opcheck(target, device):
    tensors = to_device(problem(2, 3, torch.bfloat16), device)
    source_BN = tensors["partner_BN" if target == "partner" else "matched_BN"]
    operators, one = torch.ops.ridgeline, torch.ones((), device=device)
    torch.library.opcheck(operators.loss_terms_backward.default, (one, source_BN, tensors["conf_BN"], 0.1, 0.5))
    for name in ("transport_B", "endpoint_B", "conf_BN"):
        tensors[name].requires_grad_()
    torch.library.opcheck(operators.loss_terms_forward.default, (*tensors.values(), 0.1, 0.5, target))


def test_torch_compile_gives_the_bits_of_eager(device):
    tensors = to_device(problem(), device)
    compiled = torch.compile(loss_terms, fullgraph=True, backend="aot_eager")
    assert same_bits(run(loss_terms, tensors, impl="triton"), run(compiled, tensors, impl="triton"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conf_BN": torch.zeros(7)}, r"conf must be \[B, N\], got shape \(7,\)"),
        ({"conf_BN": torch.zeros(5, 7, dtype=torch.float64)}, "conf must be one of .* got torch.float64"),
        ({"transport_B": torch.zeros(4)}, r"transport must have shape \(5,\) for a conf of \(5, 7\), got \(4,\)"),
        ({"transport_B": torch.zeros(5).bfloat16()}, "transport must be one of .* got torch.bfloat16"),
        ({"endpoint_B": torch.zeros(5, 1)}, r"endpoint must have shape \(5,\)"),
        ({"endpoint_B": torch.zeros(5).double()}, "endpoint must be one of .* got torch.float64"),
        ({"matched_BN": torch.zeros(5, 6)}, r"matched must have shape \(5, 7\)"),
        ({"partner_BN": torch.zeros(5, 7)}, "partner must be one of .* got torch.float32"),
        ({"partner_BN": torch.zeros(5, 7, dtype=torch.int64, device="meta")}, "partner must be on the device of conf"),
        ({"gt_count_B": torch.zeros(5)}, "gt_count must be one of .* got torch.float32"),
        ({"gt_count_B": torch.tensor([1, 2, -1, 0, 0])}, r"gt_count must be at least 0, got \[1, 2, -1, 0, 0\]"),
        ({"conf_weight": -0.1}, "conf_weight must be finite and at least 0, got -0.1"),
        ({"endpoint_weight": math.nan}, "endpoint_weight must be finite and at least 0, got nan"),
        ({"conf_target": "guess"}, "conf_target must be one of mass, partner, got 'guess'"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_bad_input_is_refused(changes, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message):
        loss_terms(**problem() | OPTIONS | {"impl": "triton"} | changes)


def test_float64_is_refused_by_the_kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in problem().items()}
    with pytest.raises(ValueError, match="float64 must have impl='eager', got impl='triton'"):
        loss_terms(**tensors, **OPTIONS, impl="triton")
