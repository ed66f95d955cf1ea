"""Points of a labelled cloud to the rows a Perceiver reads: features, Linear, GELU, Linear, RMSNorm.

    memory = RMSNorm(W2 GELU(W1 [xyz | sin p | cos p | label | source | behind | votes] + b1) + b2) gain,
    p = 2 pi xyz frequencies^T,  RMSNorm(y) = y / sqrt(mean y^2 + eps), eps of float32

The kernels never hold the hidden layer, and no gradient is scattered: a table's row times its columns of W1 is a column
of an effective first weight [J, 128] that meets one-hot features, b1 the column that meets a constant 1. That weight is
made in float32 by `kernels.points_weights`, which takes its gradient back to W1, b1 and the tables.

Shapes in names: B items, T points, P = B T points of all items, F frequencies, K columns of features, J hidden units,
C channels.
"""

import torch

from kernels.dispatch import require_tensors, require_tensors_or_none, resolve, values_are_readable
from kernels.points_backward import point_layers_backward
from kernels.points_eager import folded_features, point_features, point_layers
from kernels.points_forward import empty_outputs, point_features_triton, point_layers_forward
from kernels.points_tile import ROWS, WIDTH
from kernels.points_weights import FirstLayer, empty_weights, fold_weights, unfold_gradients
from kernels.registration import operator

PRECISIONS = ("bf16", "tf32", "ieee")
MAX_CHANNELS = 256


def point_embedding(
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
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    gain: torch.Tensor,
    point_count_B: torch.Tensor | None = None,
    precision: str = "tf32",
    impl: str = "auto",
) -> torch.Tensor:
    """Embed labelled points.

        RMSNorm(W2 GELU(W1 [xyz | sin p | cos p | label | source | behind | votes] + b1) + b2) gain,
        p = 2 pi xyz frequencies^T

    Args:
        xyz_BT3: coordinates, float32, or float64 where the eager form runs; the dtype of all floating arguments.
        class_id_BT, source_BT, behind_BT: integers, rows of the three tables; outside of a table a row is 0.
        votes_BT2: two more features; None leaves them out.
        frequencies_F3: cycles per unit of a coordinate.
        label_table, source_table, behind_table: [classes, width] each; the kernels hold 128 columns, in which
            3 + 2 F + classes + votes + 1 must fit.
        weight1, bias1, weight2, bias2, gain: [J, K], [J], [C, J], [C], [C]; the kernels take C to 256.
        point_count_B: integers in [0, T]: the first points of an item that count. On a GPU they are clamped. Points
            that do not count may hold anything, also NaN; None: every point counts.
        precision: of the products: "bf16" (sums in float32), or of float32 products on a GPU "tf32" or "ieee".
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.

    Returns:
        memory_BTC; 0, without gradients, for points that do not count. With "bf16" it is bfloat16 from the kernels, and
        float32 from the eager form, which is then autocast of each layer.

    Raises:
        ValueError: a shape, dtype, device, count or option outside of the above; a gradient of xyz, votes or
            frequencies asked of the kernels, which have none.

    Determinism: repeats bit for bit. Triton: a point's bits do not depend on the batch, its neighbours or padding;
        gradients are sums over segments of fixed length.
    Source: Tancik et al. 2020, Fourier Features; Hendrycks and Gimpel 2016, GELU; Zhang and Sennrich 2019, RMSNorm.
    """
    points = (xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2)
    tables, layers = (frequencies_F3, label_table, source_table, behind_table), (weight1, bias1, weight2, bias2, gain)
    _check_points(*points, point_count_B)
    _check_weights(*tables, *layers, xyz_BT3, votes_BT2)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if resolve(impl, xyz_BT3.device) == "eager":
        return _eager(points, tables, layers, point_count_B, precision, folded=True)
    _check_for_kernels(xyz_BT3, votes_BT2, tables, gain)
    return _triton(points, tables, layers, point_count_B, precision)


def point_embedding_reference(
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
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    gain: torch.Tensor,
    point_count_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning of `point_embedding`, in plain PyTorch; in float64 the truth."""
    points = (xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2)
    tables = (frequencies_F3, label_table, source_table, behind_table)
    return _eager(points, tables, (weight1, bias1, weight2, bias2, gain), point_count_B, None, folded=False)


def _eager(points, tables, layers, point_count_B, precision: str | None, *, folded: bool) -> torch.Tensor:
    xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2 = points
    absent_BT1 = None
    T = xyz_BT3.shape[1]
    if point_count_B is not None and not (values_are_readable(point_count_B) and bool((point_count_B >= T).all())):
        absent_BT1 = (torch.arange(T, device=xyz_BT3.device) >= point_count_B[:, None]).unsqueeze(-1)
        xyz_BT3 = xyz_BT3.masked_fill(absent_BT1, 0)
        votes_BT2 = None if votes_BT2 is None else votes_BT2.masked_fill(absent_BT1, 0)
    names = ("frequencies_F3", "label_table", "source_table", "behind_table")
    device = xyz_BT3.device.type
    with torch.autocast(device, enabled=False):
        points = (xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2)
        if folded:
            features_BTK, weight1 = folded_features(points, tables, layers[0])
            layers = (weight1, *layers[1:])
        else:
            features_BTK = point_features(*points, **dict(zip(names, tables, strict=True)))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        memory_BTC = point_layers(features_BTK, *layers, plain=precision is None)
    return memory_BTC if absent_BT1 is None else memory_BTC.masked_fill(absent_BT1, 0)


def _triton(points, tables, layers, point_count_B, precision: str) -> torch.Tensor:
    (B, T, _), (frequencies_F3, *embedded) = points[0].shape, tables
    weight1, bias1, *others = layers
    with torch.autocast(points[0].device.type, enabled=False):
        classes = [len(table) for table in embedded]
        features_PK = _features(*points, frequencies_F3, point_count_B, classes, precision)
        parameters, sizes = (weight1, bias1, *embedded, *others), (len(frequencies_F3), B, T)
        memory_PC, *_ = _forward(features_PK, *parameters, point_count_B, *sizes, precision)
        return memory_PC.view(B, T, len(others[-1]))


@operator("ridgeline::point_features")
def _features(
    xyz_BT3: torch.Tensor,
    class_id_BT: torch.Tensor,
    source_BT: torch.Tensor,
    behind_BT: torch.Tensor,
    votes_BT2: torch.Tensor | None,
    frequencies_F3: torch.Tensor,
    point_count_B: torch.Tensor | None,
    classes: list[int],
    precision: str,
) -> torch.Tensor:
    """The columns of all points, [P, 128] and rows of zeros to a whole block."""
    points, dtype = (xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2), _product_dtype(precision)
    return point_features_triton(*points, frequencies_F3, point_count_B, classes, dtype)


@_features.register_fake
def _(xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2, frequencies_F3, point_count_B, classes, precision):
    B, T, _ = xyz_BT3.shape
    return xyz_BT3.new_empty(-(-B * T // ROWS) * ROWS, WIDTH, dtype=_product_dtype(precision))


@operator("ridgeline::point_layers_forward")
def _forward(
    features_PK: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    label_table: torch.Tensor,
    source_table: torch.Tensor,
    behind_table: torch.Tensor,
    weight2_CJ: torch.Tensor,
    bias2_C: torch.Tensor,
    gain_C: torch.Tensor,
    point_count_B: torch.Tensor | None,
    frequencies: int,
    items: int,
    points_each: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """memory_PC, and what the backward needs: rows normalised but without the gain, inverse norms, folded weights."""
    first = FirstLayer(weight1, bias1, label_table, source_table, behind_table)
    weights = fold_weights(features_PK, first, weight2_CJ, frequencies, precision)
    return *point_layers_forward(features_PK, *weights, bias2_C, gain_C, items * points_each, precision), *weights


@_forward.register_fake
def _(features_PK, weight1, bias1, label, source, behind, weight2_CJ, bias2, gain_C, counts, F, B, T, precision):
    outputs = empty_outputs(features_PK, gain_C, B * T)
    return *outputs, *empty_weights(features_PK, weight2_CJ, precision)


@operator("ridgeline::point_layers_backward")
def _backward(
    dmemory_PC: torch.Tensor,
    features_PK: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    label_table: torch.Tensor,
    source_table: torch.Tensor,
    behind_table: torch.Tensor,
    gain_C: torch.Tensor,
    unit_PC: torch.Tensor,
    rinv_P: torch.Tensor,
    weight1_JK: torch.Tensor,
    weight2_JC: torch.Tensor,
    point_count_B: torch.Tensor | None,
    frequencies: int,
    points_each: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight1, bias1, the three tables as one vector, weight2, and of gain and bias2 as [2, C]."""
    first, C = FirstLayer(weight1, bias1, label_table, source_table, behind_table), len(gain_C)
    if not len(dmemory_PC):
        others = weight1.new_zeros(first.entries), weight1.new_zeros(C, len(bias1)), weight1.new_zeros(2, C)
        return torch.zeros_like(weight1), torch.zeros_like(bias1), *others
    tensors = (dmemory_PC, features_PK, weight1_JK, weight2_JC, gain_C, unit_PC, rinv_P, point_count_B)
    dweight1_JK, dweight2_CJ, dvectors_2C = point_layers_backward(*tensors, len(bias1), points_each, precision)
    return *unfold_gradients(dweight1_JK, first, frequencies), dweight2_CJ, dvectors_2C


@_backward.register_fake
def _(dmemory_PC, features_PK, weight1, bias1, label, source, behind, gain_C, *rest):
    C, entries = len(gain_C), FirstLayer(weight1, bias1, label, source, behind).entries
    shapes = (weight1.shape, bias1.shape, (entries,), (C, len(bias1)), (2, C))
    return tuple(weight1.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output):
    features_PK, *first, _, _, gain_C, point_count_B, ctx.frequencies, _, ctx.points_each, ctx.precision = inputs
    # what is kept for the backward has no gradients, not tensors of zeros
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features_PK, *first, gain_C, *output[1:], point_count_B)


def _gradients(ctx, dmemory_PC, *_):
    settings = (ctx.frequencies, ctx.points_each, ctx.precision)
    dweight1, dbias1, dtables, dweight2, (dgain, dbias2) = _backward(dmemory_PC, *ctx.saved_tensors, *settings)
    # parts of one vector, side by side: each is dense and none overlaps another
    tables = ctx.saved_tensors[3:6]
    parts = dtables.split([table.numel() for table in tables])
    dtables = [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
    return (None, dweight1, dbias1, *dtables, dweight2, dbias2, dgain, *[None] * 5)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _product_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _check_points(xyz_BT3, class_id_BT, source_BT, behind_BT, votes_BT2, point_count_B) -> None:
    """Refuse points that do not fit each other, and counts out of range where values may be read."""
    require_tensors(xyz=xyz_BT3, class_id=class_id_BT, source=source_BT, behind=behind_BT)
    require_tensors_or_none(votes=votes_BT2, point_count=point_count_B)
    if xyz_BT3.dim() != 3 or xyz_BT3.shape[2] != 3:
        raise ValueError(f"xyz must be [B, T, 3], got shape {tuple(xyz_BT3.shape)}")
    B, T, _ = xyz_BT3.shape
    if xyz_BT3.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"xyz must be float32 or float64, got {xyz_BT3.dtype}")
    for name, index_BT in (("class_id", class_id_BT), ("source", source_BT), ("behind", behind_BT)):
        integer = not (index_BT.is_floating_point() or index_BT.is_complex()) and index_BT.dtype != torch.bool
        if index_BT.shape != (B, T) or not integer:
            raise ValueError(
                f"{name} must be [{B}, {T}] of integers, got shape {tuple(index_BT.shape)}, {index_BT.dtype}"
            )
        if index_BT.device != xyz_BT3.device:
            raise ValueError(f"{name} must be on the device of xyz, {xyz_BT3.device}, got {index_BT.device}")
    if votes_BT2 is not None and (votes_BT2.shape != (B, T, 2) or not votes_BT2.is_floating_point()):
        raise ValueError(
            f"votes must be [{B}, {T}, 2] and floating point, got shape {tuple(votes_BT2.shape)}, {votes_BT2.dtype}"
        )
    if point_count_B is not None:
        if point_count_B.shape != (B,) or point_count_B.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"point_count must be [{B}] of int32 or int64, got shape {tuple(point_count_B.shape)}, "
                f"{point_count_B.dtype}"
            )
        if point_count_B.device != xyz_BT3.device:
            raise ValueError(f"point_count must be on the device of xyz, {xyz_BT3.device}, got {point_count_B.device}")
        if B and values_are_readable(point_count_B):
            low, high = (int(value) for value in point_count_B.aminmax())
            if low < 0 or high > T:
                raise ValueError(f"point_count must be in [0, {T}], got {low} to {high}")


def _check_weights(
    frequencies_F3, label_table, source_table, behind_table, weight1, bias1, weight2, bias2, gain, xyz_BT3, votes_BT2
) -> None:
    """Refuse weights that do not fit each other or the points."""
    tables = {"label_table": label_table, "source_table": source_table, "behind_table": behind_table}
    layers = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "gain": gain}
    require_tensors(frequencies=frequencies_F3, **tables, **layers)
    if frequencies_F3.dim() != 2 or frequencies_F3.shape[1] != 3:
        raise ValueError(f"frequencies must be [F, 3], got shape {tuple(frequencies_F3.shape)}")
    for name, table in tables.items():
        if table.dim() != 2 or not len(table):
            raise ValueError(f"{name} must be [classes, width] with a class at least, got shape {tuple(table.shape)}")
    for name, vector in (("bias1", bias1), ("gain", gain)):
        if vector.dim() != 1:
            raise ValueError(f"{name} must be a vector, got shape {tuple(vector.shape)}")
    votes = 0 if votes_BT2 is None else 2
    K = 3 + 2 * len(frequencies_F3) + sum(table.shape[1] for table in tables.values()) + votes
    J, C = len(bias1), len(gain)
    shapes = {"weight1": (J, K), "bias1": (J,), "weight2": (C, J), "bias2": (C,), "gain": (C,)}
    for name, tensor in layers.items():
        shape = shapes[name]
        if tensor.shape != shape or not tensor.numel():
            raise ValueError(f"{name} must be {list(shape)} and not empty, got shape {tuple(tensor.shape)}")
    for name, tensor in {"votes": votes_BT2, "frequencies": frequencies_F3, **tables, **layers}.items():
        if tensor is not None and (tensor.dtype != xyz_BT3.dtype or tensor.device != xyz_BT3.device):
            raise ValueError(
                f"{name} must have the dtype and device of xyz, {xyz_BT3.dtype} on {xyz_BT3.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _check_for_kernels(xyz_BT3, votes_BT2, tables, gain_C) -> None:
    """Refuse what the eager form takes and the kernels do not."""
    if xyz_BT3.dtype == torch.float64:
        raise ValueError("float64 must have impl='eager', got impl='triton'")
    frequencies_F3, *embedded = tables
    columns = 3 + 2 * len(frequencies_F3) + sum(map(len, embedded)) + (0 if votes_BT2 is None else 2) + 1
    if columns > WIDTH:
        raise ValueError(f"3 + 2 F + classes + votes + 1 must be at most {WIDTH} for the kernels, got {columns}")
    if len(gain_C) > MAX_CHANNELS:
        raise ValueError(f"gain must have at most {MAX_CHANNELS} channels for the kernels, got {len(gain_C)}")
    for name, tensor in (("xyz", xyz_BT3), ("votes", votes_BT2), ("frequencies", frequencies_F3)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient of the kernels, got requires_grad=True")
