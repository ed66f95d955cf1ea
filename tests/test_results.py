"""Result files: medians from a report, kept suite by suite."""

import json

from bench.results import condense, format_results, write_results


def report(*cases):
    return {
        "datetime": "2026-11-23T10:00:00",
        "commit_info": {"id": "abc"},
        "machine_info": {"cpu": {"brand_raw": "some CPU"}},
        "benchmarks": [
            {
                "fullname": f"bench/bench_{suite}.py::bench_{name}",
                "group": "g",
                "name": name,
                "stats": {"median": median, "iqr": 0.001, "rounds": 5},
                "extra_info": {"error": "1e-6"},
            }
            for suite, name, median in cases
        ],
    }


def test_a_report_is_reduced_to_medians_and_notes():
    results = condense(report(("sinkhorn", "eager", 0.0123456)))
    assert results["cases"] == [
        {
            "suite": "sinkhorn",
            "group": "g",
            "name": "eager",
            "median_s": 0.01235,
            "iqr_s": 0.001,
            "rounds": 5,
            "error": "1e-6",
        }
    ]
    assert results["machine"]["cpu"] == "some CPU"
    assert results["machine"]["commit"] == "abc"
    assert "12.350" in format_results(results)


def test_suites_that_were_not_run_keep_their_cases(tmp_path):
    path = tmp_path / "cpu.json"
    write_results(path, condense(report(("step", "a", 1.0), ("sinkhorn", "b", 2.0))))
    write_results(path, condense(report(("step", "c", 3.0))))
    assert [(c["suite"], c["name"]) for c in json.loads(path.read_text())["cases"]] == [
        ("sinkhorn", "b"),
        ("step", "c"),
    ]
