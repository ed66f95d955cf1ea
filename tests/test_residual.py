"""`residual_norm`: how exact it is, its masks, what may be left out, what is refused, how it is registered."""

import math

import pytest
import torch

from kernels.philox import dropout_keep
from kernels.reduce import JointSums
from kernels.residual import residual_norm, residual_norm_reference
from tests.accuracy import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("new", "normed", "copy", "dx", "dy", "dgain", "dbias")
DRAWS = {"rate": 0.3, "seed": 2**64 - 5, "step": 7, "place": 1030}


def problem(B, T, C, dtype=torch.float32, seed=0):
    """Return x, y, gain, bias, and upstream gradients of new, normed and copy."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, y, gain, bias = draw(B, T, C), draw(B, T, C).to(dtype), 1 + draw(C) / 4, draw(C)
    return [x, y, gain, bias, draw(B, T, C), *(draw(B, T, C).to(dtype) for _ in range(2))]


def scenes(B, device="cpu"):
    """Scene ids from both ends of 32 bits."""
    return torch.tensor([2**32 - 1 - 9 * b if b % 2 else b for b in range(B)], dtype=torch.int64, device=device)


def run(function, tensors, dtype=None, **options):
    """Return the outputs and the gradients of x, y, gain and bias; `dtype` is that of everything in float."""
    product = dtype or tensors[1].dtype
    x, y, gain, bias, *upstream = (tensor.to(dtype or tensor.dtype) for tensor in tensors)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, y, gain, bias)]
    outputs = function(*inputs[:3], bias_C=inputs[3], dtype=product, copy=True, **options)
    # copy is new itself where nothing is rounded
    return [output.detach() for output in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


def to_device(tensors, device):
    return [tensor.to(device) for tensor in tensors]


def same_bits(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def check_accuracy(tensors, device, impl="triton", **draws):
    on = {"scene_B": scenes(len(tensors[0]))} | draws
    truth = run(residual_norm_reference, tensors, torch.float64, **on)
    eager = run(residual_norm_reference, tensors, torch.float32, **on)
    place = "cpu" if impl == "eager" else device
    on["scene_B"] = on["scene_B"].to(place)
    actual = run(residual_norm, to_device(tensors, place), impl=impl, **on)
    for name, x, t, e in zip(NAMES, actual, truth, eager, strict=True):
        assert_accurate(x, truth=t, eager=e, name=name)


@pytest.mark.parametrize(
    "shape, dtype",
    [((3, 11, 256), dtype) for dtype in DTYPES]
    + [((2, 9, 13), dtype) for dtype in DTYPES]
    + [((2, 70, 16), DTYPES[0]), ((1, 3, 1), DTYPES[0]), ((2, 3, 1001), DTYPES[0]), ((1, 3, 1024), DTYPES[1])],
)
def test_outputs_and_gradients_are_as_close_to_float64_as_eager(shape, dtype, device):
    check_accuracy(problem(*shape, dtype), device, **DRAWS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_eager_form_is_as_exact(dtype, device):
    check_accuracy(problem(2, 5, 24, dtype), device, "eager", **DRAWS)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_small_and_large_rows_are_as_close_to_float64_as_eager(scale, device):
    x, y, *rest = problem(2, 5, 32)
    check_accuracy([x * scale, y * scale, *rest[:1], rest[1] * scale, *rest[2:]], device, **DRAWS)


@pytest.mark.parametrize("C", [256, 24, 8, 13, 1])
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_the_mask_is_that_of_dropout_keep_forward_and_backward(C, rate, device):
    B, T = 3, 7
    scene_B = scenes(B, device)
    y = torch.ones(B, T, C, device=device, requires_grad=True)
    draws = {"seed": 2**63 + 2**31 + 5, "step": 2**32 - 3, "scene_B": scene_B, "place": 1024 + 29}
    new = residual_norm(torch.zeros_like(y), y, rate=rate, impl="triton", **draws).new_BTC
    keep = dropout_keep((B, T, C), rate, **draws)
    assert torch.equal(new != 0, keep)
    assert torch.equal(torch.autograd.grad(new.sum(), y)[0] != 0, keep)
    torch.testing.assert_close(new[keep], torch.full_like(new[keep], 1 / (1 - rate)))


def test_rate_zero_draws_nothing_and_keeps_all(device):
    tensors = to_device(problem(2, 5, 24), device)
    plain = run(residual_norm, tensors, impl="triton")
    with_counters = run(residual_norm, tensors, impl="triton", **DRAWS | {"rate": 0.0, "scene_B": scenes(2, device)})
    assert same_bits(plain, with_counters)
    x, y, _, bias, *_ = tensors
    torch.testing.assert_close(plain[0], x + (y + bias), rtol=0, atol=0)


def test_a_step_in_a_tensor_is_that_step(device):
    tensors = to_device(problem(2, 5, 24, torch.bfloat16), device)
    draws = DRAWS | {"scene_B": scenes(2, device), "impl": "triton"}
    step = torch.tensor(7, device=device)
    plain = run(residual_norm, tensors, **draws)
    assert same_bits(plain, run(residual_norm, tensors, **draws | {"step": step}))
    # as a graph of launches sees it: the same tensor, another value
    step.add_(1)
    assert not same_bits(plain, run(residual_norm, tensors, **draws | {"step": step}))


def test_without_a_branch_the_stream_itself_is_normalised(device):
    x, _, gain, *_ = to_device(problem(2, 5, 24), device)
    new, normed, copy = residual_norm(x, None, gain, dtype=torch.bfloat16, copy=True, impl="triton")
    assert new is x
    assert torch.equal(copy, x.bfloat16())
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (24,), gain, 2**-23).bfloat16())


def test_without_a_branch_the_gradients_are_those_of_the_reference(device):
    x, _, gain, _, *upstream = to_device(problem(2, 5, 24, torch.bfloat16), device)
    results = []
    for function, options in ((residual_norm_reference, {}), (residual_norm, {"impl": "triton"})):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, gain)]
        outputs = function(inputs[0], None, inputs[1], dtype=torch.bfloat16, copy=True, **options)
        results.append(torch.autograd.grad(outputs[1:], inputs, upstream[1:]))
    torch.testing.assert_close(*results)


def test_what_is_not_asked_for_is_none(device):
    x, y, gain, *_ = to_device(problem(2, 5, 24), device)
    for impl in ("eager", "triton"):
        last = residual_norm(x, y, impl=impl)
        assert last.normed_BTC is None
        assert last.copy_BTC is None
        assert residual_norm(x, None, gain, impl=impl).copy_BTC is None
        assert torch.equal(residual_norm(x, y, copy=True, impl=impl).copy_BTC, last.new_BTC)
        assert residual_norm(x, impl=impl).new_BTC is x


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_outputs_are_those_of_the_reference(used, device):
    tensors = to_device(problem(2, 5, 24, torch.bfloat16), device)
    results = []
    for function, options in ((residual_norm_reference, {}), (residual_norm, {"impl": "triton"})):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors[:4]]
        options |= DRAWS | {"scene_B": scenes(2, device), "bias_C": inputs[3]}
        outputs = function(*inputs[:3], dtype=torch.bfloat16, copy=True, **options)
        upstream = [tensors[4 + i] for i in used]
        results.append(torch.autograd.grad([outputs[i] for i in used], inputs, upstream, allow_unused=True))
    torch.testing.assert_close(*results)


def test_one_row_may_stand_for_every_item(device):
    x, *rest = to_device(problem(3, 5, 24), device)
    expanded = x[:1].expand(3, -1, -1)
    options = DRAWS | {"scene_B": scenes(3, device), "impl": "triton"}
    expected = run(residual_norm, [expanded.contiguous(), *rest], **options)
    y, gain, bias, *upstream = rest
    inputs = [tensor.clone().requires_grad_() for tensor in (x[:1], y, gain, bias)]
    outputs = residual_norm(inputs[0].expand(3, -1, -1), *inputs[1:3], bias_C=inputs[3], copy=True, **options)
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    assert same_bits([*outputs, *gradients[1:]], [*expected[:3], *expected[4:]])
    torch.testing.assert_close(gradients[0], expected[3].sum(0, keepdim=True))


def test_strides_change_no_bits(device):
    tensors = to_device(problem(2, 5, 24, torch.bfloat16), device)
    options = DRAWS | {"scene_B": scenes(2, device), "impl": "triton"}
    dense = run(residual_norm, tensors, **options)
    for move in (
        lambda t: t.mT.contiguous().mT if t.dim() == 3 else t,
        lambda t: torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0],
    ):
        moved = [move(tensor) for tensor in tensors]
        outputs = residual_norm(*moved[:3], bias_C=moved[3], dtype=torch.bfloat16, copy=True, **options)
        assert same_bits(outputs, dense[:3])
    assert same_bits(
        dense,
        run(
            residual_norm, [tensor.mT.contiguous().mT if tensor.dim() == 3 else tensor for tensor in tensors], **options
        ),
    )


@pytest.mark.parametrize("case", ["every other", "one for all"])
def test_strides_of_the_scenes_change_no_bits(case, device):
    tensors = to_device(problem(3, 5, 24), device)
    scene_B = scenes(3, device).repeat_interleave(2)[::2] if case == "every other" else scenes(1, device).expand(3)
    strided, dense = (
        run(residual_norm, tensors, impl="triton", **DRAWS, scene_B=scene) for scene in (scene_B, scene_B.contiguous())
    )
    assert same_bits(strided, dense)


def test_an_items_bits_do_not_depend_on_the_batch(device):
    tensors = to_device(problem(3, 7, 40, torch.bfloat16), device)
    scene_B = scenes(3, device)
    together = run(residual_norm, tensors, impl="triton", **DRAWS, scene_B=scene_B)
    for b in range(3):
        item = [tensor[b : b + 1] if tensor.dim() == 3 else tensor for tensor in tensors]
        alone = run(residual_norm, item, impl="triton", **DRAWS, scene_B=scene_B[b : b + 1])
        assert same_bits([x[0] for x in alone[:5]], [x[b] for x in together[:5]])


def test_a_nan_reaches_its_row_only(device):
    tensors = to_device(problem(2, 5, 24), device)
    tensors[1][1, 2, 3] = math.nan
    outputs = run(residual_norm, tensors, impl="triton")
    for x in outputs[:5]:
        bad = x.isnan().any(-1)
        assert bad.sum() <= 1
        assert not bad[0].any()
    assert outputs[1][1, 2].isnan().all()


def test_a_call_repeats_bit_for_bit(device):
    tensors = to_device(problem(2, 70, 24, torch.bfloat16), device)
    options = DRAWS | {"scene_B": scenes(2, device), "impl": "triton"}
    assert same_bits(run(residual_norm, tensors, **options), run(residual_norm, tensors, **options))


@pytest.mark.parametrize("missing", ["nothing", "gain", "bias"])
@pytest.mark.parametrize("shape", [(3, 11, 256), (2, 9, 13), (0, 3, 8)])
def test_gradients_added_up_with_others_have_the_bits_of_those_alone(shape, missing, device):
    x, y, gain, bias, *upstream = to_device(problem(*shape), device)

    def differentiate(joint):
        leaves = {"x": x, "y": y, "gain": gain, "bias": bias}
        leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if name != missing}
        sums = JointSums([leaves[name] for name in ("gain", "bias") if name in leaves]) if joint else None
        outputs = residual_norm(
            leaves["x"], leaves["y"], leaves.get("gain"), bias_C=leaves.get("bias"), copy=True, sums=sums,
            impl="triton", **DRAWS, scene_B=scenes(len(x), device),
        )  # fmt: skip
        pairs = [(out, up) for out, up in zip(outputs, upstream, strict=True) if out is not None]
        return torch.autograd.grad([out for out, _ in pairs], list(leaves.values()), [up for _, up in pairs])

    assert same_bits(differentiate(joint=True), differentiate(joint=False))


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=["B", "T"])
def test_a_size_of_zero_gives_zeros(sizes, device):
    outputs = run(residual_norm, to_device(problem(*sizes, 24), device), impl="triton")
    assert outputs[0].shape == (*sizes, 24)
    assert all(not x.any() for x in outputs)
    assert outputs[-1].shape == (24,)


def test_gradcheck_in_float64():
    inputs = [tensor.double().requires_grad_() for tensor in problem(2, 3, 4)[:4]]

    def outputs(x, y, gain, bias):
        return residual_norm(x, y, gain, bias_C=bias, copy=True, **DRAWS, scene_B=scenes(2))

    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["all", "first", "last", "no dropout"])
def test_registration_passes_opcheck(case, device):
    x, y, gain, bias, dnew, dnormed, dcopy = to_device(problem(2, 3, 16, torch.bfloat16), device)
    step, scene_B, rate = torch.full((1,), 7, device=device), scenes(2, device), 0.3
    copy = case != "last"
    if case == "first":
        y = bias = dnew = None
    if case == "last":
        gain = dnormed = dcopy = None
    if case in ("first", "no dropout"):
        step, scene_B, rate = None, None, 0.0
    key, operators = (rate, -3, 1030), torch.ops.ridgeline
    inputs = [None if tensor is None else tensor.requires_grad_() for tensor in (x, y, gain, bias)]
    forward = (*inputs, step, scene_B, *key, torch.bfloat16, copy, 2**-23)
    torch.library.opcheck(operators.residual_norm_forward.default, forward)
    x, gain = x.detach(), None if gain is None else gain.detach()
    new, _, _, r = (tensor.detach() for tensor in operators.residual_norm_forward(*forward))
    backward = (dnew, dnormed, dcopy, x if y is None else new, r, gain, step, scene_B, *key)
    y_dtype = None if y is None else torch.bfloat16
    torch.library.opcheck(operators.residual_norm_backward.default, (*backward, y_dtype, bias is not None))


def test_torch_compile_gives_the_bits_of_eager(device):
    tensors = to_device(problem(2, 3, 16, torch.bfloat16), device)
    options = DRAWS | {"scene_B": scenes(2, device), "impl": "triton"}
    compiled = torch.compile(residual_norm, fullgraph=True, backend="aot_eager")
    assert same_bits(run(residual_norm, tensors, **options), run(compiled, tensors, **options))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_BTC": torch.zeros(5, 16)}, r"x must be \[B, T, C\] with C in \[1, 1024\], got shape \(5, 16\)"),
        ({"x_BTC": torch.zeros(2, 5, 1025)}, r"x must be \[B, T, C\] with C in \[1, 1024\]"),
        ({"x_BTC": torch.zeros(2, 5, 16, dtype=torch.bfloat16)}, "x must be float32 or float64"),
        ({"y_BTC": torch.zeros(2, 5, 8)}, "y must have the shape of x"),
        ({"y_BTC": torch.zeros(2, 5, 16, dtype=torch.int32)}, "y must be float32, bfloat16 or float16"),
        ({"y_BTC": torch.zeros(2, 5, 16, device="meta")}, "y must be on the device of x"),
        ({"gain_C": torch.zeros(8)}, r"gain must be \[16\]"),
        ({"bias_C": torch.zeros(2, 16)}, r"bias must be \[16\]"),
        ({"y_BTC": None}, "bias must have a y"),
        ({"dtype": torch.int32}, "dtype must be float32"),
        ({"rate": 1.0}, r"rate must be in \[0, 1\), got 1.0"),
        ({"rate": math.nan}, r"rate must be in \[0, 1\)"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\^64\)"),
        ({"seed": 2**64}, r"seed must be an int in \[0, 2\^64\)"),
        ({"scene_B": None}, "scene must be given where rate is not 0"),
        ({"scene_B": torch.zeros(3, dtype=torch.int64)}, "scene must be 2 of int64"),
        ({"scene_B": torch.zeros(2)}, "scene must be 2 of int64"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, "step must be 1 of int64"),
        ({"step": torch.zeros((), dtype=torch.int32)}, "step must be 1 of int64"),
        ({"step": -1}, r"step must be an int in \[0, 2\^32\), got -1"),
        ({"step": 1.5}, r"step must be an int in \[0, 2\^32\), got 1.5"),
        ({"place": 2**32}, r"place must be an int in \[0, 2\^32\), got 4294967296"),
        ({"scene_B": torch.tensor([-1, 0])}, r"scene must be in \[0, 2\^32\), got -1 to 0"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"eps": math.nan}, "eps must be positive and finite, got nan"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_bad_input_is_refused(changes, message):
    x, y, gain, bias, *_ = problem(2, 5, 16)
    arguments = {"x_BTC": x, "y_BTC": y, "gain_C": gain, "bias_C": bias, "scene_B": scenes(2), **DRAWS}
    with pytest.raises(ValueError, match=message):
        residual_norm(**arguments | changes)


def test_float64_has_no_kernel(device):
    with pytest.raises(ValueError, match="float64 must have impl='eager'"):
        residual_norm(torch.zeros(2, 5, 16, dtype=torch.float64, device=device), impl="triton")
