"""Media that the tests make themselves: every frame and every click says which one it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from clipmill.pipeline.pack.outcome import Picture, Result, Sound
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.task import Task, pack_source

FAST = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "0"}


def flat(yuv: tuple[int, int, int], size: tuple[int, int] = (96, 64), pix_fmt: str = "yuv420p") -> av.VideoFrame:
    """A frame of one colour."""
    frame = av.VideoFrame(*size, pix_fmt)
    for plane, level in zip(frame.planes, yuv, strict=True):
        plane.update(np.full(plane.buffer_size, level, np.uint8).tobytes())
    return frame


def grey(number: int, size: tuple[int, int], pix_fmt: str = "yuv420p") -> av.VideoFrame:
    """Frame ``number`` of every test film: luma 16 + 2 i, no colour."""
    frame = flat((16 + 2 * number % 220, 128, 128), size)
    return frame if pix_fmt == "yuv420p" else frame.reformat(format=pix_fmt)


@dataclass(kw_only=True)
class Film:
    """A film to write. times: presentation time of each frame in ticks of time_base. draw: makes frame i."""

    frames: int = 100
    size: tuple[int, int] = (96, 64)
    fps: Fraction = Fraction(25)
    codec: str = "libx264"
    options: dict[str, str] | None = None
    pix_fmt: str = "yuv420p"
    times: Sequence[int] | None = None
    time_base: Fraction | None = None
    sar: Fraction | None = None
    turn: tuple | None = None
    colour: tuple[int, int] | None = None  # range, matrix
    draw: Callable[[int], av.VideoFrame] | None = None
    sound: np.ndarray | None = None  # (channels, samples) float in [-1, 1]
    sound_hz: int = 16000
    sound_codec: str = "pcm_s16le"
    sound_layout: str = "mono"
    sound_at_s: float = 0.0
    muxer: dict[str, str] | None = None

    def write(self, path: Path, form: str | None = None) -> Path:
        """Write it; the format follows the suffix unless given."""
        with av.open(str(path), "w", format=form, options=self.muxer or {}) as container:
            video = self._video(container) if self.frames else None
            sound = self._sound(container) if self.sound is not None else None
            packets = []
            if video is not None:
                packets += self._encoded_video(video)
            if sound is not None:
                packets += self._encoded_sound(sound)
            packets.sort(key=lambda packet: packet.dts * packet.time_base)
            for packet in packets:
                container.mux(packet)
        return path

    def _video(self, container: Any) -> Any:
        options = dict(FAST if self.options is None and self.codec == "libx264" else self.options or {})
        stream = container.add_stream(self.codec, rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = *self.size, self.pix_fmt
        stream.codec_context.thread_count = 1
        if self.time_base is not None:
            stream.codec_context.time_base = self.time_base
            stream.time_base = self.time_base
        if self.sar is not None:
            stream.codec_context.sample_aspect_ratio = self.sar
            stream.sample_aspect_ratio = self.sar
        if self.colour is not None:
            stream.codec_context.color_range, stream.codec_context.colorspace = self.colour
        if self.turn is not None:
            stream.set_display_rotation(*self.turn)
        return stream

    def _encoded_video(self, stream: Any) -> list:
        packets = []
        for number in range(self.frames):
            frame = self.draw(number) if self.draw else grey(number, self.size, self.pix_fmt)
            frame.pts = self.times[number] if self.times is not None else number
            frame.time_base = self.time_base or 1 / self.fps
            packets += stream.encode(frame)
        return packets + list(stream.encode(None))

    def _sound(self, container: Any) -> Any:
        stream = container.add_stream(self.sound_codec, rate=self.sound_hz)
        stream.layout = self.sound_layout
        return stream

    def _encoded_sound(self, stream: Any) -> list:
        assert self.sound is not None
        kind = stream.codec_context.format
        wave = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(self.sound, np.float32), format="fltp", layout=self.sound_layout
        )
        wave.sample_rate = self.sound_hz
        wave.pts = round(self.sound_at_s * self.sound_hz)
        wave.time_base = Fraction(1, self.sound_hz)
        resampler = av.AudioResampler(format=kind, layout=self.sound_layout, rate=stream.codec_context.sample_rate)
        packets = []
        for part in [*resampler.resample(wave), *resampler.resample(None)]:
            packets += stream.encode(part)
        return packets + list(stream.encode(None))


def clicks(length_s: float, at_s: Sequence[float], hz: int, channels: int = 1) -> np.ndarray:
    """Silence with short pulses (raised-cosine, 1 ms) centred on the given times."""
    time_s = np.arange(round(length_s * hz)) / hz
    wave = np.zeros_like(time_s)
    for one in at_s:
        near = np.abs(time_s - one) < 0.0005
        wave[near] += 0.4 * (1 + np.cos(2 * np.pi * 1000 * (time_s[near] - one)))
    return np.tile(wave, (channels, 1))


def heard(sound: Sound) -> np.ndarray:
    """(S,) int16 samples of a written sound."""
    data = Path(sound.path).read_bytes()
    assert len(data) == 44 + 2 * sound.num_samples
    return np.frombuffer(data[44:], "<i2")


def click_times(sound: Sound, count: int) -> list[float]:
    """Centres of the ``count`` strongest pulses in seconds, to a fraction of a sample."""
    wave = np.abs(heard(sound).astype(float))
    found = []
    for _ in range(count):
        top = int(wave.argmax())
        near = np.arange(max(top - 16, 0), min(top + 17, len(wave)))
        found.append(float((near * wave[near]).sum() / wave[near].sum()) / sound.audio_hz)
        wave[max(top - 200, 0) : top + 200] = 0
    return sorted(found)


def levels(picture: Picture) -> np.ndarray:
    """(N, H, W) luma of a written picture track."""
    return planes(picture)[0]


def planes(picture: Picture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y, U and V of all frames of a written picture track."""
    with av.open(picture.path) as container:
        frames = list(container.decode(video=0))
    whole = np.array([frame.to_ndarray() for frame in frames])
    height, width = frames[0].height, frames[0].width
    chroma = whole[:, height:].reshape(len(frames), 2, height // 2, width // 2)
    return whole[:, :height], chroma[:, 0], chroma[:, 1]


def shown(picture: Picture) -> list[int]:
    """Which frame of the test film each written frame is; a frame that is not flat is a failure."""
    luma = levels(picture).astype(int)
    middle = luma[:, 8:-8, 8:-8]
    assert (middle.max((1, 2)) - middle.min((1, 2)) <= 6).all()
    return np.rint((np.median(middle, (1, 2)) - 16) / 2).astype(int).tolist()


def remux(
    data: bytes | Path, path: Path, change: Callable[[Any], Any], form: str | None = None, **options: str
) -> Path:
    """Copy the packets of a file; ``change`` may alter a packet or return None to leave it out."""
    source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
    with av.open(source) as old, av.open(str(path), "w", format=form, options=options) as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.size and packet.dts is not None:
                stream = streams[packet.stream_index]
                packet = change(packet)
                if packet is not None:
                    packet.stream = stream
                    new.mux(packet)
    return path


class Kit:
    """What tests of the packer need, in one fixture."""

    Film = Film
    flat = staticmethod(flat)
    grey = staticmethod(grey)
    clicks = staticmethod(clicks)
    heard = staticmethod(heard)
    click_times = staticmethod(click_times)
    levels = staticmethod(levels)
    planes = staticmethod(planes)
    shown = staticmethod(shown)
    remux = staticmethod(remux)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "out").mkdir()
        self._count = 0

    def film(self, name: str, form: str | None = None, **facts: Any) -> Path:
        """Write a `Film`."""
        return Film(**facts).write(self.folder / name, form)

    def pack(self, path: Path, start_s: float | None = None, end_s: float | None = None, **settings: Any) -> Result:
        """Pack one file in this process."""
        self._count += 1
        stem = str(self.folder / "out" / f"{self._count:08d}")
        task = Task(
            number=0, path=str(path), stem=stem, settings=PackSettings(**settings), start_s=start_s, end_s=end_s
        )
        return pack_source(task)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)
