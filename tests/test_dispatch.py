"""Which implementation runs where, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.dispatch import family, resolve, values_are_readable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_cuda_and_eager_elsewhere():
    assert resolve("auto", CUDA) == "triton"
    assert resolve("auto", CPU) == "eager"


def test_eager_is_legal_everywhere():
    assert resolve("eager", CPU) == resolve("eager", CUDA) == "eager"


def test_triton_on_cpu_needs_something_that_runs_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="impl='triton' must have CUDA tensors"):
        resolve("triton", CPU)
    monkeypatch.setenv("KERNELS_OFFLINE", "1")
    assert resolve("triton", CPU) == "triton"


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl must be one of auto, eager, triton, got 'cuda'"):
        resolve("cuda", CPU)


def test_under_the_offline_driver_cpu_tensors_are_treated_as_those_of_a_gpu(monkeypatch):
    monkeypatch.setenv("KERNELS_OFFLINE", "1")
    assert resolve("auto", CPU) == "triton"
    assert not values_are_readable(torch.zeros(1))


def test_values_are_read_on_the_cpu_and_never_from_a_tensor_without_any():
    assert values_are_readable(torch.zeros(1))
    assert not values_are_readable(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert not values_are_readable(torch.zeros(1))


@pytest.mark.parametrize(
    ("arch", "name"),
    [(80, "sm_80"), (86, "sm_89"), (87, "sm_80"), (89, "sm_89"), (90, "sm_90"), (100, "sm_100"), (120, "sm_89")],
)
def test_gpus_of_one_family_share_launches(arch, name, monkeypatch):
    compiler = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=arch))
    monkeypatch.setattr(triton.runtime.driver, "_active", compiler)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert family(torch.zeros(1)) == name


def test_the_interpreter_launches_as_an_sm_90_does(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert family(torch.zeros(1)) == "sm_90"
