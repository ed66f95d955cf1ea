"""The accuracy rule accepts what is as good as eager and names what is not."""

import pytest
import torch

from tests.accuracy import assert_accurate

TRUTH = torch.tensor([1.0, -2.0, 4.0, torch.inf], dtype=torch.float64)
EAGER = TRUTH.float() + torch.tensor([1e-3, 0, 0, 0])


@pytest.mark.parametrize(("error", "accepted"), [(0.0, True), (1.9e-3, True), (2.1e-3, False), (torch.nan, False)])
def test_an_error_up_to_twice_that_of_eager_is_accepted(error, accepted):
    actual = TRUTH.float() + torch.tensor([0, error, 0, 0])
    if accepted:
        assert_accurate(actual, truth=TRUTH, eager=EAGER)
    else:
        with pytest.raises(AssertionError, match=r"d cost: error .* worst at \(1,\)"):
            assert_accurate(actual, truth=TRUTH, eager=EAGER, name="d cost")


def test_eight_units_of_the_output_type_and_a_floor_are_allowed():
    exact = TRUTH.float()
    actual = (TRUTH + torch.tensor([0.1, 0, 0, 0], dtype=torch.float64)).bfloat16()
    assert_accurate(actual, truth=TRUTH, eager=exact)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(actual.float(), truth=TRUTH, eager=exact)
    assert_accurate(actual.float(), truth=TRUTH, eager=exact, floor=0.11)


@pytest.mark.parametrize("last", [1.0, -torch.inf, torch.nan])
def test_infinities_must_agree(last):
    actual = torch.cat([TRUTH[:3].float(), torch.tensor([last])])
    with pytest.raises(AssertionError, match="same inf or NaN"):
        assert_accurate(actual, truth=TRUTH, eager=EAGER)


@pytest.mark.parametrize(
    ("actual", "truth", "message"), [(EAGER[:2], TRUTH, "shapes"), (EAGER, TRUTH.float(), "truth must be float64")]
)
def test_shapes_and_the_precision_of_the_truth_are_checked(actual, truth, message):
    with pytest.raises(AssertionError, match=message):
        assert_accurate(actual, truth=truth, eager=EAGER)
