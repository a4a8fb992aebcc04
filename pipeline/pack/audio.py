"""Sound: decode, mix down to mono, and lay it on the picture's clock at one rate.

Priming and padding are removed by FFmpeg's decoders from what the container says about them. Runs of samples whose
timestamps agree with their number stay together; between runs there is silence. A recorder whose clock was fast or
slow is resampled by its true rate, so that sound and picture do not drift apart.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from typing import IO

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.packet import Packet

from clipmill.pipeline.codec import AUDIO_BLOCK
from clipmill.pipeline.pack.outcome import Rejected, Sound
from clipmill.pipeline.pack.probe import raise_if_memory

_JUMP_S = 0.015  # timestamps may tremble by less
_DRIFT_S = 0.005  # a run whose ends differ by more from their timestamps has another rate than it says
_LONGEST_GAP_S = 600.0  # a longer one in a file without pictures is a damaged timestamp
_FIT_S = 300.0  # a drifting run is fitted in pieces of this length
_MAX_DRIFT = 8.0  # a true rate is not so many times the one that is said
_CHUNK = 1 << 16
HEADER_BYTES = 44
_LARGEST = 0xFFFFFFFF - HEADER_BYTES
# ITU-R BS.775: centre and surrounds 3 dB below left and right, no low-frequency effects; the sum is scaled to 1
_WEIGHTS = {"FL": 1.0, "FR": 1.0, "FC": 2**0.5, "LFE": 0.0, "LFE2": 0.0, "DL": 1.0, "DR": 1.0}
_SURROUND = 0.5**0.5
_SCALES = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0, "s64": 9223372036854775808.0}


def to_mono(frame: AudioFrame) -> np.ndarray:
    """(S,) float32 in [-1, 1]: the channels' weighted mean by the fixed rule above."""
    kind = frame.format.name.removesuffix("p")
    channels = frame.layout.nb_channels
    if frame.format.is_planar and channels >= 8:  # PyAV 18 counts their planes wrongly and reads what is not there
        (frame,) = av.AudioResampler(kind, frame.layout, frame.sample_rate).resample(frame)
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, channels).T
    data = data.astype(np.float32, copy=False)
    if kind in _SCALES:
        data = data / np.float32(_SCALES[kind]) - np.float32(kind == "u8")
    if channels == 1:
        return data[0]
    weights = _weights(tuple(channel.name for channel in frame.layout.channels))
    mono = np.zeros(data.shape[1], np.float32)
    for weight, channel in zip(weights, data, strict=True):  # in this order on every processor
        mono += weight * channel
    return mono


@lru_cache(maxsize=64)
def _weights(channels: tuple[str, ...]) -> np.ndarray:
    """(channels,) float32, of sum 1."""
    weights = np.array([_WEIGHTS.get(name, _SURROUND) for name in channels], np.float32)
    if not weights.any():
        weights[:] = 1
    return weights / weights.sum()


@dataclass(slots=True)
class Run:
    """Samples without a gap: where on the container's clock, at what true rate, and where in the buffer."""

    start_s: float
    hz: float
    first: int
    count: int


@dataclass(slots=True)
class Heard:
    """One decoded stretch: timestamp if there is one, rate, first sample in the buffer and number of samples."""

    time_s: float | None
    hz: int
    first: int
    count: int


@dataclass(slots=True)
class SoundNotes:
    """What was done to the sound, for the record's JSON. gaps: [start_s, length_s] on the video's clock."""

    errors: int = 0
    packets: int = 0
    gaps: list[list[float]] = field(default_factory=list)
    drift_ppm: float = 0.0
    source: dict[str, object] = field(default_factory=dict)


class SoundBuffer:
    """All decoded samples of a source, mono float32 at their own rate, in an unnamed file beside the output."""

    def __init__(self, folder: str) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._samples = 0
        self.heard: list[Heard] = []
        self.notes = SoundNotes()

    def add(self, packet: Packet, stream: AudioStream) -> None:
        """Decode one packet. What does not decode is counted and leaves a gap."""
        self.notes.packets += 1
        self._decode(packet, stream)

    def finish(self, stream: AudioStream) -> None:
        """Decode what the decoder still holds."""
        self._decode(None, stream)

    @property
    def first_s(self) -> float:
        """When the sound begins, on the container's clock."""
        return find_runs(self.heard)[0].start_s

    def close(self) -> None:
        """Free the buffer."""
        self._file.close()

    def read(self, first: int, count: int) -> np.ndarray:
        """(count,) float32 samples of the buffer."""
        self._file.seek(first * 4)
        return np.nan_to_num(np.frombuffer(self._file.read(count * 4), np.float32))

    def _decode(self, packet: Packet | None, stream: AudioStream) -> None:
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            raise_if_memory(error)
            self.notes.errors += 1
            return
        tick = float(stream.time_base or 1)
        for frame in frames:
            if frame.is_corrupt:
                self.notes.errors += 1
                continue
            time_s = None if frame.pts is None else frame.pts * tick
            wave = to_mono(frame)
            if not self.heard:
                self.notes.source = {
                    "codec": stream.codec_context.name,
                    "hz": frame.sample_rate,
                    "layout": frame.layout.name,
                }
            self.heard.append(Heard(time_s, frame.sample_rate, self._samples, len(wave)))
            self._file.write(wave.tobytes())
            self._samples += len(wave)


def find_runs(heard: list[Heard]) -> list[Run]:
    """Join stretches into runs; see `Run`. A run's start is fitted to all its timestamps, which may be rounded.

    >>> find_runs([Heard(0.0, 100, 0, 10), Heard(0.1, 100, 10, 10), Heard(0.5, 100, 20, 10)])
    [Run(start_s=0.0, hz=100.0, first=0, count=20), Run(start_s=0.5, hz=100.0, first=20, count=10)]
    """
    runs: list[Run] = []
    group: list[tuple[float, Heard]] = []
    late_s = 0.0
    for time_s, one in zip(_times_s(heard), heard, strict=True):
        if group:
            begin_s, begin = group[0]
            now_s = time_s - begin_s - (one.first - begin.first) / one.hz
            if one.hz != begin.hz or abs(now_s - late_s) > _JUMP_S:
                runs += _fit(group)
                group, now_s = [], 0.0
            late_s = now_s
        group.append((time_s, one))
    return runs + (_fit(group) if group else [])


def _times_s(heard: list[Heard]) -> list[float]:
    """Where stretches begin; those without a timestamp follow the one before, or come before the first with one."""
    known = next((i for i, one in enumerate(heard) if one.time_s is not None), None)
    times_s = [0.0] * len(heard)
    if known is not None:
        times_s[0] = float(heard[known].time_s or 0) - sum(one.count / one.hz for one in heard[:known])
    for i in range(1, len(heard)):
        time_s = heard[i].time_s
        times_s[i] = times_s[i - 1] + heard[i - 1].count / heard[i - 1].hz if time_s is None else time_s
    return times_s


def _fit(group: list[tuple[float, Heard]]) -> list[Run]:
    hz, first = group[0][1].hz, group[0][1].first
    nominal_s = np.array([(one.first - first) / hz for _, one in group])
    late_s = np.array([time_s for time_s, _ in group]) - nominal_s
    counts = np.array([one.count for _, one in group])
    if len(group) < 8 or abs(_slope(nominal_s, late_s)) * nominal_s[-1] < _DRIFT_S:
        # the time of a first stretch that lost its priming is computed from that, those of the others are rounded
        start_s = late_s[0] if counts[0] < counts[1:2].sum() else np.median(late_s)
        return [Run(float(start_s), float(hz), first, int(counts.sum()))]
    runs: list[Run] = []
    pieces = max(round(nominal_s[-1] / _FIT_S), 1)
    for part in np.array_split(np.arange(len(group)), pieces):
        slope = _slope(nominal_s[part], late_s[part])
        if not 1 / _MAX_DRIFT <= 1 + slope <= _MAX_DRIFT:  # such timestamps are broken
            slope = 0.0
        start_s = float(np.mean(late_s[part] - slope * nominal_s[part]) + (1 + slope) * nominal_s[part[0]])
        runs.append(Run(start_s, hz / (1 + slope), group[part[0]][1].first, int(counts[part].sum())))
    return runs


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    spread = float(centred @ centred)
    return float(centred @ (y - y.mean())) / spread if spread else 0.0


def lay_out(buffer: SoundBuffer, path: str, origin_s: float, length_s: float | None, audio_hz: int) -> Sound | None:
    """Write the WAV file: sample k is what sounds at origin_s + k / audio_hz; zeros where there is nothing.

    length_s: of the picture, None = to the end of the sound. None is returned when no sample falls into that time.
    Raises `Rejected` for sound whose timestamps cannot be.
    """
    runs = find_runs(buffer.heard)
    if not runs:
        return None
    if length_s is None:
        for run, after in pairwise(runs):
            if after.start_s - run.start_s - run.count / run.hz > _LONGEST_GAP_S:
                raise Rejected("unreadable", f"its timestamps jump from {run.start_s:.0f} s to {after.start_s:.0f} s")
        length_s = runs[-1].start_s + runs[-1].count / runs[-1].hz - origin_s
    total = min(round(length_s * audio_hz), _LARGEST // 2)
    inside = [run for run in runs if run.start_s + run.count / run.hz > origin_s and run.start_s < origin_s + length_s]
    if total <= 0 or not inside:
        return None
    notes = buffer.notes
    nominal = {one.first: one.hz for one in buffer.heard}
    notes.drift_ppm = round(max((abs(run.hz / nominal[run.first] - 1) * 1e6 for run in runs), default=0.0), 1)
    peak = filled = 0
    with open(path, "wb") as file:
        file.write(wav_header(total, audio_hz))
        file.truncate(HEADER_BYTES + 2 * total)
        for run in inside:
            start = run.start_s - origin_s
            _note_gap(notes, filled, round(start * audio_hz), audio_hz)
            for first, wave in _resampled(buffer, run, start, audio_hz):
                low = max(filled, first, 0)
                wave = wave[max(low - first, 0) : max(total - first, 0)]
                if len(wave):
                    file.seek(HEADER_BYTES + 2 * low)
                    file.write(wave.tobytes())
                    filled = low + len(wave)
                    peak = max(peak, int(np.abs(wave.astype(np.int32)).max()))
        _note_gap(notes, filled, total, audio_hz)
    return Sound(path=path, num_samples=total, audio_hz=audio_hz, crcs=_crcs(path), silent=peak <= 1)


def _note_gap(notes: SoundNotes, first: int, stop: int, audio_hz: int) -> None:
    if stop - first > max(_JUMP_S * audio_hz, 1):
        notes.gaps.append([round(first / audio_hz, 6), round((stop - first) / audio_hz, 6)])


def _resampled(buffer: SoundBuffer, run: Run, start_s: float, audio_hz: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position, int16 samples) of a run on the output's grid.

    A resampler starts on its own grid: zeros before the run bring its first output sample onto ours.
    """
    hz = round(run.hz)
    base = int(np.floor(start_s * audio_hz))
    pad = round((start_s - base / audio_hz) * hz)
    position = base
    chunks = (buffer.read(run.first + first, min(_CHUNK, run.count - first)) for first in range(0, run.count, _CHUNK))
    if hz == audio_hz:
        position += pad
        for wave in chunks:
            yield position, np.clip(np.rint(wave * 32768), -32768, 32767).astype("<i2")
            position += len(wave)
        return
    # integers give the same result on every processor
    resampler = av.AudioResampler("s32", "mono", audio_hz, options={"internal_sample_fmt": "s32p"})
    stop = base + round((pad + run.count) * audio_hz / hz)
    frames = chain(
        [_frame(np.zeros(pad, np.float32), hz)] if pad else [], (_frame(wave, hz) for wave in chunks), [None]
    )
    for frame in frames:
        for out in resampler.resample(frame):
            wave = np.clip((out.to_ndarray()[0].astype(np.int64) + 32768) >> 16, -32768, 32767).astype("<i2")
            yield position, wave[: max(stop - position, 0)]
            position += len(wave)


def _frame(wave: np.ndarray, hz: int) -> AudioFrame:
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(wave)[None], format="fltp", layout="mono")
    frame.sample_rate = hz
    return frame


def wav_header(num_samples: int, audio_hz: int) -> bytes:
    """The canonical 44-byte header of a PCM16 mono WAV file."""
    size = 2 * num_samples
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
    return riff + struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 1, 1, audio_hz, 2 * audio_hz, 2, 16, b"data", size)


def _crcs(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        blocks = iter(lambda: file.read(2 * AUDIO_BLOCK), b"")
        return np.array([zlib.crc32(block) for block in blocks], np.uint32)
