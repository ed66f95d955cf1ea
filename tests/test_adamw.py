"""Norm, clip and AdamW in few launches: against float64, against PyTorch, and what a checkpoint keeps of it."""

import copy
import io
import sys

import pytest
import torch

from kernels.adamw import SEGMENT, UPDATE_TILE, adamw
from tests.accuracy import assert_accurate
from train.optim import ClippedAdamW, clip_and_step, load_optimizer_state, set_learning_rate

# one element, none, odd, a whole tile, a tile and a rest, more than a segment, a matrix
SIZES = ((1,), (0,), (7,), (UPDATE_TILE,), (UPDATE_TILE + 3,), (SEGMENT + UPDATE_TILE + 1,), (5, 12))
DECAYS = (0.01, 0.01, 0.1, 0.0, 0.01, 0.1, 0.01)
LISTS = ("params", "exp_avgs", "exp_avg_sqs", "steps")


def problem(device, dtype=torch.float32) -> dict[str, list[torch.Tensor]]:
    """Parameters, and moments and counts as updates left them."""
    generator = torch.Generator().manual_seed(0)
    lists = {
        "params": [torch.randn(size, generator=generator) for size in SIZES],
        "exp_avgs": [0.1 * torch.randn(size, generator=generator) for size in SIZES],
        "exp_avg_sqs": [0.01 * torch.rand(size, generator=generator) for size in SIZES],
    }
    lists = {name: [x.to(device, dtype) for x in tensors] for name, tensors in lists.items()}
    # some begin, others went on: the corrections are near 0, and near 1
    return lists | {"steps": [torch.tensor(3.0 * i, device=device) for i in range(len(SIZES))]}


def gradients(number: int, device, dtype=torch.float32, scale=1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return [scale * torch.randn(size, generator=generator).to(device, dtype) for size in SIZES]


def updates(device, dtype, impl, *, count=3, scale=1.0, limit=1.0) -> dict[str, list[torch.Tensor]]:
    """All tensors after `count` updates, and the norms."""
    lists, norms = problem(device, dtype), []
    lr = torch.tensor(1e-2, device=device).to(dtype)
    for number in range(count):
        grads = gradients(number, device, dtype, scale)
        norms.append(adamw(lists["params"], grads, *(lists[name] for name in LISTS[1:]), lr=lr, decays=DECAYS,
                           limit=limit, impl=impl))  # fmt: skip
    return lists | {"norm": norms}


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 1.0), (1e-3, 1e3), (0.0, 1.0)], ids=["clipped", "not", "zero"])
def test_several_updates_are_as_close_to_float64_as_eager(scale, limit, device):
    options = {"scale": scale, "limit": limit}
    found = updates(device, torch.float32, "triton", **options)
    truth = updates(torch.device("cpu"), torch.float64, "eager", **options)
    eager = updates(torch.device("cpu"), torch.float32, "eager", **options)
    for name in truth:
        if name == "steps":
            assert found[name] == truth[name]
            continue
        for i, x in enumerate(found[name]):
            if x.numel():
                assert_accurate(x.cpu(), truth=truth[name][i], eager=eager[name][i], name=f"{name}[{i}]")
    assert all((norm > limit) == (scale == 1.0) for norm in found["norm"])


def test_repeats_have_the_same_bits(device):
    first, again = (updates(device, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for name in first for x, y in zip(first[name], again[name], strict=True))


def test_how_tensors_are_cut_into_launches_changes_no_update(device, monkeypatch):
    whole = updates(device, torch.float32, "triton")
    # three tensors, and six gradients, at a time
    monkeypatch.setattr(sys.modules["kernels.adamw"], "ARGUMENT_BYTES", 3 * 4 * 8)
    cut = updates(device, torch.float32, "triton")
    assert all(torch.equal(x, y) for name in whole for x, y in zip(whole[name], cut[name], strict=True))


def test_a_gradient_between_addresses_of_16_bytes_has_the_same_bits(device):
    kept = []
    for shift in (0, 1):
        lists, grads = problem(device), gradients(0, device)
        longer = torch.zeros(grads[5].numel() + shift, device=device)
        longer[shift:] = grads[5]
        grads[5] = longer[shift:]
        moments = (lists[name] for name in LISTS[1:])
        adamw(lists["params"], grads, *moments, lr=torch.tensor(0.1, device=device), decays=DECAYS, limit=1.0,
              impl="triton")  # fmt: skip
        kept.append(lists)
    assert all(torch.equal(x, y) for name in LISTS for x, y in zip(kept[0][name], kept[1][name], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_acts_as_in_pytorch(bad, device):
    lists, grads = problem(device), gradients(0, device)
    grads[6][2, 3] = bad
    moments = [lists[name] for name in LISTS[1:]]
    norm = adamw(lists["params"], grads, *moments, lr=torch.tensor(0.1, device=device), decays=DECAYS, limit=1.0,
                 impl="triton")  # fmt: skip
    kept = [torch.nn.Parameter(x.clone()) for x in problem(device)["params"]]
    for parameter, grad in zip(kept, gradients(0, device), strict=True):
        parameter.grad = grad
    kept[6].grad[2, 3] = bad
    expected = torch.nn.utils.clip_grad_norm_(kept, 1.0)
    assert norm.isnan() == expected.isnan()
    assert norm.isinf() == expected.isinf()
    for x, parameter in zip(lists["params"], kept, strict=True):
        assert torch.equal(x.isnan(), parameter.grad.isnan())


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_the_one_element_of_lr_may_have_any_shape(impl, device):
    kept = []
    for shape in ((), (1,), (1, 1)):
        p, m, v, step, grad = (torch.full((), value, device=device) for value in (1.0, 0.0, 0.0, 0.0, 0.5))
        lr = torch.full(shape, 0.1, device=device)
        adamw([p], [grad], [m], [v], [step], lr=lr, decays=[0.1], limit=1.0, impl=impl)
        kept.append(torch.stack([p, m, v, step]))
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def test_no_parameters_have_the_norm_0(device):
    assert adamw([], [], [], [], [], lr=torch.tensor(0.1, device=device), decays=[], limit=1.0, impl="triton") == 0


@pytest.mark.parametrize("size", [1, 7, UPDATE_TILE])
def test_a_first_moment_without_decay_is_the_clipped_gradient(size, device):
    """beta1 = beta2 = 0: the powers of 0, and p moves by lr in the direction of the gradient."""
    grad = torch.linspace(-2, 3, size + 1, device=device)[1:].contiguous()
    p, m, v = (torch.zeros(size, device=device) for _ in range(3))
    step = torch.zeros(1, device=device)
    norm = adamw([p], [grad], [m], [v], [step], lr=torch.tensor(0.5, device=device), decays=[0.0], limit=1e-2,
                 betas=(0.0, 0.0), eps=1e-12, impl="triton")  # fmt: skip
    torch.testing.assert_close(m, grad * 1e-2 / (norm + 1e-6))
    torch.testing.assert_close(p, -0.5 * grad.sign())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decays": [0.0]}, "decays must be one for each of 2 params, got 1"),
        ({"grads": [torch.zeros(2, 3), torch.zeros(3)]}, r"grads\[1\] must be contiguous with the shape"),
        ({"params": [torch.zeros(3, 2).t(), torch.zeros(4)]}, r"params\[0\] must be contiguous with the shape"),
        ({"exp_avgs": [torch.zeros(2, 3).half(), torch.zeros(4)]}, r"exp_avgs\[0\] must be torch.float32"),
        ({"steps": [torch.zeros(2), torch.zeros(())]}, r"steps\[0\] must be one number of float32"),
        ({"lr": torch.zeros(2)}, "lr must be one number"),
        ({"lr": torch.zeros((), dtype=torch.float16)}, "lr must be one number"),
        ({"decays": [0.0, -1.0]}, r"decays\[1\] must be at least 0"),
        ({"limit": 0.0}, "limit must be positive"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    arguments = {name: [torch.zeros(2, 3), torch.zeros(4)] for name in names}
    arguments |= {"steps": [torch.zeros(()), torch.zeros(())], "lr": torch.tensor(0.1), "decays": [0.0, 0.0]}
    with pytest.raises(ValueError, match=message):
        adamw(**arguments | {"limit": 1.0} | change)


def test_float64_is_refused_where_kernels_run(device):
    lists = [[torch.zeros(3, dtype=torch.float64, device=device)] for _ in range(4)]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64 must have impl='eager'"):
        adamw(*lists, [torch.zeros((), device=device)], lr=lr, decays=[0.0], limit=1.0, impl="triton")


def test_the_operator_is_registered_as_it_acts(device):
    lists = problem(device)
    lists = {name: tensors[2:4] for name, tensors in lists.items()}
    arguments = (lists["params"], gradients(0, device)[2:4], *(lists[name] for name in LISTS[1:]))
    settings = (torch.tensor(0.1, device=device), [0.0, 0.1], 1.0, 0.9, 0.95, 1e-8)
    torch.library.opcheck(torch.ops.ridgeline.adamw.default, (*arguments, *settings))


def parameters(device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in ((5, 3), (7,), (1,))]


def optimizers(device):
    """This one and PyTorch's, over equal parameters."""
    made = []
    for ours in (True, False):
        first, second, third = parameters(device)
        groups = [
            {"params": [first, second], "weight_decay": 0.01},
            {"params": [third], "weight_decay": 0.1},
        ]
        settings = {"betas": (0.9, 0.95), "eps": 1e-8}
        made.append(
            ClippedAdamW(groups, **settings)
            if ours
            else torch.optim.AdamW(groups, lr=torch.zeros((), device=device), fused=True, capturable=True, **settings)
        )
    return made


def all_parameters(optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def one_step(optimizer, number: int, *, without: int | None = None) -> torch.Tensor:
    """An update with gradients of its number; parameter `without` has none."""
    generator = torch.Generator().manual_seed(number)
    for i, p in enumerate(all_parameters(optimizer)):
        grad = torch.randn(p.shape, generator=generator).to(p.device)
        p.grad = None if i == without else grad
    set_learning_rate(optimizer, 0.01 * number)
    model = torch.nn.ParameterList(all_parameters(optimizer))
    return clip_and_step(model, optimizer, 1.0)


def test_it_is_adamw_of_pytorch_with_clipping(device):
    ours, theirs = optimizers(device)
    for number in (1, 2, 3):
        # the one without a gradient is skipped: neither moved nor counted
        norms = [one_step(optimizer, number, without=1 if number == 2 else None) for optimizer in (ours, theirs)]
        torch.testing.assert_close(*norms)
    for p, q in zip(all_parameters(ours), all_parameters(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert ours.state[p]["step"] == theirs.state[q]["step"]
    assert [float(ours.state[p]["step"]) for p in all_parameters(ours)] == [3, 2, 3]


@pytest.mark.parametrize("direction", ["from PyTorch", "to PyTorch"])
def test_a_state_of_pytorch_is_taken_up_and_the_other_way_round(direction, device):
    ours, theirs = optimizers(device)
    source, target = (theirs, ours) if direction == "from PyTorch" else (ours, theirs)
    one_step(source, 1)
    with torch.no_grad():
        for p, q in zip(all_parameters(target), all_parameters(source), strict=True):
            p.copy_(q)
    # a state on the same device is taken as it is, not copied
    load_optimizer_state(target, copy.deepcopy(source.state_dict()))
    for optimizer in (source, target):
        one_step(optimizer, 2)
    for p, q in zip(all_parameters(target), all_parameters(source), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name, x in source.state[q].items():
            torch.testing.assert_close(target.state[p][name], x, rtol=1e-5, atol=1e-7)


def test_saved_loaded_and_continued_is_never_stopped(device):
    never, stopped = (optimizers(device)[0] for _ in range(2))
    for number in (1, 2):
        one_step(never, number)
    one_step(stopped, 1)
    file = io.BytesIO()
    torch.save({"weights": all_parameters(stopped), "optimizer": stopped.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    resumed = optimizers(device)[0]
    with torch.no_grad():
        for p, q in zip(all_parameters(resumed), saved["weights"], strict=True):
            p.copy_(q)
    load_optimizer_state(resumed, saved["optimizer"])
    one_step(resumed, 2)
    for p, q in zip(all_parameters(resumed), all_parameters(never), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(resumed.state[p][name], x) for name, x in never.state[q].items())


def test_groups_must_share_what_the_operator_has_once(device):
    optimizer, _ = optimizers(device)
    optimizer.param_groups[1]["eps"] = 1e-6
    with pytest.raises(ValueError, match="eps must be equal in all groups"):
        optimizer.clip_and_step(1.0)
    optimizer, _ = optimizers(device)
    optimizer.param_groups[1]["lr"] = torch.zeros((), device=device)
    with pytest.raises(ValueError, match="lr must be one tensor"):
        optimizer.clip_and_step(1.0)


@pytest.mark.gpu
def test_a_recorded_update_reads_what_changed(device):
    recorded, launched = (optimizers(device)[0] for _ in range(2))
    for optimizer in (recorded, launched):
        one_step(optimizer, 1)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        norm = recorded.clip_and_step(1.0)
    for number in (2, 3):
        expected = one_step(launched, number)
        set_learning_rate(recorded, 0.01 * number)
        for p, q in zip(all_parameters(recorded), all_parameters(launched), strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        assert torch.equal(norm, expected)
    for p, q in zip(all_parameters(recorded), all_parameters(launched), strict=True):
        assert torch.equal(p, q)
