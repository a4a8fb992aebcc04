"""The videos of a benchmark: given or made up, as they are, in our shards, and re-encoded as files."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.datasets.files import MEDIA_SUFFIXES, find
from clipmill.pipeline.record import ShardIndex

FPS, SECONDS, HEIGHT, WIDTH = 28, 10, 256, 340  # of made-up videos: as Kinetics is most often packaged


@dataclass(slots=True)
class Data:
    """One packed form of a corpus.

    name: what it is. index: the packed data set. raw, same_bits: a video file of every record, the original one and
    the shard's stream in an mp4. raw_sounds, same_sounds: files with their sound, nothing where a video has none.
    """

    name: str
    index: ShardIndex
    raw: list[str]
    same_bits: list[str]
    raw_sounds: list[str] = field(default_factory=list)
    same_sounds: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """Folder of the packed data set."""
        return self.index.root

    @property
    def frames(self) -> list[int]:
        """Number of frames of every record."""
        return self.index.column("num_frames").tolist()

    def facts(self) -> dict[str, Any]:
        """Sizes and quality."""
        import pyarrow.parquet as parquet

        index, first = self.index, self.index[0]
        manifest = parquet.read_table(self.root / "manifest.parquet").to_pydict()
        good = [float(db) for db in manifest.get("psnr_db", []) if db is not None and np.isfinite(db)]
        stored = sum(int(record.packet_sizes.sum(dtype=np.int64)) for record in index)
        frames = sum(self.frames)
        return {
            "videos": len(index),
            "frames": frames,
            "size": f"{first.width}x{first.height}",
            "raw_mb_per_10s": sum(Path(one).stat().st_size for one in self.raw) / frames * 10 * float(first.fps) / 1e6,
            "packed_mb_per_10s": stored / frames * 10 * float(first.fps) / 1e6,
            "bytes_per_16_frames": stored / frames * 16,
            "psnr_db": float(np.mean(good)) if good else None,
        }


def videos(folder: Path) -> list[Path]:
    """The media files of a folder, in a fixed order; ValueError where there are none."""
    found = find(folder, MEDIA_SUFFIXES)
    if not found:
        raise ValueError(f"{folder}: no video files there; name a folder of videos or leave --data out")
    return sorted(folder / path for path in found)


def pack_corpus(folder: Path, out: Path, short_side: int | None, gop: int = 8, profile: str = "cpu") -> Data:
    """Pack all videos of a folder and lay the packed streams out as files beside it."""
    from clipmill.datasets.folder import read
    from clipmill.pipeline.pack.run import pack
    from clipmill.pipeline.pack.settings import PackSettings

    settings = PackSettings(profile=profile, gop=gop, short_side=short_side)
    pack(read(folder), out, settings, root=folder)
    index = ShardIndex.open(out)
    raw = [str(folder / record.source) for record in index]
    with_sound = all(record.num_samples > 0 for record in index)
    same_bits, same_sounds = unpacked(index, out.with_name(out.name + "-files"))
    return Data(
        name=folder.name,
        index=index,
        raw=raw,
        same_bits=same_bits,
        raw_sounds=raw if with_sound else [],
        same_sounds=same_sounds if with_sound else [],
    )


def unpacked(index: ShardIndex, folder: Path) -> tuple[list[str], list[str]]:
    """Write the video and the sound member of every record to a folder; the paths of both, in the index's order."""
    folder.mkdir(exist_ok=True)
    ranges: dict[Path, list[tuple[int, str]]] = {}
    for shard in index.shards:
        with tarfile.open(shard) as tar:
            tar.extractall(folder, filter="data")
            ranges[shard] = [(member.offset_data, member.name) for member in tar if member.isreg()]
    found: tuple[list[str], list[str]] = ([], [])
    for record in index:
        for places, offset in zip(found, (record.packet_offset, record.audio_offset), strict=True):
            before = [(start, name) for start, name in ranges[Path(record.shard)] if start <= offset]
            places.append(str(folder / max(before)[1]) if before else "")
    return found


def flat_footage(folder: Path, count: int) -> Path:
    """Write ``count`` videos of 32 x 32 grey pixels, which cost next to nothing to decode. Returns the folder."""
    return make_footage(folder, count, size=(32, 32), picture=_flat)


# --- made-up footage ----------------------------------------------------------------------------------------


Pictures = Callable[[np.random.Generator, int, int, int], Iterator[np.ndarray]]


def make_footage(
    folder: Path,
    count: int,
    seconds: float = SECONDS,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    picture: Pictures | None = None,
) -> Path:
    """Write ``count`` videos with sound: H.264, key frames 250 frames apart, AAC. Returns the folder.

    size: (height, width). picture: ``picture(rng, frames, height, width)`` gives I420 pictures; default `footage`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"footage-{number:03d}.mp4"
        if not path.exists():
            partial = path.with_suffix(".partial")
            rng = np.random.default_rng(number)
            _write(partial, rng, round(seconds * FPS), *size, picture or footage)
            partial.replace(path)
    return folder


def _write(path: Path, rng: np.random.Generator, frames: int, height: int, width: int, picture: Pictures) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"preset": "medium", "crf": "23", "g": "250", "threads": "1"}
        video: Any = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound: Any = container.add_stream("aac", rate=44100, layout="mono")
        for t, planes in enumerate(picture(rng, frames, height, width)):
            frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
            frame.pts, frame.time_base = t, Fraction(1, FPS)
            container.mux(video.encode(frame))
        wave = (rng.normal(size=(1, frames * 44100 // FPS)) * 0.05).astype(np.float32)
        wave += 0.2 * np.sin(2 * np.pi * 220 * np.arange(wave.shape[1]) / 44100).astype(np.float32)
        whole = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
        whole.sample_rate, whole.pts, whole.time_base = 44100, 0, Fraction(1, 44100)
        container.mux(sound.encode(whole))
        container.mux([*video.encode(None), *sound.encode(None)])


def footage(rng: np.random.Generator, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """(height * 3 / 2, width) I420 pictures that cost an encoder what a handheld camera costs.

    A background with the spectrum of natural images (amplitude 1 / frequency) that a shaking camera pans over, three
    patches of the same kind that move in front, and the noise of a sensor.
    """
    margin = 48
    planes = [_natural(rng, height + 2 * margin, width + 2 * margin, scale) for scale in (45, 12, 12)]
    patches = [
        (_natural(rng, height // 3, width // 4, 45), rng.uniform(0, 1, 2), rng.uniform(-0.15, 0.15, 2))
        for _ in range(3)
    ]
    shake = np.cumsum(rng.normal(0, 0.9, (frames, 2)), 0)
    grain = rng.normal(0, 1.6, (4, height, width))
    for t in range(frames):
        top, left = np.clip(margin + 20 * np.sin(t / 40) + shake[t], 0, 2 * margin - 1)
        luma = _shifted(planes[0], top, left, height, width)
        for texture, place, speed in patches:
            rows, columns = texture.shape
            y = int(((place[0] + speed[0] * t / FPS) % 1) * (height - rows))
            x = int(((place[1] + speed[1] * t / FPS) % 1) * (width - columns))
            luma[y : y + rows, x : x + columns] = texture
        luma = luma + np.roll(grain[t % 4], t * 7, axis=1)
        chroma = [_shifted(plane, top, left, height, width)[::2, ::2] for plane in planes[1:]]
        parts = [np.clip(luma + 120, 16, 235), *(np.clip(plane + 128, 16, 240) for plane in chroma)]
        yield np.concatenate([part.astype(np.uint8).ravel() for part in parts]).reshape(height * 3 // 2, width)


def _natural(rng: np.random.Generator, height: int, width: int, scale: float) -> np.ndarray:
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width)) ** 1.2
    noise = rng.normal(size=amplitude.shape) + 1j * rng.normal(size=amplitude.shape)
    picture = np.fft.irfft2(noise * amplitude, (height, width))
    return (picture - picture.mean()) / picture.std() * scale


def _shifted(plane: np.ndarray, top: float, left: float, height: int, width: int) -> np.ndarray:
    """A window at a fractional place, by linear interpolation."""
    y, x = int(top), int(left)
    part = plane[y : y + height + 1, x : x + width + 1]
    fy, fx = top - y, left - x
    rows = part[:-1] * (1 - fy) + part[1:] * fy
    return rows[:, :-1] * (1 - fx) + rows[:, 1:] * fx


def _flat(rng: np.random.Generator, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    for t in range(frames):
        yield np.full((height * 3 // 2, width), 60 + t % 100, np.uint8)
