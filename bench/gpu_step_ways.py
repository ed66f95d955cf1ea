"""Ways to one training step of the published model: ours in several forms, and PyTorch's, on the same rows.

A step is augmentation, forward, loss, backward, clipping and AdamW in bf16. The order of the rows is the recipe's; it
lies on the device before the first step, so that no way waits for it within what is timed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_step_peers import PlainPerceiver, plain_loss
from bench.gpu_targets import OURS
from bench.stirred import stirred_model
from perceiver import products
from perceiver.model import Perceiver
from perceiver.scene import SceneBatch
from train.augment import augment
from train.batches import StageBatches, stage_data
from train.config import Recipe, StageConfig, load_recipe
from train.data import StageData
from train.determinism import Machine, enter
from train.graph import StageUpdates
from train.optim import build_optimizer
from train.step import predict_and_compare

# of a process that times one way: more than it makes
MOST_STEPS = 256
# rows whose loss is compared with float64
CHECKED_ROWS = 8
COMPILED = "torch.compile"
# way -> options of torch.compile, in the order in which they matter if the time runs out
WAYS: dict[str, Mapping[str, Any] | None] = {
    OURS: None,
    f"{OURS}, one stream": None,
    f"{OURS}, launch by launch": None,
    COMPILED: {},
    f"{COMPILED}, reduce-overhead": {"options": {"triton.cudagraphs": True}},
    f"{COMPILED}, deterministic": {"options": {"deterministic": True}},
    "eager": None,
    "eager, deterministic": None,
    f"{COMPILED}, max-autotune of 3 tiles": {
        "options": {
            "max_autotune_gemm": True,
            "triton.cudagraphs": True,
            "triton.num_decompose_k_splits": 0,
            # the library's product, and tiles of 128 columns and 64 in depth
            "test_configs.autotune_choice_desc_regex": r"^$|(?=.*\bBLOCK_K=64\b)(?=.*\bBLOCK_N=128\b)",
        }
    },
    f"{COMPILED}, max-autotune": {"mode": "max-autotune"},
}
# compiles longer than the whole suite may take: only if it is asked for
UNBOUNDED = f"{COMPILED}, max-autotune"


class BatchesAhead(StageBatches):
    """The batches of a stage's first updates, whose epochs were all drawn before the first of them.

    Where a set has two batches, training would draw an epoch every second update; the published sets have hundreds.
    """

    def __init__(self, recipe: Recipe, number: int, data: StageData, device: torch.device, *, steps: int = MOST_STEPS):
        super().__init__(recipe, number, data, device)
        self._first_step = recipe.start_of(number - 1) + 1
        drawn = (super(BatchesAhead, self).index(self._first_step + i) for i in range(steps))
        self._drawn_SB = torch.stack(list(drawn))

    def index(self, step: int) -> torch.Tensor:
        """Return the numbers of the rows of update `step`, int64 [B] on the device.

        Raises:
            ValueError: the update was not drawn ahead.
        """
        place = step - self._first_step
        if not 0 <= place < len(self._drawn_SB):
            last = self._first_step + len(self._drawn_SB) - 1
            raise ValueError(f"step must be in [{self._first_step}, {last}], got {step}")
        return self._drawn_SB[place]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One shape of the training: recipe, stage and rows."""

    recipe: Recipe
    stage: StageConfig
    batches: BatchesAhead
    model: Perceiver


def setting(shape: tuple[int, int], machine: Machine, recipe: Recipe | None = None) -> Setting:
    """Build the published model off its start, where residual branches are 0, and rows for it."""
    scenes, points = shape
    recipe = recipe or load_recipe("s23dr")
    uri = f"roofs:real?points={points}&scenes={2 * scenes}"
    stage = dataclasses.replace(
        recipe.stages[-1], data=uri, until=1_000_000, batch=scenes, lr=1e-4, warmup=0, cooldown_steps=0
    )
    recipe = dataclasses.replace(recipe, stages=(stage,))
    model = stirred_model(recipe)
    batches = BatchesAhead(recipe, 1, stage_data(recipe, 1), machine.device)
    return Setting(recipe=recipe, stage=stage, batches=batches, model=model.to(machine.device))


def checked_error(at: Setting, machine: Machine, loss: Callable[[SceneBatch], torch.Tensor]) -> float:
    """Return the relative error of a way's loss, without dropout, against float64 on the first rows."""
    rows = at.batches.rows.rows(torch.arange(CHECKED_ROWS, device=machine.device))
    exact = {n: x.double() if x.is_floating_point() else x for n, x in vars(rows).items()}
    model = Perceiver(at.recipe.model, seed=0).to(machine.device).double()
    model.load_state_dict(at.model.state_dict())
    reference = Machine(device=machine.device, precision="fp32", impl="eager", threads=machine.threads)
    weight = at.stage.endpoint_weight
    with torch.no_grad():
        truth = predict_and_compare(model, SceneBatch(**exact), at.recipe, reference, endpoint_weight=weight)[1].total
        return float((loss(rows).double() - truth).abs() / truth.abs())


def our_way(at: Setting, machine: Machine, *, graph: bool) -> tuple[Callable[[], object], Callable]:
    """Return one step of ours, and its loss without dropout."""
    optimizer = build_optimizer(at.model, at.recipe.optim)
    updates = StageUpdates(
        at.model, optimizer, at.batches, stage=at.stage, recipe=at.recipe, machine=machine, graph=graph
    )
    steps = itertools.count(1)

    def loss(rows: SceneBatch) -> torch.Tensor:
        weight = at.stage.endpoint_weight
        return predict_and_compare(at.model, rows, at.recipe, machine, endpoint_weight=weight)[1].total

    return lambda: updates(next(steps)), loss


def plain_way(
    at: Setting, machine: Machine, *, compiled: Mapping[str, Any] | None = None, deterministic: bool = False
) -> tuple[Callable[[], object], Callable]:
    """Return one step in plain PyTorch, under torch.compile where options for it are given, and its loss.

    The loss is computed by what is compiled, not by what was made of it: compiled code draws dropouts of its own, and
    without them it would be another compilation. Of the backends of SDPA that take a mask, only MATH is deterministic.
    """
    model = PlainPerceiver(at.model, at.recipe.model.dropout)
    compute = plain_loss(at.recipe, at.stage)
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    backends = [SDPBackend.MATH] if deterministic else [*fast, SDPBackend.MATH]

    def total(rows: SceneBatch) -> torch.Tensor:
        with machine.autocast(), sdpa_kernel(backends):
            predicted = model(rows)
        return compute(*predicted, rows.gt_BM23, rows.gt_count_B)

    trained = total if compiled is None else torch.compile(total, dynamic=False, **compiled)
    optimizer = build_optimizer(at.model, at.recipe.optim)
    for group in optimizer.param_groups:
        group["lr"].fill_(at.stage.lr) if isinstance(group["lr"], torch.Tensor) else group.update(lr=at.stage.lr)
    steps = itertools.count(1)

    def one_step() -> None:
        step = next(steps)
        # gradients that a recorded backward left in its own memory are given back before that is written again
        optimizer.zero_grad(set_to_none=True)
        if compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()
        rows = augment(at.batches.at(step), at.recipe.augment, seed=at.recipe.seed, step=step)
        trained(rows).backward()
        nn.utils.clip_grad_norm_(at.model.parameters(), at.recipe.optim.clip)
        optimizer.step()

    def loss(rows: SceneBatch) -> torch.Tensor:
        model.eval()
        try:
            return total(rows)
        finally:
            model.train()

    return one_step, loss


def build_way(way: str, shape: tuple[int, int], recipe: Recipe | None = None):
    """Put the process into the way's state and return the setting, its machine, one step and its loss."""
    machine = enter(threads=2, precision="bf16", impl="auto")
    if way.startswith(OURS):
        products.SIDE_STREAM = not way.endswith("one stream")
        at = setting(shape, machine, recipe)
        return at, machine, *our_way(at, machine, graph=not way.endswith("launch by launch"))
    deterministic = way.endswith("deterministic")
    if not deterministic:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.set_float32_matmul_precision("high")
    at = setting(shape, machine, recipe)
    return at, machine, *plain_way(at, machine, compiled=WAYS[way], deterministic=deterministic)
