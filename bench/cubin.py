"""What a kernel's machine code says: registers, spills, instruction mix, occupancy, and a lower bound of its time.

The bound is the largest of: compulsory bytes over bandwidth, and per execution unit the cycles of the busiest
multiprocessor. Where the number of trips of the main loop is known, only that loop counts: the rest may be a path that
is not taken. Else every instruction counts once. The bound knows nothing of latency, barriers and caches and was never
compared with hardware: good for ranking and for finding regressions.
"""

import collections
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of one architecture: limits of the programming guide, rates of the data sheet."""

    name: str
    warps: int
    blocks: int
    shared_bytes: int
    multiprocessors: int
    ghz: float
    gigabytes_per_s: float
    # per clock and multiprocessor, dense, float32 accumulator
    bf16_flop: int
    tf32_flop: int
    fp32_lanes: int

    @property
    def shared_bytes_per_block(self) -> int:
        return self.shared_bytes - 1024


REGISTERS = 65536
GPUS = {
    80: Gpu(
        name="A100 80GB", warps=64, blocks=32, shared_bytes=164 << 10, multiprocessors=108, ghz=1.41,
        gigabytes_per_s=2039, bf16_flop=2048, tf32_flop=1024, fp32_lanes=64,
    ),
    86: Gpu(
        name="RTX 3090", warps=48, blocks=16, shared_bytes=100 << 10, multiprocessors=82, ghz=1.70,
        gigabytes_per_s=936, bf16_flop=512, tf32_flop=256, fp32_lanes=128,
    ),
    89: Gpu(
        name="RTX 4090", warps=48, blocks=24, shared_bytes=100 << 10, multiprocessors=128, ghz=2.52,
        gigabytes_per_s=1008, bf16_flop=512, tf32_flop=256, fp32_lanes=128,
    ),
    90: Gpu(
        name="H200", warps=64, blocks=32, shared_bytes=228 << 10, multiprocessors=132, ghz=1.83,
        gigabytes_per_s=4800, bf16_flop=4096, tf32_flop=2048, fp32_lanes=128,
    ),
    100: Gpu(
        name="B200", warps=64, blocks=32, shared_bytes=228 << 10, multiprocessors=148, ghz=1.85,
        gigabytes_per_s=8000, bf16_flop=8192, tf32_flop=4096, fp32_lanes=128,
    ),
}  # fmt: skip

_CLASSES = {
    "matrix": r"HMMA|HGMMA|QGMMA|QMMA|OMMA|IMMA|DMMA|UTC\w*MMA",
    "fp32": r"FFMA2?|FADD2?|FMUL2?|FMNMX3?|FSEL|FSETP|FSET|FCHK",
    "special": r"MUFU",
    "global load": r"LDG|LD|LDGSTS|UTMALDG|UBLKCP",
    "global store": r"STG|ST|UTMASTG",
    "shared": r"LDS|LDSM|STS|STSM",
    "spill": r"LDL|STL",
    "shuffle": r"SHFL|REDUX",
    "barrier": r"BAR|WARPSYNC|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR",
    "atomic": r"ATOM|ATOMG|RED|REDG|SUATOM|SURED|UTMAREDG|UBLKRED",
    "shared atomic": r"ATOMS",
    "convert": r"F2F|F2FP|I2F|I2FP|F2I",
    "branch": r"BRA|BSSY|BSYNC|EXIT|CALL|RET",
}
_PATTERNS = {name: re.compile(rf"({pattern})(\.|$)") for name, pattern in _CLASSES.items()}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s?(.*?);", re.M)


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """One kernel's machine code: (address, opcode) in order, the spans of its loops, see also `fused_sums`."""

    registers: int
    stack_bytes: int
    instructions: tuple[tuple[int, str], ...]
    loops: tuple[tuple[int, int], ...]
    fused_sums: int
    sha256: str

    def mix(self) -> dict[str, int]:
        """Count instructions by class, in the order of the classes."""
        counts = collections.Counter(_classify(opcode) for _, opcode in self.instructions)
        return {name: counts[name] for name in (*_CLASSES, "other") if counts[name]}

    def opcodes(self, name: str) -> dict[str, int]:
        """Count the opcodes of one class."""
        return dict(sorted(collections.Counter(op for _, op in self.instructions if _classify(op) == name).items()))


@functools.cache
def read(cubin: bytes) -> MachineCode:
    """Disassemble a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        listing = _cuobjdump("-sass", path)
    ((registers, stack_bytes),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    lines = [(int(address, 16), opcode, rest) for address, opcode, rest in _INSTRUCTION.findall(listing)]
    # the listing ends with a branch to itself and padding, which never run
    while lines and lines[-1][1] == "NOP":
        lines.pop()
    if lines and lines[-1][1] == "BRA":
        lines.pop()
    targets = [(address, re.search(r"0x([0-9a-f]+)", rest)) for address, op, rest in lines if op.startswith("BRA")]
    loops = tuple((int(t[1], 16), address) for address, t in targets if t and int(t[1], 16) < address)
    return MachineCode(
        registers=int(registers),
        stack_bytes=int(stack_bytes),
        instructions=tuple((address, opcode) for address, opcode, _ in lines),
        loops=loops,
        fused_sums=fused_sums((opcode, rest) for _, opcode, rest in lines),
        sha256=hashlib.sha256(cubin).hexdigest(),
    )


def fused_sums(lines: Iterable[tuple[str, str]]) -> int:
    """Count sums over lanes into which a lane fuses its own product, while it hands on a rounded one.

    Found are those whose three instructions follow each other in the listing, with other ones between.

    Args:
        lines: opcodes and operands, in order.
    """
    products: dict[str, frozenset[str]] = {}
    others: dict[str, frozenset[str]] = {}
    count = 0
    for opcode, rest in lines:
        operands = [operand.strip().removesuffix(".reuse").lstrip("-") for operand in rest.split(",")]
        kind, (target, *sources) = opcode.partition(".")[0], operands
        product, other = frozenset(sources[:2]), None
        if opcode == "SHFL.BFLY":
            target, other = operands[1], products.get(operands[2])
        elif kind == "FFMA":
            count += others.get(sources[-1]) == product
        products.pop(target, None)
        others.pop(target, None)
        if kind == "FMUL":
            products[target] = product
        elif other:
            others[target] = other
    return count


def occupancy(gpu: Gpu, registers: int, warps: int, shared_bytes: int) -> tuple[int, str]:
    """Return how many blocks fit on a multiprocessor, and what keeps out the next one."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    fits = {
        "registers": REGISTERS // registers_per_warp // 4 * 4 // warps,
        "shared memory": gpu.shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128),
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
    }
    blocks = min(fits.values())
    return blocks, " + ".join(name for name, fit in fits.items() if fit == blocks)


def time_bound_us(
    gpu: Gpu,
    code: MachineCode,
    *,
    programs: int,
    warps: int,
    tensor_bytes: int,
    trips: int,
    main_loop: Mapping[str, int],
) -> tuple[float, str]:
    """Return a lower bound of a launch's time in microseconds, and the unit that sets it.

    Args:
        trips: how often the main loop runs; 1 where that is unknown.
        main_loop: the main loop is the shortest outermost one with at least these counts of instructions by class.
    """
    loop = _shortest_loop(code, main_loop) if trips > 1 else None
    begin, end = loop or (0, code.instructions[-1][0])
    trips = trips if loop else 1
    cycles: dict[str, float] = collections.defaultdict(float)
    for address, opcode in code.instructions:
        if not begin <= address <= end:
            continue
        cycles["issue"] += trips
        kind = _classify(opcode)
        if kind == "matrix":
            rate = gpu.tf32_flop if "TF32" in opcode else gpu.bf16_flop
            cycles["matrix units"] += trips * _matrix_flop_per_warp(opcode) / (rate / 4)
        elif kind == "fp32":
            cycles["fp32 units"] += trips * 32 / (gpu.fp32_lanes / 4)
        elif kind == "special":
            cycles["special functions"] += trips * 8
        elif kind in ("shared", "shuffle", "spill"):
            cycles["shared memory"] += trips * 4
    # a multiprocessor has four schedulers, and a warp stays on one
    warps_per_scheduler = -(-(-(-programs // gpu.multiprocessors) * warps) // 4)
    bounds = {unit: count * warps_per_scheduler / gpu.ghz / 1e3 for unit, count in cycles.items()}
    bounds["memory"] = tensor_bytes / gpu.gigabytes_per_s / 1e3
    unit = max(bounds, key=bounds.__getitem__)
    return bounds[unit], unit


def _shortest_loop(code: MachineCode, least: Mapping[str, int]) -> tuple[int, int] | None:
    """Return the first and last address of the shortest loop in no other one with at least these instructions."""
    found = []
    for begin, end in code.loops:
        inner = any(b <= begin and end <= e and (b, e) != (begin, end) for b, e in code.loops)
        mix = collections.Counter(_classify(opcode) for address, opcode in code.instructions if begin <= address <= end)
        if not inner and all(mix[kind] >= count for kind, count in least.items()):
            found.append((begin, end))
    return min(found, key=lambda span: span[1] - span[0], default=None)


@functools.cache
def _classify(opcode: str) -> str:
    return next((name for name, pattern in _PATTERNS.items() if pattern.match(opcode)), "other")


def _matrix_flop_per_warp(opcode: str) -> float:
    """Return the FLOP of one instruction per warp; 0 where the opcode does not tell its shape (sm_100)."""
    sizes = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
    if found := re.match(r"HMMA\.(\d+)", opcode):
        rows, columns, depth = sizes[found[1]]
        return 2 * rows * columns * depth
    if found := re.match(r"HGMMA\.64x(\d+)x(\d+)", opcode):
        # one instruction of a warp group of four
        return 2 * 64 * int(found[1]) * int(found[2]) / 4
    return 0


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
