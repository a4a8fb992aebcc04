"""OTB object tracking: follow the first box by frozen features (SiamFC), score success and precision in one pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from clipmill.datasets import got10k
from clipmill.datasets.otb import BoxedVideo, Suite, read
from clipmill.datasets.otb_sequences import ATTRIBUTES
from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.tools import ope
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_atomic, write_csv
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.otb_pictures import attributes_picture, boxed, curves_picture
from clipmill.tools.evaluate.otb_results import DECIMALS, Scored, read_results, write_result
from clipmill.tools.evaluate.overlay import thumbnail, write_sheet, write_video
from clipmill.tools.evaluate.propagation import Maps, placed, read_picture
from clipmill.tools.pictures import evenly, strip
from clipmill.tools.tracker import Match, Tracked, Tracker, TrackerSettings, track
from clipmill.tools.tracker_head import Head, load_head, save_head
from clipmill.tools.tracker_maps import FrozenMaps, MapOptions
from clipmill.tools.tracker_pairs import usable
from clipmill.tools.tracker_train import HeadTraining, train_head

CURVES, BY_ATTRIBUTE, SHEET, TIMES, VIDEOS, HEAD = (
    "curves.png", "attributes.png", "contact_sheet.png", "times.json", "videos", "head",
)  # fmt: skip
_IN_SHEET = 6  # frames of a sequence in the contact sheet
_GPU_LANES = 16

_VFS = "github.com/xvjiarui/VFS"
_STRUCK = "github.com/jwlim/tracker_benchmark"
PUBLISHED: dict[Suite, list[dict[str, Any]]] = {
    "otb100": [
        {"method": "VFS ResNet-18", "success_auc": 0.523, "precision_20px": 0.700, "source": _VFS},
        {"method": "VFS ResNet-50", "success_auc": 0.525, "precision_20px": 0.739, "source": _VFS},
        {"method": "STRUCK", "success_auc": 0.462, "precision_20px": 0.639, "source": _STRUCK},
    ],
    "otb2013": [{"method": "STRUCK", "success_auc": 0.472, "precision_20px": 0.654, "source": _STRUCK}],
    "otb50": [{"method": "STRUCK", "success_auc": 0.384, "precision_20px": 0.541, "source": _STRUCK}],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the OTB benchmark."""

    suite: Suite = "otb100"
    """Set of sequences; folder: whatever lies in the folder."""
    sequences: tuple[str, ...] = ()
    """Only these sequences, in any toolkit's spelling."""
    score_only: Path | None = None
    """Score the boxes of this folder (SEQUENCE.txt or .json), whoever made them; no encoder is used (write -)."""
    published_tiger1: bool = False
    """Compare Tiger1 as the benchmark's published scores do, five frames out of step."""
    head: Path | None = None
    """Folder of a head trained for this encoder; without one, features are compared as they are."""
    train_head: Path | None = None
    """Train a head first, on sequences in the layout of GOT-10k or OTB in this folder."""
    match: Literal["auto", "dot", "ncc"] = "auto"
    """Plain correlation, or normalised; auto: plain with a head, normalised without."""
    lanes: int = 0
    """Sequences tracked in lock-step, 0 = choose (1 on a CPU); it does not change the boxes."""
    threads: int = 2
    """Threads that read and cut pictures."""
    videos: bool = True
    """Write a video per sequence with both boxes over its frames (tracker: red, truth: white)."""
    maps: Annotated[MapOptions, tyro.conf.arg(name="")] = field(default_factory=MapOptions)
    tracker: Annotated[TrackerSettings, tyro.conf.arg(name="")] = field(default_factory=TrackerSettings)
    training: Annotated[HeadTraining, tyro.conf.arg(name="")] = field(default_factory=HeadTraining)

    def __post_init__(self) -> None:
        if self.head is not None and self.train_head is not None:
            raise ValueError("head and train_head exclude each other; load a head or train one")
        if self.threads < 1 or self.lanes < 0:
            raise ValueError(f"threads must be at least 1 and lanes at least 0, got {self.threads} and {self.lanes}")
        if self.match == "ncc" and (self.head or self.train_head):
            raise ValueError("a trained head is meant for plain correlation; leave match alone")


def evaluate(encoder: Encoder | None, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Track and score the sequences of an OTB folder. See `Evaluator`.

    ``boxes`` in the output folder can be given to any toolkit. encoder: may be None with ``score_only``.
    """
    videos = read(root, suite=config.suite, sequences=config.sequences, pictures=config.score_only is None)
    settings: dict[str, Any] = {"sequences": len(videos), "frames": sum(len(video.boxes) for video in videos)}
    if config.score_only is not None:
        scored, artefacts, digests = read_results(config.score_only, videos, config.published_tiger1), [], {}
    else:
        if encoder is None:
            raise ValueError("without --score-only FOLDER an encoder is needed; name a run folder or random:BACKBONE")
        _check_starts(videos)
        digests = {"encoder": encoder_digest(encoder)}
        found, more, artefacts = _tracked(encoder, videos, out, config, progress)
        scored = [
            Scored(video=v, truth=v.boxes, found=t.boxes.round(DECIMALS)) for v, t in zip(videos, found, strict=True)
        ]
        settings |= more
        artefacts += _drawn(scored, out, config.videos, progress)
    measured: dict[ope.Toolkit, list[ope.Curves]] = {
        toolkit: [ope.score(one.truth, one.found, toolkit) for one in scored] for toolkit in ope.TOOLKITS
    }
    rows = [_row(*parts) for parts in zip(scored, measured["otb"], measured["pysot"], strict=True)]
    artefacts += _tables(rows, measured["otb"], out, config)
    whole = config.score_only is None and not config.sequences
    return Report(
        benchmark="otb",
        metrics=_metrics(measured),
        rows=rows,
        artefacts=artefacts,
        settings=settings | {"config": _told(config)},
        digests=digests,
        published=PUBLISHED.get(config.suite, ()) if whole else (),
    )


def probe(encoder: Encoder, root: Path, sequences: int, config: Config | None = None) -> Callable[[], dict[str, float]]:
    """Success AUC and precision at 20 px on the first ``sequences`` sequences, for looks at an encoder in training.

    Corpus and encoder are checked here; the call that comes back measures. It writes nothing; the encoder keeps its
    mode, its device and its weights.
    """
    config = config or Config(suite="folder")
    videos = read(root, suite=config.suite, sequences=config.sequences)[:sequences]
    _check_starts(videos)
    FrozenMaps(encoder, config.maps)

    def measure() -> dict[str, float]:
        found, _, _ = _tracked(encoder, videos, None, config, silent)
        mean = ope.mean([ope.score(v.boxes, t.boxes.round(DECIMALS)) for v, t in zip(videos, found, strict=True)])
        return {"otb_auc": mean.auc, "otb_precision": mean.precision_20px}

    return measure


def _told(config: Config) -> dict[str, Any]:
    """The options that mattered."""
    options = to_json(config)
    if config.score_only is not None:
        return {name: options[name] for name in ("suite", "sequences", "score_only", "published_tiger1")}
    return {name: value for name, value in options.items() if name not in ("score_only", "published_tiger1", "tracker")}


# --- tracking -----------------------------------------------------------------------------------------------


def _check_starts(videos: Sequence[BoxedVideo]) -> None:
    for video in videos:
        box = video.boxes[0]
        if not (np.isfinite(box).all() and (box[2:] > 0).all()):
            raise ValueError(
                f"{video.name}: the first box {box.tolist()} has no size, so there is nothing to track; correct it"
            )


def _tracked(
    encoder: Encoder, videos: Sequence[BoxedVideo], out: Path | None, config: Config, progress: Progress
) -> tuple[list[Tracked], dict[str, Any], list[str]]:
    """Outcomes, settings that were chosen, names of files written (none without ``out``)."""
    found: list[Tracked | None] = [None] * len(videos)
    artefacts = []
    total, seen = sum(len(video.frames) for video in videos), 0

    def done(frames: int) -> None:
        nonlocal seen
        seen += frames
        progress("track", seen, total, "frames")

    options = Maps(device=config.maps.device)
    with placed(encoder, options), ThreadPoolExecutor(config.threads, "patches") as pool:
        maps = FrozenMaps(encoder, config.maps)
        settings = fitted(config.tracker, maps.stride)
        head, about = _head(encoder, maps, settings, out, config, progress)
        match: Match = "ncc" if config.match == "ncc" or (config.match == "auto" and head is None) else "dot"
        lanes = config.lanes or (_GPU_LANES if maps.device.type == "cuda" else 1)
        tracker = Tracker(maps, settings, head, match, pool if lanes > 1 else None)
        jobs = [(video.frames, video.boxes[0]) for video in videos]
        for number, outcome in track(tracker, jobs, read_picture, lanes=lanes, threads=config.threads, done=done):
            found[number] = outcome
            if out is not None:
                artefacts += write_result(out, videos[number].name, outcome)
    outcomes = [outcome for outcome in found if outcome is not None]
    if out is not None:
        write_atomic(out / TIMES, _times(outcomes))
        artefacts = [TIMES, *([f"{HEAD}/head.json"] if config.train_head else []), *sorted(artefacts)]
    return outcomes, {"maps": maps.about, "tracker": to_json(settings), "match": match, "head": about}, artefacts


def fitted(settings: TrackerSettings, stride: int) -> TrackerSettings:
    """The settings for maps of another stride: as many cells as the response has, enlarged to half a pixel.

    >>> fitted(TrackerSettings(), 4).response_size, fitted(TrackerSettings(), 4).response_up
    (34, 8)
    """
    if stride == settings.stride:
        return settings
    cells = (settings.instance_size - settings.exemplar_size) // stride + 1
    return replace(settings, stride=stride, response_size=cells, response_up=2 * stride)


def _head(
    encoder: Encoder, maps: FrozenMaps, settings: TrackerSettings, out: Path | None, config: Config, progress: Progress
) -> tuple[Head | None, dict[str, Any]]:
    """The head to use, on the device of the maps, and what to report of it."""
    digest = encoder_digest(encoder)
    if config.train_head is not None:
        sequences = usable(got10k.read(config.train_head))
        head, log = train_head(maps, sequences, settings, config.training, threads=config.threads, progress=progress)
        about = maps.about | {"encoder": digest, "sequences": len(sequences), "log": log}
        if out is not None:
            save_head(head, out / HEAD, about)
        return head, about
    if config.head is None:
        return None, {}
    stored = load_head(config.head)
    for name, value in to_json(maps.about | {"encoder": digest}).items():
        if stored.about.get(name) != value:
            raise ValueError(
                f"{config.head}: the head was trained for {name} {stored.about.get(name)}, but this is {value}; "
                "train one for this encoder with --train-head"
            )
    return stored.head.to(maps.device).eval().requires_grad_(False), stored.about


def _times(outcomes: Sequence[Tracked]) -> bytes:
    """Seconds per frame over all frames, and frames per second as the got10k toolkit averages them."""
    seconds = np.concatenate([outcome.seconds for outcome in outcomes])
    rates = [float((1 / s[s > 0]).mean()) for s in (outcome.seconds for outcome in outcomes) if (s > 0).any()]
    facts = {"frames": len(seconds), "seconds_per_frame": float(seconds.mean()), "fps": float(np.mean(rates or [0.0]))}
    return (json.dumps(facts, indent=2) + "\n").encode()


# --- the report ---------------------------------------------------------------------------------------------


def _metrics(measured: Mapping[ope.Toolkit, Sequence[ope.Curves]]) -> dict[str, float]:
    """The OTB toolkit's numbers first, the other two by name; normalised precision is pysot's."""
    mean = {toolkit: ope.mean(found) for toolkit, found in measured.items()}
    otb, pysot, got = (mean[toolkit] for toolkit in ope.TOOLKITS)
    return {
        "success_auc": otb.auc,
        "precision_20px": otb.precision_20px,
        "success_rate": otb.success_rate,
        "norm_precision_20": pysot.norm_precision_20,
        "norm_precision_auc": pysot.norm_auc,
        "pysot/success_auc": pysot.auc,
        "pysot/precision_20px": pysot.precision_20px,
        "got10k/success_auc": got.auc,
        "got10k/precision_20px": got.precision_20px,
        "got10k/success_rate": got.success_rate,
    }


def _row(one: Scored, otb: ope.Curves, pysot: ope.Curves) -> dict[str, Any]:
    return {
        "sequence": one.video.name,
        "frames": len(one.truth),
        "success_auc": otb.auc,
        "precision_20px": otb.precision_20px,
        "success_rate": otb.success_rate,
        "norm_precision_20": pysot.norm_precision_20,
        "attributes": " ".join(one.video.attributes),
    }


def attribute_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean scores of the sequences with each attribute, in the benchmark's order of attributes."""
    found = []
    for short, long in ATTRIBUTES.items():
        having = [row for row in rows if short in str(row["attributes"]).split()]
        if having:
            means = {name: float(np.mean([row[name] for row in having])) for name in ("success_auc", "precision_20px")}
            found.append({"attribute": short, "name": long, "sequences": len(having), **means})
    return found


def _tables(rows: list[dict[str, Any]], measured: Sequence[ope.Curves], out: Path, config: Config) -> list[str]:
    """sequences.csv, attributes.csv, curves.csv and their pictures; returns their names."""
    write_csv(out / "sequences.csv", rows)
    title = "given boxes" if config.score_only else config.suite
    curves_picture(out / CURVES, dict(zip((row["sequence"] for row in rows), measured, strict=True)), title)
    mean = ope.mean(measured)
    lines = [("success", ope.OVERLAPS), ("precision", ope.ERRORS_PX), ("norm_precision", ope.NORM_ERRORS)]
    curve = [
        {"curve": name, "threshold": float(place), "share": float(value)}
        for name, places in lines
        for place, value in zip(places, getattr(mean, name), strict=True)
    ]
    write_csv(out / "curves.csv", curve)
    names = ["sequences.csv", "curves.csv", CURVES]
    if attributes := attribute_rows(rows):
        write_csv(out / "attributes.csv", attributes)
        attributes_picture(out / BY_ATTRIBUTE, attributes)
        names += ["attributes.csv", BY_ATTRIBUTE]
    return names


def _drawn(scored: Sequence[Scored], out: Path, videos: bool, progress: Progress) -> list[str]:
    """A strip of frames per sequence, and videos if wanted; returns the names of the files."""
    sheet, names = [], [SHEET]
    for number, one in enumerate(scored):
        title = f"{one.video.name}: success AUC {ope.score(one.truth, one.found).auc:.3f}"
        sheet.append((title, strip([thumbnail(p) for p in _overlays(one, evenly(len(one.truth), _IN_SHEET))])))
        if videos:
            names.append(f"{VIDEOS}/{one.video.name}.mp4")
            write_video(out / names[-1], _overlays(one, range(len(one.truth))))
        progress("draw", number + 1, len(scored), "sequences")
    write_sheet(out / SHEET, sheet)
    return names


def _overlays(one: Scored, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    for t in numbers:
        yield boxed(read_picture(one.video.frames[t]), one.truth[t], one.found[t])
