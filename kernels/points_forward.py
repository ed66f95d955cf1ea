"""Triton forward of `point_embedding`: the features in one launch, then all layers of a block of points in one program.

A point's features are 128 columns in the dtype of the products, so that one product has them all:

    [sin F | cos F | xyz 3 | one-hot label | one-hot source | one-hot behind | votes 2 | 0 ... | 1]

The rows of a point that does not count are 0, also the last column; the rows end at a multiple of `ROWS`.

The layers walk the hidden units in blocks and keep none of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv
from kernels.points_tile import ROWS, WIDTH, add_gelu_products, launch_options, store_tile, whole_block
from kernels.rms_norm import EPS

FEATURE_ROWS, FEATURE_COLUMNS = 32, 32


def point_features_triton(
    xyz_BT3: Tensor,
    class_id_BT: Tensor,
    source_BT: Tensor,
    behind_BT: Tensor,
    votes_BT2: Tensor | None,
    frequencies_F3: Tensor,
    point_count_B: Tensor | None,
    classes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Return features_PK, its rows padded."""
    B, T, _ = xyz_BT3.shape
    features_PK = xyz_BT3.new_empty(cdiv(B * T, ROWS) * ROWS, WIDTH, dtype=dtype)
    if not len(features_PK):
        return features_PK
    labels, sources, behinds = classes
    votes = None if votes_BT2 is None else votes_BT2.contiguous()
    counts = None if point_count_B is None else point_count_B.contiguous()
    inputs = [x.contiguous() for x in (xyz_BT3, class_id_BT, source_BT, behind_BT)]
    _point_features_kernel[(len(features_PK) // FEATURE_ROWS,)](
        *inputs, votes, frequencies_F3.contiguous(), counts, features_PK, B * T, T, F=len(frequencies_F3),
        LABELS=labels, SOURCES=sources, BEHINDS=behinds, WIDTH=WIDTH, BLOCK_P=FEATURE_ROWS, BLOCK_K=FEATURE_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return features_PK


def point_layers_forward(features_PK, weight1_JK, weight2_JC, bias2_C, gain_C, points: int, precision: str):
    """Return memory_PC, and what the backward needs: the normalised rows before the gain, and the inverse norms.

    Of a point that does not count the row is 0 and the inverse norm -1.

    The weights are those of `kernels.points_weights.fold_weights`.
    """
    memory_PC, unit_PC, rinv_P = empty_outputs(features_PK, gain_C, points)
    rows = len(features_PK)
    if not rows:
        return memory_PC, unit_PC, rinv_P
    J, BLOCK_C = weight2_JC.shape
    options = launch_options("forward", features_PK, precision)
    _point_layers_fwd_kernel[(rows // options["BLOCK_P"],)](
        features_PK, weight1_JK, weight2_JC, bias2_C.contiguous(), gain_C.contiguous(), memory_PC, unit_PC, rinv_P,
        points, EPS, C=len(gain_C), J=J, WIDTH=WIDTH, BLOCK_C=BLOCK_C, **options,
    )  # fmt: skip
    return memory_PC, unit_PC, rinv_P


def empty_outputs(features_PK: Tensor, gain_C: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `point_layers_forward` returns, unwritten; what only kernels read has whole blocks of rows and columns."""
    C, rows = len(gain_C), len(features_PK)
    unit_PC = features_PK.new_empty(rows, whole_block(C))
    return features_PK.new_empty(points, C), unit_PC, features_PK.new_empty(rows, dtype=torch.float32)


@triton.jit(do_not_specialize=["P", "T"])
def _point_features_kernel(
    xyz_ptr, class_ptr, source_ptr, behind_ptr, votes_ptr, frequency_ptr, count_ptr, features_ptr, P, T,
    F: tl.constexpr, LABELS: tl.constexpr, SOURCES: tl.constexpr, BEHINDS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    counts = offs_p < P
    if count_ptr is not None:
        item = offs_p // T
        counts = counts & (offs_p - item * T < tl.load(count_ptr + item, mask=counts, other=0))
    x = _column(xyz_ptr, 3 * offs_p, counts)
    y = _column(xyz_ptr, 3 * offs_p + 1, counts)
    z = _column(xyz_ptr, 3 * offs_p + 2, counts)
    # rows of the one-hot columns; a class outside of its table has none
    label = _class_column(class_ptr + offs_p, counts, 2 * F + 3, LABELS)
    source = _class_column(source_ptr + offs_p, counts, 2 * F + 3 + LABELS, SOURCES)
    behind = _class_column(behind_ptr + offs_p, counts, 2 * F + 3 + LABELS + SOURCES, BEHINDS)
    votes: tl.constexpr = 2 * F + 3 + LABELS + SOURCES + BEHINDS
    for first in tl.static_range(0, WIDTH, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        value = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        if first < 2 * F:
            # sin p, cos p with p = 2 pi xyz frequencies^T, in turns
            is_sin, is_wave = offs_k < F, offs_k < 2 * F
            frequency = frequency_ptr + 3 * tl.where(is_sin, offs_k, offs_k - F)
            turns = x * tl.load(frequency, mask=is_wave, other=0.0)[None, :]
            turns += y * tl.load(frequency + 1, mask=is_wave, other=0.0)[None, :]
            turns += z * tl.load(frequency + 2, mask=is_wave, other=0.0)[None, :]
            value = tl.where(counts[:, None] & is_wave[None, :], _cos_turns(turns, is_sin), value)
        if first + BLOCK_K > 2 * F:
            value = tl.where((offs_k == 2 * F)[None, :], x, value)
            value = tl.where((offs_k == 2 * F + 1)[None, :], y, value)
            value = tl.where((offs_k == 2 * F + 2)[None, :], z, value)
            hit = (offs_k[None, :] == label) | (offs_k[None, :] == source) | (offs_k[None, :] == behind)
            hit = hit | ((offs_k == WIDTH - 1)[None, :] & counts[:, None])
            value = tl.where(hit, 1.0, value)
            if votes_ptr is not None:
                value = tl.where((offs_k == votes)[None, :], _column(votes_ptr, 2 * offs_p, counts), value)
                value = tl.where((offs_k == votes + 1)[None, :], _column(votes_ptr, 2 * offs_p + 1, counts), value)
        ptrs = features_ptr + offs_p[:, None] * WIDTH + offs_k[None, :]
        tl.store(ptrs, value.to(features_ptr.dtype.element_ty))


@triton.jit
def _column(ptr, offs, counts):
    return tl.load(ptr + offs, mask=counts, other=0.0)[:, None]


@triton.jit
def _class_column(index_ptr, counts, first, CLASSES: tl.constexpr):
    """The column of each point's class; -1 for a class outside of its table and a point that does not count."""
    index = tl.load(index_ptr, mask=counts, other=CLASSES)
    return tl.where((index >= 0) & (index < CLASSES), first + index.to(tl.int32), -1)[:, None]


@triton.jit
def _cos_turns(turns, is_sin):
    """cos, or where is_sin the sine, of an angle in turns, to 3e-9 beside the rounding of the turns."""
    u = turns - tl.floor(turns + 0.5) - tl.where(is_sin, 0.25, 0.0)[None, :]
    # cos 2 pi u = sin 2 pi s with s in [-1/4, 1/4], for u in [-3/4, 1/2]
    s = tl.abs(tl.abs(u) - 0.5) - 0.25
    ss = s * s
    p = ss * 39.5367060496682 - 76.54978229110549
    p = p * ss + 81.60100407313466
    p = p * ss - 41.34165503141392
    return s * (p * ss + 6.283185160089477)


@triton.jit(do_not_specialize=["P"])
def _point_layers_fwd_kernel(
    features_ptr, weight1_ptr, weight2_ptr, bias2_ptr, gain_ptr, memory_ptr, unit_ptr, rinv_ptr, P, eps,
    C: tl.constexpr, J: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P
    # the ones of the points that count; a block without any needs no sums
    ones = features_ptr + (tl.cast(p, tl.int64) + tl.arange(0, BLOCK_P)) * WIDTH + (WIDTH - 1)
    end = tl.where(tl.max(tl.load(ones).to(tl.float32), 0) > 0, J, 0)

    # y = W2 gelu(W1 F) + b2
    offs_c = tl.arange(0, BLOCK_C)
    in_C = offs_c < C
    bias2 = tl.load(bias2_ptr + offs_c, mask=in_C, other=0.0)
    y = tl.broadcast_to(bias2[None, :], [BLOCK_P, BLOCK_C])
    y = add_gelu_products(
        y, features_ptr, p, weight1_ptr, weight2_ptr, 0, end, J, WIDTH, BLOCK_C, PRECISION, BLOCK_P, BLOCK_J
    )  # fmt: skip

    # unit = y / sqrt(mean y^2 + eps),  memory = unit gain
    counts = tl.load(ones) > 0
    rinv = tl.where(counts, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y * y, 1) / C + eps)), -1.0)
    unit = tl.where(counts[:, None], y * rinv[:, None], 0.0)
    gain = tl.load(gain_ptr + offs_c, mask=in_C, other=0.0)
    offs_p = p + tl.arange(0, BLOCK_P)
    tl.store(rinv_ptr + offs_p, rinv)
    store_tile(unit_ptr, p, BLOCK_C, None, unit)
    store_tile(memory_ptr, p, C, (offs_p < P)[:, None] & in_C[None, :], unit * gain[None, :])
