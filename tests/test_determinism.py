"""The deterministic state: what is set, what "auto" becomes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from tests.tiny_runs import tiny_recipe, train_quietly
from train.determinism import (
    FORBIDDEN_VARIABLES,
    FP_FUSION,
    EnvironmentRefused,
    _fix_cublas_workspace,
    check_state,
    enter,
    fingerprint,
    refused_variables,
    triton_version,
)

ROOT = Path(__file__).resolve().parent.parent


def test_the_state_is_entered():
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    enter(threads=1, precision="fp32", impl="eager", device="cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.get_num_threads() == 1


def test_threads_are_the_recipes():
    code = (
        "import torch; from train.determinism import enter;"
        "enter(threads=3, precision='auto', impl='auto', device='cpu'); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_auto_on_a_cpu_is_float32_and_eager():
    machine = enter(threads=1, precision="auto", impl="auto", device="cpu")
    assert (machine.device.type, machine.precision, machine.impl) == ("cpu", "fp32", "eager")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_follows_the_precision(precision):
    with enter(threads=1, precision=precision, impl="eager", device="cpu").autocast():
        dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_what_the_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="precision must be auto or one of"):
        enter(threads=1, precision="fp8", impl="eager", device="cpu")
    with pytest.raises(ValueError, match="'tf32' needs a CUDA device"):
        enter(threads=1, precision="tf32", impl="eager", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            enter(threads=1, precision="fp32", impl="eager", device="cuda")


def test_another_cublas_workspace_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(EnvironmentRefused, match="export CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        _fix_cublas_workspace()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(EnvironmentRefused, match="before CUDA starts, it is None"):
        _fix_cublas_workspace()


@pytest.fixture
def card(monkeypatch):
    """A GPU that is not there; returns what was done to CUDA, in order."""
    done = []

    def started(name, answer):
        def inner(*_arguments):
            done.append(name)
            return answer

        return inner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(done))
    monkeypatch.setattr(torch.cuda, "get_device_capability", started("asked", (9, 0)))
    monkeypatch.setattr(torch.cuda, "set_device", started("set", None))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return done


def test_the_cublas_workspace_is_set_before_cuda_starts(card):
    machine = enter(threads=1, precision="auto", impl="auto", device="cuda")
    assert (machine.precision, machine.impl) == ("bf16", "triton")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert card == ["asked"]


def test_a_numbered_device_becomes_the_current_one(card):
    enter(threads=1, precision="fp32", impl="eager", device="cuda:1")
    assert card == ["set", "asked"]


@pytest.mark.usefixtures("card")
def test_tf32_is_as_the_recipe_says():
    enter(threads=1, precision="tf32", impl="eager", device="cuda")
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    enter(threads=1, precision="fp32", impl="eager", device="cpu")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("card")
def test_kernels_are_compiled_without_line_numbers(monkeypatch):
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    enter(threads=1, precision="bf16", impl="triton", device="cuda")
    assert os.environ["TRITON_DISABLE_LINE_INFO"] == "1"


@pytest.mark.usefixtures("card")
def test_interpreted_kernels_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(EnvironmentRefused, match="unset TRITON_INTERPRET"):
        enter(threads=1, precision="bf16", impl="triton", device="cuda")


@pytest.mark.usefixtures("card")
def test_the_version_of_triton_is_that_of_the_module_under_whatever_name_it_was_installed(monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    name = f"sm_90 with 132 multiprocessors, torch {torch.__version__}, triton {triton.__version__}"
    assert fingerprint("cuda") == name
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_version() is None


@pytest.mark.parametrize("variable", FORBIDDEN_VARIABLES)
def test_a_variable_that_changes_the_arithmetic_is_refused_with_the_cure(variable, monkeypatch):
    monkeypatch.setenv(variable, "0")
    assert refused_variables() == [variable]
    with pytest.raises(EnvironmentRefused, match=f"{variable} must not be set, it is '0'.*: unset {variable}"):
        enter(threads=1, precision="fp32", impl="eager", device="cpu")


def test_only_what_triton_does_by_itself_may_be_said_of_fused_products_and_is_recorded(monkeypatch, tmp_path):
    for value in ("true", "", "2"):
        monkeypatch.setenv(FP_FUSION, value)
        assert refused_variables() == [FP_FUSION]
    monkeypatch.setenv(FP_FUSION, "1")
    train_quietly(tiny_recipe(), tmp_path / "said")
    monkeypatch.delenv(FP_FUSION)
    train_quietly(tiny_recipe(), tmp_path / "unsaid")
    logs = [(tmp_path / name / "processes.jsonl").read_text().splitlines()[0] for name in ("said", "unsaid")]
    assert [json.loads(line)["environment"]["fp_fusion"] for line in logs] == ["1", None]
    # the certificate is of the bits, which it has no part in
    certificates = [(tmp_path / name / "certificate.json").read_bytes() for name in ("said", "unsaid")]
    assert certificates[0] == certificates[1]


COMPILED = """
import json
from bench.offline import gpu, prepare_environment
prepare_environment()
import torch
from bench.static_cases import _sinkhorn
from train.certificate import loaded_cubins
with gpu(90):
    _sinkhorn(1, 16, 16, torch.float32, slack="full", dustbin=True)
print(json.dumps({name: sorted(cubins) for name, cubins in loaded_cubins(90).items()}))
"""


def test_what_may_be_said_of_fused_products_changes_no_machine_code_and_the_opposite_does(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", FP_FUSION)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    answers = []
    for setting in ({}, {FP_FUSION: "1"}, {FP_FUSION: "0"}):
        command = [sys.executable, "-c", COMPILED]
        answers.append(subprocess.check_output(command, cwd=ROOT, env=environment | setting, text=True))
    assert "_sinkhorn" in answers[0]
    assert answers[0] == answers[1] != answers[2]


def test_a_thread_count_that_does_not_take_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)
    with pytest.raises(EnvironmentRefused, match=r"torch.get_num_threads\(\) must be 3, it is 1: .*OMP_THREAD_LIMIT"):
        enter(threads=3, precision="fp32", impl="eager", device="cpu")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("torch.backends.cudnn.benchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True)),
        ("torch.backends.cuda.matmul.allow_tf32", lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True)),
        ("torch.are_deterministic_algorithms_enabled", lambda: torch.use_deterministic_algorithms(False)),
        ("TF32 flags", lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")),
    ],
)
def test_a_flag_that_something_changed_later_is_refused(name, change):
    machine = enter(threads=1, precision="fp32", impl="eager", device="cpu")
    check_state(machine)
    try:
        change()
        with pytest.raises(EnvironmentRefused, match=name):
            check_state(machine)
    finally:
        enter(threads=1, precision="fp32", impl="eager", device="cpu")


def test_flags_of_other_code_in_the_process_are_overruled():
    torch.set_float32_matmul_precision("medium")
    enter(threads=1, precision="fp32", impl="eager", device="cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_record_names_everything_that_bits_may_depend_on():
    machine = enter(threads=1, precision="bf16", impl="eager", device="cpu")
    assert machine.record() == {
        "device": "cpu",
        "precision": "bf16",
        "impl": "eager",
        "threads": "1",
        "fingerprint": fingerprint("cpu"),
    }


def test_the_fingerprint_sees_the_instruction_set_and_the_release():
    code = "from train.determinism import fingerprint; print(fingerprint())"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        ).stdout.strip()
        for capability in ("default", "avx2")
    }
    assert len(found) == 2
    assert all(name.endswith(f"torch {torch.__version__.split('+')[0]}") for name in found)
