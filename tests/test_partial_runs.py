"""A run that began with the weights of a file: its first updates are checked from that file, and from no other."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from perceiver.published import config_from_args
from tests.test_published import ARGS, small_published
from tests.test_verify import checked, flip_one_bit
from tests.tiny_runs import tiny_recipe, train_quietly
from train.__main__ import main
from train.checkpoint import load_checkpoint, save_checkpoint
from train.replay import CannotCheck, recompute_update, replay
from train.starting_point import load_start
from train.verify import verify

ENDS = (
    "steps 9 to 12, end of stage 2: every bit the same",
    "steps 13 to 20, end of stage 3: every bit the same",
)


@pytest.fixture(scope="module")
def partial(finished, tmp_path_factory):
    """The directory of a run of stages 2 and 3 from the end of another run's stage 1."""
    path = tmp_path_factory.mktemp("runs") / "partial"
    train_quietly(tiny_recipe(), path, start=load_start(finished / "stage1.pt", 2, tiny_recipe()))
    return path


@pytest.fixture
def other(finished, tmp_path):
    """A copy of the file that the run began with, to spoil."""
    return Path(shutil.copy(finished / "stage1.pt", tmp_path))


def test_the_first_updates_are_checked_from_the_file_that_the_run_began_with(partial, finished, capsys):
    file = finished / "stage1.pt"
    verdict = verify(partial, start_from=file)
    assert verdict.exit_code == 0, verdict
    assert checked(verdict) == (f"steps 9 to 12 from {file}: every value the same", *ENDS)
    assert main(["verify", str(partial), "--from", str(file)]) == 0
    assert f"steps 9 to 12 from {file}" in capsys.readouterr().out


def test_without_the_file_the_ends_are_checked_and_what_is_wanted_is_said(partial):
    verdict = verify(partial)
    assert verdict.exit_code == 2
    assert verdict.sentence.endswith("began with the weights of stage1.pt, which verify and replay take with --from")
    assert checked(verdict) == ENDS


def test_the_published_form_has_no_optimizer_and_is_checked_all_the_same(tmp_path):
    file, run_dir, recipe = tmp_path / "published.pt", tmp_path / "run", tiny_recipe(model=config_from_args(ARGS))
    torch.save({"model": small_published().state_dict(), "args": ARGS}, file)
    train_quietly(recipe, run_dir, start=load_start(file, 3, recipe))
    verdict = verify(run_dir, start_from=file)
    assert verdict.exit_code == 0, verdict
    assert f"steps 13 to 20 from {file}: every value the same" in verdict.lines
    # its weights are all that there is: a certificate that has them and another first state is wrong
    certificate = json.loads((run_dir / "certificate.json").read_text())
    certificate["start"]["state"] = certificate["stages"][0]["parents"]["state"] = "0" * 32
    (run_dir / "certificate.json").write_text(json.dumps(certificate))
    verdict = verify(run_dir, start_from=file)
    assert verdict.exit_code == 1
    assert "the checkpoint of step 12: its digest is" in verdict.sentence


def spoil_moments(path):
    state = load_checkpoint(path)
    state.optimizer["state"][0]["exp_avg"].view(torch.int32)[0, 0] ^= 1
    save_checkpoint(path, state)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (flip_one_bit, "the digest of its weights is"),
        (spoil_moments, "the digest of its state is"),
        (lambda path: path.write_bytes(b"half"), "is damaged"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_another_file_refutes_nothing(partial, other, spoil, why):
    spoil(other)
    verdict = verify(partial, start_from=other)
    assert verdict.exit_code == 2
    assert f"cannot be checked here: {other} is not the file that the run began with: " in verdict.sentence
    assert why in verdict.sentence
    assert checked(verdict) == ENDS


def test_a_run_that_began_with_no_file_is_not_checked_from_one(finished):
    file = finished / "stage1.pt"
    verdict = verify(finished, start_from=file)
    assert verdict.exit_code == 2
    assert verdict.sentence.endswith(f"the run began with its initial weights, not with those of {file}")


def test_the_beginning_of_such_a_run_is_replayed_from_the_file(partial, finished, tmp_path, capsys):
    path, file = shutil.copytree(partial, tmp_path / "run"), finished / "stage1.pt"
    for checkpoint in path.glob("*.pt*"):
        checkpoint.unlink()
    verdict = replay(path, 9)
    assert verdict.exit_code == 2
    assert "began with the weights of stage1.pt, which verify and replay take with --from" in verdict.sentence
    verdict = replay(path, 10, start_from=file)
    assert verdict.exit_code == 0, verdict
    assert verdict.lines[0].startswith(f"recomputed steps 9 to 10 from {file}: ")
    assert main(["replay", str(path), "--step", "9", "--from", str(file)]) == 0
    again = recompute_update(path, 9, start_from=file)
    assert (again.origin, again.notes) == (str(file), ())
    with pytest.raises(CannotCheck, match=r"no checkpoint of step 4 or before, and it began at step 8"):
        recompute_update(path, 5, start_from=file)
