"""Operators: tensors in, tensors out. They know no model. The attributes are the functions, not their modules."""

from kernels.adamw import adamw, adamw_reference
from kernels.attention import gqa_attention, gqa_attention_reference
from kernels.gather import gather_rows, gather_rows_reference
from kernels.gelu import bias_gelu, bias_gelu_reference
from kernels.heads import segment_heads, segment_heads_reference
from kernels.loss_terms import Loss, loss_terms, loss_terms_reference
from kernels.matching import Match, match_segments, match_segments_reference
from kernels.points import point_embedding, point_embedding_reference
from kernels.residual import Residual, residual_norm, residual_norm_reference
from kernels.rms_norm import rms_norm
from kernels.sinkhorn import Transport, sinkhorn, sinkhorn_reference
from kernels.turn import turn, turn_reference

__all__ = [
    "Loss",
    "Match",
    "Residual",
    "Transport",
    "adamw",
    "adamw_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "gather_rows",
    "gather_rows_reference",
    "gqa_attention",
    "gqa_attention_reference",
    "loss_terms",
    "loss_terms_reference",
    "match_segments",
    "match_segments_reference",
    "point_embedding",
    "point_embedding_reference",
    "residual_norm",
    "residual_norm_reference",
    "rms_norm",
    "segment_heads",
    "segment_heads_reference",
    "sinkhorn",
    "sinkhorn_reference",
    "turn",
    "turn_reference",
]
