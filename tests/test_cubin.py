"""Machine code is counted by class, occupancy follows the programming guide, and the time bound its arithmetic."""

import pytest

from bench.cubin import GPUS, MachineCode, fused_sums, occupancy, time_bound_us


def code(*opcodes: str, loops: tuple[tuple[int, int], ...] = ()) -> MachineCode:
    instructions = tuple((16 * number, opcode) for number, opcode in enumerate(opcodes))
    return MachineCode(registers=32, stack_bytes=0, instructions=instructions, loops=loops, fused_sums=0, sha256="")


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "matrix"),
        ("HGMMA.64x64x16.F32.BF16", "matrix"),
        ("UTCHMMA", "matrix"),
        ("HFMA2.MMA", "other"),
        ("MUFU.EX2", "special"),
        ("LDL.LU", "spill"),
        ("STL.64", "spill"),
        ("LDG.E.128", "global load"),
        ("LDGDEPBAR", "barrier"),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomic"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomic"),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", "atomic"),
        ("ATOMS.OR", "shared atomic"),
        ("REDUX.SUM", "shuffle"),
        ("UTCATOMSWS.AND", "other"),
    ],
)
def test_an_instruction_has_its_class(opcode, kind):
    assert code(opcode).mix() == {kind: 1}
    assert code(opcode, opcode).opcodes(kind) == {opcode: 2}


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "blocks", "limiter"),
    [
        (80, 32, 8, 0, 8, "registers + warps"),
        (80, 33, 8, 0, 6, "registers"),
        (90, 255, 4, 0, 2, "registers"),
        (90, 168, 8, 0, 1, "registers"),
        (90, 32, 4, 100 << 10, 2, "shared memory"),
        (89, 40, 4, 0, 12, "registers + warps"),
        (86, 16, 1, 0, 16, "blocks"),
        (90, 32, 4, 228 << 10, 0, "shared memory"),
    ],
)
def test_occupancy_is_that_of_the_programming_guide(arch, registers, warps, shared, blocks, limiter):
    assert occupancy(GPUS[arch], registers, warps, shared) == (blocks, limiter)


def bound(
    *opcodes: str, programs: int = 1, warps: int = 4, tensor_bytes: int = 0, trips: int = 1, loops=(), main_loop=None
):
    return time_bound_us(
        GPUS[90],
        code(*opcodes, loops=loops),
        programs=programs,
        warps=warps,
        tensor_bytes=tensor_bytes,
        trips=trips,
        main_loop=main_loop or {},
    )


def test_bytes_over_bandwidth_bound_the_time():
    time_us, unit = bound("EXIT", tensor_bytes=4_800_000)
    assert (time_us, unit) == (pytest.approx(1.0), "memory")


def test_only_the_main_loop_counts_as_often_as_it_runs():
    opcodes = ["IADD"] * 12
    opcodes[6] = "SHFL.BFLY"
    nested, longer = ((16, 48), (32, 32)), ((80, 144),)

    def issued(**arguments) -> float:
        time_us, _ = bound(*opcodes, **arguments)
        return time_us * 1.83 * 1e3

    assert issued() == pytest.approx(12)
    assert issued(trips=10) == pytest.approx(12)
    assert issued(loops=nested + longer) == pytest.approx(12)
    assert issued(loops=nested + longer, trips=10) == pytest.approx(30)
    assert issued(loops=nested + longer, trips=10, main_loop={"shuffle": 1}) == pytest.approx(50)
    assert issued(loops=nested + longer, trips=10, main_loop={"shuffle": 2}) == pytest.approx(12)


def test_the_busiest_multiprocessor_and_scheduler_bound_the_time():
    once, _ = bound("IADD", programs=132)
    assert bound("IADD", programs=133)[0] == pytest.approx(2 * once)
    assert bound("IADD", programs=132, warps=1)[0] == pytest.approx(once)
    assert bound("IADD", programs=132, warps=8)[0] == pytest.approx(2 * once)


@pytest.mark.parametrize(
    ("opcode", "cycles", "unit"),
    [
        ("HMMA.16816.F32.BF16", 4096 / 1024, "matrix units"),
        ("HMMA.1688.F32.TF32", 2048 / 512, "matrix units"),
        ("HGMMA.64x64x16.F32.BF16", 32768 / 1024, "matrix units"),
        ("MUFU.EX2", 8, "special functions"),
        ("LDS.128", 4, "shared memory"),
        ("FFMA", 1, "issue"),
    ],
)
def test_a_unit_takes_its_cycles(opcode, cycles, unit):
    assert bound(opcode) == (pytest.approx(cycles / (1.83 * 1e3)), unit)


PRODUCT = ("FMUL", "R4, R2, R3.reuse")
SHUFFLE = ("SHFL.BFLY", "PT, R5, R4, 0x10, 0x1f")


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ([PRODUCT, SHUFFLE, ("FFMA", "R6, R2.reuse, R3, R5")], 1),
        ([PRODUCT, SHUFFLE, ("FFMA", "R6, R3, R2, R5")], 1),
        ([PRODUCT, SHUFFLE, ("FFMA", "R6, -R2, R3, -R5")], 1),
        ([PRODUCT, SHUFFLE, ("FADD", "R6, R4, R5")], 0),
        ([PRODUCT, SHUFFLE, ("FFMA", "R6, R7, R3, R5")], 0),
        ([PRODUCT, SHUFFLE, ("MOV", "R5, RZ"), ("FFMA", "R6, R2, R3, R5")], 0),
        ([("FFMA", "R4, R2, R3, RZ"), SHUFFLE, ("FADD", "R6, R4, R5")], 0),
        ([PRODUCT, ("FADD", "R4, R4, R9"), SHUFFLE, ("FFMA", "R6, R2, R3, R5")], 0),
    ],
)
def test_a_product_that_a_lane_adds_unrounded_to_that_of_another_is_counted(lines, count):
    assert fused_sums(lines) == count
