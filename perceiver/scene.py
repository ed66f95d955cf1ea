"""One row of the challenge's sampled sets, validated; and a batch of rows as tensors.

A row is `order_id` and `data`, the bytes of an uncompressed `.npz`. World coordinates are metres with Y up;
normalised ones are `(world - center) / scale`.

The alphabet of shapes used in all names of this repository:

    B batch      T points           L latents           C channels       S keys of an attention
    H query heads   G key/value heads   D head width
    N predicted segments   M true segments (padded)   E edges   V vertices
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from kernels.gather import gather_rows
from kernels.philox import name_key

MAX_SEGMENTS = 64
POINT_CLASSES = 13
BEHIND_CLASSES = 29
# of normalised coordinates: the centre of a house is 0, its size about 1; rounding of metres far from 0 is less
_WIDEST, _SAME_PLACE = 2, 0.01

# field -> (dtype, shape); a letter is a size that must agree between fields
_SCHEMA: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "xyz_norm": ("float32", ("T", 3)),
    "class_id": ("uint8", ("T",)),
    "source": ("uint8", ("T",)),
    "mask": ("bool", ("T",)),
    "gt_segments": ("float32", ("E", 2, 3)),
    "gt_vertices": ("float32", ("V", 3)),
    "gt_edges": ("int32", ("E", 2)),
    "center": ("float32", (3,)),
    "scale": ("float32", ()),
    "visible_src": ("uint8", ("T",)),
    "visible_id": ("int16", ("T",)),
    "behind": ("int16", ("T",)),
    "n_views_voted": ("uint8", ("T",)),
    "vote_frac": ("float32", ("T",)),
    "gt_edge_classes": ("int64", ("E",)),
}
_OPTIONAL = frozenset({"behind", "n_views_voted", "vote_frac", "gt_edge_classes"})
_TRUTH = frozenset({"gt_segments", "gt_vertices", "gt_edges", "gt_edge_classes"})


class RowError(ValueError):
    """A row that cannot be used: says which one, which field, and why."""

    def __init__(self, order_id: str, field: str, reason: str):
        super().__init__(f"row {order_id!r}: field {field!r} {reason}")
        self.order_id, self.field, self.reason = order_id, field, reason

    def __reduce__(self):
        return type(self), (self.order_id, self.field, self.reason)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One validated row; the fields are those of the hub's schema.

    Valid points are the prefix where `mask` is set. `gt_segments` is normalised and without canonical endpoint
    order, `gt_vertices` is in metres. A scene of a test set has no ground truth: the `gt_*` fields are None.
    """

    order_id: str
    xyz_norm: np.ndarray
    class_id: np.ndarray
    source: np.ndarray
    mask: np.ndarray
    center: np.ndarray
    scale: np.ndarray
    visible_src: np.ndarray
    visible_id: np.ndarray
    gt_segments: np.ndarray | None = None
    gt_vertices: np.ndarray | None = None
    gt_edges: np.ndarray | None = None
    behind: np.ndarray | None = None
    n_views_voted: np.ndarray | None = None
    vote_frac: np.ndarray | None = None
    gt_edge_classes: np.ndarray | None = None

    @property
    def point_count(self) -> int:
        return int(self.mask.sum())

    def to_world(self, xyz_norm: np.ndarray) -> np.ndarray:
        """Normalised coordinates to metres, in float64."""
        return np.asarray(xyz_norm, np.float64) * float(self.scale) + self.center.astype(np.float64)

    def valid_points_world(self) -> np.ndarray:
        """The valid points in metres, [T', 3] float64."""
        return self.to_world(self.xyz_norm[: self.point_count])


def encode_scene(scene: Scene) -> bytes:
    """Write a scene as the bytes of the hub's `data` column: an uncompressed `.npz` with fixed time stamps.

    Determinism: equal scenes give equal bytes (`np.savez` would write the time of day).
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, (dtype, _) in _SCHEMA.items():
            value = getattr(scene, name)
            if value is None:
                continue
            with io.BytesIO() as member:
                np.lib.format.write_array(member, np.asarray(value, dtype, order="C"), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(name + ".npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return buffer.getvalue()


def decode_scene(order_id: str, data: bytes, *, truth: bool = True) -> Scene:
    """Read and validate one row.

    Args:
        order_id: the row's identifier.
        data: bytes of an `.npz` with the fields of the hub's schema; unknown fields are ignored.
        truth: whether the ground truth must be there. If False it is neither needed nor read.
    Raises:
        RowError: with the order_id, the field and the reason.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in _SCHEMA}
    # damaged bytes make zipfile and numpy raise almost anything; whatever it is, the row is at fault
    except Exception as error:
        # of other files NumPy says how to load them all the same, which is unsafe
        reason = error if data.startswith(b"PK\3\4") else "it is no zip archive"
        raise RowError(order_id, "data", f"is not a readable .npz ({reason})") from error
    required = _SCHEMA.keys() - _OPTIONAL
    if not truth:
        required -= _TRUTH
        arrays = {name: array for name, array in arrays.items() if name not in _TRUTH}
    for name in _SCHEMA:
        if name in required and name not in arrays:
            raise RowError(order_id, name, "is missing")
    scene = Scene(order_id=order_id, **arrays)
    check_scene(scene)
    return scene


def check_scene(scene: Scene) -> None:
    """Check types, shapes and ranges of a row.

    Raises:
        RowError: naming the first field that breaks a rule, the rule and what was found.
    """
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in _SCHEMA.items():
        value = getattr(scene, name)
        if value is None:
            continue
        if not isinstance(value, np.ndarray | np.generic):
            raise RowError(scene.order_id, name, f"is not a numpy array, it is {type(value).__name__}")
        if value.dtype != np.dtype(dtype):
            raise RowError(scene.order_id, name, f"must be {dtype}, is {value.dtype}")
        if len(value.shape) != len(shape):
            raise RowError(scene.order_id, name, f"must have shape {list(shape)}, has {list(value.shape)}")
        for want, got in zip(shape, value.shape, strict=True):
            want_size = sizes.setdefault(want, got) if isinstance(want, str) else want
            if got != want_size:
                raise RowError(
                    scene.order_id, name, f"must have shape {list(shape)} with {sizes}, has {list(value.shape)}"
                )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise RowError(scene.order_id, name, "has values that are not finite")
    _check_points(scene)
    if scene.gt_segments is not None:
        _check_truth(scene)


def doubts_about(scene: Scene) -> list[str]:
    """Name what a row that breaks no rule has and probably should not have; such a row is used all the same.

    Its points lie far outside the unit that coordinates are normalised to, or a segment is none of its edges.
    """
    doubts = []
    x, y, z = np.abs(scene.xyz_norm[: scene.point_count]).T > _WIDEST
    if 2 * np.count_nonzero(x | y | z) > scene.point_count:
        doubts.append(f"an xyz_norm beyond {_WIDEST} at most points, as metres would be")
    if scene.gt_segments is not None and scene.gt_vertices is not None and scene.gt_edges is not None:
        edges_E23 = (scene.gt_vertices[scene.gt_edges].astype(np.float64) - scene.center) / scene.scale
        # the ends of an edge, and perhaps the edges, come in any order
        ordered_E = _gaps(scene.gt_segments, edges_E23)
        if ordered_E.max() > _SAME_PLACE < _gaps(scene.gt_segments[:, None], edges_E23).min(axis=1).max():
            doubts.append("gt_segments that are not their gt_edges, normalised")
    return doubts


def _gaps(segments_E23: np.ndarray, others_E23: np.ndarray) -> np.ndarray:
    """How far the ends of segments are from those of others, per coordinate and in the nearer of both orders."""
    ways = (others_E23, others_E23[..., ::-1, :])
    return np.minimum(*(np.abs(segments_E23 - way).max(axis=(-1, -2)) for way in ways))


def _check_points(scene: Scene) -> None:
    if not len(scene.mask):
        raise RowError(scene.order_id, "mask", "is empty: a scene needs at least one point")
    if not scene.mask[: scene.point_count].all():
        raise RowError(scene.order_id, "mask", "must be a prefix of valid points")
    if float(scene.scale) < 1e-6:
        raise RowError(scene.order_id, "scale", f"must be at least 1e-6, is {float(scene.scale)}")
    for name, limit in (("class_id", POINT_CLASSES), ("source", 2), ("behind", BEHIND_CLASSES)):
        value = getattr(scene, name)
        if value is not None and value.max() >= limit:
            raise RowError(scene.order_id, name, f"must be below {limit}, is {value.max()}")


def _check_truth(scene: Scene) -> None:
    for name in ("gt_vertices", "gt_edges"):
        if getattr(scene, name) is None:
            raise RowError(scene.order_id, name, "is missing beside gt_segments")
    assert scene.gt_vertices is not None and scene.gt_edges is not None
    edges, vertices = len(scene.gt_edges), len(scene.gt_vertices)
    if not 1 <= edges <= MAX_SEGMENTS:
        raise RowError(scene.order_id, "gt_edges", f"must have 1 to {MAX_SEGMENTS} edges, has {edges}")
    if scene.gt_edges.min() < 0 or scene.gt_edges.max() >= vertices:
        raise RowError(scene.order_id, "gt_edges", f"must index {vertices} vertices, goes up to {scene.gt_edges.max()}")


def scene_key(order_id: str) -> int:
    """The scene's 32-bit counter for Philox: that of its order_id."""
    return name_key(order_id)


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneBatch:
    """Rows as tensors of one device; the form in which a training set is held and in which a model reads it.

    Padding: points past `point_count_B` and segments past `gt_count_B` are finite but mean nothing.
    `votes_BT2` holds (n_views_voted - 2.7) / 1.0 and (vote_frac - 0.5) / 0.25, zeros where a row has no votes;
    `behind_BT` is max(behind, 0).
    """

    xyz_BT3: torch.Tensor
    class_id_BT: torch.Tensor
    source_BT: torch.Tensor
    behind_BT: torch.Tensor
    votes_BT2: torch.Tensor
    point_count_B: torch.Tensor
    gt_BM23: torch.Tensor
    gt_count_B: torch.Tensor
    scene_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.point_count_B)

    def to(self, device: torch.device | str) -> "SceneBatch":
        return SceneBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def rows(self, index_B: torch.Tensor, *, impl: str = "auto") -> "SceneBatch":
        """Gather the rows `index_B` (int64, any order, on this batch's device), see `kernels.gather`."""
        names = [f.name for f in fields(self)]
        gathered = gather_rows([getattr(self, name) for name in names], index_B, impl=impl)
        return SceneBatch(**dict(zip(names, gathered, strict=True)))

    def with_geometry(self, xyz_BT3: torch.Tensor, gt_BM23: torch.Tensor) -> "SceneBatch":
        """The same rows at other coordinates (augmentation)."""
        return replace(self, xyz_BT3=xyz_BT3, gt_BM23=gt_BM23)


def stack_scenes(scenes: Sequence[Scene]) -> SceneBatch:
    """Stack scenes of equal point number T into CPU tensors; truth is padded to 64 segments.

    Raises:
        ValueError: if there are no scenes.
        RowError: if a scene has another number of points than the first.
    """
    if not scenes:
        raise ValueError("scenes must hold at least one scene")
    points = len(scenes[0].mask)
    for scene in scenes:
        if len(scene.mask) != points:
            raise RowError(
                scene.order_id, "xyz_norm", f"must have {points} points as the others, has {len(scene.mask)}"
            )
    gt_BM23 = np.zeros((len(scenes), MAX_SEGMENTS, 2, 3), np.float32)
    gt_count_B = np.zeros(len(scenes), np.int32)
    votes_BT2 = np.zeros((len(scenes), points, 2), np.float32)
    behind_BT = np.zeros((len(scenes), points), np.uint8)
    for i, scene in enumerate(scenes):
        if scene.gt_segments is not None:
            gt_count_B[i] = len(scene.gt_segments)
            gt_BM23[i, : gt_count_B[i]] = scene.gt_segments
        if scene.n_views_voted is not None:
            votes_BT2[i, :, 0] = scene.n_views_voted.astype(np.float32) - np.float32(2.7)
        if scene.vote_frac is not None:
            votes_BT2[i, :, 1] = (scene.vote_frac - np.float32(0.5)) / np.float32(0.25)
        if scene.behind is not None:
            behind_BT[i] = np.maximum(scene.behind, 0)
    return SceneBatch(
        xyz_BT3=torch.from_numpy(np.stack([s.xyz_norm for s in scenes])),
        class_id_BT=torch.from_numpy(np.stack([s.class_id for s in scenes])),
        source_BT=torch.from_numpy(np.stack([s.source for s in scenes])),
        behind_BT=torch.from_numpy(behind_BT),
        votes_BT2=torch.from_numpy(votes_BT2),
        point_count_B=torch.tensor([s.point_count for s in scenes], dtype=torch.int32),
        gt_BM23=torch.from_numpy(gt_BM23),
        gt_count_B=torch.from_numpy(gt_count_B),
        scene_B=torch.tensor([scene_key(s.order_id) for s in scenes], dtype=torch.int64),
    )
