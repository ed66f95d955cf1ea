"""The weights that the kernels of `point_embedding` multiply by, and their gradients taken back to the parameters.

    fold      W1c [J, 128] = [waves | xyz | a column per class: a table's row times its columns of W1 | votes | 0 | b1]
              W2c^T [J, C]; both in the dtype of the products, zeros up to whole blocks
    unfold    dW1 = [xyz | waves | a table's rows times the columns of their classes in dW1c | votes],  db1,
              d table = dW1c^T W1 at the table's classes and columns: partial sums per block of hidden units

The products with tables are sums in float32 in a fixed order, whatever the products of the layers are.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import cdiv, next_power_of_2
from kernels.points_tile import WIDTH, hidden_block, whole_block
from kernels.reduce import sum_segments

# hidden units of a program, warps
UNITS, WARPS = 16, 4
# depth of a product: without matrix units a thread holds whole rows of it in registers
SLICE = tl.constexpr(16)


class FirstLayer(NamedTuple):
    """What the effective first weight is made of, dense."""

    weight1: Tensor
    bias1: Tensor
    label_table: Tensor
    source_table: Tensor
    behind_table: Tensor

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.label_table, self.source_table, self.behind_table

    @property
    def entries(self) -> int:
        """Entries of all tables."""
        return sum(table.numel() for table in self.tables)

    def constants(self, frequencies: int) -> dict[str, Any]:
        """Sizes that the kernels are compiled for."""
        names, embedded = ("LABEL", "SOURCE", "BEHIND"), sum(table.shape[1] for table in self.tables)
        sizes = {f"{name}{part}": size for name, table in zip(names, self.tables, strict=True)
                 for part, size in zip(("S", "_WIDTH"), table.shape, strict=True)}  # fmt: skip
        votes = self.weight1.shape[1] - 3 - 2 * frequencies - embedded
        return sizes | {
            "F": frequencies, "VOTES": votes, "K": self.weight1.shape[1], "WIDTH": WIDTH, "BLOCK_J": UNITS,
            "BLOCK_E": max(int(SLICE), next_power_of_2(embedded)),
        }  # fmt: skip


def empty_weights(features_PK: Tensor, weight2_CJ: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """What `fold_weights` returns, unwritten."""
    C, J = weight2_CJ.shape
    rows = J + -J % hidden_block(features_PK, precision)
    return features_PK.new_empty(rows, WIDTH), features_PK.new_empty(rows, whole_block(C))


def fold_weights(
    features_PK: Tensor, first: FirstLayer, weight2_CJ: Tensor, frequencies: int, precision: str
) -> tuple[Tensor, Tensor]:
    """Return weight1_JK and weight2_JC in the features' dtype, zeros up to whole blocks of rows and columns."""
    weight1_JK, weight2_JC = empty_weights(features_PK, weight2_CJ, precision)
    first, weight2_CJ = FirstLayer(*(x.contiguous() for x in first)), weight2_CJ.contiguous()
    C, J = weight2_CJ.shape
    _point_fold_kernel[(len(weight1_JK) // UNITS,)](
        *first, weight2_CJ, weight1_JK, weight2_JC, J=J, C=C, BLOCK_C=weight2_JC.shape[1],
        **first.constants(frequencies), num_warps=WARPS,
    )  # fmt: skip
    return weight1_JK, weight2_JC


def unfold_gradients(dweight1_JK: Tensor, first: FirstLayer, frequencies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight1, of bias1 and of the three tables, these one after the other in one vector.

    Args:
        dweight1_JK: the gradient of what `fold_weights` made of `first`, float32, perhaps with more rows.
    """
    first = FirstLayer(*(x.contiguous() for x in first))
    dweight1, dbias1 = torch.empty_like(first.weight1), torch.empty_like(first.bias1)
    J, programs = len(dbias1), cdiv(len(dbias1), UNITS)
    partials_SN = dweight1_JK.new_empty(programs, first.entries)
    _point_unfold_kernel[(programs,)](
        dweight1_JK, first.weight1, *first.tables, dweight1, dbias1, partials_SN, J=J,
        **first.constants(frequencies), num_warps=WARPS,
    )  # fmt: skip
    return dweight1, dbias1, sum_segments(partials_SN)


@triton.jit
def _point_fold_kernel(
    weight1_ptr, bias1_ptr, label_ptr, source_ptr, behind_ptr, weight2_ptr, folded1_ptr, folded2_ptr,
    J: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, F: tl.constexpr, VOTES: tl.constexpr, K: tl.constexpr,
    LABELS: tl.constexpr, LABEL_WIDTH: tl.constexpr, SOURCES: tl.constexpr, SOURCE_WIDTH: tl.constexpr,
    BEHINDS: tl.constexpr, BEHIND_WIDTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_j, offs_c = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, WIDTH)
    in_J = offs_j < J
    # columns of classes: <W1, the row of the class>
    folded = tl.zeros([BLOCK_J, WIDTH], tl.float32)
    for e in tl.static_range(0, BLOCK_E, SLICE):
        offs_e = e + tl.arange(0, SLICE)
        inside = in_J[:, None] & (offs_e < LABEL_WIDTH + SOURCE_WIDTH + BEHIND_WIDTH)[None, :]
        w = tl.load(weight1_ptr + offs_j[:, None] * K + (3 + 2 * F + offs_e)[None, :], mask=inside, other=0.0)
        rows = _table_entries(
            label_ptr, source_ptr, behind_ptr, offs_e[:, None], offs_c[None, :] - (2 * F + 3),
            LABELS, LABEL_WIDTH, SOURCES, SOURCE_WIDTH, BEHINDS, BEHIND_WIDTH,
        )  # fmt: skip
        folded = tl.dot(w, rows, folded, input_precision="ieee")
    # columns of W1 as they are
    k = _own_column(offs_c, F, LABELS + SOURCES + BEHINDS, VOTES, K)
    own = tl.load(weight1_ptr + offs_j[:, None] * K + k[None, :], mask=in_J[:, None] & (k >= 0)[None, :], other=0.0)
    bias = tl.load(bias1_ptr + offs_j, mask=in_J, other=0.0)
    folded = tl.where((k >= 0)[None, :], own, folded)
    folded = tl.where((offs_c == WIDTH - 1)[None, :], bias[:, None], folded)
    tl.store(folded1_ptr + offs_j[:, None] * WIDTH + offs_c[None, :], folded.to(folded1_ptr.dtype.element_ty))

    offs_c = tl.arange(0, BLOCK_C)
    inside = (offs_c < C)[:, None] & in_J[None, :]
    w2 = tl.load(weight2_ptr + offs_c[:, None] * J + offs_j[None, :], mask=inside, other=0.0)
    ptrs = folded2_ptr + offs_j[:, None] * BLOCK_C + offs_c[None, :]
    tl.store(ptrs, tl.trans(w2).to(folded2_ptr.dtype.element_ty))


@triton.jit
def _point_unfold_kernel(
    dfolded_ptr, weight1_ptr, label_ptr, source_ptr, behind_ptr, dweight1_ptr, dbias1_ptr, partials_ptr,
    J: tl.constexpr, F: tl.constexpr, VOTES: tl.constexpr, K: tl.constexpr,
    LABELS: tl.constexpr, LABEL_WIDTH: tl.constexpr, SOURCES: tl.constexpr, SOURCE_WIDTH: tl.constexpr,
    BEHINDS: tl.constexpr, BEHIND_WIDTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_j, offs_c = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J), tl.arange(0, WIDTH)
    offs_e = tl.arange(0, BLOCK_E)
    in_J, first = offs_j < J, 2 * F + 3
    dfolded_ptrs = dfolded_ptr + offs_j[:, None] * WIDTH
    dfolded = tl.load(dfolded_ptrs + offs_c[None, :], mask=in_J[:, None], other=0.0)
    # columns of W1 as they are, and b1
    k = _own_column(offs_c, F, LABELS + SOURCES + BEHINDS, VOTES, K)
    w1_rows = offs_j[:, None] * K
    tl.store(dweight1_ptr + w1_rows + k[None, :], dfolded, mask=in_J[:, None] & (k >= 0)[None, :])
    bias_ptrs = tl.broadcast_to((dbias1_ptr + offs_j)[:, None], [BLOCK_J, WIDTH])
    tl.store(bias_ptrs, dfolded, mask=in_J[:, None] & (offs_c == WIDTH - 1)[None, :])

    # columns of W1 that meet a table: sum over classes of dW1c and the table's entries
    dw = tl.zeros([BLOCK_J, BLOCK_E], tl.float32)
    for c in tl.static_range(0, WIDTH, SLICE):
        if c + SLICE > 2 * F + 3 and c < 2 * F + 3 + LABELS + SOURCES + BEHINDS:
            slice_c = c + tl.arange(0, SLICE)
            part = tl.load(dfolded_ptrs + slice_c[None, :], mask=in_J[:, None], other=0.0)
            rows = _table_entries(
                label_ptr, source_ptr, behind_ptr, offs_e[None, :], slice_c[:, None] - first,
                LABELS, LABEL_WIDTH, SOURCES, SOURCE_WIDTH, BEHINDS, BEHIND_WIDTH,
            )  # fmt: skip
            dw = tl.dot(part, rows, dw, input_precision="ieee")
    in_E = in_J[:, None] & (offs_e < LABEL_WIDTH + SOURCE_WIDTH + BEHIND_WIDTH)[None, :]
    w1_rows += (3 + 2 * F + offs_e)[None, :]
    tl.store(dweight1_ptr + w1_rows, dw, mask=in_E)

    # d table: sum over hidden units of dW1c and W1
    w = tl.load(weight1_ptr + w1_rows, mask=in_E, other=0.0)
    dtables = tl.dot(tl.trans(dfolded), w, input_precision="ieee")
    c, e = offs_c[:, None] - first, offs_e[None, :]
    partials_ptr += tl.program_id(0) * (LABELS * LABEL_WIDTH + SOURCES * SOURCE_WIDTH + BEHINDS * BEHIND_WIDTH)
    _store_table(partials_ptr, c, e, dtables, LABELS, LABEL_WIDTH)
    partials_ptr += LABELS * LABEL_WIDTH
    _store_table(partials_ptr, c - LABELS, e - LABEL_WIDTH, dtables, SOURCES, SOURCE_WIDTH)
    partials_ptr += SOURCES * SOURCE_WIDTH
    c, e = c - LABELS - SOURCES, e - LABEL_WIDTH - SOURCE_WIDTH
    _store_table(partials_ptr, c, e, dtables, BEHINDS, BEHIND_WIDTH)


@triton.jit
def _own_column(offs_c, F: tl.constexpr, CLASSES: tl.constexpr, VOTES: tl.constexpr, K: tl.constexpr):
    """The column of W1 that stands in a column of the features as it is; -1 where there is none."""
    votes: tl.constexpr = 2 * F + 3 + CLASSES
    k = tl.where(offs_c < 2 * F, offs_c + 3, offs_c - 2 * F)
    k = tl.where(offs_c < 2 * F + 3, k, -1)
    return tl.where((offs_c >= votes) & (offs_c < votes + VOTES), offs_c - votes + (K - VOTES), k)


@triton.jit
def _table_entries(
    label_ptr, source_ptr, behind_ptr, e, c,
    LABELS: tl.constexpr, LABEL_WIDTH: tl.constexpr, SOURCES: tl.constexpr, SOURCE_WIDTH: tl.constexpr,
    BEHINDS: tl.constexpr, BEHIND_WIDTH: tl.constexpr,
):  # fmt: skip
    """Column e of row c of the three tables, laid along a diagonal with zeros beside it."""
    entries = tl.load(label_ptr + c * LABEL_WIDTH + e, mask=_in_table(c, e, LABELS, LABEL_WIDTH), other=0.0)
    c, e = c - LABELS, e - LABEL_WIDTH
    entries += tl.load(source_ptr + c * SOURCE_WIDTH + e, mask=_in_table(c, e, SOURCES, SOURCE_WIDTH), other=0.0)
    c, e = c - SOURCES, e - SOURCE_WIDTH
    return entries + tl.load(behind_ptr + c * BEHIND_WIDTH + e, mask=_in_table(c, e, BEHINDS, BEHIND_WIDTH), other=0.0)


@triton.jit
def _store_table(ptr, c, e, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(ptr + c * COLUMNS + e, values, mask=_in_table(c, e, ROWS, COLUMNS))


@triton.jit
def _in_table(c, e, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (c >= 0) & (c < ROWS) & (e >= 0) & (e < COLUMNS)
