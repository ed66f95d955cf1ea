"""The deterministic state of the process: entered once, refused where it cannot be had.

On a GPU: deterministic algorithms, the cuBLAS workspace fixed before CUDA starts, TF32 and reduced-precision sums as
the recipe says. On a CPU: the number of threads, which is part of the bits.
"""

import os
from dataclasses import dataclass

import torch

CUBLAS_WORKSPACE = ":4096:8"
PRECISIONS = ("fp32", "tf32", "bf16")


class EnvironmentRefused(RuntimeError):
    """The process cannot be made deterministic: names the variable or flag and the cure."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a run computes: resolved once, the same for all its steps."""

    device: torch.device
    precision: str
    impl: str

    def autocast(self) -> torch.autocast:
        """bf16 matrix products where the precision asks for them."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def enter(*, threads: int, precision: str, impl: str, device: str | None = None) -> Machine:
    """Put the process into its deterministic state and resolve what "auto" means here.

    Args:
        threads: of the CPU.
        precision: of matrix products: auto (bf16 on a GPU, fp32 on a CPU), fp32, tf32, bf16.
        impl: of the operators: auto (triton on a GPU, eager on a CPU), eager, triton.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU where there is one.
    Raises:
        ValueError: an argument names something this machine does not have.
        EnvironmentRefused: a setting that comes too late to change.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is there, got {device!r} and no CUDA device")
    if precision == "auto":
        precision = "bf16" if place.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and place.type != "cuda":
        raise ValueError("precision 'tf32' needs a CUDA device")
    if impl == "auto":
        impl = "triton" if place.type == "cuda" else "eager"
    if place.type == "cuda":
        _fix_cublas_workspace()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # a property of the module, which type checkers do not see
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return Machine(device=place, precision=precision, impl=impl)


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
