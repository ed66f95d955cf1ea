"""The command line: python -m train run | evaluate | predict | compare | replay | verify."""

import argparse
import dataclasses
import errno
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# cuBLAS reads it when CUDA starts, which may be before the recipe is known
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# OpenMP reads it when torch is loaded: how long a thread spins before it sleeps. By itself it spins so long that beside
# another program a training hardly moves; 5,000 was the fastest on idle cores too (bench/LOG.md)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from kernels.dispatch import IMPLEMENTATIONS
from train.anatomy import KINDS
from train.checkpoint import CheckpointError, require_writable
from train.compare import compare_runs
from train.config import Recipe, load_recipe
from train.data import load_order_ids, load_scenes
from train.determinism import EnvironmentRefused, Machine, enter
from train.evaluate import SET_TITLES, evaluate_command, scores_path
from train.loop import RunStopped, run
from train.predict import check_out, predict_command
from train.pulse import RunDiverged
from train.replay import Verdict, recompute_update, replay
from train.rundir import RunRefused
from train.sources import SourceUri, open_rows
from train.starting_point import LoadedModel, load_model, load_start
from train.trace import tensor_digests
from train.verify import verify

_REFUSALS = (
    ValueError,
    RunRefused,
    RunDiverged,
    EnvironmentRefused,
    CheckpointError,
    ImportError,
    OSError,
    RuntimeError,
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    0 yes, 1 no or refused, 2 misused or (replay, verify) cannot be checked here, 130 and 143 stopped by a signal, 141
    by a reader that went away.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "run":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        code = options.action(options, rest)
        # here, not at Python's end, a reader is missed that has gone
        sys.stdout.flush()
        return code
    except RunStopped as stop:
        print(f"\n{stop}. Run the same command again to go on.", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"\ntrain {options.command}: stopped at once; a run goes on from its last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # nobody reads on, as behind `| head`: what is not written yet goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if options.command == "run":
            print("train run: nobody reads what it prints; a run goes on from its last checkpoint", file=sys.stderr)
        return 141
    except _REFUSALS as error:
        full = isinstance(error, OSError) and error.errno in _DISK_FULL
        cure = ". Make room and run the same command again: it goes on from the last checkpoint" if full else ""
        print(f"train {options.command}: {error}{cure}", file=sys.stderr)
        return 2 if options.command in ("replay", "verify") else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description="Train, score, compare and check runs.")
    metavar = "run | evaluate | predict | compare | replay | verify"
    commands = parser.add_subparsers(dest="command", required=True, metavar=metavar)
    # an abbreviated flag could be the whole name of a recipe's value
    add = functools.partial(commands.add_parser, allow_abbrev=False)

    epilog = "Every value of the recipe is a flag as well: --help-recipe lists them."
    sub = add(
        "run", help="train a recipe; every value of it is a flag, see run --recipe NAME --help-recipe", epilog=epilog
    )
    sub.add_argument("--recipe", default="demo", help="a name in configs/, or a path to a .json file (default: demo)")
    sub.add_argument("--name", help="name of the run's directory (default: the recipe's name)")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="directory of all runs (default: runs)")
    sub.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help="start from these weights")
    sub.add_argument("--start-stage", type=int, metavar="K", help="with --from: the first stage to train (default: 1)")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    sub.add_argument(
        "--no-graph", action="store_true", help="GPU: launch every kernel by itself; the same bits, slower"
    )
    sub.add_argument("--strict", action="store_true", help="stop at a row that cannot be read: --data.strict")
    sub.add_argument("--quiet", action="store_true", help="no progress bar, as where stderr is no terminal")
    sub.add_argument("--help-recipe", action="store_true", help="list the recipe's values and their flags")
    sub.set_defaults(action=_run)

    sub = add("evaluate", help="score a run or a checkpoint on a set with ground truth")
    _add_model_options(sub)
    sub.add_argument("--set", choices=sorted(SET_TITLES), help="what the set is called (default: as the URI says)")
    sub.add_argument("--out", type=Path, help="directory for scores.json and scores.csv (default: the run's)")
    sub.add_argument("--workers", type=int, default=2, help="processes that score (default: 2)")
    sub.set_defaults(action=_evaluate)

    sub = add("predict", help="write submission.json for a set")
    _add_model_options(sub)
    sub.add_argument(
        "--out", type=Path, default=Path("submission.json"), help="file of the answers (default: submission.json)"
    )
    sub.set_defaults(action=_predict)

    sub = add("compare", help="are two runs identical? exit code 0 only if every bit is")
    sub.add_argument("run_a", type=Path)
    sub.add_argument("run_b", type=Path)
    sub.add_argument(
        "--no-recompute", action="store_true", help="read files only: do not make the first differing step again"
    )
    sub.set_defaults(action=_compare)

    sub = add("replay", help="recompute updates of a run and check them against its trace: 0 yes, 1 no, 2 cannot")
    sub.add_argument("run", type=Path, help="a run directory")
    sub.add_argument("--step", type=int, required=True, metavar="S", help="the last update to check")
    sub.add_argument("--steps", type=int, default=1, metavar="N", help="how many updates to check (default: 1)")
    sub.add_argument("--tensors", action="store_true", help="print the digest of every tensor of update S instead")
    _add_past_options(sub)
    sub.set_defaults(action=_replay)

    sub = add("verify", help="recompute what a certificate says of a run: 0 yes, 1 no, 2 cannot be checked here")
    sub.add_argument("certificate", type=Path, help="certificate.json, or the directory of its run")
    _add_past_options(sub)
    sub.set_defaults(action=_verify)
    return parser


def _add_past_options(sub: argparse.ArgumentParser) -> None:
    help_text = "the file that the run began with, where it began with one"
    sub.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help=help_text)
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: the run's)")


def _add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=Path, help="a run directory, one of its checkpoints, or the published checkpoint.pt")
    sub.add_argument("--data", required=True, help="URI of the scenes, for example roofs:easy#dev or parquet:DIR#dev")
    sub.add_argument("--batch", type=int, default=32, help="scenes per forward pass, at most (default: 32)")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    sub.add_argument("--strict", action="store_true", help="stop at a row that cannot be read")
    sub.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16"), help="default: the run's")
    sub.add_argument("--impl", choices=IMPLEMENTATIONS, help="form of the operators (default: the run's)")
    sub.add_argument("--threads", type=int, help="of the CPU; part of the bits (default: the run's)")
    help_text = "segments count from here on, strictly between 0 and 1 (default: the run's)"
    sub.add_argument("--confidence", type=float, metavar="P", help=help_text)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    recipe = load_recipe(options.recipe)
    if rest or options.help_recipe:
        recipe = _override(recipe, ["--help"] if options.help_recipe else rest)
    if options.strict:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, strict=True))
    run_dir = options.runs / _directory_name(recipe.name if options.name is None else options.name)
    if options.start_stage is not None and not options.start:
        raise ValueError("--start-stage must come with --from CHECKPOINT: which weights should the stage start from?")
    stage = 1 if options.start_stage is None else options.start_stage
    start = load_start(options.start, stage, recipe) if options.start else None
    trained = run(
        recipe,
        run_dir,
        start=start,
        device=options.device,
        graph=not options.no_graph,
        progress=not options.quiet,
    )
    print(f"{run_dir} is {'complete' if trained else 'complete already; nothing is left to train'}")
    _report(run_dir)
    return 0


def _directory_name(name: str) -> str:
    """Refuse a name that would lead out of the directory of all runs, or be it."""
    if name != Path(name).name or name in ("", ".."):
        raise ValueError(f"--name must be the name of a directory below --runs, got {name!r}")
    return name


def _report(run_dir: Path) -> None:
    """Write the page, where the package that draws it is installed."""
    from train.report import write_report

    try:
        print(f"report: {write_report(run_dir)}")
    except ImportError as error:
        print(f"no report: {error}", file=sys.stderr)


def _override(recipe: Recipe, flags: list[str]) -> Recipe:
    """Apply `--field value` flags to a recipe."""
    try:
        import tyro
    except ImportError as error:
        raise ValueError(f"changing a recipe on the command line ({flags[0]}) needs the package tyro") from error
    try:
        # the help that tyro's own errors advise is that of the other flags
        return tyro.cli(Recipe, default=recipe, args=flags, prog="python -m train run", add_help=flags == ["--help"])
    except SystemExit as stop:
        if stop.code:
            print("train run: --help-recipe lists the recipe's values, --help the other flags", file=sys.stderr)
        raise


def _evaluate(options: argparse.Namespace, _rest: list[str]) -> int:
    loaded, machine = _load(options)
    set_name = options.set or _set_of(options.data)
    out = options.out or (options.model if options.model.is_dir() else options.model.parent)
    _keep_other_scores(scores_path(out, set_name), options.data, loaded)
    require_writable(out)
    evaluate_command(
        loaded.model.to(machine.device),
        load_scenes(options.data, strict=options.strict),
        set_name=set_name,
        source=options.data,
        run_dir=out,
        machine=machine,
        batch=options.batch,
        postprocess=loaded.postprocess,
        workers=options.workers,
        checkpoint=loaded.record,
    )
    return 0


def _load(options: argparse.Namespace) -> tuple[LoadedModel, Machine]:
    """The model, and the arithmetic it was trained in unless flags say otherwise; say which weights it has."""
    loaded = load_model(options.model)
    machine = enter(
        threads=loaded.threads if options.threads is None else options.threads,
        precision=options.precision or loaded.precision,
        impl=options.impl or loaded.impl,
        device=options.device,
    )
    if options.confidence is not None:
        postprocess = dataclasses.replace(loaded.postprocess, confidence=options.confidence)
        loaded = dataclasses.replace(loaded, postprocess=postprocess)
    step, until = loaded.record["step"], loaded.until
    if step is None or until is None:
        print(f"weights of {options.model}, the published form", flush=True)
    else:
        unfinished = ": the run is not finished" if options.model.is_dir() and step < until else ""
        print(f"weights of {options.model}, step {step:,} of {until:,}{unfinished}", flush=True)
    return loaded, machine


def _set_of(uri: str) -> str:
    """What a set is called, where its URI says it."""
    parsed = SourceUri.parse(uri)
    split = parsed.place.rpartition(":")[2] if parsed.kind == "hf" else None
    if parsed.part == "dev" or split == "validation":
        return parsed.part or "validation"
    # that it is not there is said first
    rows = open_rows(parsed)
    part = "#dev, or " if parsed.part is None and len(rows) > parsed.dev else ""
    raise ValueError(f"{uri} does not say which set it is: add {part}--set dev, validation or test")


def _keep_other_scores(path: Path, source: str, loaded: LoadedModel) -> None:
    """Refuse to write over the scores of another source or post-processing, or of weights that are not older ones."""
    if not path.is_file():
        return
    try:
        kept = json.loads(path.read_text())
        other_source = SourceUri.parse(kept["source"]) != SourceUri.parse(source)
        here = json.loads(json.dumps(dataclasses.asdict(loaded.postprocess)))
        other_way = kept.get("postprocess", here) != here
        checkpoint = kept.get("checkpoint") or {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no scores ({error}): name another directory with --out") from error
    if other_source:
        raise ValueError(f"{path} holds the scores of {kept['source']}: name another directory with --out")
    if other_way:
        raise ValueError(f"{path} holds the scores of another post-processing: name another directory with --out")
    record = loaded.record
    older = (checkpoint.get("step") or 0) < (record["step"] or 0)
    if checkpoint.get("weights") != record["weights"] and not older:
        raise ValueError(
            f"{path} holds the scores of other weights, step {checkpoint.get('step')}: name another directory "
            "with --out"
        )


def _predict(options: argparse.Namespace, _rest: list[str]) -> int:
    check_out(options.out)
    loaded, machine = _load(options)
    predict_command(
        loaded.model.to(machine.device),
        load_scenes(options.data, truth=False, strict=options.strict),
        out=options.out,
        machine=machine,
        batch=options.batch,
        postprocess=loaded.postprocess,
        # a row that cannot be read is answered too
        order_ids=load_order_ids(options.data),
    )
    return 0


def _compare(options: argparse.Namespace, _rest: list[str]) -> int:
    comparison = compare_runs(
        options.run_a,
        options.run_b,
        recompute=not options.no_recompute,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(comparison.sentence)
    for difference in comparison.differences[:20]:
        print(f"  {difference}")
    if len(comparison.differences) > 20:
        print(f"  and {len(comparison.differences) - 20} more")
    return 0 if comparison.identical else 1


def _replay(options: argparse.Namespace, _rest: list[str]) -> int:
    how = {"start_from": options.start, "device": options.device, "progress": True}
    if options.tensors:
        again = recompute_update(options.run, options.step, **how)
        for note in (f"step {options.step:,} of {options.run}, from {again.origin}", *again.notes):
            print(note, file=sys.stderr)
        for kind in KINDS:
            for name, value in tensor_digests(again.tensors[kind]).items():
                print(kind, name, value)
        return int(bool(again.notes))
    return _answer(replay(options.run, options.step, steps=options.steps, **how))


def _verify(options: argparse.Namespace, _rest: list[str]) -> int:
    return _answer(verify(options.certificate, start_from=options.start, device=options.device, progress=True))


def _answer(verdict: Verdict) -> int:
    print(verdict.sentence)
    for line in verdict.lines:
        print(f"  {line}")
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main())
