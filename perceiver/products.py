"""The products of a stack of layers, with weight gradients computed beside the chain of the other gradients.

    y = x W^T,   dx = dy W  at once: the layer before waits for it,   dW = dy^T x  beside: only the optimizer waits

Weights go to the dtype of the products in one launch and their gradients come back in one, with the bits of autocast's
casts. On CUDA the gradients of weights are computed on a second stream. That changes no bit, recorded or not:

- a product is the same call on the same numbers on either stream; PyTorch gives cuBLAS a handle per thread and a
  workspace per stream, so the parts of a product that is split meet no others, and nothing is added by atomics
- each tensor is written by one launch on one stream; what the second stream reads was launched before the event that it
  waits for, and what it writes is read after the event that the first stream waits for
- all memory of tensors is that of the first stream, and is kept until then

Nothing may read a gradient before the join, so detecting anomalies finds any. The weights of a group that has no part
in the result get gradients of 0.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# False: all products on one stream; the same bits
SIDE_STREAM = True


class Products:
    """Linear layers without bias: a matrix product for each group of projections that read the same rows.

    Args:
        groups: projections whose matrices lie below one another in one product; each group is used once.
        dtype: of the products.
    Determinism: repeats bit for bit on one kind of machine; the bits of `torch.nn.functional.linear` on one stream.
    """

    def __init__(self, groups: Sequence[tuple[nn.Linear, ...]], dtype: torch.dtype):
        matrices = [projection.weight for group in groups for projection in group]
        self._side = SideStream(matrices[0].device)
        joined = _Joined.apply(self._side, dtype, [len(group) for group in groups], *matrices)
        self._weights = dict(zip(groups, joined, strict=True))

    def linear(self, x_BTC: torch.Tensor, *group: nn.Linear) -> torch.Tensor:
        """Return the rows times the matrices of a group, side by side: [B, T, N].

        Raises:
            ValueError: there is no such group, or it was used: autograd would add what the second stream still writes.
        """
        if group not in self._weights:
            raise ValueError(f"group must be one of the products and used once, got {', '.join(map(str, group))}")
        return _Linear.apply(x_BTC, self._weights.pop(group), self._side)


class SideStream:
    """Where the weight gradients of a backward pass are computed, until they are joined.

    Without CUDA, or with `SIDE_STREAM` False, that is the current stream. A backward pass that ends in an error joins
    when its graph is dropped: before the memory that is in use goes back.
    """

    def __init__(self, device: torch.device):
        self._forked_from: torch.cuda.Stream | None = None
        self._in_use: list[torch.Tensor] = []
        self._stream = _stream(device) if device.type == "cuda" and SIDE_STREAM else None

    def product(self, a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        """Return a b. Until `join`, neither may be written, nor the product be read."""
        # memory of the first stream: the second must wait for what was launched there before, on it too
        out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
        if self._stream is None:
            return torch.mm(a_MK, b_KN, out=out_MN)
        self._forked_from = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(self._forked_from)
        self._in_use += [a_MK, b_KN, out_MN]
        with torch.cuda.stream(self._stream):
            return torch.mm(a_MK, b_KN, out=out_MN)

    def join(self) -> None:
        """Let the stream that was forked from wait for all products."""
        if self._stream is not None and self._forked_from is not None:
            self._forked_from.wait_stream(self._stream)
        self._forked_from = None
        self._in_use.clear()

    def __del__(self):
        if self._in_use:
            self.join()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all passes: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class _Linear(torch.autograd.Function):
    """x W^T. The gradient of W is to be handed on only, not read, until the side stream is joined."""

    @staticmethod
    def forward(ctx, x_BTC, weight_NC, side: SideStream):
        ctx.side = side
        ctx.save_for_backward(x_BTC, weight_NC)
        return nn.functional.linear(x_BTC, weight_NC)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x_BTC, weight_NC = ctx.saved_tensors
        # detached: what is in use must not hold the graph by which it is held
        dy_RN, x_RC = (rows.detach().flatten(0, 1) for rows in (*gradients, x_BTC))
        dx_BTC = dweight_NC = None
        # ahead of dx, for which the gradient of the weight need not wait
        if ctx.needs_input_grad[1]:
            dweight_NC = ctx.side.product(dy_RN.t(), x_RC)
        if ctx.needs_input_grad[0]:
            dx_BTC = torch.mm(dy_RN, weight_NC).view(x_BTC.shape)
        return dx_BTC, dweight_NC, None


class _Joined(torch.autograd.Function):
    """Copy matrices of float32 into `dtype`, each group below one another in one matrix: one launch, and one back.

    The backward runs when those of all products have run, and joins their side stream.
    """

    @staticmethod
    def forward(ctx, side: SideStream, dtype: torch.dtype, sizes: list[int], *matrices: torch.Tensor):
        pending = iter(matrices)
        groups = [list(itertools.islice(pending, size)) for size in sizes]
        ctx.side, ctx.rows = side, [[len(matrix) for matrix in group] for group in groups]
        joined = [
            group[0].new_empty(sum(rows), group[0].shape[1], dtype=dtype)
            for group, rows in zip(groups, ctx.rows, strict=True)
        ]
        torch.ops.aten._foreach_copy_(_parts(joined, ctx.rows), matrices)
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: torch.Tensor):
        ctx.side.join()
        parts = _parts(gradients, ctx.rows)
        copies = [torch.empty_like(part, dtype=torch.float32) for part in parts]
        torch.ops.aten._foreach_copy_(copies, parts)
        return None, None, None, *copies


def _parts(joined: Sequence[torch.Tensor], rows: list[list[int]]) -> list[torch.Tensor]:
    return [part for matrix, sizes in zip(joined, rows, strict=True) for part in matrix.split(sizes)]
