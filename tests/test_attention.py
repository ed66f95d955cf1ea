"""`gqa_attention`: how exact it is, what does not count and what is refused, how it is registered."""

import math

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from kernels import attention
from kernels.attention import gqa_attention, gqa_attention_reference
from tests.accuracy import assert_accurate
from tests.attention_problems import NAMES, counts, problem, random_mask, run, same_bits, to_device

FORMS = ("eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def log_scale_floor(tensors, eps, keys):
    """eps/4 times what the sum for d log_scale would be if no term cancelled another: tau sum |ds|, [H].

    Measured on 16 problems per dtype: at most 0.11 eps in float32, 0.02 eps in bfloat16 and float16.
    """
    q, k, v, log_scale_H, do = (x.double() for x in tensors)
    (R, S), tau_H = (q.shape[1] // k.shape[1], k.shape[2]), log_scale_H.exp()
    k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    valid_BS = keys.get("key_mask_BS", torch.ones(len(q), S, dtype=torch.bool))
    if "key_count_B" in keys:
        valid_BS = torch.arange(S) < keys["key_count_B"][:, None]
    logits = tau_H[:, None, None] * normalize(q, dim=-1) @ normalize(k, dim=-1).mT
    p = logits.masked_fill(~valid_BS[:, None, None], -1e300).softmax(-1) * valid_BS[:, None, None]
    dp = do @ v.mT
    return float(eps / 4 * (tau_H * (p * (dp - (p * dp).sum(-1, keepdim=True))).abs().sum((0, 2, 3))).max())


def check_accuracy(tensors, keys, device, impl, *, slack=0.0, **options):
    """Apply the rule of accuracy; `slack` is an allowance relative to each result's size."""
    dtype = tensors[0].dtype
    truth = run(gqa_attention_reference, tensors, torch.float64, **keys)
    eager = run(gqa_attention_reference, tensors, torch.float32, **keys)
    keys_on = {name: value.to(device) for name, value in keys.items()}
    actual = run(gqa_attention, to_device(tensors, device), precision="ieee", impl=impl, **keys_on, **options)
    floors = [slack * x.abs().max().item() for x in truth[:4]]
    floors.append(log_scale_floor(tensors, torch.finfo(dtype).eps + 4 * slack, keys))
    for name, x, t, e, floor in zip(NAMES, actual, truth, eager, floors, strict=True):
        assert_accurate(x, truth=t, eager=e, floor=floor, name=name)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, keys",
    [
        ((3, 4, 2, 33, 33, 32), counts(33, 32, 0)),
        ((2, 4, 1, 17, 64, 64), {}),
        ((3, 2, 1, 40, 257, 16), counts(257, 100, 0)),
        ((1, 1, 1, 16, 2048, 16), {}),
        ((2, 2, 1, 9, 70, 128), random_mask(2, 70)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_output_and_gradients_are_as_close_to_float64_as_eager(shape, keys, dtype, impl, device):
    check_accuracy(problem(*shape, dtype), keys, device, impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_gives_its_value_and_only_rounding_to_queries_and_keys(dtype, impl, device):
    tensors = to_device(problem(2, 2, 2, 5, 1, 16, dtype), device)
    o, dq, dk, dv, dlog_scale = run(gqa_attention, tensors, precision="ieee", impl=impl)
    q, k, v, log_scale_H, do = tensors
    eps, tau = torch.finfo(dtype).eps, log_scale_H.exp().max()
    torch.testing.assert_close(o, v.expand_as(o), rtol=2 * eps, atol=0)
    # the backward recomputes the logit, of size tau: its rounding is a relative error of eps tau in the weight
    weight = 2 * tau.item() * torch.finfo(torch.float32).eps
    terms = do.float().abs().sum(2).max().item()
    true_dv = do.float().sum(2, keepdim=True).to(dtype)
    torch.testing.assert_close(dv, true_dv, rtol=4 * eps, atol=8 * eps + weight * terms)
    # ds = p (dp - delta) is a difference of equal numbers: what is left are the roundings of <do, v>
    noise = 2 * eps * tau * (do.float() * v.float()).abs().sum(-1, keepdim=True)
    assert (dq.abs() <= noise / q.float().norm(dim=-1, keepdim=True)).all()
    assert (dk.abs() <= noise.sum(2, keepdim=True) / k.float().norm(dim=-1, keepdim=True)).all()
    assert (dlog_scale.abs() <= noise.sum((0, 2, 3))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_online_softmax_is_as_close_to_float64_as_eager(dtype, device):
    check_accuracy(problem(2, 2, 1, 9, 600, 16, dtype), random_mask(2, 600), device, "triton", softmax="online")


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    "dtype, softmax, tau",
    [
        (torch.float32, "static", 60),
        (torch.bfloat16, "static", 60),
        (torch.float16, "static", 10),
        (torch.float32, "online", 300),
    ],
)
def test_the_largest_temperature_neither_overflows_nor_loses_small_weights(dtype, softmax, tau, impl, device):
    tensors = problem(2, 1, 1, 16, 80, 16, dtype, seed=1)
    q, k, _, log_scale_H, _ = tensors
    # logits from +tau to -tau in item 0; only -tau in item 1
    k[0, :, :40], k[0, :, 40:], k[1] = q[0, :, :1], -q[0, :, :1], -q[1, :, :1]
    q[:] = q[:, :, :1]
    log_scale_H.fill_(math.log(tau))
    # the backward recomputes logits of size tau: each rounding of one is a relative error of eps tau in a weight
    check_accuracy(tensors, {}, device, impl, softmax=softmax, slack=4 * tau * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("impl", FORMS)
def test_the_extremes_of_log_scale_take_the_nearest_key_or_the_mean_of_all(impl, device):
    q, k, v, *_ = problem(1, 2, 1, 6, 70, 16)
    q[:, :, 1], k[:, :, 1] = q[:, :, 1] * 2e-12, k[:, :, 1] * 2e-12
    tensors = to_device([q, k, v, torch.tensor([60.0, -60.0])], device)
    o = gqa_attention(*tensors, impl=impl, softmax="online", precision="ieee").cpu()
    nearest = (normalize(q[0, 0], dim=-1) @ normalize(k[0, 0], dim=-1).T).argmax(1)
    torch.testing.assert_close(o[0, 0], v[0, 0, nearest])
    torch.testing.assert_close(o[0, 1], v[0, 0].mean(0).expand(6, 16))


@pytest.mark.parametrize("impl", FORMS)
def test_queries_and_keys_shorter_than_eps_are_divided_by_eps(impl, device):
    tensors = problem(1, 2, 1, 8, 40, 16)
    for x in tensors[:2]:
        x[:, :, 0], x[:, :, 1] = 0, x[:, :, 1] * 1e-14
    check_accuracy(tensors, counts(39), device, impl)


@pytest.mark.parametrize("impl", FORMS)
def test_a_zero_key_in_float16_gives_finite_gradients_of_the_queries(impl, device):
    tensors = problem(1, 1, 1, 4, 20, 16, torch.float16)
    tensors[1][:, :, 3] = 0
    assert run(gqa_attention, to_device(tensors, device), impl=impl)[1].isfinite().all()


@pytest.mark.parametrize("keys", [counts(11, 4), random_mask(2, 11)], ids=["count", "mask"])
def test_reference_is_sdpa_on_unit_vectors(keys):
    q, k, v, log_scale_H, _ = problem(2, 4, 2, 7, 11, 16)
    mask_BS = keys.get("key_mask_BS", torch.arange(11) < torch.tensor([11, 4])[:, None])
    unit_q, unit_k = normalize(q, dim=-1) * log_scale_H.exp()[:, None, None], normalize(k, dim=-1)
    sdpa = scaled_dot_product_attention(
        unit_q, unit_k, v, attn_mask=mask_BS[:, None, None], scale=1.0, enable_gqa=True
    ).masked_fill(~mask_BS.any(1)[:, None, None, None], 0)
    torch.testing.assert_close(gqa_attention_reference(q, k, v, log_scale_H, **keys), sdpa)


@pytest.mark.parametrize("function", [gqa_attention_reference, gqa_attention])
@pytest.mark.parametrize("keys", [{}, counts(0, 3), random_mask(2, 4)], ids=["all", "count", "mask"])
def test_gradcheck_in_float64(function, keys):
    inputs = [x.double().requires_grad_() for x in problem(2, 2, 1, 3, 4, 16)[:4]]
    assert torch.autograd.gradcheck(lambda *x: function(*x, **keys), inputs, fast_mode=True)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("keys", [counts(0, 5), random_mask(2, 9)], ids=["count", "mask"])
def test_an_item_without_a_valid_key_is_zero_and_so_are_its_gradients(keys, impl, device):
    empty = 0 if "key_count_B" in keys else 1
    keys = {name: value.to(device) for name, value in keys.items()}
    results = run(gqa_attention, to_device(problem(2, 2, 1, 6, 9, 16), device), impl=impl, **keys)
    for name, x in zip(NAMES, results[:4], strict=False):
        assert not x[empty].any(), name
        assert x[1 - empty].any(), name


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("keys", [counts(0, 5), random_mask(2, 9)], ids=["count", "mask"])
def test_garbage_in_the_upstream_gradient_of_an_item_without_a_valid_key_has_no_effect(keys, impl, device):
    *tensors, do = to_device(problem(2, 2, 1, 6, 9, 16), device)
    keys = {name: value.to(device) for name, value in keys.items()}
    dirty = do.clone()
    dirty[0 if "key_count_B" in keys else 1] = math.nan
    assert same_bits(*(run(gqa_attention, [*tensors, x], impl=impl, **keys) for x in (dirty, do)))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [counts(70, 5), random_mask(2, 130)], ids=["count", "mask"])
def test_garbage_in_keys_that_do_not_count_has_no_effect(keys, garbage, impl, device):
    tensors = problem(2, 2, 1, 6, 130, 16)
    mask_BS = keys.get("key_mask_BS", torch.arange(130) < torch.tensor([70, 5])[:, None])
    dirty = [x.masked_fill(~mask_BS[:, None, :, None], garbage) if x.shape[2:3] == (130,) else x for x in tensors]
    keys = {name: value.to(device) for name, value in keys.items()}
    clean, dirty = (run(gqa_attention, to_device(x, device), impl=impl, **keys) for x in (tensors, dirty))
    assert same_bits(clean, dirty)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("argument", range(3), ids=["q", "k", "v"])
def test_nan_in_a_valid_entry_reaches_that_item_only(argument, dtype, impl, device):
    tensors = problem(2, 2, 1, 6, 20, 16, dtype)
    tensors[argument][1, 0, 2, 5] = math.nan
    results = run(gqa_attention, to_device(tensors, device), impl=impl)
    assert results[0][1].isnan().any()
    assert results[1][1].isnan().any()
    assert all(x[0].isfinite().all() for x in results[:4])


@pytest.mark.parametrize("impl", FORMS)
def test_strides_change_neither_bits_nor_the_layout_of_the_output(impl, device):
    tensors = to_device(problem(2, 4, 2, 10, 40, 16), device)
    dense = run(gqa_attention, [x.contiguous() for x in tensors], impl=impl)
    projected = run(gqa_attention, tensors, impl=impl)
    columns = run(gqa_attention, [x.mT.contiguous().mT if x.dim() == 4 else x for x in tensors], impl=impl)
    gaps = [torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0] if x.dim() == 4 else x for x in tensors]
    assert same_bits(dense, projected)
    assert same_bits(dense, columns)
    assert same_bits(dense, run(gqa_attention, gaps, impl=impl))
    assert [x.stride() for x in projected[:2]] == [tensors[0].stride()] * 2
    assert projected[2].stride() == tensors[1].stride()


@pytest.mark.parametrize("impl", FORMS)
def test_keys_may_be_one_row_expanded(impl, device):
    q, k, v, log_scale_H, _ = to_device(problem(2, 2, 1, 4, 1, 16), device)
    k, v = k.expand(2, 1, 30, 16), v.expand(2, 1, 30, 16)
    o = gqa_attention(q, k, v, log_scale_H, precision="ieee", impl=impl)
    torch.testing.assert_close(o, v[:, :, :4].expand(2, 2, 4, 16))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["B", "T", "S"])
def test_a_size_of_zero_gives_zeros(sizes, impl, device):
    B, T, S = sizes
    results = run(gqa_attention, to_device(problem(B, 2, 1, T, S, 16), device), impl=impl)
    assert results[0].shape == (B, 2, T, 16)
    assert all(not x.any() for x in results)


@pytest.mark.parametrize("impl", FORMS)
def test_a_call_repeats_bit_for_bit(impl, device):
    tensors = to_device(problem(2, 4, 2, 20, 90, 32), device)
    key_count_B = torch.tensor([90, 31], device=device)
    first, second = (run(gqa_attention, tensors, key_count_B=key_count_B, impl=impl) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("impl", FORMS)
def test_int32_and_int64_counts_agree(impl, device):
    tensors = to_device(problem(2, 2, 1, 6, 20, 16), device)
    key_count_B = torch.tensor([20, 7], device=device)
    narrow, wide = (
        run(gqa_attention, tensors, key_count_B=key_count_B.to(dtype), impl=impl)
        for dtype in (torch.int32, torch.int64)
    )
    assert same_bits(narrow, wide)


@pytest.mark.parametrize("impl", FORMS)
def test_counts_out_of_range_are_clamped_where_values_cannot_be_read(impl, monkeypatch, device):
    tensors = to_device(problem(2, 2, 1, 6, 20, 16), device)
    wild, tame = (torch.tensor(values, device=device) for values in ([99, -3], [20, 0]))
    expected = run(gqa_attention, tensors, key_count_B=tame, impl=impl)
    monkeypatch.setattr(attention, "values_are_readable", lambda tensor: False)
    assert same_bits(run(gqa_attention, tensors, key_count_B=wild, impl=impl), expected)


@pytest.mark.parametrize("impl", FORMS)
def test_autocast_changes_nothing(impl, device):
    tensors = to_device(problem(2, 2, 1, 6, 20, 16, torch.bfloat16), device)
    plain = run(gqa_attention, tensors, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        assert same_bits(run(gqa_attention, tensors, impl=impl), plain)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("limit", ["all", "count", "mask"])
def test_registration_passes_opcheck(limit, impl, device):
    *inputs, do = to_device(problem(2, 2, 1, 5, 9, 16), device)
    limits = {"all": (None, None), "count": (torch.tensor([9, 4]), None), "mask": (None, torch.rand(2, 9) > 0.3)}
    keys = [None if x is None else x.to(device) for x in limits[limit]]
    operators = torch.ops.ridgeline
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(operators.gqa_attention_forward.default, (*inputs, *keys, "static", "ieee", 1, impl))
    inputs = [x.detach() for x in inputs]
    outputs = operators.gqa_attention_forward(*inputs, *keys, "static", "ieee", 1, impl)
    torch.library.opcheck(operators.gqa_attention_backward.default, (do, *inputs, *keys, *outputs, "ieee", impl))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_registration_knows_the_strides_where_rows_are_not_dense(name, impl, device):
    named = dict(zip(("q", "k", "v", "log_scale", "do"), to_device(problem(2, 4, 2, 5, 9, 16), device), strict=True))
    named[name] = named[name].mT.contiguous().mT
    *inputs, do = named.values()
    check = {"test_utils": ("test_schema", "test_faketensor")}
    operators, settings = torch.ops.ridgeline, (None, None, "static", "ieee", 1, impl)
    torch.library.opcheck(operators.gqa_attention_forward.default, (*inputs, *settings), **check)
    outputs = operators.gqa_attention_forward(*inputs, *settings)
    backward = (do, *inputs, None, None, *outputs, "ieee", impl)
    torch.library.opcheck(operators.gqa_attention_backward.default, backward, **check)


@pytest.mark.parametrize("impl", FORMS)
def test_torch_compile_gives_the_bits_of_eager(impl, device):
    tensors = to_device(problem(2, 2, 1, 5, 9, 16), device)
    key_count_B = torch.tensor([9, 4], device=device)
    compiled = torch.compile(gqa_attention, fullgraph=True, backend="aot_eager")
    plain, traced = (run(f, tensors, key_count_B=key_count_B, impl=impl) for f in (gqa_attention, compiled))
    assert same_bits(plain, traced)


def test_torch_export_gives_the_bits_of_eager():
    class Attention(torch.nn.Module):
        def forward(self, q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B):
            return gqa_attention(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B=key_count_B)

    arguments = (*problem(2, 2, 1, 5, 9, 16)[:4], torch.tensor([9, 4]))
    exported = torch.export.export(Attention(), arguments).module()
    assert torch.equal(exported(*arguments), Attention()(*arguments))


def _replace(**changes):
    """A legal call with some arguments replaced."""
    q, k, v, log_scale_H, _ = problem(2, 4, 2, 3, 5, 16)
    arguments = {"q_BHTD": q, "k_BGSD": k, "v_BGSD": v, "log_scale_H": log_scale_H}
    return arguments | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q_BHTD": torch.zeros(2, 3, 64)}, r"q must be \[B, H, T, D\], got shape \(2, 3, 64\)"),
        ({"k_BGSD": torch.zeros(2, 5, 32)}, r"k must be \[B, G, S, D\]"),
        ({"v_BGSD": torch.zeros(2, 5, 32)}, r"v must be \[B, G, S, D\]"),
        ({"q_BHTD": torch.zeros(2, 4, 3, 16, dtype=torch.int32)}, "q must be float32"),
        ({"k_BGSD": torch.zeros(2, 2, 5, 16, dtype=torch.bfloat16)}, "k must have the dtype and device of q"),
        ({"v_BGSD": torch.zeros(2, 2, 5, 16, device="meta")}, "v must have the dtype and device of q"),
        ({"q_BHTD": torch.zeros(2, 4, 3, 48)}, "q must have head width 16, 32, 64, 128, got 48"),
        ({"k_BGSD": torch.zeros(3, 2, 5, 16)}, r"k must be \[2, G, S, 16\]"),
        ({"k_BGSD": torch.zeros(2, 2, 5, 32)}, r"k must be \[2, G, S, 16\]"),
        ({"v_BGSD": torch.zeros(2, 2, 6, 16)}, "v must have the shape of k"),
        ({"k_BGSD": torch.zeros(2, 3, 5, 16), "v_BGSD": torch.zeros(2, 3, 5, 16)}, "a multiple of the 3 heads of k"),
        ({"k_BGSD": torch.zeros(2, 0, 5, 16), "v_BGSD": torch.zeros(2, 0, 5, 16)}, "a multiple of the 0 heads of k"),
        ({"log_scale_H": torch.zeros(2)}, r"log_scale must be \[4\]"),
        ({"log_scale_H": torch.zeros(4, dtype=torch.int64)}, r"log_scale must be \[4\] and floating point"),
        ({"log_scale_H": torch.zeros(4, device="meta")}, "log_scale must be on the device of q"),
        ({"key_count_B": torch.tensor([1, 2]), "key_mask_BS": torch.ones(2, 5, dtype=torch.bool)}, "must not both"),
        ({"key_mask_BS": torch.ones(2, 4, dtype=torch.bool)}, r"key_mask must be \[2, 5\] of bool"),
        ({"key_mask_BS": torch.ones(2, 5)}, r"key_mask must be \[2, 5\] of bool"),
        ({"key_mask_BS": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "key_mask must be on the device of q"),
        ({"key_count_B": torch.tensor([1, 2, 3])}, r"key_count must be \[2\] of int32 or int64"),
        ({"key_count_B": torch.tensor([1.0, 2.0])}, r"key_count must be \[2\] of int32 or int64"),
        ({"key_count_B": torch.zeros(2, dtype=torch.int64, device="meta")}, "key_count must be on the device of q"),
        ({"key_count_B": torch.tensor([-1, 2])}, r"key_count must be in \[0, 5\], got -1 to 2"),
        ({"key_count_B": torch.tensor([1, 6])}, r"key_count must be in \[0, 5\], got 1 to 6"),
        ({"softmax": "fast"}, "softmax must be static or online, got 'fast'"),
        ({"precision": "fp8"}, "precision must be tf32 or ieee, got 'fp8'"),
        ({"split": 0}, "split must be at least 1, got 0"),
        ({"impl": "cuda"}, "impl must be one of auto, eager, triton"),
        ({"log_scale_H": torch.full((4,), math.log(61))}, "log_scale must be at most log 60"),
        ({"log_scale_H": torch.full((4,), math.nan)}, "log_scale must be finite"),
        ({"log_scale_H": torch.full((4,), math.inf), "softmax": "online"}, "log_scale must be finite"),
        ({"log_scale_H": torch.tensor([0, -math.inf, 0, 0])}, "log_scale must be finite"),
        ({"log_scale_H": torch.full((4,), 61.0), "softmax": "online"}, r"in \[-60, 60\], got 61.0 to 61.0"),
        ({"log_scale_H": torch.zeros(4).double()}, r"log_scale must be \[4\] and .*, got shape \(4,\), torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        gqa_attention(**_replace(**changes))


def test_float16_is_refused_above_temperature_10():
    half = {name: x.half() for name, x in _replace().items() if name != "log_scale_H"}
    with pytest.raises(ValueError, match="log_scale must be at most log 10"):
        gqa_attention(**half, log_scale_H=torch.full((4,), math.log(11)))


def test_the_kernels_refuse_float64(device):
    double = {name: x.double().to(device) for name, x in _replace().items()}
    with pytest.raises(ValueError, match="float64 must have impl='eager'"):
        gqa_attention(**double, impl="triton")


def test_tensors_without_values_have_the_shapes_of_the_result():
    q, k, v = (torch.empty(2, heads, 5, 16, device="meta") for heads in (4, 2, 2))
    assert gqa_attention(q, k, v, torch.empty(4, device="meta")).shape == q.shape


@pytest.mark.parametrize("log_scale", [20.0, 40.0, 60.0])
def test_on_a_cpu_the_gradient_of_the_values_is_right_where_weights_are_0_or_1(log_scale):
    def gradients(form, dtype, **options):
        generator = torch.Generator().manual_seed(2)
        drawn = [torch.randn(2, heads, 9, 16, generator=generator) for heads in (4, 2, 2, 4)]
        q, k, v, do = (x.to(dtype) for x in drawn)
        inputs = [x.requires_grad_() for x in (q, k, v, torch.full((4,), log_scale, dtype=dtype))]
        return torch.autograd.grad(form(*inputs, **options), inputs, do)

    found = gradients(gqa_attention, torch.float32, softmax="online", impl="eager")
    truth = gradients(gqa_attention_reference, torch.float64)
    assert all(gradient.isfinite().all() for gradient in found)
    assert torch.allclose(found[2].double(), truth[2], rtol=1e-5, atol=1e-6)
