"""The fuzzer: spoilt media files through the packer, spoilt shards and indexes through the decoders.

``python -m clipmill.tools.bench.fuzz --media 20000 --shards 5000`` runs it; the same seed gives the same mutants. What
must hold, whatever the bytes: an outcome with a typed reason, a parent that lives, bounded time and memory, and no
wrong frame. A packed frame is right if a plain sequential decode of the same mutant shows it too, in this order (the
same bytes with profile raw, which loses nothing, the nearest to it with the others); a frame read from a shard is right
if it is the one that was packed. Everything else is listed as a finding.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.frame import VideoFrame

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.decode.decoder import new_decoder
from clipmill.pipeline.decode.targets import fill
from clipmill.pipeline.pack.audit import audit
from clipmill.pipeline.pack.convert import Canvas, Converter, Look
from clipmill.pipeline.pack.engine import Failure
from clipmill.pipeline.pack.engine_local import LocalEngine, cores
from clipmill.pipeline.pack.outcome import REASONS, Picture, Result
from clipmill.pipeline.pack.probe import Media, choose_video
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PROFILES, PackSettings
from clipmill.pipeline.pack.task import Task, pack_source, remove_payloads
from clipmill.pipeline.pack.verify import psnr_db
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.shard import ShardReader
from clipmill.tools.bench.memory import status_mb
from clipmill.tools.bench.mutate import FRAMES, HEIGHT, STEP, WIDTH, frame_planes, mutate, write_seeds

_SAME_DB = 33.0  # neighbouring frames of the seeds have 30 dB
_MOST_FRAMES = 2000  # looked at in one file
_PARTS = ("index.arrow", "shard-00000.tar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """What a worker gets: mutant ``number`` of the seeds in ``seeds``, made and judged in ``scratch``."""

    seeds: str
    scratch: str
    seed: int
    number: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """outcome: what the code under test did. compared: frames that were checked. altered: of them, those that are no
    frame of a seed: damage that the decoder itself did not notice. finding: what should not be."""

    outcome: str
    way: str
    compared: int = 0
    altered: int = 0
    finding: str = ""
    peak_mb: float = 0.0


@dataclass(slots=True)
class Report:
    """outcomes: mutants by outcome. compared: frames that were checked and found right. peak_mb: largest worker."""

    mutants: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    altered: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    peak_mb: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "mutants": self.mutants,
            "outcomes": dict(self.outcomes.most_common()),
            "frames_compared": self.compared,
            "frames_altered": dict(self.altered.most_common()),
            "findings": self.findings,
            "peak_mb": round(self.peak_mb),
            "seconds": round(self.seconds, 1),
        }


def fuzz(
    what: str,
    count: int,
    *,
    seed: int = 0,
    first: int = 0,
    workers: int = 0,
    timeout_s: float = 30.0,
    on_progress: Any = None,
) -> Report:
    """Judge mutants ``first`` to ``first + count`` of ``what`` (``media`` or ``shards``) in killable processes."""
    judge, memory_gb = {"media": (judge_media, 2.0), "shards": (judge_shard, 4.0)}[what]  # Arrow reserves 1 GiB
    report, start_s = Report(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="clipmill-fuzz-") as folder:
        seeds, scratch = Path(folder) / "seeds", Path(folder) / "scratch"
        scratch.mkdir()
        paths = write_seeds(seeds)
        if what == "shards":
            seeds = write_data_sets(paths, Path(folder) / "packed")
        tasks = (
            Mutant(seeds=str(seeds), scratch=str(scratch), seed=seed, number=first + number) for number in range(count)
        )
        engine = LocalEngine(workers=workers or cores(), timeout_s=timeout_s, memory_gb=memory_gb)
        with closing(engine(judge, tasks)) as answers:
            for task, answer in answers:
                report.mutants += 1
                if isinstance(answer, Failure):
                    _clean(task)
                    wanted = what == "media" or answer.reason == "timeout"
                    finding = "" if wanted and answer.reason != "crash" else f"{answer.reason}: {answer.detail}"
                    answer = Verdict(answer.reason, "", finding=finding)
                report.outcomes[answer.outcome] += 1
                report.compared += answer.compared
                if answer.altered:
                    report.altered[answer.way.split(" of ")[-1].split(",")[0]] += answer.altered
                report.peak_mb = max(report.peak_mb, answer.peak_mb)
                if answer.finding:
                    report.findings.append(f"{what} {task.number} (seed {task.seed}): {answer.way}: {answer.finding}")
                if on_progress is not None:
                    on_progress(report.mutants, count)
        left = sorted(path.name for path in scratch.iterdir())
        if left:
            report.findings.append(f"{what}: left behind: {', '.join(left[:5])}")
    report.seconds = time.perf_counter() - start_s
    return report


def _clean(task: Mutant) -> None:
    for path in Path(task.scratch).glob(f"{task.number:08d}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@lru_cache(maxsize=4)
def _files(folder: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir()))


# --- media --------------------------------------------------------------------------------------------------


def judge_media(task: Mutant) -> Verdict:
    """Pack one spoilt media file and look at what came of it; runs in a worker."""
    rng = np.random.default_rng((task.seed, task.number))
    files = _files(task.seeds)
    (name, data), (_, other) = (files[int(rng.integers(len(files)))] for _ in range(2))
    way, spoilt = mutate(data, other, rng)
    profile = ("raw", "raw", "cpu", "copy")[int(rng.integers(4))]
    stem = Path(task.scratch) / f"{task.number:08d}"
    path = stem.with_name(f"{stem.name}-{name}")
    path.write_bytes(spoilt)
    settings = PackSettings(profile=profile)
    one = Task(number=0, path=str(path), stem=str(stem), settings=settings)
    result = pack_source(one)
    compared, altered, finding = 0, 0, _untyped(result)
    try:
        if result.picture is not None and not finding:
            compared, altered, finding = _compare_media(result, path, prefix=way == "truncate" and name != "raw.h264")
        path.unlink()
        remove_payloads(one)
    except (av.FFmpegError, OSError, ValueError) as error:
        finding = f"what was packed cannot be read: {error!r}"
    outcome = result.status if result.status != "rejected" else result.reason
    return Verdict(outcome, f"{way} of {name}, {profile}", compared, altered, finding, status_mb("VmHWM"))


def _untyped(result: Result) -> str:
    """What is wrong with an outcome as such."""
    if result.status != "ok" and (result.reason not in REASONS or not result.detail):
        return f"{result.status} for no good reason: {result.reason!r}, {result.detail!r}"
    if result.reason in ("failed", "verify"):
        return f"{result.reason}: {result.detail}"
    if result.status != "rejected" and result.picture is None and result.sound is None:
        return "packed, but nothing was written"
    return ""


def _compare_media(result: Result, path: Path, prefix: bool) -> tuple[int, int, str]:
    """(frames compared, altered ones among them, what is wrong). prefix: they must be the first frames of the seed."""
    picture, done = result.picture, result.facts.get("normalised", {})
    assert picture is not None
    if picture.suffix == ".jpg":
        return 0, 0, ""
    changed = done["turn"] or done["sar"] != "1" or done["deinterlaced"] or done["sizes"] or done["full_range"]
    if changed or done["pix_fmt"] != "yuv420p" or done["matrix"] not in ("bt709", "bt601"):
        return 0, 0, ""
    judged = _compare_frames_with(_plain(path, picture), picture, prefix)
    return judged if not judged[2] else _compare_frames_with(_plain(path, picture, from_key=True), picture, prefix)


def _compare_frames_with(shown: Iterator[np.ndarray], picture: Picture, prefix: bool) -> tuple[int, int, str]:
    current, count, altered = next(shown, None), 0, 0
    equal = np.array_equal if picture.suffix == ".yuv" else _same
    of_seed = (picture.width, picture.height) == (WIDTH, HEIGHT)
    for frame in _written(picture):
        while current is not None and not equal(frame, current):
            current = next(shown, None)
        if current is None:
            why = f"frame {count} of {picture.num_frames} is none that a sequential decode shows then"
            return count, altered, why
        nearest = round((float(np.median(frame[:HEIGHT, :8])) - 24) / STEP)
        whole = of_seed and 0 <= nearest < FRAMES and _same(frame, frame_planes(nearest))
        altered += of_seed and not whole
        if prefix and not (whole and nearest == count):
            return count, altered, f"frame {count} of {picture.num_frames} is not the one of the whole file"
        count += 1
        if count == _MOST_FRAMES:
            break
    return count, altered, ""


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    error = np.subtract(a, b, dtype=np.int32)
    return psnr_db(float((error * error).sum()), a.size) > _SAME_DB


def _written(picture: Picture) -> Iterator[np.ndarray]:
    """(H * 3 / 2, W) I420 of every frame of a payload file."""
    if picture.suffix == ".yuv":
        size = picture.width * picture.height * 3 // 2
        with open(picture.path, "rb") as file:
            for data in iter(lambda: file.read(size), b""):
                yield np.frombuffer(data, np.uint8).reshape(-1, picture.width)
        return
    with av.open(picture.path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray()


def _plain(path: Path, picture: Picture, from_key: bool = False) -> Iterator[np.ndarray]:
    """Frames as a plain loop over the file gives them, damage and all, in the size and with the matrix of ``picture``.

    The file is opened as the packer does, without its name, which would decide what it is taken for. An odd row or
    column is cut off, and colours are converted as in the packer: damaged frames are outside of where two libraries
    agree, and which frame is shown is the question here. from_key: only from the first key packet on, where the packer
    starts; FFmpeg's H.264 decoder carries damage from before it into the frames of the first group of pictures.
    """
    convert = Converter(Canvas(picture.width, picture.height), picture.codec.matrix)
    with Media(str(path)) as media, media.container() as container:
        video = choose_video(container)
        assert video is not None
        video.codec_context.thread_count = 1
        packets = container.demux(video)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, IndexError, av.FFmpegError):
                packet = None
            from_key = from_key and packet is not None and not packet.is_keyframe
            if packet is not None and (from_key or not packet.size):  # an empty one would be taken for the end
                continue
            try:
                frames = video.codec_context.decode(packet)
            except (av.FFmpegError, ValueError):
                frames = []
            for frame in cast(list[VideoFrame], frames):
                if (frame.width & ~1, frame.height & ~1) == (picture.width, picture.height):
                    yield convert(frame, Look.of(frame, None)).to_ndarray()
            if packet is None:
                return


# --- shards -------------------------------------------------------------------------------------------------


def write_data_sets(paths: list[Path], folder: Path) -> Path:
    """Pack some of the seeds with every profile; returns the folder that holds one data set each."""
    chosen = [path for path in paths if path.name in ("b.mp4", "b.mkv", "hevc.mp4", "sound.wav", "a.jpg")]
    corpus = Corpus(sources=tuple(Source(key=path.name, path=str(path)) for path in chosen))
    for profile in PROFILES:
        pack(corpus, folder / profile, PackSettings(profile=profile), workers=1)
    return folder


def judge_shard(task: Mutant) -> Verdict:
    """Read every frame and sample of a data set of which one file is spoilt; runs in a worker."""
    rng = np.random.default_rng((task.seed, task.number))
    profile = PROFILES[int(rng.integers(len(PROFILES)))]
    root = Path(task.seeds) / profile
    victim = _PARTS[int(rng.integers(len(_PARTS)))]
    files = dict(_files(str(root)))
    way, spoilt = mutate(files[victim], files[_PARTS[int(rng.integers(len(_PARTS)))]], rng)
    copy = Path(task.scratch) / f"{task.number:08d}"
    copy.mkdir()
    for name, data in files.items():
        (copy / name).write_bytes(spoilt if name == victim else data)
    compared, outcome, finding = 0, "as packed", ""
    try:
        compared, errors = _compare_shard(copy, _expected(str(root)))
        outcome = "some records refused" if errors else "as packed"
    except ValueError:
        outcome = "refused"
    except _WrongError as error:
        finding = str(error)
    except Exception as error:
        finding = f"an error that is none of ours: {error!r}"
    if not finding and spoilt != files[victim] and not audit(copy, _here):
        finding = "`verify` finds nothing"
    shutil.rmtree(copy)
    return Verdict(outcome, f"{way} of {victim}, {profile}", compared, 0, finding, status_mb("VmHWM"))


class _WrongError(Exception):
    """A frame or sample that is not the one that was packed."""


def _here(run_task: Any, tasks: Any) -> Generator[tuple[Any, Any], None, None]:
    """An engine in this process."""
    for task in tasks:
        yield task, run_task(task)


@lru_cache(maxsize=8)
def _expected(root: str) -> list[tuple[str, list[int], int]]:
    """(key, CRC-32 of every frame, of the sound) of every record of a data set."""
    reader, found = ShardReader(), []
    for record in ShardIndex.open(root):
        decoder = new_decoder("raw" if record.codec.codec == "raw" else "pyav", reader)
        crcs: list[int] = []
        if record.num_frames:
            decoder.decode(record, range(record.num_frames), lambda _, yuv, crcs=crcs: crcs.append(_crc(yuv)))
        sound = reader.samples(record, 0, record.num_samples)
        found.append((record.key, crcs, zlib.crc32(sound.tobytes())))
    reader.close()
    return found


def _crc(yuv: Any) -> int:
    return zlib.crc32(b"".join(plane.tobytes() for plane in yuv))


def _compare_shard(root: Path, expected: list[tuple[str, list[int], int]]) -> tuple[int, int]:
    """(frames that are right, records that were refused); raises _WrongError."""
    index, reader = ShardIndex.open(root), ShardReader()
    auto, plain = new_decoder("auto", reader), new_decoder("pyav", reader)
    compared = refused = 0
    try:
        for row in range(min(len(index), 2 * len(expected))):
            try:
                record = index[row]
                _, frames, sound = expected[row] if row < len(expected) else ("", [], 0)
                compared += _compare_frames(record, frames, auto, plain)
                wave = reader.samples(record, 0, min(record.num_samples, 1 << 24))
                if record.num_samples and zlib.crc32(wave.tobytes()) != sound:
                    raise _WrongError(f"record {row}: other sound than was packed")
            except ValueError:
                refused += 1
    finally:
        reader.close()
    return compared, refused


def _compare_frames(record: VideoRecord, expected: list[int], auto: Any, plain: Any) -> int:
    """Whole frames through ``fill``, as the loader does it, and by `Decoder.decode`, from three places on."""
    count = min(record.num_frames, _MOST_FRAMES)
    if count == 0:
        return 0
    if record.height * record.width > 1 << 24:
        raise ValueError("larger than any seed")  # a slot of that size would be asked for
    for wanted in (list(range(count)), list(range(count // 2, count)), [record.num_frames - 1]):
        seen: dict[int, int] = {}
        if record.codec.codec != "raw":
            plain.decode(record, wanted, lambda number, yuv, seen=seen: seen.update({number: _crc(yuv)}))
        size = record.height * record.width * 3 // 2
        memory = np.zeros(len(wanted) * size, np.uint8)
        region = (0, 0, record.width, record.height)
        targets = np.array([(number, *region, place * size) for place, number in enumerate(wanted)], np.int64)
        fill(auto, record, targets, memory)
        for place, number in enumerate(wanted):
            found = {zlib.crc32(memory[place * size :][:size].tobytes()), seen.get(number, -1)} - {-1}
            if number >= len(expected) or found != {expected[number]}:
                raise _WrongError(f"record {record.index}: frame {number} is not the one that was packed")
    return count


@dataclass(frozen=True, kw_only=True)
class Args:
    """Spoil media files, shards and indexes, and check that nothing hangs, crashes, grows or shows a wrong frame."""

    media: int = 20000
    """Spoilt media files."""
    shards: int = 5000
    """Spoilt shards and indexes."""
    seed: int = 0
    """Of all randomness."""
    first: int = 0
    """Number of the first mutant."""
    workers: int = 0
    """Worker processes; 0 = one per core."""


def main(args: Args) -> int:
    """Run, print a line of JSON for each kind; 1 if there are findings."""
    from clipmill.tools.progress import Progress

    bad = False
    for what, count in (("media", args.media), ("shards", args.shards)):
        if count:
            with Progress(f"fuzz {what}", unit="mutants") as progress:
                report = fuzz(what, count, seed=args.seed, first=args.first, workers=args.workers, on_progress=progress)
            print(json.dumps({"fuzz": what} | report.to_json()), flush=True)
            bad |= bool(report.findings)
    return int(bad)


if __name__ == "__main__":
    import tyro

    from clipmill.tools.bench import fuzz as itself  # under the name by which workers find it

    sys.exit(itself.main(tyro.cli(itself.Args)))
