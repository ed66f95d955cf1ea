"""What spills, and why that is accepted."""

_LARGE = "one store and one load in its first half-step, beyond the model's sizes"
_TILE_128 = "tiles of 128x128 at once need more than all registers of a program, beyond the model's sizes"
_STAGES = "three stages at D = 64: with two it is 28"
# (kernel, architecture or case) -> (how many spilling instructions are accepted, why)
SPILLS_ALLOWED: dict[tuple[str, int | str], tuple[int, str]] = {
    ("_attention_fwd_kernel", "cross 256x2048 fp16 online"): (5, _STAGES),
    ("_attention_fwd_kernel", "cross 256x2048 bf16 online"): (5, _STAGES),
    ("_attention_fwd_kernel", "cross 256x4096 bf16 split"): (4, "a chunk's end, on sm_90"),
    ("_sinkhorn_large_bwd_kernel", 86): (2, _LARGE),
    ("_sinkhorn_large_bwd_kernel", 89): (2, _LARGE),
    ("_sinkhorn_bwd_kernel", "128x128"): (520, _TILE_128),
    ("_sinkhorn_bwd_kernel", "64x128"): (4, "a row vector, once, on sm_100"),
    ("_match_segments_fwd_kernel", "128x128"): (710, _TILE_128),
    ("_match_segments_fwd_kernel", "128x128 exact"): (1600, _TILE_128),
    ("_match_segments_fwd_kernel", "64x64 exact"): (50, "the plan waits beside the gradient's tiles, not in its loop"),
}
