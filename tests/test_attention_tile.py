"""What the Triton kernels of `gqa_attention` promise about bits, and their launches."""

import pytest
import torch

from kernels.attention import gqa_attention
from kernels.attention_forward import CHUNK
from kernels.attention_tile import TILES
from tests.attention_problems import NAMES, problem, run, to_device


@pytest.mark.parametrize("dtype, softmax", [(torch.float32, "static"), (torch.bfloat16, "online")])
def test_an_items_bits_do_not_depend_on_neighbours_or_padding(softmax, dtype, device):
    tensors = to_device(problem(3, 2, 1, 9, 600, 16, dtype), device)
    options = {"softmax": softmax, "impl": "triton"}
    together = run(gqa_attention, tensors, key_count_B=torch.tensor([600, 70, 9], device=device), **options)
    q, k, v, log_scale_H, do = (x[1:2] if x.dim() == 4 else x for x in tensors)
    for S in (70, 577):
        alone = [q, k[:, :, :S], v[:, :, :S], log_scale_H, do]
        results = run(gqa_attention, alone, key_count_B=torch.tensor([70], device=device), **options)
        for name, x, y in zip(NAMES, results[:4], together, strict=False):
            y = y[1:2, :, :S] if name in ("dk", "dv") else y[1:2]
            assert torch.equal(x, y), (S, name)


@pytest.mark.parametrize(
    "dtype, softmax, limit",
    [
        (torch.float32, "static", "count"),
        (torch.bfloat16, "static", "mask"),
        (torch.bfloat16, "online", "count"),
        (torch.float32, "online", "mask"),
    ],
)
def test_split_gives_the_bits_of_unsplit(limit, softmax, dtype, device):
    *tensors, _ = to_device(problem(4, 1, 1, 7, 1100, 16, dtype), device)
    key_count_B = torch.tensor([1100, 1024, 513, 0])
    keys = {"key_count_B": key_count_B.to(device)}
    if limit == "mask":
        keys = {"key_mask_BS": (torch.arange(1100) < key_count_B[:, None]).to(device)}
        keys["key_mask_BS"][:, 400:600] = False
    whole = gqa_attention(*tensors, softmax=softmax, impl="triton", **keys)
    for split in (2, 99):
        assert torch.equal(gqa_attention(*tensors, softmax=softmax, split=split, impl="triton", **keys), whole)


def test_every_launch_adds_whole_tiles_to_a_chunk():
    families, products = ("sm_80", "sm_89", "sm_90", "sm_100"), ("half", "tf32", "ieee")
    assert set(TILES) == {(f, p, D) for f in families for p in products for D in (16, 32, 64, 128)}
    for (_, keys, _, _), *_ in TILES.values():
        assert CHUNK % keys == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_repeats_under_load_give_the_same_bits(dtype, device):
    tensors = to_device(problem(4, 4, 2, 256, 2048, 64, dtype), device)
    key_count_B = torch.tensor([2048, 1500, 64, 0], device=device)
    first = run(gqa_attention, tensors, key_count_B=key_count_B)
    load = torch.randn(2048, 2048, device=device)
    other = torch.cuda.Stream()
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(1000):
        with torch.cuda.stream(other):
            load @ load
        again = run(gqa_attention, tensors, key_count_B=key_count_B)
        differing += torch.stack([(x != y).any() for x, y in zip(again, first, strict=True)]).any()
    assert differing == 0


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_bits(device):
    q, k, v, log_scale_H, _ = to_device(problem(2, 4, 2, 64, 256, 64, torch.bfloat16), device)
    key_count_B = torch.tensor([256, 100], device=device)
    plain = gqa_attention(q, k, v, log_scale_H, key_count_B=key_count_B)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gqa_attention(q, k, v, log_scale_H, key_count_B=key_count_B)
    graph.replay()
    assert torch.equal(captured, plain)
