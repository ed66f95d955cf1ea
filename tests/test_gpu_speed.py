"""What the GPU suite checks and times, without a GPU: its cases, their bits, and who may have a number."""

import dataclasses
import functools
import json
import sys
import time
import types

import pytest
import torch

from bench import gpu_cases, gpu_clock, gpu_repeats, gpu_rows, gpu_seams, gpu_speed, gpu_tiles
from bench.gpu_cases import OperatorCase, attention_inputs, item
from bench.gpu_repeats import cases
from bench.gpu_step_peers import PlainPerceiver, plain_loss
from bench.peers import Peer
from perceiver.loss import segment_loss
from perceiver.model import Perceiver
from perceiver.scene import SceneBatch
from tests.small_models import SMALL, small_batch, stirred
from train.config import load_recipe

CPU = torch.device("cpu")


def planted_case(solve) -> OperatorCase:
    return OperatorCase(
        operator="planted", name="case", make=lambda items, _: {"x_BT": torch.rand(items, 3)}, solve=solve, items=3
    )


def test_a_result_that_moves_once_is_counted():
    calls = iter(range(100))

    def solve(tensors):
        return {"y_BT": tensors["x_BT"] + (1e-7 if next(calls) == 4 else 0.0), "sum": tensors["x_BT"].sum()}

    case = planted_case(solve)
    assert gpu_repeats.count_differing(case, case.make(3, CPU), repeats=6) == 1


def test_the_load_has_ended_before_its_memory_is_given_to_others(monkeypatch):
    told = []

    class Recorded(gpu_repeats.Load):
        def more(self):
            told.append("more")

        def end(self):
            told.append("end")

    def solve(tensors):
        if told.count("more") == 3:
            raise RuntimeError("planted")
        return {"y_BT": tensors["x_BT"]}

    monkeypatch.setattr(gpu_repeats, "Load", Recorded)
    case = planted_case(solve)
    gpu_repeats.count_differing(case, case.make(3, CPU), repeats=2)
    assert told == ["more", "more", "end"]
    with pytest.raises(RuntimeError, match="planted"):
        gpu_repeats.count_differing(case, case.make(3, CPU), repeats=2)
    assert told[-2:] == ["more", "end"]


def test_an_error_in_one_configuration_is_noted_and_the_others_are_swept(monkeypatch, capsys):
    def fails(tensors):
        raise ValueError("planted")

    def solve(tensors):
        return {"y_BT": tensors["x_BT"]}

    planted = [dataclasses.replace(planted_case(s), name=s.__name__, trained=True) for s in (solve, fails, solve)]
    monkeypatch.setattr(gpu_repeats, "cases", lambda: planted)
    monkeypatch.setattr(sys, "argv", ["gpu_repeats", "--device", "cpu", "--repeats", "2", "--worker", "0/1"])
    monkeypatch.delenv("RIDGELINE_LINES", raising=False)
    assert gpu_repeats.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [line for line in lines if "began" not in line]
    assert [line["case"] for line in found] == ["solve", "fails", "solve"]
    assert found[1]["error"] == "ValueError: planted" and found[0]["differing"] == found[2]["differing"] == 0
    assert list(gpu_repeats.digests(CPU)) == ["planted solve"]


def test_the_sweep_sees_nan_and_items_that_depend_on_their_neighbours():
    def solve(tensors):
        x = tensors["x_BT"]
        return {
            "mean_BT": x - x.mean(),
            "own_BT": x * 2,
            "total": x.sum(),
            "unwritten_B": torch.full((len(x),), torch.nan),
        }

    found = gpu_repeats.sweep(planted_case(solve), CPU, repeats=2)
    assert found["alone_differs"] == ["mean_BT[0]", "mean_BT[2]"]
    assert found["not_finite"] == ["unwritten_B"] and found["differing"] == 0


@pytest.mark.parametrize("operator", ["gqa_attention", "sinkhorn"])
def test_the_operators_pass_the_sweep(operator, monkeypatch, device):
    small = {
        "gqa_attention": {"T": 3, "S": 9, "D": 16, "limit": "count"},
        "sinkhorn": {"N": 3, "M": 4},
    }
    monkeypatch.setattr(gpu_cases, "ITERATIONS", 1)
    case = next(c for c in cases() if c.operator == operator)
    make = functools.partial(getattr(case.make, "func", case.make), **small[operator])
    found = gpu_repeats.sweep(dataclasses.replace(case, make=make, items=2), device, repeats=1)
    assert not found["differing"] and not found["alone_differs"] and not found["not_finite"]


def test_items_are_cut_from_what_has_them():
    tensors = attention_inputs(3, CPU, T=4, S=5, D=16, limit="mask")
    one = item(tensors, 1)
    assert all(len(one[name]) == 1 for name in one if "_B" in name)
    assert torch.equal(one["key_mask_BS"][0], tensors["key_mask_BS"][1])
    assert torch.equal(one["log_scale_H"], tensors["log_scale_H"])


def test_processes_that_disagree_are_named():
    same = {"digests": {"a": "1", "b": "2"}, "cubins": {"k": ["x", "y"]}}
    other = {"digests": {"a": "1", "b": "3"}, "cubins": {"k": ["x"]}}
    assert gpu_repeats.compare_processes([same, same])["differing_digests"] == []
    found = gpu_repeats.compare_processes([same, same, other])
    assert found["differing_digests"] == ["b"] and found["differing_cubins"] == ["k"] and found["kernels"] == 2


def test_a_tile_takes_the_place_of_the_tables_entry_for_one_launch(device):
    from kernels import attention_forward, attention_tile

    before = dict(attention_tile.TILES), attention_forward._attention_fwd_kernel
    tensors = attention_inputs(1, device, T=20, S=70, D=16, limit="count")
    for kernel, tile in (("forward", (16, 32, 4, 1)), ("dkv", (16, 16, 4, 1))):
        base, other = gpu_tiles.catch(kernel, None, tensors), gpu_tiles.catch(kernel, tile, tensors)
        for x, y in zip(gpu_tiles.results(kernel, other), gpu_tiles.results(kernel, base), strict=True):
            assert (x.float() - y.float()).abs().max() <= 0.02 * y.float().abs().max()
        other.arguments[gpu_tiles.KERNELS[kernel][2][0]].zero_()
        other.again()
        assert other.arguments[gpu_tiles.KERNELS[kernel][2][0]].any()
    assert (dict(attention_tile.TILES), attention_forward._attention_fwd_kernel) == before


@pytest.mark.parametrize("name", gpu_seams.KERNELS)
def test_other_options_of_a_seam_change_rounding_only_and_are_taken_back(name, device, monkeypatch):
    monkeypatch.setattr(gpu_seams, "ROWS_EACH", 12)
    swept = gpu_seams.KERNELS[name]
    replaced = {swept.kernel, *(constant for options in swept.candidates for constant in options)}
    before = [getattr(swept.module, constant) for constant in replaced]
    tensors = swept.inputs(1, 70, device)
    truth = gpu_seams.results(swept, gpu_seams.catch(swept, {}, tensors))
    for options in swept.candidates[:2] if name.startswith("point") else swept.candidates:
        caught = gpu_seams.catch(swept, options, tensors)
        for x, y in zip(gpu_seams.results(swept, caught), truth, strict=True):
            assert (x.float() - y.float()).abs().max() <= min(0.01, swept.tolerance) * y.float().abs().max()
        for i in (*swept.results, *swept.partials):
            caught.arguments[i].detach().zero_()
        caught.again()
        assert all(x.any() for x in gpu_seams.results(swept, caught))
    assert len({gpu_seams.told(options) for options in swept.candidates}) == len(swept.candidates)
    assert [getattr(swept.module, constant) for constant in replaced] == before


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_launch_with_nan_in_any_of_its_results_gets_no_time(wrong):
    truth = [torch.ones(3), torch.ones(3)]
    found = [x.clone() for x in truth]
    found[wrong][1] = torch.nan
    assert "nan" in gpu_tiles.time_caught(gpu_tiles.Caught(None), found, truth)["red"]
    assert "median_s" in gpu_tiles.time_caught(gpu_tiles.Caught(None), truth, truth)


def test_cases_of_training_come_first_and_names_are_unique():
    trained = [case.trained for case in cases()]
    assert trained == sorted(trained, reverse=True) and any(trained)
    assert cases()[sum(trained)].name == "512x512"
    names = [(case.operator, case.name) for case in cases()]
    assert len(set(names)) == len(names)


def doubled(peers: list[Peer], group: str = "planted, forward") -> tuple[gpu_rows.Problem, list[Peer]]:
    x = torch.rand(3)
    problem = gpu_rows.Problem(
        suite="planted",
        group=group,
        leaves=[x],
        finish=lambda solve: [solve(x)],
        truth=lambda: [2 * x.double()],
        tolerance=1e-5,
    )
    return problem, peers


def refuse(_):
    try:
        raise KeyError("the cause")
    except KeyError as cause:
        raise RuntimeError("what it led to") from cause


def test_only_right_results_have_a_time_and_every_row_says_why_not(monkeypatch):
    monkeypatch.delenv("RIDGELINE_TURN", raising=False)
    calls = iter(range(1000))
    peers = [
        Peer(name="compiled", solve=lambda x: x + x, compiled=True),
        Peer(name="wrong", solve=lambda x: 2.01 * x),
        Peer(name="not a number", solve=lambda x: x / 0),
        Peer(name="moves", solve=lambda x: 2 * x + (3e-7 if next(calls) == 17 else 0.0)),
        Peer(name="refuses", solve=refuse),
        Peer(name="elsewhere", solve=lambda x: 2 * x, package="no-such-package"),
        Peer(name="replayed", solve=lambda x: 2 * x, graph=True),
        Peer(name="ridgeline", solve=lambda x: 2 * x),
    ]
    pairs = gpu_speed.ordered([doubled(peers), doubled(peers[:1], "planted, forward and backward")])
    assert [peer.name for _, peer in pairs] == [
        "ridgeline", "wrong", "not a number", "moves", "refuses", "compiled", "elsewhere"
    ]  # fmt: skip
    rows = {case["name"]: case for case in gpu_speed.time_rows([pair for pair in pairs if not pair[1].compiled], CPU)}
    assert rows["ridgeline"]["median_s"] > 0 and rows["ridgeline"]["same_bits"]
    assert rows["moves"]["version"] == peers[3].version() and "version" not in rows["elsewhere"]
    assert rows["moves"]["median_s"] > 0 and not rows["moves"]["same_bits"]
    for name in ("wrong", "not a number"):
        assert "median_s" not in rows[name] and "relative error" in rows[name]["red"]
    assert "the cause" in rows["refuses"]["refused"] and "not installed" in rows["elsewhere"]["refused"]


def test_packages_and_what_is_compiled_have_workers_of_their_own_and_packages_come_last():
    workers = list(
        dict.fromkeys(
            gpu_speed.worker_of(*pair) for pair in gpu_speed.ordered(gpu_rows.SUITES["sinkhorn"](torch.device("meta")))
        )
    )
    assert workers[:2] == ["ridgeline", "plain"] and workers[-3:] == ["POT", "geomloss", "flash-sinkhorn"]
    assert {peer.name for _, peer in gpu_speed.rows_of("sinkhorn", "POT", torch.device("meta"))} == {
        "POT, log_sinkhorn",
        "POT, sinkhorn",
    }
    compiled = workers[2:-3]
    assert compiled and all(len(gpu_speed.rows_of("sinkhorn", w, torch.device("meta"))) == 1 for w in compiled)


def test_rows_that_there_is_no_time_to_check_leave_the_others_their_turn(monkeypatch):
    left = iter([100.0, 1.0, 0.0, -1.0])
    monkeypatch.setattr(gpu_speed, "seconds_to_prepare", lambda: next(left))
    peers = [Peer(name=name, solve=lambda x: 2 * x) for name in ("ridgeline", "b", "c", "d")]
    problem, _ = doubled([])
    rows = {case["name"]: case for case in gpu_speed.time_rows([(problem, peer) for peer in peers], CPU)}
    assert rows["ridgeline"]["median_s"] > 0 and rows["b"]["median_s"] > 0
    assert rows["c"]["refused"] == rows["d"]["refused"] == gpu_speed.NO_TIME


def test_a_worker_of_one_row_builds_the_inputs_of_its_problem_only(monkeypatch):
    built = []
    monkeypatch.setattr(
        gpu_rows,
        "attention_inputs",
        lambda *size, **shape: built.append(shape) or attention_inputs(*size, **shape),
    )
    worker = "attention, decoder 64x256, forward and backward: flex"
    ((problem, peer),) = gpu_speed.rows_of("attention", worker, torch.device("meta"))
    assert f"{problem.group}: {peer.name}" == worker and built == [{"T": 64, "S": 256}]


def test_slow_calls_are_timed_in_fewer_rounds():
    assert gpu_clock.rounds_of(1e-5) == gpu_clock.rounds_of(0.1) == gpu_clock.ROUNDS
    assert gpu_clock.rounds_of(0.2) == 7 and gpu_clock.rounds_of(5.0) == 3


def test_wall_time_is_that_of_a_warm_call():
    # the first call alone is long: it decides neither the warm-up nor the rounds
    waits = iter([2 * gpu_clock.LONG_S] + [0.05] * gpu_clock.WARM_UP + [0.0] * 100)
    timed = gpu_clock.measure(lambda: [time.sleep(next(waits)) or torch.zeros(1)], CPU)
    assert timed["median_s"] < 0.01 and timed["iqr_s"] < 0.01 and timed["rounds"] == gpu_clock.ROUNDS


def test_every_wall_clock_of_a_gpu_keeps_its_spread(monkeypatch):
    graph = types.SimpleNamespace(replay=lambda: None)
    clocks = {"record": lambda run: (graph, run()), "_event_seconds": lambda *_: [1.0, 1.0, 2.0]}
    clocks |= {"device_seconds": lambda *_: [3.0], "_wall_seconds": lambda *_: next(walls)}
    for name, clock in clocks.items():
        monkeypatch.setattr(gpu_clock, name, clock)
    walls = iter([[4.0, 5.0, 8.0], [6.0, 6.0, 6.0]])
    timed = gpu_clock.measure(list, torch.device("cuda"))
    assert (timed["median_s"], timed["iqr_s"], timed["cold_median_s"]) == (1.0, 0.5, 3.0)
    assert (timed["wall_median_s"], timed["wall_iqr_s"]) == (5.0, 2.0)
    assert (timed["wall_one_thread_median_s"], timed["wall_one_thread_iqr_s"]) == (6.0, 0.0)


@pytest.mark.parametrize("suite", gpu_rows.SUITES)
def test_every_suite_has_ours_and_peers_for_each_problem_without_a_gpu(suite):
    pairs = gpu_speed.ordered(gpu_rows.SUITES[suite](torch.device("meta")))
    groups = {problem.group for problem, _ in pairs}
    for group in groups:
        names = [peer.name for problem, peer in pairs if problem.group == group]
        assert names[0] == "ridgeline" and len(set(names)) == len(names) >= 2


def test_ours_gives_the_truth_of_the_balanced_problem():
    (problem, peers), *_ = gpu_rows.balanced_rows(CPU, items=2, size=8)
    case, run = gpu_speed.check_row(problem, peers[0], {}, CPU)
    assert run is not None and float(case["error"]) < gpu_rows.BALANCED_TOLERANCE


def test_truth_in_blocks_of_items_is_the_truth_of_all(monkeypatch):
    tensors = attention_inputs(5, CPU, T=4, S=9, D=16, dtype=torch.float32, limit="count")
    whole = gpu_rows._attention_truth(tensors, "forward and backward")
    monkeypatch.setattr(gpu_rows, "_TRUTH_ITEMS", 2)
    for left, right in zip(gpu_rows._attention_truth(tensors, "forward and backward"), whole, strict=True):
        torch.testing.assert_close(left, right)


def test_the_plain_model_is_ours_without_its_kernels():
    recipe = load_recipe("tiny")
    stage = dataclasses.replace(recipe.stages[2], endpoint_weight=0.3)
    model = stirred(Perceiver(SMALL)).double()
    rows = SceneBatch(**{n: x.double() if x.is_floating_point() else x for n, x in vars(small_batch()).items()})
    ours = model(rows, impl="eager")
    plain = PlainPerceiver(model, rate=0.5).eval()(rows)
    for name, found, expected in zip(ours._fields, plain, ours, strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
    truth = rows.gt_BM23, rows.gt_count_B
    total = segment_loss(ours, *truth, recipe.loss, endpoint_weight=0.3, impl="eager").total
    torch.testing.assert_close(plain_loss(recipe, stage)(*plain, *truth), total)
