"""Dense features: what a frozen encoder says at every k-th frame of every video, from a clip centred on that frame.

The loader streams each video once from its first frame to its last, in chunks that its threads decode side by side;
clips are cut on the device as windows that slide over the stream. So no frame is decoded twice, however long a clip is
and however much clips overlap.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clipmill.models.encoder import InputSpec
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.loader import Loader
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import CenterCrop, VideoSpec
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.evaluator import Progress, silent, write_atomic
from clipmill.tools.evaluate.features import Compute, require_usable
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.views import Placed, normalize

_VERSION = 1  # of the stored files
_SHORTEST, _LONGEST = 32, 128  # frames of a chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """Where features are taken and from what. An option left out is taken from what the encoder was made for."""

    every: int = 1
    """Frames between two features."""
    frames: int | None = None
    """Frames per clip."""
    stride: int | None = None
    """Source frames between two frames of a clip."""
    size: int | None = None
    """Side of the input in pixels."""
    resize: int | None = None
    """Short side in pixels before the centre is cut out; default: size / 0.875."""

    def __post_init__(self) -> None:
        for name in ("every", "frames", "stride", "size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sliding:
    """The geometry of sliding clips.

    A feature stands at frames offset, offset + every, ...; its clip has ``frames`` frames ``stride`` apart, of which
    number frames // 2 is that frame. Frames before the first and after the last are copies of these.
    """

    every: int
    offset: int
    frames: int
    stride: int
    spec: VideoSpec

    @property
    def pace(self) -> int:
        """Frames between two frames of the stream."""
        return gcd(self.every, self.stride) if self.frames > 1 else self.every

    @property
    def before(self) -> int:
        """Frames from the start of a clip to its centre."""
        return self.frames // 2 * self.stride

    def count(self, num_frames: int) -> int:
        """Features of a video."""
        return max(-(-(num_frames - self.offset) // self.every), 0)

    def length(self, num_frames: int, lead: int) -> int:
        """Frames of the stream of a video that begins ``lead`` frames before frame 0."""
        count = self.count(num_frames)
        reach = lead + self.offset - self.before + (self.frames - 1) * self.stride
        return (reach + (count - 1) * self.every) // self.pace + 1 if count else 0

    def windows(self, number: int, lead: int, device: torch.device) -> Tensor:
        """(frames,) places in the stream of the clip of feature ``number``."""
        first = lead + self.offset - self.before + number * self.every
        return (first + self.stride * torch.arange(self.frames, device=device)) // self.pace


def sliding(spec: InputSpec, options: Dense, offset: int = 0) -> Sliding:
    """The geometry for an encoder of videos or pictures."""
    if spec.modality != "video":
        raise ValueError("dense features need an encoder of videos or pictures, this one hears sound")
    size = options.size or spec.size
    resize = options.resize or round(size / 0.875)
    if resize < size:
        raise ValueError(f"cannot cut {size} pixels from a short side of {resize}; use a larger --resize")
    augment = VideoSpec(size=size, crop=CenterCrop(size=size, resize=resize), ops=(normalize(spec),))
    return Sliding(
        every=options.every,
        offset=offset,
        frames=options.frames or spec.num_frames,
        stride=options.stride or spec.stride,
        spec=augment,
    )


# --- the stream ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """All videos of an index as chunks of one length: what `Loader` is given.

    planner: frames outside a video are copies of its first or last one.
    picks: (chunks,) record number of each chunk. lead: frames by which streams begin before frame 0, whole groups of
    pictures, so that chunks begin where decoding can.
    """

    planner: Placed
    picks: np.ndarray
    lead: int

    @staticmethod
    def of(index: ShardIndex, geometry: Sliding) -> Stream:
        """Choose the chunk length that pads videos least, the longer one of equals."""
        keys = index[0].keyframes
        gop = int(keys[1] - keys[0]) if len(keys) > 1 else 1
        lead = -(-max(geometry.before - geometry.offset, 0) // gop) * gop
        shift = (lead + geometry.offset - geometry.before) % geometry.pace
        lengths = np.array([geometry.length(n, lead) for n in index.column("num_frames").tolist()])
        unit = gop // gcd(gop, geometry.pace)
        possible = [n for n in range(unit, _LONGEST + 1, unit) if n >= _SHORTEST] or [_LONGEST]
        each = min(possible, key=lambda n: (int((-(-lengths // n) * n).sum()), -n))
        chunks = -(-lengths // each)
        number = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        view = View(name="stream", num_frames=each, stride=geometry.pace, augment=geometry.spec)
        return Stream(
            planner=Placed(views=(view,), first=shift - lead + number * each * geometry.pace, short="repeat"),
            picks=np.repeat(np.arange(len(index)), chunks),
            lead=lead,
        )

    def loader(self, index: ShardIndex, compute: Compute) -> Loader:
        """The loader of this stream; about as many frames at a time as a forward pass takes clips, in whole chunks."""
        each = self.planner.views[0].num_frames
        return Loader(
            index,
            self.planner,
            batch_size=max(2, -(-compute.batch_size // each)),
            shuffle=False,
            drop_last=False,
            picks=self.picks,
            device=compute.torch_device,
            config=compute.loader,
        )


class _Window:
    """The frames of one video that clips to come still need, and the features found so far."""

    def __init__(self, geometry: Sliding, lead: int, num_frames: int) -> None:
        self._geometry, self._lead = geometry, lead
        self._count = geometry.count(num_frames)
        self._x: Tensor | None = None  # (C, n, H, W)
        self._start = 0  # place of its first frame in the stream
        self._next = 0  # feature whose clip comes next

    @property
    def full(self) -> bool:
        """All clips have been cut."""
        return self._next == self._count

    def clips(self, x_CTHW: Tensor) -> Tensor:
        """Places in (C, n, H, W) frames of all clips that are complete with this chunk, (clips, frames).

        The frames are those of `frames` until the next call.
        """
        if self._x is not None:
            keep = min(int(self._places(self._next)[0]) - self._start, self._x.shape[1])
            self._x, self._start = torch.cat([self._x[:, keep:], x_CTHW], 1), self._start + keep
        else:
            self._x = x_CTHW
        end = self._start + self._x.shape[1]
        geometry = self._geometry
        step = geometry.every // geometry.pace
        first = self._places(self._next)
        ready = min((end - 1 - int(first[-1])) // step + 1, self._count - self._next)
        ready = max(ready, 0)
        self._next += ready
        return (first - self._start)[None] + step * torch.arange(ready)[:, None]

    @property
    def frames(self) -> Tensor:
        """(C, n, H, W)."""
        assert self._x is not None
        return self._x

    def _places(self, number: int) -> Tensor:
        return self._geometry.windows(number, self._lead, torch.device("cpu"))


@torch.no_grad()
def stream_features(
    model: nn.Module, index: ShardIndex, geometry: Sliding, compute: Compute
) -> Iterator[tuple[int, np.ndarray]]:
    """(record number, features (J, D) float32) of every video, in index order; ``model`` should be in eval mode."""
    stream = Stream.of(index, geometry)
    lengths = index.column("num_frames").tolist()
    picks = stream.picks
    window, rows, place = None, [], 0
    with stream.loader(index, compute) as loader:
        for batch in loader.epoch():
            for row in range(len(batch)):
                number = int(picks[place])
                _require_record(loader, batch, row, number)
                place += 1
                if window is None:
                    window, rows = _Window(geometry, stream.lead, lengths[number]), []
                clips = window.clips(batch.video["stream"][row])
                for part in clips.split(compute.batch_size) if len(clips) else ():
                    x = window.frames[:, part.to(window.frames.device)].transpose(0, 1)  # (n, C, T, H, W)
                    with compute.autocast():
                        rows.append(model(x).float().cpu().numpy())
                if window.full:
                    features = np.concatenate(rows)
                    if not np.isfinite(features).all():
                        key = index[number].key
                        raise ValueError(
                            f"the encoder's features of record {key!r} are not finite; it may have diverged"
                        )
                    yield number, features
                    window = None


def _require_record(loader: Loader, batch: ClipBatch, row: int, number: int) -> None:
    if int(batch.index[row]) != number:
        raise ValueError(
            f"{loader.index.root}: record {loader.index[number].key!r} is damaged "
            f"({loader.damaged.get(number, 'unreadable')}); run `clipmill verify` and pack it again"
        )


# --- stored features ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFeatures:
    """Features of the records of an index as files, one per video, that are read when asked for.

    ``features[i]`` is (D, J) float32, read-only, memory-mapped.
    """

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        return np.load(self.paths[number], mmap_mode="r")


def extract_dense(
    model: nn.Module,
    index: ShardIndex,
    geometry: Sliding,
    compute: Compute,
    cache: Path,
    *,
    what: str = "dense features",
    progress: Progress = silent,
) -> DenseFeatures:
    """Run ``model`` in eval mode along all videos of ``index``; videos whose file is in ``cache`` are not read again.

    Raises ValueError for a video without pictures, too short for one feature, damaged, or with features that are not
    finite. The model is moved to the device of ``compute``; its training mode is restored.
    """
    facts = (_VERSION, encoder_digest(model), repr(geometry), compute.precision, compute.decoder)
    folder = cache / hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()
    names = [f"{int(uid):016x}-{digest.hex()[:16]}.npy" for uid, digest in _identities(index)]
    paths = tuple(folder / name for name in names)
    missing = np.array([number for number, path in enumerate(paths) if not _whole(path)], np.int64)
    done = len(index) - len(missing)
    progress(what, done, len(index), "videos")
    if len(missing):
        rest = index.select(missing)
        _require_long_enough(rest, geometry)
        model.to(compute.torch_device)
        was_training = model.training
        model.eval()
        try:
            for number, features in stream_features(model, rest, geometry, compute):
                write_npy(paths[missing[number]], features.T)
                done += 1
                progress(what, done, len(index), "videos")
        finally:
            model.train(was_training)
    return DenseFeatures(paths=paths)


def write_npy(path: Path, x: np.ndarray) -> None:
    """Write an array as float32 .npy; the file appears complete or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(x, np.float32))
    write_atomic(path, buffer.getvalue())


def _identities(index: ShardIndex) -> Iterator[tuple[int, bytes]]:
    return ((record.uid, record.digest) for record in index)


def _whole(path: Path) -> bool:
    """The file can be read: a machine that died may have left a hole where the file system had promised one."""
    try:
        return np.load(path, mmap_mode="r").ndim == 2
    except (OSError, ValueError, EOFError):
        return False


def _require_long_enough(index: ShardIndex, geometry: Sliding) -> None:
    require_usable(index, Placed(views=(View(name="stream"),), first=np.zeros(1, np.int64)))
    short = next((record for record in index if geometry.count(record.num_frames) < 1), None)
    if short is not None:
        raise ValueError(
            f"{index.root}: record {short.key!r} has {short.num_frames} frames, too few for a feature at frame "
            f"{geometry.offset}; leave it out"
        )
