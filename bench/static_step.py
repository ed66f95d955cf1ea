"""A lower bound of a training step's time on a GPU that is not there: every kernel compiled, every product counted.

    python -m bench.static step [--arch 80 89 90] [--shapes 32x2048 64x4096] [--check] [--write]

One update of the published model in bfloat16, from gathering its rows to AdamW, runs under `bench.offline`: the real
launchers on CPU tensors, every launch compiled and none executed. Matrix products are recorded and not computed, other
calls of PyTorch are computed and counted. The bounds, summed over the step:

    a kernel        `bench.cubin.time_bound_us`
    a product       its FLOPs over the rate of its operands' type, or its bytes over the bandwidth
    another call    its tensors' bytes over the bandwidth; on a GPU it is one launch or more

Beside it the arithmetic floor: the FLOPs of the same mathematics, nothing computed twice, over the rate in bfloat16.
Starting a launch, latency and the gaps between launches count nothing, and what a cache keeps is counted as read again.
"""

import argparse
import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bench import cubin, static
from bench.offline import Launch, gpu, memory_bytes, prepare_environment
from bench.static_cases import SPILLS_ALLOWED, Case

SHAPES = {"32x2048": (32, 2048), "64x4096": (64, 4096)}
ITERATIONS, FEATURES = 20, 95
PRODUCTS = ("aten.mm.default", "aten.mm.out", "aten.addmm.default", "aten.bmm.default")
# they launch nothing: a tensor gets its memory or another shape
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types")
# scenes x points -> TFLOP and milliseconds on an H200 that the design asks for
DESIGNED = {"32x2048": (0.75, 4.0), "64x4096": (2.28, 8.5)}
# what a result file keeps of a kernel's row
KEPT = ("kernel", "launches", "warps", "registers", "spills", "occupancy", "limiter", "bound_us", "bound_by")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product that PyTorch leaves to its library: batch x rows x depth x columns."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    bytes: int

    @property
    def flop(self) -> int:
        return 2 * math.prod(self.shape)


class Recorder(TorchDispatchMode):
    """Records PyTorch's calls: products, which give memory without values, and the names and bytes of the others."""

    def __init__(self):
        super().__init__()
        self.products: list[Product] = []
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "ridgeline":
            # what an operator calls is recorded, not the operator itself
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if str(func) in PRODUCTS:
            return self._product(*args[-2:], **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in FREE and not _is_view(func):
            self.calls.append((name, _bytes([args, kwargs, out])))
        return out

    def _product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        out = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
        batch = len(a) if a.dim() == 3 else 1
        shape = (batch, a.shape[-2], a.shape[-1], b.shape[-1])
        self.products.append(Product(shape, a.dtype, _bytes([a, b, out])))
        return out


def _is_view(func) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _bytes(values) -> int:
    leaves, _ = tree_flatten(values)
    return memory_bytes(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def record_step(shape: tuple[int, int], arch: int) -> tuple[list[Launch], Recorder]:
    """Run two updates of the published model at (scenes, points) for sm_<arch>; return what the second one does."""
    from perceiver.model import Perceiver
    from train.config import load_recipe
    from train.determinism import Machine
    from train.optim import build_optimizer
    from train.step import advance

    recipe = load_recipe("s23dr")
    machine = Machine(device=torch.device("cpu"), precision="bf16", impl="triton")
    stored, recorder = _rows(*shape), Recorder()
    index_B, step = torch.arange(shape[0]), torch.full((), 1000)

    def one_update(recorder: Recorder) -> None:
        with recorder:
            rows = stored.rows(index_B)
            advance(model, optimizer, rows, step=step, stage=recipe.stages[-1], recipe=recipe, machine=machine)

    with gpu(arch) as launches:
        model = Perceiver(recipe.model, seed=recipe.seed)
        optimizer = build_optimizer(model, recipe.optim)
        # the first one makes AdamW's moments
        one_update(Recorder())
        launches.clear()
        one_update(recorder)
        return list(launches), recorder


def _rows(B: int, T: int):
    from perceiver.scene import MAX_SEGMENTS, SceneBatch

    class_BT = torch.zeros(B, T, dtype=torch.uint8)
    return SceneBatch(
        xyz_BT3=torch.zeros(B, T, 3),
        class_id_BT=class_BT,
        source_BT=class_BT.clone(),
        behind_BT=class_BT.clone(),
        votes_BT2=torch.zeros(B, T, 2),
        point_count_B=torch.full((B,), T, dtype=torch.int32),
        gt_BM23=torch.zeros(B, MAX_SEGMENTS, 2, 3),
        gt_count_B=torch.full((B,), MAX_SEGMENTS, dtype=torch.int32),
        scene_B=torch.arange(B),
    )


def trips(launch: Launch) -> int:
    """How often the main loop of a launch of the step runs, see `bench.cubin.time_bound_us`."""
    c = launch.constants
    match launch.kernel:
        case "_attention_fwd_kernel" | "_attention_dq_kernel":
            return c["S"] // c["BLOCK_S"]
        case "_attention_dkv_kernel":
            return c["R"] * c["T"] // c["BLOCK_T"]
        case "_point_layers_fwd_kernel":
            return c["J"] // c["BLOCK_J"]
        case "_point_weight1_bwd_kernel" | "_point_weight2_bwd_kernel":
            return c["SEGMENT"] // c["BLOCK_P"]
        case "_match_segments_fwd_kernel":
            return ITERATIONS
    return 1


def kernel_flop(launch: Launch, points: int) -> int:
    """FLOPs of the matrix products that a launch stands for, without what it computes a second time."""
    c = launch.constants
    if launch.kernel in ("_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel"):
        by_keys = launch.kernel == "_attention_dkv_kernel"
        queries = launch.programs * (c["BLOCK_S"] * c["R"] if by_keys else c["BLOCK_T"])
        return 2 * 2 * queries * (c["T"] if by_keys else c["S"]) * c["D"]
    # per point and hidden unit: features, channels; the gradient of the hidden layer counts with weight1
    per_unit = {
        "_point_layers_fwd_kernel": lambda: FEATURES + c["C"],
        "_point_weight2_bwd_kernel": lambda: c["BLOCK_C"],
        "_point_weight1_bwd_kernel": lambda: FEATURES + c["BLOCK_C"],
    }
    return 2 * points * c["J"] * per_unit[launch.kernel]() if launch.kernel in per_unit else 0


def bound(shape: tuple[int, int], arch: int) -> dict[str, Any]:
    """Return a step's sums in milliseconds, and under "kernels" a row for each machine code that it launches."""
    launches, recorder = record_step(shape, arch)
    card = cubin.GPUS[arch]
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches:
        row = static._row(launch, arch, _case(launch))
        same = rows.setdefault(row["sha256"], row | {"launches": 0, "bound_us": 0.0})
        same["launches"] += 1
        same["bound_us"] += row["bound_us"]
    bytes_per_us = card.gigabytes_per_s * 1e3
    clocks_per_us = card.multiprocessors * card.ghz * 1e3
    rates = {torch.bfloat16: card.bf16_flop, torch.float32: 2 * card.fp32_lanes}
    kernels_us = sum(row["bound_us"] for row in rows.values())
    products_us = sum(
        max(product.flop / rates[product.dtype] / clocks_per_us, product.bytes / bytes_per_us)
        for product in recorder.products
    )
    calls_us = sum(size for _, size in recorder.calls) / bytes_per_us
    flop = sum(product.flop for product in recorder.products)
    flop += sum(kernel_flop(launch, math.prod(shape)) for launch in launches)
    return {
        "launches": len(launches),
        "kernels_ms": round(kernels_us / 1e3, 3),
        "products": len(recorder.products),
        "products_ms": round(products_us / 1e3, 3),
        "other_calls": len(recorder.calls),
        "other_calls_ms": round(calls_us / 1e3, 3),
        "bound_ms": round((kernels_us + products_us + calls_us) / 1e3, 3),
        "tflop": round(flop / 1e12, 3),
        "floor_ms": round(flop / card.bf16_flop / clocks_per_us / 1e3, 3),
        "kernels": sorted(
            (row | {"bound_us": round(row["bound_us"], 1)} for row in rows.values()), key=lambda row: -row["bound_us"]
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parse(arguments)
    try:
        prepare_environment()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    path = static._result_path()
    kept = static._sections(path).get("steps", {})
    found, problems, started = {}, [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for arch in options.arch:
            for name in options.shapes:
                unit = static.Unit("", "step", name, arch)
                step = bound(SHAPES[name], arch)
                _print_step(unit, step)
                problems += _violations(unit, step, kept.get(str(unit)))
                found[str(unit)] = step | {"kernels": [[row[column] for column in KEPT] for row in step["kernels"]]}
    print(f"{len(found)} steps in {time.perf_counter() - started:.0f} s")
    for problem in problems:
        print(f"REFUSED {problem}")
    if options.write:
        static._save(path, static._sections(path) | {"steps": kept | found})
    return 1 if options.check and problems else 0


def _case(launch: Launch) -> Case:
    loop = {"special": 4} if launch.kernel.startswith("_match") else {"matrix": 1}
    return Case(operator="step", name=launch.kernel, run=lambda: None, trips=trips, main_loop=loop)


def _violations(unit: static.Unit, step: dict[str, Any], kept: dict[str, Any] | None) -> Iterator[str]:
    """Yield a line for each rule of `bench.static` that a kernel breaks, and if the bound grew by more than a tenth."""
    rows = {f"{unit}/{row['kernel']}#{number}": row for number, row in enumerate(step["kernels"])}
    yield from static.violations([static.Finding(unit, rows, None)], {}, SPILLS_ALLOWED)
    before = (kept or step)["bound_ms"]
    if step["bound_ms"] > static.GROWTH * before:
        yield f"{unit}: bound_ms must not grow by more than 10 %, got {step['bound_ms']} after {before}"


def _print_step(unit: static.Unit, step: dict[str, Any]) -> None:
    form = "{:30} {:>8} {:>5} {:>6} {:>6} {:>9} {:24} {:>9} {}"
    print(f"\n{unit}", form.format(*KEPT), sep="\n")
    for row in step["kernels"]:
        print(form.format(*(row[name] for name in KEPT)))
    print(f"{step['launches']} launches of kernels: {step['kernels_ms']} ms")
    print(f"{step['products']} products of PyTorch: {step['products_ms']} ms")
    print(f"{step['other_calls']} other calls of PyTorch: {step['other_calls_ms']} ms")
    print(f"lower bound of the step: {step['bound_ms']} ms")
    print(f"arithmetic floor, {step['tflop']} TFLOP in bfloat16: {step['floor_ms']} ms")
    tflop, target_ms = DESIGNED[unit.case]
    print(f"design: {tflop} TFLOP; at most {target_ms} ms on an H200", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.static step", description=(__doc__ or "").partition("\n")[0])
    archs, shapes = static.ARCHITECTURES, tuple(SHAPES)
    parser.add_argument("--arch", nargs="+", type=int, choices=archs, default=archs, help="compute capabilities, as 90")
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, help="scenes x points")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a rule is broken")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
