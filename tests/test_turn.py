"""`turn`: how exact it is, what it depends on, what is refused."""

import math

import pytest
import torch
import triton
import triton.language as tl

from kernels.turn import ROTATIONS, cos_sin_of_turns, turn, turn_reference
from tests.accuracy import assert_accurate

SETTINGS = [(rotate, flip) for rotate in ROTATIONS for flip in (True, False)]
# enough scenes for every quadrant, both signs and both halves
SCENES = 12


def problem(B=SCENES, T=20, M=3, dtype=torch.float32):
    """Return points, segments and counters."""
    generator = torch.Generator().manual_seed(0)
    xyz, gt = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, T, 3), (B, M, 2, 3)))
    return [xyz, gt, torch.arange(2**32 - B, 2**32)]


def run(tensors, device="cpu", *, impl="triton", **options):
    options = {"seed": 2**63 + 5, "step": 3} | options
    return turn(*(tensor.to(device) for tensor in tensors), impl=impl, **options)


def same_bits(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("rotate, flip", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_are_as_close_to_float64_as_eager(rotate, flip, dtype, device):
    tensors, options = problem(dtype=dtype), {"rotate": rotate, "flip": flip, "seed": 2**63 + 5, "step": 3}
    *geometry, scene_B = tensors
    truth, eager = (
        turn_reference(*(x.to(wide) for x in geometry), scene_B, **options) for wide in (torch.float64, torch.float32)
    )
    for impl in ("eager", "triton"):
        found = run(tensors, device, impl=impl, **options)
        for name, x, t, e in zip(("xyz", "gt"), found, truth, eager, strict=True):
            assert_accurate(x, truth=t, eager=e, name=name)


def test_cosine_and_sine_are_those_of_float64_round_the_circle(device):
    @triton.jit
    def kernel(u_ptr, cos_ptr, sin_ptr, SIZE: tl.constexpr):
        offs = tl.arange(0, SIZE)
        cos, sin = cos_sin_of_turns(tl.load(u_ptr + offs))
        tl.store(cos_ptr + offs, cos)
        tl.store(sin_ptr + offs, sin)

    u = torch.cat([torch.arange(4095) / 4095, torch.tensor([1 - 2.0**-24])])
    cos, sin = torch.empty_like(u, device=device), torch.empty_like(u, device=device)
    kernel[(1,)](u.to(device), cos, sin, SIZE=4096)
    angle = 2 * math.pi * u.double()
    # a rounding of the result and one of the last product before it
    assert (cos.cpu() - angle.cos()).abs().max() <= 2.0**-23
    assert (sin.cpu() - angle.sin()).abs().max() <= 2.0**-23


def test_half_turns_have_the_bits_of_eager(device):
    tensors = problem()
    found = run(tensors, device, rotate="half_turn")
    assert same_bits([x.cpu() for x in found], run(tensors, impl="eager", rotate="half_turn"))


def test_a_scenes_bits_do_not_depend_on_the_batch_or_padding(device):
    xyz, gt, scene = problem(T=600, M=300)
    together = run([xyz, gt, scene], device)
    for b in (0, SCENES - 1):
        part = slice(b, b + 1)
        alone = run([xyz[part, :520], gt[part, :7], scene[part]], device)
        assert same_bits(alone, [together[0][part, :520], together[1][part, :7]])


def test_strides_change_no_bits(device):
    xyz, gt, scene = (tensor.to(device) for tensor in problem())
    moved = [xyz.mT.contiguous().mT, gt.mT.contiguous().mT, torch.stack([scene, scene], 1)[:, 0]]
    assert same_bits(run([xyz, gt, scene], device), run(moved, device))


def test_a_step_in_a_tensor_is_that_step_and_another_moves_otherwise(device):
    tensors = problem()
    found = run(tensors, device, step=2)
    assert same_bits(found, run(tensors, device, step=torch.tensor(2, device=device)))
    for other in (run(tensors, device, step=3), run(tensors, device, step=2, seed=1)):
        assert not (other[0] == found[0]).all(dim=2).any()


def test_what_is_not_finite_stays_in_its_point(device):
    xyz, gt, scene = problem()
    xyz[1, 4] = math.nan
    found, finite = run([xyz, gt, scene], device), run(problem(), device)
    away = torch.ones(xyz.shape[:2], dtype=torch.bool, device=device)
    away[1, 4] = False
    assert torch.equal(found[0][away], finite[0][away])
    assert torch.equal(found[1], finite[1])
    assert found[0][1, 4].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0)])
def test_a_size_of_zero_is_nothing_to_move(sizes, device):
    tensors = problem(*sizes)
    xyz, gt = run(tensors, device)
    assert (xyz.shape, gt.shape) == (tensors[0].shape, tensors[1].shape)
    eager = run(tensors, impl="eager")
    torch.testing.assert_close([xyz.cpu(), gt.cpu()], list(eager), atol=1e-5, rtol=1e-5)


def test_registration_passes_opcheck(device):
    xyz, gt, scene = (tensor.to(device) for tensor in problem(2, 5, 2))
    torch.library.opcheck(torch.ops.ridgeline.turn.default, (xyz, gt, scene, scene[:1], "uniform", True, 5))


def test_torch_compile_gives_the_bits_of_eager(device):
    tensors = [tensor.to(device) for tensor in problem()]
    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    step = torch.tensor(3, device=device)
    assert same_bits(run(tensors, device, step=step), compiled(*tensors, seed=2**63 + 5, step=step, impl="triton"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"xyz_BT3": torch.zeros(2, 3)}, r"xyz must be \[B, T, 3\], got shape \(2, 3\)"),
        ({"xyz_BT3": torch.zeros(2, 5, 3, dtype=torch.int32)}, "xyz must be float32, bfloat16, float16 or float64"),
        ({"xyz_BT3": torch.zeros(2, 5, 3, dtype=torch.float64)}, "xyz must be float32, bfloat16 or float16 for the"),
        ({"xyz_BT3": torch.zeros(2, 5, 3, requires_grad=True)}, "xyz must not require a gradient of the kernel"),
        ({"gt_BM23": torch.zeros(1, 2, 2, 3)}, r"gt must be \[B, M, 2, 3\] with B = 2, got shape \(1, 2, 2, 3\)"),
        ({"gt_BM23": torch.zeros(2, 2, 2, 3, dtype=torch.int32)}, "gt must be float32, bfloat16, float16 or float64"),
        ({"gt_BM23": torch.zeros(2, 2, 2, 3, device="meta")}, "gt must be on the device of xyz, cpu, got meta"),
        ({"scene_B": torch.zeros(2)}, r"scene must be \[2\] of int64, got shape \(2,\), torch.float32"),
        ({"rotate": "slightly"}, "rotate must be one of uniform, half_turn, none, got 'slightly'"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\^64\), got -1"),
        ({"step": -1}, r"step must be an int in \[0, 2\^32\), got -1"),
        ({"step": 2**32}, r"step must be an int in \[0, 2\^32\), got 4294967296"),
        ({"step": 1.5}, r"step must be an int in \[0, 2\^32\), got 1.5"),
        ({"step": torch.tensor(-1)}, r"step must be in \[0, 2\^32\), got -1 to -1"),
        ({"scene_B": torch.tensor([0, 2**32])}, r"scene must be in \[0, 2\^32\), got 0 to 4294967296"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, r"step must be one element of int64, got shape \(2,\)"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_bad_input_is_refused(changes, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    xyz, gt, scene = problem(2, 5, 2)
    arguments = {"xyz_BT3": xyz, "gt_BM23": gt, "scene_B": scene, "seed": 1, "step": 1, "impl": "triton"}
    with pytest.raises(ValueError, match=message):
        turn(**arguments | changes)
