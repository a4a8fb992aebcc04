"""Method: what a pretraining method is, and how one is found by its module name.

A method declares what it wants to see (`plan`), computes a loss from it (`forward`), and names the encoder that is
kept. Everything else has a default: five hooks, no callbacks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor, nn

from clipmill.models.encoder import Encoder
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.views import Planner


@dataclass(frozen=True, slots=True)
class Output:
    """loss: scalar to minimise. metrics: scalars for the log, detached."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class EpochContext:
    """What a method may use between epochs.

    epoch, num_epochs: counted from 0. features(planner): iterate a deterministic pass over the whole corpus in index
    order, every record once over all processes. num_records: in the corpus. picks: set it to record numbers to
    replace the order of the coming epoch (same length every time). log: numbers for the log.
    """

    epoch: int
    num_epochs: int
    num_records: int
    batches: Any = None
    picks: np.ndarray | None = None
    log: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Published settings as data: the method's configuration and the training options they differ in.

    about: one line. method: an instance of the method's Config. train: names and values of training options
    (`clipmill.pipeline.config.TrainConfig`).
    """

    about: str
    method: Any
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """Parameters that share an optimiser setting.

    lr_scale: multiplies the schedule. fixed_lr: the schedule does not apply. weight_decay: None takes the run's.
    adapt: LARS/LARC trust ratio applies.
    """

    params: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    fixed_lr: bool = False
    weight_decay: float | None = None
    adapt: bool = True


class Method(nn.Module, ABC):
    """A pretraining method.

    Config: a frozen dataclass of the method's own options. A subclass is constructed as ``Cls(config)``.
    """

    Config: ClassVar[type]

    @abstractmethod
    def plan(self) -> Planner:
        """The views of one sample and how they are drawn. Must not depend on weights."""

    @abstractmethod
    def forward(self, batch: ClipBatch) -> Output:
        """Loss and metrics of one batch."""

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """The network that is kept after pretraining."""

    def encoders(self) -> Mapping[str, Encoder]:
        """All encoders worth keeping, the main one first (audio-visual methods have two)."""
        return {"encoder": self.encoder}

    def param_groups(self) -> Sequence[ParamGroup]:
        """Trainable parameters by optimiser setting; the default is one group of all."""
        return [ParamGroup(params=[p for p in self.parameters() if p.requires_grad])]

    def after_step(self, step: int, num_steps: int) -> None:
        """Called after each optimiser step; ``step`` counts from 0."""

    def before_epoch(self, context: EpochContext) -> None:
        """Called before each epoch."""


def method_names() -> list[str]:
    """Names of all methods, without importing them."""
    package = import_module("clipmill.models.methods")
    return sorted(item.name for item in iter_modules(package.__path__))


def method_module(name: str) -> ModuleType:
    """The module of a method; an unknown name lists near ones."""
    if name not in (known := method_names()):
        near = get_close_matches(name, known, n=3) or known
        raise ValueError(f"unknown method {name!r}; did you mean {', '.join(near)}?")
    return import_module(f"clipmill.models.methods.{name}")


def method_class(name: str) -> type[Method]:
    """The one Method subclass that a method's module defines."""
    module = method_module(name)
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one Method, it has {found}"
    return found[0]


def recipes(name: str) -> dict[str, Recipe]:
    """The recipes of a method by name: its module's functions that return a `Recipe`, called with no argument."""
    return dict(_recipes(method_module(name)))


def _recipes(module: ModuleType) -> Iterator[tuple[str, Recipe]]:
    for name, function in vars(module).items():
        if callable(function) and getattr(function, "__module__", "") == module.__name__ and not name.startswith("_"):
            annotation = getattr(function, "__annotations__", {}).get("return")
            if annotation in ("Recipe", Recipe):
                yield name, cast(Recipe, function())
