"""Two result files are compared: a difference inside the spread is noise, a slower case of ours is exit code 1."""

import pytest

from bench.__main__ import main
from bench.results import merge, write_results

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
    assert main([command, a, b]) == code
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
    assert "none.json must be a file that python -m bench wrote" in errors and "no suite in common" in errors


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
