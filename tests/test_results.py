"""Result files: new cases take the place of old ones, suite by suite, and the machine is named beside them."""

import importlib.metadata
import json

import pytest
import triton

from bench.results import installed_versions, measured, merge, read_lines, read_results, write_results

MACHINE = {"cpu": "some CPU", "cores": 2, "torch": "2.13.0", "commit": "abc"}


def case(suite, name, median=1.0):
    return {"suite": suite, "group": "g", "name": name, "peer": "ridgeline", "median_s": median, "iqr_s": 0.1}


def test_suites_that_were_not_run_keep_their_cases_and_what_measured_them():
    first = merge(None, [case("step", "a"), case("sinkhorn", "b")], MACHINE)
    second = merge(first, [case("step", "c", 3.0)], MACHINE | {"commit": "def"})
    assert [(c["suite"], c["name"]) for c in second["cases"]] == [("sinkhorn", "b"), ("step", "c")]
    assert {suite: at["commit"] for suite, at in second["suites"].items()} == {"sinkhorn": "abc", "step": "def"}
    assert second["machine"] == {"cpu": "some CPU", "cores": 2}


def test_the_release_of_triton_is_known_under_whatever_name_it_was_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert installed_versions()["triton"] == triton.__version__


def test_of_a_suite_that_ran_in_part_the_other_cases_are_kept():
    first = merge(None, [case("step", "a"), case("step", "b")], MACHINE)
    second = merge(first, [case("step", "b", 2.0)], MACHINE, part=True)
    assert [(c["name"], c["median_s"]) for c in second["cases"]] == [("a", 1.0), ("b", 2.0)]
    assert second["suites"]["step"]["part"] is True
    assert "part" not in merge(second, [case("step", "b", 2.0)], MACHINE)["suites"]["step"]


def test_a_file_is_read_as_it_was_written_a_line_per_case(tmp_path):
    results = merge(None, [case("step", "a"), case("step", "b") | {"refused": "not installed"}], MACHINE)
    write_results(tmp_path / "cpu.json", results)
    assert read_results(tmp_path / "cpu.json") == results
    assert sum('"name": "a"' in line for line in (tmp_path / "cpu.json").read_text().splitlines()) == 1


def test_a_line_that_was_cut_is_left_out(tmp_path):
    (tmp_path / "lines").write_text(json.dumps(case("step", "a")) + "\n" + '{"suite": "st')
    assert [c["name"] for c in read_lines(tmp_path / "lines")] == ["a"]
    assert read_lines(tmp_path / "none") == []


@pytest.mark.parametrize("text", [None, "{", "[]", '{"machine": {}}'])
def test_another_file_is_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json must be a file that python -m bench wrote"):
        read_results(tmp_path / "x.json")


def test_only_cases_with_a_number_are_measured():
    red = {"suite": "s", "group": "g", "name": "n", "peer": "p", "red": "wrong"}
    assert measured([red, case("step", "a")]) == [case("step", "a")]


def test_the_machine_is_named():
    machine = installed_versions()
    assert {"cpu", "cores", "torch", "triton", "python"} <= machine.keys()
    assert machine["cores"] >= 1 and machine["triton"]
