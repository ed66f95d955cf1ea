"""What is noted beside a time: errors, bits, memory, rounds; and on a GPU its own clock and graphs."""

import pytest
import torch

from bench import measure


def test_the_error_is_relative_to_the_largest_true_value_of_its_tensor():
    truth = [torch.tensor([100.0, 1.0]).double(), torch.tensor([0.0, 0.5]).double()]
    found = [torch.tensor([100.0, 2.0]), torch.tensor([0.01, 0.5]), torch.tensor([7.0])]
    assert measure.largest_error(found, truth) == pytest.approx(0.02)
    assert measure.largest_error([torch.tensor([0.25])], [torch.zeros(1).double()]) == 0.25
    assert measure.largest_error([], []) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_errs_without_bound(value):
    assert measure.largest_error([torch.tensor([1.0, value])], [torch.ones(2).double()]) == float("inf")


def test_bits_are_compared_not_values():
    x = torch.tensor([0.0, float("nan")])
    assert measure.same_bits([x], [x.clone()])
    assert not measure.same_bits([x], [torch.tensor([-0.0, float("nan")])])
    assert not measure.same_bits([torch.tensor(1.0)], [torch.tensor([1.0])])


def test_rounds_fill_the_budget_from_5_to_50_and_are_3_for_long_calls():
    assert [measure.choose_rounds(call_s, 1.0) for call_s in (3.0, 1.0, 0.1, 1e-4, 0.0)] == [3, 5, 10, 50, 50]


def test_peak_memory_is_what_a_call_held_at_once(device):
    def run():
        x = torch.zeros(1 << 20, device=device)
        x = x + 1
        x = x + 1
        return x

    run()
    assert measure.peak_bytes(run) == pytest.approx(2 * 4 << 20, rel=0.01)


def test_bytes_are_those_of_all_tensors():
    assert measure.tensor_bytes([torch.zeros(3, 5), torch.zeros(2, dtype=torch.bfloat16)]) == 64


def test_waits_are_refused_inside_only_also_where_that_raised(monkeypatch):
    modes = ["warn"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(RuntimeError, match="a wait"), measure.refused_waits():
        assert modes[-1] == "error"
        raise RuntimeError("a wait")
    assert modes == ["warn", "error", "warn"]


@pytest.mark.gpu
def test_a_graph_replays_what_was_recorded(device):
    x = torch.ones(4, device=device)
    replay = measure.graphed(lambda: [x * 2])
    x.fill_(3)
    assert replay()[0].tolist() == [6.0] * 4


@pytest.mark.gpu
def test_device_time_is_shorter_than_a_second_and_longer_than_nothing(device):
    x = torch.ones(1 << 20, device=device)
    assert all(0 < seconds < 1 for seconds in measure.device_seconds(lambda: x * 2, 5))
