"""Point features: what a labelled point looks like to the model.

    [xyz 3 | sin p 32, cos p 32 | label 16 | source 2 | behind 8 | votes 2],   p = 2 pi xyz B^T

B [32, 3] is drawn once as N(0, 1) * scale from a CPU generator seeded 0 and kept as a buffer (Tancik et al., Fourier
Features Let Networks Learn High Frequency Functions, 2020).
"""

import math

import torch
from torch import nn

from perceiver.scene import BEHIND_CLASSES, POINT_CLASSES, SceneBatch

FREQUENCIES = 32
LABEL_WIDTH, SOURCE_WIDTH = 16, 2


class FourierFeatures(nn.Module):
    """sin and cos of random projections of the coordinates."""

    B: torch.Tensor

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.register_buffer("B", torch.empty(FREQUENCIES, 3))

    def draw(self) -> None:
        """Fill B; the published constant for scale 10."""
        generator = torch.Generator().manual_seed(0)
        self.B.copy_(torch.randn(FREQUENCIES, 3, generator=generator) * self.scale)

    def forward(self, xyz_BT3: torch.Tensor) -> torch.Tensor:
        # sums of products, not a matrix product: at 10 cycles a unit, TF32 or bf16 would lose the phase
        x_BT1, y_BT1, z_BT1 = xyz_BT3.split(1, dim=-1)
        phase_BTF = 2 * math.pi * (x_BT1 * self.B[:, 0] + y_BT1 * self.B[:, 1] + z_BT1 * self.B[:, 2])
        return torch.cat([phase_BTF.sin(), phase_BTF.cos()], dim=-1)


class PointTokenizer(nn.Module):
    """Concatenate a point's features, float32 [B, T, width]."""

    def __init__(self, *, fourier_scale: float, behind_width: int, vote_features: bool):
        super().__init__()
        self.vote_features = vote_features
        self.pos_enc = FourierFeatures(fourier_scale)
        self.label_emb = nn.Embedding(POINT_CLASSES, LABEL_WIDTH)
        self.src_emb = nn.Embedding(2, SOURCE_WIDTH)
        self.behind_emb = nn.Embedding(BEHIND_CLASSES, behind_width)
        self.width = 3 + 2 * FREQUENCIES + LABEL_WIDTH + SOURCE_WIDTH + behind_width + 2 * vote_features

    def forward(self, batch: SceneBatch) -> torch.Tensor:
        parts = [
            batch.xyz_BT3,
            self.pos_enc(batch.xyz_BT3),
            _rows_of(self.label_emb.weight, batch.class_id_BT),
            _rows_of(self.src_emb.weight, batch.source_BT),
            _rows_of(self.behind_emb.weight, batch.behind_BT),
        ]
        if self.vote_features:
            parts.append(batch.votes_BT2)
        return torch.cat(parts, dim=-1)


def _rows_of(table_KC: torch.Tensor, index_BT: torch.Tensor) -> torch.Tensor:
    """Look rows up by a one-hot product: its gradient is a matrix product, where an index would scatter."""
    classes = torch.arange(len(table_KC), device=index_BT.device, dtype=index_BT.dtype)
    return (index_BT[..., None] == classes).to(table_KC.dtype) @ table_KC
