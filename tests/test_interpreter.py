"""The interpreter computes bfloat16 as hardware does, and finds every planted fault."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the kernels run compiled")

SIZE = 64


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "less":
        out = (x < y).to(tl.bfloat16)
    elif OP == "fma":
        out = tl.fma(x, y, y)
    elif OP == "clamp":
        out = tl.clamp(x, -1.0, 1.0)
    elif OP == "constant":
        out = x + tl.full((SIZE,), 1.5, tl.bfloat16)
    elif OP == "sum":
        out = tl.zeros((SIZE,), tl.float32) + tl.sum(x.to(tl.float32), axis=0)
    elif OP == "max":
        out = tl.zeros((SIZE,), tl.float32) + tl.max(x, axis=0)
    tl.store(out_ptr + offs, out)


BFLOAT16_OPS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "where": torch.minimum,
    "less": lambda x, y: (x < y).bfloat16(),
    "fma": lambda x, y: (x.double() * y.double() + y.double()).bfloat16(),
    "clamp": lambda x, y: x.clamp(-1, 1),
    "constant": lambda x, y: x + 1.5,
    "max": lambda x, y: x.max().expand(SIZE),
}


def _binary(op: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, SIZE, generator=generator).bfloat16()
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OP=op, SIZE=SIZE)
    return out, BFLOAT16_OPS[op](x, y)


@pytest.mark.parametrize("op", BFLOAT16_OPS)
def test_bfloat16_operations_give_the_bits_of_torch(op):
    actual, expected = _binary(op)
    assert torch.equal(actual, expected)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, ROUNDING: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def _special_values(dtype: torch.dtype) -> torch.Tensor:
    ties_and_carries = [1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-8, 2 - 2**-9, -1.00390625, 65280.0, 0.0, -0.0, 1e-30, 200.7]
    return torch.tensor(ties_and_carries * 6 + [3.39e38, torch.inf, -torch.inf, torch.nan], dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("rounding", [None, "rtne"])
def test_float32_rounds_to_the_nearest_even_bfloat16(rounding):
    x = _special_values(torch.float32)
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, SIZE=SIZE, ROUNDING=rounding)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[:-1].signbit(), x[:-1].signbit())


@pytest.mark.parametrize("source", [torch.float16, torch.int32])
def test_other_types_become_bfloat16_and_come_back(source):
    x = _special_values(torch.float64).nan_to_num(7.0, 300.0, -300.0).clamp(-300, 300).to(source)
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, SIZE=SIZE, ROUNDING=None)
    assert torch.equal(out, x.bfloat16())
    back = torch.empty(SIZE, dtype=source)
    _cast_kernel[(1,)](out, back, SIZE=SIZE, ROUNDING=None)
    assert torch.equal(back, out.to(source))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile)))


def test_a_bfloat16_dot_accumulates_products_in_float32():
    x, y = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, out, SIZE=16)
    torch.testing.assert_close(out, x.float() @ y.float())


@triton.jit
def _loop_kernel(out_ptr, count_ptr, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(tl.load(count_ptr)):
        total += step
    tl.store(out_ptr + tl.arange(0, SIZE), total)


def test_a_loop_runs_to_a_bound_read_from_memory():
    out = torch.empty(4)
    _loop_kernel[(1,)](out, torch.tensor([5]), SIZE=4)
    assert out.tolist() == [10.0] * 4


@triton.jit
def _digits_and_sum(x, y, other_x, other_y):
    return x * 2 + other_x, y + other_y


@triton.jit
def _combine_kernel(x_ptr, out_ptr, sums_ptr, AXIS: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + rows * SIZE + columns)
    digits, sums = tl.reduce((x, x.to(tl.float32)), AXIS, _digits_and_sum, keep_dims=True)
    offs = rows if AXIS == 1 else columns
    tl.store(out_ptr + offs, digits)
    tl.store(sums_ptr + offs, sums)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_combines_in_the_order_of_the_elements(axis):
    """The first operand is read as binary digits, the second summed."""
    x = torch.randint(2, (8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    digits, sums = torch.empty(8, dtype=torch.int32), torch.empty(8)
    _combine_kernel[(1,)](x, digits, sums, AXIS=axis, SIZE=8)
    places = 2 ** torch.arange(7, -1, -1, dtype=torch.int32)
    assert torch.equal(digits, (x * places.unsqueeze(1 - axis)).sum(axis, dtype=torch.int32))
    assert torch.equal(sums, x.sum(axis).float())


def test_maximum_and_max_ignore_nan_and_nothing_warns():
    x = torch.full((SIZE,), torch.nan).bfloat16()
    y = torch.ones(SIZE).bfloat16()
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OP="maximum", SIZE=SIZE)
    assert torch.equal(out, y)
    _binary_kernel[(1,)](x, y, out, OP="max", SIZE=SIZE)
    assert out.isnan().all()


def test_without_the_fixes_bfloat16_is_wrong():
    code = (
        "from tests.test_interpreter import BFLOAT16_OPS, is_wrong; print(*(op for op in BFLOAT16_OPS if is_wrong(op)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    wrong = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True).stdout.split()
    assert {"add", "sub", "mul", "where", "less", "fma"} <= set(wrong)


def is_wrong(op: str) -> bool:
    """Whether an operation gives other bits than torch, or none at all."""
    try:
        actual, expected = _binary(op)
    except Exception:
        return True
    return not torch.equal(actual, expected)


@triton.jit
def _fault_kernel(x_ptr, out_ptr, shared_ptr, FAULT: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, SIZE)
    offs = program * SIZE + lanes
    x = tl.load(x_ptr + offs)
    if FAULT == "load behind the end":
        x += tl.load(x_ptr + offs + SIZE)
    elif FAULT == "load before the start":
        x += tl.load(x_ptr + offs - SIZE)
    elif FAULT == "store behind the end":
        tl.store(out_ptr + offs + SIZE, x)
    elif FAULT == "two programs store":
        tl.store(shared_ptr, program)
    elif FAULT == "two programs store the same value":
        tl.store(shared_ptr, 1)
    elif FAULT == "two lanes store":
        tl.store(shared_ptr + lanes // 2, x)
    elif FAULT == "read after a foreign store":
        tl.store(shared_ptr + program + 1, program)
        x += tl.load(shared_ptr + program)
    elif FAULT == "store after a foreign read":
        x += tl.load(shared_ptr + program + 1)
        tl.store(shared_ptr + program, program)
    elif FAULT == "store after two foreign reads":
        x += tl.load(shared_ptr)
        if program == 1:
            tl.store(shared_ptr, 1)
    elif FAULT == "no barrier":
        tl.store(out_ptr + offs, x)
        x += tl.load(out_ptr + (program + 1) * SIZE - 1 - lanes)
    elif FAULT == "device assert":
        tl.device_assert(x < 0, "x must be negative")
    elif FAULT == "atomic":
        tl.atomic_add(shared_ptr, 1)
    elif FAULT == "misaligned":
        x += tl.load((x_ptr.to(tl.int64) + 2).to(tl.pointer_type(tl.float32)))
    elif FAULT == "barrier":
        tl.store(out_ptr + offs, x)
        tl.debug_barrier()
        x = tl.load(out_ptr + (program + 1) * SIZE - 1 - lanes)
        tl.debug_barrier()
    tl.store(out_ptr + offs, x)


def _plant(fault: str) -> torch.Tensor:
    out = torch.empty(2 * SIZE)
    _fault_kernel[(2,)](torch.arange(2.0 * SIZE), out, torch.zeros(SIZE), FAULT=fault, SIZE=SIZE)
    return out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load behind the end", r"out of bounds: program \(1, 0, 0\) loads 64 of 64 lanes outside x_ptr"),
        ("load before the start", r"out of bounds: program \(0, 0, 0\) loads 64 of 64"),
        ("store behind the end", r"out of bounds: program \(1, 0, 0\) stores 64 of 64 lanes"),
        ("two programs store", r"race: program \(1, 0, 0\) stores where program \(0, 0, 0\) stored, in shared_ptr"),
        ("two programs store the same value", r"race: .*stores where program \(0, 0, 0\) stored"),
        ("two lanes store", r"race: .*two lanes of one store"),
        ("read after a foreign store", r"race: program \(1, 0, 0\) reads what program \(0, 0, 0\) stored"),
        ("store after a foreign read", r"race: program \(1, 0, 0\) stores what another program read"),
        ("store after two foreign reads", r"race: .*stores what another program read"),
        ("no barrier", r"race: .*reads what it stored itself"),
        ("device assert", "x must be negative"),
        ("atomic", "atomic operations are not allowed"),
        ("misaligned", "misaligned: program"),
    ],
)
def test_a_planted_fault_is_found(fault, message):
    with pytest.raises(Exception, match=message):
        _plant(fault)


def test_what_is_right_passes():
    assert torch.equal(_plant("nothing"), torch.arange(2.0 * SIZE))
    assert torch.equal(_plant("barrier"), torch.arange(2.0 * SIZE).view(2, SIZE).flip(1).reshape(-1))


@triton.jit
def _strided_kernel(x_ptr, out_ptr, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs_row = tl.arange(0, ROWS)
    offs_column = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + offs_row[:, None] * stride_row + offs_column[None, :] * stride_column)
    tl.store(out_ptr + offs_row[:, None] * COLUMNS + offs_column[None, :], x)


def test_the_gaps_of_a_strided_view_are_out_of_bounds():
    x = torch.arange(64.0).view(8, 8)[:4, 1:8:2]
    out = torch.empty(4, 4)
    _strided_kernel[(1,)](x, out, *x.stride(), ROWS=4, COLUMNS=4)
    assert torch.equal(out, x)
    with pytest.raises(Exception, match=r"out of bounds: .* in a gap of x_ptr"):
        _strided_kernel[(1,)](x, out, x.stride(0), 1, ROWS=4, COLUMNS=4)
    with pytest.raises(Exception, match=r"out of bounds: .* outside x_ptr"):
        _strided_kernel[(1,)](x, out, x.stride(0) + 8, 2, ROWS=4, COLUMNS=4)


def test_interleaved_views_of_one_storage_are_one_region():
    storage = torch.zeros(4, 8)
    storage[:, :4] = torch.arange(16.0).view(4, 4)
    x, out = storage[:, :4], storage[:, 4:]
    _copy_kernel[(2,)](x, out, x.stride(0), SIZE=4)
    assert torch.equal(x, out)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, stride, SIZE: tl.constexpr):
    rows = tl.program_id(0) * 2 + tl.arange(0, 2)
    tile = rows[:, None] * stride + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + tile, tl.load(x_ptr + tile))


def test_empty_tensors_hold_no_element():
    with pytest.raises(Exception, match="outside x_ptr"):
        _copy_kernel[(1,)](torch.empty(0), torch.empty(0), 4, SIZE=4)


@pytest.mark.parametrize(
    ("dtype", "poison"), [(torch.float32, np.nan), (torch.bfloat16, np.nan), (torch.int32, 2**31 - 1)]
)
def test_memory_nobody_wrote_is_poisoned(dtype, poison):
    memory = torch.empty(100, dtype=dtype)
    assert torch.equal(memory.nan_to_num(0.5), torch.full_like(memory, poison).nan_to_num(0.5))
