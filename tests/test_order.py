import hashlib

import pytest
import torch

from kernels.philox import Place, philox_4x32
from train import order
from train.order import batch_indices, batches_per_epoch, epoch_order

NAMES = [f"row-{i}" for i in range(300)]


def visited(names: list[str], seed: int = 353, epoch: int = 0) -> list[str]:
    return [names[i] for i in epoch_order(names, seed, epoch)]


def test_order_is_a_permutation():
    permutation = epoch_order(NAMES, 353, 0)
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(300))


def test_order_sorts_by_the_philox_words_of_the_hashed_order_id():
    def key(name: str) -> tuple[int, int]:
        h = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        low, high = torch.tensor(h % 2**32), torch.tensor(h // 2**32)
        words = philox_4x32(low, high, 5, int(Place.EPOCH_ORDER), seed=353)
        return int(words[0]), int(words[1])

    assert visited(NAMES, epoch=5) == sorted(NAMES, key=key)


def test_order_never_changes():
    assert visited(["a", "b", "c", "d", "e", "f"], seed=353, epoch=0) == ["c", "e", "b", "a", "f", "d"]


def test_dropping_rows_leaves_the_relative_order_of_the_others():
    dropped = {"row-17", "row-200"}
    rest = [name for name in NAMES if name not in dropped]
    assert visited(rest) == [name for name in visited(NAMES) if name not in dropped]


def test_order_does_not_depend_on_the_order_of_the_file():
    assert visited(NAMES[::-1]) == visited(NAMES)


def test_rows_of_one_name_keep_their_file_order():
    rows = epoch_order(["a", "b", "a", "c", "a"], 353, 0).tolist()
    assert [i for i in rows if i in (0, 2, 4)] == [0, 2, 4]


def test_rows_with_equal_words_are_visited_by_name(monkeypatch):
    zeros = torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(order, "philox_4x32", lambda *counters, seed: (zeros, zeros, zeros, zeros))
    assert visited(["d", "b", "c", "a"]) == ["a", "b", "c", "d"]


def test_words_sort_as_unsigned_numbers(monkeypatch):
    w0 = torch.tensor([2**32 - 1, 0, 2**31, 2**31 - 1, 0])
    w1 = torch.tensor([0, 2**32 - 1, 5, 7, 1])
    monkeypatch.setattr(order, "philox_4x32", lambda *counters, seed: (w0, w1, w0, w1))
    assert epoch_order(["a", "b", "c", "d", "e"], 353, 0).tolist() == [4, 1, 3, 2, 0]


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 354}, {"seed": 353 + 2**32}])
def test_epochs_and_seeds_differ(other):
    same = sum(a == b for a, b in zip(visited(NAMES), visited(NAMES, **other), strict=True))
    assert same < 10


def test_batches_cut_the_epoch_without_its_tail():
    permutation = epoch_order(NAMES, 353, 0)
    batches = [batch_indices(permutation, step, 64) for step in range(batches_per_epoch(300, 64))]
    assert torch.equal(torch.cat(batches), permutation[:256])


@pytest.mark.parametrize("step", [-1, 4])
def test_step_outside_of_the_epoch_is_refused(step):
    with pytest.raises(ValueError, match=r"step_in_epoch must be in \[0, 4\), got"):
        batch_indices(torch.arange(300), step, 64)


@pytest.mark.parametrize("batch", [0, 301])
def test_batch_that_no_epoch_has_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch must be in \[1, 300\]"):
        batches_per_epoch(300, batch)


@pytest.mark.parametrize("epoch", [-1, 2**32])
def test_epoch_that_is_no_counter_is_refused(epoch):
    with pytest.raises(ValueError, match=r"epoch must be in \[0, 2\^32\)"):
        epoch_order(NAMES, 353, epoch)
