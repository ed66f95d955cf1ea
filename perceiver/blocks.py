"""The residual blocks of the Perceiver. Attention everywhere is `kernels.gqa_attention`.

attention block   x + Dropout(Attn(RMSNorm(x), memory))      keys and values read `memory` as it is
feed-forward      x + Dropout(W2 GELU(W1 RMSNorm(x)))
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from kernels.attention import HEAD_WIDTHS, gqa_attention
from kernels.dispatch import require_tensors
from kernels.philox import Counter, dropout
from kernels.rms_norm import rms_norm


@dataclass(frozen=True, kw_only=True)
class DropoutKey:
    """Where a step's dropout masks come from: Philox at (seed; place, step, scene, element)."""

    rate: float
    seed: int
    step: Counter
    scene_B: torch.Tensor

    def __call__(self, x_BTC: torch.Tensor, place: int) -> torch.Tensor:
        return dropout(x_BTC, self.rate, seed=self.seed, step=self.step, scene_B=self.scene_B, place=place)


# a compiler cannot trace the switch, and compiles again when it is turned
@torch.compiler.assume_constant_result
def float32_products() -> str:
    """How PyTorch multiplies float32 matrices on a GPU, and kernels beside it: "tf32" if that is allowed, or "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 at least, also where autocast hands it bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        return rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.weight)


class GroupedQueryAttention(nn.Module):
    """Attention with grouped heads, L2-normalised queries and keys and a learned temperature per query head.

    Takes the place of `nn.MultiheadAttention(channels, heads, bias=False, batch_first=True)`, not its weights: it is
    another function, trained from the start. Each call is rewritten; kv_heads = heads shares no keys and values:

        attention(x, x, x)[0]                                becomes   attention(x)
        attention(x, m, m, key_padding_mask=padding)[0]      becomes   attention(x, m, key_mask_BS=~padding)

    Keys and values come from one memory. There are no attention weights to return, no attn_mask, no dropout of weights
    and no tensors without a batch. For example:

        attention = GroupedQueryAttention(channels=256, heads=4, kv_heads=2)
        x_BTC = torch.randn(8, 64, 256)                       # queries
        memory_BSC = torch.randn(8, 2048, 256)                # keys and values; None: the queries themselves
        key_count_B = torch.full((8,), 2000)                  # only the first 2000 keys of each item count
        y_BTC = attention(x_BTC, memory_BSC, key_count_B=key_count_B)
        y_BTC.sum().backward()

    Args:
        channels: width C of queries, memory and output; a multiple of `heads`.
        heads, kv_heads: H query heads share G key and value heads; H is a multiple of G. C / H is 16, 32, 64 or 128.
    Raises:
        ValueError: the widths do not divide; called, x or memory is not [B, T, C]; see also `kernels.gqa_attention`.
    Determinism: that of `kernels.gqa_attention`.
    """

    def __init__(self, channels: int, heads: int, kv_heads: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if channels // heads not in HEAD_WIDTHS:
            raise ValueError(
                f"channels / heads must be one of {', '.join(map(str, HEAD_WIDTHS))}, got {channels // heads}"
            )
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, channels // heads
        kv_channels = kv_heads * self.head_width
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, kv_channels, bias=False)
        self.v_proj = nn.Linear(channels, kv_channels, bias=False)
        self.out_proj = nn.Linear(channels, channels, bias=False)
        self.log_scale = nn.Parameter(torch.full((heads,), 0.5 * math.log(self.head_width)))

    def forward(
        self,
        x_BTC: torch.Tensor,
        memory_BSC: torch.Tensor | None = None,
        *,
        key_count_B: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        impl: str = "auto",
    ) -> torch.Tensor:
        """Attend from x to the memory (without one, to x); at most one of count and mask says which keys count."""
        memory_BSC = x_BTC if memory_BSC is None else memory_BSC
        self._check(x_BTC, memory_BSC)
        o_BHTD = gqa_attention(
            self.split(self.q_proj(x_BTC), self.heads),
            self.split(self.k_proj(memory_BSC), self.kv_heads),
            self.split(self.v_proj(memory_BSC), self.kv_heads),
            self.log_scale,
            key_count_B=key_count_B,
            key_mask_BS=key_mask_BS,
            precision=float32_products(),
            impl=impl,
        )
        return self.out_proj(o_BHTD.transpose(1, 2).flatten(2))

    def _check(self, x_BTC: torch.Tensor, memory_BSC: torch.Tensor) -> None:
        """Refuse tensors that do not fit by the names that the caller gave them, not by those of the heads."""
        require_tensors(x=x_BTC, memory=memory_BSC)
        channels = self.q_proj.in_features
        for name, letters, tensor in (("x", "B, T", x_BTC), ("memory", "B, S", memory_BSC)):
            if tensor.dim() != 3 or tensor.shape[-1] != channels:
                raise ValueError(f"{name} must be [{letters}, {channels}], got shape {tuple(tensor.shape)}")
        # not len, which torch.export takes for a constant
        if memory_BSC.shape[0] != x_BTC.shape[0]:
            raise ValueError(f"memory must have the {x_BTC.shape[0]} items of x, got shape {tuple(memory_BSC.shape)}")

    def split(self, x_BTC: torch.Tensor, heads: int) -> torch.Tensor:
        """View the columns of a projection as heads, [B, heads, T, D]."""
        return x_BTC.unflatten(-1, (heads, self.head_width)).transpose(1, 2)


class AttentionBlock(nn.Module):
    """x + Dropout(Attn(RMSNorm(x), memory)); without a memory the raw residual stream is the memory."""

    def __init__(self, channels: int, heads: int, kv_heads: int, *, place: int):
        super().__init__()
        self.place = place
        self.norm = RMSNorm(channels)
        self.attn = GroupedQueryAttention(channels, heads, kv_heads)

    def forward(
        self,
        x_BTC: torch.Tensor,
        memory_BSC: torch.Tensor | None = None,
        *,
        key_count_B: torch.Tensor | None = None,
        drop: DropoutKey | None = None,
        impl: str = "auto",
    ) -> torch.Tensor:
        memory_BSC = x_BTC if memory_BSC is None else memory_BSC
        y_BTC = self.attn(self.norm(x_BTC), memory_BSC, key_count_B=key_count_B, impl=impl)
        return x_BTC + (drop(y_BTC, self.place) if drop else y_BTC)


class _FeedForward(nn.Module):
    """W2 GELU(W1 x), exact GELU."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return self.linear2(nn.functional.gelu(self.linear1(x_BTC)))


class FeedForwardBlock(nn.Module):
    """x + Dropout(W2 GELU(W1 RMSNorm(x)))."""

    def __init__(self, channels: int, hidden: int, *, place: int):
        super().__init__()
        self.place = place
        self.norm = RMSNorm(channels)
        self.ffn = _FeedForward(channels, hidden)

    def forward(self, x_BTC: torch.Tensor, *, drop: DropoutKey | None = None) -> torch.Tensor:
        y_BTC = self.ffn(self.norm(x_BTC))
        return x_BTC + (drop(y_BTC, self.place) if drop else y_BTC)


class Layer(nn.Module):
    """Cross-attention to a memory (where the layer has one), self-attention, feed-forward."""

    def __init__(self, channels: int, hidden: int, *, heads: int, kv_cross: int | None, kv_self: int, first_place: int):
        super().__init__()
        self.cross = None
        if kv_cross is not None:
            self.cross = AttentionBlock(channels, heads, kv_cross, place=first_place)
        self.self_attn = AttentionBlock(channels, heads, kv_self, place=first_place + 1)
        self.ffn = FeedForwardBlock(channels, hidden, place=first_place + 2)

    def forward(
        self,
        x_BTC: torch.Tensor,
        memory_BSC: torch.Tensor,
        *,
        key_count_B: torch.Tensor | None = None,
        drop: DropoutKey | None = None,
        impl: str = "auto",
    ) -> torch.Tensor:
        if self.cross is not None:
            x_BTC = self.cross(x_BTC, memory_BSC, key_count_B=key_count_B, drop=drop, impl=impl)
        return self.ffn(self.self_attn(x_BTC, drop=drop, impl=impl), drop=drop)


def run_layers(
    layers: Iterable[nn.Module],
    table_LC: torch.Tensor,
    memory_BSC: torch.Tensor,
    *,
    key_count_B: torch.Tensor | None = None,
    drop: DropoutKey | None = None,
    as_memory: bool = False,
    impl: str = "eager",
) -> torch.Tensor:
    """Run a stack of layers on the rows of a table, the same rows for every item of the memory.

    The plain form of `perceiver.fused.fused_layers`, whose `as_memory` makes no difference here; `impl` is attention's.
    """
    x_BLC = table_LC.expand(len(memory_BSC), -1, -1)
    for layer in layers:
        x_BLC = layer(x_BLC, memory_BSC, key_count_B=key_count_B, drop=drop, impl=impl)
    return x_BLC
