"""What packing a corpus will give and take, from a sample of it: size, quality, time, and how fast clips are read."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from clipmill.datasets.source import Corpus, CorpusError
from clipmill.pipeline.decode.decoder import new_decoder
from clipmill.pipeline.decode.targets import fill
from clipmill.pipeline.draws import fold
from clipmill.pipeline.pack.engine import Engine, Failure
from clipmill.pipeline.pack.engine_local import LocalEngine, cores
from clipmill.pipeline.pack.outcome import Result
from clipmill.pipeline.pack.plan import size_of
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.write import MANIFEST_FILE
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import ShardReader

T = TypeVar("T")
R = TypeVar("R")

CLIP_FRAMES = 16
_READ_S = 1.0  # time spent on reading clips


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """profile, gop, quality: of the shards. sources: in the corpus; sampled: of them. counts: what became of those.

    mb_per_10s: packed pictures and sound; source_mb_per_10s: the same seconds of the source files. total_mb: of the
    whole data set. psnr_db, psnr_min_db: of the pictures, and of the worst frame. pack_s: seconds of one core for one
    source; total_s: for all, with ``workers`` processes. clips_per_s: random clips of 16 frames in one thread.
    """

    profile: str
    gop: int
    quality: int
    sources: int
    sampled: int
    counts: dict[str, int]
    mb_per_10s: float
    source_mb_per_10s: float
    total_mb: float
    psnr_db: float
    psnr_min_db: float
    pack_s: float
    total_s: float
    workers: int
    clips_per_s: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    def describe(self) -> str:
        """A few lines for people."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        minutes, seconds = divmod(round(self.total_s), 60)
        rows = [f"sample of {self.sampled} of {self.sources} sources with profile {self.profile}: {counts}"]
        rates = f"{self.mb_per_10s:.2f} MB for 10 s (sources {self.source_mb_per_10s:.2f})"
        rows.append(f"size     {rates}, about {self.total_mb:.1f} MB in all")
        if self.psnr_db:
            rows.append(f"quality  {self.psnr_db:.1f} dB PSNR, worst frame {self.psnr_min_db:.1f} dB")
        rows.append(
            f"packing  {self.pack_s:.2f} s of one core for a source, about {minutes} min {seconds:02d} s in all with "
            f"{self.workers} workers"
        )
        if self.clips_per_s:
            rows.append(f"reading  {self.clips_per_s:.0f} clips/s of {CLIP_FRAMES} frames in one thread")
        return "\n".join(rows)


def estimate(
    corpus: Corpus,
    settings: PackSettings,
    *,
    sample: int = 8,
    workers: int = 0,
    timeout_s: float = 3600.0,
    memory_gb: float = 8.0,
    on_progress: Callable[[int, int, int, int, int], object] | None = None,
) -> Estimate:
    """Pack ``sample`` sources, spread evenly over the corpus, into a folder that is removed again.

    Raises PackError where none of the sample can be packed, CorpusError for an empty corpus.
    """
    if sample < 1:
        raise ValueError(f"sample = {sample}: at least 1 source is needed")
    if not corpus.sources:
        raise CorpusError("the corpus has no source; name a folder or list with media in it")
    total = len(corpus.sources)
    chosen = np.unique(np.linspace(0, total - 1, min(sample, total)).round().astype(int)).tolist()
    workers = workers or cores()
    engine = _Timed(LocalEngine(workers=workers, timeout_s=timeout_s, memory_gb=memory_gb))
    part = replace(corpus, sources=tuple(corpus.sources[number] for number in chosen), missing=())
    with tempfile.TemporaryDirectory(prefix="clipmill-estimate-") as folder:
        out = Path(folder) / "sample"
        counts = pack(part, out, settings, engine=engine, on_progress=on_progress).counts
        rows = pq.read_table(str(out / MANIFEST_FILE)).to_pylist()
        clips_per_s = _clips_per_s(ShardIndex.open(out))
    packed = sum(row["video_bytes"] + row["audio_bytes"] for row in rows)
    tens = sum(row["duration_s"] for row in rows) / 10
    pictures = [row for row in rows if row["num_frames"] > 0]
    frames = sum(row["num_frames"] for row in pictures)
    pack_s = float(np.mean(engine.seconds))
    return Estimate(
        profile=settings.profile,
        gop=settings.gop,
        quality=settings.quality,
        sources=total,
        sampled=len(chosen),
        counts=counts,
        mb_per_10s=packed / tens / 1e6 if tens else 0.0,
        source_mb_per_10s=sum(row["source_bytes"] for row in rows) / tens / 1e6 if tens else 0.0,
        total_mb=packed / 1e6 * _share(corpus, chosen),
        psnr_db=sum(row["psnr_db"] * row["num_frames"] for row in pictures) / frames if frames else 0.0,
        psnr_min_db=min((row["psnr_min_db"] for row in pictures), default=0.0),
        pack_s=pack_s,
        total_s=pack_s * total / workers,
        workers=workers,
        clips_per_s=clips_per_s,
    )


def _share(corpus: Corpus, chosen: list[int]) -> float:
    """How many times the sample the corpus is: in bytes, or in sources where these are parts of files."""
    if any(source.start_s is not None or source.end_s is not None for source in corpus.sources):
        return len(corpus.sources) / len(chosen)
    sizes = np.array([max(size_of(source.path), 0) for source in corpus.sources], np.float64)
    return float(sizes.sum() / max(sizes[chosen].sum(), 1))


def _clips_per_s(index: ShardIndex) -> float:
    """Whole frames of random clips, from the shard to memory."""
    records = [record for record in index if record.num_frames]
    if not records:
        return 0.0
    reader = ShardReader()
    decoder = new_decoder("auto", reader)
    memory = np.empty(max(record.height * record.width for record in records) * 3 // 2 * CLIP_FRAMES, np.uint8)
    done, start_s = 0, 0.0
    while done <= len(records) or time.perf_counter() - start_s < _READ_S:  # the first round opens decoders
        if done == len(records):
            start_s = time.perf_counter()
        record = records[done % len(records)]
        count = min(CLIP_FRAMES, record.num_frames)
        first = fold(0, done) % (record.num_frames - count + 1)
        frame = record.height * record.width * 3 // 2
        region = (0, 0, record.width, record.height)
        targets = np.array([(first + n, *region, n * frame) for n in range(count)], np.int64)
        fill(decoder, record, targets, memory)
        done += 1
    speed = (done - len(records)) / (time.perf_counter() - start_s)
    reader.close()
    return speed


class _Timed:
    """An engine that notes how many seconds each source took in its worker."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds: list[float] = []

    def __call__(self, run_task: Callable[[T], R], tasks: Iterable[T]) -> Generator[tuple[T, R | Failure], None, None]:
        """See `Engine`."""
        for (_, task), answer in self._engine(_timed, ((run_task, task) for task in tasks)):
            if isinstance(answer, Failure):
                yield task, answer
            else:
                seconds, result = answer
                if isinstance(result, Result):  # not the search for duplicates
                    self.seconds.append(seconds)
                yield task, answer[1]


def _timed(call: tuple[Callable[[Any], Any], Any]) -> tuple[float, Any]:
    run_task, task = call
    start_s = time.perf_counter()
    result = run_task(task)
    return time.perf_counter() - start_s, result
