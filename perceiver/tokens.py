"""Point features: what a labelled point looks like to the model.

    [xyz 3 | sin p 32, cos p 32 | label 16 | source 2 | behind 8 | votes 2],   p = 2 pi xyz B^T

B [32, 3] is drawn once as N(0, 1) * scale from a CPU generator seeded 0 and kept as a buffer (Tancik et al., Fourier
Features Let Networks Learn High Frequency Functions, 2020).
"""

import torch
from torch import nn

from kernels.points_eager import point_features
from perceiver.scene import BEHIND_CLASSES, POINT_CLASSES, SceneBatch

FREQUENCIES = 32
LABEL_WIDTH, SOURCE_WIDTH = 16, 2


class FourierFeatures(nn.Module):
    """The random projections of the coordinates whose sin and cos are features."""

    B: torch.Tensor

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.register_buffer("B", torch.empty(FREQUENCIES, 3))

    def draw(self) -> None:
        """Fill B; the published constant for scale 10."""
        generator = torch.Generator().manual_seed(0)
        self.B.copy_(torch.randn(FREQUENCIES, 3, generator=generator) * self.scale)


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
        return point_features(*self.points(batch), **self.tables())

    def points(self, batch: SceneBatch) -> tuple[torch.Tensor, ...]:
        """What `kernels.point_embedding` takes of a batch."""
        points = (batch.xyz_BT3, batch.class_id_BT, batch.source_BT, batch.behind_BT)
        return (*points, batch.votes_BT2) if self.vote_features else points

    def tables(self) -> dict[str, torch.Tensor]:
        """What `kernels.point_embedding` takes of the tokenizer."""
        return {
            "frequencies_F3": self.pos_enc.B,
            "label_table": self.label_emb.weight,
            "source_table": self.src_emb.weight,
            "behind_table": self.behind_emb.weight,
        }
