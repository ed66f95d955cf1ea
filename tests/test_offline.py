"""Launches are compiled for the GPU they are meant for, listed, and never executed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import offline

CODE = """
import json
from bench.offline import gpu, prepare_environment
prepare_environment()
import torch
from tests.planted_kernels import _clean_kernel
x, out = torch.ones(64, 64), torch.full((64, 64), 7.0)
found = []
for arch in (80, 90):
    with gpu(arch) as launches:
        _clean_kernel[lambda meta: (meta["SIZE"] // 32, 3)](x, out, SIZE=64, num_warps=8)
    found += [[l.kernel, l.grid, l.warps, l.tensor_bytes, l.constants["SIZE"], len(l.cubin)] for l in launches]
print(json.dumps([found, launches[0].ttgir.count("sm_90") + launches[0].ttgir.count("cuda:90"), out.unique().tolist()]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True)
    return json.loads(run.stdout)


def test_every_launch_is_listed_with_its_grid_warps_and_bytes(compiled):
    rows, *_ = compiled
    assert [row[:5] for row in rows] == [["_clean_kernel", [2, 3], 8, 2 * 64 * 64 * 4, 64]] * 2


def test_tensors_in_a_tuple_count_as_those_beside_it():
    asm = dict.fromkeys(("ttir", "ttgir", "cubin"), "")
    compiled = SimpleNamespace(metadata=SimpleNamespace(num_warps=4, shared=0), asm=asm)
    arguments = {"x": torch.zeros(3), "several": (torch.zeros(5), torch.zeros(7)), "sizes": (5, 7)}
    assert offline._launch("", compiled, arguments, (1,)).tensor_bytes == 4 * (3 + 5 + 7)


def test_each_architecture_gets_code_of_its_own(compiled):
    rows, mentions_of_90, _ = compiled
    assert rows[0][5] != rows[1][5]
    assert mentions_of_90 > 0


def test_nothing_is_executed(compiled):
    assert compiled[2] == [7.0]
