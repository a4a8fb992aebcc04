"""Probes: a benchmark's score on a few sequences, measured every few epochs of a training run."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from clipmill.models.encoder import Encoder

PROBES = ("davis", "otb")


def open_probe(text: str, root: Path, encoder: Encoder) -> Callable[[], dict[str, float]]:
    """The function that measures ``encoder`` as it is when called. text: ``davis:N`` or ``otb:N``, N sequences.

    root: the corpus, as the benchmark takes it. Raises ValueError for what cannot be measured, before any training.
    """
    name, _, count = text.partition(":")
    if name not in PROBES or not count.isdecimal() or int(count) < 1:
        wanted = " or ".join(f"{probe}:N" for probe in PROBES)
        raise ValueError(f"probe {text!r} is not possible; write {wanted} with a number N of sequences from 1 on")
    return import_module(f"clipmill.tools.evaluate.{name}").probe(encoder, root, int(count))
