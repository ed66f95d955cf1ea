"""An operator called directly is the operator that PyTorch knows, and whoever looks on sees that one."""

import importlib
import warnings
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dispatch
from kernels.attention import gqa_attention
from kernels.gather import _gather_rows
from kernels.matching import match_segments
from kernels.registration import Operator, operator
from kernels.residual import residual_norm
from kernels.sinkhorn import sinkhorn
from perceiver.blocks import DropoutKey
from perceiver.loss import LossConfig, segment_loss
from perceiver.model import Perceiver
from tests.small_models import SMALL, small_batch, stirred
from train.augment import AugmentConfig, augment

# the modules whose operators a training step calls, but for AdamW, which writes its arguments
OPERATORS = ("attention", "gelu", "heads", "loss_terms", "matching", "points", "residual", "rms_norm", "turn")


@operator("ridgeline_tests::scaled")
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x times factor, whose gradient is told by `_scaled_back` alone."""
    return x.mul(factor)


@operator("ridgeline_tests::count")
def count(x: torch.Tensor) -> torch.Tensor:
    """An operator without a gradient."""
    return x.new_full((), x.numel())


@operator("ridgeline_tests::count_of_positive")
def count_of_positive(x: torch.Tensor) -> torch.Tensor:
    """What lies in memory, as a kernel reads it."""
    memory = torch.tensor([]).set_(x.untyped_storage(), 0, x.shape)
    return (memory > 0).sum()


@operator("ridgeline_tests::increment", mutates_args=("x",))
def increment(x: torch.Tensor) -> None:
    x.add_(1)


def _scaled_back(ctx, dy: torch.Tensor):
    # not the derivative of what the function does: shows whose gradient was taken
    return dy * (ctx.factor + 100), None


def _remember(ctx, inputs: tuple, output: torch.Tensor) -> None:
    _, ctx.factor = inputs


scaled.register_fake(lambda x, factor: torch.empty_like(x))
count.register_fake(lambda x: x.new_empty(()))
scaled.register_autograd(_scaled_back, setup_context=_remember)


class Seen(TorchDispatchMode):
    """The names of what reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs: Any = None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class Wrapped(torch.Tensor):
    """A tensor of another class, which sees the functions that it is given to."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs: Any = None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def _refused(*arguments: Any, **named: Any):
    raise AssertionError("called through PyTorch")


def _differentiate(outputs, inputs) -> list[torch.Tensor]:
    """The outputs, and the gradients of their sums weighted by their place."""
    floats = [x for x in outputs if x.requires_grad]
    weights = [torch.arange(1, x.numel() + 1, device=x.device).view(x.shape) for x in floats]
    total = sum(((x * w).sum() for x, w in zip(floats, weights, strict=True)), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(total, inputs)]


def _matching():
    generator = torch.Generator().manual_seed(3)
    draw = [torch.rand(2, 5, 3, generator=generator), torch.rand(2, 5, 3, generator=generator) - 0.5]
    inputs = [x.requires_grad_() for x in (*draw, torch.rand(2, 5, generator=generator))]
    gt, counts = torch.rand(2, 4, 2, 3, generator=generator), torch.tensor([4, 2])
    return match_segments(*inputs, gt, counts, iterations=3), inputs


def _transport():
    cost = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(4)).requires_grad_()
    return sinkhorn(cost, eps=0.2, iterations=3, dustbin=0.4), [cost]


def _attention():
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 4, 3, 16), (2, 2, 6, 16), (2, 2, 6, 16))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    log_scale = torch.zeros(4, requires_grad=True)
    return [gqa_attention(*inputs, log_scale, key_count_B=torch.tensor([6, 4]))], [*inputs, log_scale]


def _residual():
    generator = torch.Generator().manual_seed(6)
    # its kernels run on a CPU in the interpreter only
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [torch.randn(2, 3, 16, generator=generator).to(device).requires_grad_() for _ in range(2)]
    gain = torch.ones(16, device=device, requires_grad=True)
    return list(residual_norm(*inputs, gain, dtype=torch.float32, impl="triton"))[:2], [*inputs, gain]


@pytest.mark.parametrize("case", [_matching, _transport, _attention, _residual])
def test_direct_calls_have_the_bits_of_the_registered_operator(case, monkeypatch):
    direct = _differentiate(*case())
    monkeypatch.setattr("kernels.registration._observed", lambda tensors: True)
    for one, other in zip(direct, _differentiate(*case()), strict=True):
        assert torch.equal(one, other)


def test_a_training_step_takes_the_short_way(monkeypatch, device):
    model, batch = stirred(Perceiver(SMALL)).to(device), small_batch(scenes=2).to(device)
    operators = [x for name in OPERATORS for x in vars(importlib.import_module(f"kernels.{name}")).values()]
    for op in operators:
        if isinstance(op, Operator):
            monkeypatch.setattr(op, "_registered", _refused)
    for impl in ("triton", "eager"):
        drop = DropoutKey(rate=0.1, seed=3, step=2, scene_B=batch.scene_B)
        segments = model(augment(batch, AugmentConfig(), seed=3, step=2, impl=impl), drop=drop, impl=impl)
        config = LossConfig(iterations=2)
        segment_loss(segments, batch.gt_BM23, batch.gt_count_B, config, endpoint_weight=0.1, impl=impl).total.backward()


def test_plain_tensors_do_not_pass_through_pytorch(monkeypatch):
    for op in (scaled, count):
        monkeypatch.setattr(op, "_registered", _refused)
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(scaled(x, 2.0).sum(), x)
    assert gradient.tolist() == [102.0] * 3
    assert scaled(x.detach(), 2.0).tolist() == [2.0] * 3
    assert count(torch.nn.Parameter(torch.ones(3), requires_grad=False)) == 3
    with torch.no_grad():
        assert not scaled(x, 2.0).requires_grad and count(x) == 3


def test_what_looks_on_sees_the_operator(monkeypatch):
    x, name = torch.ones(3), "ridgeline_tests.scaled.default"
    with Seen() as seen:
        scaled(x, 2.0)
    assert seen.names == [name]
    traced = make_fx(lambda x: scaled(x, 2.0))(x)
    assert name in {str(node.target) for node in traced.graph.nodes}
    Wrapped.names.clear()
    scaled(x.as_subclass(Wrapped), 2.0)
    assert name in Wrapped.names
    with torch.profiler.profile(acc_events=True) as profile:
        scaled(x, 2.0)
    assert "ridgeline_tests::scaled" in {event.key for event in profile.key_averages()}


def test_transforms_meet_the_operator():
    rows = torch.func.vmap(lambda x: scaled(x, 2.0))(torch.ones(2, 3))
    assert rows.tolist() == [[2.0] * 3] * 2
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: scaled(x, 2.0).sum())(torch.ones(3))


def test_compilers_find_one_operator_and_its_gradient():
    compiled = torch.compile(lambda x: scaled(x, 2.0) + count(x.detach()), backend="aot_eager", fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    y = compiled(x)
    assert y.tolist() == [5.0] * 3
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [102.0] * 3


def test_a_compiler_may_leave_numbers_and_sizes_open():
    def transport(mid, eps, dustbin):
        return match_segments(mid, *others, eps=eps, dustbin=dustbin).transport_B

    mid, *others = torch.rand(2, 4, 3), torch.rand(2, 4, 3), torch.rand(2, 4), torch.rand(2, 3, 2, 3)
    others.append(torch.tensor([3, 1]))
    compiled = torch.compile(transport, fullgraph=True, dynamic=True, backend="aot_eager")
    for eps, dustbin in ((0.1, 0.3), (0.2, 0.4)):
        assert torch.allclose(compiled(mid, eps, dustbin), transport(mid, eps, dustbin))


def _under_a_default_device():
    with torch.device("cpu"):
        scaled(torch.ones(3), 2.0)


def _traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda x: scaled(x, 2.0), torch.ones(3), check_trace=False)


def _with_a_tangent():
    with forward_ad.dual_level():
        scaled(torch.ones(3), 2.0)


def _with_gradients_of_a_batch():
    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(x * 1, x, torch.ones(2, 3), is_grads_batched=True)
    y = _Doubled.apply(x)
    torch.autograd.grad(y, x, torch.ones(2, 3), is_grads_batched=True)


def _with_an_argument_less():
    with pytest.raises(RuntimeError, match="factor"):
        scaled(torch.ones(3))


def _left_by_a_transform():
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(torch.ones(3))
    scaled(*left, 2.0)


class _Doubled(torch.autograd.Function):
    """Its backward is an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        return scaled(gradients[0], 2.0)


LOOKED_ON = {
    "a default device": _under_a_default_device,
    "a trace": _traced,
    "a vmap": lambda: torch.func.vmap(lambda x: scaled(x, 2.0))(torch.ones(2, 3)),
    "a tangent": _with_a_tangent,
    "a tensor that a transform left": _left_by_a_transform,
    "gradients of a batch": _with_gradients_of_a_batch,
    "no values": lambda: scaled(torch.ones(3, device="meta"), 2.0),
    "a negative view": lambda: scaled(torch._neg_view(torch.ones(3)), 2.0),
    "an argument less": _with_an_argument_less,
}


@pytest.mark.parametrize("name", LOOKED_ON)
def test_where_somebody_looks_on_pytorch_is_asked(monkeypatch, name):
    asked, registered = [], scaled._registered

    def ask(*arguments: Any) -> Any:
        asked.append(arguments)
        return registered(*arguments)

    monkeypatch.setattr(scaled, "_registered", ask)
    LOOKED_ON[name]()
    assert asked


@pytest.mark.parametrize("form", [lambda x: scaled(x, 2.0), lambda x: sinkhorn(x, eps=0.2, iterations=2).plan_BNM])
def test_forward_derivatives_are_refused(form):
    x = torch.ones(1, 2, 3)
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="has derivatives by backward only"):
        # PyTorch prepares the first of them with what it has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(form, (x,), (x,))


def test_tensors_without_values_get_the_shapes_that_were_registered():
    assert scaled(torch.ones(3, device="meta"), 2.0).shape == (3,)
    with torch._subclasses.FakeTensorMode() as mode:
        assert scaled(mode.from_tensor(torch.ones(4)), 2.0).shape == (4,)


@pytest.mark.parametrize("case", [_matching, _transport, _attention, _residual])
def test_a_second_derivative_is_refused(case):
    outputs, inputs = case()
    total = next(iter(outputs)).sum()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradients = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
        (total + sum(g.square().sum() for g in gradients if g is not None)).backward()


def test_nothing_is_made_for_gradients_that_nobody_has_or_reads():
    (plan, *_), inputs = _transport()
    with Seen() as seen:
        torch.autograd.grad(plan, inputs, torch.ones_like(plan))
    # the upstream gradients of both slacks, which the kernel reads, and no sum for the dustbin, which is a number
    assert [name for name in seen.names if "zeros" in name or "sum" in name] == ["aten.new_zeros.default"] * 2


@pytest.mark.parametrize("value", [2, True, numpy.float32(2.0)], ids=lambda value: type(value).__name__)
def test_numbers_reach_the_function_as_it_declares_them(value):
    seen = []

    @operator(f"ridgeline_tests::seen_{type(value).__name__}")
    def see(x: torch.Tensor, factor: float) -> torch.Tensor:
        seen.append(factor)
        return x.mul(factor)

    see.register_fake(lambda x, factor: torch.empty_like(x))
    see(torch.ones(3), value)
    see(torch.ones(3), float(value))
    assert [type(factor) for factor in seen] == [float, float]


def test_a_view_with_the_negative_bit_is_read_as_what_it_is():
    x = torch.arange(4.0)
    assert count_of_positive(torch._neg_view(x)) == 0
    assert count_of_positive(x) == 3


def test_a_node_of_the_graph_has_the_name_of_its_operator():
    assert "scaled" in type(scaled(torch.ones(3, requires_grad=True), 2.0).grad_fn).__name__
    assert repr(scaled) == "Operator('ridgeline_tests::scaled')"


def test_a_gradient_that_was_not_registered_is_refused():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError):
        count(x).backward()


def test_writes_to_an_argument_are_counted():
    x = torch.ones(3)
    version = x._version
    increment(x)
    assert x.tolist() == [2.0] * 3 and x._version > version


def test_lists_of_tensors_are_looked_into():
    tensors = [torch.arange(6).view(3, 2), torch.arange(3.0)]
    with torch._subclasses.FakeTensorMode() as mode:
        *fakes, index = (mode.from_tensor(tensor) for tensor in (*tensors, torch.tensor([2, 0])))
    gathered = _gather_rows(fakes, index)
    assert [tuple(tensor.shape) for tensor in gathered] == [(2, 2), (2,)]


def test_kernels_run_with_the_gpu_of_their_tensors_as_the_current_one(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    dispatch.on(torch.device("cuda", 1))
    dispatch.on(torch.device("cuda", 0))
    dispatch.on(torch.device("cpu"))
    assert entered == [torch.device("cuda", 1)]
    devices = []
    monkeypatch.setattr("kernels.registration.on", lambda device: devices.append(device) or dispatch.on(device))
    scaled(torch.ones(3), 2.0)
    torch.ops.ridgeline_tests.scaled(torch.ones(3), 2.0)
    assert devices == [torch.device("cpu")] * 2
