"""The trace: digests that see every bit and its place, lines that say what a step computed."""

import dataclasses
import hashlib
import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from kernels.philox import philox_4x32
from perceiver.model import Perceiver
from tests.small_models import small_batch
from tests.tiny_runs import tiny_recipe
from train.determinism import enter, fingerprint
from train.loop import run
from train.optim import build_optimizer
from train.rundir import read_log
from train.step import update
from train.trace import Trace, digest, digest_due, state_tensors, tensor_digests

# fingerprint of a machine -> digests of the states after the 20 updates of the recipe tiny, one thread
GOLDEN = Path(__file__).parent / "golden" / "tiny.json"


def golden_states(device: str) -> list[str]:
    with tempfile.TemporaryDirectory() as path:
        run(tiny_recipe(), path, device=device, progress=False, say=lambda _line: None)
        return [line["state"] for line in read_log(Path(path) / "trace.jsonl")[1:] if line["kind"] == "step"]


@pytest.mark.filterwarnings("default:no golden trace")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_states_of_the_tiny_recipe_are_the_published_ones(device):
    known = json.loads(GOLDEN.read_text()).get(fingerprint(device))
    found = golden_states(device)
    assert len(set(found)) == 20
    if known is None:
        warnings.warn(f"no golden trace for {fingerprint(device)}; python -m tests.test_trace adds it", stacklevel=1)
    else:
        assert found == known, f"first at step {next(i for i in range(20) if found[i] != known[i]) + 1}"


def long_tensor() -> torch.Tensor:
    """More than two rows of words."""
    return torch.randn(40_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("place", [0, 1, 16_383, 16_384, 39_999])
@pytest.mark.parametrize("bit", [0, 31])
def test_any_flipped_bit_changes_the_digest(place, bit):
    changed = long_tensor()
    changed.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert digest({"w": changed}) != digest({"w": long_tensor()})


def test_a_pair_of_flipped_signs_does_not_cancel():
    x = torch.zeros(64)
    digests = {digest({"w": x})}
    for place in range(1, 64):
        pair = x.clone()
        pair[0], pair[place] = -0.0, -0.0
        digests.add(digest({"w": pair}))
    assert len(digests) == 64


def test_exchanged_elements_rows_and_tensors_change_the_digest():
    x = torch.arange(40_000.0)
    elements = x.clone()
    elements[[3, 4]] = elements[[4, 3]]
    rows = torch.cat([x[16_384:32_768], x[:16_384], x[32_768:]])
    two = {"a": x[:5], "b": x[5:10]}
    assert len({digest({"w": t}) for t in (x, elements, rows)}) == 3
    assert digest(two) != digest({"b": two["b"], "a": two["a"]})
    assert digest(two) != digest({"a": two["b"], "b": two["a"]})


def test_names_types_and_shapes_enter():
    base = torch.zeros(6)
    others = [{"v": base}, {"w": base.reshape(2, 3)}, {"w": base.int()}, {"w": torch.zeros(7)}, {"w": base, "v": base}]
    assert len({digest(tensors) for tensors in [{"w": base}, *others]}) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_the_layout_in_memory_does_not_matter(dtype):
    x = (torch.arange(35).reshape(5, 7) % 3).to(dtype)
    assert digest({"w": x.t().contiguous().t()}) == digest({"w": x})
    spread = torch.zeros(5, 14, dtype=dtype)
    spread[:, ::2] = x
    assert digest({"w": spread[:, ::2]}) == digest({"w": x})


@pytest.mark.gpu
def test_devices_agree():
    assert digest({"w": long_tensor().cuda()}) == digest({"w": long_tensor()})


def test_the_formula_is_the_documented_one():
    high, low, _, _ = philox_4x32(torch.tensor([[0, 1]]), torch.tensor([[0], [1]]), 0, 0, seed=0x65766964656E6365)
    words = [0x3F800000, 0xC0000000 - (1 << 32)]
    lanes = [
        sum((h << 32 | l | 1) * w for h, l, w in zip(*x, words, strict=True))
        for x in zip(high.tolist(), low.tolist(), strict=True)
    ]
    header = b"w torch.float32 (2,)\n"
    content = b"21\n" + header + b"".join((lane % (1 << 64)).to_bytes(8, "little") for lane in lanes)
    assert digest({"w": torch.tensor([1.0, -2.0])}) == hashlib.sha256(content).hexdigest()[:32]


def test_each_tensor_has_the_digest_it_has_alone():
    tensors = {"a": torch.ones(3), "b": torch.zeros(()), "c": torch.zeros(0)}
    assert tensor_digests(tensors) == {name: digest({name: x}) for name, x in tensors.items()}


def one_update():
    recipe = tiny_recipe()
    machine = enter(threads=1, precision="fp32", impl="eager", device="cpu")
    model = Perceiver(recipe.model)
    optimizer = build_optimizer(model, recipe.optim)
    result = update(model, optimizer, small_batch(), step=1, stage=recipe.stages[0], recipe=recipe, machine=machine)
    return recipe, model, optimizer, result


def test_the_optimizer_is_named_after_its_weights():
    _, model, optimizer, _ = one_update()
    tensors = state_tensors(model.state_dict(), optimizer.state_dict())
    for name, parameter in model.named_parameters():
        assert tensors[f"optimizer.{name}.exp_avg"] is optimizer.state[parameter]["exp_avg"]
    parameters = [f"optimizer.{name}.exp_avg" for name, _ in model.named_parameters()]
    assert [name for name in tensors if name.endswith(".exp_avg")] == parameters
    assert list(tensors)[: len(model.state_dict())] == list(model.state_dict())


def test_a_foreign_optimizer_keeps_its_numbers():
    optimizer = {"state": {7: {"exp_avg": torch.ones(1), "count": 3}}}
    assert list(state_tensors({"w": torch.ones(1), "v": torch.ones(1)}, optimizer)) == ["w", "v", "optimizer.7.exp_avg"]


def test_lines_are_written_when_flushed_and_hold_the_state_of_their_step():
    recipe, model, optimizer, result = one_update()
    lines = []
    trace = Trace(recipe, lines.extend)

    def state():
        return state_tensors(model.state_dict(), optimizer.state_dict())

    before = digest(state())
    trace.step(1, 1, result, 0.25, state)
    with torch.no_grad():
        model.segmenter.conf_head.bias += 1
    trace.tensors(1, 1, state())
    assert lines == []
    trace.flush()
    trace.flush()
    assert [line["kind"] for line in lines] == ["step", "tensors"]
    assert lines[0]["state"] == before != digest(state())
    assert float.fromhex(lines[0]["loss"]) == result.loss.total.item()
    assert float.fromhex(lines[0]["grad_norm"]) == result.grad_norm.item()
    assert lines[0]["lr"] == (0.25).hex()
    assert lines[1]["digests"] == tensor_digests(state())


def test_digests_are_due_every_so_often_and_where_a_certificate_needs_them():
    stages = tuple(
        dataclasses.replace(stage, until=until)
        for stage, until in zip(tiny_recipe().stages, (100, 110, 200), strict=True)
    )
    recipe = tiny_recipe(stages=stages, trace_every=60)
    assert [step for step in range(1, 201) if digest_due(recipe, step)] == [20, 60, 80, 90, 100, 110, 120, 180, 200]


def regenerate() -> None:
    """Write the golden file anew for this machine and say what changed: python -m tests.test_trace."""
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        name, found = fingerprint(device), golden_states(device)
        changed = [
            step for step, pair in enumerate(zip(found, known.get(name, []), strict=False), 1) if len({*pair}) > 1
        ]
        if name not in known:
            print(f"{name}: new")
        elif changed:
            print(f"{name}: other states from step {changed[0]} on, {len(changed)} of {len(found)}")
        else:
            print(f"{name}: unchanged")
        known[name] = found
    GOLDEN.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    regenerate()
