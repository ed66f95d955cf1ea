"""What a certificate holds, and that it cannot contradict itself unnoticed."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.tiny_runs import tiny_recipe, train_quietly
from train.certificate import CertificateError, code_digest, read_certificate, write_certificate
from train.checkpoint import load_checkpoint, tensors_digest
from train.config import ROOT, recipe_to_dict
from train.determinism import enter
from train.rundir import RunDirectory
from train.trace import digest, state_tensors


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    train_quietly(tiny_recipe(), path)
    return path


def test_a_certificate_holds_what_it_documents(finished):
    certificate = read_certificate(finished / "certificate.json")
    assert list(certificate) == [
        "format",
        "recipe",
        "environment",
        "code",
        "kernels",
        "start",
        "data",
        "first",
        "stages",
        "scores",
    ]
    assert certificate["recipe"] == recipe_to_dict(tiny_recipe())
    assert certificate["kernels"] == {"cubins": None, "why": "no kernel ran on a GPU"}
    assert [line["step"] for line in certificate["first"]] == list(range(1, 9))
    for number, stage in enumerate(certificate["stages"], start=1):
        end, tail = (load_checkpoint(finished / f"stage{number}{part}.pt") for part in ("", "_tail"))
        assert stage["weights"] == tensors_digest(end.model)
        assert stage["state"] == digest(state_tensors(end.model, end.optimizer))
        assert stage["tail"]["step"] == tail.step
        assert stage["tail"]["state"] == digest(state_tensors(tail.model, tail.optimizer))
        assert [line["step"] for line in stage["last"]] == list(range(tail.step + 1, stage["step"] + 1))
        assert stage["last"][-1]["state"] == stage["state"]


def test_each_stage_names_its_parents(finished):
    certificate = read_certificate(finished / "certificate.json")
    states = [certificate["start"]["state"], *(stage["state"] for stage in certificate["stages"])]
    assert [stage["parents"]["state"] for stage in certificate["stages"]] == states[:-1]


@pytest.mark.parametrize(
    ("parent", "change"),
    [
        ("recipe", lambda c: c["recipe"].update(seed=4)),
        ("code", lambda c: c["code"].update(digest="0")),
        ("data", lambda c: c["data"][1].update(train_digest="0")),
        ("state", lambda c: c["stages"][0].update(state="0")),
    ],
)
def test_a_changed_parent_is_found(finished, tmp_path, parent, change):
    certificate = json.loads((finished / "certificate.json").read_text())
    change(certificate)
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(certificate))
    with pytest.raises(CertificateError, match=f"contradicts itself: stage . was computed from another {parent} "):
        read_certificate(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}'])
def test_what_is_no_certificate_is_refused(tmp_path, text):
    path = tmp_path / "certificate.json"
    path.write_text(text)
    with pytest.raises(CertificateError, match=r"is not a certificate|of format 9, known is 1"):
        read_certificate(path)


def test_a_log_without_its_lines_gives_no_certificate(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "trace.jsonl").write_text("")
    machine = enter(threads=1, precision="fp32", impl="eager", device="cpu")
    with pytest.raises(CertificateError, match="the logs of the run have no line with"):
        write_certificate(RunDirectory(tmp_path / "run"), tiny_recipe(), machine, code_digest())


def test_the_code_digest_sees_paths_and_contents_and_not_the_place(tmp_path):
    for room in ("configs", "kernels", "perceiver", "train"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    base = code_digest()
    assert code_digest(tmp_path) == base
    (tmp_path / "train" / "order.py").rename(tmp_path / "train" / "order2.py")
    renamed = code_digest(tmp_path)
    (tmp_path / "train" / "order2.py").rename(tmp_path / "train" / "order.py")
    with (tmp_path / "kernels" / "philox.py").open("a") as file:
        file.write("\n")
    assert len({base, renamed, code_digest(tmp_path)}) == 3
    assert base[1] == renamed[1]


COMPILED = """
import json
from bench.offline import gpu, prepare_environment
prepare_environment()
import torch
from bench.static_cases import _sinkhorn
from train.certificate import loaded_cubins
empty = loaded_cubins(90)
with gpu(90) as launches:
    _sinkhorn(1, 16, 16, torch.float32, slack="full", dustbin=True)
import hashlib
print(json.dumps([empty, loaded_cubins(90), sorted({hashlib.sha256(x.cubin).hexdigest() for x in launches})]))
"""


def test_machine_code_is_named_by_the_digest_of_what_was_launched(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after, launched = json.loads(done.stdout)
    assert before == {}
    assert sorted(digest for digests in after.values() for digest in digests) == launched
    assert all(name.startswith("_sinkhorn") for name in after)
