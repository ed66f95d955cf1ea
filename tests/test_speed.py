"""The clock counts steps and leaves pauses out."""

import time

import pytest
import torch

from train.speed import StepClock

CPU = torch.device("cpu")


def test_pauses_do_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock(10)
    now[0] += 2.0
    with clock.paused():
        now[0] += 50.0
    line = clock.read(14, batch=8, device=CPU)
    assert (line["step"], line["seconds"]) == (14, 2.0)
    assert line["steps_per_second"] == pytest.approx(2.0)
    assert line["scenes_per_second"] == pytest.approx(16.0)
    now[0] += 1.0
    assert clock.read(15, batch=8, device=CPU)["seconds"] == 1.0


def test_memory_is_that_of_the_process():
    clock = StepClock(0)
    assert 50 < clock.read(1, batch=1, device=CPU)["memory_mb"] < 1e6
