"""`gqa_attention` on keys and values that lie side by side in one product, and whose gradient is laid out as it is.

Attentions that read one memory take their keys and values from one product, kv = memory W, each its own columns. Were
these views of kv, autograd would lay their gradients side by side by copying all of them. Here each attention hands the
product on to the next, and its gradient walks back the same way: the last attention makes it, each fills in its part.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels.attention import _check, _check_options, _forward, _kernel_inputs
from kernels.attention_backward import attention_backward, segments
from kernels.attention_tile import dense_rows
from kernels.dispatch import require_tensors, resolve
from kernels.reduce import JointSums, Summand, joined, sum_segments

PRODUCT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class KeyValueColumns:
    """Keys and values of one attention after the other: columns [k | v] of the first, [k | v] of the second, ...

    Args:
        kv_BSX: float32, bfloat16 or float16, where Triton kernels run.
        precision: of the products of float32 inputs on a GPU: "tf32" or "ieee".
        sums: where the gradients of log_scale are added up, together with those of other operators.
    Nothing else may read the product that is handed on: its gradient is written in place.
    Determinism: that of `kernels.gqa_attention`.
    """

    def __init__(self, kv_BSX: torch.Tensor, *, precision: str = "tf32", sums: JointSums | None = None):
        self.kv_BSX, self.end, self._precision, self._sums = kv_BSX, 0, precision, sums

    def attend(
        self,
        q_BHTD: torch.Tensor,
        log_scale_H: torch.Tensor,
        *,
        kv_heads: int,
        key_count_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the keys and values in the next 2 kv_heads D columns.

        Args:
            q_BHTD: queries of the product's dtype.
            log_scale_H, key_count_B: as for `kernels.gqa_attention`.
            kv_heads: key and value heads; H is a multiple.
        Returns:
            o_BHTD, as `kernels.gqa_attention` of q and these keys and values.
        Raises:
            ValueError: no such columns are left, no kernel runs here, or what `gqa_attention` refuses.
        """
        require_tensors(kv=self.kv_BSX, q=q_BHTD)
        if self.kv_BSX.dim() != 3 or self.kv_BSX.dtype not in PRODUCT_TYPES:
            got = f"shape {tuple(self.kv_BSX.shape)}, {self.kv_BSX.dtype}"
            raise ValueError(f"kv must be [B, S, X] of float32, bfloat16 or float16, got {got}")
        if kv_heads < 1:
            raise ValueError(f"kv_heads must be at least 1, got {kv_heads}")
        start, X = self.end, self.kv_BSX.shape[-1]
        end = start + 2 * kv_heads * q_BHTD.shape[-1]
        if end > X:
            raise ValueError(f"kv must have {end} columns for this and earlier attentions, got {X}")
        resolve("triton", q_BHTD.device)
        _check(q_BHTD, *_columns(self.kv_BSX, start, end, kv_heads), log_scale_H, key_count_B, None)
        _check_options(q_BHTD, log_scale_H, "static", self._precision, 1)
        self.end = end
        dlog_scale = None
        if joined(self._sums):
            log_scale_H, dlog_scale = self._sums.take(log_scale_H, segments(q_BHTD, self._precision))
        columns = (start, end, kv_heads)
        o_BHTD, self.kv_BSX = _Attend.apply(
            q_BHTD, self.kv_BSX, log_scale_H, key_count_B, columns, self._precision, dlog_scale
        )
        return o_BHTD


class _Attend(torch.autograd.Function):
    """o_BHTD, and kv_BSX to hand on."""

    @staticmethod
    def forward(ctx, q_BHTD, kv_BSX, log_scale_H, key_count_B, columns, precision: str, dlog_scale: Summand | None):
        ctx.columns, ctx.precision, ctx.dlog_scale = columns, precision, dlog_scale
        ctx.set_materialize_grads(False)
        k_BGSD, v_BGSD = _columns(kv_BSX, *ctx.columns)
        outputs = _forward(q_BHTD, k_BGSD, v_BGSD, log_scale_H, key_count_B, None, "static", precision, 1, "triton")
        ctx.save_for_backward(q_BHTD, kv_BSX, log_scale_H, key_count_B, *outputs)
        return outputs[0], kv_BSX.view_as(kv_BSX)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        do_BHTD, dkv_BSX = gradients
        q_BHTD, kv_BSX, log_scale_H, key_count_B, *outputs = ctx.saved_tensors
        _, end, _ = ctx.columns
        if dkv_BSX is None:
            # columns past the end, where there are any, have no part in the result
            last = end == kv_BSX.shape[-1]
            dkv_BSX = kv_BSX.new_empty(kv_BSX.shape) if last else kv_BSX.new_zeros(kv_BSX.shape)
        dk_BGSD, dv_BGSD = _columns(dkv_BSX, *ctx.columns)
        if do_BHTD is None or 0 in (q_BHTD.numel(), kv_BSX.numel()):
            dk_BGSD.zero_()
            dv_BGSD.zero_()
            return torch.zeros_like(q_BHTD), dkv_BSX, torch.zeros_like(log_scale_H), *[None] * 4
        inputs = _kernel_inputs(q_BHTD, *_columns(kv_BSX, *ctx.columns), log_scale_H, key_count_B, None)
        joint, H = ctx.dlog_scale, len(log_scale_H)
        partial_SH = joint.partial_SC if joint else outputs[1].new_empty(segments(q_BHTD, ctx.precision), H)
        dq_BHTD, _, _ = attention_backward(
            dense_rows(do_BHTD), *inputs, *outputs, ctx.precision, partial_SH, into=(dk_BGSD, dv_BGSD)
        )
        dlog_scale_H = joint.sum_C if joint else sum_segments(partial_SH).to(log_scale_H.dtype)
        return dq_BHTD, dkv_BSX, dlog_scale_H, *[None] * 4


def _columns(kv_BSX: torch.Tensor, start: int, end: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The views k_BGSD and v_BGSD."""
    shape = (kv_heads, (end - start) // 2 // kv_heads)
    k_BSC, v_BSC = kv_BSX[..., start:end].chunk(2, -1)
    return k_BSC.unflatten(-1, shape).transpose(1, 2), v_BSC.unflatten(-1, shape).transpose(1, 2)
