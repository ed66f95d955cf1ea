"""Benchmarks with one fault each, and without: right, wrong, slower, refused, not installed, broken. Run by tests."""

import os
import time

import pytest
import torch

from bench.peers import Peer

TRUTH = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
ABSENT = Peer(name="absent", solve=lambda: None, package="no-such-distribution")
PICKY = Peer(name="picky", solve=lambda: None)
DELAY_S = float(os.environ.get("PLANTED_DELAY_S", "0.002"))


def _result(error: float = 0.0) -> list[torch.Tensor]:
    time.sleep(DELAY_S)
    return [torch.tensor([1.0, 2.0 + error])]


def _refuse() -> list[torch.Tensor]:
    raise RuntimeError("wants a power of two")


def bench_right(measure):
    measure(_result, group="planted", truth=TRUTH, tolerance=1e-3, inputs=_result(), flops=2)


def bench_wrong(measure):
    measure(lambda: _result(0.01), group="planted", truth=TRUTH, tolerance=1e-3)


def bench_not_finite(measure):
    measure(lambda: _result(float("nan")), group="planted", truth=TRUTH, tolerance=1e-3)


@pytest.mark.parametrize("peer", [ABSENT, PICKY], ids=lambda peer: peer.name)
def bench_refused(measure, peer):
    measure(_refuse, group="planted", peer=peer, truth=TRUTH, tolerance=1e-3)


def bench_broken(measure):
    measure(_refuse, group="planted", truth=TRUTH, tolerance=1e-3)


def bench_changing(measure):
    counter = iter(range(100))
    measure(lambda: [torch.tensor([float(next(counter))])], group="planted", peer=PICKY)


def bench_moving(measure):
    weight = torch.zeros(1)
    measure(lambda: weight.add_(1), check=lambda: [weight], group="planted", truth=[torch.zeros(1).double()])


def bench_fatal(measure):
    if os.environ.get("PLANTED_FATAL"):
        os.abort()
