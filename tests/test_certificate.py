"""What a certificate holds, and that it cannot contradict itself unnoticed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.tiny_runs import tiny_recipe
from train.certificate import CertificateError, code_files, describe_kernels, read_certificate, write_certificate
from train.checkpoint import load_checkpoint, tensors_digest
from train.config import ROOT, recipe_to_dict
from train.determinism import Machine, enter
from train.loop import run
from train.rundir import RunDirectory
from train.trace import digest, state_tensors


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
        ("code", lambda c: c["stages"][0]["parents"].update(code="0")),
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
    with pytest.raises(CertificateError, match=r"is not a certificate|of format 9, known is 2"):
        read_certificate(path)


def test_a_log_without_its_lines_gives_no_certificate(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "trace.jsonl").write_text("")
    machine = enter(threads=1, precision="fp32", impl="eager", device="cpu")
    with pytest.raises(CertificateError, match="the logs of the run have no line with"):
        write_certificate(RunDirectory(tmp_path / "run"), tiny_recipe(), machine, code_files())


def test_only_scores_of_the_runs_own_weights_and_rows_enter(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    recipe = tiny_recipe()
    scored = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, score=True))
    machine = enter(threads=1, precision="fp32", impl="eager", device="cpu")
    weights = tensors_digest(load_checkpoint(finished / "stage3.pt").model)

    def entered(recipe, **changes):
        dev = f"{recipe.stages[2].data}#dev"
        scores = {"source": dev, "checkpoint": {"step": 20, "weights": weights}} | changes
        (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
        return write_certificate(RunDirectory(tmp_path / "run"), recipe, machine, code_files())["scores"]

    assert entered(scored)["checkpoint"]["weights"] == weights
    assert entered(scored, checkpoint={"step": 18, "weights": "0"}) is None
    assert entered(scored, checkpoint=None) is None
    assert entered(scored, source="roofs:easy#dev") is None
    assert entered(recipe) is None


def test_code_whose_files_give_another_digest_is_found(finished, tmp_path):
    certificate = json.loads((finished / "certificate.json").read_text())
    certificate["code"]["files"]["train/step.py"] = "0"
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    with pytest.raises(CertificateError, match="contradicts itself: its code has another digest"):
        read_certificate(tmp_path / "certificate.json")


def test_the_code_is_its_paths_and_contents_and_not_its_place(tmp_path):
    for room in ("configs", "kernels", "perceiver", "train"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    base = code_files()
    assert code_files(tmp_path) == base
    (tmp_path / "train" / "order.py").rename(tmp_path / "train" / "order2.py")
    assert code_files(tmp_path).keys() ^ base.keys() == {"train/order.py", "train/order2.py"}
    (tmp_path / "train" / "order2.py").rename(tmp_path / "train" / "order.py")
    with (tmp_path / "kernels" / "philox.py").open("a") as file:
        file.write("\n")
    changed = code_files(tmp_path)
    assert [name for name in base if changed[name] != base[name]] == ["kernels/philox.py"]


COMPILED = """
import hashlib, json, os, sys
from bench.offline import gpu, prepare_environment
prepare_environment()
os.environ["TRITON_DISABLE_LINE_INFO"] = "0"
import torch
from bench.static_cases import _sinkhorn
from train.certificate import loaded_cubins, machine_code_digest
empty = loaded_cubins(90)
with gpu(90) as launches:
    _sinkhorn(1, 16, 16, torch.float32, slack="full", dustbin=True)
launched = {x.kernel: {machine_code_digest(x.cubin): x.warps} for x in launches}
print(json.dumps([empty, loaded_cubins(90), launched, [hashlib.sha256(x.cubin).hexdigest() for x in launches]]))
"""


def test_machine_code_is_named_whatever_the_place_of_its_source_and_its_comments(tmp_path):
    for room in ("bench", "configs", "kernels", "perceiver", "train"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path in (tmp_path / "kernels").glob("sinkhorn*.py"):
        path.write_text(path.read_text().replace("@triton.jit", "# a comment\n\n@triton.jit"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answers = []
    # with line numbers, which name the place and move with comments
    for cache, place in (("first", ROOT), ("second", tmp_path)):
        environment |= {"TRITON_CACHE_DIR": str(tmp_path / cache), "PYTHONPATH": str(place)}
        command = [sys.executable, "-c", COMPILED]
        done = subprocess.run(command, check=False, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    (empty, loaded, launched, files), (_, elsewhere, _, other_files) = answers
    assert empty == {}
    assert loaded == elsewhere
    assert all(name.startswith("_sinkhorn") for name in loaded)
    found = {name: {digest: launch["warps"] for digest, launch in cubins.items()} for name, cubins in loaded.items()}
    assert found == launched
    assert not set(files) & set(other_files)


def test_the_machine_code_of_all_processes_of_a_run_enters():
    noted = [
        {"kind": "process", "step": 0},
        {"kind": "kernels", "step": 3, "cubins": {"b": {"2": {}}}},
        {"kind": "kernels", "step": 6, "cubins": {"b": {"1": {}, "2": {}}, "a": {"3": {}}}},
    ]
    machine = Machine(device=torch.device("cuda"), precision="bf16", impl="triton")
    assert json.dumps(describe_kernels(machine, noted)) == '{"cubins": {"a": {"3": {}}, "b": {"1": {}, "2": {}}}}'
    eager = describe_kernels(dataclasses.replace(machine, impl="eager"), noted)
    assert eager == {"cubins": None, "why": "the run computed with impl 'eager'"}


@pytest.mark.gpu
def test_a_run_on_a_gpu_names_its_machine_code_the_same_each_time(tmp_path):
    found = []
    for name in ("a", "b"):
        run(tiny_recipe(), tmp_path / name, device="cuda", progress=False, say=lambda _line: None)
        found.append((tmp_path / name / "certificate.json").read_bytes())
    cubins = json.loads(found[0])["kernels"]["cubins"]
    assert {"_attention_fwd_kernel", "_match_segments_fwd_kernel"} <= cubins.keys()
    assert found[0] == found[1]
