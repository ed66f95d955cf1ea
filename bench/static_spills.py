"""What spills, and why that is accepted."""

# (kernel, architecture or case) -> (how many spilling instructions are accepted, why)
_LARGE = "one store and one load in its first half-step, beyond the model's sizes"
_TILE_128 = "tiles of 128x128 at once need more than all registers of a program, beyond the model's sizes"
SPILLS_ALLOWED: dict[tuple[str, int | str], tuple[int, str]] = {
    ("_sinkhorn_large_bwd_kernel", 86): (2, _LARGE),
    ("_sinkhorn_large_bwd_kernel", 89): (2, _LARGE),
    ("_sinkhorn_bwd_kernel", "128x128"): (500, _TILE_128),
    ("_sinkhorn_bwd_kernel", "64x128"): (4, "a row vector, once, on sm_100"),
    ("_match_segments_fwd_kernel", "128x128"): (700, _TILE_128),
    ("_match_segments_fwd_kernel", "128x128 exact"): (1500, _TILE_128),
    ("_match_segments_fwd_kernel", "64x64 exact"): (40, "the plan waits beside the gradient's tiles, not in its loop"),
}
