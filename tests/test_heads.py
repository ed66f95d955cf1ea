"""`segment_heads`: how exact it is, its extremes, what is refused, how it is registered."""

import math

import pytest
import torch

from kernels.heads import segment_heads, segment_heads_reference
from tests.accuracy import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("mid", "dir", "len", "conf")
INPUTS = ("x", "weight", "bias", "conf_weight", "conf_bias", "offsets")
GRADIENTS = tuple(f"d{name}" for name in INPUTS)
# those of the inputs and gradients that have items
BY_ITEM = (*OUTPUTS, "dx")


def problem(B, N, C, dtype=torch.float32):
    """Return the inputs and the upstream gradients of the outputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [draw(B, N, C).to(dtype), draw(7, C) / C**0.5, draw(7), draw(1, C) / C**0.5, draw(1), draw(N, 2, 3)]
    return inputs + [draw(B, N, *tail) for tail in ((3,), (3,), (), ())]


def run(function, tensors, dtype=None, **options):
    """Return the outputs and the gradients of the inputs by name."""
    tensors = [tensor.to(dtype or tensor.dtype) for tensor in tensors]
    inputs = [tensor.detach().requires_grad_() for tensor in tensors[:6]]
    outputs = function(*inputs, **options)
    gradients = torch.autograd.grad(outputs, inputs, tensors[6:])
    return dict(zip(OUTPUTS + GRADIENTS, [*(output.detach() for output in outputs), *gradients], strict=True))


def to_device(tensors, device):
    return [tensor.to(device) for tensor in tensors]


def same_bits(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def check_accuracy(tensors, device, impl="triton"):
    truth, eager = (run(segment_heads_reference, tensors, dtype) for dtype in (torch.float64, torch.float32))
    actual = run(segment_heads, to_device(tensors, "cpu" if impl == "eager" else device), impl=impl)
    for name, x in actual.items():
        assert_accurate(x, truth=truth[name], eager=eager[name], name=name)
    return actual


@pytest.mark.parametrize(
    "shape, dtype",
    [((3, 11, 256), dtype) for dtype in DTYPES]
    + [((35, 3, 16), DTYPES[0]), ((2, 5, 13), DTYPES[0]), ((1, 1, 1), DTYPES[0]), ((1, 3, 1024), DTYPES[0])],
)
def test_outputs_and_gradients_are_as_close_to_float64_as_eager(shape, dtype, device):
    actual = check_accuracy(problem(*shape, dtype), device)
    assert all(actual[name].dtype == torch.float32 for name in OUTPUTS)
    assert actual["dx"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_eager_form_is_as_exact(dtype, device):
    check_accuracy(problem(2, 5, 24, dtype), device, "eager")


@pytest.mark.parametrize("value", [-80.0, -30.0, -12.0, -3.0, -0.1, 0.0, 0.1, 3.0, 20.1, 90.0])
def test_short_and_long_lengths_are_as_close_to_float64_as_eager(value, device):
    tensors = problem(1, 5, 8)
    tensors[1][6], tensors[2][6] = 0, value
    check_accuracy(tensors, device)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_lengths_without_end_are_those_of_the_reference(value, device):
    tensors = to_device(problem(1, 2, 8), device)
    tensors[2][6] = value
    lengths = segment_heads(*tensors[:6], impl="triton")[2], segment_heads_reference(*tensors[:6])[2]
    torch.testing.assert_close(*lengths, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [0.0, 1e-25, 1e-13, 0.9e-12, 1.1e-12, 1e-6, 1e6])
def test_short_and_long_directions_are_as_close_to_float64_as_eager(length, device):
    tensors = problem(2, 5, 8)
    tensors[1][3:6] *= length
    tensors[2][3:6] *= length
    # that of a direction is 1 / length times that of its unit
    tensors[7] *= max(length, 1e-12)
    check_accuracy(tensors, device)


def test_products_are_in_float32_under_autocast_too(device):
    tensors = to_device(problem(2, 5, 24), device)
    plain = {impl: segment_heads(*tensors[:6], impl=impl) for impl in ("eager", "triton")}
    with torch.autocast(device.type, torch.bfloat16):
        for impl, outputs in plain.items():
            found = segment_heads(*tensors[:6], impl=impl)
            assert all(torch.equal(x, y) for x, y in zip(found, outputs, strict=True))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_layers_in_bfloat16_have_gradients_in_bfloat16(impl, device):
    tensors = problem(2, 5, 24)
    tensors[1:6] = [tensor.bfloat16() for tensor in tensors[1:6]]
    actual = check_accuracy(tensors, device, impl)
    assert {actual[name].dtype for name in GRADIENTS[1:]} == {torch.bfloat16}


def test_the_second_offset_has_no_effect_and_gradient_zero(device):
    for impl in ("eager", "triton"):
        tensors = to_device(problem(2, 5, 24), device)
        before = run(segment_heads, tensors, impl=impl)
        tensors[5][:, 1] = math.nan
        after = run(segment_heads, tensors, impl=impl)
        assert same_bits(before, after)
        assert after["doffsets"].shape == (5, 2, 3)
        assert not after["doffsets"][:, 1].any()
        assert after["doffsets"][:, 0].all()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 2)])
def test_gradients_of_some_outputs_are_those_of_the_reference(used, device):
    tensors = to_device(problem(2, 5, 24), device)
    results = []
    for function, options in ((segment_heads_reference, {}), (segment_heads, {"impl": "triton"})):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors[:6]]
        outputs = function(*inputs, **options)
        gradients = torch.autograd.grad(
            [outputs[i] for i in used], inputs, [tensors[6 + i] for i in used], materialize_grads=True
        )
        results.append(gradients)
    torch.testing.assert_close(*results)


def test_gradients_are_neither_filled_with_zeros_nor_copied(device):
    tensors = to_device(problem(2, 5, 24), device)
    inputs = [tensor.requires_grad_() for tensor in tensors[:6]]
    with torch.profiler.profile(acc_events=True) as profile:
        outputs = segment_heads(*inputs, impl="triton")
        torch.autograd.backward(outputs, tensors[6:])
    calls = {event.key for event in profile.key_averages()}
    assert {"ridgeline::segment_heads_forward", "ridgeline::segment_heads_backward"} <= calls
    assert not calls & {"aten::zeros", "aten::new_zeros", "aten::clone", "aten::add", "aten::sum", "aten::_to_copy"}
    # those of the layers are views of the one tensor that the kernels fill
    assert len({tensor.grad.untyped_storage().data_ptr() for tensor in inputs[1:5]}) == 1


def test_strides_change_no_bits(device):
    tensors = to_device(problem(2, 5, 24, torch.bfloat16), device)
    dense = run(segment_heads, tensors, impl="triton")
    moved = [tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for tensor in tensors]
    assert same_bits(dense, run(segment_heads, moved, impl="triton"))
    gaps = [torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0] for tensor in tensors]
    assert same_bits(dense, run(segment_heads, gaps, impl="triton"))


def test_one_gradient_may_stand_for_every_output(device):
    tensors = to_device(problem(2, 5, 24), device)
    ones = [torch.ones((), device=device).expand(tensor.shape) for tensor in tensors[6:]]
    dense = [one.contiguous() for one in ones]
    assert same_bits(*(run(segment_heads, tensors[:6] + given, impl="triton") for given in (ones, dense)))


def test_an_items_bits_do_not_depend_on_the_batch(device):
    tensors = to_device(problem(3, 7, 40, torch.bfloat16), device)
    together = run(segment_heads, tensors, impl="triton")
    for b in range(3):
        item = [t[b : b + 1] for t in tensors[:1]] + tensors[1:6] + [t[b : b + 1] for t in tensors[6:]]
        alone = run(segment_heads, item, impl="triton")
        assert all(torch.equal(alone[name][0], together[name][b]) for name in BY_ITEM)


def test_a_nan_reaches_its_row_only(device):
    tensors = to_device(problem(2, 5, 24), device)
    tensors[0][1, 2, 3] = math.nan
    found = run(segment_heads, tensors, impl="triton")
    for name in BY_ITEM:
        bad = found[name].isnan().reshape(2, 5, -1)
        # the gradient of x is spoilt by the direction and the length
        assert bad[1, 2].all(), name
        assert bad.sum() == bad[1, 2].numel(), name
    assert not found["doffsets"].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_axis_spoils_a_direction_as_in_the_reference(value, device):
    tensors = to_device(problem(1, 2, 8), device)
    tensors[2][3] = value
    directions = segment_heads(*tensors[:6], impl="triton")[1], segment_heads_reference(*tensors[:6])[1]
    torch.testing.assert_close(*directions, equal_nan=True)


def test_a_call_repeats_bit_for_bit(device):
    tensors = to_device(problem(35, 3, 40, torch.bfloat16), device)
    assert same_bits(run(segment_heads, tensors, impl="triton"), run(segment_heads, tensors, impl="triton"))


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=["B", "N"])
def test_a_size_of_zero_gives_zeros(sizes, device):
    found = run(segment_heads, to_device(problem(*sizes, 24), device), impl="triton")
    assert found["dx"].shape == (*sizes, 24)
    for name, shape in (("mid", (*sizes, 3)), ("dir", (*sizes, 3)), ("len", sizes), ("conf", sizes)):
        assert found[name].shape == shape
    for name, shape in (("dweight", (7, 24)), ("dbias", (7,)), ("doffsets", (sizes[1], 2, 3))):
        assert found[name].shape == shape
        assert not found[name].any()


def test_gradcheck_in_float64():
    inputs = [tensor.double().requires_grad_() for tensor in problem(2, 3, 4)[:6]]
    assert torch.autograd.gradcheck(segment_heads, inputs, fast_mode=True)


def test_registration_passes_opcheck(device):
    tensors = to_device(problem(2, 3, 16, torch.bfloat16), device)
    operators, inputs = torch.ops.ridgeline, tensors[:6]
    raw = operators.segment_heads_forward(*inputs)[-1]
    backward = (*tensors[6:], raw, tensors[0], tensors[1], tensors[3])
    torch.library.opcheck(operators.segment_heads_backward.default, backward)
    torch.library.opcheck(operators.segment_heads_forward.default, tuple(x.requires_grad_() for x in inputs))


def test_torch_compile_gives_the_bits_of_eager(device):
    tensors = to_device(problem(2, 3, 16), device)
    compiled = torch.compile(segment_heads, fullgraph=True, backend="aot_eager")
    assert same_bits(run(segment_heads, tensors, impl="triton"), run(compiled, tensors, impl="triton"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_BNC": torch.zeros(3, 16)}, r"x must be \[B, N, C\] with C in \[1, 1024\], got shape \(3, 16\)"),
        ({"x_BNC": torch.zeros(2, 3, 1025)}, r"x must be \[B, N, C\] with C in \[1, 1024\]"),
        ({"x_BNC": torch.zeros(2, 3, 0)}, r"x must be \[B, N, C\] with C in \[1, 1024\]"),
        ({"x_BNC": torch.zeros(2, 3, 16, dtype=torch.int32)}, "x must be float32, bfloat16, float16 or float64"),
        ({"weight_7C": torch.zeros(8, 16)}, r"weight must be \[7, 16\], got shape \(8, 16\)"),
        ({"bias_7": torch.zeros(8)}, r"bias must be \[7\], got shape \(8,\)"),
        ({"conf_weight_1C": torch.zeros(16)}, r"conf_weight must be \[1, 16\], got shape \(16,\)"),
        ({"conf_bias_1": torch.zeros(())}, r"conf_bias must be \[1\], got shape \(\)"),
        ({"offsets_N23": torch.zeros(4, 2, 3)}, r"offsets must be \[3, 2, 3\], got shape \(4, 2, 3\)"),
        ({"bias_7": torch.zeros(7, dtype=torch.int32)}, "bias must be float32, bfloat16, float16 or float64"),
        ({"bias_7": torch.zeros(7, device="meta")}, "bias must be on the device of x"),
        ({"impl": "fast"}, "impl must be one of"),
        ({"x_BNC": torch.zeros(2, 3, 16, dtype=torch.float64), "impl": "triton"}, "float64 must have impl='eager'"),
    ],
)
def test_bad_input_is_refused(changes, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ("x_BNC", "weight_7C", "bias_7", "conf_weight_1C", "conf_bias_1", "offsets_N23")
    with pytest.raises(ValueError, match=message):
        segment_heads(**dict(zip(names, problem(2, 3, 16)[:6], strict=True)) | changes)
