"""What every test runs under: the Triton interpreter where there is no GPU, one thread, poisoned memory."""

import os

import pytest
import torch

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
def device() -> torch.device:
    """The device kernels run on here: CUDA, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every `torch.empty` with NaN (the largest value for integers): a result nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
