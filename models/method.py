"""Method: what a pretraining method is, and how one is found by its module name.

A method declares what it wants to see (`plan`), computes a loss from it (`forward`), and names the encoder that is
kept. Everything else has a default: five hooks, no callbacks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor, nn

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import AudioSpec, Normalize, VideoSpec
from clipmill.pipeline.views import Planner, View

Collect = Callable[[Planner, Callable[[ClipBatch], Mapping[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Output:
    """loss: scalar to minimise. metrics: scalars for the log, detached."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class EpochContext:
    """What a method may use between epochs.

    epoch, num_epochs: counted from 0. num_records: N, records the epoch draws from; ``ClipBatch.index`` counts them.

    collect(planner, function): a deterministic pass over the whole corpus in index order, every record once over all
    processes, method in eval mode, no gradient. ``function(batch)`` returns named tensors with one row per sample;
    the result has all N rows, in index order, on the CPU, in every process. The function must call no collective.

    To set: ``picks``, (N,) record numbers that replace the permutation of the coming epoch (a re-weighted epoch);
    ``renewed``, parameters that were drawn anew and whose optimiser state is to be forgotten; ``log``, numbers for
    the log.
    """

    epoch: int
    num_epochs: int
    num_records: int
    collect: Collect
    picks: np.ndarray | None = None
    renewed: list[nn.Parameter] = field(default_factory=list)
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
    rank_invariant: W processes with synchronised batch normalisation give the loss (their mean) and the gradients of
    one process that holds the whole batch.
    step_key: set by the loop before each forward pass, equal in all processes; keys the draws they must share (other
    randomness may come from torch's generator, which is seeded anew for every step and process).
    """

    Config: ClassVar[type]
    rank_invariant: ClassVar[bool] = False
    step_key: int = 0

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
        """Called before each epoch, in every process; state it makes for the epoch belongs in buffers."""


def weights_and_rest(module: nn.Module) -> list[ParamGroup]:
    """Two groups of a module's trainable parameters: weights, and the rest without decay and trust ratio.

    The rest are vectors: biases, and scales and shifts of normalisation layers.
    """
    trainable = [param for param in module.parameters() if param.requires_grad]
    weights = [param for param in trainable if param.dim() > 1]
    rest = [param for param in trainable if param.dim() <= 1]
    groups = [ParamGroup(params=weights), ParamGroup(params=rest, weight_decay=0.0, adapt=False)]
    return [group for group in groups if group.params]


_UNCHANGED = Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def input_spec(view: View) -> InputSpec:
    """What an encoder trained on a video or image view expects."""
    spec = view.augment
    assert isinstance(spec, VideoSpec), "sound has its own front end"
    norm = next((op for op in spec.ops if isinstance(op, Normalize)), _UNCHANGED)
    return InputSpec(
        num_frames=view.num_frames,
        size=spec.size,
        stride=view.stride,
        fps=view.fps,
        mean=norm.mean,
        std=norm.std,
    )


def audio_input_spec(view: View) -> InputSpec:
    """What an encoder trained on a log-mel view expects: bands, columns, and the front end's normalisation."""
    spec = view.augment
    assert isinstance(spec, AudioSpec), "pictures have no front end"
    assert spec.logmel is not None, f"view {view.name!r} has no log-mel front end"
    mel = spec.logmel
    return InputSpec(
        modality="audio",
        channels=1,
        num_frames=mel.frames(round(view.duration_s * spec.hz)),
        size=mel.mels,
        mean=(mel.mean,),
        std=(mel.std,),
    )


def require(config: Any, name: str, good: bool, wanted: str) -> None:
    """Refuse an option of a Config that is out of range: ValueError with its name, its value and what is possible."""
    if not good:
        raise ValueError(f"{name} = {getattr(config, name)!r} is not possible; it must be {wanted}")


def require_positive(config: Any, *names: str) -> None:
    """`require` that options are greater than 0."""
    for name in names:
        require(config, name, getattr(config, name) > 0, "greater than 0")


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
