"""Which encoder is meant by a word of the command line, and a name for its weights."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import Any

import torch

from clipmill.models.encoder import ENCODER_META, Encoder, build_encoder, load_encoder
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.baselines import BASELINE, baseline

RANDOM = "random:"


def open_encoder(text: str, device: str = "cpu") -> Encoder:
    """An encoder by name: a run folder, an encoder folder, ``random:...`` for an untrained one, or a ``baseline:...``.

    ``random:FOLDER`` is the encoder of that folder before training; ``random:BACKBONE:width=0.25,seed=1`` builds one.
    The same text gives the same weights.
    """
    if text.startswith(BASELINE):
        return baseline(text.removeprefix(BASELINE)).to(device)
    if not text.startswith(RANDOM):
        return load_encoder(text, device)
    name, _, rest = text.removeprefix(RANDOM).partition(":")
    options = _options(text, rest)
    seed = options.pop("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"{text}: seed must be an integer, got {seed!r}")
    if (Path(name) / ENCODER_META).is_file():
        if options:
            raise ValueError(f"{text}: a folder fixes the backbone's options; only seed=... may follow")
        return untrained(load_encoder(name), seed).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(name, **options).to(device)


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same backbone for the same input with new random weights; needs an encoder made by `build_encoder`."""
    recipe = encoder.recipe
    if recipe is None:
        raise ValueError(f"{type(encoder).__name__} was not made by build_encoder, so it cannot be built anew")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_encoder(recipe["name"], **recipe["options"])
    fresh.spec = encoder.spec
    fresh.audio_view = encoder.audio_view
    return fresh


def stored_audio_view(encoder: Encoder) -> View | None:
    """How the run that made this encoder prepared its sound; None if nothing is known."""
    return encoder.audio_view


def _options(text: str, rest: str) -> dict[str, Any]:
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{text}: expected name=value after the backbone, got {item!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def encoder_digest(encoder: torch.nn.Module) -> str:
    """A short hex name of a network: its class, its recipe and every weight."""
    state = hashlib.blake2b(digest_size=8)
    state.update(f"{type(encoder).__qualname__} {getattr(encoder, 'recipe', '')}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
