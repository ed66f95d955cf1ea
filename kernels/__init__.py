"""Operators: tensors in, tensors out. They know no model. The attributes are the functions, not their modules."""

from kernels.attention import gqa_attention, gqa_attention_reference
from kernels.matching import Match, match_segments, match_segments_reference
from kernels.points import point_embedding, point_embedding_reference
from kernels.sinkhorn import Transport, sinkhorn, sinkhorn_reference

__all__ = [
    "Match",
    "Transport",
    "gqa_attention",
    "gqa_attention_reference",
    "match_segments",
    "match_segments_reference",
    "point_embedding",
    "point_embedding_reference",
    "sinkhorn",
    "sinkhorn_reference",
]
