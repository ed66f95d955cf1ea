"""The page says what the result files say: ratios, noise, errors and bits beside times; refusals by their reasons."""

import pytest

from bench.__main__ import main
from bench.results import merge, write_results
from bench.tables import read_devices, write_report

MACHINE = {
    "cpu": "some CPU",
    "cores": 2,
    "torch": "2.13.0",
    "triton": "3.7.1",
    "python": "3.11.7",
    "commit": "abcdef" * 7,
}


def case(peer, median=None, spread=0.1, *, group="attention, cross, forward and backward", suite="attention", **notes):
    numbers = {} if median is None else {"median_s": median, "iqr_s": spread, "rounds": 5}
    return {"suite": suite, "group": group, "name": f"{group}[{peer}]", "peer": peer, **numbers, **notes}


def report(*cases):
    return write_report({"cpu": merge(None, list(cases), MACHINE)})


def row(files, who):
    (line,) = [line for line in files["benchmarks.md"].splitlines() if line.startswith(f"| {who} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


OURS = case("ridgeline", 1.0, error="1.0e-06", same_bits=True, peak_mb=3.25, first_call_s=1.5, flops=2 * 10**9)


def test_a_row_has_the_ratio_with_error_and_bits_beside_the_time():
    files = report(OURS, case("einsum", 3.0, error="2.0e-06", same_bits=False))
    assert row(files, "ridgeline") == [
        "ridgeline",
        "1 s",
        "100 ms",
        "",
        "1.0e-06",
        "yes",
        "3.2 MB",
        "1.50 s",
        "2 GFLOP/s",
    ]
    assert row(files, "einsum")[:6] == ["einsum", "3 s", "100 ms", "**3.00**", "2.0e-06", "no"]


def test_a_ratio_inside_the_spread_is_called_noise():
    assert row(report(OURS, case("einsum", 1.15)), "einsum")[3] == "1.15 (noise)"
    assert row(report(OURS, case("einsum", 1.25)), "einsum")[3] == "**1.25**"


def test_refusals_and_wrong_results_stand_in_the_table_with_their_reasons():
    files = report(OURS, case("flex", refused="wants a | b"), case("sdpa", red="relative error 1.0e+00"))
    assert files["benchmarks.md"].count("wants a \\| b") == 1
    assert row(files, "sdpa")[-1] == "**red: relative error 1.0e+00**"


def test_a_graph_is_compared_with_ours_in_a_graph():
    files = report(OURS, case("ridgeline, CUDA graph", 0.5), case("einsum, CUDA graph", 2.0), case("einsum", 3.0))
    assert row(files, "einsum, CUDA graph")[3] == "**4.00**"
    assert row(files, "einsum")[3] == "**3.00**"


def test_peers_that_are_libraries_are_named_with_licence_and_difference():
    absent = case("flash-sinkhorn", suite="sinkhorn", group="s", refused="not installed")
    page = report(OURS, case("GeomLoss", 1.0, version="0.3.1", suite="sinkhorn", group="s"), absent)["benchmarks.md"]
    assert "| GeomLoss | geomloss | 0.3.1 | MIT | symmetric" in page
    assert "| flash-sinkhorn | flash-sinkhorn | not installed | MIT |" in page
    assert "| POT, sinkhorn | POT | not measured | MIT |" in page


def test_sweeps_are_curves_and_ratios_are_bars():
    swept = [
        case(peer, 0.1 * size, group=f"attention, sweep in {sweep}, {size}", sweep=sweep, size=size)
        for peer in ("ridgeline", "einsum")
        for sweep in ("batch", "keys")
        for size in (1, 8)
    ]
    files = report(OURS, case("einsum", 3.0), *swept)
    assert set(files) == {"benchmarks.md", "cpu-ratios.svg", "cpu-attention-scaling.svg"}
    assert "sweep in" not in files["benchmarks.md"]
    assert ">3.00</text>" in files["cpu-ratios.svg"] and ">keys</text>" in files["cpu-attention-scaling.svg"]
    assert files == report(*reversed(swept), case("einsum", 3.0), OURS)


def test_data_is_told_as_a_share_of_the_step_it_feeds():
    step = case("ridgeline", 2.0, suite="step", group="step, published-fp32")
    gather = case("ridgeline", 0.01, suite="data", group="data, g", rows=4, share_of="step, published-fp32")
    assert "2.5 ms per row, 0.5 % of step, published-fp32" in report(step, gather)["benchmarks.md"]


def test_what_measured_a_suite_is_named():
    page = report(OURS)["benchmarks.md"]
    assert "some CPU, 2 cores." in page
    assert "torch 2.13.0, Triton 3.7.1, Python 3.11.7, commit abcdefabcd\n" in page


def test_the_command_writes_the_same_bytes_again(tmp_path, capsys):
    write_results(tmp_path / "cpu.json", merge(None, [OURS, case("einsum", 3.0)], MACHINE))
    (tmp_path / "run.json").write_text('{"recipe": "demo"}')
    (tmp_path / "README.md").write_text("no regions here\n")
    written, pages = [], ["--pages", str(tmp_path / "README.md")]
    for name in ("a", "b"):
        assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / name), *pages]) == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"benchmarks.md", "cpu-ratios.svg"}
    assert main(["report", "--results", str(tmp_path / "a"), *pages]) == 2
    assert "must hold at least one result file" in capsys.readouterr().err


def test_only_files_of_suites_are_read(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "demo"}')
    with pytest.raises(ValueError, match="must hold at least one result file of a suite"):
        read_devices(tmp_path)


def on_gpu(peer, median, clock="graph", **notes):
    group, suite = "sinkhorn, balanced and dense, forward", "sinkhorn"
    return case(peer, median, 1e-9, group=group, suite=suite, clock=clock, cold_median_s=2 * median, **notes)


def test_kernels_time_is_not_compared_with_what_python_launches():
    ours = on_gpu("ridgeline", 1e-5, wall_median_s=2e-4)
    waits = on_gpu("slow", 8e-3, "stream: it waits", wall_median_s=1e-2)
    files = report(ours, waits, on_gpu("no wall", 3e-3, "stream: it waits"), on_gpu("einsum", 3e-5))
    assert row(files, "slow")[3] == "50.00 (wall)" and row(files, "no wall")[3] == ""
    assert row(files, "einsum")[3] == "**3.00**"
    assert "launched one by one 10 ms" in row(files, "slow")[-1] and "±" not in row(files, "slow")[-1]
    assert ">50.00 (wall)</text>" in files["cpu-ratios.svg"] and "no wall" not in files["cpu-ratios.svg"]


def test_a_ratio_of_wall_times_inside_their_spread_is_noise():
    ours = on_gpu("ridgeline", 1e-5, wall_median_s=2e-4, wall_iqr_s=1e-4)
    files = report(ours, on_gpu("slow", 8e-3, "stream: it waits", wall_median_s=3e-4, wall_iqr_s=1e-5))
    assert row(files, "slow")[3] == "1.50 (wall, noise)"
    assert row(files, "slow")[-1].endswith("launched one by one 300 µs ± 10 µs")
    assert "inside the spread" in files["cpu-ratios.svg"]


def test_a_table_of_operators_on_a_gpu_tells_the_time_from_a_cold_cache():
    files = report(on_gpu("ridgeline", 1e-5), case("einsum", 3.0))
    assert row(files, "ridgeline")[4] == "20 µs"
    assert files["benchmarks.md"].count("| cold |") == 1


def test_a_training_step_has_bars():
    steps = [case(peer, median, suite="step", group="training step") for peer, median in (("ridgeline", 1), ("x", 5))]
    assert ">5.00</text>" in report(*steps)["cpu-ratios.svg"]


def test_a_note_of_ours_stands_beside_the_name_wherever_its_time_does():
    rows = [case("ridgeline", 1.0, note="older code"), case("einsum", 2.0, note="slow")]
    chart = report(*rows)["cpu-ratios.svg"]
    assert "attention, cross (older code)<" in chart and "slow" not in chart


def test_a_note_of_a_case_stands_in_its_row_and_breaks_none():
    files = report(OURS | {"note": "before | after"}, case("flex", refused="not here") | {"note": "by hand"})
    assert row(files, "ridgeline")[-2:] == ["2 GFLOP/s, before \\", "after"]
    assert row(files, "flex")[-1] == "not here, by hand"


def test_a_known_version_of_a_peer_is_kept_whatever_other_devices_know():
    known = case("GeomLoss", 1.0, version="0.3.1", suite="sinkhorn", group="s")
    gone = case("POT, sinkhorn", suite="sinkhorn", group="s", refused="not installed")
    timed = [case(peer, 1.0, suite="sinkhorn", group="s") for peer in ("GeomLoss", "POT, sinkhorn")]
    devices = {"a": merge(None, [known, gone], MACHINE), "b": merge(None, timed, MACHINE)}
    page = write_report(devices)["benchmarks.md"]
    assert "| GeomLoss | geomloss | 0.3.1 |" in page and "| POT, sinkhorn | POT | not recorded |" in page


def test_every_row_of_the_peers_has_as_many_cells_as_its_head():
    _, _, table = report(OURS)["benchmarks.md"].partition("## Peers")
    rows = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 2 and {line.count("|") for line in rows} == {6}


def test_curves_name_the_fastest_peer_that_has_none():
    swept = [
        case(peer, 0.1, group=f"attention, sweep in keys, {size}, forward and backward", sweep="keys", size=size)
        for peer in ("ridgeline", "einsum")
        for size in (1, 8)
    ]
    files = report(OURS, case("einsum", 3.0), case("sdpa", 2.0), *swept)
    assert "fastest in a table below, but not swept: sdpa<" in files["cpu-attention-scaling.svg"]
    assert "not swept" not in report(OURS, case("einsum", 3.0), *swept)["cpu-attention-scaling.svg"]
