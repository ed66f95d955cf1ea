"""Launch options of the attention kernels, each tried on its own: which tile, warps and stages are fastest here.

Kernels are launched as `gqa_attention` launches them, with one entry of the launch table replaced; processes side by
side compile them first. A candidate whose results are not those of the table's entry, up to rounding, gets no time.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from bench.gpu_cases import Tensors, attention_inputs
from bench.gpu_clock import measure
from bench.gpu_process import (
    Ended,
    Sheet,
    Workers,
    end_on_sigterm,
    end_with_parent,
    note,
    seconds_to_prepare,
    share,
    wait_for_turn,
)
from bench.gpu_rows import ATTENTION, BF16_TOLERANCE
from kernels import attention_backward, attention_forward, attention_tile
from kernels.attention import gqa_attention
from kernels.dispatch import family

Tile = tuple[int, int, int, int]
SHAPES = ("cross 256x2048", "cross 256x4096", "self 256x256")
# kernel -> (module, name there, index of the results among its arguments)
KERNELS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "forward": (attention_forward, "_attention_fwd_kernel", (8, 9)),
    "dq": (attention_backward, "_attention_dq_kernel", (11,)),
    "dkv": (attention_backward, "_attention_dkv_kernel", (10, 11)),
}
# queries and keys of a tile, warps, stages
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "forward": (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 32, 4, 4),
    ),
    "dq": (
        (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
    ),
    "dkv": (
        (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2),
        (64, 128, 8, 3), (32, 128, 8, 3),
    ),
}  # fmt: skip


class Caught:
    """Stands in for a kernel: launches it, and keeps the last launch to be made again by itself."""

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self.again: Callable[[], None] = lambda: None
        self.arguments: Sequence[Any] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.arguments = arguments
            self.again = lambda: self._kernel[grid](*arguments, **options)
            self.again()

        return launch


def catch(kernel: str, tile: Tile | None, tensors: Tensors) -> Caught:
    """Run attention forward and backward and return the launch of one kernel, at `tile` or as the table says.

    Raises:
        Exception: whatever the compiler or the launch raises.
    """
    module, name, _ = KERNELS[kernel]
    q_BHTD = tensors["q_BHTD"]
    key = (family(q_BHTD), "half", q_BHTD.shape[-1])
    launches, original = attention_tile.TILES[key], getattr(module, name)
    number, caught = attention_tile.KERNELS.index(kernel), Caught(original)
    try:
        setattr(module, name, caught)
        if tile is not None:
            attention_tile.TILES[key] = cast(Any, (*launches[:number], tile, *launches[number + 1 :]))
        leaves = [tensors[n].detach().requires_grad_() for n in ("q_BHTD", "k_BGSD", "v_BGSD", "log_scale_H")]
        o_BHTD = gqa_attention(*leaves, key_count_B=tensors.get("key_count_B"), impl="triton")
        torch.autograd.grad(o_BHTD, leaves, tensors["do_BHTD"])
    finally:
        setattr(module, name, original)
        attention_tile.TILES[key] = launches
    return caught


def results(kernel: str, caught: Caught) -> list[torch.Tensor]:
    """Copies of the results of a launch."""
    return [caught.arguments[i].detach().clone() for i in KERNELS[kernel][2]]


def time_caught(
    caught: Caught, found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], tolerance: float = BF16_TOLERANCE
) -> dict[str, Any]:
    """Time a launch alone, or say under "red" that what was found is not what the committed options give."""
    errors = [
        float((x.float() - y.float()).abs().max() / y.float().abs().max()) for x, y in zip(found, truth, strict=True)
    ]
    if not all(error <= tolerance for error in errors):
        return {"red": f"differs by {', '.join(f'{error:.1e}' for error in errors)} from the committed options"}

    def run() -> Sequence[torch.Tensor]:
        caught.again()
        return found

    return measure(run, found[0].device)


def all_tiles() -> Iterator[tuple[str, Tile]]:
    """Every kernel with every candidate."""
    yield from ((kernel, tile) for kernel, tiles in CANDIDATES.items() for tile in tiles)


def compile_ahead(module: str, seconds: float, processes: int) -> None:
    """Fill the cache of compiled kernels from processes side by side, each a worker of the module."""
    with Workers(seconds=seconds, at_once=processes) as workers:
        for part in (f"{i}/{processes}" for i in range(processes)):
            workers.start(part, [sys.executable, "-m", module, "--worker", part])
        for part, heard in workers:
            if isinstance(heard, Ended) and heard.code != 0:
                print(f"{part}: {'cut' if heard.code is None else heard.code}: {heard.tail[-300:]}")


def _compile(part: str) -> int:
    for shape in ("cross 256x2048", "self 256x256"):
        tensors = attention_inputs(1, torch.device("cuda"), **ATTENTION[shape][1])
        for kernel, tile in share(list(all_tiles()), part):
            try:
                catch(kernel, tile, tensors)
            except Exception as refusal:
                note(refused=f"{kernel} {tile}", reason=str(refusal)[:200])
    return 0


def time_tiles(sheet: Sheet, device: torch.device, shapes: Sequence[str] = SHAPES) -> None:
    """Time every candidate at every shape, keeping the sheet sorted: fastest first within a kernel and shape."""
    cases: list[dict[str, Any]] = []
    sheet.content["cases"] = cases
    for shape in shapes:
        items, sizes = ATTENTION[shape]
        tensors = attention_inputs(items, device, **sizes)
        for kernel in CANDIDATES:
            group = f"{kernel}, {shape}"
            truth = None
            for tile in (None, *CANDIDATES[kernel]):
                name = "as in the table" if tile is None else "x".join(map(str, tile[:2])) + f" w{tile[2]} s{tile[3]}"
                case = {"suite": "tiles", "group": group, "name": name, "peer": name}
                try:
                    truth = truth or results(kernel, catch(kernel, None, tensors))
                    caught = catch(kernel, tile, tensors)
                    cases.append(case | time_caught(caught, results(kernel, caught), truth))
                except Exception as refusal:
                    cases.append(case | {"refused": str(refusal).partition("\n")[0][:120]})
            cases.sort(key=lambda case: (case["group"], case.get("median_s", 1.0)))
            sheet.write()


def run_sweep(module: str, compile_part: Callable[[str], int], time_all: Callable[[Sheet, torch.device], None]) -> int:
    """Run a part that times launches: compile all of them ahead in workers of `module`, time them, print the times."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", type=float, default=120.0, help="seconds for compiling, at most")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    end_with_parent()
    if options.worker:
        return compile_part(options.worker)
    end_on_sigterm()
    compile_ahead(module, seconds_to_prepare(options.prepare), min(12, os.cpu_count() or 1))
    sheet = Sheet(options.out)
    wait_for_turn()
    time_all(sheet, torch.device("cuda"))
    for case in sheet.content["cases"]:
        times = [f"{1e3 * case[clock]:8.4f} ms" for clock in ("median_s", "cold_median_s") if clock in case]
        print(f"{case['group']:44} {case['name']:50} {', cold '.join(times) or case.get('refused') or case['red']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_sweep("bench.gpu_tiles", _compile, time_tiles))
