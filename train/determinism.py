"""The deterministic state of the process: entered once, refused where it cannot be had.

On a GPU: deterministic algorithms, the cuBLAS workspace fixed before CUDA starts, TF32 and reduced-precision sums as
the recipe says. On a CPU: the number of threads, which is part of the bits. `fingerprint` names what bits may depend on
beside the recipe.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.dispatch import resolve
from train.memory import keep_freed_memory

CUBLAS_WORKSPACE = ":4096:8"
PRECISIONS = ("fp32", "tf32", "bf16")
# whether ptxas and LLVM make one operation of a product and a sum
FP_FUSION = "TRITON_DEFAULT_FP_FUSION"
# variables that make libraries choose or compile other code than by themselves, unseen by the fingerprint
FORBIDDEN_VARIABLES = (
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TRITON_F32_DEFAULT",
    FP_FUSION,
    "TRITON_FORCE_DISABLE_FP_FUSION",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_OVERRIDE_ARCH",
    "DISABLE_LLVM_OPT",
    "DISABLE_PTXAS_OPT",
    "PTXAS_OPTIONS",
)
# values that such a variable may have: what happens without it. Triton 3.9 advises to set this one, since 3.10 will do
# the opposite by itself; up to 3.9 nothing else reads it but the key under which compiled kernels are kept
HARMLESS_VALUES = {FP_FUSION: "1"}


class EnvironmentRefused(RuntimeError):
    """The process cannot be made deterministic: names the variable or flag and the cure."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a run computes: resolved once, the same for all its steps."""

    device: torch.device
    precision: str
    impl: str
    threads: int = 1

    def autocast(self) -> torch.autocast:
        """bf16 matrix products where the precision asks for them."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def record(self) -> dict[str, str]:
        """What a checkpoint and a certificate keep of it; runs with equal records and recipes have equal bits."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "impl": self.impl,
            "threads": str(self.threads),
            "fingerprint": fingerprint(self.device),
        }


def enter(*, threads: int, precision: str, impl: str, device: str | None = None) -> Machine:
    """Put the process into its deterministic state and resolve what "auto" means here.

    Args:
        threads: of the CPU.
        precision: of matrix products: auto (bf16 on a GPU from sm_80, else fp32), fp32, tf32, bf16.
        impl: of the operators: auto (triton on a GPU from sm_80, else eager), eager, triton.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU where there is one.
    Raises:
        ValueError: an argument names something this machine does not have, or no thread.
        EnvironmentRefused: a variable makes libraries choose other code, or a setting comes too late to change.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device must be one that is there, got {device!r} and no CUDA device")
        # before anything asks the card what it is, which starts CUDA
        _fix_cublas_workspace()
        if place.index is not None:
            # Triton launches on the current device, wherever the tensors are
            torch.cuda.set_device(place)
    # older GPUs have neither the bfloat16 nor the shared memory that the kernels are written for
    modern = place.type == "cuda" and torch.cuda.get_device_capability(place) >= (8, 0)
    if precision == "auto":
        precision = "bf16" if modern else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and place.type != "cuda":
        raise ValueError("precision 'tf32' needs a CUDA device")
    if impl == "auto" and not modern:
        impl = "eager"
    impl = resolve(impl, place)
    for variable in refused_variables():
        raise EnvironmentRefused(
            f"{variable} must not be set, it is {os.environ[variable]!r} and changes how results are computed: "
            f"unset {variable} and start again"
        )
    if place.type == "cuda" and impl == "triton" and os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise EnvironmentRefused("TRITON_INTERPRET must not be set on a GPU: unset TRITON_INTERPRET and start again")
    if impl == "triton":
        # with line numbers in them ptxas makes other machine code of some kernels
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    if place.type == "cpu":
        keep_freed_memory()
    machine = Machine(device=place, precision=precision, impl=impl, threads=threads)
    _set_state(machine)
    check_state(machine)
    return machine


def refused_variables() -> list[str]:
    """Name the variables that are set here and make libraries choose or compile other code."""
    return [name for name in FORBIDDEN_VARIABLES if os.environ.get(name) not in (None, HARMLESS_VALUES.get(name))]


def check_state(machine: Machine) -> None:
    """Check that the process still is in the state that `enter` put it into.

    Raises:
        EnvironmentRefused: something changed a flag or the number of threads, or did not let them be set.
    """
    tf32 = machine.precision == "tf32"
    try:
        found = {
            "torch.get_num_threads()": (torch.get_num_threads(), machine.threads),
            "torch.are_deterministic_algorithms_enabled()": (torch.are_deterministic_algorithms_enabled(), True),
            "torch.backends.cudnn.benchmark": (torch.backends.cudnn.benchmark, False),
            "torch.backends.cudnn.deterministic": (torch.backends.cudnn.deterministic, True),
            "torch.backends.cuda.matmul.allow_tf32": (torch.backends.cuda.matmul.allow_tf32, tf32),
            "torch.backends.cudnn.allow_tf32": (torch.backends.cudnn.allow_tf32, tf32),
            "torch.get_float32_matmul_precision()": (
                torch.get_float32_matmul_precision(),
                "high" if tf32 else "highest",
            ),
            "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": (
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
                False,
            ),
        }
    except RuntimeError as error:
        # PyTorch refuses to read its TF32 flags where they were set in two ways
        raise EnvironmentRefused(f"{error}: start a process in which nothing else sets precision flags") from error
    for name, (value, wanted) in found.items():
        if value != wanted:
            raise EnvironmentRefused(
                f"{name} must be {wanted}, it is {value}: something in this process changed it, or the variables "
                "OMP_THREAD_LIMIT and OMP_DYNAMIC do not let it be set; start again without that"
            )


def fingerprint(device: torch.device | str = "cpu") -> str:
    """Name what the bits of a run may depend on beside its recipe: processor or GPU architecture, and libraries.

    On a CPU matrix libraries choose code by vendor, family, model and instruction set. On a GPU they choose it by
    architecture and number of multiprocessors, and Triton compiles the kernels.
    """
    device = torch.device(device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        place = f"sm_{card.major}{card.minor} with {card.multi_processor_count} multiprocessors"
        return f"{place}, torch {torch.__version__}, triton {triton_version()}"
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    info = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    place = f"{info.get('vendor_id')} family {info.get('cpu family')} model {info.get('model')}"
    return f"{place} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"


def triton_version() -> str | None:
    """The version of Triton that is imported here, under whatever name it was installed; None without one."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _set_state(machine: Machine) -> None:
    torch.set_num_threads(machine.threads)
    torch.use_deterministic_algorithms(True)
    # a property of the module, which type checkers do not see
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    tf32 = machine.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _fix_cublas_workspace() -> None:
    """cuBLAS reads the variable when CUDA starts: set it before, or refuse."""
    found = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if found == CUBLAS_WORKSPACE:
        return
    if found is not None or torch.cuda.is_initialized():
        raise EnvironmentRefused(
            f"CUBLAS_WORKSPACE_CONFIG must be {CUBLAS_WORKSPACE} before CUDA starts, it is {found!r}: "
            f"export CUBLAS_WORKSPACE_CONFIG={CUBLAS_WORKSPACE} and start again"
        )
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE
