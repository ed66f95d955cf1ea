"""Philox inside a Triton kernel: the dropout mask of `kernels.philox.dropout_keep`, bit for bit.

One call of the generator serves eight elements. Where a row begins at a multiple of eight the words are computed on a
tile of an eighth of its width and spread over it; other widths compute the words of each element.
"""

import triton
import triton.language as tl


def signed_seed(seed: int) -> int:
    """The 64 bits of a seed as an int64, which is what the schema of an operator takes."""
    return seed - (1 << 64) if seed >> 63 else seed


def seed_words(seed: int) -> tuple[int, int]:
    """Both halves of the 64 bits of a seed, as the int32 that `joined_seed` takes: low, high."""
    low, high = ((seed >> shift) & 0xFFFFFFFF for shift in (0, 32))
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def kernel_draws(rate: float, seed: int, place: int) -> tuple[int, int, int, int, float]:
    """The scalars of a launch: both halves of the seed as int32, place, threshold of a lane, scale of what is kept."""
    return *seed_words(seed), place, round(65536 * rate), 1 / (1 - rate)


@triton.jit
def joined_seed(low, high):
    """The key of 64 bits whose halves are the int32 words of `seed_words`."""
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True)


@triton.jit
def dropout_rows(
    step_ptr, scene_ptr, seed_low, seed_high, place, threshold, b, t, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Which elements of rows t of the items b are kept: bool [rows, BLOCK_C], whatever it says past C."""
    seed = joined_seed(seed_low, seed_high)
    step = tl.load(step_ptr).to(tl.uint32)
    scene = tl.load(scene_ptr + b).to(tl.uint32)[:, None]
    place = place.to(tl.uint32)
    if C % 8 == 0:
        counter = (t * (C // 8))[:, None] + tl.arange(0, BLOCK_C // 8)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), place, step, scene)
        # element 8 j + 2 w + half of a scene is that half of word w of counter j
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        lanes = tl.interleave(words & 0xFFFF, words >> 16)
    else:
        element = (t * C)[:, None] + tl.arange(0, BLOCK_C)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, (element // 8).to(tl.uint32), place, step, scene)
        w = element % 8 // 2
        word = tl.where(w < 2, tl.where(w == 0, w0, w1), tl.where(w == 2, w2, w3))
        lanes = tl.where(element % 2 == 0, word & 0xFFFF, word >> 16)
    return lanes.to(tl.int32) >= threshold
