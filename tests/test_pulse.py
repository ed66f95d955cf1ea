"""What stops a run, and what does not yet."""

import pytest
import torch

from kernels.loss_terms import Loss
from perceiver.model import Perceiver
from tests.small_models import SMALL
from train.pulse import FIRST_STEPS, RunDiverged, require_finite, require_matching, require_temperature, temperature
from train.step import StepResult

NAN = float("nan")


def result(total=1.0, grad_norm=1.0):
    loss = Loss(*[torch.tensor(1.0)] * len(Loss._fields))._replace(total=torch.tensor(total))
    return StepResult(loss=loss, grad_norm=torch.tensor(grad_norm))


@pytest.mark.parametrize("bad", [result(total=NAN), result(grad_norm=float("inf"))])
def test_an_update_that_is_not_finite_is_refused(bad):
    with pytest.raises(RunDiverged, match="step 1,007: the loss or its gradient is not finite; lower the learning"):
        require_finite(1007, bad, {})


def test_a_weight_that_is_not_finite_is_refused_by_name():
    weights = {"a": torch.ones(3), "n": torch.tensor(3), "b": torch.tensor([1.0, -float("inf")])}
    with pytest.raises(RunDiverged, match="step 7: b is not finite"):
        require_finite(7, None, weights)
    require_finite(7, result(), weights | {"b": torch.ones(2)})


def test_the_temperature_is_the_largest_of_all_heads():
    model = Perceiver(SMALL)
    scales = [p for name, p in model.named_parameters() if name.endswith("log_scale")]
    with torch.no_grad():
        scales[-1][0] = 3.0
    assert temperature(model) == pytest.approx(20.0855, abs=1e-3)
    require_temperature(4, 55.0)
    with pytest.raises(RunDiverged, match=r"step 4: a temperature reached 55\.1, the kernels stop at 60"):
        require_temperature(4, 55.1)


def test_a_loss_can_only_collapse_after_the_warm_up_and_the_first_steps():
    for begun, warmup in ((0, 0), (0, FIRST_STEPS + 7), (1500, 20)):
        first = begun + max(warmup, FIRST_STEPS) + 1
        require_matching(first - 1, 0.01, begun=begun, warmup=warmup)
        require_matching(first, 0.05, begun=begun, warmup=warmup)
        with pytest.raises(RunDiverged, match=r"only 0\.010 of the mass .* went to the dustbin"):
            require_matching(first, 0.01, begun=begun, warmup=warmup)
