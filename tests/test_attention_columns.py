"""`KeyValueColumns`: the bits of `gqa_attention` on views of one product, and a gradient that is laid out as it is."""

import math

import pytest
import torch

from kernels.attention import gqa_attention
from kernels.attention_columns import KeyValueColumns

# query heads and key heads of three attentions that share a product
HEADS = ((2, 1), (4, 2), (2, 2))
D = 16
X = sum(2 * G * D for _, G in HEADS)


def problem(device, B=2, T=5, S=40, dtype=torch.float32):
    """Return queries and log_scale of each attention, the product, and upstream gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    queries = [draw(B, T, H, D).transpose(1, 2) for H, _ in HEADS]
    scales = [draw(H).float() for H, _ in HEADS]
    return queries, scales, draw(B, S, X), [draw(B, T, H, D).transpose(1, 2) for H, _ in HEADS]


def leaves(queries, scales, kv_BSX):
    return [tensor.detach().clone().requires_grad_() for tensor in (*queries, *scales, kv_BSX)]


def through_columns(queries, scales, kv_BSX, dos, key_count_B=None, used=(0, 1, 2)):
    """The outputs, then the gradients of queries, scales and product; only `used` outputs have an upstream gradient."""
    inputs = leaves(queries, scales, kv_BSX)
    columns = KeyValueColumns(inputs[-1])
    outputs = [
        columns.attend(inputs[i], inputs[3 + i], kv_heads=G, key_count_B=key_count_B) for i, (_, G) in enumerate(HEADS)
    ]
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], inputs, [dos[i] for i in used], allow_unused=True, materialize_grads=True
    )
    return [output.detach() for output in outputs] + list(gradients)


def through_views(queries, scales, kv_BSX, dos, key_count_B=None, used=(0, 1, 2)):
    inputs = leaves(queries, scales, kv_BSX)
    parts = inputs[-1].split([G * D for _, G in HEADS for _ in "kv"], -1)
    outputs = []
    for i, (_, G) in enumerate(HEADS):
        k, v = (part.unflatten(-1, (G, D)).transpose(1, 2) for part in parts[2 * i : 2 * i + 2])
        outputs.append(gqa_attention(inputs[i], k, v, inputs[3 + i], key_count_B=key_count_B, impl="triton"))
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], inputs, [dos[i] for i in used], allow_unused=True, materialize_grads=True
    )
    return [output.detach() for output in outputs] + list(gradients)


def same_bits(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_views_to_the_bit(dtype, device):
    arguments = problem(device, dtype=dtype)
    key_count_B = torch.tensor([40, 7], device=device)
    assert same_bits(through_columns(*arguments, key_count_B), through_views(*arguments, key_count_B))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_columns_of_an_output_that_is_not_used_have_gradient_zero(used, device):
    arguments = problem(device)
    results = through_columns(*arguments, used=used)
    assert same_bits(results, through_views(*arguments, used=used))
    unused = [i for i in range(3) if i not in used]
    edges = [0, *torch.tensor([2 * G * D for _, G in HEADS]).cumsum(0).tolist()]
    assert all(not results[-1][..., edges[i] : edges[i + 1]].any() for i in unused)


def test_columns_that_nobody_reads_have_gradient_zero(device):
    queries, scales, kv_BSX, dos = problem(device)
    kv_BSX.requires_grad_()
    o_BHTD = KeyValueColumns(kv_BSX).attend(queries[0], scales[0], kv_heads=1)
    (dkv_BSX,) = torch.autograd.grad(o_BHTD, kv_BSX, dos[0])
    assert dkv_BSX[..., : 2 * D].all()
    assert not dkv_BSX[..., 2 * D :].any()


def test_the_gradient_of_the_product_is_not_put_together_by_copies(device):
    queries, scales, kv_BSX, dos = problem(device)
    kv_BSX.requires_grad_()
    columns = KeyValueColumns(kv_BSX)
    outputs = [columns.attend(queries[i], scales[i], kv_heads=G) for i, (_, G) in enumerate(HEADS)]
    with torch.profiler.profile(acc_events=True) as profile:
        torch.autograd.grad(outputs, kv_BSX, dos)
    calls = {event.key for event in profile.key_averages()}
    assert "aten::new_empty" in calls
    assert not calls & {
        "aten::cat",
        "aten::add_",
        "aten::add",
        "aten::zeros",
        "aten::new_zeros",
        "aten::slice_backward",
    }


def test_the_backward_can_be_run_again(device):
    queries, scales, kv_BSX, dos = problem(device)
    kv_BSX.requires_grad_()
    columns = KeyValueColumns(kv_BSX)
    outputs = [columns.attend(queries[i], scales[i], kv_heads=G) for i, (_, G) in enumerate(HEADS)]
    first, second = (torch.autograd.grad(outputs, kv_BSX, dos, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


@pytest.mark.parametrize("sizes", [(0, 5, 40), (2, 0, 40), (2, 5, 0)], ids=["B", "T", "S"])
def test_a_size_of_zero_gives_zeros(sizes, device):
    assert all(not x.any() for x in through_columns(*problem(device, *sizes)))


def test_what_does_not_fit_is_refused(device, monkeypatch):
    monkeypatch.setenv("KERNELS_CHECK", "1")
    queries, scales, kv_BSX, _ = problem(device)
    columns = KeyValueColumns(kv_BSX[..., : 3 * D])
    columns.attend(queries[0], scales[0], kv_heads=1)
    with pytest.raises(ValueError, match="kv must have 64 columns for this and earlier attentions, got 48"):
        columns.attend(queries[0], scales[0], kv_heads=1)
    with pytest.raises(ValueError, match="q must have a multiple of the 3 heads"):
        KeyValueColumns(kv_BSX).attend(queries[0], scales[0], kv_heads=3)
    for kv_heads in (0, -1):
        with pytest.raises(ValueError, match=f"kv_heads must be at least 1, got {kv_heads}"):
            KeyValueColumns(kv_BSX).attend(queries[0], scales[0], kv_heads=kv_heads)
    for kv in (kv_BSX.double(), kv_BSX[0]):
        with pytest.raises(ValueError, match=r"kv must be \[B, S, X\] of float32, bfloat16 or float16, got shape"):
            KeyValueColumns(kv).attend(queries[0].to(kv.dtype), scales[0], kv_heads=1)
    with pytest.raises(ValueError, match="q must be a tensor, got None"):
        KeyValueColumns(kv_BSX).attend(None, scales[0], kv_heads=1)
    with pytest.raises(ValueError, match="log_scale must be at most log 60"):
        KeyValueColumns(kv_BSX).attend(queries[0], scales[0] + math.log(1e4), kv_heads=1)


def test_without_a_kernel_to_run_it_is_refused(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    queries, scales, kv_BSX, _ = problem("cpu")
    with pytest.raises(ValueError, match="impl='triton' must have CUDA tensors"):
        KeyValueColumns(kv_BSX).attend(queries[0], scales[0], kv_heads=1)
