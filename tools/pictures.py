"""Pictures of records and batches: film strips, contact sheets, spectrograms, and views without normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipmill.pipeline.augment import yuv_to_rgb_matrix
from clipmill.pipeline.decode.decoder import Decoder, Planes
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.spec import Normalize, VideoSpec

_COLUMNS = 640  # of a spectrogram
_DYNAMIC_DB = 80.0
_SILENCE_DB = -20.0  # a mel power that is drawn at most this loud; a full-scale tone has about +36
_PAPER, _INK = (24, 27, 31), (225, 229, 234)


def rgb(planes: Planes, matrix: str = "bt709", full_range: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) from 8-bit 4:2:0 planes; chroma is replicated, as the loader does."""
    y, u, v = (np.asarray(plane, np.float64) for plane in planes)
    height, width = y.shape
    u, v = (plane.repeat(2, 0).repeat(2, 1)[:height, :width] for plane in (u, v))
    mix, shift = yuv_to_rgb_matrix(matrix, full_range)
    return to_uint8(np.stack([y, u, v], -1) @ mix.T + shift)


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """[0, 1] to 0..255, clipped and rounded."""
    return np.clip(np.rint(np.nan_to_num(picture) * 255.0), 0, 255).astype(np.uint8)


def record_frames(decoder: Decoder, record: VideoRecord, count: int, height: int) -> list[np.ndarray]:
    """``count`` frames evenly spread over the record (fewer if it is shorter), scaled to ``height`` pixels."""
    numbers = evenly(record.num_frames, count)
    found: dict[int, np.ndarray] = {}

    def keep(number: int, planes: Planes) -> None:
        picture = rgb(planes, record.codec.matrix, record.codec.full_range)
        width = max(round(height * record.width / record.height), 1)
        found[number] = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))

    decoder.decode(record, numbers, keep)
    return [found[number] for number in numbers]


def evenly(length: int, count: int) -> list[int]:
    """At most ``count`` distinct numbers spread over [0, length), the first and the last among them.

    >>> evenly(9, 3), evenly(2, 8)
    ([0, 4, 8], [0, 1])
    """
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def strip(frames: Sequence[np.ndarray], gap: int = 3) -> np.ndarray:
    """Frames of one height side by side; uint8 (H, W, 3)."""
    height = frames[0].shape[0]
    parts: list[np.ndarray] = []
    for frame in frames:
        parts += [frame, np.full((height, gap, 3), _PAPER, np.uint8)]
    return np.concatenate(parts[:-1], 1)


def shown(x_CTHW: np.ndarray, spec: VideoSpec) -> np.ndarray:
    """A clip of a batch as uint8 (T, H, W, 3): the view's normalisation undone, clipped to the visible range."""
    for op in reversed(spec.ops):
        if isinstance(op, Normalize):
            x_CTHW = x_CTHW * np.array(op.std).reshape(-1, 1, 1, 1) + np.array(op.mean).reshape(-1, 1, 1, 1)
    return to_uint8(np.moveaxis(x_CTHW, 0, -1))


def clip_strip(x_CTHW: np.ndarray, spec: VideoSpec, most: int = 8, side: int = 112) -> np.ndarray:
    """A film strip of at most ``most`` frames, evenly picked, each about ``side`` pixels high."""
    frames = shown(x_CTHW, spec)
    picks = evenly(len(frames), most)
    height, width = frames.shape[1:3]
    if height > side:
        size = (max(round(width * side / height), 1), side)
        return strip([np.asarray(Image.fromarray(frames[i]).resize(size, Image.Resampling.BOX)) for i in picks])
    zoom = max(side // height, 1)  # whole pixels stay visible
    return strip([frames[i].repeat(zoom, 0).repeat(zoom, 1) for i in picks])


def spectrogram(wave: np.ndarray, hz: int, mels: int = 64) -> np.ndarray:
    """A log-mel picture of a waveform in [-1, 1): uint8 (mels, columns, 3), low notes at the bottom.

    librosa's power mel spectrogram in dB, the loudest 80 dB of the record; silence stays dark.
    """
    import librosa

    hop = max(hz // 200, -(-len(wave) // _COLUMNS), 1)
    n_fft = max(2048, 1 << (hop - 1).bit_length())
    wave = np.pad(wave.astype(np.float32), (0, max(n_fft - len(wave), 0)))
    power = librosa.feature.melspectrogram(y=wave, sr=hz, n_fft=n_fft, hop_length=hop, n_mels=mels, pad_mode="reflect")
    level_db = librosa.power_to_db(power, ref=1.0, top_db=None)
    top_db = max(float(level_db.max()), _SILENCE_DB)
    return heat((level_db - top_db) / _DYNAMIC_DB + 1.0)


def heat(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] (rows, columns), row 0 at the bottom, to uint8 colours (rows, columns, 3)."""
    import matplotlib

    table = matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3]
    return np.ascontiguousarray(table[to_uint8(values)][::-1])


def mel_picture(mel: np.ndarray) -> np.ndarray:
    """A log-mel view (mels, frames) as colours, from its lowest to its highest value."""
    low, high = float(np.nanmin(mel)), float(np.nanmax(mel))
    return heat((mel - low) / max(high - low, 1e-9))


def wave_picture(wave: np.ndarray, width: int = 560, height: int = 96) -> np.ndarray:
    """A waveform in [-1, 1) as the envelope of its lowest and highest samples; uint8 (height, width, 3)."""
    bounds = np.linspace(0, len(wave), min(width, len(wave)) + 1).astype(int)[:-1]
    top, bottom = np.maximum.reduceat(wave, bounds), np.minimum.reduceat(wave, bounds)
    rows = np.linspace(1.0, -1.0, height)[:, None]
    half = 1.0 / height
    inside = (rows <= top + half) & (rows >= bottom - half)
    return np.where(inside[..., None], np.array((90, 174, 255), np.uint8), np.array(_PAPER, np.uint8))


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], margin: int = 10) -> np.ndarray:
    """Pictures below each other, each under its title; uint8 (H, W, 3)."""
    font = ImageFont.load_default(13)
    width = max((picture.shape[1] for _, picture in rows), default=200) + 2 * margin
    height = margin + sum(picture.shape[0] + 20 + margin for _, picture in rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = margin
    for title, picture in rows:
        printable = "".join(c if c.isprintable() else "?" for c in title)
        pen.text((margin, top), printable[: max(width // 7, 8)], fill=_INK, font=font)
        sheet.paste(Image.fromarray(picture), (margin, top + 20))
        top += picture.shape[0] + 20 + margin
    return np.asarray(sheet)
