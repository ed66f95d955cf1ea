"""What can be trained and checked where only torch, numpy, scipy and tqdm are: on a bare machine with a GPU."""

import subprocess
import sys
from pathlib import Path

from tests.tiny_runs import tiny_recipe, write_recipe

ROOT = Path(__file__).resolve().parent.parent

# modules look as if they were not installed; prints the exit codes of three commands
BARE = """
import importlib, pkgutil, sys
ABSENT = {"datasets", "hoho2025", "tyro", "plotly", "pyarrow", "pandas", "safetensors", "ot", "geomloss", "pytest"}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for room in ("kernels", "perceiver", "train"):
    for module in pkgutil.iter_modules(importlib.import_module(room).__path__, room + "."):
        importlib.import_module(module.name)
from train.__main__ import main
recipe, runs = sys.argv[1:]
codes = [main(["run", "--recipe", recipe, "--runs", runs, "--quiet"]), main(["replay", runs + "/bare", "--step", "2"])]
codes += [main(["compare", runs + "/bare", runs + "/bare"]), main(["verify", runs + "/bare/certificate.json"])]
print(ABSENT & sys.modules.keys(), *codes)
"""


def test_generated_roofs_are_trained_on_and_checked_without_the_optional_packages(tmp_path):
    recipe = tiny_recipe()
    stage = recipe.stages[0]
    recipe = write_recipe(tiny_recipe(name="bare", stages=(stage,)), tmp_path / "bare.json")
    command = [sys.executable, "-c", BARE, str(recipe), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set() 0 0 0 0", done.stdout + done.stderr
    assert "no report: " in done.stderr
