"""Ways to a step: all read one order of rows, which is the recipe's and lies ready before the first step."""

import pytest
import torch

from bench import gpu_step, gpu_step_ways
from bench.gpu_step_ways import BatchesAhead, build_way
from perceiver import products
from tests.tiny_runs import tiny_recipe
from train import batches
from train.batches import StageBatches, stage_data
from train.config import load_recipe

CPU = torch.device("cpu")


def test_batches_ahead_are_those_of_the_stage_and_draw_no_epoch_while_they_are_used(monkeypatch):
    recipe = tiny_recipe()
    data = stage_data(recipe, 2)
    ahead = BatchesAhead(recipe, 2, data, CPU, steps=4)
    steps = range(9, 13)
    truth = [StageBatches(recipe, 2, data, CPU).at(step).scene_B for step in steps]
    monkeypatch.setattr(batches, "epoch_order", None)
    for step, scene_B in zip(steps, truth, strict=True):
        assert torch.equal(ahead.at(step).scene_B, scene_B)
    for step in (8, 13):
        with pytest.raises(ValueError, match=r"step must be in \[9, 12\]"):
            ahead.index(step)


@pytest.fixture
def process_state(monkeypatch):
    """What a way changes of its process, put back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(products, "SIDE_STREAM", products.SIDE_STREAM)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("process_state")
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("way", ["ridgeline", "eager", "torch.compile", "torch.compile, deterministic"])
def test_every_way_makes_steps_without_drawing_an_epoch(way, monkeypatch):
    monkeypatch.setattr(
        gpu_step_ways, "WAYS", {n: {"backend": "eager"} if n != "eager" else None for n in gpu_step.WAYS}
    )
    at, machine, one_step, loss = build_way(way, (8, 64), load_recipe("tiny"))
    assert gpu_step_ways.checked_error(at, machine, loss) < 3e-2
    before = [p.detach().clone() for p in at.model.parameters()]
    monkeypatch.setattr(batches, "epoch_order", None)
    for _ in range(3):
        one_step()
    assert not all(torch.equal(p, q) for p, q in zip(at.model.parameters(), before, strict=True))


@pytest.mark.parametrize("way", gpu_step.WAYS)
def test_a_row_has_an_error_only_where_the_code_that_was_checked_is_timed(way):
    notes = gpu_step.notes_of(way, 1.2e-3)
    if way.startswith("torch.compile"):
        assert set(notes) == {"graphs", "cudagraph_skips"}
    else:
        assert notes == {"error": "1.2e-03"}


def test_what_matters_most_has_its_turn_first_and_what_tries_out_kernels_one_shape():
    asked = gpu_step.asked_for(list(gpu_step.WAYS), list(gpu_step.SHAPES))
    ways = list(dict.fromkeys(way for way, _ in asked))
    assert ways[:3] == ["ridgeline", "ridgeline, one stream", "ridgeline, launch by launch"]
    assert ways[3:6] == ["torch.compile", "torch.compile, reduce-overhead", "torch.compile, deterministic"]
    assert [shape for way, shape in asked if "max-autotune" in way] == ["32 x 2048"] * 2
    assert len(asked) == 2 * (len(gpu_step.WAYS) - 2) + 2


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("way", [way for way, options in gpu_step.WAYS.items() if options])
def test_options_of_torch_compile_exist(way):
    torch.compile(lambda x: x, dynamic=False, **(gpu_step.WAYS[way] or {}))
