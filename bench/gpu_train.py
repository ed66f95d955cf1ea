"""Two short runs of the published model on generated roofs, one of them killed and resumed: the same bits.

They are trained side by side. In the middle of its first stage the second is killed, as by `kill -9`, and started
again.

All three stages of its recipe are there, each with the same part of its updates, and the score of each, or why it was
not computed. What a confidence learns, and from which on a segment counts, is the demo's, see `short_recipe`.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_process import Ended, Sheet, Workers, end_on_sigterm, end_with_parent, note
from bench.results import read_lines
from perceiver.score import require_scorer
from train.config import Recipe, load_recipe
from train.determinism import CUBLAS_WORKSPACE
from train.evaluate import scores_path

COMPARED = ("trace.jsonl", "metrics.jsonl")
# processes that score
SCORERS = 4


def short_recipe(share: float, scenes: int) -> Recipe:
    """Return the published recipe with a share of its updates, on generated scenes.

    A confidence that learns the matched mass is under 0.5 after so few updates, and nothing would be scored. Here it
    learns whether there is a partner, as in the demo, whose bound is taken too.

    Args:
        share: of the updates of each stage, of its warmup and of its cooldown.
        scenes: trained on.
    Raises:
        ValueError: nothing is left of a stage, or there are no scenes.
    """
    recipe, demo = load_recipe("s23dr"), load_recipe("demo")

    def scaled(updates: int) -> int:
        return round(updates * share)

    stages = tuple(
        dataclasses.replace(
            stage,
            data=f"roofs:real?points={points}&scenes={scenes}",
            until=scaled(stage.until),
            warmup=scaled(stage.warmup),
            cooldown_start=scaled(stage.cooldown_start),
            # the end of a cooldown is rounded as that of its stage
            cooldown_steps=scaled(stage.cooldown_start + stage.cooldown_steps) - scaled(stage.cooldown_start),
        )
        for stage, points in zip(recipe.stages, (2048, 4096, 4096), strict=True)
    )
    first = stages[0].until
    interval = min(50, first)
    return dataclasses.replace(
        recipe,
        name="short",
        stages=stages,
        loss=dataclasses.replace(recipe.loss, conf_target=demo.loss.conf_target),
        postprocess=dataclasses.replace(recipe.postprocess, confidence=demo.postprocess.confidence),
        evaluate=dataclasses.replace(recipe.evaluate, every=0, workers=SCORERS),
        log_every=interval,
        trace_every=interval,
        # the middle of the first stage lies between two
        checkpoint_every=max(first // 3, 1),
    )


def train_once(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Train a recipe, with scores where they can be computed; return `summarize`'s answer, with the reason if not."""
    from train.loop import run

    unscored = _why_unscored()
    recipe = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, score=unscored is None))
    run(recipe, run_dir, progress=False, say=print)
    found = summarize(run_dir)
    if unscored:
        found["dev_scores"]["not_computed"] = unscored
    return found


def _why_unscored() -> str | None:
    try:
        require_scorer()
    except ImportError as error:
        return str(error)
    return None


def summarize(run_dir: Path) -> dict[str, Any]:
    """What two runs are compared by, what came of them and how fast this one was."""
    files = {name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in COMPARED}
    metrics = read_lines(run_dir / "metrics.jsonl")
    processes = read_lines(run_dir / "processes.jsonl")
    speeds = read_lines(run_dir / "speed.jsonl")
    stages = [line for line in metrics if line["kind"] == "stage"]
    scores = [round(line["hss_mean"], 6) for line in stages if "hss_mean" in line]
    losses = [[line["step"], round(line["loss"], 4)] for line in metrics if line["kind"] == "train"]
    path = scores_path(run_dir, "dev")
    scored = json.loads(path.read_text()) if path.exists() else {"yardsticks": {}}
    yardsticks = {name: round(summary["hss_mean"], 6) for name, summary in scored["yardsticks"].items()}
    return {
        "files": files,
        "weights": [line["weights"] for line in stages],
        "dev_scores": {"scenes": stages[0]["scenes"], "hss": scores, "yardsticks": yardsticks},
        "begun_at": [line["step"] for line in processes if line["kind"] == "process"],
        "loss": losses[:: max(len(losses) // 12, 1)],
        "speed": speeds[-3:],
    }


def compare(found: list[dict[str, Any]]) -> bool | None:
    """Whether the runs agree in every byte; None with fewer than two."""
    if len(found) < 2:
        return None
    return all(run["files"] == found[0]["files"] and run["weights"] == found[0]["weights"] for run in found)


def resumed_from(found: Sequence[Mapping[str, Any]]) -> int | None:
    """The update from which a run went on that was killed; None if none did."""
    return next((run["begun_at"][-1] for run in found if len(run["begun_at"]) > 1), None)


def train_twice(command: Sequence[str], sheet: Sheet, *, kill_after: int, seconds: float) -> None:
    """Train side by side; kill the second run when it has logged so many updates, and resume it.

    Args:
        command: trains in the directory that is added to it, and hands over what `train_once` returns.
    """
    content = sheet.content
    content |= {"killed_after": None, "resumed_from": None, "same_bits": None, "runs": [], "errors": []}
    sheet.write()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: Path(scratch) / name for name in ("first", "second")}

        def kill_once() -> None:
            logged = [] if content["killed_after"] else read_lines(runs["second"] / "metrics.jsonl")
            if logged and logged[-1]["step"] >= kill_after and workers.kill("second"):
                content["killed_after"] = logged[-1]["step"]

        with Workers(seconds=seconds, at_once=2, meanwhile=kill_once) as workers:

            def start(name: str) -> None:
                environment = {"CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE}
                workers.start(name, [*command, str(runs[name])], environment)

            for name in runs:
                start(name)
            resumed = False
            for name, heard in workers:
                if not isinstance(heard, Ended):
                    content["runs"].append(heard)
                    content |= {"resumed_from": resumed_from(content["runs"]), "same_bits": compare(content["runs"])}
                elif heard.code == -signal.SIGKILL and name == "second" and content["killed_after"] and not resumed:
                    resumed = True
                    start(name)
                elif heard.code != 0:
                    content["errors"].append({"run": name, "code": heard.code, "tail": heard.tail[-1500:]})
                sheet.write()


def main() -> int:
    """Run the part; exit code 0 only if both runs came to their end with the same bits, one of them resumed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_train", description=__doc__)
    parser.add_argument("--out", type=Path, help="the file that keeps what is found")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for both runs")
    parser.add_argument("--share", type=float, default=0.02, help="of the published recipe's updates (0.02)")
    parser.add_argument("--scenes", type=int, default=2048, help="generated roofs to train on (2048)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        recipe = short_recipe(options.share, options.scenes)
    except ValueError as error:
        parser.error(str(error))
    if options.worker:
        end_with_parent()
        note(**train_once(recipe, Path(options.worker)))
        return 0
    end_on_sigterm()
    end_with_parent()
    begins = [recipe.start_of(number) for number in range(len(recipe.stages))]
    updates = [stage.until - begin for stage, begin in zip(recipe.stages, begins, strict=True)]
    sheet = Sheet(options.out, updates=updates, scenes=options.scenes)
    content = sheet.content
    command = [sys.executable, "-m", "bench.gpu_train", "--share", str(options.share), "--scenes", str(options.scenes)]
    train_twice([*command, "--worker"], sheet, kill_after=updates[0] // 2, seconds=options.seconds)
    unscored = {reason for found in content["runs"] if (reason := found["dev_scores"].get("not_computed"))}
    scores = "".join(f"; scores not computed: {reason}" for reason in unscored)
    killed = f"killed after update {content['killed_after']}, resumed from {content['resumed_from']}"
    print(f"{len(content['runs'])} runs, one {killed}, same bits: {content['same_bits']}{scores}")
    return int(not content["same_bits"] or not content["resumed_from"])


if __name__ == "__main__":
    sys.exit(main())
