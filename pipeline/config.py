"""TrainConfig: every number of a training run, and configurations to and from JSON."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a method is trained. Raises ValueError, naming the field, when a value is out of range."""

    epochs: int = 100
    """Passes over the data set."""
    batch_size: int = 64
    """Samples per optimiser step, over all processes."""
    accumulate: int = 1
    """Forward passes per optimiser step; the batch is cut into this many parts."""
    repeat: int = 1
    """Visits of every record per epoch, each with its own random draws."""
    optimiser: Literal["sgd", "adam", "adamw", "lars", "larc_adam"] = "sgd"
    """Update rule; larc_adam is Adam under layer-wise adaptive rate clipping."""
    lr: float = 0.03
    """Peak learning rate, before lr_scaling."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """none: lr as it is; linear: lr * batch_size / 256; sqrt: lr * sqrt(batch_size)."""
    momentum: float = 0.9
    """Of sgd and lars."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two averages."""
    trust: float = 0.001
    """Trust coefficient of lars and larc_adam."""
    weight_decay: float = 1e-4
    """Decay of all weights whose group does not say otherwise."""
    schedule: Literal["constant", "step", "cosine", "poly"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    schedule_per: Literal["step", "epoch"] = "step"
    """Whether the rate moves with every step or only between epochs."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up, in epochs."""
    lr_start: float = 0.0
    """Rate at the first step of the warm-up, as a share of the peak."""
    lr_end: float = 0.0
    """Rate at the end of cosine and poly, as a share of the peak."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the step schedule multiplies the rate by gamma."""
    gamma: float = 0.1
    """Factor of the step schedule."""
    power: float = 0.9
    """Exponent of the poly schedule."""
    clip_grad_norm: float = 0.0
    """Largest L2 norm of the gradient; 0 leaves it alone."""
    amp: Literal["no", "bf16", "fp16"] = "no"
    """Autocast; fp16 scales the loss."""
    sync_bn: bool = False
    """Batch normalisation over all processes."""
    seed: int = 0
    """Of weights, order, clips and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a device."""
    channels_last: Literal["auto", "yes", "no"] = "auto"
    """Keep the weights of convolutions with channels last in memory; auto = on a CPU, and with --amp."""
    compile: bool = False
    """Compile the method with torch.compile."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 = at the end of every epoch."""
    keep: int = 2
    """Checkpoints kept."""
    tensorboard: bool = True
    """Write TensorBoard curves."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "repeat", "log_every", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("checkpoint_every", "seed", "weight_decay", "warmup_epochs", "clip_grad_norm", "power"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "trust", "gamma"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        for name in ("lr_start", "lr_end"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a share of the peak rate, 0 to 1")
        self._require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self._require("momentum", self.momentum > 0 or not self.nesterov, "above 0 when nesterov is on")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._require("betas", good, "two numbers, at least 0 and below 1")
        self._require("warmup_epochs", self.warmup_epochs <= self.epochs, f"at most epochs = {self.epochs}")
        rising = list(self.milestones) == sorted({m for m in self.milestones if m > 0})
        self._require("milestones", rising, "rising epoch numbers above 0")
        whole = self.batch_size % self.accumulate == 0
        self._require("batch_size", whole, f"a multiple of accumulate = {self.accumulate}")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    def _require(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name} = {getattr(self, name)!r} is not possible; it must be {wanted}")


# --- JSON ---------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A JSON-ready form of a configuration: dataclasses become objects, tuples become lists.

    >>> to_json(TrainConfig(milestones=(3, 5)))["milestones"]
    [3, 5]
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Mapping[str, Any], where: str = "configuration") -> T:
    """Build dataclass ``kind`` from what `to_json` gave; missing fields take their defaults.

    Raises ValueError naming ``where``, the field and, for an unknown field, the nearest known one.

    >>> from_json(TrainConfig, {"epochs": 3}).epochs
    3
    """
    known = {item.name for item in fields(cast(Any, kind)) if item.init}
    for name in data:
        if name not in known:
            near = get_close_matches(name, known, n=2) or sorted(known)
            raise ValueError(f"{where}: unknown field {name!r}; did you mean {' or '.join(near)}?")
    missing = [
        item.name
        for item in fields(cast(Any, kind))
        if item.init and item.name not in data and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
    hints = get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(cast(type, hint), value, where)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
    elif origin is Literal and value in arguments:
        return value
    elif origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, bool):
        pass
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{where} = {value!r} does not fit {getattr(hint, '__name__', hint)}")
