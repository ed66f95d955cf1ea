"""Which implementation runs where, and what is refused."""

import inspect
import re
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels.dispatch import as_count, as_number, cdiv, family, next_power_of_2, resolve, values_are_readable
from kernels.sinkhorn import sinkhorn

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


def test_counts_and_weights_may_be_those_of_a_vmap():
    """As on a GPU, where nobody reads them."""

    def plans(cost_BNM, rows_B, log_a_BN):
        counted = sinkhorn(cost_BNM, rows_B=rows_B, eps=0.3, iterations=2, dustbin=0.2).plan_BNM
        return counted, sinkhorn(cost_BNM, log_a_BN=log_a_BN, eps=0.3, iterations=2).plan_BNM

    inputs = torch.rand(2, 3, 4, 5), torch.tensor([[4, 0, 2], [1, 3, 4]]), torch.rand(2, 3, 4).log_softmax(2)
    found = torch.func.vmap(plans)(*inputs)
    expected = zip(*(plans(*(x[i] for x in inputs)) for i in range(2)), strict=True)
    assert all(torch.equal(x, torch.stack(y)) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [2, 0.5, np.float32(0.1), np.float64(0.1), np.int64(2)])
def test_numbers_of_numpy_become_plain_floats(value):
    assert type(as_number("eps", value)) is float and as_number("eps", value) == value


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2)])
def test_integers_of_numpy_become_plain_ones(value):
    assert type(as_count("iterations", value)) is int and as_count("iterations", value) == 2


@pytest.mark.parametrize("operator", ["sinkhorn", "match_segments"])
def test_operators_take_the_numbers_of_numpy_as_their_own(operator):
    function, arguments = getattr(kernels, operator), OPERATORS[operator] | {"eps": 0.5, "iterations": 2}
    found = function(**arguments | {"eps": np.float32(0.5), "iterations": np.int64(2)})
    assert all(torch.equal(a, b) for a, b in zip(found, function(**arguments), strict=True))


@pytest.mark.parametrize("value", ["1", None, True, np.True_, 1j, np.ones(1), torch.tensor(1.0), torch.rand(2)])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^eps must be a number, got "):
        as_number("eps", value)


@pytest.mark.parametrize("value", [10**400, -(10**5000), Fraction(10**400)], ids=["int", "long int", "fraction"])
def test_a_number_beyond_all_floats_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^eps must be in the range of floats, got (int|Fraction) beyond it$"):
        as_number("eps", value)
    for operator in ("sinkhorn", "match_segments"):
        with pytest.raises(ValueError, match=r"^dustbin must be in the range of floats"):
            getattr(kernels, operator)(**OPERATORS[operator] | {"dustbin": value})


@pytest.mark.parametrize("value", ["1", None, True, np.True_, 0, -1, 1.0, np.ones(1), np.ones(2, int), torch.tensor(1)])
def test_what_is_no_count_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^iterations must be an integer of at least 1, got "):
        as_count("iterations", value)


@pytest.mark.parametrize(
    ("arch", "name"),
    [(80, "sm_80"), (86, "sm_89"), (87, "sm_80"), (89, "sm_89"), (90, "sm_90"), (100, "sm_100"), (120, "sm_89")],
)
def test_gpus_of_one_family_share_launches(arch, name, monkeypatch):
    compiler = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=arch))
    monkeypatch.setattr(triton.runtime.driver, "_active", compiler)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert family(torch.zeros(1)) == name


def test_a_gpu_is_asked_once_what_it_is(monkeypatch):
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 63))
    assert family(tensor) == family(tensor) == "sm_90"
    assert asked == [tensor.device]


def test_the_interpreter_launches_as_an_sm_90_does(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert family(torch.zeros(1)) == "sm_90"


def test_the_host_divides_and_rounds_as_triton_does():
    for x in range(1, 300):
        assert next_power_of_2(x) == triton.next_power_of_2(x)
        assert [cdiv(x, y) for y in range(1, 40)] == [triton.cdiv(x, y) for y in range(1, 40)]


# each operator of `kernels` with arguments that it takes
X, INTS = torch.rand, torch.zeros(2, 5, dtype=torch.int64)
COUNT = torch.tensor([3, 4])
POINT_LAYERS = {
    "weight1": X(8, 20), "bias1": X(8), "weight2": X(6, 8), "bias2": X(6), "gain": X(6),
    "label_table": X(13, 4), "source_table": X(2, 2), "behind_table": X(29, 3), "frequencies_F3": X(3, 3),
}  # fmt: skip
OPERATORS = {
    "adamw": {
        **{name: [X(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
        "steps": [torch.ones(1)], "lr": torch.tensor(1e-3), "decays": [0.0], "limit": 1.0,
    },
    "bias_gelu": {"x_BTC": X(2, 5, 16), "bias_C": X(16)},
    "gather_rows": {"tensors_RX": [X(4, 3)], "index_B": torch.tensor([1, 0])},
    "gqa_attention": {
        "q_BHTD": X(2, 4, 5, 16), "k_BGSD": X(2, 2, 7, 16), "v_BGSD": X(2, 2, 7, 16), "log_scale_H": X(4),
        "key_count_B": COUNT, "key_mask_BS": None,
    },
    "loss_terms": {
        "transport_B": X(2), "endpoint_B": X(2), "matched_BN": X(2, 5), "partner_BN": INTS, "conf_BN": X(2, 5),
        "gt_count_B": COUNT, "conf_weight": 0.1, "endpoint_weight": 0.1,
    },
    "match_segments": {
        "mid_BN3": X(2, 5, 3), "dir_BN3": X(2, 5, 3), "len_BN": X(2, 5), "gt_BM23": X(2, 6, 2, 3), "gt_count_B": COUNT,
    },
    "point_embedding": {
        "xyz_BT3": X(2, 5, 3), "class_id_BT": INTS, "source_BT": INTS, "behind_BT": INTS, "votes_BT2": X(2, 5, 2),
        "point_count_B": COUNT, **POINT_LAYERS,
    },
    "residual_norm": {
        "x_BTC": X(2, 5, 16), "y_BTC": X(2, 5, 16), "gain_C": X(16), "bias_C": X(16), "scene_B": COUNT, "rate": 0.1,
    },
    "rms_norm": {"x": X(2, 16), "gain_C": X(16)},
    "segment_heads": {
        "x_BNC": X(2, 5, 16), "weight_7C": X(7, 16), "bias_7": X(7), "conf_weight_1C": X(1, 16), "conf_bias_1": X(1),
        "offsets_N23": X(5, 2, 3),
    },
    "sinkhorn": {
        "cost_BNM": X(2, 5, 6), "rows_B": COUNT, "cols_B": COUNT, "dustbin": torch.tensor(0.5), "eps": 0.1,
        "iterations": 2, "log_a_BN": None, "log_b_BM": None,
    },
    "turn": {"xyz_BT3": X(2, 5, 3), "gt_BM23": X(2, 6, 2, 3), "scene_B": COUNT, "seed": 1, "step": 1},
}  # fmt: skip


def no_tensors() -> Iterator[tuple[str, str, Any]]:
    """Each operator with each argument that is a tensor, or a list of them, and what it cannot be."""
    for operator in OPERATORS:
        for name, parameter in inspect.signature(getattr(kernels, operator)).parameters.items():
            if "Tensor" in str(parameter.annotation):
                may_lack = parameter.default is None
                yield from ((operator, name, value) for value in ("ten", [1, 2], *([] if may_lack else [None])))


def test_every_operator_stands_in_the_table_with_arguments_that_it_takes():
    functions = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))}
    assert set(OPERATORS) == {name for name in functions if not name.endswith("_reference")}
    for name, arguments in OPERATORS.items():
        getattr(kernels, name)(**arguments)


@pytest.mark.parametrize(("operator", "argument", "value"), list(no_tensors()), ids=str)
def test_what_is_no_tensor_is_refused_by_the_name_of_its_argument(operator, argument, value):
    name, given = re.sub(r"_[A-Z0-9]+$", "", argument), value
    if isinstance(OPERATORS[operator].get(argument), list):
        name, given = f"{name}[0]", [value]
    # some may be a number as well
    kind = "an int" if argument == "step" else "a (number or a )?tensor"
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be {kind}.*, got {re.escape(repr(value))}$"):
        getattr(kernels, operator)(**OPERATORS[operator] | {argument: given})
