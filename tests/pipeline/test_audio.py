"""The log-mel front end and its masking against librosa and the formulas."""

import librosa
import numpy as np
import pytest
import torch

from clipmill.pipeline import audio
from clipmill.pipeline.draws import fold
from clipmill.pipeline.spec import AudioSpec, LogMel, Mask, Volume
from clipmill.pipeline.views import View


def noise(count=8000, seed=0):
    return np.random.default_rng(seed).normal(0, 0.2, (2, count)).astype(np.float32)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize("pad", ["reflect", "constant"])
@pytest.mark.parametrize("center", [True, False])
def test_log_mel_equals_librosa(scale, norm, pad, center):
    mel = LogMel(
        n_fft=512, win=400, hop=160, mels=40, f_min=60, f_max=7600, scale=scale, norm=norm, pad=pad, center=center
    )
    wave = noise()
    ours = audio.log_mel(torch.from_numpy(wave), mel).numpy()
    spectrum = librosa.stft(wave, n_fft=512, hop_length=160, win_length=400, center=center, pad_mode=pad)
    bank = librosa.filters.mel(sr=16000, n_fft=512, n_mels=40, fmin=60, fmax=7600, htk=scale == "htk", norm=norm)
    expected = np.log(bank @ np.abs(spectrum) ** 2 + mel.floor)
    assert ours.shape == expected.shape == (2, 40, mel.frames(8000))
    assert np.abs(ours - expected).max() < 2e-3
    assert np.abs(ours - expected).mean() < 2e-5


def test_silence_has_the_stated_level():
    mel = LogMel(mean=-5.3688107, std=4.410007)
    out = audio.log_mel(torch.zeros(1, 32000), mel)
    assert out.shape == (1, 80, 201)
    assert torch.allclose(out, torch.tensor(-2.397), atol=1e-3)


def view(**options):
    return View(name="a", modality="audio", duration_s=0.5, augment=AudioSpec(**options))


KEYS = np.array([fold(1), fold(2)], np.uint64)


def test_samples_become_a_waveform_and_a_spectrogram():
    pcm = torch.from_numpy((noise() * 8000).astype(np.int16))
    wave = audio.waveform_to_view(pcm, 16000, view(), KEYS)
    assert torch.equal(wave, pcm.float() / 32768)
    mel = audio.waveform_to_view(pcm, 16000, view(logmel=LogMel()), KEYS)
    assert mel.shape == (2, 1, 80, 51)


def test_volume_is_drawn_per_sample():
    pcm = torch.full((2, 8000), 1000, dtype=torch.int16)
    wave = audio.waveform_to_view(pcm, 16000, view(ops=(Volume(),)), KEYS)
    gains = wave[:, 0] * 32768 / 1000
    assert gains[0] != gains[1]
    assert ((gains >= 0.8) & (gains < 1.2)).all()
    assert torch.allclose(wave, wave[:, :1].expand_as(wave))


@pytest.mark.parametrize(("from_hz", "to_hz"), [(16000, 8000), (16000, 22050), (48000, 16000)])
def test_resampling_keeps_a_tone_and_its_phase(from_hz, to_hz):
    seconds = 0.5
    t = torch.arange(int(from_hz * seconds)) / from_hz
    out = audio.resample(torch.sin(2 * torch.pi * 440 * t)[None], from_hz, to_hz, round(to_hz * seconds))
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(round(to_hz * seconds)) / to_hz)
    middle = slice(200, -200)
    assert (out[0, middle] - expected[middle]).abs().max() < 0.01


@pytest.mark.parametrize("axis", ["frequency", "time"])
def test_masks_hit_whole_bands_with_the_mean(axis):
    mel = torch.rand(2, 20, 30)
    op = Mask(axis=axis, count=2, longest=6)
    params = {"length": np.array([[3.0, 0.0], [5.0, 2.0]]), "start": np.array([[0.0, 0.5], [0.99, 0.0]])}
    out = audio.mask(mel, op, params)
    changed = (out != mel).any(2 if axis == "frequency" else 1)
    size = 20 if axis == "frequency" else 30
    expected = torch.zeros(2, size, dtype=torch.bool)
    expected[0, 0:3] = True
    start = int(0.99 * (size - 5))
    expected[1, start : start + 5] = True
    expected[1, 0:2] = True
    assert torch.equal(changed, expected)
    hit = out[0, :3] if axis == "frequency" else out[0, :, :3]
    assert torch.allclose(hit, mel[0].mean().expand_as(hit))


def test_mask_lengths_are_below_the_limit():
    keys = np.array([fold(i) for i in range(2000)], np.uint64)
    drawn = Mask(axis="time", count=2, longest=10).draw(keys)
    assert (drawn["length"].min(), drawn["length"].max()) == (0, 9)


def test_clear_errors():
    with pytest.raises(ValueError, match="too few"):
        audio.log_mel(torch.zeros(1, 500), LogMel())
    with pytest.raises(ValueError, match="16000 Hz, the view gives 8000"):
        AudioSpec(hz=8000, logmel=LogMel())
