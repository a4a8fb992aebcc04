"""Sound on the device: int16 slices to waveforms, resampling, log-mel spectrograms and their augmentation."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from clipmill.pipeline.draws import fold_array
from clipmill.pipeline.sound_spec import AudioSpec, LogMel, Mask, MelCrop, Params, TimeWarp, Volume
from clipmill.pipeline.views import View


def waveform_to_view(pcm: Tensor, audio_hz: int, view: View, draws: np.ndarray) -> Tensor:
    """int16 samples (B, S) at ``audio_hz`` to the tensor of an audio view.

    Returns (B, S') float32 in [-1, 1) at the view's rate, or (B, 1, mels, frames) when it has a log-mel front end.
    draws: (B,) uint64 keys of the samples.
    """
    spec = view.augment
    assert isinstance(spec, AudioSpec)
    wave = resample(pcm.to(torch.float32) / 32768.0, audio_hz, spec.hz, round(view.duration_s * spec.hz))
    keys = fold_array(draws, view.key)
    drawn = [op.draw(fold_array(keys, number)) for number, op in enumerate(spec.ops)]
    for op, params in zip(spec.ops, drawn, strict=True):
        if isinstance(op, Volume):
            wave = wave * torch.from_numpy(params["gain"]).to(wave)[:, None]
    if spec.logmel is None:
        return wave
    mel = log_mel(wave, spec.logmel)
    for op, params in zip(spec.ops, drawn, strict=True):
        if isinstance(op, Mask):
            mel = mask(mel, op, params)
        elif isinstance(op, TimeWarp):
            mel = time_warp(mel, op, params)
        elif isinstance(op, MelCrop):
            mel = crop_canvas(mel, op.canvas, crop_boxes(mel, op, params))
    return mel[:, None]


def resample(wave: Tensor, from_hz: int, to_hz: int, length: int) -> Tensor:
    """Windowed-sinc resampling of (B, S) to exactly ``length`` samples at ``to_hz``."""
    if from_hz != to_hz:
        wave = torchaudio.functional.resample(wave, from_hz, to_hz)
    short = length - wave.shape[-1]
    return F.pad(wave, (0, short)) if short > 0 else wave[..., :length]


def log_mel(wave: Tensor, mel: LogMel) -> Tensor:
    """(B, S) waveform to (B, mels, frames) natural-log mel energies, normalised."""
    if wave.shape[-1] <= mel.n_fft // 2 and mel.center and mel.pad == "reflect":
        raise ValueError(
            f"{wave.shape[-1]} samples are too few for a reflect-padded STFT of {mel.n_fft}; use a longer view"
        )
    window = torch.hann_window(mel.win, device=wave.device, dtype=wave.dtype)
    spectrum = torch.stft(
        wave, mel.n_fft, mel.hop, mel.win, window, center=mel.center, pad_mode=mel.pad, return_complex=True
    )
    power = spectrum.real.square() + spectrum.imag.square() + mel.power_floor
    bank = _mel_bank(mel).to(wave)
    energy = torch.matmul(bank.T, power)
    return ((energy + mel.floor).log() - mel.mean) / mel.std


@lru_cache(maxsize=16)
def _mel_bank(mel: LogMel) -> Tensor:
    top = mel.f_max or mel.hz / 2
    return torchaudio.functional.melscale_fbanks(
        mel.n_fft // 2 + 1, mel.f_min, top, mel.mels, mel.hz, norm=mel.norm, mel_scale=mel.scale
    )


def mask(mel: Tensor, op: Mask, params: Params) -> Tensor:
    """Set bands of (B, mels, frames) to each spectrogram's mean at that moment."""
    axis = 1 if op.axis == "frequency" else 2
    size = mel.shape[axis]
    length = torch.from_numpy(params["length"]).to(mel)
    room = (size - length.amax(1, keepdim=True)).clamp(min=1)
    start = (torch.from_numpy(params["start"]).to(mel) * room).floor()
    cells = torch.arange(size, device=mel.device)
    inside = (cells >= start[..., None]) & (cells < (start + length)[..., None])
    hit = inside.any(1)
    hit = hit[:, :, None] if axis == 1 else hit[:, None, :]
    return torch.where(hit, mel.mean((1, 2), keepdim=True), mel)


def time_warp(mel: Tensor, op: TimeWarp, params: Params) -> Tensor:
    """Stretch the part of (B, mels, frames) before a random frame and the part behind it to other lengths.

    As in SpecAugment's common implementation: with window w the frame c is one of w ... T - w - 1, it moves to one of
    c - w + 1 ... c + w, and both parts are resized by cubic interpolation. Shorter spectrograms stay as they are.
    """
    frames, window = mel.shape[2], op.window
    if frames - window <= window:
        return mel
    out = []
    for one, unit, move in zip(mel, params["instant"].tolist(), params["shift"].tolist(), strict=True):
        centre = window + int(unit * (frames - 2 * window))
        moved = min(max(centre - window + 1 + int(move * 2 * window), 1), frames - 1)
        pieces = (one[None, None, :, :centre], moved), (one[None, None, :, centre:], frames - moved)
        parts = [F.interpolate(part, (len(one), length), mode="bicubic") for part, length in pieces]
        out.append(torch.cat(parts, 3)[0, 0])
    return torch.stack(out)


def crop_boxes(mel: Tensor, op: MelCrop, params: Params) -> np.ndarray:
    """(B, 4) int64 boxes i, j, h, w on the canvas of (B, mels, frames)."""
    size = np.array(mel.shape[1:])
    room = (size * np.array(op.canvas)).astype(np.int64)
    drawn = np.stack([params["height"], params["width"]], 1)
    side = np.clip((drawn * size).astype(np.int64), 1, room)
    corner = (np.stack([params["row"], params["column"]], 1) * (room - side + 1)).astype(np.int64)
    return np.concatenate([corner, side], 1)


def crop_canvas(mel: Tensor, canvas: tuple[float, float], boxes: np.ndarray) -> Tensor:
    """Cut a box i, j, h, w of each spectrogram's canvas and resize it to (mels, frames), (B, mels, frames).

    The canvas is ``canvas`` times as large and zero where the spectrogram, in its middle, is not. Resizing is
    bicubic with aligned corners and reads nothing outside the box.
    """
    bands, frames = mel.shape[1:]
    box = torch.from_numpy(boxes).to(mel.device)
    room = int(bands * canvas[0]), int(frames * canvas[1])
    down = _cubic_rows(box[:, 0], box[:, 2], bands, (room[0] - bands) // 2, mel)
    across = _cubic_rows(box[:, 1], box[:, 3], frames, (room[1] - frames) // 2, mel)
    return down @ mel @ across.transpose(1, 2)


def _cubic_rows(start: Tensor, length: Tensor, size: int, before: int, like: Tensor) -> Tensor:
    """(B, size, size) weights that resample cells [start, start + length) of a canvas to ``size`` cells.

    The canvas has ``before`` zero cells, the ``size`` given ones, and zero cells after them. Cubic with a = -0.75.
    """
    cells = torch.arange(size, device=like.device, dtype=torch.float64)
    place = cells * ((length - 1).double() / max(size - 1, 1))[:, None]
    first = place.floor()
    part = (place - first)[..., None]
    offset = torch.arange(-1, 3, device=like.device)
    x = (part - offset).abs()
    near = ((1.25 * x - 2.25) * x) * x + 1.0
    far = ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0
    weight = torch.where(x <= 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))
    tap = (first[..., None].long() + offset).clamp(min=0).minimum((length - 1)[:, None, None])
    tap = tap + start[:, None, None] - before
    inside = (tap >= 0) & (tap < size)
    rows = torch.zeros(len(start), size, size, device=like.device, dtype=torch.float64)
    rows.scatter_add_(2, tap.clamp(0, size - 1), weight * inside)
    return rows.to(like.dtype)
