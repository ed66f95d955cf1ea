"""AdamW with two weight decays, and the learning rate as a function of the step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels.adamw import adamw
from kernels.dispatch import resolve
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


class ClippedAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, its groups and its state, with clipping and update as one operator of `kernels`.

    Its learning rate is a tensor on the device of the parameters, shared by all groups, so that a recorded update reads
    it anew at each replay. `step` is PyTorch's own: it does not clip.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float):
        lr = torch.zeros((), device=groups[0]["params"][0].device)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, capturable=True, fused=True)

    @torch.no_grad()
    def clip_and_step(self, limit: float) -> torch.Tensor:
        """Make an update with the gradients clipped to the global L2 norm `limit`; return the norm before, a scalar.

        Parameters without a gradient are left as they are. The gradients are not rewritten.

        Raises:
            ValueError: groups do not share learning rate, betas and eps; or see `kernels.adamw`.
        """
        first = self.param_groups[0]
        for group in self.param_groups:
            if group["lr"] is not first["lr"] or not isinstance(group["lr"], torch.Tensor):
                raise ValueError(f"lr must be one tensor that all groups share, got {group['lr']} and {first['lr']}")
            for name in ("betas", "eps"):
                if group[name] != first[name]:
                    raise ValueError(f"{name} must be equal in all groups, got {group[name]} and {first[name]}")
        found = [(p, group["weight_decay"]) for group in self.param_groups for p in group["params"]]
        found = [(p, decay) for p, decay in found if p.grad is not None]
        states = [self._state_of(p) for p, _ in found]
        return adamw(
            [p for p, _ in found],
            [p.grad for p, _ in found],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
            lr=first["lr"],
            decays=[decay for _, decay in found],
            limit=limit,
            betas=first["betas"],
            eps=first["eps"],
            impl="triton",
        )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a parameter, as PyTorch begins it."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def build_optimizer(model: Perceiver, config: OptimConfig, *, impl: str = "auto") -> torch.optim.AdamW:
    """AdamW over two groups: everything, and `conf_head.weight` with its own weight decay.

    On a CUDA device the learning rate is a tensor there, and the update is that of the kernels unless `impl` is
    "eager"; on a CPU it is PyTorch's, under the interpreter too: it cannot tell so many tensors of a launch apart.

    Raises:
        ValueError: `impl` is unknown, or there is no place for its kernels.
    """
    conf_head = model.segmenter.conf_head.weight
    rest = [p for p in model.parameters() if p is not conf_head]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": [conf_head], "weight_decay": config.conf_head_weight_decay},
    ]
    betas = config.beta1, config.beta2
    if resolve(impl, conf_head.device) == resolve("auto", conf_head.device) == "triton":
        return ClippedAdamW(groups, betas=betas, eps=config.adam_eps)
    on_gpu = conf_head.is_cuda
    lr = torch.zeros((), device=conf_head.device) if on_gpu else 0.0
    return torch.optim.AdamW(groups, lr=lr, capturable=on_gpu, betas=betas, eps=config.adam_eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take the moments and the learning rate of a saved state; where that lives, weight decays and betas stay."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    set_learning_rate(optimizer, float(state["param_groups"][0]["lr"]))


def clip_gradients(model: Perceiver, limit: float) -> torch.Tensor:
    """Scale the gradients so that their global L2 norm is at most `limit`; return the norm before, a scalar tensor."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True)


def clip_and_step(model: Perceiver, optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    """Make an update with the gradients clipped to the norm `limit`; return the norm before, a scalar tensor."""
    if isinstance(optimizer, ClippedAdamW):
        return optimizer.clip_and_step(limit)
    grad_norm = clip_gradients(model, limit)
    optimizer.step()
    return grad_norm
