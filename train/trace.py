"""The trace of a run: what each update computed, as bits, and digests of the state that depend on every bit of it.

trace.jsonl holds one JSON object a line, deterministic values only, floats as `float.hex()`:

    {"kind": "start", "step": 0, "stage": 1, "from": null, "state": DIGEST}     before the first update
    {"kind": "step", "step": 7, "stage": 1, "loss": "0x1.8p-1", ..., "grad_norm": ..., "lr": ..., "state": DIGEST}
    {"kind": "tensors", "step": 500, "stage": 1, "digests": {NAME: DIGEST}}     at scheduled checkpoints

"state" is there every `trace_every` updates and where a certificate needs it. Values stay on the device until
`Trace.flush`, so that tracing does not make the device wait.

A digest is computed over tensors as 32-bit words, row-major, each tensor padded with zeros to whole words, one after
the other. Row r of 2^14 words (the last one padded with zeros) has two sums, in wrap-around 64-bit integers:

    sum[r, lane] = sum_j multiplier[lane, j] * word[r, j]  mod 2^64,    digest = SHA-256(header, sum)[:16 bytes]

where the header lists names, types and shapes, and the multipliers are odd and come from Philox. Integer sums are exact
in any order, so the digest is the same on every device, for every layout in memory.

Why different tensors get different digests: two words differ by less than 2^32, and an odd multiplier is invertible
mod 2^64, so one changed word in a row always changes the row's sums. Where several changed, fix all multipliers of a
lane but one: its word changed by 2^t times an odd number, t < 32, and the sum stays the same for one value of the
multiplier mod 2^(64 - t) at most, which is 1 of at least 2^32 odd ones. Both lanes miss with probability 2^-64 at most;
nothing else is lost before SHA-256. The multipliers are public: this finds accidents. Whoever fears forgers has the
SHA-256 of `train.checkpoint.tensors_digest`.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from kernels.philox import philox_4x32
from train.config import Recipe
from train.step import StepResult

# a certificate is checked by repeating so many updates at the start and before the end of each stage
CHECKED_STEPS = 20
_ROW = 1 << 14
# rows multiplied at a time: the products stay in a CPU's cache, and are few launches on a GPU
_ROWS, _ROWS_ON_GPU = 16, 256
_SEED = int.from_bytes(b"evidence", "big")
_BUFFERS = ("tokenizer.pos_enc.B",)
_LAST_GROUP = "segmenter.conf_head.weight"

Line = dict[str, Any]


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of named tensors in the mapping's order, 32 hexadecimal digits; see the module.

    Args:
        tensors: at least one, all on one device, of any type and layout.
    Determinism: exact integer arithmetic; equal bytes give equal digests on every device.
    """
    return _hash(_header(tensors), _row_sums(tensors.values()))


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the digest of each tensor by itself."""
    sums = {name: _row_sums([tensor]) for name, tensor in tensors.items()}
    return {name: _hash(_header({name: tensors[name]}), sums[name]) for name in tensors}


def state_tensors(model: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name the tensors of a model's and an optimizer's state dict in forward order, weights first.

    Returns:
        Weights under their names; then `optimizer.<weight>.<quantity>`, with the optimizer's number in place of the
        weight where the optimizer is not one of `build_optimizer` for this model.
    """
    # the order in which build_optimizer hands the parameters to AdamW
    weights = [name for name in model if name not in (*_BUFFERS, _LAST_GROUP)] + [_LAST_GROUP]
    moments = optimizer["state"]
    named = dict(enumerate(weights)) if len(weights) == len(moments) else {}
    place = {name: i for i, name in enumerate(model)}
    order = sorted(moments, key=lambda i: place[named[i]] if named else i)
    return dict(model) | {
        f"optimizer.{named.get(i, i)}.{quantity}": value
        for i in order
        for quantity, value in moments[i].items()
        if isinstance(value, torch.Tensor)
    }


def digest_due(recipe: Recipe, step: int) -> bool:
    """Whether the line of an update holds the digest of the state after it: a function of the recipe."""
    ends = {stage.until for stage in recipe.stages}
    return step % recipe.trace_every == 0 or step in ends or step + CHECKED_STEPS in ends or step == CHECKED_STEPS


def tail_of(recipe: Recipe, number: int) -> int:
    """Return the step of stage<k>_tail.pt, from which the end of stage `number` (from 1) is checked."""
    return max(recipe.stages[number - 1].until - CHECKED_STEPS, recipe.start_of(number - 1))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of a line's values as they are computed: terms, their sum, gradient, learning rate, state."""
    last = ["loss", "grad_norm", "lr", "state"]
    return sorted(names, key=lambda name: last.index(name) if name in last else -1)


class Trace:
    """Collects lines on the device; `flush` hands them to `write`, in order."""

    def __init__(self, recipe: Recipe, write: Callable[[Sequence[Line]], None]):
        self._recipe, self._write = recipe, write
        self._pending: list[Callable[[], Line]] = []

    def start(self, step: int, stage: int, origin: Mapping[str, Any] | None, state: Mapping[str, torch.Tensor]) -> None:
        """Note the state before the first update; `origin` is what is known of weights that came from a file."""
        line = {"kind": "start", "step": step, "stage": stage, "from": origin, "state": digest(state)}
        self._pending.append(lambda: line)

    def step(
        self, step: int, stage: int, result: StepResult, lr: float, state: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        """Note an update; `state` is called where a digest of the state after it is due."""
        values = {("loss" if name == "total" else name): x for name, x in result.loss._asdict().items()}
        values["grad_norm"] = result.grad_norm
        numbers = torch.stack([x.detach() for x in values.values()])
        tensors = state() if digest_due(self._recipe, step) else {}
        # the values are overwritten by the next update: their sums are queued before it, their names read now
        header, sums = _header(tensors), _row_sums(tensors.values()) if tensors else None

        def line() -> Line:
            found = {"kind": "step", "step": step, "stage": stage}
            found |= {name: x.hex() for name, x in zip(values, numbers.tolist(), strict=True)}
            return found | {"lr": lr.hex()} | ({} if sums is None else {"state": _hash(header, sums)})

        self._pending.append(line)

    def tensors(self, step: int, stage: int, state: Mapping[str, torch.Tensor]) -> None:
        """Note the digest of each tensor by itself."""
        digests = tensor_digests(state)
        self._pending.append(lambda: {"kind": "tensors", "step": step, "stage": stage, "digests": digests})

    def flush(self) -> None:
        """Write what was noted; waits for the device."""
        lines = [line() for line in self._pending]
        self._pending.clear()
        if lines:
            self._write(lines)


def _row_sums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sums of all rows, int64 [rows, 2], on the tensors' device."""
    words = torch.cat([_words(tensor) for tensor in tensors])
    rows_RW = torch.nn.functional.pad(words, (0, -len(words) % _ROW)).view(-1, _ROW)
    multipliers_LW = _multipliers(rows_RW.device)
    # sum_j multiplier[lane, j] * word[r, j]; int32 words become int64 in the product
    blocks = rows_RW.split(_ROWS_ON_GPU if rows_RW.is_cuda else _ROWS)
    return torch.cat([(block[:, None] * multipliers_LW).sum(dim=-1) for block in blocks])


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, row-major, as int32 words."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.element_size() < 4:
        flat = flat.view(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))
    return flat.view(torch.int32)


@functools.cache
def _multipliers(device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers, int64 [2, row]."""
    word_W, lane_L1 = torch.arange(_ROW, device=device), torch.arange(2, device=device)[:, None]
    high, low, _, _ = philox_4x32(word_W, lane_L1, 0, 0, seed=_SEED)
    return high << 32 | low | 1


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return "".join(f"{name} {x.dtype} {tuple(x.shape)}\n" for name, x in tensors.items()).encode()


def _hash(header: bytes, sums: torch.Tensor) -> str:
    # little endian whatever the machine
    numbers = sums.cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(b"%d\n" % len(header) + header + numbers).hexdigest()[:32]
