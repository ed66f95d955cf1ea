"""The updates of a stage as a CUDA graph: gather, augmentation, forward, loss, backward, clip, AdamW in one launch.

What changes from update to update is read from device tensors that are filled before each replay: the rows of the
batch, the step (which keys augmentation and dropout) and the learning rate. The first updates of a stage run launch by
launch, which loads and compiles what they need; then one is recorded. A replay launches the kernels that were recorded
with the arguments they had, so it gives the bits that launch by launch gives.
"""

import torch

from perceiver.model import Perceiver
from train.batches import StageBatches
from train.config import Recipe, StageConfig
from train.determinism import Machine
from train.optim import learning_rate, set_learning_rate
from train.step import StepResult, advance

# updates launch by launch before one is recorded
WARM_UP = 3


class StageUpdates:
    """Makes the updates of one stage in place, on a CUDA device inside a graph unless told otherwise.

    Args:
        model, optimizer: what is updated. Replays write to the tensors they have after the warm-up: while this object
            is used they must not be replaced (`load_state_dict` writes in place for the model, not for the optimizer).
        batches: the stage's rows and their order.
        stage, recipe, machine: as for `train.step.update`.
        graph: False launches every kernel of every update; the same bits. Eager operators, which read values, are never
            recorded.
    """

    def __init__(
        self,
        model: Perceiver,
        optimizer: torch.optim.Optimizer,
        batches: StageBatches,
        *,
        stage: StageConfig,
        recipe: Recipe,
        machine: Machine,
        graph: bool = True,
    ):
        self._model, self._optimizer, self._batches = model, optimizer, batches
        self._stage, self._recipe, self._machine = stage, recipe, machine
        self._made = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: StepResult | None = None
        # gradients remember the stream they were first computed on, and recording needs one of its own
        recorded = graph and machine.device.type == "cuda" and machine.impl == "triton"
        self._stream = torch.cuda.Stream(machine.device) if recorded else None
        self._step = torch.zeros((), dtype=torch.int64, device=machine.device)
        self._index_B = torch.zeros(stage.batch, dtype=torch.int64, device=machine.device)

    def __call__(self, step: int) -> StepResult:
        """Make update `step` of the stage.

        Returns:
            Scalars on the device that the next update overwrites: read or copy them before it.
        Raises:
            ValueError: the update belongs to another stage.
        """
        self._index_B.copy_(self._batches.index(step))
        self._step.fill_(step)
        set_learning_rate(self._optimizer, learning_rate(step, self._stage))
        if self._graph is None:
            self._result = self._advance_or_record()
        else:
            self._graph.replay()
        assert self._result is not None
        self._made += 1
        return self._result

    def _advance(self) -> StepResult:
        return advance(
            self._model,
            self._optimizer,
            self._batches.rows.rows(self._index_B, impl=self._machine.impl),
            step=self._step,
            stage=self._stage,
            recipe=self._recipe,
            machine=self._machine,
        )

    def _advance_or_record(self) -> StepResult:
        """Launch by launch; after the warm-up, record the launches and replay them once."""
        if self._stream is None:
            return self._advance()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if self._made < WARM_UP:
                result = self._advance()
            else:
                self._optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._stream):
                    result = self._advance()
                graph.replay()
                self._graph = graph
        torch.cuda.current_stream().wait_stream(self._stream)
        return result
