"""AdamW with two weight decays, and the learning rate as a function of the step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from perceiver.model import Perceiver


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. conf_head_weight_decay is that of the confidence head's weight; clip bounds the global gradient norm.

    Raises:
        ValueError: a value is out of range.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    conf_head_weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("adam_eps", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "conf_head_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class Schedule(Protocol):
    """What the learning rate needs to know of a stage."""

    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def cooldown_start(self) -> int: ...
    @property
    def cooldown_steps(self) -> int: ...


def learning_rate(step: int, stage: Schedule) -> float:
    """Return lr * min(1, s / warmup) * max(0, 1 - max(0, s - cooldown_start) / cooldown_steps), s = 1, 2, ..."""
    rate = stage.lr
    if stage.warmup:
        rate *= min(1.0, step / stage.warmup)
    if stage.cooldown_steps:
        rate *= max(0.0, 1 - max(0, step - stage.cooldown_start) / stage.cooldown_steps)
    return rate


def build_optimizer(model: Perceiver, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups: everything, and `conf_head.weight` with its own weight decay.

    On a CUDA device the learning rate is a tensor there, so that a recorded update reads it anew at each replay.
    """
    conf_head = model.segmenter.conf_head.weight
    rest = [p for p in model.parameters() if p is not conf_head]
    on_gpu = conf_head.is_cuda
    return torch.optim.AdamW(
        [
            {"params": rest, "weight_decay": config.weight_decay},
            {"params": [conf_head], "weight_decay": config.conf_head_weight_decay},
        ],
        lr=torch.zeros((), device=conf_head.device) if on_gpu else 0.0,
        capturable=on_gpu,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take the moments of a saved state; weight decays, betas and where the learning rate lives stay as they are."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


def clip_gradients(model: Perceiver, limit: float) -> torch.Tensor:
    """Scale the gradients so that their global L2 norm is at most `limit`; return the norm before, a scalar tensor."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True)
