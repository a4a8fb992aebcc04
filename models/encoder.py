"""Encoders: the one interface between methods, evaluators and backbones, and how an encoder is stored.

An encoder maps clips to vectors, ``forward(x_BCTHW) -> (B, D)``, and gives feature maps at named stages. Image
backbones are encoders too: they see every frame by itself and pool over time.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal

import safetensors.torch
from torch import Tensor, nn

ENCODER_FILE = "encoder.safetensors"
ENCODER_META = "encoder.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What an encoder was made for.

    modality: ``video`` (B, C, T, H, W) or ``audio`` (B, C, mels, frames). channels: C. num_frames: T it is usually
    given (any works). size: usual H = W in pixels. stride: usual source frames between frames. mean, std: of its
    normalised input in [0, 1] units.
    """

    modality: Literal["video", "audio"] = "video"
    channels: int = 3
    num_frames: int = 1
    size: int = 112
    stride: int = 1
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class Encoder(nn.Module, ABC):
    """A backbone without heads.

    dim: D, width of the pooled feature. stages: names accepted by `maps`, shallow to deep. spec: `InputSpec`.
    """

    dim: int
    stages: tuple[str, ...]
    spec: InputSpec

    @abstractmethod
    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Feature maps after ``stage``: (B, C, T, H, W) for video, (B, C, H, W) for audio."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (B, D) of clips (B, C, T, H, W) or spectrograms (B, C, mels, frames)."""


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


def build_encoder(name: str, **options: Any) -> Encoder:
    """Build an untrained encoder, e.g. ``build_encoder("r3d_18", width=0.25)``; an unknown name lists near ones."""
    known = backbones()
    if name not in known:
        near = get_close_matches(name, known, n=3) or sorted(known)
        raise ValueError(f"unknown backbone {name!r}; did you mean {', '.join(near)}?")
    encoder = known[name](**options)
    encoder.recipe = {"name": name, "options": options}  # type: ignore[assignment]
    return encoder


def save_encoder(encoder: Encoder, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write ``encoder.safetensors`` and ``encoder.json`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = getattr(encoder, "recipe", None)
    if recipe is None:
        raise ValueError("only encoders made by build_encoder can be saved: their recipe is stored beside the weights")
    meta = {"backbone": recipe, "spec": asdict(encoder.spec), "dim": encoder.dim, "extra": extra or {}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / ENCODER_FILE)
    (folder / ENCODER_META).write_text(json.dumps(meta, indent=2) + "\n")


def load_encoder(path: str | Path, device: str = "cpu") -> Encoder:
    """Load an encoder from a run folder or from a folder made by `save_encoder`."""
    folder = Path(path)
    meta_path = folder / ENCODER_META
    if not meta_path.is_file():
        raise ValueError(f"{folder}: no {ENCODER_META} there; give a run folder of `clipmill pretrain`")
    meta = json.loads(meta_path.read_text())
    encoder = build_encoder(meta["backbone"]["name"], **meta["backbone"]["options"])
    spec: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in meta["spec"].items()}
    encoder.spec = InputSpec(**spec)
    encoder.load_state_dict(safetensors.torch.load_file(folder / ENCODER_FILE))
    return encoder.to(device)
