"""Turn scenes about Y and mirror them, points and true segments alike, in one launch: draws, angles and coordinates.

    (x, y, z) -> (c m x + s z, y, -s m x + c z),   m = -1 if mirrored else 1,   c, s = cos, sin of the scene's angle

The draws are the words of Philox at (seed; AUGMENTATION, step, scene): the first gives the angle, the second mirrors.
Shapes in names: B items, T points, M segments.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.dispatch import cdiv, require_tensors, resolve
from kernels.philox import Counter, Place, check_key_and_counters, philox_4x32, unit_interval
from kernels.philox_tile import joined_seed, kernel_draws, signed_seed
from kernels.registration import operator

ROTATIONS = ("uniform", "half_turn", "none")
INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# vertices of a program, warps
BLOCK, WARPS = 512, 4


def turn(
    xyz_BT3: torch.Tensor,
    gt_BM23: torch.Tensor,
    scene_B: torch.Tensor,
    *,
    rotate: str = "uniform",
    flip: bool = True,
    seed: int,
    step: Counter,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points and segments, turned about Y round the origin and mirrored in x as each scene's draws say.

    Args:
        xyz_BT3: points, float32, bfloat16 or float16 (float64 where the eager form runs), any strides.
        gt_BM23: ends of segments, in one of these dtypes.
        scene_B: int64 counters in [0, 2^32).
        rotate: "uniform" by any angle, "half_turn" by 0 or pi, "none".
        flip: mirror with probability 1/2, or never.
        seed: in [0, 2^64).
        step: an int or an int64 tensor of one element, in [0, 2^32).
        impl: "auto", "eager" or "triton", see `kernels.dispatch`.
    Returns:
        Tensors of the shapes and dtypes of xyz and gt.
    Raises:
        ValueError: a shape, dtype, device or option outside of the above; a gradient asked of the kernel.
    Determinism: a scene's bits depend on it, the seed and the step. The forms draw the same words; the kernel's sines
        are its own polynomials, the same on every GPU.
    """
    _check(xyz_BT3, gt_BM23, scene_B, rotate, seed, step)
    if resolve(impl, xyz_BT3.device) == "eager":
        return turn_reference(xyz_BT3, gt_BM23, scene_B, rotate=rotate, flip=flip, seed=seed, step=step)
    for name, tensor in (("xyz", xyz_BT3), ("gt", gt_BM23)):
        if tensor.dtype == torch.float64:
            raise ValueError(f"{name} must be float32, bfloat16 or float16 for the kernel, got float64")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient of the kernel, got requires_grad=True")
    step_1 = step if isinstance(step, torch.Tensor) else torch.full((1,), step, device=xyz_BT3.device)
    return _turn(xyz_BT3, gt_BM23, scene_B, step_1, rotate, flip, signed_seed(seed))


def turn_reference(
    xyz_BT3: torch.Tensor,
    gt_BM23: torch.Tensor,
    scene_B: torch.Tensor,
    *,
    rotate: str = "uniform",
    flip: bool = True,
    seed: int,
    step: Counter,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning of `turn`, in plain PyTorch; in float64 the truth."""
    word_B, mirror_B, _, _ = philox_4x32(0, Place.AUGMENTATION, step, scene_B, seed=seed, impl="eager")
    dtype = torch.promote_types(xyz_BT3.dtype, torch.float32)
    one_B = torch.ones(len(scene_B), dtype=dtype, device=scene_B.device)
    sign_B = torch.where(mirror_B >> 31 == 1, -one_B, one_B) if flip else one_B
    if rotate == "uniform":
        angle_B = 2 * math.pi * unit_interval(word_B).to(dtype)
        rotation = angle_B.cos(), angle_B.sin(), sign_B
    else:
        cos_B = torch.where(word_B >> 31 == 1, -one_B, one_B) if rotate == "half_turn" else one_B
        rotation = cos_B, torch.zeros_like(one_B), sign_B
    return _moved(xyz_BT3, rotation), _moved(gt_BM23, rotation)


def _moved(xyz: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
    cos, sin, sign = (r.reshape(-1, *[1] * (xyz.dim() - 2)) for r in rotation)
    x, y, z = sign * xyz[..., 0], xyz[..., 1], xyz[..., 2]
    return torch.stack([cos * x + sin * z, y, cos * z - sin * x], dim=-1).to(xyz.dtype)


@operator("ridgeline::turn")
def _turn(
    xyz_BT3: torch.Tensor,
    gt_BM23: torch.Tensor,
    scene_B: torch.Tensor,
    step_1: torch.Tensor,
    rotate: str,
    flip: bool,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The points and segments, moved."""
    moved_BT3, moved_BM23 = xyz_BT3.new_empty(xyz_BT3.shape), gt_BM23.new_empty(gt_BM23.shape)
    B, T, V = len(scene_B), xyz_BT3.shape[1], 2 * gt_BM23.shape[1]
    low, high, place, _, _ = kernel_draws(0.0, seed, Place.AUGMENTATION)
    if B and T + V:
        _turn_kernel[(B, cdiv(T, BLOCK) + cdiv(V, BLOCK))](
            xyz_BT3.contiguous(), gt_BM23.contiguous(), scene_B.contiguous(), step_1, moved_BT3, moved_BM23, T, V,
            low, high, place, ROTATE=rotate, FLIP=flip, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return moved_BT3, moved_BM23


@_turn.register_fake
def _(xyz_BT3, gt_BM23, scene_B, step_1, rotate, flip, seed):
    return xyz_BT3.new_empty(xyz_BT3.shape), gt_BM23.new_empty(gt_BM23.shape)


def _check(xyz_BT3, gt_BM23, scene_B, rotate, seed, step) -> None:
    """Refuse tensors that do not fit each other, and options and counters out of range."""
    require_tensors(xyz=xyz_BT3, gt=gt_BM23, scene=scene_B)
    if xyz_BT3.dim() != 3 or xyz_BT3.shape[2] != 3:
        raise ValueError(f"xyz must be [B, T, 3], got shape {tuple(xyz_BT3.shape)}")
    B = len(xyz_BT3)
    if gt_BM23.dim() != 4 or (len(gt_BM23), *gt_BM23.shape[2:]) != (B, 2, 3):
        raise ValueError(f"gt must be [B, M, 2, 3] with B = {B}, got shape {tuple(gt_BM23.shape)}")
    if scene_B.shape != (B,) or scene_B.dtype != torch.int64:
        raise ValueError(f"scene must be [{B}] of int64, got shape {tuple(scene_B.shape)}, {scene_B.dtype}")
    for name, tensor in (("xyz", xyz_BT3), ("gt", gt_BM23)):
        if tensor.dtype not in (*INPUT_TYPES, torch.float64):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if rotate not in ROTATIONS:
        raise ValueError(f"rotate must be one of {', '.join(ROTATIONS)}, got {rotate!r}")
    if isinstance(step, torch.Tensor) and (step.numel() != 1 or step.dtype != torch.int64):
        raise ValueError(f"step must be one element of int64, got shape {tuple(step.shape)}, {step.dtype}")
    check_key_and_counters(seed, step=step, scene=scene_B)
    counters = [("gt", gt_BM23), ("scene", scene_B), *([("step", step)] if isinstance(step, torch.Tensor) else [])]
    for name, tensor in counters:
        if tensor.device != xyz_BT3.device:
            raise ValueError(f"{name} must be on the device of xyz, {xyz_BT3.device}, got {tensor.device}")


@triton.jit(do_not_specialize=["T", "V", "seed_low", "seed_high", "place"])
def _turn_kernel(
    xyz_ptr, gt_ptr, scene_ptr, step_ptr, moved_xyz_ptr, moved_gt_ptr, T, V, seed_low, seed_high, place,
    ROTATE: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    step, scene = tl.load(step_ptr).to(tl.uint32), tl.load(scene_ptr + b).to(tl.uint32)
    first = tl.zeros_like(scene)
    word, mirror, _, _ = tl.philox(joined_seed(seed_low, seed_high), first, place.to(tl.uint32), step, scene)
    cos, sin = _rotation(word, ROTATE)
    sign = tl.where(mirror >> 31 == 1, -1.0, 1.0) if FLIP else 1.0
    blocks = tl.cdiv(T, BLOCK)
    if part < blocks:
        _move(xyz_ptr + b * T * 3, moved_xyz_ptr + b * T * 3, part * BLOCK, T, cos, sin, sign, BLOCK)
    else:
        _move(gt_ptr + b * V * 3, moved_gt_ptr + b * V * 3, (part - blocks) * BLOCK, V, cos, sin, sign, BLOCK)


@triton.jit
def _rotation(word, ROTATE: tl.constexpr):
    """Cosine and sine of the angle that a word draws."""
    if ROTATE == "uniform":
        cos, sin = cos_sin_of_turns((word >> 8).to(tl.float32) * 5.9604644775390625e-08)
    elif ROTATE == "half_turn":
        cos, sin = tl.where(word >> 31 == 1, -1.0, 1.0), 0.0
    else:
        cos, sin = 1.0, 0.0
    return cos, sin


@triton.jit
def cos_sin_of_turns(u):
    """Cosine and sine of 2 pi u, 0 <= u <= 1: the nearest quarter exactly, what is left of it by Taylor's series."""
    quarter = tl.floor(4 * u + 0.5)
    f = 4 * u - quarter
    g = f * f
    # (-1)^k (pi / 2)^n / n!, n = 2 k + 1 and 2 k
    sin = g * 1.6044118478735983e-04 - 4.681754135318688e-03
    sin = sin * g + 7.969262624616704e-02
    sin = sin * g - 6.459640975062462e-01
    sin = f * (sin * g + 1.5707963267948966)
    cos = g * -2.5202042373060605e-05 + 9.192602748394265e-04
    cos = cos * g - 2.0863480763352960e-02
    cos = cos * g + 2.5366950790104800e-01
    cos = cos * g - 1.2337005501361697
    cos = cos * g + 1.0
    quadrant = quarter.to(tl.int32) % 4
    odd = quadrant % 2 == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    turned = (quadrant == 1) | (quadrant == 2)
    return tl.where(turned, -cos, cos), tl.where(quadrant >= 2, -sin, sin)


@triton.jit
def _move(xyz_ptr, moved_ptr, start, vertices, cos, sin, sign, BLOCK: tl.constexpr):
    """Move BLOCK vertices of an item that has `vertices`."""
    vertex = start + tl.arange(0, BLOCK)
    mask, offs = vertex < vertices, vertex * 3
    x = tl.load(xyz_ptr + offs, mask=mask, other=0.0).to(tl.float32) * sign
    y = tl.load(xyz_ptr + offs + 1, mask=mask, other=0.0)
    z = tl.load(xyz_ptr + offs + 2, mask=mask, other=0.0).to(tl.float32)
    # (x, y, z) -> (c m x + s z, y, -s m x + c z)
    dtype = moved_ptr.dtype.element_ty
    tl.store(moved_ptr + offs, (cos * x + sin * z).to(dtype), mask=mask)
    tl.store(moved_ptr + offs + 1, y, mask=mask)
    tl.store(moved_ptr + offs + 2, (cos * z - sin * x).to(dtype), mask=mask)
