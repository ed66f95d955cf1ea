"""Two result files are compared: a difference inside the spread is noise, a slower case of ours is exit code 1."""

import os
import subprocess
import sys

import pytest

from bench.__main__ import main
from bench.results import merge, write_results
from bench.spread import ratio

MACHINE = {"cpu": "some CPU", "cores": 2, "torch": "2.13.0"}


def write(path, *rows):
    cases = [
        {"suite": "sinkhorn", "group": "g", "name": f"bench[{peer}]", "peer": peer, **numbers} for peer, numbers in rows
    ]
    write_results(path, merge(None, cases, MACHINE))
    return str(path)


def number(median, spread):
    return {"median_s": median, "iqr_s": spread}


@pytest.mark.parametrize(
    ("after", "verdict", "code"),
    [
        (number(1.15, 0.1), "1.15 x  noise", 0),
        (number(0.85, 0.1), "0.85 x  noise", 0),
        (number(1.25, 0.1), "1.25 x  slower", 1),
        (number(0.75, 0.1), "0.75 x  faster", 0),
        ({"red": "relative error 1.0e+00"}, "lost", 1),
    ],
)
@pytest.mark.parametrize("command", ["compare", "--compare"])
def test_a_difference_counts_when_it_exceeds_both_spreads(tmp_path, capsys, command, after, verdict, code):
    a = write(tmp_path / "a.json", ("ridgeline", number(1.0, 0.1)))
    b = write(tmp_path / "b.json", ("ridgeline", after))
    assert main([command, a, b, "--all"]) == code
    assert f"{verdict}\n" in capsys.readouterr().out


def test_a_peer_that_became_slower_is_shown_and_no_regression_of_ours(tmp_path, capsys):
    a = write(tmp_path / "a.json", ("einsum", number(1.0, 0.1)), ("ridgeline", number(1.0, 0.1)))
    b = write(tmp_path / "b.json", ("einsum", number(9.0, 0.1)), ("ridgeline", number(1.0, 0.1)))
    assert main(["compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert "9.00 x  slower" in printed
    assert "1 slower, 0 faster, 1 noise, 0 lost" in printed


def test_our_operator_in_a_graph_is_ours(tmp_path):
    a = write(tmp_path / "a.json", ("ridgeline, CUDA graph", number(1.0, 0.1)))
    b = write(tmp_path / "b.json", ("ridgeline, CUDA graph", number(2.0, 0.1)))
    assert main(["compare", a, b]) == 1


def test_files_that_cannot_be_compared_are_exit_code_2(tmp_path, capsys):
    a = write(tmp_path / "a.json", ("ridgeline", number(1.0, 0.1)))
    empty = write(tmp_path / "b.json")
    assert main(["compare", a, str(tmp_path / "none.json")]) == 2
    assert main(["compare", a, empty]) == 2
    errors = capsys.readouterr().err
    assert "none.json must be a file that python -m bench wrote" in errors and errors.count("no case in common") == 1


def test_suites_that_did_not_run_again_are_left_out(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    cases = [
        {"suite": suite, "group": suite, "name": "n", "peer": "ridgeline", **number(1.0, 0.1)} for suite in ("x", "y")
    ]
    write_results(a, merge(None, cases, MACHINE))
    write_results(b, merge(None, cases[:1], MACHINE | {"cores": 4}))
    assert main(["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "not the same machine" in printed and "0 slower, 0 faster, 1 noise, 0 lost" in printed


def test_files_of_one_suite_without_a_case_in_common_are_exit_code_2(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path, group in ((a, "on a CPU"), (b, "on a GPU")):
        case = {"suite": "sinkhorn", "group": group, "name": "n", "peer": "ridgeline", **number(1.0, 0.1)}
        write_results(path, merge(None, [case], MACHINE))
    assert main(["compare", str(a), str(b)]) == 2
    printed = capsys.readouterr()
    assert "no case in common" in printed.err and not printed.out


def test_noise_is_counted_and_listed_only_when_asked_for(tmp_path, capsys):
    a = write(tmp_path / "a.json", ("ridgeline", number(1.0, 0.1)), ("einsum", number(1.0, 0.1)))
    b = write(tmp_path / "b.json", ("ridgeline", number(1.01, 0.1)), ("einsum", number(2.0, 0.1)))
    assert main(["compare", a, b]) == 0
    changed, counted = capsys.readouterr().out.splitlines()
    assert changed.startswith("g: einsum ") and counted == "1 slower, 0 faster, 1 noise, 0 lost"
    assert main(["compare", a, b, "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_times_of_a_gpu_are_told_in_a_unit_that_shows_them(tmp_path, capsys):
    a = write(tmp_path / "a.json", ("ridgeline", number(1.522e-5, 1.8e-9)))
    b = write(tmp_path / "b.json", ("ridgeline", number(1.322e-5, 1.8e-9)))
    assert main(["compare", a, b]) == 0
    assert "15.2 µs ± 0.0018 µs  13.2 µs ± 0.0018 µs" in capsys.readouterr().out


def test_a_case_on_another_clock_has_lost_its_number(tmp_path, capsys):
    a = write(tmp_path / "a.json", ("ridgeline", number(1e-5, 1e-8) | {"clock": "graph"}))
    b = write(tmp_path / "b.json", ("ridgeline", number(1e-3, 1e-8) | {"clock": "stream: it waits"}))
    assert main(["compare", a, b]) == 1
    assert "lost, another clock: graph, then stream" in capsys.readouterr().out


def test_a_reader_that_leaves_early_sees_no_traceback_and_does_not_change_the_exit_code(tmp_path):
    a = write(tmp_path / "a.json", ("ridgeline", number(1.0, 0.1)))
    b = write(tmp_path / "b.json", ("ridgeline", number(2.0, 0.1)))
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bench", "compare", a, b]
    ended = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, check=False)
    os.close(written)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_ratio_is_of_times_on_one_clock():
    kernels, waits = number(1.0, 0.1) | {"clock": "graph"}, number(8.0, 0.1) | {"clock": "stream: it waits"}
    assert ratio(kernels, kernels | number(3.0, 0.1)) == (3.0, False, False)
    assert ratio(number(1.0, 0.1), number(1.1, 0.1))[1:] == (True, False)
    assert ratio(kernels, waits) is None
    assert ratio(kernels | {"wall_median_s": 4.0}, waits) is None
    wall = {"wall_median_s": 4.0}, {"wall_median_s": 10.0}
    assert ratio(kernels | wall[0], waits | wall[1]) == (2.5, False, True)
    assert ratio(waits | wall[0], waits | wall[1]) == (2.5, False, True)
    for spread, noise in ((2.9, False), (3.0, True)):
        kept = wall[0] | {"wall_iqr_s": 3.0}, wall[1] | {"wall_iqr_s": spread}
        assert ratio(kernels | kept[0], waits | kept[1]) == (2.5, noise, True)
    assert ratio(kernels | kept[0], waits | wall[1]) == (2.5, False, True)
    assert ratio(kernels | wall[0], number(3.0, 0.1)) is None
