"""The order of the rows of an epoch, and which of them make a batch: pure functions of seed, epoch and order_id.

Rows are sorted by a random number of their own, so the relative order of two rows does not depend on which other rows
there are: dropping a bad sample moves nobody past anybody. There is no shuffling state to save.
"""

import functools
import hashlib
from collections.abc import Sequence

import torch

from kernels.philox import Place, philox_4x32

_WORD = 0xFFFFFFFF


def epoch_order(order_ids: Sequence[str], seed: int, epoch: int) -> torch.Tensor:
    """Return the order in which an epoch visits its rows.

        order = argsort of (w0, w1, order_id),  (w0, w1, _, _) = Philox(seed; low(h), high(h), epoch, EPOCH_ORDER)
        h = first 8 bytes of SHA-256(order_id), little endian

    Args:
        order_ids: identifiers of the rows in file order; rows with equal identifiers keep their file order.
        seed: the recipe's seed, in [0, 2^64).
        epoch: 0, 1, ...; counts from 0 in each stage.
    Returns:
        A permutation, int64 [rows] on the CPU.
    Raises:
        ValueError: epoch is outside [0, 2^32).
    Determinism: exact integer arithmetic; the same permutation everywhere.
    """
    if not 0 <= epoch <= _WORD:
        raise ValueError(f"epoch must be in [0, 2^32), got {epoch}")
    low, high, by_name = _counters(tuple(order_ids))
    w0, w1, _, _ = philox_4x32(low, high, epoch, int(Place.EPOCH_ORDER), seed=seed)
    # the sign bit is flipped: signed keys then sort as the unsigned 64-bit number w0 w1
    key = (w0 - (1 << 31)) * (1 << 32) + w1
    return by_name[torch.argsort(key[by_name], stable=True)]


def batches_per_epoch(rows: int, batch: int) -> int:
    """Return floor(rows / batch); the tail of an epoch is dropped.

    Raises:
        ValueError: batch is not positive, or there are fewer rows than one batch takes.
    """
    if not 1 <= batch <= rows:
        raise ValueError(f"batch must be in [1, {rows}], the number of rows, got {batch}")
    return rows // batch


def batch_indices(order: torch.Tensor, step_in_epoch: int, batch: int) -> torch.Tensor:
    """Return the rows of one batch: order[step batch : (step + 1) batch].

    Args:
        order: the epoch's permutation, int64 [rows].
        step_in_epoch: in [0, floor(rows / batch)).
        batch: rows per batch.
    Raises:
        ValueError: the step lies outside the epoch, or the batch is larger than the set.
    """
    steps = batches_per_epoch(len(order), batch)
    if not 0 <= step_in_epoch < steps:
        raise ValueError(f"step_in_epoch must be in [0, {steps}), got {step_in_epoch}")
    return order[step_in_epoch * batch : (step_in_epoch + 1) * batch]


@functools.lru_cache(maxsize=4)
def _counters(order_ids: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Low and high word of the hash of each order_id, and the rows sorted by order_id; the same in every epoch."""
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") for name in order_ids]
    by_name = sorted(range(len(order_ids)), key=order_ids.__getitem__)
    return (
        torch.tensor([h & _WORD for h in hashes], dtype=torch.int64),
        torch.tensor([h >> 32 for h in hashes], dtype=torch.int64),
        torch.tensor(by_name, dtype=torch.int64),
    )
