"""Augmentation of sound as data: the log-mel front end, operators and the random parameters they draw. No torch here.

The counterpart for pictures is `clipmill.pipeline.spec`, which exports these names too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipmill.pipeline.draws import uniforms

Range = tuple[float, float]
Params = dict[str, np.ndarray]


def between(unit: np.ndarray, bounds: Range) -> np.ndarray:
    """Numbers in [0, 1) stretched to [bounds)."""
    return bounds[0] + (bounds[1] - bounds[0]) * unit


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMel:
    """A log-mel front end.

    hz: sample rate. n_fft, win, hop: samples. mels: bands between f_min and f_max (0 = hz / 2) Hz. scale: ``slaney``
    or ``htk``; norm: ``slaney`` (area) or none. pad: STFT padding, ``reflect`` or ``constant``; center: pad at all.
    log: natural log of (mel + floor), after adding ``power_floor`` to the power. mean, std: final normalisation.
    """

    hz: int = 16000
    n_fft: int = 1024
    win: int = 1024
    hop: int = 160
    mels: int = 80
    f_min: float = 0.0
    f_max: float = 0.0
    scale: Literal["slaney", "htk"] = "slaney"
    norm: Literal["slaney"] | None = "slaney"
    pad: Literal["reflect", "constant"] = "reflect"
    center: bool = True
    power_floor: float = 0.0
    floor: float = 1.1920929e-07
    mean: float = 0.0
    std: float = 1.0

    def frames(self, num_samples: int) -> int:
        """Columns of the spectrogram of a waveform of ``num_samples``."""
        return 1 + (num_samples if self.center else num_samples - self.n_fft) // self.hop


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Multiply the waveform by U(gain)."""

    gain: Range = (0.8, 1.2)

    def draw(self, keys: np.ndarray) -> Params:
        """gain, shape of ``keys``."""
        return {"gain": between(uniforms(keys, 1)[..., 0], self.gain)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """``count`` bands along ``axis``, each of integer length U[0, longest), set to the spectrogram's mean."""

    axis: Literal["frequency", "time"]
    count: int = 2
    longest: int = 10

    def draw(self, keys: np.ndarray) -> Params:
        """length (..., count) in cells and start (..., count) as a fraction of the room left."""
        unit = uniforms(keys, 2 * self.count)
        return {"length": np.floor(unit[..., : self.count] * self.longest), "start": unit[..., self.count :]}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeWarp:
    """Move one instant of the spectrogram by less than ``window`` frames, stretching both sides (SpecAugment)."""

    window: int = 20

    def draw(self, keys: np.ndarray) -> Params:
        """instant and shift, as fractions of their ranges."""
        unit = uniforms(keys, 2)
        return {"instant": unit[..., 0], "shift": unit[..., 1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class MelCrop:
    """Random resize crop of a spectrogram (BYOL-A): a box of a larger empty canvas becomes the whole picture.

    The spectrogram lies in the middle of zeros, ``canvas`` times its size; the box is U(bands) and U(time) times it.
    """

    canvas: Range = (1.0, 1.5)
    bands: Range = (0.6, 1.5)
    time: Range = (0.6, 1.5)

    def draw(self, keys: np.ndarray) -> Params:
        """height and width relative to the spectrogram, row and column as fractions of the room left."""
        unit = uniforms(keys, 4)
        height, width = between(unit[..., 0], self.bands), between(unit[..., 1], self.time)
        return {"height": height, "width": width, "row": unit[..., 2], "column": unit[..., 3]}


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioSpec:
    """From int16 samples to a waveform (B, S) in [-1, 1), or to (B, 1, mels, frames) when ``logmel`` is given.

    hz: rate the waveform is resampled to. ops: `Volume` acts on the waveform, all others on the spectrogram.
    """

    hz: int = 16000
    logmel: LogMel | None = None
    ops: tuple[Volume | Mask | TimeWarp | MelCrop, ...] = ()

    def __post_init__(self) -> None:
        if self.logmel is not None and self.logmel.hz != self.hz:
            raise ValueError(f"the log-mel front end expects {self.logmel.hz} Hz, the view gives {self.hz} Hz")
