"""What every test runs under: the Triton interpreter where there is no GPU, one thread, poisoned memory."""

import os
import shutil
from pathlib import Path

import pytest
import torch

# cuBLAS reads it when the first test starts CUDA, and refuses deterministic algorithms without it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # triton reads it when it is imported, so before any test module is
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import interpreter_checks, interpreter_fixes

    interpreter_fixes.install()
    interpreter_checks.install()

# tests neither read nor leave rows in the user's cache
os.environ["RIDGELINE_CACHE"] = "off"
torch.set_num_threads(1)


@pytest.fixture
def device(request) -> torch.device:
    """The device kernels run on here: CUDA, or the CPU under the interpreter. The eager form's place is the CPU."""
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return torch.device("cuda" if HAS_GPU and arguments.get("impl") != "eager" else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every `torch.empty` with NaN (the largest value for integers): a result nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def terminal(monkeypatch):
    """Bars are drawn as if on a terminal."""
    monkeypatch.setattr("train.progress.is_watched", lambda: True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The directory of a finished run of the recipe `tiny`: to read, not to write."""
    from tests.tiny_runs import tiny_recipe, train_quietly

    path = tmp_path_factory.mktemp("runs") / "finished"
    train_quietly(tiny_recipe(), path)
    return path


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of the finished run, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
