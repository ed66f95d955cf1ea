"""`gather_rows`: the bytes of the rows, whatever a row consists of; what is clamped and what is refused."""

import pytest
import torch

from kernels import gather
from kernels.gather import BLOCK, MOST, gather_rows, gather_rows_reference

ROWS = 5
INDEX = [3, 0, 4, 3]


def held(rows=ROWS) -> list[torch.Tensor]:
    """Tensors whose rows consist of several blocks, and of every width of word: 8, 8, 4, 2, 1, 8, 2, 8 bytes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        torch.float32: (BLOCK, 2, 2),
        torch.float64: (),
        torch.int32: (),
        torch.bfloat16: (3,),
        torch.uint8: (7,),
        torch.bool: (2, 4),
        torch.int16: (1,),
        torch.complex64: (2,),
    }
    return [
        torch.randint(256, (rows, *shape, dtype.itemsize), generator=generator).byte().view(dtype).view(rows, *shape)
        if dtype != torch.bool
        else torch.randint(2, (rows, *shape), generator=generator).bool()
        for dtype, shape in shapes.items()
    ]


def run(tensors, index, device="cpu", *, impl="triton"):
    return gather_rows([x.to(device) for x in tensors], torch.as_tensor(index).to(device), impl=impl)


def same_bytes(left, right) -> bool:
    return all(
        (x.shape, x.dtype) == (y.shape, y.dtype)
        and torch.equal(*(z.cpu().contiguous().view(-1).view(torch.uint8) for z in (x, y)))
        for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_rows_keep_their_bytes_whatever_they_mean(impl, device):
    tensors = held()
    assert same_bytes(run(tensors, INDEX, device, impl=impl), [torch.stack([x[i] for i in INDEX]) for x in tensors])


def test_a_row_does_not_depend_on_the_others(device):
    together = run(held(), INDEX, device)
    for b, i in enumerate(INDEX):
        assert same_bytes(run(held(), [i], device), [x[b : b + 1] for x in together])


@pytest.mark.parametrize(("start", "offset"), [(0, 1), (0, 2), (0, 4), (0, 8), (1, 0), (1, 7)])
def test_words_begin_where_memory_lets_them(start, offset, device):
    # the memory of a tensor that shares an array's begins where the array does
    memory = torch.from_numpy(torch.arange(64).byte().numpy()[start:]).to(device)
    rows = memory[offset : offset + 48].view(3, 16)
    (found,) = run([rows], [2, 0], device)
    assert torch.equal(found, rows[[2, 0]])


def test_the_strides_of_the_index_do_not_matter(device):
    index = torch.tensor([[3, 9], [0, 9], [4, 9]]).to(device)[:, 0]
    assert same_bytes(run(held(), index, device), run(held(), [3, 0, 4], device))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_nothing_to_copy_is_copied(impl, device):
    none = torch.zeros(0, dtype=torch.int64)
    assert [x.shape for x in run(held(), none, device, impl=impl)] == [(0, *x.shape[1:]) for x in held()]
    assert [x.shape for x in run(held(rows=0), none, device, impl=impl)] == [(0, *x.shape[1:]) for x in held()]
    empty, full = run([torch.zeros(ROWS, 0, 3), torch.arange(ROWS)], INDEX, device, impl=impl)
    assert (empty.shape, full.tolist()) == ((len(INDEX), 0, 3), INDEX)
    assert run([torch.zeros(ROWS, 0)], INDEX, device, impl=impl)[0].shape == (len(INDEX), 0)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_row_that_is_not_there_is_the_nearest_where_values_are_not_read(impl, device, monkeypatch):
    monkeypatch.setattr(gather, "values_are_readable", lambda tensor: False)
    found = run(held(), [-1, ROWS, -(2**40), 2**40], device, impl=impl)
    assert same_bytes(found, gather_rows_reference(held(), torch.tensor([0, ROWS - 1, 0, ROWS - 1])))


@pytest.mark.parametrize(("index", "wrong"), [([0, -1], "-1"), ([ROWS, 0], str(ROWS))])
def test_a_row_that_is_not_there_is_refused_where_values_are_read(index, wrong, device, monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=rf"index must be in \[0, {ROWS}\), got {wrong}$"):
        run(held(), index, device)


@pytest.mark.gpu
def test_rows_beyond_the_reach_of_32_bits():
    rows, width = 5, 2**29 + 1
    tensor = torch.arange(rows, device="cuda").byte()[:, None].repeat(1, width)
    (found,) = gather_rows([tensor], torch.tensor([0, 1, 2, 3, 4], device="cuda").flip(0))
    assert torch.equal(found, tensor.flip(0))


def test_registration_passes_opcheck(device):
    tensors, index = [x.to(device) for x in held()[1:5]], torch.tensor(INDEX, device=device)
    torch.library.opcheck(torch.ops.ridgeline.gather_rows.default, (tensors, index))


def test_torch_compile_gives_the_same_bytes(device):
    tensors, index = [x.to(device) for x in held() if not x.is_complex()], torch.tensor(INDEX, device=device)
    compiled = torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
    for impl in ("eager", "triton"):
        assert same_bytes(compiled(tensors, index, impl=impl), run(tensors, index, device))


@pytest.mark.parametrize(
    ("tensors", "index", "message"),
    [
        ([], INDEX, f"tensors must be 1 to {MOST}, got 0"),
        ([torch.zeros(5)] * (MOST + 1), INDEX, f"tensors must be 1 to {MOST}, got {MOST + 1}"),
        ([torch.zeros(())], INDEX, r"tensors\[0\] must be \[R, ...\] with one R for all, got shape \(\)"),
        ([torch.zeros(5), torch.zeros(4)], INDEX, r"tensors\[1\] must be \[R, ...\] .* got shape \(4,\)"),
        ([torch.zeros(5), torch.zeros(5, device="meta")], INDEX, r"tensors\[1\] must be on the device of index, cpu"),
        ([torch.zeros(5, requires_grad=True)], INDEX, r"tensors\[0\] must not require a gradient"),
        ([torch.zeros(5, 6).mT.contiguous().mT], INDEX, r"tensors\[0\] must be contiguous .* strides \(1, 5\)"),
        ([torch.zeros(0, 2)], INDEX, "index must be empty where the tensors have no rows, got 4 entries"),
        ([torch.zeros(5)], [0.0], r"index must be \[B\] of int64, got shape \(1,\), torch.float32"),
        ([torch.zeros(5)], [[0]], r"index must be \[B\] of int64, got shape \(1, 1\)"),
    ],
)
def test_bad_input_is_refused(tensors, index, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message):
        gather_rows(tensors, torch.tensor(index), impl="triton")
