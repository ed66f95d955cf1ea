"""python -m bench.run_summary RUN: keep the result of a finished run in bench/results/<recipe>-<device>.json."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from bench.results import RESULTS, default_name, installed_versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the summary of one run."""
    parser = argparse.ArgumentParser(prog="python -m bench.run_summary", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    options = parser.parse_args(arguments)
    summary = summarize_run(options.run)
    path = RESULTS / f"{summary['recipe']}-{default_name()}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"written to {path}")
    return 0


def summarize_run(run: Path) -> dict[str, Any]:
    """Collect stages, yardsticks, training time and digests of a run.

    Raises:
        ValueError: the run is not finished.
    """
    if not (run / "scores.json").is_file():
        raise ValueError(f"{run} is not finished: it has no scores.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    scores = json.loads((run / "scores.json").read_text())
    stages = [line for line in lines if line["kind"] == "stage"]
    return {
        "recipe": json.loads((run / "config.json").read_text())["name"],
        "date": date.today().isoformat(),
        "machine": installed_versions(),
        "data": scores["source"],
        "scenes": scores["scenes"],
        "stages": [
            {
                "name": stage["name"],
                "until": stage["step"],
                "hss": round(stage["hss_mean"], 4),
                "corner_f1": round(stage["corner_f1_mean"], 4),
                "edge_iou": round(stage["edge_iou_mean"], 4),
                "weights": stage["weights"],
            }
            for stage in stages
        ],
        "yardsticks": {
            name: {field: round(summary[f"{field}_mean"], 4) for field in ("hss", "corner_f1", "edge_iou")}
            for name, summary in scores["yardsticks"].items()
        },
        "training_seconds": round(sum(line["seconds"] for line in speed), 1),
        "steps_per_second": {
            str(stage["step"]): next(line["steps_per_second"] for line in speed if line["step"] == stage["step"])
            for stage in stages
        },
        "peak_memory_mb": speed[-1]["memory_mb"],
    }


if __name__ == "__main__":
    sys.exit(main())
