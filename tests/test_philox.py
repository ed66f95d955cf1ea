"""Philox: the published vectors, independence from the batch, and the statistics of what is built on it."""

import pytest
import torch

from kernels.philox import (
    Counter,
    Place,
    check_key_and_counters,
    dropout,
    dropout_keep,
    named_normal,
    named_uniform,
    philox_4x32,
    unit_interval,
)

# kat_vectors of Random123, philox4x32 with 10 rounds: counters, key, words
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize(("counters", "seed", "words"), VECTORS)
def test_published_vectors(counters, seed, words, impl, device):
    got = philox_4x32(*(torch.tensor([c], device=device) for c in counters), seed=seed, impl=impl)
    assert tuple(int(w) for w in got) == words


def test_both_forms_give_the_same_words_for_numbers_scalars_and_tensors(device):
    element, scene = torch.arange(300, device=device), torch.tensor([[7], [0xFFFFFFF0]], device=device)
    counters = (element, 0xFFFFFFFE, torch.tensor(1 << 31, device=device), scene)
    eager, triton = (philox_4x32(*counters, seed=(1 << 63) + 5, impl=impl) for impl in ("eager", "triton"))
    assert triton[0].shape == (2, 300)
    assert all(torch.equal(a, b) for a, b in zip(eager, triton, strict=True))


def test_counters_may_be_ints_and_broadcast():
    element, scene = torch.arange(5), torch.tensor([7, 9])
    words = philox_4x32(element, 3, 4, scene[:, None], seed=11)
    assert words[0].shape == (2, 5)
    alone = philox_4x32(torch.tensor(2), 3, 4, torch.tensor(9), seed=11)
    assert [int(w) for w in alone] == [int(w[1, 2]) for w in words]


def test_result_does_not_depend_on_the_chunks(monkeypatch):
    whole = philox_4x32(torch.arange(1000), 1, 2, 3, seed=5)
    monkeypatch.setattr("kernels.philox._CHUNK", 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, philox_4x32(torch.arange(1000), 1, 2, 3, seed=5), strict=True))


@pytest.mark.parametrize(("seed", "got"), [(-1, "-1"), (1 << 64, str(1 << 64)), (5.0, r"5\.0"), ("5", "'5'")])
def test_seed_out_of_range_or_of_another_type_is_refused(seed, got):
    with pytest.raises(ValueError, match=rf"seed must be an int in \[0, 2\^64\), got {got}$"):
        philox_4x32(0, 0, 0, 0, seed=seed)


def test_counters_of_another_type_are_refused():
    with pytest.raises(ValueError, match="c0 must be int64"):
        philox_4x32(torch.zeros(3, dtype=torch.int32), 0, 0, 0, seed=0)
    with pytest.raises(ValueError, match="c2 must be an int"):
        philox_4x32(0, 0, 1.5, 0, seed=0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("value", [-1, 1 << 32])
@pytest.mark.parametrize("index", range(4))
def test_counters_out_of_range_are_refused(index, value, impl):
    """The two forms would take other bits of them."""
    counters: list[Counter] = [torch.tensor([1])] * 4
    for counter in (value, torch.tensor([5, value])):
        counters[index] = counter
        with pytest.raises(ValueError, match=rf"c{index} must be (an int )?in \[0, 2\^32\), got"):
            philox_4x32(*counters, seed=0, impl=impl)


def test_values_on_a_gpu_are_not_read(monkeypatch):
    """A tensor for which `values_are_readable` says no stands for one on a GPU."""

    class Read(Exception):
        pass

    def read(tensor):
        raise Read

    counter = torch.tensor([-1])
    monkeypatch.setattr(torch.Tensor, "aminmax", read)
    with pytest.raises(Read):
        check_key_and_counters(0, c0=counter)
    monkeypatch.setattr("kernels.philox.values_are_readable", lambda tensor: False)
    check_key_and_counters(0, c0=counter)


def test_unit_interval_is_exact_at_its_ends():
    assert unit_interval(torch.tensor([0, 0xFFFFFFFF])).tolist() == [0.0, 1 - 2.0**-24]


def test_dropout_of_a_scene_does_not_depend_on_its_batch():
    scenes = torch.tensor([12, 99, 4])
    keys = {"seed": 3, "step": 8, "place": Place.DROPOUT}
    among = dropout_keep((3, 4, 5), 0.3, scene_B=scenes, **keys)
    alone = dropout_keep((1, 4, 5), 0.3, scene_B=scenes[1:2], **keys)
    assert torch.equal(among[1], alone[0])


def test_dropout_changes_with_every_counter():
    base = {"seed": 3, "step": 8, "place": 1024, "scene_B": torch.tensor([5])}
    first = dropout_keep((1, 4096), 0.5, **base)
    for name, value in (("seed", 4), ("step", 9), ("place", 1025), ("scene_B", torch.tensor([6]))):
        other = dropout_keep((1, 4096), 0.5, **{**base, name: value})
        assert 0.45 < (first == other).float().mean() < 0.55, name


def test_dropout_keeps_the_mean_and_the_rate():
    x = torch.ones(4, 100_000)
    y = dropout(x, 0.1, seed=1, step=2, scene_B=torch.arange(4), place=1024)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=2e-3)


def test_dropout_follows_its_definition_lane_by_lane():
    keep = dropout_keep((1, 19), 0.25, seed=9, step=1, scene_B=torch.tensor([2]), place=1024)
    words = torch.stack(philox_4x32(torch.arange(3), 1024, 1, 2, seed=9))
    for element in range(19):
        word = int(words[element % 8 // 2, element // 8])
        lane = word >> 16 if element % 2 else word & 0xFFFF
        assert bool(keep[0, element]) == (lane >= 16384)


def test_dropout_without_a_rate_returns_its_input():
    x = torch.randn(2, 3)
    assert dropout(x, 0.0, seed=0, step=0, scene_B=torch.zeros(2, dtype=torch.int64), place=1024) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_dropout_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="rate must be in"):
        dropout_keep((1, 2), rate, seed=0, step=0, scene_B=torch.zeros(1, dtype=torch.int64), place=1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, r"step must be an int in \[0, 2\^32\), got -1"),
        ({"step": 1 << 32}, r"step must be an int in \[0, 2\^32\)"),
        ({"step": 1.5}, r"step must be an int in \[0, 2\^32\), got 1.5"),
        ({"step": torch.tensor(7, dtype=torch.int32)}, "step must be int64, got torch.int32"),
        ({"step": torch.tensor([7, 8])}, r"step must be one element, got shape \(2,\)"),
        ({"place": -1}, r"place must be an int in \[0, 2\^32\), got -1"),
        ({"scene_B": torch.zeros(2, dtype=torch.int32)}, "scene must be int64, got torch.int32"),
        ({"scene_B": torch.tensor([3, 1 << 32])}, r"scene must be in \[0, 2\^32\), got 3 to 4294967296"),
        ({"scene_B": [3, 4]}, r"scene must be a tensor, got \[3, 4\]"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\^64\), got -1"),
    ],
)
def test_a_dropouts_key_out_of_range_or_of_another_type_is_refused(changes, message):
    arguments = {"seed": 0, "step": 0, "scene_B": torch.zeros(2, dtype=torch.int64), "place": 1024} | changes
    with pytest.raises(ValueError, match=message):
        dropout_keep((2, 8), 0.5, **arguments)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 8), (2, 0), (2, 0, 5), (0, 0)], ids=str)
def test_dropout_of_nothing_is_nothing(shape):
    draws = {"seed": 1, "step": 0, "scene_B": torch.zeros(shape[0], dtype=torch.int64), "place": 1024}
    assert dropout_keep(shape, 0.5, **draws).shape == shape
    assert dropout(torch.zeros(shape), 0.5, **draws).shape == shape


def test_the_gradient_of_a_dropout_is_masked_when_it_is_differentiated_too():
    x, upstream = (torch.ones(2, 48, requires_grad=True) for _ in range(2))
    draws = {"seed": 1, "step": 0, "scene_B": torch.tensor([1, 2]), "place": 1024}
    (grad,) = torch.autograd.grad(dropout(x, 0.5, **draws), x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), upstream)
    assert torch.equal(second, torch.where(dropout_keep((2, 48), 0.5, **draws), 2.0, 0.0))


# PyTorch's own, while it traces an autograd function
@pytest.mark.filterwarnings("ignore:.* should not be instantiated")
def test_dropout_compiles_in_one_graph():
    x = torch.linspace(-2, 3, 96).view(2, 48).requires_grad_()

    def gradient(function):
        y = function(x, 0.5, seed=1, step=torch.tensor(3), scene_B=torch.tensor([1, 2]), place=1024)
        return torch.autograd.grad(y.square().sum(), x)[0]

    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), gradient(dropout))


def test_dropout_needs_a_scene_per_item():
    with pytest.raises(ValueError, match=r"scene must be \[B\] with B = 2, got shape \(1,\)"):
        dropout_keep((2, 2), 0.5, seed=0, step=0, scene_B=torch.zeros(1, dtype=torch.int64), place=1024)


def test_named_draws_have_their_distribution_and_their_own_stream():
    uniform, normal = named_uniform("a", (400, 500), seed=7), named_normal("a", (400, 500), seed=7)
    assert uniform.mean().item() == pytest.approx(0.5, abs=3e-3)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=1e-3)
    assert normal.mean().item() == pytest.approx(0, abs=1e-2)
    assert normal.std().item() == pytest.approx(1, abs=1e-2)
    assert abs(torch.corrcoef(torch.stack([normal.flatten(), named_normal("b", (200_000,), seed=7)]))[0, 1]) < 0.01


def test_named_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    named_normal("weight", (10, 10), seed=1)
    assert torch.equal(before, torch.get_rng_state())
