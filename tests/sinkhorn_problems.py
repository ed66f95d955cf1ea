"""Sinkhorn problems of every kind, and how the tests solve and differentiate them."""

import torch
from torch.nn.functional import pad

from kernels.sinkhorn import Transport, sinkhorn, sinkhorn_reference

KINDS = ("full", "minimal", "balanced", "weights", "weights_with_dustbin", "row_weights_with_dustbin")
OUTPUTS = Transport._fields


def problem(kind: str, *, B: int = 3, N: int = 9, M: int = 13, scale: float = 3.0, seed: int = 0) -> dict:
    """Return the tensors of one problem in float64: the arguments of `sinkhorn` that depend on its kind."""
    generator = torch.Generator().manual_seed(seed)
    cost = scale * torch.rand(B, N, M, generator=generator, dtype=torch.float64)
    rows = torch.tensor([N, max(N - 4, 1), N, 2])[:B].clamp(max=N)
    cols = torch.tensor([M, max(M - 5, 1), 1, M])[:B].clamp(max=M)
    log_a, log_b = (_log_weights(B, size, generator) for size in (N, M))
    arguments = {"cost_BNM": cost}
    if kind in ("full", "minimal", "balanced"):
        arguments |= {"rows_B": rows, "cols_B": cols}
    elif kind == "row_weights_with_dustbin":
        arguments |= {"log_a_BN": log_a, "cols_B": cols}
    else:
        arguments |= {"log_a_BN": log_a, "log_b_BM": log_b}
    if kind not in ("balanced", "weights"):
        arguments["dustbin"] = torch.tensor(0.3 * scale, dtype=torch.float64)
    if kind == "minimal":
        arguments["slack"] = "minimal"
    return arguments


def with_weightless(arguments: dict, *, rows: int, cols: int) -> dict:
    """Return a problem of weights with more rows and columns, of no mass and of cost NaN."""
    return arguments | {
        "cost_BNM": pad(arguments["cost_BNM"], (0, cols, 0, rows), value=torch.nan),
        "log_a_BN": pad(arguments["log_a_BN"], (0, rows), value=-torch.inf),
        "log_b_BM": pad(arguments["log_b_BM"], (0, cols), value=-torch.inf),
    }


def balanced(N: int, M: int, seed: int) -> dict:
    """Return two problems of weights without a dustbin that converge fast, as float32."""
    generator = torch.Generator().manual_seed(seed)
    log_a, log_b = (torch.randn(2, size, generator=generator).log_softmax(1) for size in (N, M))
    return {"cost_BNM": 3 * torch.rand(2, N, M, generator=generator), "log_a_BN": log_a, "log_b_BM": log_b}


def assert_without_drift(arguments: dict, device, **options) -> None:
    """Check d log a and d log b after 40 iterations: no error beyond 2e-6 of the largest sum of |upstream| plan.

    It is the floor of these gradients: their true values are differences of such sums, and may be far smaller.
    """
    upstream = torch.randn(arguments["cost_BNM"].shape, generator=torch.Generator().manual_seed(1))

    def solve(solver, arguments, **options):
        plan = solver(**arguments, eps=1.0, iterations=40, **options).plan_BNM
        leaves = arguments["log_a_BN"], arguments["log_b_BM"]
        return plan, torch.autograd.grad(plan, leaves, upstream.to(plan))

    plan, truth = solve(sinkhorn_reference, cast(arguments, torch.float64))
    _, actual = solve(sinkhorn, cast(arguments, torch.float32, device), **options)
    for axis, found, expected in zip((2, 1), actual, truth, strict=True):
        floor = 2e-6 * (upstream * plan).abs().sum(axis).max().item()
        assert (found.cpu() - expected).abs().max().item() <= floor


def _log_weights(B: int, size: int, generator: torch.Generator) -> torch.Tensor:
    weights = torch.randn(B, size, generator=generator, dtype=torch.float64)
    weights[-1, size - 2 :] = -torch.inf
    return weights.log_softmax(1)


def cast(arguments: dict, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict:
    """Return the problem on a device with its float tensors in another dtype, as leaves that require gradients."""
    return {
        name: value
        if not isinstance(value, torch.Tensor)
        else value.detach().to(device, dtype).requires_grad_()
        if value.is_floating_point()
        else value.to(device)
        for name, value in arguments.items()
    }


def differentiate(solve, arguments: dict, **settings) -> dict[str, torch.Tensor]:
    """Return the three outputs of `solve` by name, and every gradient of a fixed random combination of them."""
    transport = solve(**arguments, **settings)
    loss = 0.0
    for output in transport:
        generator = torch.Generator().manual_seed(output.numel() + output.dim())
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output.to(torch.float64).cpu() * upstream).sum()
    leaves = {name: value for name, value in arguments.items() if torch.is_tensor(value) and value.requires_grad}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {
        f"d {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return dict(zip(OUTPUTS, transport, strict=True)) | named


def truth_and_eager(arguments: dict, **settings) -> tuple[dict, dict]:
    """Return what the reference gives in float64 and in float32 for the same (already rounded) numbers."""
    return tuple(
        differentiate(sinkhorn_reference, cast(arguments, dtype), **settings)
        for dtype in (torch.float64, torch.float32)
    )
