"""What the compiler makes of the forward's sums for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json
from bench.offline import gpu, prepare_environment
prepare_environment()
import torch
from kernels.attention_forward import attention_forward
q_BHTD, k_BGSD = (torch.zeros(1, heads, length, 64, dtype=torch.bfloat16) for heads, length in ((4, 256), (2, 2048)))
found = {}
for split in (1, 2):
    with gpu(100) as launches:
        attention_forward(q_BHTD, k_BGSD, k_BGSD, torch.zeros(4), None, None, "static", "tf32", split)
    found[split] = [line for line in launches[1].ttgir.splitlines() if "ttng.tc_gen5_mma " in line]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("split", ["1", "2"])
def test_no_product_of_sm_100_is_told_by_a_loop_to_start_from_zero(products, split):
    # tc_gen5_mma left, right, sum, whether to add to it, ...; where a loop tells, what follows it adds to old sums
    flags = [line.split("tc_gen5_mma", 1)[1].split(",")[3].strip() for line in products[split]]
    assert set(flags) == {"%true", "%false"}
