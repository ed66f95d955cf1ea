"""The lower bound of a step: what is recorded of it, and which rules it must keep."""

import pytest
import torch

from bench.offline import Launch, memory_bytes
from bench.static import Unit
from bench.static_step import Recorder, _violations, kernel_flop, trips


def launch(kernel: str, grid: tuple[int, ...], **constants) -> Launch:
    return Launch(
        kernel=kernel, grid=grid, warps=4, shared_bytes=0, tensor_bytes=0, constants=constants,
        ttir="", ttgir="", cubin=b"",
    )  # fmt: skip


def test_products_are_recorded_with_their_shape_and_bytes_and_other_calls_with_their_bytes():
    x_TC, weight, bias = torch.ones(6, 4), torch.ones(3, 4, requires_grad=True), torch.ones(3)
    with Recorder() as recorder:
        y = torch.nn.functional.linear(x_TC, weight, bias)
        y.view(2, 9)
        y.detach() + 1
        y.backward(torch.empty(6, 3))
    assert [product.shape for product in recorder.products] == [(1, 6, 4, 3), (1, 3, 6, 4)]
    assert recorder.products[0].bytes == 4 * (6 * 4 + 4 * 3 + 6 * 3)
    assert recorder.products[0].flop == 2 * 6 * 4 * 3
    assert recorder.calls == [("add", 2 * 4 * 6 * 3)]


def test_an_expanded_axis_has_no_memory_and_a_tensor_twice_counts_once():
    x = torch.ones(1, 5)
    assert memory_bytes([x, x.expand(7, 5)]) == 4 * 5


def test_calls_inside_an_operator_are_recorded_in_its_place():
    @torch.library.custom_op("ridgeline::planted_double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with Recorder() as recorder:
        double(torch.ones(4))
    assert recorder.calls[-1:] == [("mul", 2 * 4 * 4)]


def test_arithmetic_of_attention_is_two_products_each_way_and_four_back():
    sizes = {"T": 256, "S": 2048, "D": 64, "R": 2, "BLOCK_T": 64, "BLOCK_S": 128}
    B, H = 2, 4
    product = 2 * B * H * 256 * 2048 * 64
    by_queries, by_keys = (B * H * 256 // 64,), (B * H // 2 * 2048 // 128,)
    assert kernel_flop(launch("_attention_fwd_kernel", by_queries, **sizes), 0) == 2 * product
    assert kernel_flop(launch("_attention_dq_kernel", by_queries, **sizes), 0) == 2 * product
    assert kernel_flop(launch("_attention_dkv_kernel", by_keys, **sizes), 0) == 2 * product
    assert kernel_flop(launch("_sum_segments_kernel", (1,)), 0) == 0
    assert trips(launch("_attention_dkv_kernel", by_keys, **sizes)) == 2 * 256 // 64


@pytest.mark.parametrize(
    ("row", "before", "refused"),
    [
        ({}, 1.0, []),
        ({"spills": 2}, 1.0, ["step/64x4096/sm_90/_kernel#0: spills must be at most 0, got 2 LDL and STL"]),
        ({}, 0.9, ["step/64x4096/sm_90: bound_ms must not grow by more than 10 %, got 1.0 after 0.9"]),
    ],
)
def test_a_kernel_that_breaks_a_rule_and_a_slower_step_are_refused(row, before, refused):
    clean = {
        "kernel": "_kernel", "registers": 9, "instructions": 9, "spills": 0, "atomics": {}, "fused_sums": 0,
        "shared": 0, "shared_limit": 1, "scalar_dots": [], "sha256": "0",
    }  # fmt: skip
    step = {"bound_ms": 1.0, "kernels": [clean | row]}
    assert list(_violations(Unit("", "step", "64x4096", 90), step, {"bound_ms": before})) == refused
