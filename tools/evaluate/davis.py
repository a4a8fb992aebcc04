"""DAVIS video object segmentation: the first mask propagated along frozen features; J and F as in the toolkit."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipmill.datasets.davis import MaskedVideo, Year, read
from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.tools.evaluate import davis_score as score
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_atomic
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.overlay import laid_over, thumbnail, write_sheet, write_video
from clipmill.tools.evaluate.presets import DAVIS, PUBLISHED_DAVIS
from clipmill.tools.evaluate.propagation import Maps, Overrides, Protocol, placed, read_picture, segment
from clipmill.tools.pictures import evenly, strip
from clipmill.tools.propagate import Seconds

MASKS, VIDEOS, SHEET, TIMES = "masks", "videos", "contact_sheet.png", "times.json"
_IN_SHEET = 6  # frames of a sequence in the contact sheet
_WAITING = 2  # sequences that may wait to be scored and drawn while the next one is propagated

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the DAVIS benchmark."""

    preset: Literal["vfs", "vfs_r50", "crw", "dino", "uvc", "contrastcorr"] = "vfs"
    """Published protocol; size, colour, context, topk, tau and radius change single settings of it."""
    year: Year = "2017"
    """2017: several objects; 2016: one, everything that is not background."""
    split: str = "val"
    """Name of the list of sequences."""
    sequences: tuple[str, ...] = ()
    """Only these sequences."""
    resolution: str = "480p"
    """Folder below JPEGImages and Annotations."""
    score_only: Path | None = None
    """Score the PNG masks of this folder (SEQUENCE/FRAME.png), whoever made them; write - for the encoder."""
    score: bool = True
    """Score the predictions; a test split has nothing to score against."""
    videos: bool = True
    """Write a video per sequence: predicted objects tinted, the truth as a white line."""
    compare_fp32: bool = False
    """Propagate once more with features stored in fp32, and report how the score changes."""
    overrides: Overrides = field(default_factory=Overrides)
    maps: Maps = field(default_factory=Maps)

    @property
    def protocol(self) -> Protocol:
        """The preset with the changes."""
        return self.overrides.apply(DAVIS[self.preset])


def evaluate(encoder: Encoder | None, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Segment and score the sequences of a DAVIS folder. See `Evaluator`.

    Folder ``masks`` of the output can be given to the official toolkit. encoder: not needed with ``score_only``.
    """
    videos = read(
        root,
        year=config.year,
        split=config.split,
        sequences=config.sequences,
        resolution=config.resolution,
        pictures=config.score_only is None,
    )
    seconds = Seconds()
    finished: list[_Finished] = []
    with _Background(out, config) as background:
        if config.score_only is not None:
            for video in videos:
                truth = score.truths(video, config.year)
                background.add(video, score.predictions(config.score_only, video, truth, config.year))
                finished += background.ready()
                progress("score", len(finished), len(videos), "sequences")
        else:
            for video, maps in _segmented(_given(encoder), videos, config, seconds, progress):
                background.add(video, maps)
                finished += background.ready()
        finished += background.rest()
    rows = [row for one in finished for row in one.rows]
    write_sheet(out / SHEET, [(one.title, strip(one.pictures)) for one in finished])
    artefacts = [SHEET, *(score.write_tables(out, rows, config.split) if rows else [])]
    metrics = score.summary(rows) if rows else {}
    settings: dict[str, Any] = {"sequences": [video.name for video in videos], "objects": len(rows)}
    digests = {}
    if config.score_only is None:
        encoder = _given(encoder)
        artefacts += [TIMES, *(f"{VIDEOS}/{video.name}.mp4" for video in videos if config.videos)]
        write_atomic(out / TIMES, _times(seconds, sum(len(video.frames) for video in videos)))
        settings |= {"stage": config.maps.stage_of(encoder), "protocol": asdict(config.protocol)}
        digests["encoder"] = encoder_digest(encoder)
        if config.compare_fp32 and rows:
            metrics |= _changes(metrics, encoder, videos, config, progress)
    whole = config.score_only is None and (config.year, config.split, config.sequences) == ("2017", "val", ())
    return Report(
        benchmark="davis",
        metrics=metrics,
        rows=rows,
        artefacts=artefacts,
        settings=settings | {"config": to_json(config)},
        digests=digests,
        published=PUBLISHED_DAVIS.get(config.preset, ()) if whole else (),
    )


def probe(encoder: Encoder, root: Path, sequences: int, config: Config | None = None) -> Callable[[], dict[str, float]]:
    """J&F, J and F means of the first ``sequences`` sequences of a split, for looks at an encoder in training.

    Corpus and encoder are checked here; the call that comes back measures. It writes nothing; the encoder keeps its
    mode, its device and its weights.
    """
    config = config or Config()
    videos = read(root, year=config.year, split=config.split, sequences=config.sequences, resolution=config.resolution)
    videos = videos[:sequences]
    config.maps.stage_of(encoder)
    for video in videos:
        score.truths(video, config.year)

    def measure() -> dict[str, float]:
        found = _scores(encoder, videos, config, silent)
        return {f"davis_{name}": found[key] for name, key in (("jf", "J&F-Mean"), ("j", "J-Mean"), ("f", "F-Mean"))}

    return measure


def _given(encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise ValueError("without --score-only FOLDER an encoder is needed; name a run folder or random:BACKBONE")
    return encoder


def _segmented(encoder: Encoder, videos: Sequence[MaskedVideo], config: Config, seconds: Seconds, progress: Progress):
    """(video, label maps of all its frames), one after the other."""
    total, done = sum(len(video.frames) for video in videos), 0
    protocol = config.protocol
    with placed(encoder, config.maps):
        for video in videos:
            if config.score:
                score.truths(video, config.year)  # what cannot be scored is told before the work is done
            maps = []
            for ids in segment(
                encoder, video.frames, score.opening(video, config.year), protocol, config.maps, seconds
            ):
                maps.append(ids)
                done += 1
                progress("propagate", done, total, "frames")
            yield video, maps


def _scores(encoder: Encoder, videos: Sequence[MaskedVideo], config: Config, progress: Progress) -> dict[str, float]:
    """The official numbers, without writing anything."""
    rows: list[Row] = []
    for video, maps in _segmented(encoder, videos, config, Seconds(), progress):
        rows += score.object_rows(video, score.truths(video, config.year), maps)
    return score.summary(rows)


def _changes(
    metrics: dict[str, float], encoder: Encoder, videos: Sequence[MaskedVideo], config: Config, progress: Progress
) -> dict[str, float]:
    """How far the score is from that with features stored in fp32."""
    exact = replace(config, maps=replace(config.maps, store="fp32"))
    whole = _scores(encoder, videos, exact, lambda what, *rest: progress(f"{what} in fp32", *rest))
    return {f"{name}-Change": metrics[name] - whole[name] for name in ("J&F-Mean", "J-Mean", "F-Mean")}


def _times(seconds: Seconds, frames: int) -> bytes:
    per_frame = {f"{name}_ms_per_frame": 1000 * value / frames for name, value in asdict(seconds).items()}
    return (json.dumps({"frames": frames, **per_frame}, indent=2) + "\n").encode()


# --- scoring and drawing while the next sequence is propagated ----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished:
    """One sequence: rows of its objects, and some of its frames for the contact sheet under a title."""

    rows: list[Row]
    title: str
    pictures: list[np.ndarray]


class _Background:
    """Scores, writes and draws sequences in a second thread; outcomes come back in the order of the sequences."""

    def __init__(self, out: Path, config: Config) -> None:
        self._out, self._config = out, config
        self._thread = ThreadPoolExecutor(1, "score")
        self._waiting: deque[Future[_Finished]] = deque()

    def __enter__(self) -> _Background:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, video: MaskedVideo, maps: list[np.ndarray]) -> None:
        """Hand over a sequence."""
        self._waiting.append(self._thread.submit(_finish, video, maps, self._out, self._config))

    def ready(self) -> list[_Finished]:
        """What is done; waits where too much is waiting."""
        found = []
        while self._waiting and (len(self._waiting) > _WAITING or self._waiting[0].done()):
            found.append(self._waiting.popleft().result())
        return found

    def rest(self) -> list[_Finished]:
        """All that is left."""
        return [one.result() for one in self._waiting]


def _finish(video: MaskedVideo, maps: list[np.ndarray], out: Path, config: Config) -> _Finished:
    """Score a sequence and write its masks and its video."""
    truth = score.truths(video, config.year) if config.score else None
    rows = score.object_rows(video, truth, maps) if truth is not None else []
    title = video.name
    if rows:
        means = score.summary(rows)
        title = f"{video.name}   J {means['J-Mean']:.3f}   F {means['F-Mean']:.3f}   {len(rows)} object(s)"

    def overlay(t: int) -> np.ndarray:
        black = np.zeros((*maps[t].shape, 3), np.uint8)
        frame = read_picture(video.frames[t]) if video.frames else black
        return laid_over(frame, maps[t], truth[t] if truth is not None else None)

    if config.score_only is None:
        for path, ids in zip(video.frames, maps, strict=True):
            write_atomic(out / MASKS / video.name / f"{path.stem}.png", label_map_bytes(ids))
        if config.videos:
            write_video(out / VIDEOS / f"{video.name}.mp4", (overlay(t) for t in range(len(maps))))
    first = 0 if config.score_only is None else 1  # only scored frames are read from a folder
    pictures = [thumbnail(overlay(first + t)) for t in evenly(len(maps) - 2 * first, _IN_SHEET)]
    return _Finished(rows=rows, title=title, pictures=pictures)
