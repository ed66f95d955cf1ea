"""`point_embedding`: how exact it is, what does not count and what is refused, how it is registered, in the model."""

import math

import pytest
import torch

from kernels import points_backward
from kernels.points import point_embedding, point_embedding_reference
from kernels.points_eager import folded_features, point_features
from kernels.points_forward import point_features_triton, point_layers_forward
from kernels.points_weights import FirstLayer, fold_weights
from perceiver.model import Perceiver, PerceiverConfig
from tests.accuracy import assert_accurate
from tests.small_models import SMALL, small_batch, stirred

FORMS = ("eager", "triton")
TABLES = {"label": (13, 16), "source": (2, 2), "behind": (29, 8)}


def problem(B=2, T=50, J=40, C=24, *, votes=True, F=32, seed=0):
    """Return points, weights and an upstream gradient; every weight but the frequencies has a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    indices = [torch.randint(classes, (B, T), generator=generator).byte() for classes, _ in TABLES.values()]
    points = [normal(B, T, 3), *indices, *([normal(B, T, 2)] if votes else [])]
    K = 3 + 2 * F + sum(width for _, width in TABLES.values()) + 2 * votes
    weights = {"frequencies_F3": 3 * normal(F, 3)}
    weights |= {f"{name}_table": normal(*shape) for name, shape in TABLES.items()}
    weights |= {"weight1": normal(J, K) / K**0.5, "bias1": normal(J)}
    weights |= {"weight2": normal(C, J) / J**0.5, "bias2": normal(C), "gain": 1 + 0.3 * normal(C)}
    return points, weights, normal(B, T, C)


def run(function, tensors, *, dtype=torch.float32, device="cpu", **options):
    """Return the memory and the gradients of all weights by name, computed in `dtype`."""
    points, weights, dmemory = tensors
    points = [x.to(device, dtype if x.is_floating_point() else None) for x in points]
    weights = {name: x.detach().to(device, dtype) for name, x in weights.items()}
    leaves = [x.requires_grad_() for name, x in weights.items() if name != "frequencies_F3"]
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    memory = function(*points, **weights, **options)
    gradients = torch.autograd.grad(memory, leaves, dmemory.to(memory))
    return {"memory": memory.detach(), **dict(zip(list(weights)[1:], gradients, strict=True))}


def place(impl, device):
    return "cpu" if impl == "eager" else device


def same_bits(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    "sizes, counts",
    [
        ({"T": 50}, [50, 17]),
        ({"T": 40, "B": 1, "votes": False}, None),
        ({"T": 20, "J": 30, "C": 16, "F": 5}, [0, 20]),
    ],
    ids=["ragged", "without votes", "another width"],
)
def test_memory_and_gradients_are_as_close_to_float64_as_eager(sizes, counts, impl, device):
    tensors = problem(**sizes)
    options = {} if counts is None else {"point_count_B": torch.tensor(counts)}
    truth = run(point_embedding_reference, tensors, dtype=torch.float64, **options)
    eager = run(point_embedding_reference, tensors, **options)
    found = run(point_embedding, tensors, device=place(impl, device), precision="ieee", impl=impl, **options)
    for name, x in found.items():
        assert_accurate(x, truth=truth[name], eager=eager[name], name=name)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_lower_precisions_err_no_more_than_autocast(precision, device):
    """As `tests.accuracy`, but what errs is eager PyTorch under autocast to bfloat16, not in float32."""
    tensors, counts = problem(seed=1), torch.tensor([50, 31])
    truth = run(point_embedding_reference, tensors, dtype=torch.float64, point_count_B=counts)
    eager = run(point_embedding, tensors, precision="bf16", impl="eager", point_count_B=counts)
    found = run(point_embedding, tensors, device=device, precision=precision, impl="triton", point_count_B=counts)
    assert found["memory"].dtype == {"bf16": torch.bfloat16, "tf32": torch.float32}[precision]
    for name, x in found.items():
        eps = torch.finfo(torch.bfloat16).eps if name == "memory" else 0
        allowed = 2 * (eager[name] - truth[name]).abs().max() + eps * truth[name].abs().max()
        assert (x.cpu() - truth[name]).abs().max() <= allowed, name


def test_features_of_the_kernels_are_those_of_pytorch_with_one_hots(device):
    points, weights, _ = problem()
    tables = {name: x for name, x in weights.items() if name.endswith(("_table", "_F3"))}
    identity = tables | {f"{name}_table": torch.eye(classes) for name, (classes, _) in TABLES.items()}
    wanted = {dtype: point_features(*points, **identity).to(dtype) for dtype in (torch.float32, torch.float64)}
    truth = point_features(
        *(x.double() if x.is_floating_point() else x for x in points),
        **{name: x.double() for name, x in identity.items()},
    )
    classes = [classes for classes, _ in TABLES.values()]
    on = [x.to(device) for x in (*points, weights["frequencies_F3"])]
    columns = point_features_triton(*on, None, classes, torch.float32).cpu()
    columns = torch.cat([columns[:, 64:67], columns[:, :64], columns[:, 67:]], dim=1)
    K = truth.shape[-1]
    assert_accurate(columns[:100, :K], truth=truth.reshape(100, K), eager=wanted[torch.float32].reshape(100, K))
    assert columns.shape == (128, 128)
    assert (columns[:100, -1] == 1).all()
    assert not columns[:100, K:-1].any()
    assert not columns[100:].any()


def test_gradients_over_several_segments_are_those_of_float64(monkeypatch, device):
    monkeypatch.setattr(points_backward, "SEGMENT", 64)
    tensors, counts = problem(B=2, T=80, J=16, C=16, F=1), torch.tensor([50, 80])
    truth = run(point_embedding_reference, tensors, dtype=torch.float64, point_count_B=counts)
    eager = run(point_embedding_reference, tensors, point_count_B=counts)
    found = run(point_embedding, tensors, device=device, precision="ieee", impl="triton", point_count_B=counts)
    for name, x in found.items():
        assert_accurate(x, truth=truth[name], eager=eager[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_folded_in_float32_and_rounded_once(dtype, device):
    points, weights, _ = problem(T=1, J=20, F=5)
    names = ("weight1", "bias1", "label_table", "source_table", "behind_table")
    first, weight2 = FirstLayer(*(weights[name] for name in names)), weights["weight2"]
    features = torch.empty(0, 128, dtype=dtype, device=device)
    on = FirstLayer(*(x.to(device) for x in first)), weight2.to(device)
    folded1, folded2 = (x.cpu() for x in fold_weights(features, *on, 5, "ieee"))
    tables = [x.double() for x in (weights["frequencies_F3"], *first.tables)]
    _, truth = folded_features([x.double() if x.is_floating_point() else x for x in points], tables, first[0].double())
    truth = torch.cat([truth[:, 3:13], truth[:, :3], truth[:, 13:]], dim=1)
    K = truth.shape[1]
    allowed = torch.finfo(dtype).eps / 2 * truth.abs() + 2e-6
    assert ((folded1[:20, :K] - truth).abs() <= allowed).all()
    assert torch.equal(folded1[:20, -1], first.bias1.to(dtype))
    assert torch.equal(folded2[:20, :24], weight2.T.to(dtype))
    assert not folded1[:20, K:-1].any()
    assert not folded1[20:].any()
    assert not folded2[20:].any()
    assert not folded2[:, 24:].any()


def test_gradients_may_be_scaled_in_place_one_by_one(device):
    """As clipping does: none is a view of another, although some share a buffer."""
    points, weights, dmemory = problem(T=20, J=16, C=16)
    weights = {name: x.to(device).requires_grad_(name != "frequencies_F3") for name, x in weights.items()}
    memory = point_embedding(*(x.to(device) for x in points), **weights, impl="triton")
    memory.backward(dmemory.to(device))
    gradients = [x.grad for x in weights.values() if x.requires_grad]
    before = [x.clone() for x in gradients]
    for x in gradients:
        assert x.is_contiguous()
        x.mul_(2)
    assert all(torch.equal(x, 2 * y) for x, y in zip(gradients, before, strict=True))


def test_gradcheck_in_float64():
    points, weights, _ = problem(1, 3, 4, 3, F=2)
    points = [x.double() if x.is_floating_point() else x for x in points]
    names, values = zip(*weights.items(), strict=True)
    frequencies, *leaves = (x.double() for x in values)

    def call(*leaves):
        weights = dict(zip(names, (frequencies, *leaves), strict=True))
        return point_embedding(*points, **weights, point_count_B=torch.tensor([2]))

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves], fast_mode=True)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_points_that_do_not_count_has_no_effect(garbage, impl, device):
    points, weights, dmemory = problem()
    counts = torch.tensor([50, 17])
    absent_BT = torch.arange(50) >= counts[:, None]
    dirty = [
        x.masked_fill(absent_BT[..., None], garbage) if x.dim() == 3 else x.masked_fill(absent_BT, 255) for x in points
    ]
    dirty_gradient = dmemory.masked_fill(absent_BT[..., None], garbage)
    options = {"device": place(impl, device), "point_count_B": counts, "precision": "bf16", "impl": impl}
    clean = run(point_embedding, (points, weights, dmemory), **options)
    found = run(point_embedding, (dirty, weights, dirty_gradient), **options)
    assert same_bits(clean, found)
    assert not clean["memory"][absent_BT.to(clean["memory"].device)].any()


@pytest.mark.parametrize("impl", FORMS)
def test_nan_in_a_valid_point_reaches_that_point_only(impl, device):
    points, weights, dmemory = problem()
    points[0][1, 3, 1] = math.nan
    memory = run(point_embedding, (points, weights, dmemory), device=place(impl, device), impl=impl)["memory"]
    assert memory[1, 3].isnan().all()
    assert memory.isnan().sum() == memory.shape[-1]


def test_bits_of_a_point_do_not_depend_on_the_batch_its_neighbours_or_padding(device):
    points, weights, _ = problem(B=3, T=70)
    points, weights = [x.to(device) for x in points], {name: x.to(device) for name, x in weights.items()}

    def embed(points, counts=None):
        counts = None if counts is None else torch.tensor(counts, device=device)
        return point_embedding(*points, **weights, point_count_B=counts, precision="bf16", impl="triton")

    memory = embed(points)
    assert torch.equal(embed([x[1:2, 5:6] for x in points])[0, 0], memory[1, 5])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(embed([x[:, order] for x in points]), memory[:, order])
    assert torch.equal(embed(points, [70, 40, 0])[1, :40], memory[1, :40])


@pytest.mark.parametrize("impl", FORMS)
def test_a_call_repeats_bit_for_bit(impl, device):
    options = {"device": place(impl, device), "precision": "bf16", "impl": impl}
    first, second = (run(point_embedding, problem(), point_count_B=torch.tensor([50, 9]), **options) for _ in "12")
    assert same_bits(first, second)


def test_strides_and_kinds_of_integers_change_no_bits(device):
    points, weights, dmemory = problem()
    options = {"device": device, "precision": "bf16", "impl": "triton"}
    dense = run(point_embedding, (points, weights, dmemory), point_count_B=torch.tensor([50, 9]), **options)
    *strided, dmemory = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (*points, dmemory))
    strided = [x if x.is_floating_point() else x.long() for x in strided]
    counts = torch.tensor([50, 9], dtype=torch.int32)
    assert same_bits(dense, run(point_embedding, (strided, weights, dmemory), point_count_B=counts, **options))


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}], ids=["B", "T"])
def test_no_points_give_no_memory_and_zero_gradients(sizes, impl, device):
    found = run(point_embedding, problem(**sizes), device=place(impl, device), impl=impl)
    assert found.pop("memory").numel() == 0
    assert all(not x.any() for x in found.values())


@pytest.mark.parametrize("impl", FORMS)
def test_an_index_outside_of_its_table_reads_zeros(impl, device):
    points, weights, _ = problem()
    on = place(impl, device)
    points, weights = [x.to(on) for x in points], {name: x.to(on) for name, x in weights.items()}
    points[1][:] = 200
    found = point_embedding(*points, **weights, precision="ieee", impl=impl)
    points[1][:], weights["label_table"] = 0, torch.zeros_like(weights["label_table"])
    assert torch.equal(found, point_embedding(*points, **weights, precision="ieee", impl=impl))


def test_narrow_indices_mean_what_wide_ones_do_beyond_their_range():
    points, weights, _ = problem()
    weights["label_table"] = torch.randn(300, 16)
    wide = point_embedding(*(x.long() if i == 1 else x for i, x in enumerate(points)), **weights, impl="eager")
    assert torch.equal(point_embedding(*points, **weights, impl="eager"), wide)


def test_autocast_changes_nothing(device):
    points, weights, _ = problem()
    for impl in FORMS:
        on = torch.device(place(impl, device))
        arguments = [x.to(on) for x in points], {name: x.to(on) for name, x in weights.items()}
        plain = point_embedding(*arguments[0], **arguments[1], precision="ieee", impl=impl)
        with torch.autocast(on.type, torch.bfloat16):
            assert torch.equal(plain, point_embedding(*arguments[0], **arguments[1], precision="ieee", impl=impl))


def test_registration_passes_opcheck(device):
    points, weights, _ = problem(T=30, J=16, C=16)
    counts = torch.tensor([30, 9], device=device)
    points = [x.to(device) for x in points]
    weights = {name: x.to(device) for name, x in weights.items()}
    operators = torch.ops.ridgeline
    arguments = (*points, weights["frequencies_F3"], counts, [13, 2, 29], "bf16")
    torch.library.opcheck(operators.point_features.default, arguments)
    first = [weights[name] for name in ("weight1", "bias1", "label_table", "source_table", "behind_table")]
    layers = [operators.point_features(*arguments), *first, *(weights[name] for name in ("weight2", "bias2", "gain"))]
    differentiable = [layers[0], *(x.clone().requires_grad_() for x in layers[1:])]
    torch.library.opcheck(operators.point_layers_forward.default, (*differentiable, counts, 32, 2, 30, "bf16"))
    memory, *kept = operators.point_layers_forward(*layers, counts, 32, 2, 30, "bf16")
    backward = (memory, layers[0], *first, weights["gain"], *kept, counts, 32, 30, "bf16")
    torch.library.opcheck(operators.point_layers_backward.default, backward)


# the tracer of autograd functions makes an instance of the class
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile_gives_the_bits_of_eager(device):
    compiled = torch.compile(point_embedding, fullgraph=True, backend="aot_eager")
    for impl in FORMS:
        options = {"device": place(impl, device), "point_count_B": torch.tensor([9, 20]), "impl": impl}
        plain, traced = (run(f, problem(T=20, J=16, C=16), **options) for f in (point_embedding, compiled))
        assert same_bits(plain, traced)


def test_eager_is_the_sequence_of_the_models_layers():
    model, batch = stirred(Perceiver(SMALL)), small_batch()
    layers, memory = model.segmenter.input_proj(model.tokenizer(batch)), model._memory(batch, "eager")
    counts = torch.arange(24) < batch.point_count_B[:, None]
    torch.testing.assert_close(memory[counts], layers[counts], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("votes", [True, False])
def test_the_memory_of_the_model_is_that_of_the_kernels(votes, device):
    config = PerceiverConfig(**(vars(SMALL) | {"vote_features": votes}))
    model, batch = stirred(Perceiver(config)).to(device), small_batch().to(device)
    eager, triton = (model._memory(batch, impl) for impl in FORMS)
    torch.testing.assert_close(triton, eager, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(m.square().sum(), list(_memory_weights(model))) for m in (eager, triton)]
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def _memory_weights(model):
    return [*model.tokenizer.parameters(), *model.segmenter.input_proj.parameters()]


def test_a_model_under_autocast_takes_bfloat16_memory_from_the_kernels(device):
    model, batch = stirred(Perceiver(SMALL)).to(device), small_batch().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        assert model._memory(batch, "triton").dtype == torch.bfloat16
    with torch.autocast(device.type, torch.float16), pytest.raises(ValueError, match="autocast must be to bfloat16"):
        model._memory(batch, "eager")


def _call(impl="eager", **changes):
    points, weights, _ = problem()
    names = ("xyz_BT3", "class_id_BT", "source_BT", "behind_BT", "votes_BT2")
    point_embedding(**(dict(zip(names, points, strict=True)) | weights | {"impl": impl} | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"xyz_BT3": torch.zeros(2, 50)}, r"xyz must be \[B, T, 3\], got shape \(2, 50\)"),
        ({"xyz_BT3": torch.zeros(2, 50, 3).half()}, "xyz must be float32 or float64"),
        ({"class_id_BT": torch.zeros(2, 49).byte()}, r"class_id must be \[2, 50\] of integers"),
        ({"source_BT": torch.zeros(2, 50)}, r"source must be \[2, 50\] of integers"),
        ({"behind_BT": torch.zeros(2, 50).bool()}, r"behind must be \[2, 50\] of integers"),
        ({"class_id_BT": torch.zeros(2, 50, dtype=torch.complex64)}, r"class_id must be \[2, 50\] of integers"),
        ({"source_BT": torch.zeros(2, 50, device="meta").byte()}, "source must be on the device of xyz, cpu, got meta"),
        ({"point_count_B": torch.zeros(2, device="meta").int()}, "point_count must be on the device of xyz, cpu"),
        ({"bias1": torch.zeros(())}, r"bias1 must be a vector, got shape \(\)"),
        ({"gain": torch.zeros(())}, r"gain must be a vector, got shape \(\)"),
        ({"votes_BT2": torch.zeros(2, 50, 3)}, r"votes must be \[2, 50, 2\] and floating point"),
        ({"votes_BT2": torch.zeros(2, 50, 2).double()}, "votes must have the dtype and device of xyz"),
        ({"point_count_B": torch.tensor([1.0, 2.0])}, r"point_count must be \[2\] of int32 or int64"),
        ({"point_count_B": torch.tensor([1, 51])}, r"point_count must be in \[0, 50\], got 1 to 51"),
        ({"point_count_B": torch.tensor([-1, 5])}, r"point_count must be in \[0, 50\], got -1 to 5"),
        ({"frequencies_F3": torch.zeros(32, 2)}, r"frequencies must be \[F, 3\]"),
        ({"label_table": torch.zeros(0, 16)}, r"label_table must be \[classes, width\]"),
        ({"label_table": torch.zeros(13, 15)}, r"weight1 must be \[40, 94\]"),
        ({"votes_BT2": None}, r"weight1 must be \[40, 93\]"),
        ({"weight2": torch.zeros(24, 41)}, r"weight2 must be \[24, 40\]"),
        ({"bias2": torch.zeros(23)}, r"bias2 must be \[24\]"),
        ({"gain": torch.zeros(24, device="meta")}, "gain must have the dtype and device of xyz"),
        ({"precision": "fp8"}, "precision must be one of bf16, tf32, ieee, got 'fp8'"),
        ({"impl": "cuda"}, "impl must be one of auto, eager, triton"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"F": 40}, "must be at most 128 for the kernels, got 130"),
        ({"C": 257}, "gain must have at most 256 channels for the kernels, got 257"),
    ],
)
def test_the_kernels_refuse_more_than_they_hold(sizes, message, device):
    with pytest.raises(ValueError, match=message):
        run(point_embedding, problem(**sizes), device=device, impl="triton")


def test_the_kernels_refuse_float64_and_gradients_of_points(device):
    with pytest.raises(ValueError, match="float64 must have impl='eager'"):
        run(point_embedding, problem(), dtype=torch.float64, device=device, impl="triton")
    points, weights, _ = problem()
    points, weights = [x.to(device) for x in points], {name: x.to(device) for name, x in weights.items()}
    points[0].requires_grad_()
    with pytest.raises(ValueError, match="xyz must not require a gradient of the kernels"):
        point_embedding(*points, **weights, impl="triton")


def test_a_block_without_points_that_count_is_zero(device):
    features = torch.zeros(128, 128, device=device)
    weights = [torch.randn(*shape, device=device) for shape in ((32, 128), (32, 16), (16,), (16,))]
    memory, unit, _ = point_layers_forward(features, *weights, 128, "ieee")
    assert not memory.any()
    assert not unit.any()
