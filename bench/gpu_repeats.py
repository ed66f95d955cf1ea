"""Bits on the GPU: the same on every repeat under load, for an item alone, and in processes with cold caches.

repeats     each configuration of each operator, forward and backward, a thousand times while another stream multiplies
            and copies; memory is handed out full of NaN; results are compared on the device, which never waits
alone       the first and the last item by themselves have the bits they have among the others
processes   three fresh processes, each with its own empty cache of compiled kernels and its own hash seed: the same
            results and the same machine code
"""

import argparse
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.gpu_cases import OperatorCase, Tensors, core_cases, item
from bench.gpu_cases_layers import layer_cases
from bench.gpu_process import Ended, Sheet, Workers, end_on_sigterm, end_with_parent, note, share
from train.determinism import CUBLAS_WORKSPACE
from train.trace import digest

HASH_SEEDS = ("0", "1", "4242")
_WORKERS = 6
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE, "TRITON_DISABLE_LINE_INFO": "1", "OMP_NUM_THREADS": "2"
}  # fmt: skip
T = TypeVar("T")
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cases() -> list[OperatorCase]:
    """All configurations of all operators, those that training launches first."""
    return sorted([*core_cases(), *layer_cases()], key=lambda case: not case.trained)


class Load:
    """Work on another stream that competes for multiprocessors, cache and memory; nothing on a CPU."""

    def __init__(self, device: torch.device, size: int = 4096):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream:
            self._left, self._right = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
            self._product = torch.empty_like(self._left)
            torch.cuda.synchronize()

    def more(self) -> None:
        """Queue one product and one copy."""
        if self._stream:
            with torch.cuda.stream(self._stream):
                torch.mm(self._left, self._right, out=self._product)
                self._product.copy_(self._right)

    def end(self) -> None:
        """Wait until nothing of it runs: only then may its memory be given to others."""
        if self._stream:
            self._stream.synchronize()


def count_differing(case: OperatorCase, tensors: Tensors, repeats: int) -> int:
    """Return how many of `repeats` results under load differ in any bit from the first, which had none."""
    first = case.solve(tensors)
    some = next(iter(first.values()))
    load, differing = Load(some.device), torch.zeros((), dtype=torch.int64, device=some.device)
    try:
        for _ in range(repeats):
            load.more()
            found = case.solve(tensors)
            pairs = [(words(x) != words(found[name])).any() for name, x in first.items() if x.numel()]
            differing += torch.stack(pairs).any()
        return int(differing)
    finally:
        load.end()


def words(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers of its element size."""
    return x.view(_WORDS[x.element_size()])


def differing_alone(case: OperatorCase, tensors: Tensors) -> list[str]:
    """Names of results in which the first or the last item by itself has other bits than among the others."""
    among = case.solve(tensors)
    names = []
    for number in (0, case.items - 1):
        alone = case.solve(item(tensors, number))
        expected = item(among, number)
        names += [f"{name}[{number}]" for name in among if "_B" in name and not _equal(alone[name], expected[name])]
    return names


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(words(x.contiguous()), words(y.contiguous()))


def sweep(case: OperatorCase, device: torch.device, repeats: int) -> dict[str, Any]:
    """Check one configuration; returns what is kept of it."""
    started = time.monotonic()
    tensors = case.make(case.items, device)
    found = case.solve(tensors)
    unwritten = [name for name, x in found.items() if x.is_floating_point() and not x.isfinite().all()]
    line = {
        "operator": case.operator,
        "case": case.name,
        "alone_differs": differing_alone(case, tensors),
        "not_finite": unwritten,
        "repeats": repeats,
        "differing": count_differing(case, tensors, repeats),
    }
    return line | {"seconds": round(time.monotonic() - started, 1)}


def digests(device: torch.device) -> dict[str, str]:
    """The digest of all results of each configuration that training launches; errors are noted."""
    found = {}
    for case in cases():
        if case.trained and (result := _tried(case, lambda c: digest(c.solve(c.make(c.items, device))), device)):
            found[f"{case.operator} {case.name}"] = result
    return found


def _tried(case: OperatorCase, act: Callable[[OperatorCase], T], device: torch.device) -> T | None:
    """What an action returns, or None after an error, which is noted.

    Raises:
        RuntimeError: the error left the device in a state in which no later call succeeds.
    """
    try:
        return act(case)
    except Exception as error:
        note(operator=case.operator, case=case.name, error=f"{type(error).__name__}: {error}"[:500])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return None


def cubins(cache: Path) -> dict[str, list[str]]:
    """SHA-256 of the machine code in a cache of compiled kernels, by kernel."""
    found: dict[str, list[str]] = {}
    for path in sorted(cache.rglob("*.cubin")):
        found.setdefault(path.stem, []).append(hashlib.sha256(path.read_bytes()).hexdigest()[:16])
    return {name: sorted(codes) for name, codes in sorted(found.items())}


def compare_processes(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What three processes agree on; names what they do not."""
    keys = {(kind, name) for process in found for kind in ("digests", "cubins") for name in process[kind]}
    differing = {
        kind: sorted(n for k, n in keys if k == kind and len({str(process[kind].get(n)) for process in found}) > 1)
        for kind in ("digests", "cubins")
    }
    kernels = sum(len(codes) for codes in found[0]["cubins"].values()) if found else 0
    return {"processes": len(found), "results": len(found[0]["digests"]) if found else 0, "kernels": kernels} | {
        f"differing_{kind}": names for kind, names in differing.items()
    }


def _work(options: argparse.Namespace) -> int:
    """Be a worker: sweep every n-th configuration, or digest those of training."""
    end_with_parent()
    device = torch.device(options.device)
    torch.use_deterministic_algorithms(True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    if options.worker == "digests":
        found = digests(device)
        note(digests=found, cubins=cubins(Path(os.environ["TRITON_CACHE_DIR"])))
        return 0
    for case in share(cases(), options.worker)[options.skip :]:
        note(began=f"{case.operator} {case.name}")
        if line := _tried(case, lambda c: sweep(c, device, options.repeats), device):
            note(**line)
    return 0


def run_sweeps(sheet: Sheet, *, repeats: int, device: str, processes: int, seconds: float = math.inf) -> None:
    """Start all workers and keep the sheet up to date with what they find; one that dies is followed by another."""
    worker = [sys.executable, "-m", "bench.gpu_repeats", "--device", device, "--repeats", str(repeats), "--worker"]
    content, fresh = sheet.content, []
    content |= {"configurations": len(cases()), "swept": [], "processes": compare_processes([]), "errors": []}
    sheet.write()
    # of each worker, how many configurations it has begun, and with which the process began that runs now
    began, skipped = ({f"{i}/{processes}": 0 for i in range(processes)} for _ in range(2))
    with (
        tempfile.TemporaryDirectory() as caches,
        Workers(seconds=seconds, at_once=processes + len(HASH_SEEDS)) as workers,
    ):
        for seed in HASH_SEEDS:
            environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": f"{caches}/{seed}", "PYTHONHASHSEED": seed}
            workers.start(f"hash seed {seed}", [*worker, "digests"], environment)
        for part in began:
            workers.start(part, [*worker, part], ENVIRONMENT)
        for name, heard in workers:
            if isinstance(heard, Ended):
                if heard.code != 0:
                    content["errors"].append({"worker": name, "code": heard.code, "tail": heard.tail[-800:]})
                if name in began and heard.code not in (0, None) and began[name] > skipped[name]:
                    skipped[name] = began[name]
                    workers.start(name, [*worker, name, "--skip", str(began[name])], ENVIRONMENT)
            elif "digests" in heard:
                fresh.append(heard)
                content["processes"] = compare_processes(fresh)
            elif "began" in heard:
                began[name] += 1
            else:
                content["errors" if "error" in heard else "swept"].append(heard)
            sheet.write()


def is_green(content: dict[str, Any]) -> bool:
    """Whether all was swept and nothing differed."""
    swept, processes = content["swept"], content["processes"]
    return (
        len(swept) == content["configurations"]
        and not any("error" in error for error in content["errors"])
        and not any(line["differing"] or line["alone_differs"] or line["not_finite"] for line in swept)
        and processes["processes"] == len(HASH_SEEDS)
        and not processes["differing_digests"] + processes["differing_cubins"]
    )


def main() -> int:
    """Run the part; exit code 0 only if everything was checked and no bit differed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_repeats")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=min(_WORKERS, os.cpu_count() or 1))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options)
    end_on_sigterm()
    end_with_parent()
    sheet = Sheet(options.out)
    run_sweeps(
        sheet, seconds=options.seconds, repeats=options.repeats, device=options.device, processes=options.processes
    )
    swept = sheet.content["swept"]
    differing = sum(bool(line["differing"] or line["alone_differs"] or line["not_finite"]) for line in swept)
    print(f"{len(swept)} of {sheet.content['configurations']} configurations swept, {differing} with differing bits")
    return int(not is_green(sheet.content))


if __name__ == "__main__":
    sys.exit(main())
