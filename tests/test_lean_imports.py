"""What runs where only PyTorch, Triton, NumPy, what these need, and for the GPU suite pytest are: a bare machine."""

import importlib.metadata
import json
import re
import subprocess
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench import gpu_tests
from tests.tiny_runs import tiny_recipe, write_recipe

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ("torch", "triton", "numpy")
# prints the exit codes of four commands
TRAINED = """
import importlib, pkgutil, sys
for room in ("kernels", "perceiver", "train"):
    for module in pkgutil.iter_modules(importlib.import_module(room).__path__, room + "."):
        importlib.import_module(module.name)
from train.__main__ import main
recipe, runs = sys.argv[1:]
codes = [main(["run", "--recipe", recipe, "--runs", runs, "--quiet"]), main(["replay", runs + "/bare", "--step", "2"])]
codes += [main(["compare", runs + "/bare", runs + "/bare"]), main(["verify", runs + "/bare/certificate.json"])]
print(*codes)
"""
IMPORTED = """
import importlib, pkgutil, bench
suite = [module.name for module in pkgutil.iter_modules(bench.__path__, "bench.") if ".gpu" in module.name]
for name in suite:
    importlib.import_module(name)
print(len(suite), "modules")
"""
# as the part "train" does, on a smaller model; the last line is what it hands over
SHORT_RUN = """
import json, sys
from pathlib import Path
from bench.gpu_train import train_once
from train.config import load_recipe
print(json.dumps(train_once(load_recipe(sys.argv[1]), Path(sys.argv[2]))))
"""


def bare_python(folder: Path, *packages: str) -> str:
    """Make an environment of links to some installed packages and to what they need; return its interpreter."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    wanted, seen = list(packages), set()
    while wanted:
        name = wanted.pop()
        if (key := re.sub(r"[-_.]+", "-", name).lower()) in seen:
            continue
        seen.add(key)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # for another system, as setuptools for Python 3.12
            continue
        needed = map(Requirement, found.requires or ())
        wanted += [x.name for x in needed if x.marker is None or x.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def suite_python(tmp_path_factory) -> str:
    return bare_python(tmp_path_factory.mktemp("bare") / "suite", *RUNTIME, "pytest")


def run(*command: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def one_stage(folder: Path) -> str:
    recipe = tiny_recipe(name="bare", stages=tiny_recipe().stages[:1])
    return str(write_recipe(recipe, folder / "bare.json"))


def test_a_bare_machine_has_none_of_the_other_packages(suite_python):
    code = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name)))"
    others = ["tqdm", "scipy", "pytest_benchmark", "xdist", "safetensors", "hoho2025", "datasets", "tyro", "plotly"]
    assert run(suite_python, "-c", code, *others, *RUNTIME, "pytest").stdout.split() == [*RUNTIME, "pytest"]


def test_generated_roofs_are_trained_on_and_checked_on_a_bare_machine(tmp_path):
    done = run(bare_python(tmp_path / "runtime", *RUNTIME), "-c", TRAINED, one_stage(tmp_path), str(tmp_path))
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 0 0 0", done.stdout + done.stderr
    assert any(line.startswith("step 8: train loss ") for line in lines)
    assert any("of a point was not computed: No module named 'scipy'" in line for line in lines)
    assert "no report: " in done.stderr


def test_the_gpu_suite_and_the_tests_it_runs_are_imported_on_a_bare_machine(suite_python):
    assert int(run(suite_python, "-c", IMPORTED).stdout.split()[0]) > 15
    run(*gpu_tests.shard_command(gpu_tests.operator_tests(), suite_python), "--collect-only")


def test_the_suites_rows_and_steps_are_made_on_a_bare_machine(suite_python):
    tests = ["tests/test_gpu_speed.py", "tests/test_gpu_step_ways.py", "-k", "not compile and not seam"]
    done = run(suite_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


def test_a_short_run_says_why_it_has_no_score_on_a_bare_machine(suite_python, tmp_path):
    done = run(suite_python, "-c", SHORT_RUN, one_stage(tmp_path), str(tmp_path / "run"))
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["weights"]) == 1 and found["files"].keys() == {"trace.jsonl", "metrics.jsonl"}
    assert found["dev_scores"]["hss"] == []
    assert "scoring needs the package hoho2025" in found["dev_scores"]["not_computed"]
