"""Residual blocks: what they start as, what they normalise, and the drop-in attention module."""

import math
import re
import textwrap

import pytest
import torch
from torch import nn

from perceiver.blocks import AttentionBlock, DropoutKey, FeedForwardBlock, GroupedQueryAttention, RMSNorm


def by_hand(module: GroupedQueryAttention, x_BTC: torch.Tensor, memory_BSC: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention from its definition, one head at a time."""
    width, group = module.head_width, module.heads // module.kv_heads
    q, k, v = module.q_proj(x_BTC), module.k_proj(memory_BSC), module.v_proj(memory_BSC)
    heads = []
    for h in range(module.heads):
        g = h // group
        q_hat = nn.functional.normalize(q[..., h * width : (h + 1) * width], dim=-1)
        k_hat = nn.functional.normalize(k[..., g * width : (g + 1) * width], dim=-1)
        p = torch.softmax(module.log_scale[h].exp() * q_hat @ k_hat.transpose(1, 2), dim=-1)
        heads.append(p @ v[..., g * width : (g + 1) * width])
    return module.out_proj(torch.cat(heads, dim=-1))


def test_attention_module_is_its_definition():
    torch.manual_seed(0)
    module = GroupedQueryAttention(64, heads=4, kv_heads=2)
    x, memory = torch.randn(2, 5, 64), torch.randn(2, 9, 64)
    torch.testing.assert_close(module(x, memory), by_hand(module, x, memory))


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_multiplies_float32_as_the_products_beside_it(compiled, monkeypatch):
    """Whichever of PyTorch's two switches is turned, also after it was compiled."""
    asked, matmul = [], torch.backends.cuda.matmul

    def attend(q_BHTD, *_, **options):
        asked.append(options["precision"])
        return q_BHTD

    monkeypatch.setattr("perceiver.blocks.gqa_attention", attend)
    module, before = GroupedQueryAttention(64, heads=4, kv_heads=2), matmul.fp32_precision
    call = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    try:
        for name, value in (("allow_tf32", True), ("allow_tf32", False), ("fp32_precision", "tf32")):
            setattr(matmul, name, value)
            call(torch.randn(2, 5, 64))
    finally:
        matmul.fp32_precision = before
    assert asked == ["tf32", "ieee", "tf32"]


def test_the_example_of_its_docstring_runs():
    (example,) = re.findall(r"For example:\n\n(.*)\n\n    Args:", GroupedQueryAttention.__doc__ or "", re.DOTALL)
    names = {"torch": torch, "GroupedQueryAttention": GroupedQueryAttention}
    exec(textwrap.dedent(example), names)
    assert names["y_BTC"].shape == (8, 64, 256)
    assert all(p.grad is not None and p.grad.any() for p in names["attention"].parameters())


def test_without_memory_the_queries_are_the_memory():
    module = GroupedQueryAttention(32, heads=2, kv_heads=1)
    x = torch.randn(2, 5, 32)
    assert torch.equal(module(x), module(x, x))


def test_keys_past_the_count_do_not_matter():
    module = GroupedQueryAttention(32, heads=2, kv_heads=1)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    count = torch.tensor([4, 9], dtype=torch.int32)
    masked = module(x, memory, key_count_B=count)
    torch.testing.assert_close(masked[:1], module(x[:1], memory[:1, :4]))
    mask = torch.arange(9) < count[:, None]
    torch.testing.assert_close(masked, module(x, memory, key_mask_BS=mask))


def test_temperature_starts_at_the_root_of_the_head_width():
    module = GroupedQueryAttention(256, heads=4, kv_heads=2)
    torch.testing.assert_close(module.log_scale.exp(), torch.full((4,), 8.0))


@pytest.mark.parametrize(
    ("channels", "heads", "kv_heads", "name"),
    [
        (30, 4, 2, "channels"),
        (64, 0, 1, "channels"),
        (64, 4, 3, "heads"),
        (64, 4, 0, "heads"),
        (96, 4, 2, "channels / heads"),
    ],
)
def test_widths_that_do_not_fit_are_refused(channels, heads, kv_heads, name):
    with pytest.raises(ValueError, match=f"{name} must be (a multiple|one of)"):
        GroupedQueryAttention(channels, heads, kv_heads)


def test_a_call_of_multihead_attention_has_the_place_that_the_docstring_says():
    """Keys that are padding of one are padding of the other, and the shapes are the same."""
    theirs = nn.MultiheadAttention(64, 4, bias=False, batch_first=True)
    ours = GroupedQueryAttention(64, heads=4, kv_heads=4)
    assert sum(p.numel() for p in theirs.parameters()) + ours.heads == sum(p.numel() for p in ours.parameters())
    x, m, padding = torch.randn(2, 5, 64), torch.randn(2, 9, 64), torch.arange(9) >= torch.tensor([[4], [9]])
    changed = torch.where(padding[:, :, None], torch.randn(2, 9, 64), m)
    for call in (
        lambda m: theirs(x, m, m, key_padding_mask=padding)[0],
        lambda m: ours(x, m, key_mask_BS=~padding),
    ):
        assert call(m).shape == x.shape
        torch.testing.assert_close(call(m), call(changed))
    assert theirs(x, x, x)[0].shape == ours(x).shape


@pytest.mark.parametrize(
    ("x", "memory", "message"),
    [
        (torch.rand(5, 32), None, r"x must be \[B, T, 32\], got shape \(5, 32\)"),
        (torch.rand(2, 5, 16), None, r"x must be \[B, T, 32\], got shape \(2, 5, 16\)"),
        (torch.rand(2, 5, 32), torch.rand(9, 32), r"memory must be \[B, S, 32\], got shape \(9, 32\)"),
        (torch.rand(2, 5, 32), torch.rand(3, 9, 32), r"memory must have the 2 items of x, got shape \(3, 9, 32\)"),
        (torch.rand(2, 5, 32), [1.0], r"memory must be a tensor, got \[1.0\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_the_callers_names(x, memory, message):
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(32, heads=2, kv_heads=1)(x, memory)


def test_attention_block_normalises_queries_only():
    block = AttentionBlock(32, 2, 1, place=0)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    torch.testing.assert_close(block(x, memory), x + block.attn(block.norm(x), memory))
    torch.testing.assert_close(block(x), x + block.attn(block.norm(x), x))


def test_feed_forward_block_is_its_formula():
    block = FeedForwardBlock(16, 24, place=0)
    x = torch.randn(2, 5, 16)
    normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    hidden = block.ffn.linear1(normed)
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(block(x), x + block.ffn.linear2(gelu))


def test_dropout_acts_on_the_branch_and_not_on_the_stream():
    block = FeedForwardBlock(16, 24, place=1024)
    x = torch.randn(2, 50, 16)
    drop = DropoutKey(rate=0.5, seed=1, step=1, scene_B=torch.tensor([3, 4]))
    branch, dropped = block(x) - x, block(x, drop=drop) - x
    zero = dropped == 0
    assert 0.4 < zero.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * branch[~zero], atol=1e-5, rtol=1e-4)


def test_norm_computes_in_float32_under_bfloat16():
    norm = RMSNorm(8)
    assert norm(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_attention_is_exported_for_any_batch():
    attention = GroupedQueryAttention(channels=32, heads=2, kv_heads=1)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x_BTC": {0: batch}, "memory_BSC": {0: batch}}
    inputs = [(torch.rand(B, 3, 32), torch.rand(B, 5, 32)) for B in (2, 7)]
    exported = torch.export.export(attention, inputs[0], dynamic_shapes=shapes).module()
    for x_BTC, memory_BSC in inputs:
        assert torch.allclose(exported(x_BTC, memory_BSC), attention(x_BTC, memory_BSC))
