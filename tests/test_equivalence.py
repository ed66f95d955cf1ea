"""The published text's table "Code Equivalence Verification", for every form in which this model can be trained.

| there | here |
| --- | --- |
| forward pass, loss, gradients on the same input | against float64, no form errs more than twice the reference |
| training from the same seed: equal steps 1 to 44 | 100 steps no further from float64 than rounded first weights go |
| deterministic mode, two runs | every form, always: the same bits |

A form is a row of FORMS: what computes the operators, and how the updates are launched.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import perceiver.blocks
import perceiver.fused
import perceiver.loss
import perceiver.model
from kernels import gqa_attention, gqa_attention_reference, match_segments_reference, point_embedding_reference
from kernels.attention_columns import KeyValueColumns, _columns
from kernels.rms_norm import EPS
from perceiver.blocks import DropoutKey
from perceiver.model import Perceiver
from perceiver.scene import SceneBatch, stack_scenes
from tests.accuracy import assert_accurate
from tests.conftest import HAS_GPU
from tests.small_models import SMALL, stirred
from tests.tiny_runs import tiny_recipe
from train.batches import StageBatches
from train.compare import compare_runs
from train.config import StageConfig, load_recipe
from train.data import StageData, load_stage_data
from train.determinism import Machine, enter
from train.graph import StageUpdates
from train.loop import run
from train.optim import build_optimizer
from train.roofs import generate_scenes
from train.step import predict_and_compare


@dataclass(frozen=True, kw_only=True)
class Form:
    """reference: the operators are their plain references; otherwise `impl` computes them. graph: in a CUDA graph."""

    impl: str = "eager"
    reference: bool = False
    graph: bool = False
    dtype: torch.dtype = torch.float32

    @contextlib.contextmanager
    def entered(self, device: torch.device) -> Iterator[Machine]:
        """Make the model compute in this form meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            for module, name, reference in REFERENCES if self.reference else ():
                patch.setattr(module, name, _without_choice(reference))
            yield enter(threads=1, precision="fp32", impl=self.impl, device=str(device))


def _rms_norm_reference(x: torch.Tensor, gain_C: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, gain_C.shape, gain_C, EPS)


# where the eager form takes an operator from, and what it means
REFERENCES = (
    (perceiver.model, "point_embedding", point_embedding_reference),
    (perceiver.blocks, "gqa_attention", gqa_attention_reference),
    (perceiver.blocks, "rms_norm", _rms_norm_reference),
    (perceiver.loss, "match_segments", match_segments_reference),
)
# where the form of the kernels takes its operators from, beside attention
OPERATORS = (
    (perceiver.model, "point_embedding"),
    (perceiver.fused, "residual_norm"),
    (perceiver.fused, "bias_gelu"),
    (perceiver.loss, "match_segments"),
)
# what trains: small enough for the interpreter to make 100 updates
TRAINED = dataclasses.replace(
    load_recipe("tiny").model,
    hidden=16,
    ff=16,
    num_heads=1,
    latent_tokens=4,
    latent_layers=1,
    segments=4,
)
STAGE = StageConfig(
    name="from one seed",
    data="roofs:easy?points=16&scenes=4",
    until=100,
    batch=1,
    lr=1e-3,
    warmup=10,
    endpoint_weight=0.1,
)
# updates made a second time; the interpreter takes a third of a second for one
REPEATED = 100 if HAS_GPU else 6
FORMS = {"reference": Form(reference=True), "eager": Form(), "triton": Form(impl="triton")}
GRAPH = Form(impl="triton", graph=True)
TRAINED_FORMS = [*FORMS, pytest.param("graph", marks=pytest.mark.gpu)]
TRUTH = Form(reference=True, dtype=torch.float64)


def _without_choice(reference):
    @functools.wraps(reference)
    def operator(*args, impl="", precision="", **options):
        return reference(*args, **options)

    return operator


def in_dtype(batch: SceneBatch, dtype: torch.dtype) -> SceneBatch:
    return SceneBatch(**{n: x.to(dtype) if x.is_floating_point() else x for n, x in vars(batch).items()})


@functools.cache
def one_step(form: Form, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
    """Forward, loss and gradients of a model off its initial values, with dropout, on three scenes."""
    recipe = dataclasses.replace(load_recipe("tiny"), model=SMALL)
    model = stirred(Perceiver(recipe.model), spread=0.02).to(device, form.dtype)
    batch = in_dtype(stack_scenes(generate_scenes(3, seed=0, points=24, setting="easy")), form.dtype).to(device)
    drop = DropoutKey(rate=recipe.model.dropout, seed=recipe.seed, step=1, scene_B=batch.scene_B)
    with form.entered(device) as machine:
        predicted, loss = predict_and_compare(model, batch, recipe, machine, endpoint_weight=0.1, drop=drop)
        loss.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # one number per head, whose terms cancel: the heads of all layers are one quantity
    scales = [gradients.pop(name) for name in list(gradients) if name.endswith("log_scale")]
    return {
        "forward": predicted._asdict(),
        # one quantity: terms of like size, each a mean over the batch
        "loss": {"terms": torch.stack([term.detach().to(form.dtype) for term in loss])},
        "gradient": {**gradients, "log_scale": torch.cat(scales)},
    }


@pytest.mark.parametrize("part", ["forward", "loss", "gradient"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_as_close_to_float64_as_the_reference(form, part, device):
    found, truth, reference = (one_step(f, device)[part] for f in (FORMS[form], TRUTH, FORMS["reference"]))
    for name in truth:
        assert_accurate(found[name], truth=truth[name], eager=reference[name], name=f"{part} {name}")


@functools.cache
def train(
    form: Form, device: torch.device, *, steps: int = 100, rounding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the first updates from one seed log, float64 [step, term], and the weights after them.

    `rounding` moves each initial weight by one unit in the last place of float32, up, down or not, another way each.
    """
    base = load_recipe("tiny")
    recipe = dataclasses.replace(base, model=TRAINED, stages=(STAGE,))
    model = Perceiver(recipe.model, seed=1)
    if rounding:
        generator = torch.Generator().manual_seed(rounding)
        with torch.no_grad():
            for weight in model.parameters():
                moved = weight.view(torch.int32) + torch.randint(-1, 2, weight.shape, generator=generator).int()
                weight.copy_(torch.where(weight == 0, weight, moved.view(torch.float32)))
    model = model.to(device, form.dtype)
    with form.entered(device) as machine:
        batches = StageBatches(recipe, 1, _data(), device)
        batches.rows = in_dtype(batches.rows, form.dtype)
        optimizer = build_optimizer(model, recipe.optim, impl=machine.impl)
        updates = StageUpdates(model, optimizer, batches, stage=STAGE, recipe=recipe, machine=machine, graph=form.graph)
        logged = []
        for step in range(1, steps + 1):
            result = updates(step)
            logged.append(torch.stack([x.detach().double() for x in (*result.loss, result.grad_norm)]).cpu())
    weights = torch.cat([weight.detach().cpu().double().flatten() for weight in model.parameters()])
    return torch.stack(logged), weights


@functools.cache
def _data() -> StageData:
    return load_stage_data(STAGE.data)


def distances(run: tuple[torch.Tensor, torch.Tensor], truth: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The largest error of the loss so far, after each step; then that of the weights at the end."""
    losses = (run[0] - truth[0])[:, 0].abs().cummax(dim=0).values
    return torch.cat([losses, (run[1] - truth[1]).abs().max()[None]])


@pytest.mark.parametrize("form", TRAINED_FORMS)
def test_100_steps_are_no_further_from_float64_than_rounding_the_first_weights(form, device):
    """Updates amplify rounding, so no two forms agree for long; they may differ by what any rounding would do."""
    truth = train(TRUTH, device)
    rounded = [distances(train(FORMS["reference"], device, rounding=i), truth) for i in (1, 2, 3)]
    allowed = 2 * torch.stack(rounded).amax(dim=0) + 8 * torch.finfo(torch.float32).eps
    found = distances(train(FORMS.get(form, GRAPH), device), truth)
    assert (found <= allowed).all(), f"{form}: {found / allowed} of what is allowed"


@pytest.mark.parametrize("form", TRAINED_FORMS)
def test_two_runs_are_the_same_bits(form, device):
    form = FORMS.get(form, GRAPH)
    logged, _ = train(form, device)
    assert torch.equal(train.__wrapped__(form, device, steps=REPEATED)[0], logged[:REPEATED])


def test_two_runs_of_the_tiny_recipe_on_kernels_are_identical(tmp_path, device):
    """L4, through the door of a run: weights, optimizer, metrics, trace and certificate."""
    first, last = tiny_recipe().stages[0], tiny_recipe().stages[2]
    quick = dataclasses.replace(tiny_recipe().evaluate, every=0, scenes=2, batch=2)
    stages = dataclasses.replace(first, until=1, batch=2), dataclasses.replace(last, until=2, batch=2)
    recipe = tiny_recipe(impl="triton", stages=stages, evaluate=quick)
    for name in ("a", "b"):
        run(recipe, tmp_path / name, device=str(device), progress=False, say=lambda _line: None)
    assert compare_runs(tmp_path / "a", tmp_path / "b").differences == ()
    certificate = json.loads((tmp_path / "a" / "certificate.json").read_text())
    assert certificate["environment"]["impl"] == "triton"


def test_a_scene_of_the_tiny_recipe_has_the_bits_it_has_alone(device):
    """L3: every operator of a step, at the numbers that the step hands it."""
    recipe, calls = tiny_recipe(impl="triton"), []

    def recorded(operator):
        def wrapped(*tensors, **options):
            # a vector of a joint sum is taken once
            alone = {name: option for name, option in options.items() if name != "sums"}
            calls.append((operator, tensors, alone, operator(*tensors, **options)))
            return calls[-1][-1]

        return wrapped

    class RecordedColumns(KeyValueColumns):
        def attend(self, q_BHTD, log_scale_H, *, kv_heads, key_count_B):
            start, kv_BSX = self.end, self.kv_BSX
            found = super().attend(q_BHTD, log_scale_H, kv_heads=kv_heads, key_count_B=key_count_B)
            tensors = (q_BHTD, *_columns(kv_BSX, start, self.end, kv_heads), log_scale_H)
            options = {"key_count_B": key_count_B, "precision": "ieee", "impl": "triton"}
            calls.append((gqa_attention, tensors, options, found))
            return found

    model = stirred(Perceiver(recipe.model), spread=0.02).to(device)
    batch = stack_scenes(generate_scenes(3, seed=0, points=64, setting="easy")).to(device)
    drop = DropoutKey(rate=recipe.model.dropout, seed=recipe.seed, step=1, scene_B=batch.scene_B)
    with Form(impl="triton").entered(device) as machine, pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(perceiver.fused, "KeyValueColumns", RecordedColumns)
        for module, name in OPERATORS:
            patch.setattr(module, name, recorded(getattr(module, name)))
        predict_and_compare(model, batch, recipe, machine, endpoint_weight=0.1, drop=drop)
    assert {operator.__name__ for operator, *_ in calls} == {name for _, name in OPERATORS} | {"gqa_attention"}

    def only(x, b):
        return x[b : b + 1] if isinstance(x, torch.Tensor) and x.dim() and len(x) == len(batch) else x

    for operator, tensors, options, together in calls:
        for b in (0, 2):
            alone = operator(*(only(x, b) for x in tensors), **{name: only(x, b) for name, x in options.items()})
            pairs = zip(together, alone, strict=True) if isinstance(together, tuple) else [(together, alone)]
            assert all(x is y or torch.equal(only(x, b), y) for x, y in pairs), operator.__name__
