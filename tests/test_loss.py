"""The loss: its sum, its gradients against finite differences, its pulse."""

import pytest
import torch

from perceiver.loss import LossConfig, segment_loss
from perceiver.model import Perceiver, Segments
from tests.small_models import SMALL, small_batch, stirred


def perfect_prediction(gt_BM23: torch.Tensor) -> Segments:
    p, q = gt_BM23[:, :, 0], gt_BM23[:, :, 1]
    length = (q - p).norm(dim=-1)
    return Segments(
        mid_BN3=(p + q) / 2,
        dir_BN3=(q - p) / length[..., None],
        len_BN=length,
        conf_BN=torch.full(length.shape, 20.0),
    )


def some_truth() -> torch.Tensor:
    return torch.rand(2, 6, 2, 3, generator=torch.Generator().manual_seed(1)) - 0.5


def test_total_is_the_weighted_sum_of_its_terms():
    batch = small_batch()
    predicted = stirred(Perceiver(SMALL))(batch)
    config = LossConfig(conf_weight=0.3, cost_scale=4.0)
    loss = segment_loss(predicted, batch.gt_BM23, batch.gt_count_B, config, endpoint_weight=0.2)
    torch.testing.assert_close(loss.total, loss.transport + 0.3 * loss.conf + 4.0 * 0.2 * loss.endpoint)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss[1:])


def test_perfect_prediction_costs_nothing_and_is_matched():
    truth = some_truth()
    count = torch.full((2,), 6, dtype=torch.int32)
    loss = segment_loss(perfect_prediction(truth), truth, count, LossConfig(), endpoint_weight=0.1)
    assert loss.transport.item() < 0.05
    assert loss.endpoint.item() < 0.02
    # an entropic plan is never quite a matching
    assert 0.95 < loss.mass.item() <= 1 + 1e-5
    assert loss.kept.item() == pytest.approx(1)
    assert 0 <= loss.dustbin.item() < 0.05


def test_prediction_far_from_everything_goes_to_the_dustbin():
    truth = some_truth()
    predicted = perfect_prediction(truth)._replace(mid_BN3=torch.full((2, 6, 3), 30.0))
    loss = segment_loss(predicted, truth, torch.full((2,), 6, dtype=torch.int32), LossConfig(), endpoint_weight=0.1)
    assert loss.mass.item() < 1e-6
    assert loss.dustbin.item() == pytest.approx(1)


def test_the_dustbin_is_in_units_of_the_cost_and_eps_in_those_of_the_scaled_cost():
    truth = some_truth()
    moved = perfect_prediction(truth + 0.2)

    def mass(**values: float) -> float:
        count = torch.full((2,), 6, dtype=torch.int32)
        config = LossConfig(dustbin=0.3, **values)
        return segment_loss(moved, truth, count, config, endpoint_weight=0.0).mass.item()

    once = mass(cost_scale=5.0, eps=0.5)
    assert 0.1 < once < 0.9
    assert mass(cost_scale=10.0, eps=1.0) == pytest.approx(once, rel=1e-4)
    assert mass(cost_scale=10.0, eps=0.5) != pytest.approx(once, rel=1e-2)


def test_confidence_learns_mass_or_partner():
    truth = some_truth()
    count = torch.tensor([6, 3], dtype=torch.int32)
    predicted = perfect_prediction(truth)._replace(conf_BN=torch.zeros(2, 6, requires_grad=True))
    for target in ("mass", "partner"):
        config = LossConfig(conf_target=target)
        loss = segment_loss(predicted, truth, count, config, endpoint_weight=0.0)
        (grad,) = torch.autograd.grad(loss.total, predicted.conf_BN)
        assert (grad[0] < 0).all(), "matched queries must become more confident"
        assert (grad[1, 3:] > 0).all(), "queries without a partner must become less confident"


@pytest.mark.parametrize(
    ("field", "value"),
    [("conf_target", "guess"), ("conf_weight", -1.0), ("eps", 0.0), ("cost_scale", -5.0), ("iterations", 0)],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        LossConfig(**{field: value})


def test_gradients_of_the_whole_loss_are_those_of_finite_differences():
    # by design the default gradient holds the plan fixed and the confidence's target has none: take the exact gradient,
    # and the target that is constant between ties
    batch = small_batch(scenes=2)
    batch = type(batch)(**{n: v.double() if v.dtype == torch.float32 else v for n, v in vars(batch).items()})
    model = stirred(Perceiver(SMALL)).double()
    config = LossConfig(plan_gradient="exact", eps=0.5, cost_scale=1.0, conf_target="partner")

    def total() -> torch.Tensor:
        return segment_loss(model(batch), batch.gt_BM23, batch.gt_count_B, config, endpoint_weight=0.0).total

    total().backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        analytic = (parameter.grad * direction).sum().item()
        with torch.no_grad():
            h = 1e-6
            parameter += h * direction
            up = total().item()
            parameter -= 2 * h * direction
            down = total().item()
            parameter += h * direction
        assert analytic == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-8), name
