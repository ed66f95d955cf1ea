"""Launch options of the kernels beside attention, each tried on its own, as `bench.gpu_tiles` does for attention.

Their options are constants of modules. A candidate replaces some of them, the operator is called as training calls it
at the encoder's shapes, and one of its launches is caught, checked and timed. What counts is the time from a flushed
cache: in a step these kernels read what is no longer in it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_cases import ITERATIONS, Tensors, segment_inputs
from bench.gpu_cases_layers import DROPOUT, embed_points, point_inputs, seam_inputs
from bench.gpu_process import Sheet, note, share
from bench.gpu_rows import BF16_TOLERANCE, FP32_TOLERANCE
from bench.gpu_tiles import Caught, run_sweep, time_caught
from kernels import gelu, matching_triton, points_backward, residual_triton
from kernels.gelu import bias_gelu
from kernels.matching import match_segments
from kernels.residual import residual_norm

# name -> (items, points of an item)
SHAPES = {"64 x 4096": (64, 4096), "32 x 2048": (32, 2048)}
ROWS_EACH = 256

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Swept:
    """A kernel and what is tried for it.

    Args:
        module, kernel: where it stands under which name.
        results: places of its results among the arguments of a launch.
        partials: places of the sums over segments, whose first axis is added up before they are compared.
        inputs, call: build the operator's inputs for (items, points) and run it, forward and backward.
        candidates: constants of the module that are replaced, one candidate each.
        tolerance: how far results may be from those of the committed constants, relative to the largest.
    """

    module: Any
    kernel: str
    results: Sequence[int]
    partials: Sequence[int] = ()
    inputs: Callable[[int, int, torch.device], Tensors]
    call: Callable[[Tensors], object]
    candidates: Sequence[Options]
    tolerance: float = BF16_TOLERANCE


def _stream(items: int, _: int, device: torch.device, *, C: int = 256) -> Tensors:
    return seam_inputs(items, device, T=ROWS_EACH, C=C)


def _hidden(items: int, _: int, device: torch.device) -> Tensors:
    return _stream(items, 0, device, C=1024)


def _points(items: int, points: int, device: torch.device) -> Tensors:
    return point_inputs(items, device, T=points)


def _after_attention(tensors: Tensors) -> None:
    """The seam whose sum the next products read as it is."""
    leaves = [tensors[name].detach().requires_grad_() for name in ("x_BTC", "y_BTC", "gain_C")]
    draws = {**DROPOUT, "scene_B": tensors["scene_B"]}
    seam = residual_norm(*leaves, dtype=tensors["y_BTC"].dtype, copy=True, impl="triton", **draws)
    assert seam.normed_BTC is not None and seam.copy_BTC is not None
    upstream = [tensors[name] for name in ("dnew_BTC", "dnormed_BTC", "y_BTC")]
    torch.autograd.grad([seam.new_BTC, seam.normed_BTC, seam.copy_BTC], leaves, upstream)


def _after_feed_forward(tensors: Tensors) -> None:
    """The seam of a branch with a bias."""
    x_BTC, y_BTC, gain_C, bias_C = leaves = [
        tensors[name].detach().requires_grad_() for name in ("x_BTC", "y_BTC", "gain_C", "bias_C")
    ]
    draws = {**DROPOUT, "scene_B": tensors["scene_B"]}
    seam = residual_norm(x_BTC, y_BTC, gain_C, bias_C=bias_C, dtype=y_BTC.dtype, impl="triton", **draws)
    assert seam.normed_BTC is not None
    torch.autograd.grad([seam.new_BTC, seam.normed_BTC], leaves, [tensors["dnew_BTC"], tensors["dnormed_BTC"]])


def _activate(tensors: Tensors) -> None:
    leaves = [tensors[name].detach().requires_grad_() for name in ("y_BTC", "bias_C")]
    torch.autograd.grad(bias_gelu(*leaves, impl="triton"), leaves, tensors["dnormed_BTC"])


def _embed(tensors: Tensors) -> None:
    names = [name for name in tensors if name.endswith("table") or name in ("weight1", "bias1", "weight2", "bias2")]
    weights = {name: tensors[name].detach().requires_grad_() for name in (*names, "gain")}
    memory_BTC = embed_points(tensors, weights, precision="bf16", impl="triton")
    torch.autograd.grad(memory_BTC, list(weights.values()), tensors["dmemory_BTC"].to(memory_BTC.dtype))


def _segments(items: int, _: int, device: torch.device) -> Tensors:
    return segment_inputs(items, device)


def _match(tensors: Tensors) -> None:
    mid, dir_, length = (tensors[name].detach().requires_grad_() for name in ("mid_BN3", "dir_BN3", "len_BN"))
    match_segments(mid, dir_, length, tensors["gt_BM23"], tensors["count_B"], iterations=ITERATIONS, impl="triton")


def _residual(rows: int, warps: int, **others: int) -> Options:
    return {"LAUNCHES": residual_triton.LAUNCHES | {256: (rows, warps)}, **others}


def _gelu(rows: int, columns: int, warps: int, segment: int, stages: int) -> Options:
    return {"ROWS": rows, "COLUMNS": columns, "WARPS": warps, "SEGMENT": segment, "STAGES": stages}


def _norm(segment: int, rows: int, warps: int, stages: int) -> Options:
    return {"NORM_SEGMENT": segment, "NORM_ROWS": rows, "NORM_WARPS": warps, "NORM_STAGES": stages}


def _matching(**options: int | None) -> Options:
    layout = {**matching_triton.LAYOUT[64], **options}
    return {"LAYOUT": matching_triton.LAYOUT | {64: {name: n for name, n in layout.items() if n is not None}}}


_AFTER_ATTENTION = Swept(
    module=residual_triton,
    kernel="_residual_norm_bwd_kernel",
    results=(8, 9),
    partials=(10,),
    inputs=_stream,
    call=_after_attention,
    candidates=[
        *(_residual(4, 2, SEGMENT=16, STAGES=stages) for stages in (1, 2, 3)),
        *(_residual(2, 2, SEGMENT=16, STAGES=stages) for stages in (1, 2, 3)),
        *(_residual(2, 1, SEGMENT=8, STAGES=stages) for stages in (1, 2)),
        *(_residual(2, 4, SEGMENT=16, STAGES=stages) for stages in (1, 2)),
        _residual(4, 2, SEGMENT=8, STAGES=1),
        _residual(2, 1, SEGMENT=16, STAGES=2),
        _residual(4, 4, SEGMENT=16, STAGES=2),
    ],
)
KERNELS = {
    "residual_norm with a copy, backward": _AFTER_ATTENTION,
    "residual_norm with a bias, backward": replace(_AFTER_ATTENTION, partials=(10, 11), call=_after_feed_forward),
    "residual_norm, forward": Swept(
        module=residual_triton,
        kernel="_residual_norm_fwd_kernel",
        results=(6, 7, 8, 9),
        inputs=_stream,
        call=_after_attention,
        candidates=[_residual(*tile) for tile in ((4, 2), (2, 2), (4, 4), (8, 4), (1, 1))],
    ),
    "bias_gelu, backward": Swept(
        module=gelu,
        kernel="_bias_gelu_bwd_kernel",
        results=(3,),
        partials=(4,),
        inputs=_hidden,
        call=_activate,
        candidates=[
            *(_gelu(2, 512, 4, 32, stages) for stages in (1, 2, 4)),
            *(_gelu(4, 512, 4, 32, stages) for stages in (1, 2, 3)),
            *(_gelu(2, 512, 4, 16, stages) for stages in (1, 2, 3)),
            _gelu(1, 1024, 4, 32, 3),
            _gelu(2, 256, 2, 32, 3),
        ],
    ),
    "bias_gelu, forward": Swept(
        module=gelu,
        kernel="_bias_gelu_fwd_kernel",
        results=(2,),
        inputs=_hidden,
        call=_activate,
        candidates=[_gelu(*tile, 32, 3) for tile in ((1, 512, 2), (4, 512, 4), (4, 512, 8), (1, 1024, 4))],
    ),
    "point norm, backward": Swept(
        module=points_backward,
        kernel="_point_norm_bwd_kernel",
        results=(4,),
        partials=(5,),
        inputs=_points,
        call=_embed,
        candidates=[
            _norm(64, 4, 4, 2),
            *(_norm(128, 8, 4, stages) for stages in (1, 2, 3, 4)),
            *(_norm(128, 4, 4, stages) for stages in (1, 3)),
            *(_norm(64, 8, 4, stages) for stages in (1, 3)),
            *(_norm(128, 4, 2, stages) for stages in (2, 4)),
        ],
    ),
    "match_segments, forward": Swept(
        module=matching_triton,
        kernel="_match_segments_fwd_kernel",
        results=(5, 6, 7, 9),
        inputs=_segments,
        call=_match,
        tolerance=FP32_TOLERANCE,
        candidates=[
            _matching(maxnreg=None),
            _matching(num_warps=4),
            _matching(N0=8, M0=32),
            _matching(N0=32, M0=8),
            _matching(num_warps=16, N0=32, maxnreg=128),
            _matching(num_warps=16, maxnreg=128),
        ],
    ),
}


@contextlib.contextmanager
def replaced(module: Any, options: Options) -> Iterator[None]:
    """Put other constants into a module, for the time of the `with`."""
    before = {name: getattr(module, name) for name in options}
    try:
        for name, value in options.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def catch(swept: Swept, options: Options, tensors: Tensors) -> Caught:
    """Run the operator with some constants replaced and return the launch of its kernel.

    Raises:
        Exception: whatever the compiler or the launch raises.
    """
    caught = Caught(getattr(swept.module, swept.kernel))
    with replaced(swept.module, {**options, swept.kernel: caught}):
        swept.call(tensors)
    return caught


def results(swept: Swept, caught: Caught) -> list[torch.Tensor]:
    """Copies of the results of a launch, sums over segments added up."""
    arguments = caught.arguments
    found = [arguments[i].detach().clone() for i in swept.results]
    return found + [arguments[i].detach().sum(0) for i in swept.partials]


def told(options: Options) -> str:
    """A candidate as a short name: the constants it replaces."""
    tables = {"LAUNCHES": 256, "LAYOUT": 64}
    named = {name: value[tables[name]] if name in tables else value for name, value in options.items()}
    return ", ".join(f"{name.removeprefix('NORM_').lower()} {value}" for name, value in named.items()) or "as it is"


def time_seams(sheet: Sheet, device: torch.device, shapes: Sequence[str] = tuple(SHAPES)) -> None:
    """Time every candidate at every shape, keeping the sheet sorted: fastest first within a kernel and shape."""
    cases: list[dict[str, Any]] = []
    sheet.content["cases"] = cases
    for shape in shapes:
        for name, swept in KERNELS.items():
            tensors = swept.inputs(*SHAPES[shape], device)
            truth = None
            for options in ({}, *swept.candidates):
                case = {"suite": "seams", "group": f"{name}, {shape}", "name": told(options), "peer": told(options)}
                try:
                    truth = truth or results(swept, catch(swept, {}, tensors))
                    caught = catch(swept, options, tensors)
                    cases.append(case | time_caught(caught, results(swept, caught), truth, swept.tolerance))
                except Exception as refusal:
                    cases.append(case | {"refused": str(refusal).partition("\n")[0][:120]})
            cases.sort(key=lambda case: (case["group"], case.get("cold_median_s", case.get("median_s", 1.0))))
            sheet.write()


def _compile(part: str) -> int:
    device = torch.device("cuda")
    for shape in SHAPES.values():
        for name, swept in KERNELS.items():
            tensors = swept.inputs(*shape, device)
            for options in share(list(swept.candidates), part):
                try:
                    catch(swept, options, tensors)
                except Exception as refusal:
                    note(refused=f"{name} {told(options)}", reason=str(refusal)[:200])
    return 0


if __name__ == "__main__":
    sys.exit(run_sweep("bench.gpu_seams", _compile, time_seams))
