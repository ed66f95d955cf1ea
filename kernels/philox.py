"""Philox-4x32-10: random numbers as a pure function of a seed and four counters. There is no state anywhere.

    key = 64-bit seed;  c0 = element of the scene // 8,  c1 = place,  c2 = step,  c3 = scene

The eager form computes with int64 tensors that hold 32-bit words: products wrap, their low and high words are right.
It equals `tl.philox` bit for bit, on every device. Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3
(SC 2011); the Random123 test vectors are in the tests.
"""

import hashlib
import math
from collections.abc import Sequence
from enum import IntEnum

import torch

from kernels.dispatch import require_tensors, resolve, values_are_readable
from kernels.philox_triton import philox_words

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10
# counters computed at a time: the ten temporaries of a round stay in the cache
_CHUNK = 1 << 16


class Place(IntEnum):
    """The second counter: who draws. Every use has its own number, so no two uses share a random number."""

    INITIALISATION = 1
    EPOCH_ORDER = 2
    AUGMENTATION = 3
    # a model's dropouts count up from here
    DROPOUT = 1024


Counter = torch.Tensor | int


def philox_4x32(
    c0: Counter, c1: Counter, c2: Counter, c3: Counter, *, seed: int, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four 32-bit words of Philox-4x32-10.

    Args:
        c0, c1, c2, c3: counters; int64 tensors that broadcast together, or ints, with values in [0, 2^32).
        seed: the key, in [0, 2^64).
        impl: "auto", "eager" or "triton", see `kernels.dispatch`; the same words.
    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32), on the counters' device.
    Raises:
        ValueError: the seed or a counter is out of range, where values may be read, or a counter is of another type.
    Determinism: exact integer arithmetic; the same words on every device.
    """
    counters = (c0, c1, c2, c3)
    check_key_and_counters(seed, **{f"c{i}": counter for i, counter in enumerate(counters)})
    tensors = [c for c in counters if isinstance(c, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    if resolve(impl, device) == "triton":
        return philox_words(counters, shape, seed, device)
    words = torch.empty(4, *shape, dtype=torch.int64, device=device)
    _fill(words.unbind(0), [_as_tensor(c, device) for c in counters], seed)
    w0, w1, w2, w3 = words.bitwise_and_(_WORD).unbind(0)
    return w0, w1, w2, w3


def check_key_and_counters(seed: int, **counters: Counter) -> None:
    """Refuse a seed that is no int of 64 bits, and counters that are no words of 32 bits."""
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an int in [0, 2^64), got {seed!r}")
    for name, counter in counters.items():
        if isinstance(counter, torch.Tensor):
            if counter.dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {counter.dtype}")
            if counter.numel() and values_are_readable(counter):
                low, high = (int(value) for value in counter.aminmax())
                if low < 0 or high > _WORD:
                    raise ValueError(f"{name} must be in [0, 2^32), got {low} to {high}")
        elif not isinstance(counter, int) or not 0 <= counter <= _WORD:
            raise ValueError(f"{name} must be an int in [0, 2^32), got {counter!r}")


def _as_tensor(counter: Counter, device: torch.device) -> torch.Tensor:
    # filled on the device: a copy from the host could not be recorded into a CUDA graph
    return counter if isinstance(counter, torch.Tensor) else torch.full((), counter, dtype=torch.int64, device=device)


def _fill(words: Sequence[torch.Tensor], counters: Sequence[torch.Tensor], seed: int) -> None:
    """Fill the four words, tensors of the broadcast shape: their low 32 bits are right."""
    shape = words[0].shape or (1,)
    words = [w.reshape(shape) if w.dim() == 0 else w for w in words]
    counters = [c[(None,) * (len(shape) - c.dim())] for c in counters]
    length = max(1, _CHUNK * shape[-1] // max(1, words[0].numel()))
    for start in range(0, shape[-1], length):
        part = slice(start, start + length)
        # counters are not expanded: the first rounds are cheap where only some of them vary
        values = _rounds(*(c[..., part] if c.shape[-1] > 1 else c for c in counters), seed)
        for word, value in zip(words, values, strict=True):
            word[..., part] = value


def _rounds(c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, seed: int):
    """Return words whose low 32 bits are right."""
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        x, y = c0 * _M0, c2 * _M1
        c0 = ((y >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = ((x >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = y, x
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def unit_interval(word: torch.Tensor) -> torch.Tensor:
    """Map 32-bit words to float32 in [0, 1): their upper 24 bits, exactly."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def name_key(name: str) -> int:
    """A 32-bit counter for a name: the first 4 bytes of its SHA-256, little endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def named_words(name: str, count: int, *, seed: int) -> torch.Tensor:
    """Words for initialising the tensor called `name`: int64 [4, ceil(count / 4)] on the CPU."""
    element = torch.arange(-(-count // 4))
    return torch.stack(philox_4x32(element, Place.INITIALISATION, 0, name_key(name), seed=seed))


def named_uniform(name: str, shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Draw float32 in [0, 1) for the tensor called `name`, on the CPU."""
    count = math.prod(shape)
    return unit_interval(named_words(name, count, seed=seed).T.reshape(-1)[:count]).reshape(shape)


def named_normal(name: str, shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Draw float32 N(0, 1) for the tensor called `name`, on the CPU.

    Box-Muller in float64, rounded once, so that a last-bit difference of a libm does not reach the result.
    """
    count = math.prod(shape)
    word = named_words(name, 2 * count, seed=seed).reshape(2, -1)[:, :count].to(torch.float64)
    radius = torch.sqrt(-2 * torch.log((word[0] + 0.5) * 2.0**-32))
    return (radius * torch.cos(2 * math.pi * (word[1] * 2.0**-32))).to(torch.float32).reshape(shape)


def dropout_keep(
    shape: tuple[int, ...], rate: float, *, seed: int, step: Counter, scene_B: torch.Tensor, place: int
) -> torch.Tensor:
    """Return which elements a dropout keeps: bool of `shape`, whose first axis is the batch.

    Element e of a scene takes the 16-bit lane e % 8 (low half of word 0 first) of counter e // 8 and is kept if the
    lane is at least round(65536 rate): integers are compared, nothing is rounded.

    Args:
        shape: [B, ...].
        rate: probability of dropping, in [0, 1).
        seed, step, scene_B, place: key and counters; scene_B is int64 [B], step an int or an int64 tensor of one
            element. Counters are in [0, 2^32).
    Raises:
        ValueError: rate, seed or a counter out of range or of another type, or not one entry of scene_B per item.
    Determinism: an element's fate depends on its scene, its place in it and the step; not on the batch.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    require_tensors(scene=scene_B)
    if scene_B.shape != shape[:1]:
        raise ValueError(f"scene must be [B] with B = {shape[0]}, got shape {tuple(scene_B.shape)}")
    check_key_and_counters(seed, step=step, scene=scene_B, place=place)
    if isinstance(step, torch.Tensor):
        if step.numel() != 1:
            raise ValueError(f"step must be one element, got shape {tuple(step.shape)}")
        step = step.reshape(())
    threshold, count, device = round(65536 * rate), math.prod(shape[1:]), scene_B.device
    if threshold == 0:
        return torch.ones(shape, dtype=torch.bool, device=device)
    element = torch.arange(-(-count // 8), device=device)
    counters = [_as_tensor(c, device) for c in (element, place, step, scene_B[:, None])]
    words = torch.empty(shape[0], len(element), 4, dtype=torch.int32, device=device)
    _fill(words.unbind(2), counters, seed)
    # as signed numbers, 16-bit lanes have the order of the unsigned ones once their highest bit is turned
    lanes = words.view(torch.int16).bitwise_xor_(-0x8000).flatten(1)[:, :count]
    return (lanes > threshold - 1 - 0x8000).view(shape)


def dropout(
    x: torch.Tensor, rate: float, *, seed: int, step: Counter, scene_B: torch.Tensor, place: int
) -> torch.Tensor:
    """Zero elements of x [B, ...] with probability `rate` and scale the rest by 1 / (1 - rate).

    See `dropout_keep` for the arguments, errors and determinism. The scaling is done in float32.
    """
    require_tensors(x=x)
    if rate == 0:
        return x
    keep = dropout_keep(tuple(x.shape), rate, seed=seed, step=step, scene_B=scene_B, place=place)
    # all bits or none: a product would keep NaN, and `where` is several times slower on a CPU
    return _Dropout.apply(x, -keep.to(torch.int32), 1 / (1 - rate))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits, scale):
        ctx.bits, ctx.scale = bits, scale
        return _scaled(x, bits, scale)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return _Dropout.apply(grad_outputs[0], ctx.bits, ctx.scale), None, None


def _scaled(x: torch.Tensor, bits: torch.Tensor, scale: float) -> torch.Tensor:
    y = (x.float() * scale).contiguous().view(torch.int32).bitwise_and_(bits).view(torch.float32)
    # PyTorch 2.11 compiles to zeros the gradient of an autograd function that ends in what returns its argument itself:
    # a `to` or `contiguous` without effect, an operation in place
    return y if x.dtype == y.dtype else y.to(x.dtype)
