"""The layers of `perceiver.blocks` on fused operators: the same parameters, masks and function in fewer launches.

Between two products stands one launch: `residual_norm` ends a block (bias, dropout, residual sum) and begins the next
(norm, and a copy of the stream for keys and values, which read it as it is); `bias_gelu` stands inside a feed-forward.

The cross-attentions of a stack read one memory, so their keys and values are one product, and so are the gradients of
their weights and of the memory: it is read once for all layers, and no gradient of it is added to another. Gradients
that only the optimizer waits for are kept off the chain of the others: those of vectors end in one sum for the whole
stack, those of matrices are computed beside it, see `perceiver.products`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from kernels.attention_columns import KeyValueColumns
from kernels.gelu import bias_gelu
from kernels.reduce import JointSums
from kernels.residual import residual_norm
from perceiver.blocks import (
    AttentionBlock,
    DropoutKey,
    FeedForwardBlock,
    GroupedQueryAttention,
    Layer,
    float32_products,
)
from perceiver.products import Products


def fused_layers(
    layers: Iterable[nn.Module],
    table_LC: torch.Tensor,
    memory_BSC: torch.Tensor,
    *,
    key_count_B: torch.Tensor | None = None,
    drop: DropoutKey | None = None,
    as_memory: bool = False,
) -> torch.Tensor:
    """Run a stack of layers on the rows of a table, as `perceiver.blocks.run_layers` does, with Triton kernels.

    Args:
        layers: the first of them reads the memory.
        as_memory: return the stream in the dtype of the products, for another stack to read; else in float32.
    Raises:
        ValueError: there is no layer, or the first one has no cross-attention: the table would meet no item.
    """
    device = memory_BSC.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    draws = {}
    if drop is not None:
        step = drop.step if isinstance(drop.step, torch.Tensor) else torch.full((1,), drop.step, device=device)
        draws = {"rate": drop.rate, "seed": drop.seed, "step": step, "scene_B": drop.scene_B}
    stack = cast(list[Layer], list(layers))
    if not stack or stack[0].cross is None:
        raise ValueError(f"layers must begin with one that has a cross-attention, got {len(stack)} layers")
    with torch.autocast(device.type, enabled=False):
        return _run(stack, table_LC, memory_BSC.to(dtype), key_count_B, draws, as_memory)


def _run(layers: list[Layer], table_LC, memory_BSC, key_count_B, draws, as_memory: bool) -> torch.Tensor:
    """The stack in the dtype of the memory."""
    B, dtype = len(memory_BSC), memory_BSC.dtype
    crosses = [layer.cross for layer in layers if layer.cross is not None]
    selves = {layer.self_attn for layer in layers}
    blocks = [block for layer in layers for block in (layer.cross, layer.self_attn, layer.ffn) if block is not None]
    products = Products(_groups(layers), dtype)
    sums = _sums(blocks)
    from_memory = _keys_and_values(memory_BSC, [cross.attn for cross in crosses], products, sums)
    stream: Any = residual_norm(table_LC[None], None, blocks[0].norm.weight, dtype=dtype, sums=sums, impl="triton")
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        bias_C = None
        if isinstance(block, FeedForwardBlock):
            y_BTC, bias_C = _feed_forward(block, stream.normed_BTC, products, sums), block.ffn.linear2.bias
        elif block in selves:
            from_stream = _keys_and_values(stream.copy_BTC, [block.attn], products, sums)
            y_BTC = _attend(block.attn, stream.normed_BTC, from_stream, None, products)
        else:
            y_BTC = _attend(block.attn, stream.normed_BTC, from_memory, key_count_B, products)
        stream = residual_norm(
            stream.new_BTC.expand(B, -1, -1),
            y_BTC,
            None if following is None else following.norm.weight,
            bias_C=bias_C,
            place=block.place,
            dtype=dtype,
            copy=as_memory if following is None else following in selves,
            sums=sums,
            impl="triton",
            **draws,
        )
    return stream.copy_BTC if as_memory else stream.new_BTC


def _attend(
    attn: GroupedQueryAttention, x_BTC, columns: KeyValueColumns, key_count_B, products: Products
) -> torch.Tensor:
    """Attention up to its output product. Queries that are the same for all items are projected once."""
    q_BHTD = attn.split(products.linear(x_BTC, attn.q_proj), attn.heads).expand(len(columns.kv_BSX), -1, -1, -1)
    o_BHTD = columns.attend(q_BHTD, attn.log_scale, kv_heads=attn.kv_heads, key_count_B=key_count_B)
    return products.linear(o_BHTD.transpose(1, 2).flatten(2), attn.out_proj)


def _feed_forward(block: FeedForwardBlock, x_BTC, products: Products, sums: JointSums) -> torch.Tensor:
    """The feed-forward up to its last product, without that one's bias."""
    x_BTF = products.linear(x_BTC, block.ffn.linear1)
    hidden_BTF = bias_gelu(x_BTF, block.ffn.linear1.bias, sums=sums, impl="triton")
    return products.linear(hidden_BTF, block.ffn.linear2)


def _keys_and_values(
    memory_BSC, readers: Sequence[GroupedQueryAttention], products: Products, sums: JointSums
) -> KeyValueColumns:
    """The keys and values of the readers, in their order, from one product."""
    kv_BSX = products.linear(memory_BSC, *_key_value_projections(readers))
    return KeyValueColumns(kv_BSX, precision=float32_products(), sums=sums)


def _key_value_projections(readers: Sequence[GroupedQueryAttention]) -> tuple[nn.Linear, ...]:
    return tuple(projection for attn in readers for projection in (attn.k_proj, attn.v_proj))


def _sums(blocks: Sequence[AttentionBlock | FeedForwardBlock]) -> JointSums:
    """The vectors of a stack, whose gradients are sums over all rows."""
    vectors = [block.norm.weight for block in blocks]
    for block in blocks:
        if isinstance(block, FeedForwardBlock):
            vectors += [block.ffn.linear1.bias, block.ffn.linear2.bias]
        else:
            vectors.append(block.attn.log_scale)
    return JointSums(vectors)


def _groups(layers: list[Layer]) -> list[tuple[nn.Linear, ...]]:
    """The projections of each product."""
    crosses = [layer.cross.attn for layer in layers if layer.cross is not None]
    selves = [layer.self_attn.attn for layer in layers]
    groups = [_key_value_projections(readers) for readers in (crosses, *([attn] for attn in selves))]
    groups += [(projection,) for attn in (*crosses, *selves) for projection in (attn.q_proj, attn.out_proj)]
    groups += [(projection,) for layer in layers for projection in (layer.ffn.ffn.linear1, layer.ffn.ffn.linear2)]
    return groups
