"""What this machine has and what holds on it: `python -m train.doctor`, exit code 1 if something is wrong.

`examine` returns findings and prints nothing. It needs the standard library alone: PyTorch and the rest are what it
looks for. A finding is "ok", a "note" (something is absent or other than pinned; what that costs is said), or an
"error" (results would be wrong, or nothing runs).
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent

LIBRARIES = {
    "numpy": "everything",
    "safetensors": "checkpoints",
    "tyro": "the command line",
    "tqdm": "progress bars",
    "datasets": "rows from the hub and from parquet files",
    "hoho2025": "the official score",
    "scipy": "matching in the score",
    "plotly": "the report page",
    "pytest": "the tests",
    "POT": "a peer in the benchmarks",
    "geomloss": "a peer in the benchmarks",
}
NEEDED = ("numpy",)
Level = Literal["ok", "note", "error"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    topic: str
    name: str
    value: str
    level: Level = "ok"


def examine() -> list[Finding]:
    """Look at the interpreter, PyTorch, Triton, the GPU, flags and libraries, and say what holds here."""
    findings = [*_machine()]
    if importlib.util.find_spec("torch") is None:
        findings.append(Finding(topic="PyTorch", name="torch", value="not installed: nothing runs", level="error"))
    else:
        import torch

        findings += [*_torch(torch), *_gpu(torch), *_flags(torch)]
    findings += [*_libraries(), *pinned_versions(read_pins(ROOT / "constraints.txt")), kernels_package()]
    return [*findings, *_promises(findings)]


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels_package() -> Finding:
    """Say whose package `import kernels` finds: Hugging Face publishes another one under the same name."""
    version = installed("kernels")
    if version is not None:
        cure = "another package of the name `kernels` is installed; cure: pip uninstall kernels"
        return Finding(topic="Libraries", name="kernels", value=f"{version}: {cure}", level="error")
    spec = importlib.util.find_spec("kernels")
    places = [Path(place).resolve() for place in spec.submodule_search_locations or ()] if spec else []
    if places != [ROOT / "kernels"]:
        found = ", ".join(map(str, places)) or "nothing"
        return Finding(topic="Libraries", name="kernels", value=f"`import kernels` finds {found}", level="error")
    return Finding(topic="Libraries", name="kernels", value="this project's")


def read_pins(path: Path) -> dict[str, str]:
    """Read `name==version` lines; an empty result where the file is absent (an installed package has none)."""
    if not path.exists():
        return {}
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def pinned_versions(pins: Mapping[str, str]) -> Iterator[Finding]:
    """Compare what is installed with the pinned environment; what is not installed is not counted."""
    found = {name: installed(name) for name in pins}
    other = [
        f"{name} {version} instead of {pins[name]}"
        for name, version in found.items()
        if version is not None and version.partition("+")[0] != pins[name]
    ]
    if not pins:
        yield Finding(topic="Libraries", name="pinned", value="unknown: no constraints.txt here", level="note")
    elif other:
        yield Finding(topic="Libraries", name="pinned", value=", ".join(other), level="note")
    else:
        yield Finding(topic="Libraries", name="pinned", value="all versions are those of constraints.txt")


def print_findings(findings: Iterable[Finding]) -> None:
    """Print one line per finding under its topic, notes and errors marked."""
    marks = {"ok": " ", "note": "-", "error": "!"}
    topic = None
    for finding in findings:
        if finding.topic != topic:
            print(f"{'' if topic is None else chr(10)}{finding.topic}")
            topic = finding.topic
        print(f"{marks[finding.level]} {finding.name:<24} {finding.value}")


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    value = f"{version} ({sys.executable})" if fits else f"{version}: must be 3.11 or 3.12"
    yield Finding(topic="Machine", name="Python", value=value, level="ok" if fits else "error")
    system, machine = platform.system(), platform.machine()
    supported = (system, machine) == ("Linux", "x86_64")
    value = f"{system} {platform.release()} {machine}" + ("" if supported else ": supported is Linux on x86-64")
    yield Finding(topic="Machine", name="system", value=value, level="ok" if supported else "note")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(topic="Machine", name="CPU", value=f"{_cpu_model()}, {cores} cores for this process")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown model")


def _torch(torch: Any) -> Iterator[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    known = (2, 11) <= release <= (2, 13)
    value = f"{torch.__version__}, {build}" + ("" if known else "; written for 2.11 to 2.13")
    yield Finding(topic="PyTorch", name="torch", value=value, level="ok" if known else "note")
    # NVIDIA's and nightly builds of PyTorch bring it under another name
    triton = installed("triton") or installed("pytorch-triton")
    value = triton or "not installed: eager operators only"
    yield Finding(topic="PyTorch", name="triton", value=value, level="ok" if triton else "note")
    yield Finding(topic="PyTorch", name="CPU capability", value=torch.backends.cpu.get_cpu_capability())
    threads = f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})"
    yield Finding(topic="PyTorch", name="threads", value=f"{threads}; a recipe sets its own")


def _gpu(torch: Any) -> Iterator[Finding]:
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        yield Finding(topic="GPU", name="driver", value=driver.read_text().splitlines()[0].partition(": ")[2].strip())
    if not torch.cuda.is_available():
        reason = "this PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch sees no CUDA device"
        yield Finding(topic="GPU", name="device", value=f"none: {reason}", level="note")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        value = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        old = (card.major, card.minor) < (8, 0)
        value += "; older than sm_80: impl=eager in fp32 only" if old else ""
        yield Finding(topic="GPU", name=f"device {index}", value=value, level="note" if old else "ok")


def _flags(torch: Any) -> Iterator[Finding]:
    """The state a process starts in; a training run sets its own and refuses where it cannot."""
    backends = torch.backends
    flags = {
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "TF32 matrix products": backends.cuda.matmul.allow_tf32,
        "TF32 in cuDNN": backends.cudnn.allow_tf32,
        "cuDNN benchmark": backends.cudnn.benchmark,
        "bf16 reduced reduction": backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    }
    for name, value in flags.items():
        yield Finding(topic="Flags at start", name=name, value="on" if value else "off")
    for variable in ("CUBLAS_WORKSPACE_CONFIG", "TRITON_INTERPRET"):
        yield Finding(topic="Flags at start", name=variable, value=os.environ.get(variable, "unset"))
    from train.determinism import refused_variables

    for variable in refused_variables():
        value = f"{os.environ[variable]}: changes how results are computed; cure: unset {variable}"
        yield Finding(topic="Flags at start", name=variable, value=value, level="error")


def _libraries() -> Iterator[Finding]:
    for name, purpose in LIBRARIES.items():
        version = installed(name)
        level = "ok" if version else ("error" if name in NEEDED else "note")
        yield Finding(topic="Libraries", name=name, value=version or f"not installed: {purpose}", level=level)


def _promises(findings: Iterable[Finding]) -> Iterator[Finding]:
    """What follows for this machine; nothing is run, so this is what can be expected, not what was checked."""
    found = {finding.name: finding for finding in findings}
    errors = [finding.name for finding in found.values() if finding.level == "error"]
    topic = "What holds here"
    if errors:
        yield Finding(topic=topic, name="nothing yet", value=f"first mend: {', '.join(errors)}", level="error")
        return
    yield Finding(topic=topic, name="eager operators", value="run, on the CPU and on any CUDA device")
    card = found.get("device 0")
    if card is None:
        value = "do not run: no GPU; the tests run them under Triton's interpreter"
    elif card.level == "note" or found["triton"].level == "note":
        value = "do not run: they need Triton and a GPU from sm_80"
    else:
        value = "run on the GPU"
    kernels = value.startswith("run")
    yield Finding(topic=topic, name="Triton kernels", value=value, level="ok" if kernels else "note")
    pinned = found["pinned"]
    value = "can be repeated, and compared with a machine of the same processor or GPU and thread count"
    if pinned.level == "note":
        value = "can be repeated here; not comparable with the pinned environment's"
    yield Finding(topic=topic, name="bits", value=value, level=pinned.level)
    yield from _evidence(gpu=card is not None, kernels=kernels)


def _evidence(*, gpu: bool, kernels: bool) -> Iterator[Finding]:
    """The promises about bits, level by level."""
    from train.determinism import fingerprint

    known = ROOT / "tests" / "golden" / "tiny.json"
    published = json.loads(known.read_text()) if known.exists() else {}
    here = fingerprint("cuda" if gpu else "cpu")
    listed = here in published
    untested = "" if listed or not gpu else "; no golden file has this GPU: bash reproduce.sh test shows it"
    level: Level = "note" if untested else "ok"
    no_kernels = "no kernel runs here; the interpreter runs them in the tests"
    lines: dict[str, tuple[str, Level]] = {
        "L0 math": ("errors at most twice eager's: tests of each operator", "ok"),
        "L1 repeat": (f"the same call gives the same bits{untested}", level),
        "L2 process": (f"so do a new process, cold caches, another hash seed{untested}", level),
        "L3 place": (f"a scene's bits do not depend on its batch{untested}", level)
        if kernels
        else (no_kernels, "note"),
        "L4 training": (f"two runs of a recipe are identical at every step{untested}", level),
        "L5 resume": (f"a run stopped anywhere goes on as if it never stopped{untested}", level),
        "L6 workers": ("several workers give the bits of one", "ok"),
        "L7 published": (f"{here}: listed in tests/golden", "ok"),
    }
    if importlib.util.find_spec("train.workers") is None:
        lines["L6 workers"] = ("does not hold: training has one worker", "note")
    if not listed:
        lines["L7 published"] = (f"{here}: not listed in tests/golden; python -m tests.test_trace adds it", "note")
    for name, (value, level) in lines.items():
        yield Finding(topic="What is promised", name=name, value=value, level=level)


def main() -> int:
    """Print what `examine` found; the exit code is 1 if anything is wrong."""
    findings = examine()
    print_findings(findings)
    return int(any(finding.level == "error" for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
