"""The eager form of `point_embedding`: a point's features side by side, then the layers, one after the other."""

import math

import torch
from torch.nn import functional

from kernels.rms_norm import EPS, rms_norm


def point_features(
    xyz_BT3: torch.Tensor,
    class_id_BT: torch.Tensor,
    source_BT: torch.Tensor,
    behind_BT: torch.Tensor,
    votes_BT2: torch.Tensor | None = None,
    *,
    frequencies_F3: torch.Tensor,
    label_table: torch.Tensor,
    source_table: torch.Tensor,
    behind_table: torch.Tensor,
) -> torch.Tensor:
    """Return [xyz 3 | sin p F, cos p F | label | source | behind | votes 2] with p = 2 pi xyz frequencies^T."""
    parts = [
        xyz_BT3,
        _waves(xyz_BT3, frequencies_F3),
        _rows_of(label_table, class_id_BT),
        _rows_of(source_table, source_BT),
        _rows_of(behind_table, behind_BT),
    ]
    if votes_BT2 is not None:
        parts.append(votes_BT2)
    return torch.cat(parts, dim=-1)


def folded_features(points, tables, weight1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [xyz | sin p, cos p | one-hot label, source, behind | votes] and the first layer's weight for them.

    A table's rows times its columns of weight1 are the columns of its classes: the features have no gradient, and the
    gradient of a table is a product of weights.
    """
    (xyz_BT3, *indices, votes_BT2), (frequencies_F3, *tables) = points, tables
    widths = [3 + 2 * len(frequencies_F3), *(table.shape[1] for table in tables)]
    first, *embedded, last = weight1.split([*widths, weight1.shape[1] - sum(widths)], dim=1)
    folded = [part @ table.T for part, table in zip(embedded, tables, strict=True)]
    one_hot = [_one_hot(index, table) for index, table in zip(indices, tables, strict=True)]
    votes = [] if votes_BT2 is None else [votes_BT2]
    features_BTK = torch.cat([xyz_BT3, _waves(xyz_BT3, frequencies_F3), *one_hot, *votes], dim=-1)
    return features_BTK, torch.cat([first, *folded, last], dim=1)


def point_layers(features_BTK, weight1, bias1, weight2, bias2, gain, *, plain: bool) -> torch.Tensor:
    """RMSNorm(W2 GELU(W1 features + b1) + b2) gain, the norm in float32 at least and, where plain, PyTorch's own."""
    hidden_BTJ = functional.gelu(functional.linear(features_BTK, weight1, bias1))
    y_BTC = functional.linear(hidden_BTJ, weight2, bias2)
    y_BTC = y_BTC.to(torch.promote_types(y_BTC.dtype, torch.float32))
    return functional.rms_norm(y_BTC, gain.shape, gain, EPS) if plain else rms_norm(y_BTC, gain)


def _waves(xyz_BT3: torch.Tensor, frequencies_F3: torch.Tensor) -> torch.Tensor:
    # sums of products, not a matrix product: at 10 cycles a unit, TF32 or bf16 would lose the phase
    x_BT1, y_BT1, z_BT1 = xyz_BT3.split(1, dim=-1)
    x_F, y_F, z_F = frequencies_F3.unbind(1)
    phase_BTF = 2 * math.pi * (x_BT1 * x_F + y_BT1 * y_F + z_BT1 * z_F)
    return torch.cat([phase_BTF.sin(), phase_BTF.cos()], dim=-1)


def _rows_of(table_KC: torch.Tensor, index_BT: torch.Tensor) -> torch.Tensor:
    """Look rows up by a one-hot product: its gradient is a matrix product, where an index would scatter."""
    return _one_hot(index_BT, table_KC) @ table_KC


def _one_hot(index_BT: torch.Tensor, table_KC: torch.Tensor) -> torch.Tensor:
    K, dtype = len(table_KC), index_BT.dtype
    # in the narrow type where it counts as far as the classes
    dtype = dtype if torch.iinfo(dtype).max >= K - 1 else torch.int64
    classes = torch.arange(K, device=index_BT.device, dtype=dtype)
    return (index_BT[..., None] == classes).to(table_KC.dtype)
