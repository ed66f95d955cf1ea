"""compute-sanitizer over all operators: what it says is read, and counts only where it sees what is planted."""

import json
import subprocess
import sys

from bench.gpu_gathered import gather
from bench.gpu_sanitizer import TOOLS, is_green, main, read_log

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _store_behind_kernel+0x100
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 12 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _race_kernel+0x90
=========     and Read access at _race_kernel+0xa0 [256 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
# stands for the tool: runs what it watches, and finds what the test wants it to find
STANDIN = """#!/bin/sh
while :; do
    case $1 in --log-file) log=$2;; --error-exitcode) code=$2;; --tool | --padding) ;; *) break;; esac
    shift 2
done
case "$*" in *planted*) n=1;; *) n=0; "$@" || exit;; esac
echo "========= ERROR SUMMARY: $n errors" > "$log"
[ "$n" = 0 ] || exit "$code"
"""


def test_a_log_is_read():
    assert read_log(MEMCHECK) == {"defects": 12, "messages": ["Invalid __global__ write of size 4 bytes"]}
    said = "Error: Race reported between Write access at _race_kernel+0x90"
    assert read_log(RACECHECK) == {"defects": 1, "messages": [said]}
    assert read_log("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")["defects"] == 0
    # killed, or refused by the device: nothing is known
    assert read_log("========= COMPUTE-SANITIZER\n")["defects"] is None


def test_all_are_called_and_only_what_is_planted_is_found(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STANDIN)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    out = tmp_path / "out" / "sanitizer.json"
    part = ["-m", "bench.gpu_sanitizer", "--device", "cpu", "--select", "sinkhorn 64x64 full", "--out", str(out)]
    ended = subprocess.run([sys.executable, *part], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())
    assert found["configurations"] == 2 and all(found["tools"][tool]["called"] == 2 for tool in TOOLS)
    short = gather({"sanitizer": found}, {})["checks"]["sanitizer"]
    assert short["racecheck"] == {"configurations": 2, "defects": [0] * 4, "planted": 1}


def _heard(planted=1, others=0, code=0, called=2):
    shares = {part: {"defects": others, "messages": [], "exit": code} for part in ("0/4", "1/4", "2/4", "3/4")}
    heard = {"called": called, "planted": {"defects": planted, "messages": [], "exit": 86}, "shares": shares}
    return {"tool": "compute-sanitizer", "configurations": 2, "tools": dict.fromkeys(TOOLS, heard)}


def test_green_is_only_what_a_seeing_tool_found_nothing_in():
    assert is_green(_heard())
    assert not is_green(_heard(planted=0)) and not is_green(_heard(planted=None))
    assert not is_green(_heard(others=2)) and not is_green(_heard(others=None)) and not is_green(_heard(code=1))
    assert not is_green(_heard(called=1)) and not is_green(_heard() | {"tools": {}})


def test_without_the_tool_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("bench.gpu_sanitizer._TOOLKIT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_sanitizer", "--out", str(tmp_path / "sanitizer.json")])
    assert main() == 1
    assert "compute-sanitizer is neither on the path nor in" in capsys.readouterr().err
    assert not is_green(json.loads((tmp_path / "sanitizer.json").read_text()))
