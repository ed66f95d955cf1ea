"""Freed memory stays with the process."""

import subprocess
import sys

SCRIPT = """
import resource, torch
torch.set_num_threads(1)
from train.memory import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults()
before = page_faults()
keep_freed_memory()
print(before, min(page_faults() for _ in range(4)))
"""


def test_a_large_tensor_is_not_paged_in_anew_each_time():
    answer = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    before, after = (int(word) for word in answer.stdout.split())
    assert before > 10 * after
