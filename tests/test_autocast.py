"""What an operator computes in float32 it computes in float32 under autocast too, forward and backward.

`test_attention`, `test_points` and `test_heads` show it of theirs, whose products have a precision of their own.
"""

import itertools

import pytest
import torch

from kernels.adamw import adamw
from kernels.gelu import bias_gelu
from kernels.loss_terms import loss_terms
from kernels.matching import match_segments
from kernels.philox import dropout
from kernels.residual import residual_norm
from kernels.rms_norm import rms_norm
from kernels.sinkhorn import sinkhorn
from kernels.turn import turn

FORMS = ("eager", "triton")


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def scenes(like):
    return torch.tensor([3, 2**32 - 1], device=like.device)


def matched(mid, dir_, length, gt, *, impl):
    count = torch.tensor([3, 5], device=mid.device)
    return match_segments(mid, dir_, length, gt, count, iterations=3, plan_gradient="exact", impl=impl)[:3]


def summed_up(transport, endpoint, matched, conf, *, impl):
    partner, count = torch.zeros(conf.shape, dtype=torch.int64, device=conf.device), torch.tensor([3, 5]).to(conf)
    tensors = (transport, endpoint, matched.detach(), partner, conf, count.long())
    return loss_terms(*tensors, conf_weight=0.1, endpoint_weight=0.2, impl=impl).total


def updated(p, grad, m, v, *, impl):
    state = [[x.detach().clone()] for x in (p, m, v)]
    steps, lr = [torch.zeros((), device=p.device)], torch.tensor(0.1, device=p.device)
    norm = adamw(state[0], [grad.detach()], *state[1:], steps, lr=lr, decays=[0.1], limit=0.5, impl=impl)
    return norm, *(x for (x,) in state)


OPERATORS = {
    "sinkhorn": (lambda c, d, **o: sinkhorn(c, eps=0.3, iterations=3, dustbin=d, **o), [(2, 7, 9), ()]),
    "match_segments": (matched, [(2, 6, 3), (2, 6, 3), (2, 6), (2, 5, 2, 3)]),
    "loss_terms": (summed_up, [(2,), (2,), (2, 6), (2, 6)]),
    "residual_norm": (
        lambda x, y, gain, bias, **o: residual_norm(x, y, gain, bias_C=bias, rate=0.3, scene_B=scenes(x), **o)[:2],
        [(2, 5, 16), (2, 5, 16), (16,), (16,)],
    ),
    "bias_gelu": (bias_gelu, [(2, 5, 16), (16,)]),
    "turn": (
        lambda x, gt, **o: turn(x.detach(), gt.detach(), scenes(x), seed=5, step=3, **o),
        [(2, 5, 3), (2, 4, 2, 3)],
    ),
    "adamw": (updated, [(40, 30)] * 4),
}
CPU_OPERATORS = {
    "rms_norm": (rms_norm, [(3000, 64), (64,)]),
    "dropout": (lambda x: dropout(x, 0.3, seed=5, step=3, scene_B=scenes(x), place=1024), [(2, 5, 16)]),
}
CASES = {f"{name}-{impl}": (*OPERATORS[name], {"impl": impl}) for name, impl in itertools.product(OPERATORS, FORMS)}
CASES |= {name: (*operator, {}) for name, operator in CPU_OPERATORS.items()}


def results(function, shapes, options, device):
    """All outputs and all gradients of the sum of their squares."""
    inputs = [draw(*shape).to(device).requires_grad_() for shape in shapes]
    found = function(*inputs, **options)
    outputs = [found] if isinstance(found, torch.Tensor) else list(found)
    differentiable = [x for x in outputs if x.requires_grad]
    upstream = [x.detach() for x in differentiable]
    gradients = torch.autograd.grad(differentiable, inputs, upstream, allow_unused=True) if differentiable else ()
    return outputs + [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case, device):
    function, shapes, options = CASES[case]
    on = torch.device("cpu") if options in ({}, {"impl": "eager"}) else device
    plain = results(function, shapes, options, on)
    with torch.autocast(on.type, torch.bfloat16):
        cast = results(function, shapes, options, on)
    assert all(torch.equal(x, y) for x, y in zip(cast, plain, strict=True))
