"""`sum_segments`: a sum over rows in one order."""

import pytest
import torch

from kernels import reduce
from kernels.reduce import BLOCK_S, JointSums, sum_each, sum_segments


@pytest.mark.parametrize("S, C", [(1, 1), (3, 40), (16, 300), (BLOCK_S, 16), (3 * BLOCK_S + 5, 20), (9 * BLOCK_S, 3)])
def test_rows_are_added_to_float32_accuracy(S, C, device):
    partial_SN = torch.randn(S, C, generator=torch.Generator().manual_seed(0)).to(device)
    exact = partial_SN.double().sum(0)
    bound = 2**-24 * (S // BLOCK_S + 9) * partial_SN.double().abs().sum(0)
    assert ((sum_segments(partial_SN).double() - exact).abs() <= bound).all()


def test_a_lane_adds_in_ascending_order(device):
    # 1 is lost beside 2^26, so what is left tells when it was added
    partial_SN = torch.zeros(3 * BLOCK_S, 2, device=device)
    partial_SN[0], partial_SN[BLOCK_S], partial_SN[2 * BLOCK_S] = (
        torch.tensor(row, device=device) for row in ([2.0**26, 1.0], [1.0, 2.0**26], [-(2.0**26), -(2.0**26)])
    )
    assert sum_segments(partial_SN).tolist() == [0.0, 0.0]
    assert sum_segments(partial_SN.flip(0)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("S", [12, BLOCK_S + 1])
def test_columns_do_not_meet(S, device):
    partial_SN = torch.randn(S, 33, generator=torch.Generator().manual_seed(0)).to(device)
    alone = torch.cat([sum_segments(partial_SN[:, c : c + 1].contiguous()) for c in range(33)])
    assert torch.equal(sum_segments(partial_SN), alone)


def test_nothing_adds_up_to_zero(device):
    assert sum_segments(torch.empty(0, 3, device=device)).tolist() == [0.0, 0.0, 0.0]
    assert sum_segments(torch.empty(5, 0, device=device)).shape == (0,)


def test_each_of_several_matrices_is_added_up_as_it_is_alone(device):
    partial_VSN = torch.randn(3, BLOCK_S + 1, 20, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(sum_each(partial_VSN), torch.stack([sum_segments(partial_SN) for partial_SN in partial_VSN]))
    assert sum_each(partial_VSN[:0]).shape == (0, 20)


class Scale(torch.autograd.Function):
    """x times a vector whose gradient is added up with others."""

    @staticmethod
    def forward(ctx, x_SC, vector_C, place):
        ctx.place = place
        ctx.save_for_backward(x_SC, vector_C)
        return x_SC * vector_C

    @staticmethod
    def backward(ctx, *gradients):
        x_SC, vector_C = ctx.saved_tensors
        ctx.place.partial_SC.copy_(gradients[0] * x_SC)
        return gradients[0] * vector_C, ctx.place.sum_C, None


def scaled(device, shapes=((5, 3), (7, 3), (5, 3), (5, 4))):
    """Inputs, vectors, and the outputs of an operator on each pair, whose sums are joint."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
    vectors = [torch.randn(C, generator=generator).to(device).requires_grad_() for _, C in shapes]
    sums = JointSums(vectors)
    outputs = [Scale.apply(x, *sums.take(v, len(x))) for x, v in zip(inputs, vectors, strict=True)]
    return inputs, vectors, outputs


def test_joint_sums_are_those_of_each_alone_in_one_launch_per_shape(device, monkeypatch):
    launched, inputs, vectors, outputs = [], *scaled(device)
    with monkeypatch.context() as patch:
        patch.setattr(reduce, "sum_each", lambda *arguments: launched.append(sum_each(*arguments).shape))
        torch.autograd.backward(outputs, inputs)
    assert launched == [(2, 3), (1, 3), (1, 4)]
    for x, vector in zip(inputs, vectors, strict=True):
        assert torch.equal(vector.grad, sum_segments(x * x))


def test_a_vector_without_a_gradient_has_none_and_another_backward_writes_anew(device):
    inputs, vectors, outputs = scaled(device)
    first = torch.autograd.grad(outputs[:2], vectors, inputs[:2], retain_graph=True, allow_unused=True)
    assert [gradient is None for gradient in first] == [False, False, True, True]
    kept = first[0].clone()
    second = torch.autograd.grad(outputs, vectors, [-x for x in inputs])
    assert torch.equal(first[0], kept)
    assert torch.equal(second[0], -kept)


def test_no_gradient_is_copied_on_its_way(device):
    inputs, vectors, outputs = scaled(device)
    torch.autograd.backward(outputs, inputs)
    assert vectors[0].grad.untyped_storage().data_ptr() == vectors[2].grad.untyped_storage().data_ptr()


def test_a_vector_that_is_not_joint_or_taken_twice_is_refused(device):
    vector_C = torch.zeros(3, device=device)
    sums = JointSums([vector_C])
    with pytest.raises(ValueError, match="vector must be a joint one and taken once"):
        sums.take(torch.zeros(3, device=device), 1)
    sums.take(vector_C, 1)
    with pytest.raises(ValueError, match="vector must be a joint one and taken once"):
        sums.take(vector_C, 1)
    for vector in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"vectors must be float32 \[C\]"):
            JointSums([vector])
