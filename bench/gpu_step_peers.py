"""The published model and its loss in plain PyTorch, on the parameters of ours: what a training step is compared with.

Attention is SDPA over expanded heads and unit vectors, dropout is PyTorch's own, matching iterates in the log domain.
Without dropout it gives the result of `perceiver.model.Perceiver`, which the step suite checks before it times.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers import matching_peers
from kernels.rms_norm import EPS
from perceiver.blocks import AttentionBlock, FeedForwardBlock, Layer
from perceiver.model import Perceiver
from perceiver.scene import SceneBatch
from train.config import Recipe, StageConfig


class PlainPerceiver(nn.Module):
    """The model of `perceiver.model` by PyTorch's operators alone, on the parameters of the one it is given."""

    def __init__(self, model: Perceiver, rate: float):
        super().__init__()
        self.model, self.rate = model, rate

    def forward(self, batch: SceneBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return midpoints, directions, lengths and confidences."""
        s = self.model.segmenter
        with torch.autocast(batch.xyz_BT3.device.type, enabled=False):
            point_BTF = self.model.tokenizer(batch)
        first, _, second, norm = s.input_proj
        memory_BTC = _rms_norm(cast(nn.RMSNorm, norm), second(F.gelu(first(point_BTF))))
        valid_BT = torch.arange(batch.xyz_BT3.shape[1], device=memory_BTC.device) < batch.point_count_B[:, None]
        x_BLC = s.latent_embed.weight.expand(len(batch), -1, -1)
        for layer in s.latent_layers:
            x_BLC = self._layer(cast(Layer, layer), x_BLC, memory_BTC, valid_BT)
        x_BNC = s.query_embed.weight.expand(len(batch), -1, -1)
        for layer in s.decoder_layers:
            x_BNC = self._layer(cast(Layer, layer), x_BNC, x_BLC, None)
        with torch.autocast(x_BNC.device.type, enabled=False):
            x_BNC = x_BNC.to(torch.promote_types(x_BNC.dtype, torch.float32))
            r_BN7 = s.segment_head(x_BNC)
            mid_BN3 = r_BN7[..., :3] + s.query_offsets[:, 0]
            length_BN = 0.1 * F.softplus(r_BN7[..., 6])
            return mid_BN3, F.normalize(r_BN7[..., 3:6], dim=-1), length_BN, s.conf_head(x_BNC)[..., 0]

    def _layer(self, layer: Layer, x_BTC: Tensor, memory_BSC: Tensor, valid_BS: Tensor | None) -> Tensor:
        if layer.cross is not None:
            x_BTC = x_BTC + self._drop(_attend(layer.cross, x_BTC, memory_BSC, valid_BS))
        x_BTC = x_BTC + self._drop(_attend(layer.self_attn, x_BTC, x_BTC, None))
        return x_BTC + self._drop(_feed_forward(layer.ffn, x_BTC))

    def _drop(self, x_BTC: Tensor) -> Tensor:
        return F.dropout(x_BTC, self.rate, training=self.training)


def _attend(block: AttentionBlock, x_BTC: Tensor, memory_BSC: Tensor, valid_BS: Tensor | None) -> Tensor:
    a = block.attn
    q_BHTD, k_BGSD, v_BGSD = (
        project(x).unflatten(-1, (-1, a.head_width)).transpose(1, 2)
        for project, x in ((a.q_proj, _rms_norm(block.norm, x_BTC)), (a.k_proj, memory_BSC), (a.v_proj, memory_BSC))
    )
    q_BHTD = F.normalize(q_BHTD, dim=-1) * a.log_scale.exp()[:, None, None].to(q_BHTD.dtype)
    k_BHSD, v_BHSD = (x.repeat_interleave(a.heads // a.kv_heads, 1) for x in (F.normalize(k_BGSD, dim=-1), v_BGSD))
    mask = None if valid_BS is None else valid_BS[:, None, None]
    q_BHTD, k_BHSD = q_BHTD.to(v_BHSD.dtype), k_BHSD.to(v_BHSD.dtype)
    o_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, scale=1.0)
    return a.out_proj(o_BHTD.transpose(1, 2).flatten(2))


def _feed_forward(block: FeedForwardBlock, x_BTC: Tensor) -> Tensor:
    return block.ffn.linear2(F.gelu(block.ffn.linear1(_rms_norm(block.norm, x_BTC))))


def _rms_norm(norm: nn.RMSNorm, x_BTC: Tensor) -> Tensor:
    return F.rms_norm(
        x_BTC.to(torch.promote_types(x_BTC.dtype, torch.float32)), norm.normalized_shape, norm.weight, EPS
    )


def plain_loss(recipe: Recipe, stage: StageConfig) -> Callable[..., Tensor]:
    """Return the total of `perceiver.loss.segment_loss`, from midpoints, directions, lengths, confidences and truth."""
    c = recipe.loss
    settings = {n: getattr(c, n) for n in ("eps", "iterations", "cost_scale", "dustbin", "direction_weight")}
    match = next(peer for peer in matching_peers(**settings) if peer.name == "log domain").solve

    def loss(mid_BN3, dir_BN3, len_BN, conf_BN, gt_BM23, gt_count_B) -> Tensor:
        transport_B, endpoint_B, matched_BN = match(
            mid_BN3, dir_BN3, len_BN, gt_BM23, gt_count_B, plan_gradient=c.plan_gradient
        )
        conf = F.binary_cross_entropy_with_logits(conf_BN, matched_BN.detach())
        endpoint = c.cost_scale * stage.endpoint_weight * endpoint_B.mean()
        return transport_B.mean() + c.conf_weight * conf + endpoint

    return loss
