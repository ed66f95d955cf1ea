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
# what an exponential is of, by the instruction that made it
EXPONENTS = """
import json, re
from bench import offline
offline.prepare_environment()
import torch
from kernels.attention_forward import attention_forward
q_BHTD, k_BGSD = (torch.zeros(1, heads, length, 64) for heads, length in ((4, 64), (2, 300)))
made, launch = [], offline._launch
def read(kernel, compiled, *others):
    by = {}
    for line in compiled.asm["ptx"].splitlines():
        if found := re.match(r"\\s*(?:@%p\\d+ )?(\\S+)\\s+(%\\w+), (%\\w+)", line):
            operation, result, operand = found.groups()
            if operation.startswith("ex2") and kernel == "_attention_fwd_kernel":
                made.append(by.get(operand))
            by[result] = operation
    return launch(kernel, compiled, *others)
offline._launch = read
with offline.gpu(90):
    attention_forward(q_BHTD, k_BGSD, k_BGSD, torch.zeros(4), None, None, "online", "PRECISION", 1)
print(json.dumps(made))
"""


def compiled(code, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    return compiled(CODE, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("split", ["1", "2"])
def test_no_product_of_sm_100_is_told_by_a_loop_to_start_from_zero(products, split):
    # tc_gen5_mma left, right, sum, whether to add to it, ...; where a loop tells, what follows it adds to old sums
    flags = [line.split("tc_gen5_mma", 1)[1].split(",")[3].strip() for line in products[split]]
    assert set(flags) == {"%true", "%false"}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_online_maximum_is_taken_from_products_that_were_rounded(precision, tmp_path):
    # as one fma with the product, the difference to the maximum is not that of the rounded numbers
    made = compiled(EXPONENTS.replace("PRECISION", precision), tmp_path)
    assert made and set(made) <= {"sub.f32", "mul.f32"}
