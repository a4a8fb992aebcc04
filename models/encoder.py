"""Encoders: the one interface between methods, evaluators and backbones, and how an encoder is stored.

An encoder maps clips to vectors, ``forward(x_BCTHW) -> (B, D)``, and gives feature maps at named stages. Image
backbones are encoders too: they see every frame by itself and pool over time.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, get_args, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from clipmill.pipeline.sound_views import audio_view_from_json, audio_view_to_json
from clipmill.pipeline.views import View

ENCODER_FILE = "encoder.safetensors"
ENCODER_META = "encoder.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What an encoder was made for.

    modality: ``video`` (B, C, T, H, W) or ``audio`` (B, C, mels, frames). channels: C. num_frames: T it is usually
    given (any works). size: usual H = W in pixels. stride: usual source frames between frames; fps: frames per second
    of its clips instead, if set. mean, std: of its normalised input in [0, 1] units.
    """

    modality: Literal["video", "audio"] = "video"
    channels: int = 3
    num_frames: int = 1
    size: int = 112
    stride: int = 1
    fps: float | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have {self.channels} numbers, one a channel")


class Encoder(nn.Module, ABC):
    """A backbone without heads.

    dim: D, width of the pooled feature. stages: names accepted by `maps`, shallow to deep. spec: `InputSpec`.
    reductions: for each stage, input cells per map cell along (T, H, W), or along (mels, frames) for audio. recipe:
    how `build_encoder` made it. audio_view: for sound, how the run that trained it prepared its input, if known.
    """

    dim: int
    stages: tuple[str, ...]
    spec: InputSpec
    reductions: Mapping[str, tuple[int, ...]]
    recipe: dict[str, Any] | None = None
    audio_view: View | None = None

    @abstractmethod
    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Feature maps after ``stage``: (B, C, T, H, W) for video, (B, C, H, W) for audio."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (B, D) of clips (B, C, T, H, W) or spectrograms (B, C, mels, frames)."""

    def depth(self, stage: str) -> int:
        """Position of ``stage`` in ``stages``."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r} in {type(self).__name__}; it has {', '.join(self.stages)}")
        return self.stages.index(stage)

    def check(self, x: Tensor) -> None:
        """Refuse an input of the wrong number of dimensions or channels."""
        axes = ("T", "H", "W") if self.spec.modality == "video" else ("mels", "frames")
        if x.ndim != 2 + len(axes) or x.shape[1] != self.spec.channels:
            wanted = ", ".join(("B", str(self.spec.channels), *axes))
            raise ValueError(f"{type(self).__name__} takes ({wanted}), got {tuple(x.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Which encoder to build: the name of a builder function in ``models/backbones`` and its arguments."""

    name: str = "resnet18"
    width: float = 1.0


def backbones() -> dict[str, Callable[..., Encoder]]:
    """All builder functions of ``models/backbones``, by name."""
    package = import_module("clipmill.models.backbones")
    found: dict[str, Callable[..., Encoder]] = {}
    for item in iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{item.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and inspect.signature(function).return_annotation in ("Encoder", Encoder):
                found[name] = function
    return found


def backbone_options(name: str) -> list[str]:
    """Names of the options that a backbone's builder takes; an unknown backbone lists near ones."""
    known = backbones()
    if name not in known:
        near = get_close_matches(name, known, n=3) or sorted(known)
        raise ValueError(f"unknown backbone {name!r}; did you mean {', '.join(near)}?")
    names = []
    for parameter in inspect.signature(known[name]).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # **options: Unpack[SomeTypedDict]
            (options,) = get_args(get_type_hints(known[name])[parameter.name])
            names += get_type_hints(options)
        else:
            names.append(parameter.name)
    return names


def build_encoder(name: str, **options: Any) -> Encoder:
    """Build an untrained encoder, e.g. ``build_encoder("r3d_18", width=0.25)``.

    An unknown name or option is a ValueError that lists the known ones.
    """
    known = backbone_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"backbone {name} has no option {option!r}; it has {', '.join(known)}")
    encoder = backbones()[name](**options)
    encoder.recipe = {"name": name, "options": options}
    return encoder


def save_encoder(encoder: Encoder, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write ``encoder.safetensors`` and ``encoder.json`` to ``folder``, each at once or not at all.

    extra: anything that JSON can hold, to be found by `encoder_meta`; the encoder's ``audio_view`` is added to it.
    """
    if encoder.recipe is None:
        raise ValueError("only encoders made by build_encoder can be saved: their recipe is stored beside the weights")
    sound = {} if encoder.audio_view is None else {"audio_view": audio_view_to_json(encoder.audio_view)}
    meta = {
        "format": FORMAT,
        "backbone": encoder.recipe,
        "spec": asdict(encoder.spec),
        "dim": encoder.dim,
        "extra": sound | (extra or {}),
    }
    text = json.dumps(meta, indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with _whole(folder / ENCODER_FILE) as partial:
        safetensors.torch.save_file(tensors, partial)
    with _whole(folder / ENCODER_META) as partial:
        partial.write_text(text)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def encoder_meta(path: str | Path) -> dict[str, Any]:
    """What ``encoder.json`` says: format, backbone {name, options}, spec, dim, extra."""
    folder = Path(path)
    file = folder / ENCODER_META
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run folder of `clipmill pretrain`")
    if not file.is_file():
        raise ValueError(f"{folder}: no {ENCODER_META} there; give a finished run folder of `clipmill pretrain`")
    try:
        meta = json.loads(file.read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"{file}: format {meta['format']}, but this clipmill reads {FORMAT}; export it again")
        return {key: meta[key] for key in ("format", "backbone", "spec", "dim", "extra")}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); write the encoder again") from error


def load_encoder(path: str | Path, device: str = "cpu", **options: Any) -> Encoder:
    """Load an encoder from a run folder or from a folder made by `save_encoder`; bit-equal to the one saved.

    options: replace those the encoder was built with where that leaves its tensors alone, e.g.
    ``strides=(1, 2, 1, 1)``.
    """
    folder = Path(path)
    meta = encoder_meta(folder)
    recipe = meta["backbone"]
    spec: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in meta["spec"].items()}
    try:
        with torch.device("meta"):  # no memory, no random numbers: all tensors come from the file
            encoder = build_encoder(recipe["name"], **{**recipe["options"], **options})
        encoder.spec = InputSpec(**spec)
        if "audio_view" in meta["extra"]:
            encoder.audio_view = audio_view_from_json(meta["extra"]["audio_view"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / ENCODER_META}: {error}") from error
    weights = folder / ENCODER_FILE
    if not weights.is_file():
        raise ValueError(f"{folder}: no {ENCODER_FILE} beside {ENCODER_META}; write the encoder again")
    try:
        tensors = safetensors.torch.load_file(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights}: damaged ({error}); write the encoder again") from error
    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    if difference := first_difference(tensors, expected):
        raise ValueError(f"{weights} does not fit {recipe['name']}: {difference}")
    encoder.load_state_dict(tensors, assign=True)
    return encoder.to(device)


def first_difference(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> str:
    """Name the first tensor that is missing, unexpected or of another shape; empty when all fit."""
    for name in [*expected, *tensors]:
        if name not in tensors:
            return f"tensor {name} {tuple(expected[name])} is missing"
        if name not in expected:
            return f"tensor {name} {tuple(tensors[name].shape)} is not part of it"
        if tensors[name].shape != expected[name]:
            return f"tensor {name} is {tuple(tensors[name].shape)}, it should be {tuple(expected[name])}"
    return ""
