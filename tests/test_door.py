"""The door, on a copy of itself in a folder with a space in its name; its interpreters only write down their calls."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("demo", "again", "s23dr", "test", "bench", "gpu", "doctor", "help")

# answers every probe, names recipes as the program does, and on `-m venv` leaves a .venv whose python writes down its
# calls as well
WORKING = """#!/bin/bash
echo "$(basename "$0") $*" | tr '\\n' ' ' | cut -c1-100 >>"$CALLS"
while [[ -n ${WAIT:-} && "$*" == *"$WAIT"* && ! -e $CALLS.go ]]; do sleep 0.02; done
if [[ "$*" == *"-m $BREAK"* ]]; then exit 3; fi
if [[ "$*" == *load_recipe* ]]; then PYTHONPATH=$ROOT exec "$PYTHON" "$@"; fi
if [[ "$1 $2" == "-m venv" ]]; then rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi
"""
SHIM = "#!/bin/sh\necho 'shim: no interpreter behind this name' >&2\nexit 127\n"


class Door:
    def __init__(self, folder: Path):
        self.home, self.bin = folder / "a copy", folder / "bin"
        self.calls_file = folder / "calls"
        self.started: list[subprocess.Popen] = []
        self.home.mkdir()
        self.bin.mkdir()
        for name in ("reproduce.sh", "constraints.txt", "setup.py"):
            shutil.copy(ROOT / name, self.home / name)
        shutil.copytree(ROOT / "configs", self.home / "configs")
        for name in ("python3.12", "python3.11", "python3"):
            self.install(name, SHIM)

    def install(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return self.answer(self.start(*arguments, **environment))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "CALLS": str(self.calls_file),
            "BREAK": "nothing",
            "PYTHON": sys.executable,
            "ROOT": str(ROOT),
        } | environment
        door = ["bash", str(self.home / "reproduce.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.started.append(subprocess.Popen(door, cwd="/", env=environment, text=True, **pipes))
        return self.started[-1]

    def answer(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        out, errors = process.communicate()
        self.started.remove(process)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    def go(self) -> None:
        """Let calls go on that were told to wait."""
        self.calls_file.with_name("calls.go").touch()

    def calls(self) -> list[str]:
        """The calls since the last time this was asked, without probes."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line.strip() for line in lines if " -c " not in line]


@pytest.fixture
def door(tmp_path):
    door = Door(tmp_path)
    yield door
    door.go()
    for process in door.started[:]:
        door.answer(process)


def test_the_script_parses():
    subprocess.run(["bash", "-n", str(ROOT / "reproduce.sh")], check=True)


def test_help_lists_each_command_and_makes_nothing(door):
    answer = door("help")
    assert answer.returncode == 0
    assert re.findall(r"^  ([a-z0-9]+) ", answer.stdout, re.MULTILINE) == list(COMMANDS)
    assert not (door.home / ".venv").exists()


def test_the_example_of_help_does_not_meet_the_run_that_stands_there(door):
    """A run directory belongs to one recipe: another seed needs another name."""
    (example,) = re.findall(r"`bash reproduce\.sh (.*)`", door("help").stdout)
    assert "--seed" in example and "--name" in example
    door.install("python3", WORKING)
    assert door(*example.split()).returncode == 0
    assert door.calls()[-1] == f"python -m train run --recipe {example}"


def test_an_unknown_command_exits_2_with_usage(door):
    answer = door("dmeo")
    assert answer.returncode == 2
    assert "unknown command 'dmeo'" in answer.stderr and "Usage:" in answer.stderr and answer.stdout == ""


def test_an_environment_elsewhere_that_is_linked_to_is_not_emptied(door, tmp_path):
    door.install("python3.12", WORKING)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (door.home / ".venv").symlink_to(elsewhere)
    answer = door("demo")
    assert answer.returncode == 1 and "it is a link: remove it" in answer.stderr
    assert (elsewhere / "kept").exists() and not door.calls()


def test_candidates_that_do_not_run_are_named_with_the_cure(door):
    answer = door("demo")
    assert answer.returncode == 1
    for text in ("tried python3.12: no interpreter behind", "tried python3.11", "tried python3:", "python3-venv"):
        assert text in answer.stderr
    assert not (door.home / ".venv").exists()


def test_an_interpreter_of_another_version_is_refused_with_its_version(door):
    door.install("python3", '#!/bin/sh\necho "is 3.9, must be 3.11 or 3.12" >&2\nexit 1\n')
    answer = door("demo")
    assert answer.returncode == 1 and "tried python3: is 3.9" in answer.stderr


def test_the_first_candidate_that_runs_makes_the_environment_from_the_pins(door):
    door.install("python3.11", WORKING)
    assert door("doctor").returncode == 0
    made, installed, ran = door.calls()
    assert made == "python3.11 -m venv --clear .venv"
    assert installed.startswith("python -m pip install") and "constraints.txt" in installed
    assert ran == "python -m train.doctor"


def test_a_named_interpreter_is_the_only_candidate(door, tmp_path):
    door.install("python3.12", WORKING)
    own = tmp_path / "my python"
    own.write_text(WORKING)
    own.chmod(0o755)
    assert door("doctor", REPRODUCE_PYTHON=str(own)).returncode == 0
    assert door.calls()[0] == "my python -m venv --clear .venv"
    answer = door("doctor", REPRODUCE_PYTHON="/nowhere/python")
    assert answer.returncode == 1 and "tried /nowhere/python" in answer.stderr and "python3.12" not in answer.stderr


def test_the_environment_is_made_once(door):
    door.install("python3", WORKING)
    door("doctor")
    door.calls()
    door("doctor")
    assert door.calls() == ["python -m train.doctor"]


def test_what_is_made_says_how_much_it_takes(door):
    door.install("python3", WORKING)
    assert re.search(r"^making \.venv .* minutes, and \d\.\d GB of disk$", door("doctor").stderr, re.MULTILINE)


def test_two_calls_at_once_make_one_environment(door):
    door.install("python3", WORKING)
    first = door.start("doctor", WAIT="pip install")
    assert first.stderr.readline().startswith("making .venv")
    second = door.start("doctor")
    assert second.stderr.readline() == "another process is making .venv: waiting\n"
    door.go()
    assert door.answer(first).returncode == door.answer(second).returncode == 0
    made, installed, *ran = door.calls()
    assert "venv --clear" in made and "pip install" in installed and ran == ["python -m train.doctor"] * 2


def test_an_environment_in_use_is_not_emptied(door):
    door.install("python3", WORKING)
    door("doctor")
    door.calls_file.write_text("")
    first = door.start("demo", WAIT="train run")
    while "train run" not in door.calls_file.read_text():
        assert first.poll() is None
    (door.home / "constraints.txt").write_text("torch==2.12.0\n")
    second = door.start("doctor")
    assert second.stderr.readline().startswith("another process uses .venv, which must be made anew: waiting")
    assert first.poll() is None and "--clear" not in door.calls_file.read_text()
    door.go()
    assert door.answer(first).returncode == door.answer(second).returncode == 0
    assert [call for call in door.calls() if "--clear" in call] == ["python3 -m venv --clear .venv"]


def test_two_commands_use_one_environment_at_a_time(door):
    door.install("python3", WORKING)
    door("doctor")
    first = door.start("demo", WAIT="train run")
    assert door("doctor").returncode == 0 and first.poll() is None


def test_where_nothing_can_be_locked_nothing_is_waited_for(door):
    door.install("python3", WORKING)
    door.install("flock", "#!/bin/sh\necho 'flock: 9: no locks available' >&2\nexit 71\n")
    answer = door("doctor")
    assert answer.returncode == 0 and "flock" not in answer.stderr
    assert door.calls()[-1] == "python -m train.doctor"


@pytest.mark.parametrize("change", ["pins", "package", "stamp", "interpreter"])
def test_a_stale_or_half_made_environment_is_made_anew(door, change):
    door.install("python3", WORKING)
    door("doctor")
    door.calls()
    if change == "pins":
        (door.home / "constraints.txt").write_text("torch==2.12.0\n")
    elif change == "package":
        (door.home / "setup.py").write_text("")
    elif change == "stamp":
        (door.home / ".venv" / "reproduce.stamp").unlink()
    else:
        (door.home / ".venv" / "bin" / "python").unlink()
    assert door("doctor").returncode == 0
    assert door.calls()[0] == "python3 -m venv --clear .venv"


def test_an_install_that_fails_leaves_no_stamp_and_is_tried_again(door):
    door.install("python3", WORKING)
    answer = door("demo", BREAK="pip")
    assert answer.returncode == 1 and "could not install constraints.txt" in answer.stderr
    door.calls()
    assert door("demo").returncode == 0
    assert door.calls()[0] == "python3 -m venv --clear .venv"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["-m train run --recipe demo"]),
        (["demo", "--seed", "4"], ["-m train run --recipe demo --seed 4"]),
        (["s23dr"], ["-m train run --recipe s23dr"]),
        (
            ["again"],
            [
                "-m train run --recipe demo",
                "-m train run --recipe demo --name demo-again",
                "-m train compare runs/demo runs/demo-again",
            ],
        ),
        (
            ["again", "s23dr"],
            [
                "-m train run --recipe s23dr",
                "-m train run --recipe s23dr --name s23dr-again",
                "-m train compare runs/s23dr runs/s23dr-again",
            ],
        ),
        (
            ["again", "configs/tiny.json"],
            [
                "-m train run --recipe configs/tiny.json",
                "-m train run --recipe configs/tiny.json --name tiny-again",
                "-m train compare runs/tiny runs/tiny-again",
            ],
        ),
        (
            ["again", "--recipe", "tiny"],
            [
                "-m train run --recipe demo --recipe tiny",
                "-m train run --recipe demo --recipe tiny --name tiny-again",
                "-m train compare runs/tiny runs/tiny-again",
            ],
        ),
        (
            ["again", "--seed", "4"],
            [
                "-m train run --recipe demo --seed 4",
                "-m train run --recipe demo --seed 4 --name demo-again",
                "-m train compare runs/demo runs/demo-again",
            ],
        ),
        (
            ["again", "tiny", "--name", "y", "--runs=there", "--name", "x"],
            [
                "-m train run --recipe tiny --name y --runs=there --name x",
                "-m train run --recipe tiny --name y --runs=there --name x --name x-again",
                "-m train compare there/x there/x-again",
            ],
        ),
        (["test"], ["-m pytest -n 2", "-m bench.static --check", "-m bench.static step --arch 90 --check"]),
        (["bench"], ["-m bench"]),
    ],
)
def test_each_command_runs_what_it_says(door, arguments, expected):
    door.install("python3", WORKING)
    assert door(*arguments).returncode == 0
    assert door.calls()[2:] == [f"python {call}" for call in expected]


def test_a_recipe_in_a_file_that_names_itself_is_compared_under_its_name(door):
    door.install("python3", WORKING)
    own = door.home / "of my own.json"
    own.write_text((ROOT / "configs" / "tiny.json").read_text().replace("{", '{"name": "other",', 1))
    assert door("again", own.name).returncode == 0
    assert door.calls()[-1] == "python -m train compare runs/other runs/other-again"


def test_the_gpu_is_measured_with_the_python_that_sees_it_and_nothing_is_made(door):
    door.install("python3", WORKING)
    assert door("gpu", "--out", "results", "--only", "tests").returncode == 0
    assert door.calls() == ["python3 -m bench.gpu --out results --only tests"]
    assert not (door.home / ".venv").exists()


def test_without_a_gpu_the_command_for_it_says_so_and_exits_2(door):
    door.install("python3", "#!/bin/sh\necho 'its torch 2.13.0 sees no CUDA device' >&2\nexit 1\n")
    answer = door("gpu")
    assert answer.returncode == 2
    assert "tried python3: its torch 2.13.0 sees no CUDA device" in answer.stderr
    assert "needs an NVIDIA GPU" in answer.stderr
    assert not (door.home / ".venv").exists()


def test_a_failing_step_ends_the_command_with_its_exit_code(door):
    door.install("python3", WORKING)
    assert door("again", BREAK="train run").returncode == 3
    assert door.calls()[2:] == ["python -m train run --recipe demo"]


def test_the_environment_of_the_caller_does_not_reach_python(door):
    door.install("python3", '#!/bin/sh\necho "path=$PYTHONPATH venv=$PYTHONHOME" >>"$CALLS"\n')
    door("doctor", PYTHONPATH="/elsewhere", PYTHONHOME="/elsewhere")
    assert set(door.calls()) == {"path= venv="}


def test_packages_that_were_brought_to_a_gpu_machine_are_found(door):
    door.install("python3", '#!/bin/sh\necho "path=$PYTHONPATH venv=$PYTHONHOME" >>"$CALLS"\n')
    door("gpu", "--out", "results", PYTHONPATH="/elsewhere", PYTHONHOME="/elsewhere")
    assert set(door.calls()) == {"path=/elsewhere venv="}


def test_continuous_integration_calls_the_door(door):
    (door.home / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", door.home / ".ci" / "run")
    door.install("python3", WORKING)
    environment = {"PATH": f"{door.bin}:/usr/bin:/bin", "CALLS": str(door.calls_file), "BREAK": "nothing", "CI": "true"}
    subprocess.run([str(door.home / ".ci" / "run")], cwd="/", env=environment, check=True, stdin=subprocess.DEVNULL)
    static = [f"python -m bench.static {options}" for options in ("--check", "step --arch 90 --check")]
    assert door.calls()[2:] == ["python -m pytest -n 2", *static]
