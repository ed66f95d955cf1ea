"""The rules of the house that a machine can keep: who imports whom, sizes, names, lint and types."""

import ast
import fnmatch
import importlib.metadata
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from train.doctor import read_pins

ROOT = Path(__file__).resolve().parent.parent
# a room may import itself and what stands here
IMPORTABLE = {
    "kernels": set(),
    "perceiver": {"kernels"},
    "train": {"kernels", "perceiver"},
    "bench": {"kernels", "perceiver", "train"},
    "tests": {"kernels", "perceiver", "train", "bench"},
}
# what a module may import at its top beside the standard library and the rooms; the rest where it is used
AT_THE_TOP = {
    "kernels": {"torch", "triton"},
    "perceiver": {"torch", "numpy"},
    "train": {"torch", "numpy"},
}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}
MACHINE_OR_REGISTRY = re.compile(
    r"(?<![\w.~-])/(?:home|root|Users|work|opt|mnt|scratch)/\w"
    r"|pypi\.org|pythonhosted\.|pytorch\.org/whl|--(?:extra-)?index[-]url|--find[-]links"
)


@cache
def sources(room: str) -> tuple[Path, ...]:
    """The Python files of a room, or of the root."""
    return tuple(sorted((ROOT / room).glob("*.py") if room == "." else (ROOT / room).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Line and first name of each import among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name.partition(".")[0]) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else (node.module or "").partition(".")[0]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def code_mentions(path: Path, pattern: str) -> list[str]:
    """Places whose code (names and attributes, no comments and strings) matches `pattern`."""
    return [
        f"{at(path, node.lineno)} {text}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute | ast.Name) and re.fullmatch(pattern, text := ast.unparse(node))
    ]


def test_data_walks_one_way_between_the_rooms():
    wrong = [
        f"{at(path, line)} imports {name}"
        for room, allowed in IMPORTABLE.items()
        for path in sources(room)
        for line, name in imports(ast.walk(tree(path)))
        if (name in IMPORTABLE and name not in allowed | {room}) or name in (".", "script")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_imports_more_at_the_top_than_it_needs():
    wrong = [
        f"{at(path, line)} imports {name}"
        for room, allowed in AT_THE_TOP.items()
        for path in sources(room)
        for line, name in imports(tree(path).body)
        if name not in allowed | set(IMPORTABLE) and name not in sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_tuned_while_it_runs():
    pattern = r"(triton\.)?(autotune|heuristics)|(tl|triton\.language)\.atomic_\w+"
    rooms = ("kernels", "perceiver", "train", "bench", ".")
    wrong = [place for room in rooms for path in sources(room) for place in code_mentions(path, pattern)]
    assert not wrong, "\n".join(wrong)


def test_compilation_is_left_to_benchmarks_and_tests():
    rooms = ("kernels", "perceiver", "train", ".")
    wrong = [place for room in rooms for path in sources(room) for place in code_mentions(path, r"torch\.compile")]
    assert not wrong, "\n".join(wrong)


def test_one_place_refuses_waits_for_the_gpu():
    pattern = r"torch\.cuda\.set_sync_debug_mode"
    found = [place for room in IMPORTABLE for path in sources(room) for place in code_mentions(path, pattern)]
    assert {place.partition(":")[0] for place in found} == {"bench/measure.py"}


def test_no_error_is_swallowed():
    wrong = [
        at(path, node.lineno)
        for room in IMPORTABLE
        for path in sources(room)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(statement, ast.Pass) for statement in node.body))
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_drawers():
    wrong = [
        str(path.relative_to(ROOT))
        for room in IMPORTABLE
        for path in sources(room)
        if DRAWERS & {path.stem, *path.relative_to(ROOT).parent.parts}
    ]
    assert not wrong, "\n".join(wrong)


def test_files_stay_below_the_ceiling():
    wrong = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for room in (".", *IMPORTABLE)
        for path in sources(room)
        if (lines := len(path.read_text().splitlines())) > FILE_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_and_kernels_stay_below_the_ceiling():
    wrong = [
        f"{at(path, function.lineno)} {function.name}: {lines} lines"
        for room in (".", *IMPORTABLE)
        for path in sources(room)
        for function in functions(path)
        if (lines := (function.end_lineno or 0) - function.lineno + 1)
        > (KERNEL_LINES if is_kernel(function) else FUNCTION_LINES)
    ]
    assert not wrong, "\n".join(wrong)


def test_public_functions_have_docstrings():
    wrong = [
        f"{at(path, node.lineno)} {node.name}"
        for room in ("kernels", "perceiver", "train", "bench", ".")
        for path in sources(room)
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "test_", "bench_", "pytest_"))
        if not ast.get_docstring(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_each_source_file_has_its_test_file():
    """Of the same stem; the parts of one operator (sinkhorn_tile) may be tested under its name (test_sinkhorn)."""
    exempt = ("__init__.py", "__main__.py", "conftest.py", "bench_*.py")
    tested = {path.stem.removeprefix("test_") for path in sources("tests") if path.stem.startswith("test_")}
    wrong = [
        str(path.relative_to(ROOT))
        for room in ("kernels", "perceiver", "train", "bench", ".")
        for path in sources(room)
        if not tested & {path.stem, path.stem.partition("_")[0]}
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in (*exempt, "setup.py"))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_names_a_machine_or_a_registry():
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    pending, wrong = [ROOT], []
    while pending:
        path = pending.pop()
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            continue
        if path.is_dir():
            pending += path.iterdir()
            continue
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
            if found := MACHINE_OR_REGISTRY.search(line):
                wrong.append(f"{at(path, number)} {found[0]}")
    assert not wrong, "\n".join(wrong)


def test_everything_that_is_installed_is_pinned():
    """What setup.py asks for, and all that it pulls in, stands in constraints.txt at a version that fits."""
    pins = {canonicalize_name(name): version for name, version in read_pins(ROOT / "constraints.txt").items()}
    # what needs a GPU is pinned in setup.py itself
    extras = [texts for name, texts in setup_argument("extras_require").items() if name != "gpu-peers"]
    texts = [*setup_argument("install_requires"), *itertools.chain(*extras)]
    pending, seen, wrong = [Requirement(text) for text in texts], set(), []
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            wrong.append(f"{name} is not pinned")
        elif not requirement.specifier.contains(pins[name]):
            wrong.append(f"{name} is pinned to {pins[name]}, must be {requirement.specifier}")
        if name not in seen and name in pins:
            seen.add(name)
            pulled_in = map(Requirement, importlib.metadata.requires(name) or [])
            pending += [r for r in pulled_in if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not wrong, "\n".join(wrong)


def setup_argument(name: str) -> Any:
    """What setup.py passes to `setup` as `name`."""
    (call,) = [node for node in ast.walk(tree(ROOT / "setup.py")) if isinstance(node, ast.Call)]
    (value,) = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return ast.literal_eval(value)


def test_the_packages_of_setup_py_are_the_rooms():
    rooms = set(IMPORTABLE) - {"tests"}
    assert set(setup_argument("packages")) == rooms
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} == rooms


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check", "--diff"]], ids=["lint", "format"])
def test_ruff_is_content(arguments):
    answer = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_types_agree():
    answer = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
