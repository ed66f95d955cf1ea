"""`bias_gelu`: how exact it is, what is refused, how it is registered."""

import math

import pytest
import torch
from torch.nn import functional

from kernels.gelu import bias_gelu, bias_gelu_reference
from kernels.gelu_tile import gelu, gelu_slope, normal_cdf
from kernels.reduce import JointSums
from tests.accuracy import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("y", "dx", "dbias")


def problem(B, T, C, dtype=torch.float32, scale=1.0):
    """Return x, bias and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    x, bias, dy = (torch.randn(*shape, generator=generator) for shape in ((B, T, C), (C,), (B, T, C)))
    return [(scale * x).to(dtype), bias, dy.to(dtype)]


def run(function, tensors, dtype=None, **options):
    x, bias, dy = (tensor.to(dtype or tensor.dtype) for tensor in tensors)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, bias)]
    y = function(*inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def to_device(tensors, device):
    return [tensor.to(device) for tensor in tensors]


def same_bits(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def check_accuracy(tensors, device, impl="triton"):
    truth, eager = (run(bias_gelu_reference, tensors, dtype) for dtype in (torch.float64, torch.float32))
    actual = run(bias_gelu, to_device(tensors, "cpu" if impl == "eager" else device), impl=impl)
    for name, x, t, e in zip(NAMES, actual, truth, eager, strict=True):
        assert_accurate(x, truth=t, eager=e, name=name)


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 20, 64), dtype) for dtype in DTYPES]
    + [((2, 5, 300), DTYPES[0]), ((1, 2, 1), DTYPES[0]), ((1, 1, 4096), DTYPES[1])],
)
def test_output_and_gradients_are_as_close_to_float64_as_eager(shape, dtype, device):
    check_accuracy(problem(*shape, dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_eager_form_is_as_exact(dtype, device):
    check_accuracy(problem(2, 5, 24, dtype), device, "eager")


@pytest.mark.parametrize("scale", [1e-4, 5.0, 1e4])
def test_both_tails_are_as_close_to_float64_as_eager(scale, device):
    check_accuracy(problem(2, 5, 64, scale=scale), device)


@pytest.mark.parametrize("value", [-3.0, -0.54, 0.54, 1.9])
def test_the_gradient_of_the_bias_is_exact_where_all_rows_err_alike(value, device):
    x, bias, dy = problem(1, 40, 8, torch.bfloat16)
    check_accuracy([torch.full_like(x, value), torch.zeros_like(bias), torch.ones_like(dy)], device)


@pytest.mark.parametrize("shape", [(2, 20, 64), (2, 5, 300), (0, 3, 8)])
def test_a_gradient_added_up_with_others_has_the_bits_of_one_alone(shape, device):
    x, bias, dy = to_device(problem(*shape, torch.bfloat16), device)

    def differentiate(joint):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, bias)]
        y = bias_gelu(*inputs, impl="triton", sums=JointSums([inputs[1]]) if joint else None)
        return torch.autograd.grad(y, inputs, dy)

    assert same_bits(differentiate(joint=True), differentiate(joint=False))


# PyTorch's own, while it traces an autograd function
@pytest.mark.filterwarnings("ignore:.* should not be instantiated")
def test_compiled_operators_add_up_each_gradient_alone(device):
    x, bias, dy = to_device(problem(2, 20, 8), device)

    def twice(x, first, second):
        sums = JointSums([first, second])
        return bias_gelu(bias_gelu(x, first, impl="triton", sums=sums), second, impl="triton", sums=sums)

    def differentiate(function):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, bias, bias)]
        return torch.autograd.grad(function(*inputs), inputs, dy)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert same_bits(differentiate(compiled), differentiate(twice))


def test_inside_a_kernel_gelu_is_the_exact_one_and_so_is_its_slope(device):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, product_ptr, slope_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
        offs = tl.arange(0, SIZE)
        x = tl.load(x_ptr + offs)
        tl.store(y_ptr + offs, gelu(x, PRECISION))
        tl.store(product_ptr + offs, x * normal_cdf(x, PRECISION))
        tl.store(slope_ptr + offs, gelu_slope(x, PRECISION))

    ends = torch.tensor([-3e38, -1e20, -1e4, -50.0, -0.0, 0.0, 1e-30, 50.0, 1e4, 1e20, 3e38, math.nan])
    x = torch.cat([torch.linspace(-12, 12, 8180), ends])
    x_64 = x.double().requires_grad_()
    y_64 = functional.gelu(x_64)
    slope_64 = torch.autograd.grad(y_64.sum(), x_64)[0]
    for precision, tolerances in (("ieee", [1.2e-7] * 3), ("tf32", [1e-6, 1e-6, 1.1e-5])):
        results = [torch.empty_like(x, device=device) for _ in range(3)]
        kernel[(1,)](x.to(device), *results, PRECISION=precision, SIZE=8192)
        for found, truth, tolerance in zip(results, (y_64, y_64, slope_64), tolerances, strict=True):
            error = (found.cpu() - truth).abs() / truth.abs().clamp(min=1)
            assert error[:-1].max() <= tolerance, precision
            assert error[-1].isnan()


def test_infinity_stays_and_minus_infinity_is_what_torch_makes_of_it(device):
    x = torch.tensor([[[math.inf, math.nan, 1.0, -1e30]]], device=device)
    y = bias_gelu(x, torch.zeros(4, device=device), impl="triton")[0, 0]
    assert y[0] == math.inf
    assert y[1].isnan()
    assert y[3] == 0


def test_strides_change_no_bits(device):
    tensors = to_device(problem(2, 5, 24), device)
    moved = [tensor.mT.contiguous().mT if tensor.dim() == 3 else tensor for tensor in tensors]
    gaps = [torch.stack([tensor, torch.full_like(tensor, math.nan)], 1)[:, 0] for tensor in tensors]
    dense = run(bias_gelu, tensors, impl="triton")
    assert same_bits(dense, run(bias_gelu, moved, impl="triton"))
    assert torch.equal(bias_gelu(*gaps[:2], impl="triton"), dense[0])


def test_an_items_bits_do_not_depend_on_the_batch(device):
    x, bias, dy = to_device(problem(3, 7, 40, torch.bfloat16), device)
    together = run(bias_gelu, [x, bias, dy], impl="triton")
    for b in range(3):
        alone = run(bias_gelu, [x[b : b + 1], bias, dy[b : b + 1]], impl="triton")
        assert same_bits([t[0] for t in alone[:2]], [t[b] for t in together[:2]])


def test_a_call_repeats_bit_for_bit(device):
    tensors = to_device(problem(2, 40, 300, torch.bfloat16), device)
    assert same_bits(run(bias_gelu, tensors, impl="triton"), run(bias_gelu, tensors, impl="triton"))


def test_an_infinite_bias_spoils_its_own_gradient_only(device):
    x, bias, dy = to_device(problem(1, 3, 8), device)
    bias[2] = -math.inf
    dbias = run(bias_gelu, [x, bias, dy], impl="triton")[2]
    assert dbias.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("sizes", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=["B", "T", "C"])
def test_a_size_of_zero_gives_zeros(sizes, device):
    y, dx, dbias = run(bias_gelu, to_device(problem(*sizes), device), impl="triton")
    assert y.shape == dx.shape == sizes
    assert not dbias.any()


def test_gradcheck_in_float64():
    inputs = [tensor.double().requires_grad_() for tensor in problem(2, 3, 4)[:2]]
    assert torch.autograd.gradcheck(bias_gelu, inputs, fast_mode=True)


def test_registration_passes_opcheck(device):
    x, bias, dy = to_device(problem(2, 3, 16, torch.bfloat16), device)
    operators = torch.ops.ridgeline
    torch.library.opcheck(operators.bias_gelu_backward.default, (dy, x, bias))
    torch.library.opcheck(operators.bias_gelu_forward.default, (x.requires_grad_(), bias.requires_grad_()))


def test_torch_compile_gives_the_bits_of_eager(device):
    tensors = to_device(problem(2, 3, 16), device)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    assert same_bits(run(bias_gelu, tensors, impl="triton"), run(compiled, tensors, impl="triton"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_BTC": torch.zeros(3, 16)}, r"x must be \[B, T, C\], got shape \(3, 16\)"),
        ({"x_BTC": torch.zeros(2, 3, 16, dtype=torch.int32)}, "x must be float32, bfloat16, float16 or float64"),
        ({"bias_C": torch.zeros(8)}, r"bias must be \[16\], got shape \(8,\)"),
        ({"bias_C": torch.zeros(16, dtype=torch.int32)}, "bias must be float32, bfloat16, float16 or float64"),
        ({"bias_C": torch.zeros(16, device="meta")}, "bias must be on the device of x"),
        ({"impl": "fast"}, "impl must be one of"),
        ({"x_BTC": torch.zeros(2, 3, 16, dtype=torch.float64), "impl": "triton"}, "float64 must have impl='eager'"),
    ],
)
def test_bad_input_is_refused(changes, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, bias, _ = problem(2, 3, 16)
    with pytest.raises(ValueError, match=message):
        bias_gelu(**{"x_BTC": x, "bias_C": bias} | changes)
