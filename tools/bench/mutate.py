"""Damage for the fuzzer: small media files of many kinds, and reproducible ways to spoil bytes."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

FRAMES, WIDTH, HEIGHT, FPS, AUDIO_HZ = 24, 64, 48, 25, 48000
STEP = 8  # grey levels from one frame to the next: frames that differ by one have a PSNR of 30 dB

_X264 = {"preset": "ultrafast", "crf": "10", "g": "8", "bf": "2"}
_MPEG = {"g": "8", "bf": "2", "b": "8000000", "qmin": "1", "qmax": "2"}
_VP = {"deadline": "realtime", "cpu-used": "8", "crf": "5", "b": "4000000"}
_X265 = {"preset": "ultrafast", "x265-params": "keyint=8:bframes=2:log-level=none:pools=none"}
FILMS: dict[str, tuple[str, dict[str, str], str, dict[str, str]]] = {  # name: video, its options, sound, muxer options
    "b.mp4": ("libx264", _X264, "aac", {}),
    "fast.mp4": ("libx264", _X264, "libmp3lame", {"movflags": "+faststart"}),
    "fragments.mp4": ("libx264", _X264, "aac", {"movflags": "+frag_keyframe+empty_moov"}),
    "hevc.mp4": ("libx265", _X265, "aac", {}),
    "b.mkv": ("libx264", _X264, "flac", {}),
    "vp9.webm": ("libvpx-vp9", _VP, "libopus", {}),
    "av1.mkv": ("libsvtav1", {"preset": "12", "crf": "20", "svtav1-params": "lp=1"}, "libopus", {}),
    "packed.avi": ("mpeg4", _MPEG, "pcm_s16le", {}),
    "b.ts": ("libx264", _X264, "aac", {}),
    "old.mpg": ("mpeg2video", _MPEG, "mp2", {}),
    "b.flv": ("libx264", _X264, "aac", {}),
    "old.wmv": ("wmv2", {"g": "8", "b": "8000000", "qmin": "1", "qmax": "2"}, "libmp3lame", {}),
    "stills.mov": ("mjpeg", {"qmin": "2", "qmax": "2"}, "pcm_s16le", {}),
    "lossless.mkv": ("ffv1", {"level": "3", "slicecrc": "1"}, "pcm_s16le", {}),
    "raw.h264": ("libx264", _X264, "", {}),
    "sound.mp3": ("", {}, "libmp3lame", {}),
    "sound.wav": ("", {}, "pcm_s16le", {}),
    "sound.m4a": ("", {}, "aac", {}),
}
PICTURES = ("a.jpg", "a.png", "a.webp", "a.gif")


def frame_planes(number: int) -> np.ndarray:
    """(HEIGHT * 3 / 2, WIDTH) I420 of frame ``number``: a grey level of its own under a faint ramp, no colour."""
    planes = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
    planes[:HEIGHT] = 24 + STEP * number + np.arange(WIDTH) // 8
    return planes


def write_seeds(folder: Path) -> list[Path]:
    """Write one file of each kind that this FFmpeg can make; returns them in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SVT_LOG", "1")  # or it prints its settings
    paths = []
    for name, (video, options, sound, muxer) in FILMS.items():
        if {one for one in (video, sound) if one} <= av.codecs_available:
            paths.append(_write_film(folder / name, video, options, sound, muxer))
    ramp = np.stack([np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) * 2 % 256] * 3, -1).astype(np.uint8)
    for name in PICTURES:
        paths.append(folder / name)
        Image.fromarray(ramp).save(paths[-1])
    return paths


def _write_film(path: Path, video: str, options: dict[str, str], sound: str, muxer: dict[str, str]) -> Path:
    with av.open(str(path), "w", options=muxer) as container:
        packets: list[Any] = []
        if video:
            stream: Any = container.add_stream(video, rate=FPS, options=dict(options))
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt = "yuvj420p" if video == "mjpeg" else "yuv420p"
            stream.codec_context.thread_count = 1
            if video != "mjpeg":
                stream.codec_context.color_range, stream.codec_context.colorspace = 1, 1
            for number in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(frame_planes(number), "yuv420p").reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if sound:
            track: Any = container.add_stream(sound, rate=AUDIO_HZ, layout="mono")
            wave = np.sin(np.arange(FRAMES * AUDIO_HZ // FPS) / 20).astype(np.float32)[None] / 2
            heard = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
            heard.sample_rate, heard.pts, heard.time_base = AUDIO_HZ, 0, Fraction(1, AUDIO_HZ)
            resampler = av.AudioResampler(track.codec_context.format, "mono", AUDIO_HZ)
            for part in [*resampler.resample(heard), *resampler.resample(None)]:
                packets += track.encode(part)
            packets += track.encode(None)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            container.mux(packet)
    return path


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Spoil ``data`` in one of the ways below, perhaps with a piece of ``other``; (name of the way, bytes)."""
    way = WAYS[int(rng.integers(len(WAYS)))]
    return way.__name__.strip("_"), way(data, other, rng)


def _place(data: bytes, rng: np.random.Generator) -> int:
    """A byte: every other time one near the beginning or the end, where structure lies."""
    size = max(len(data), 1)
    where = int(rng.integers(4))
    near = int(rng.integers(min(size, 1024)))
    return near if where == 0 else size - 1 - near if where == 1 else int(rng.integers(size))


def _range(data: bytes, rng: np.random.Generator) -> slice:
    start = _place(data, rng)
    return slice(start, start + 1 + int(rng.integers(1 << int(rng.integers(14)))))


def _flip_bits(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    spoilt = bytearray(data)
    for _bit in range(1 << int(rng.integers(6))):
        spoilt[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(spoilt)


def _extreme_numbers(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    spoilt = bytearray(data)
    for _number in range(1 + int(rng.integers(4))):
        place, size = _place(data, rng), (1, 2, 4, 8)[int(rng.integers(4))]
        value = (b"\0", b"\xff", b"\x7f", b"\x80")[int(rng.integers(4))] * size
        spoilt[place : place + size] = value[: len(spoilt[place : place + size])]
    return bytes(spoilt)


def _overwrite(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    where = _range(data, rng)
    count = len(data[where])
    fill = rng.bytes(count) if rng.integers(2) else bytes([int(rng.integers(256))]) * count
    return data[: where.start] + fill + data[where.start + count :]


def _truncate(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _cut_out(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    where = _range(data, rng)
    return data[: where.start] + data[where.stop :]


def _repeat(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    where = _range(data, rng)
    return data[: where.stop] + data[where] + data[where.stop :]


def _swap(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    a, b = sorted((_range(data, rng), _range(data, rng)), key=lambda where: where.start)
    a = slice(a.start, min(a.stop, b.start))
    return data[: a.start] + data[b] + data[a.stop : b.start] + data[a] + data[b.stop :]


def _splice(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


def _insert(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    place = _place(data, rng)
    return data[:place] + other[_range(other, rng)] + data[place:]


WAYS = (_flip_bits, _extreme_numbers, _overwrite, _truncate, _cut_out, _repeat, _swap, _splice, _insert)
