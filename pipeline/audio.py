"""Sound on the device: int16 slices to waveforms, resampling, log-mel spectrograms and their masking."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from clipmill.pipeline.draws import fold_array
from clipmill.pipeline.spec import AudioSpec, LogMel, Mask, Params, Volume
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
