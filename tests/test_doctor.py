import importlib.metadata
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from train import determinism, doctor
from train.doctor import ROOT, Finding, examine, kernels_package, pinned_versions, print_findings, read_pins


@pytest.fixture
def without(monkeypatch):
    """Make distributions look as if they were not installed."""

    def hide(*names: str) -> None:
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name in names:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return hide


def level_of(findings, name):
    return next(finding.level for finding in findings if finding.name == name)


def test_this_machine_has_no_error():
    assert [finding for finding in examine() if finding.level == "error"] == []


def test_a_missing_torch_is_an_error_and_the_rest_is_still_said(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    findings = examine()
    assert level_of(findings, "torch") == "error"
    assert level_of(findings, "plotly") == "ok"
    assert level_of(findings, "nothing yet") == "error"


def test_a_missing_library_is_a_note_that_says_what_it_is_for(without):
    without("plotly")
    finding = next(finding for finding in examine() if finding.name == "plotly")
    assert finding.level == "note" and "report" in finding.value


def test_another_kernels_distribution_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.0")
    assert kernels_package().level == "error"


def test_a_kernels_package_from_another_place_is_an_error(monkeypatch, tmp_path):
    assert kernels_package().level == "ok"
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert kernels_package().level == "error"


def test_other_versions_than_the_pinned_ones_are_named(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# comment\n\npytest==0.1\nnot-installed-anywhere==1.0\n")
    (finding,) = pinned_versions(read_pins(pins))
    assert finding.level == "note" and "instead of 0.1" in finding.value and "not-installed" not in finding.value


def test_a_local_build_of_the_pinned_version_counts_as_pinned(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    (finding,) = pinned_versions({"torch": "2.13.0"})
    assert finding.level == "ok"


def test_no_pins_are_said_to_be_unknown(tmp_path):
    (finding,) = pinned_versions(read_pins(tmp_path / "absent.txt"))
    assert finding.level == "note"


@pytest.mark.parametrize(("capability", "kernels"), [((7, 5), "note"), ((9, 0), "ok")])
def test_kernels_are_promised_from_sm_80_on(monkeypatch, capability, kernels):
    card = SimpleNamespace(
        name="card", major=capability[0], minor=capability[1], total_memory=2**34, multi_processor_count=108
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    findings = examine()
    assert level_of(findings, "device 0") == kernels and level_of(findings, "Triton kernels") == kernels


def test_every_promise_is_said_to_hold_or_why_not(monkeypatch):
    findings = {finding.name: finding for finding in examine() if finding.topic == "What is promised"}
    assert [name.partition(" ")[0] for name in findings] == [f"L{level}" for level in range(8)]
    monkeypatch.setattr(determinism, "fingerprint", lambda _device: "an unknown machine")
    level_7 = next(finding for finding in examine() if finding.name == "L7 published")
    assert level_7.level == "note" and "an unknown machine: not listed" in level_7.value


def test_an_untested_gpu_is_said(monkeypatch):
    card = SimpleNamespace(name="card", major=8, minor=6, total_memory=2**34, multi_processor_count=82)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    found = {finding.name: finding for finding in examine()}
    assert found["L4 training"].level == "note" and "no golden file has this GPU" in found["L4 training"].value


def test_a_variable_that_changes_the_arithmetic_is_an_error_with_the_cure(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    finding = next(finding for finding in examine() if finding.name == "MKL_CBWR")
    assert finding.level == "error" and "unset MKL_CBWR" in finding.value


def test_findings_are_printed_under_their_topic_with_marks(capsys):
    print_findings([Finding(topic="A", name="x", value="1"), Finding(topic="B", name="y", value="bad", level="error")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A" and lines[2:4] == ["", "B"]
    assert lines[1].startswith("  x") and lines[4].startswith("! y")


def test_the_command_exits_0_where_all_is_well():
    answer = subprocess.run(
        [sys.executable, "-m", "train.doctor"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "What holds here" in answer.stdout


def test_the_command_exits_1_where_something_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding(topic="A", name="x", value="bad", level="error")])
    assert doctor.main() == 1
