"""Each configuration of each operator once under NVIDIA's compute-sanitizer, where the machine has it.

memcheck     accesses outside of an allocation, or of the wrong alignment
initcheck    reads of memory that nobody wrote
racecheck    threads of a program that meet in shared memory without a barrier between them

Each tool must also find a defect that is planted for it, or what it says of the operators counts for nothing.
"""

import argparse
import math
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.gpu_process import Ended, Sheet, Workers, end_on_sigterm, end_with_parent, note, share
from bench.gpu_repeats import cases

TOOL = "compute-sanitizer"
# tool -> its options; without padding what lies behind an allocation may belong to the next one
TOOLS = {"memcheck": ("--padding", "256"), "initcheck": (), "racecheck": ()}
# where CUDA's toolkit has it if it is not on the path
_TOOLKIT = "/usr/local/cuda/bin"
PLANTED = "planted"
FOUND = 86
_ITEMS, _SHARES, _MOST_MESSAGES = 2, 4, 5
# memory from PyTorch's cache lies inside an allocation, and others have written it
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_DISABLE_LINE_INFO": "1", "OMP_NUM_THREADS": "2"}
_PREFIX = "========= "


@triton.jit
def _store_behind_kernel(x_ptr, size):
    tl.store(x_ptr + size, 1.0)


@triton.jit
def _read_unwritten_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr) + 1.0)


@triton.jit
def _race_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 256)
    x = tl.load(x_ptr + offs)
    # one word of the shared memory that the sum has reserved: every warp writes and reads it
    read = tl.inline_asm_elementwise(
        "{ .reg .b32 at; mov.b32 at, global_smem; st.shared.b32 [at], $1; ld.shared.b32 $0, [at]; }",
        "=r,r", [offs], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(y_ptr + offs, tl.sum(x) + read)


def _plant(tool: str, device: torch.device) -> None:
    x, y = torch.empty(256, device=device), torch.zeros(256, device=device)
    if tool == "memcheck":
        _store_behind_kernel[(1,)](x, x.numel())
    elif tool == "initcheck":
        _read_unwritten_kernel[(1,)](x, y)
    else:
        _race_kernel[(1,)](x.zero_(), y)


def tool_path() -> str | None:
    """Where compute-sanitizer is, None if this machine does not have it."""
    return shutil.which(TOOL) or shutil.which(TOOL, path=_TOOLKIT)


def read_log(text: str) -> dict[str, Any]:
    """What a log of compute-sanitizer says: how many defects, None without a summary, and the first in its words."""
    # racecheck: "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    totals = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)
    lines = [line.removeprefix(_PREFIX).strip() for line in text.splitlines() if line.startswith(_PREFIX)]
    told = [line for line in lines if re.match(r"(Invalid|Uninitialized|Error|Warning|Race|Potential|Program)", line)]
    defects = sum(map(int, totals)) if totals else None
    return {"defects": defects, "messages": list(dict.fromkeys(told))[:_MOST_MESSAGES]}


def run_tools(sheet: Sheet, executable: str, *, device: str, select: str, seconds: float = math.inf) -> None:
    """Run all tools side by side and keep the sheet up to date with what they find."""
    sheet.content |= {"tool": executable, "configurations": len(_selected(select)), "tools": {}}
    jobs = [(tool, part) for tool in TOOLS for part in (PLANTED, *(f"{i}/{_SHARES}" for i in range(_SHARES)))]
    logs = {f"{tool} {part}": sheet.path.with_suffix(f".{tool}-{part[0]}.log") for tool, part in jobs}
    with Workers(seconds=seconds, at_once=len(jobs)) as workers:
        for tool, part in jobs:
            log = logs[f"{tool} {part}"]
            log.unlink(missing_ok=True)
            options = ["--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND), "--log-file", str(log)]
            worker = [sys.executable, "-m", "bench.gpu_sanitizer", "--device", device, "--select", select]
            workers.start(f"{tool} {part}", [executable, *options, *worker, "--worker", f"{tool} {part}"], ENVIRONMENT)
        for name, heard in workers:
            tool, _, part = name.partition(" ")
            found = sheet.content["tools"].setdefault(tool, {"called": 0, PLANTED: None, "shares": {}})
            if not isinstance(heard, Ended):
                found["called"] += 1
            else:
                text = logs[name].read_text(errors="replace") if logs[name].exists() else ""
                ended = read_log(text) | {"exit": heard.code}
                if heard.code not in (0, FOUND):
                    ended["tail"] = (text + heard.tail)[-600:]
                if part == PLANTED:
                    found[PLANTED] = ended
                else:
                    found["shares"][part] = ended
            sheet.write()


def is_green(content: Mapping[str, Any]) -> bool:
    """Whether every tool saw every configuration, found nothing, and found what was planted."""
    tools = content.get("tools", {})
    return set(tools) == set(TOOLS) and all(
        bool(found[PLANTED] and found[PLANTED]["defects"])
        and found["called"] == content["configurations"]
        and len(found["shares"]) == _SHARES
        and all(ended["defects"] == 0 and ended["exit"] == 0 for ended in found["shares"].values())
        for found in tools.values()
    )


def _selected(select: str) -> list:
    return [case for case in cases() if select in f"{case.operator} {case.name}"]


def _work(options: argparse.Namespace) -> int:
    """Be what a tool watches: call every n-th configuration once, or only what is planted."""
    device, (tool, _, part) = torch.device(options.device), options.worker.partition(" ")
    if part == PLANTED:
        _plant(tool, device)
    else:
        for case in share(_selected(options.select), part):
            case.solve(case.make(min(case.items, _ITEMS), device))
            note(called=f"{case.operator} {case.name}")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


def main() -> int:
    """Run the part; exit code 0 only if the tools are there, see what is planted, and find nothing else."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sanitizer")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/parts/sanitizer.json"))
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--select", default="", metavar="TEXT", help="only configurations with this in their name")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options)
    end_on_sigterm()
    end_with_parent()
    sheet = Sheet(options.out, tool=None)
    if not (executable := tool_path()):
        print(f"{TOOL} is neither on the path nor in {_TOOLKIT}", file=sys.stderr)
        return 1
    run_tools(sheet, executable, device=options.device, select=options.select, seconds=options.seconds)
    for tool, found in sheet.content["tools"].items():
        defects = [ended["defects"] for ended in found["shares"].values()]
        planted = found[PLANTED] and found[PLANTED]["defects"]
        print(f"{tool}: {found['called']} configurations called, defects {defects}; of what was planted {planted}")
    return int(not is_green(sheet.content))


if __name__ == "__main__":
    sys.exit(main())
