"""Segment matching: as accurate as its formula, in every form, whatever surrounds an item."""

import math

import pytest
import torch

from kernels import matching, matching_eager
from kernels.matching import (
    Match,
    match_segments,
    match_segments_forward,
    match_segments_reference,
)
from tests.accuracy import assert_accurate

FORMS = ("eager", "triton")
# few, because the interpreter is slow; the solver's own tests iterate longer
ITERATIONS = 4
# of the registered operator, in its order: the defaults, but exact
SETTINGS = (0.3, 1.0, 5.0, 0.1, ITERATIONS, 0.3, "full", "exact")


def make_segments(counts, N, M, *, dtype=torch.float32, device="cpu"):
    """Predictions near true segments (the first N, in turn), as (mid, dir, len, gt, count); the padding is NaN."""
    B, generator = len(counts), torch.Generator().manual_seed(0)
    gt_BM23 = torch.rand(B, M, 2, 3, generator=generator, dtype=torch.float64) - 0.5
    near_BN23 = gt_BM23[:, torch.arange(N) % M] if M else torch.rand(B, N, 2, 3, generator=generator) - 0.5
    near_BN23 = near_BN23 + 0.05 * torch.randn(B, N, 2, 3, generator=generator, dtype=torch.float64)
    start_BN3, end_BN3 = near_BN23.unbind(2)
    len_BN = torch.linalg.vector_norm(end_BN3 - start_BN3, dim=2)
    dir_BN3 = (end_BN3 - start_BN3) / len_BN[:, :, None]
    for item, count in enumerate(counts):
        gt_BM23[item, count:] = math.nan
    tensors = [t.to(dtype).to(device) for t in ((start_BN3 + end_BN3) / 2, dir_BN3, len_BN, gt_BM23)]
    return *tensors, torch.tensor(counts, dtype=torch.int64, device=device)


def losses_and_gradients(function, segments, dtype=None, **settings) -> dict[str, torch.Tensor]:
    """All results of a form by name, computed in `dtype`; gradients through each loss with its own weight per item."""
    mid, dir_, length, gt, count = segments
    dtype = dtype or mid.dtype
    predicted = [t.detach().to(dtype).requires_grad_() for t in (mid, dir_, length)]
    match = function(*predicted, gt.to(dtype), count, **({"iterations": ITERATIONS} | settings))
    results = match._asdict()
    for loss, first in (("transport", 1.0), ("endpoint", -0.5)):
        weight_B = torch.linspace(first, 2.0, len(count), dtype=torch.float64, device=mid.device)
        grads = torch.autograd.grad(
            results[f"{loss}_B"], predicted, weight_B.to(results[f"{loss}_B"].dtype), retain_graph=True
        )
        results |= {f"d {loss} / d {name}": grad for name, grad in zip(("mid", "dir", "len"), grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def assert_follows_the_formula(segments, impl, **settings):
    actual = losses_and_gradients(match_segments, segments, impl=impl, **settings)
    truth = losses_and_gradients(match_segments_reference, segments, torch.float64, **settings)
    eager = losses_and_gradients(match_segments_reference, segments, torch.float32, **settings)
    assert torch.equal(actual.pop("partner_BN"), truth["partner_BN"])
    for name, value in actual.items():
        if value.numel():
            assert_accurate(value, truth=truth[name], eager=eager[name], name=name)


def assert_same_bits(left: dict, right: dict, items=slice(None)):
    for name in left:
        assert torch.equal(left[name][items], right[name][items]), name


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("plan_gradient", ["detached", "exact"])
@pytest.mark.parametrize("slack", ["full", "minimal"])
def test_losses_and_gradients_are_as_accurate_as_eager_pytorch(impl, plan_gradient, slack, device):
    segments = make_segments([3, 6], 5, 6, device=device)
    assert_follows_the_formula(segments, impl, plan_gradient=plan_gradient, slack=slack)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan_gradient", ["detached", "exact"])
def test_low_precision_inputs_are_computed_in_float32(impl, plan_gradient, dtype, device):
    segments = make_segments([4], 5, 6, dtype=dtype, device=device)
    assert_follows_the_formula(segments, impl, plan_gradient=plan_gradient)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("plan_gradient", ["detached", "exact"])
def test_an_item_takes_the_path_its_own_costs_allow(impl, plan_gradient, device):
    """The scaling path ends 60 nats below the dustbin: 0.8 of cost here, on one side of which each item lies."""
    mid, dir_, length, gt, count = make_segments([3, 3], 3, 3, device=device)
    mid[1] += 2.0
    nearest_B = torch.linalg.vector_norm(mid[:, :, None] - gt.mean(2)[:, None], dim=3).amin((1, 2))
    assert nearest_B[0] < 0.5 and nearest_B[1] > 1.0
    assert_follows_the_formula((mid, dir_, length, gt, count), impl, plan_gradient=plan_gradient, dustbin=2.0)


@pytest.mark.parametrize(("N", "M"), [(70, 9), (5, 100)])
def test_larger_tiles_follow_the_formula(N, M, device):
    assert_follows_the_formula(make_segments([M - 2], N, M, device=device), "triton", iterations=2)


@pytest.mark.parametrize("function", [match_segments, match_segments_reference])
def test_the_exact_gradient_is_the_derivative_of_transport(function):
    *predicted, gt, count = make_segments([0, 2, 3], 4, 3, dtype=torch.float64)
    for slack in ("full", "minimal"):
        assert torch.autograd.gradcheck(
            lambda *p, slack=slack: (
                function(*p, gt, count, iterations=3, eps=1.0, slack=slack, plan_gradient="exact").transport_B
            ),
            [t.requires_grad_() for t in predicted],
        )


@pytest.mark.parametrize("function", [match_segments, match_segments_reference])
def test_detached_gradients_are_the_derivative_where_the_plan_stands_still(function):
    """At a temperature of 1e9 a plan does not move with the cost."""
    *predicted, gt, count = make_segments([0, 2, 3], 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *p: function(*p, gt, count, iterations=3, eps=1e9)[:2], [t.requires_grad_() for t in predicted]
    )


@pytest.mark.parametrize("impl", FORMS)
def test_the_order_of_true_endpoints_changes_no_bit(impl, device):
    mid, dir_, length, gt, count = make_segments([6], 5, 6, device=device)
    swapped = gt.clone()
    swapped[:, ::2] = gt[:, ::2].flip(2)
    results = [losses_and_gradients(match_segments, (mid, dir_, length, g, count), impl=impl) for g in (gt, swapped)]
    assert_same_bits(*results)


@pytest.mark.parametrize("impl", FORMS)
def test_reversing_a_predicted_direction_only_reverses_its_gradient(impl, device):
    mid, dir_, length, gt, count = make_segments([6], 5, 6, device=device)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], device=device)[:, None]
    one, other = (
        losses_and_gradients(match_segments, (mid, d, length, gt, count), impl=impl) for d in (dir_, sign * dir_)
    )
    for loss in ("transport", "endpoint"):
        assert other[f"d {loss} / d dir"].any()
        other[f"d {loss} / d dir"] *= sign
    assert_same_bits(one, other)


@pytest.mark.parametrize("impl", FORMS)
def test_the_order_of_true_segments_only_renames_partners(impl, device):
    mid, dir_, length, gt, count = make_segments([6], 5, 6, device=device)
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    one, other = (
        losses_and_gradients(match_segments, (mid, dir_, length, g, count), impl=impl) for g in (gt, gt[:, order])
    )
    partner = other.pop("partner_BN")
    assert torch.equal(one.pop("partner_BN"), torch.where(partner >= 0, order[partner], -1))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", *FORMS])
def test_ties_break_to_the_lowest_index(impl, device):
    """Three equal predictions for two equal true segments: both choose prediction 0, which takes true segment 0."""
    segments = [
        t.expand(-1, size, *t.shape[2:]) for t, size in zip(make_segments([1], 1, 1), (3, 3, 3, 2), strict=False)
    ]
    function, options = (match_segments_reference, {}) if impl == "reference" else (match_segments, {"impl": impl})
    count = torch.tensor([2], device=device)
    match = function(*(t.to(device) for t in segments), count, iterations=ITERATIONS, **options)
    assert match.partner_BN.tolist() == [[0, -1, -1]]


def test_an_item_has_the_same_bits_alone_among_others_and_with_more_padding(device):
    mid, dir_, length, gt, count = make_segments([6, 3, 0], 5, 6, device=device)
    among = match_segments_forward(mid, dir_, length, gt, count, *SETTINGS, True, "triton")
    for columns in (6, 40, 64):
        padded = torch.full((3, columns, 2, 3), math.inf, device=device)
        padded[:, :6] = gt
        alone = match_segments_forward(*(t[1:2] for t in (mid, dir_, length, padded, count)), *SETTINGS, True, "triton")
        assert all(torch.equal(one[0], other[1]) for one, other in zip(alone, among, strict=True)), columns


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 3e38])
def test_padding_may_be_anything(impl, garbage, device):
    mid, dir_, length, gt, count = make_segments([2], 4, 5, device=device)
    clean, poisoned = gt.nan_to_num(0.0), gt.nan_to_num(garbage)
    results = [
        losses_and_gradients(match_segments, (mid, dir_, length, g, count), impl=impl) for g in (clean, poisoned)
    ]
    assert all(value.isfinite().all() for value in results[0].values())
    assert_same_bits(*results)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("broken", range(4), ids=["mid", "dir", "len", "gt"])
def test_a_nan_reaches_its_own_item_only(impl, broken, device):
    segments = make_segments([3, 3], 3, 3, device=device)
    clean = losses_and_gradients(match_segments, segments, impl=impl)
    segments[broken].view(2, -1)[1, 2] = math.nan
    hit = losses_and_gradients(match_segments, segments, impl=impl)
    assert_same_bits(clean, hit, items=slice(0, 1))
    assert hit["transport_B"][1].isnan() and hit["endpoint_B"][1].isnan() and hit["matched_BN"][1].isnan().all()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("counts", "N", "M"), [([0, 2], 3, 2), ([0, 0], 3, 2), ([0, 0], 3, 0), ([2, 0], 0, 2), ([], 3, 2), ([0], 0, 0)]
)
def test_empty_items_have_losses_and_gradients_of_zero(impl, counts, N, M, device):
    segments = make_segments(counts, N, M, device=device)
    results = losses_and_gradients(match_segments, segments, impl=impl, plan_gradient="exact")
    empty = torch.tensor([count == 0 or N == 0 for count in counts], dtype=torch.bool, device=device)
    assert (results.pop("partner_BN")[empty] == -1).all()
    for name, value in results.items():
        assert value.shape[0] == len(counts) and not value[empty].any(), name
        assert not value.numel() or value.isfinite().all(), name


@pytest.mark.parametrize("impl", ["reference", *FORMS])
@pytest.mark.parametrize("plan_gradient", ["detached", "exact"])
def test_a_perfect_prediction_has_gradients_of_zero(impl, plan_gradient, device):
    """All of its norms and differences are 0, where a norm has no derivative."""
    gt = torch.tensor([[[[0.25, 0.5, -0.25], [0.75, 0.5, -0.25]]]], device=device)
    predicted = (gt.mean(2), torch.tensor([[[1.0, 0.0, 0.0]]], device=device), torch.tensor([[0.5]], device=device))
    function, options = (match_segments_reference, {}) if impl == "reference" else (match_segments, {"impl": impl})
    segments = (*predicted, gt, torch.tensor([1], device=device))
    results = losses_and_gradients(function, segments, plan_gradient=plan_gradient, **options)
    assert results.pop("matched_BN").item() > 0.5 and results.pop("partner_BN").item() == 0
    for name, value in results.items():
        assert not value.any(), name


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize("difference", [1e-30, 1e-24, 1e-19, 1e-17])
def test_a_norm_pulls_with_at_most_its_weight_however_short(form, difference, device):
    mid, dir_, gt = (torch.zeros(1, *shape, device=device) for shape in ((1, 3), (1, 3), (1, 2, 3)))
    mid[..., 1], dir_[..., 0], dir_[..., 1], gt[..., 1, 0] = difference, 1.0, difference, 1.0
    mid[..., 0] = 0.5
    segments = (mid, dir_, torch.ones(1, 1, device=device), gt, torch.ones(1, dtype=torch.int64, device=device))
    function, options = (match_segments_reference, {}) if form == "reference" else (match_segments, {"impl": form})
    found = losses_and_gradients(function, segments, **options)
    assert found["d transport / d mid"].abs().max() <= 5.0
    assert found["d transport / d dir"].abs().max() <= 5.0 * 0.3


@pytest.mark.parametrize("impl", FORMS)
def test_segments_without_length_or_direction_follow_the_formula(impl, device):
    mid, dir_, length, gt, count = make_segments([4], 4, 4, device=device)
    gt[:, 1, 1] = gt[:, 1, 0]
    dir_[:, 2], length[:, 3] = 0.0, 0.0
    assert_follows_the_formula((mid, dir_, length, gt, count), impl)


@pytest.mark.parametrize("impl", FORMS)
def test_strides_do_not_matter(impl, device):
    mid, dir_, length, gt, count = make_segments([3, 6], 5, 6, device=device)
    packed = torch.cat([mid, dir_, length[:, :, None]], 2)
    strided = (packed[:, :, :3], packed[:, :, 3:6], packed[:, :, 6], gt.transpose(0, 1).contiguous().transpose(0, 1))
    results = [
        losses_and_gradients(match_segments, (*tensors, c), impl=impl)
        for tensors, c in (((mid, dir_, length, gt), count), (strided, torch.stack([count, count], 1)[:, 0]))
    ]
    assert_same_bits(*results)


@pytest.mark.parametrize("impl", FORMS)
def test_a_mean_over_the_batch_weights_each_item_alike(impl, device):
    """`mean` hands one number down to all items, with stride 0."""
    *predicted, gt, count = make_segments([3, 2], 3, 3, device=device)
    predicted = [t.requires_grad_() for t in predicted]
    match = match_segments(*predicted, gt, count, iterations=1, impl=impl)
    mean = torch.autograd.grad(match.transport_B.mean(), predicted, retain_graph=True)
    half = torch.autograd.grad(match.transport_B, predicted, torch.full((2,), 0.5, device=device))
    assert all(torch.equal(a, b) for a, b in zip(mean, half, strict=True))


@pytest.mark.parametrize("impl", FORMS)
def test_without_need_no_gradients_are_made(impl, device):
    *predicted, gt, count = make_segments([3], 3, 3, device=device)
    *values, grads_B27N = match_segments_forward(*predicted, gt, count, *SETTINGS, False, impl)
    assert grads_B27N.numel() == 0
    needed = match_segments_forward(*predicted, gt, count, *SETTINGS, True, impl)
    for value, other in zip(values, needed, strict=False):
        torch.testing.assert_close(value, other)
    predicted[0].requires_grad_()
    match = match_segments(*predicted, gt, count, iterations=1, impl=impl)
    assert [value.requires_grad for value in match] == [True, True, False, False]


@pytest.mark.parametrize("impl", FORMS)
def test_counts_that_may_not_be_read_are_clamped(impl, monkeypatch, device):
    mid, dir_, length, gt, _ = make_segments([3, 3], 3, 3, device=device)
    right, wrong = (torch.tensor(counts, device=device) for counts in ([3, 0], [70, -2]))
    expected = losses_and_gradients(match_segments, (mid, dir_, length, gt, right), impl=impl)
    for module in (matching, matching_eager):
        monkeypatch.setattr(module, "values_are_readable", lambda tensor: False)
    assert_same_bits(expected, losses_and_gradients(match_segments, (mid, dir_, length, gt, wrong), impl=impl))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mid": torch.zeros(2, 3, 2)}, r"mid must be \[B, N, 3\], got shape \(2, 3, 2\)"),
        ({"dir": torch.zeros(2, 4, 3)}, r"dir must have mid's shape \(2, 3, 3\), got shape \(2, 4, 3\)"),
        ({"len": torch.zeros(2, 3, 1)}, r"len must be \[B, N\] = \[2, 3\], got shape \(2, 3, 1\)"),
        ({"gt": torch.zeros(2, 4, 6)}, r"gt must be \[B, M, 2, 3\] with B = 2, got shape \(2, 4, 6\)"),
        ({"gt": torch.zeros(1, 4, 2, 3)}, r"gt must be \[B, M, 2, 3\] with B = 2, got shape \(1, 4, 2, 3\)"),
        ({"gt_count": torch.zeros(3, dtype=torch.int32)}, r"gt_count must be \[B\] = \[2\], got shape \(3,\)"),
        ({"gt": torch.zeros(2, 129, 2, 3)}, r"at most 128 segments, got N = 3 and M = 129"),
        ({"mid": torch.zeros(2, 3, 3, dtype=torch.int32)}, r"mid must be one of .*, got torch.int32"),
        ({"gt": torch.zeros(2, 4, 2, 3, dtype=torch.int32)}, r"gt must be one of .*, got torch.int32"),
        ({"dir": torch.zeros(2, 3, 3).half()}, r"dir must have mid's dtype torch.float32, got torch.float16"),
        ({"len": torch.zeros(2, 3).double()}, r"len must have mid's dtype torch.float32, got torch.float64"),
        ({"gt_count": torch.zeros(2)}, r"gt_count must be int32 or int64, got torch.float32"),
        ({"eps": torch.tensor(0.1)}, r"eps must be a number, got a tensor of shape \(\)"),
        ({"eps": "a"}, "eps must be a number, got 'a'"),
        ({"cost_scale": None}, "cost_scale must be a number, got None"),
        ({"direction_weight": True}, "direction_weight must be a number, got True"),
        ({"dustbin": torch.tensor(0.3, requires_grad=True)}, "dustbin must be a number, got a tensor"),
        ({"gt": torch.zeros(2, 4, 2, 3, device="meta")}, r"gt must be on mid's device cpu, got meta"),
        ({"gt_count": torch.tensor([4, 5])}, r"gt_count must lie in \[0, M\] = \[0, 4\], got \[4, 5\]"),
        ({"gt_count": torch.tensor([-1, 4])}, r"gt_count must lie in \[0, M\] = \[0, 4\], got \[-1, 4\]"),
        ({"direction_weight": -0.1}, r"direction_weight must be finite and at least 0, got -0.1"),
        ({"length_weight": math.nan}, r"length_weight must be finite and at least 0, got nan"),
        ({"cost_scale": 0.0}, r"cost_scale must be finite and positive, got 0.0"),
        ({"eps": -1.0}, r"eps must be finite and positive, got -1.0"),
        ({"dustbin": math.inf}, r"dustbin must be finite, got inf"),
        ({"iterations": 0}, r"iterations must be an integer of at least 1, got 0"),
        ({"iterations": 2.0}, r"iterations must be an integer of at least 1, got 2.0"),
        ({"iterations": True}, r"iterations must be an integer of at least 1, got True"),
        ({"iterations": torch.tensor(2)}, r"iterations must be an integer of at least 1, got a tensor of shape \(\)"),
        ({"slack": "some"}, r"slack must be one of full, minimal, got 'some'"),
        ({"plan_gradient": "none"}, r"plan_gradient must be one of detached, exact, got 'none'"),
        ({"impl": "cuda"}, r"impl must be one of auto, eager, triton, got 'cuda'"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {"mid": torch.zeros(2, 3, 3), "dir": torch.zeros(2, 3, 3), "len": torch.zeros(2, 3)}
    arguments |= {"gt": torch.zeros(2, 4, 2, 3), "gt_count": torch.tensor([4, 0])} | changes
    tensors = [arguments.pop(name) for name in ("mid", "dir", "len", "gt", "gt_count")]
    with pytest.raises(ValueError, match=message):
        match_segments(*tensors, **arguments)


def test_the_kernel_refuses_float64(device):
    segments = make_segments([3], 3, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"mid must be one of .* for impl='triton', got torch.float64"):
        match_segments(*segments, impl="triton")


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("need_grad", [True, False])
def test_the_operators_are_well_registered(impl, need_grad, device):
    *predicted, gt, count = make_segments([2], 2, 2, device=device)
    predicted = [t.requires_grad_(need_grad) for t in predicted]
    torch.library.opcheck(
        torch.ops.ridgeline.match_segments_forward.default, (*predicted, gt, count, *SETTINGS, need_grad, impl)
    )
    if need_grad:
        upstream = torch.rand(2, 1, device=device)
        grads = torch.rand(1, 2, 7, 2, device=device)
        torch.library.opcheck(
            torch.ops.ridgeline.match_segments_backward.default, (*upstream, grads, torch.bfloat16, impl)
        )


def test_it_compiles_without_a_graph_break(device):
    *predicted, gt, count = make_segments([3, 2], 4, 3, device=device)
    predicted = [t.requires_grad_() for t in predicted]

    def loss(*predicted):
        match = match_segments(*predicted, gt, count, iterations=ITERATIONS)
        return (match.transport_B + 0.5 * match.endpoint_B).mean() + match.matched_BN.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = loss(*predicted), compiled(*predicted)
    assert torch.equal(actual, expected)
    pairs = zip(torch.autograd.grad(actual, predicted), torch.autograd.grad(expected, predicted), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.gpu
def test_a_thousand_launches_under_load_give_the_same_bits(device):
    *predicted, gt, count = make_segments([64, 40, 1, 0] * 16, 64, 64, device=device)
    first = match_segments_forward(*predicted, gt, count, *SETTINGS, True, "triton")
    noise, stream = torch.rand(2048, 2048, device=device), torch.cuda.Stream()
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(1000):
        with torch.cuda.stream(stream):
            noise @ noise
        again = match_segments_forward(*predicted, gt, count, *SETTINGS, True, "triton")
        differing += torch.stack([(one != other).any() for one, other in zip(first, again, strict=True)]).any()
    assert differing == 0


def test_the_result_names_its_parts(device):
    match = match_segments(*make_segments([2], 2, 2, device=device))
    assert isinstance(match, Match) and match._fields == ("transport_B", "endpoint_B", "matched_BN", "partner_BN")
    assert match.partner_BN.dtype == torch.int64 and match.matched_BN.dtype == torch.float32
