"""The Perceiver: labelled points in, N segments with a confidence out. Its defaults are the published architecture.

points  -> input_proj -> memory
latents <- [cross-attention to the points in the first, last and every 4th layer] -> self-attention -> FFN, 7 times
queries <- cross-attention to the latents -> self-attention -> FFN, 3 times
queries -> r in R^7 -> midpoint, unit direction, length;  queries -> confidence logit
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from kernels.attention import HEAD_WIDTHS
from kernels.dispatch import resolve
from kernels.heads import segment_heads
from kernels.philox import Place, named_normal, named_uniform
from kernels.points import point_embedding
from perceiver.blocks import DropoutKey, GroupedQueryAttention, Layer, RMSNorm, float32_products, run_layers
from perceiver.fused import fused_layers
from perceiver.scene import SceneBatch
from perceiver.tokens import PointTokenizer


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig:
    """Architecture. Widths in channels; dropout is a probability; fourier_scale in cycles per normalised unit.

    Raises:
        ValueError: a size is not positive, a rate is out of range or heads do not divide.
    """

    hidden: int = 256
    ff: int = 1024
    num_heads: int = 4
    kv_heads_cross: int = 2
    kv_heads_self: int = 2
    latent_tokens: int = 256
    latent_layers: int = 7
    decoder_layers: int = 3
    cross_attn_interval: int = 4
    segments: int = 64
    dropout: float = 0.1
    behind_emb_dim: int = 8
    vote_features: bool = True
    fourier_scale: float = 10.0

    def __post_init__(self):
        counts = ("hidden", "ff", "num_heads", "latent_tokens", "latent_layers", "decoder_layers", "segments")
        for name in (*counts, "behind_emb_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cross_attn_interval < 1:
            raise ValueError(f"cross_attn_interval must be at least 1, got {self.cross_attn_interval}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.hidden % self.num_heads:
            raise ValueError(f"hidden must be a multiple of num_heads, got {self.hidden} and {self.num_heads}")
        if self.hidden // self.num_heads not in HEAD_WIDTHS:
            widths = ", ".join(map(str, HEAD_WIDTHS))
            raise ValueError(f"hidden / num_heads must be one of {widths}, got {self.hidden // self.num_heads}")
        for name in ("kv_heads_cross", "kv_heads_self"):
            if getattr(self, name) < 1 or self.num_heads % getattr(self, name):
                raise ValueError(f"{name} must divide num_heads {self.num_heads}, got {getattr(self, name)}")


class Segments(NamedTuple):
    """Predicted segments in normalised units: midpoint, unit direction, length; confidence logit."""

    mid_BN3: torch.Tensor
    dir_BN3: torch.Tensor
    len_BN: torch.Tensor
    conf_BN: torch.Tensor

    def endpoints(self) -> torch.Tensor:
        """mid -/+ dir * len / 2, [B, N, 2, 3]."""
        half_BN3 = 0.5 * self.len_BN[..., None] * self.dir_BN3
        return torch.stack([self.mid_BN3 - half_BN3, self.mid_BN3 + half_BN3], dim=-2)


class _Segmenter(nn.Module):
    """The tables, layers and heads; the names are those of the published checkpoint."""

    def __init__(self, c: PerceiverConfig, point_width: int):
        super().__init__()
        self.input_proj = nn.Sequential(
            nn.Linear(point_width, c.ff), nn.GELU(), nn.Linear(c.ff, c.hidden), RMSNorm(c.hidden)
        )
        self.latent_embed = nn.Embedding(c.latent_tokens, c.hidden)
        self.query_embed = nn.Embedding(c.segments, c.hidden)
        last = c.latent_layers - 1
        reads_points = [i in (0, last) or i % c.cross_attn_interval == 0 for i in range(c.latent_layers)]
        crosses = [c.kv_heads_cross if reads else None for reads in reads_points]
        crosses += [c.kv_heads_cross] * c.decoder_layers
        layers = [
            Layer(
                c.hidden,
                c.ff,
                heads=c.num_heads,
                kv_cross=kv_cross,
                kv_self=c.kv_heads_self,
                first_place=Place.DROPOUT + 3 * i,
            )
            for i, kv_cross in enumerate(crosses)
        ]
        self.latent_layers = nn.ModuleList(layers[: c.latent_layers])
        self.decoder_layers = nn.ModuleList(layers[c.latent_layers :])
        self.segment_head = nn.Linear(c.hidden, 7)
        # the second offset has no effect; the published checkpoint has it
        self.query_offsets = nn.Parameter(torch.empty(c.segments, 2, 3))
        self.conf_head = nn.Linear(c.hidden, 1)


class Perceiver(nn.Module):
    """Segments from labelled points.

    Args:
        config: the architecture; `PerceiverConfig()` is the published one, 8,853,892 trainable parameters.
        seed: of the initial weights, drawn by Philox per parameter name; the global generator is not read.
    Determinism: equal config and seed give equal weights. The forward pass draws nothing but dropout, from `drop`.
    Source: Jaegle et al., Perceiver (2021); the published 2026 learned baseline of the S23DR challenge.
    """

    def __init__(self, config: PerceiverConfig, *, seed: int = 353):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.tokenizer = PointTokenizer(
                fourier_scale=config.fourier_scale,
                behind_width=config.behind_emb_dim,
                vote_features=config.vote_features,
            )
            self.segmenter = _Segmenter(config, self.tokenizer.width)
        self.to_empty(device="cpu")
        initialise(self, seed)

    def forward(self, batch: SceneBatch, *, drop: DropoutKey | None = None, impl: str = "auto") -> Segments:
        """Predict N segments per scene.

        Args:
            batch: rows on the model's device; points past `point_count_B` have no effect.
            drop: source of the dropout masks in training; None switches dropout off.
            impl: of the operators, see `kernels.dispatch`; with triton, what stands between products is fused too, but
                not where torch.compile traces the model.
        Returns:
            Segments in float32; the order of the queries has no meaning.
        """
        s = self.segmenter
        memory_BTC = self._memory(batch, impl)
        form = resolve(impl, memory_BTC.device)
        # a compiler joins what stands between products itself, and cannot trace gradients that are written late
        fused = form == "triton" and not torch.compiler.is_compiling()
        run = fused_layers if fused else functools.partial(run_layers, impl=form)
        latents, queries = s.latent_embed.weight, s.query_embed.weight
        x_BLC = run(s.latent_layers, latents, memory_BTC, key_count_B=batch.point_count_B, drop=drop, as_memory=True)
        x_BNC = run(s.decoder_layers, queries, x_BLC, drop=drop)
        layers = (s.segment_head.weight, s.segment_head.bias, s.conf_head.weight, s.conf_head.bias)
        return Segments(*segment_heads(x_BNC, *layers, s.query_offsets, impl=impl))

    def _memory(self, batch: SceneBatch, impl: str) -> torch.Tensor:
        names = ("weight1", "bias1", "weight2", "bias2", "gain")
        return point_embedding(
            *self.tokenizer.points(batch),
            **self.tokenizer.tables(),
            **dict(zip(names, self.segmenter.input_proj.parameters(), strict=True)),
            point_count_B=batch.point_count_B,
            precision=_product_precision(batch.xyz_BT3.device),
            impl=impl,
        )


def _product_precision(device: torch.device) -> str:
    """How matrix products are computed here: what autocast and the TF32 switch say."""
    if not torch.is_autocast_enabled(device.type):
        return float32_products()
    if torch.get_autocast_dtype(device.type) != torch.bfloat16:
        raise ValueError(f"autocast must be to bfloat16, got {torch.get_autocast_dtype(device.type)}")
    return "bf16"


@torch.no_grad()
def initialise(model: Perceiver, seed: int) -> None:
    """Draw every parameter from Philox by its name: U(-1, 1)/sqrt(fan-in) for linear layers, N(0, 1) for tables.

    Output projections of the residual blocks start at 0, norms at 1, log_scale at ln sqrt(D).
    """
    model.tokenizer.pos_enc.draw()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for part, parameter in module.named_parameters():
                parameter.copy_((2 * named_uniform(f"{name}.{part}", tuple(parameter.shape), seed=seed) - 1) * bound)
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(named_normal(f"{name}.weight", tuple(module.weight.shape), seed=seed))
        elif isinstance(module, RMSNorm):
            assert module.weight is not None
            module.weight.fill_(1)
        elif isinstance(module, GroupedQueryAttention):
            module.log_scale.fill_(module.head_width).log_().mul_(0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "linear2.weight", "linear2.bias")):
            parameter.zero_()
    s = model.segmenter
    s.query_offsets.copy_(named_normal("query_offsets", tuple(s.query_offsets.shape), seed=seed) * 0.05)
    s.segment_head.weight.copy_(named_normal("segment_head", tuple(s.segment_head.weight.shape), seed=seed) * 1e-3)
    s.segment_head.bias.zero_()
    s.segment_head.bias[6] = 0.5
