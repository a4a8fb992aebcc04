"""Optimisers and learning-rate schedules.

Schedules are pure functions of the step: nothing to save, nothing to step. sgd, adam and adamw are torch's. LARS is
our own: timm's multiplies the learning rate outside the momentum buffer, so that old gradients take the rate of the
present step, and it has no variant with the ratio after the momentum; the reference of SimCLR has both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clipmill.pipeline.config import TrainConfig

if TYPE_CHECKING:
    from clipmill.models.method import ParamGroup

Shape = Literal["constant", "step", "cosine", "poly"]


# --- schedules: time -> share of the peak; time and lengths in one unit, steps or epochs --------------------


def ramp(time: float, length: float, start: float = 0.0) -> float:
    """Linear warm-up from ``start`` at time 0 to 1 at ``length``.

    >>> [ramp(t, 4) for t in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return 1.0 if time >= length else start + (1.0 - start) * time / length


def cosine(time: float, length: float, end: float = 0.0) -> float:
    """Half a cosine from 1 at time 0 to ``end`` at ``length``, without restarts.

    >>> cosine(0, 10), round(cosine(5, 10), 12), cosine(10, 10)
    (1.0, 0.5, 0.0)
    """
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * min(time / length, 1.0)))


def poly(time: float, length: float, power: float = 0.9, end: float = 0.0) -> float:
    """(1 - time / length) ** power, from 1 to ``end``.

    >>> poly(0, 10), poly(10, 10)
    (1.0, 0.0)
    """
    return end + (1.0 - end) * (1.0 - min(time / length, 1.0)) ** power


def steps(time: float, milestones: Sequence[float], gamma: float = 0.1) -> float:
    """gamma to the power of the number of milestones reached.

    >>> [steps(t, (2, 3), 0.5) for t in range(5)]
    [1.0, 1.0, 0.5, 0.25, 0.25]
    """
    return gamma ** sum(time >= milestone for milestone in milestones)


def schedule(
    time: float,
    shape: Shape,
    *,
    total: float,
    warmup: float = 0.0,
    start: float = 0.0,
    end: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    power: float = 0.9,
) -> float:
    """The share of the peak rate at ``time``: a linear warm-up, then ``shape``.

    cosine and poly run from the end of the warm-up to ``total``; milestones count from time 0.
    """
    if time < warmup:
        return ramp(time, warmup, start)
    if shape == "cosine":
        return cosine(time - warmup, total - warmup, end) if total > warmup else 1.0
    if shape == "poly":
        return poly(time - warmup, total - warmup, power, end) if total > warmup else 1.0
    return steps(time, milestones, gamma) if shape == "step" else 1.0


def schedule_of(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The share of the peak rate that a configuration gives to optimiser step ``step`` (from 0)."""
    per_step = config.schedule_per == "step"
    unit = steps_per_epoch if per_step else 1  # times per epoch
    return schedule(
        step if per_step else step // steps_per_epoch,
        config.schedule,
        total=config.epochs * unit,
        warmup=round(config.warmup_epochs * unit) if per_step else config.warmup_epochs,
        start=config.lr_start,
        end=config.lr_end,
        milestones=[milestone * unit for milestone in config.milestones],
        gamma=config.gamma,
        power=config.power,
    )


def peak_lr(config: TrainConfig) -> float:
    """The learning rate that a schedule of 1 means.

    >>> peak_lr(TrainConfig(lr=0.3, lr_scaling="linear", batch_size=4096))
    4.8
    """
    scale = {"none": 1.0, "linear": config.batch_size / 256, "sqrt": math.sqrt(config.batch_size)}
    return config.lr * scale[config.lr_scaling]


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Give every group its rate for this step; returns the scheduled rate of a group without options."""
    peak, share = peak_lr(config), schedule_of(config, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = peak * group["lr_scale"] * (1.0 if group["fixed_lr"] else share)
    return peak * share


# --- optimisers ---------------------------------------------------------------------------------------------


class Lars(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al., 2017), as in SimCLR's reference.

    For a weight w with gradient g of a group with ``adapt``: g <- g + weight_decay * w, r = trust * |w| / |g| (1 when
    either norm is 0). classic: v <- momentum * v + lr * r * g; w <- w - v, or w - (momentum * v + lr * r * g) with
    Nesterov; old gradients keep the rate of their own step. Otherwise ("popular"): v <- momentum * v + g, the update
    u is v (or momentum * v + g), r is taken from |w| / |u|, w <- w - lr * r * u. Groups without ``adapt`` use r = 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        nesterov: bool = False,
        classic: bool = True,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "nesterov": nesterov,
            "classic": classic,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all groups."""
        assert closure is None, "LARS evaluates nothing again"
        for group in self.param_groups:
            momentum, classic = group["momentum"], group["classic"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else param.grad
                state = self.state[param]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                added = grad * (group["lr"] * self._ratio(param, grad, group)) if classic else grad
                buffer.mul_(momentum).add_(added)
                update = buffer.mul(momentum).add_(added) if group["nesterov"] else buffer
                param.sub_(update if classic else update * (group["lr"] * self._ratio(param, update, group)))

    @staticmethod
    def _ratio(param: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor | float:
        return trust_ratio(param, update, group["trust"]) if group["adapt"] else 1.0


def trust_ratio(param: Tensor, update: Tensor, trust: float) -> Tensor:
    """trust * |param| / |update|, 1 where either norm is 0; a 0-d tensor, so that no device is waited for."""
    weight, change = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
    return torch.where((weight > 0) & (change > 0), trust * weight / change, torch.ones_like(weight))


class LarcAdam(torch.optim.Adam):
    """Adam under layer-wise adaptive rate clipping (NVIDIA's LARC around Adam).

    For a weight p with gradient g, both with a non-zero norm, of a group with ``adapt``:
    r = trust * |p| / (|g| + weight_decay * |p| + eps), g <- (g + weight_decay * p) * min(r / lr, 1), or * r when
    ``clip`` is off; then an Adam step without decay. Where a norm is 0 neither happens. Groups without ``adapt`` are
    plain Adam with L2 decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        larc_eps: float = 1e-8,
        clip: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("adapt", True)
        self._trust, self._larc_eps, self._clip = trust, larc_eps, clip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all groups; the gradients of adapted groups are changed."""
        assert closure is None, "LARC evaluates nothing again"
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["adapt"]:
                for param in group["params"]:
                    if param.grad is not None:
                        self._adapt(param, param.grad, group)
                group["weight_decay"] = 0.0  # it is in the gradient now
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def _adapt(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        weight, change = torch.linalg.vector_norm(param), torch.linalg.vector_norm(grad)
        ratio = self._trust * weight / (change + group["weight_decay"] * weight + self._larc_eps)
        if self._clip:
            ratio = (ratio / group["lr"]).clamp(max=1.0)
        adapted = (grad + group["weight_decay"] * param) * ratio
        grad.copy_(torch.where((weight > 0) & (change > 0), adapted, grad))


def build_optimizer(groups: Sequence[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a run over a method's parameter groups; `set_lr` sets the rate before each step."""
    options: list[dict[str, Any]] = [
        {
            "params": list(group.params),
            "lr": peak_lr(config) * group.lr_scale,
            "lr_scale": group.lr_scale,
            "fixed_lr": group.fixed_lr,
            "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
            "adapt": group.adapt,
        }
        for group in groups
    ]
    lr, name = peak_lr(config), config.optimiser
    if name == "lars":
        return Lars(options, lr, config.momentum, trust=config.trust, nesterov=config.nesterov)
    if name == "larc_adam":
        return LarcAdam(options, lr, config.betas, trust=config.trust)
    if name == "sgd":
        return torch.optim.SGD(options, lr, config.momentum, nesterov=config.nesterov)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(options, lr, config.betas)
