"""Temporal action segmentation: a temporal head on dense frozen features labels every frame; MoF, edit, F1@{10,25,50}.

The protocol of MS-TCN (Y. Abu Farha, J. Gall, CVPR 2019) on Breakfast, 50Salads and GTEA. Scores are in percent, as the
field writes them, and averaged over the corpus's splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.dense import Dense, extract_dense, sliding, write_npy
from clipmill.tools.evaluate.evaluator import Progress, Report, silent
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.segmentation_files import (
    Layout,
    match_records,
    read_layout,
    read_recognition,
    write_recognition,
)
from clipmill.tools.evaluate.timelines import timeline_picture
from clipmill.tools.mstcn import Head, label_frames, train_head
from clipmill.tools.segmentation_metrics import SegmentationScore, score_segmentation

PICTURE = "timelines.png"
Videos = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of action segmentation."""

    labels: Path | None = None
    """Folder with groundTruth, mapping.txt and splits; default: the data set's folder."""
    split: tuple[int, ...] = ()
    """Numbers of the splits; default: all, and their mean."""
    head: Head = "mstcn"
    """mstcn: the multi-stage network; linear: a classifier of single frames."""
    stages: int = 4
    """Stages of MS-TCN."""
    layers: int = 10
    """Dilated layers per stage."""
    maps: int = 64
    """Channels of a stage."""
    epochs: int = 50
    """Passes over the training videos, one video per step; the last epoch's weights are used."""
    lr: float = 5e-4
    """Of Adam."""
    seed: int = 0
    """Of the head's weights, dropout and order of videos."""
    background: tuple[str, ...] = ("background",)
    """Classes whose segments do not count for edit and F1 (Breakfast's SIL does count)."""
    features: Path | None = None
    """Folder of stored features VIDEO.npy (D, T) to use instead of the encoder's."""
    export: bool = False
    """Write the features as features/VIDEO.npy, (D, T)."""
    score_only: Path | None = None
    """Score the recognised labels of this folder (split_1/VIDEO), whoever made them; write - for the encoder."""
    pictures: int = 8
    """Test videos in the picture of timelines, 0 = no picture."""
    dense: Dense = field(default_factory=Dense)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        for name in ("stages", "layers", "maps", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


def evaluate(encoder: Encoder | None, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Train a head on each split's training videos and score its test videos. See `Evaluator`.

    Labels and features need not have equal lengths: the frames that have both count. With ``dense.every`` = k a head
    sees every k-th frame, and what it says of one holds for k frames.
    """
    layout = read_layout(config.labels or root)
    numbers = config.split or tuple(layout.splits)
    if unknown := [number for number in numbers if number not in layout.splits]:
        raise ValueError(f"{layout.root}: no split {unknown[0]}; it has {', '.join(map(str, layout.splits))}")
    if config.score_only is not None:
        labelled = {number: _recognised(config.score_only, layout, number) for number in numbers}
        settings, digests = {}, {}
    else:
        assert encoder is not None, "an encoder is given unless results are rescored"
        features, settings, digests = _features(encoder, root, out, layout, config, progress)
        labelled = {
            number: _label(features, layout, number, config, progress) for number in numbers
        }  # {split: {video: labels}}
        for number, videos in labelled.items():
            for video, labels in videos.items():
                write_recognition(out / "results" / f"split_{number}" / video, labels, layout.classes)
    scores = {number: _score(videos, layout, config) for number, videos in labelled.items()}
    artefacts = [f"results/split_{number}" for number in numbers] if config.score_only is None else []
    if config.pictures > 0:
        first = numbers[0]
        shown = list(labelled[first])[: config.pictures]
        pairs = [_both(layout.truth(video), labelled[first][video]) for video in shown]
        timeline_picture(out / PICTURE, shown, pairs, layout.classes)
        artefacts.append(PICTURE)
    rows = [row for number in numbers for row in _rows(number, labelled[number], layout, scores[number])]
    means = [_metrics(score) for score in scores.values()]
    return Report(
        benchmark="segmentation",
        metrics={name: float(np.mean([one[name] for one in means])) for name in means[0]},
        rows=rows,
        artefacts=artefacts,
        settings={"config": _options(config), "classes": len(layout.classes), "splits": list(numbers)} | settings,
        digests=digests,
        published=_PUBLISHED if (len(layout.classes), len(layout.splits)) == (48, 4) else (),
    )


def _options(config: Config) -> dict[str, Any]:
    options = to_json(config)
    compute = options.pop("compute")
    return options | {"precision": compute["precision"], "decoder": compute["decoder"]}


# --- features and labels ------------------------------------------------------------------------------------


def _features(
    encoder: Encoder, root: Path, out: Path, layout: Layout, config: Config, progress: Progress
) -> tuple[Videos, dict[str, Any], dict[str, str]]:
    """Features (D, T) of all videos of the corpus, what decides them, and digests."""
    videos = layout.videos
    if config.features is not None:
        return {video: _stored(config.features / f"{video}.npy") for video in videos}, {}, {}
    index = ShardIndex.open(root)
    chosen = index.select(np.array(match_records(index.column("key").tolist(), videos, root)))
    geometry = sliding(encoder.spec, config.dense)
    cache = config.compute.cache or out / "features"
    dense = extract_dense(encoder, chosen, geometry, config.compute, cache / "dense", progress=progress)
    if config.export:
        for number, video in enumerate(videos):
            write_npy(out / "features" / f"{video}.npy", dense[number])
    settings = {"clips": repr(geometry)}
    digests = {"data": index.digest, "videos": chosen.digest, "encoder": encoder_digest(encoder)}
    return {video: dense[number] for number, video in enumerate(videos)}, settings, digests


def _stored(path: Path) -> np.ndarray:
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give features of all videos of the splits") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an array file ({error}); write the features again") from error
    if features.ndim != 2:
        raise ValueError(f"{path}: features must be (D, T), this is {features.shape}")
    return features


def _label(features: Videos, layout: Layout, number: int, config: Config, progress: Progress) -> dict[str, np.ndarray]:
    """Train on a split and label its test videos, frame by frame of the truth."""
    train, test = layout.splits[number]
    every = config.dense.every
    pairs = []
    for video in train:
        labels = layout.truth(video)[::every]
        length = min(features[video].shape[1], len(labels))
        pairs.append((features[video][:, :length], labels[:length]))
    head = train_head(
        config.head,
        pairs,
        len(layout.classes),
        stages=config.stages,
        layers=config.layers,
        maps=config.maps,
        epochs=config.epochs,
        lr=config.lr,
        seed=config.seed,
        device=config.compute.torch_device,
        progress=lambda done, total: progress(f"head of split {number}", done, total, "epochs"),
    )
    found = {}
    for video in test:
        labels = np.repeat(label_frames(head, features[video]), every)
        found[video] = labels[: min(len(labels), len(layout.truth(video)))]
    return found


def _recognised(folder: Path, layout: Layout, number: int) -> dict[str, np.ndarray]:
    """What somebody's files say of the test videos of a split, in folder split_N or in the folder itself."""
    inner = folder / f"split_{number}"
    place = inner if inner.is_dir() else folder
    found = {}
    for video in layout.splits[number][1]:
        path = next((path for path in (place / video, place / f"{video}.txt") if path.is_file()), None)
        if path is None:
            raise ValueError(f"{place}: no file {video} with recognised labels; give those of all test videos")
        found[video] = read_recognition(path, layout.classes)
    return found


# --- scores -------------------------------------------------------------------------------------------------


def _both(truth: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frames that have both."""
    length = min(len(truth), len(found))
    return truth[:length], found[:length]


def _score(videos: Videos, layout: Layout, config: Config) -> SegmentationScore:
    pairs = [_both(layout.truth(video), labels) for video, labels in videos.items()]
    background = [layout.classes.index(name) for name in config.background if name in layout.classes]
    return score_segmentation([found for _, found in pairs], [truth for truth, _ in pairs], background=background)


def _metrics(score: SegmentationScore) -> dict[str, float]:
    names = ("f1@10", "f1@25", "f1@50")
    return dict(zip(names, score.f1, strict=True)) | {"edit": score.edit, "mof": score.mof}


def _rows(number: int, videos: Videos, layout: Layout, score: SegmentationScore) -> list[dict[str, Any]]:
    rows = []
    for place, (video, labels) in enumerate(videos.items()):
        truth, found = _both(layout.truth(video), labels)
        mof = 100.0 * float((truth == found).mean())
        rows.append(
            {"split": number, "video": video, "frames": len(truth), "mof": mof, "edit": float(score.edits[place])}
        )
    return rows


def _published(method: str, *scores: float) -> dict[str, Any]:
    source = "Breakfast, mean of 4 splits; recalled from later papers"
    return {"method": method, "source": source} | dict(
        zip(("f1@10", "f1@25", "f1@50", "edit", "mof"), scores, strict=True)
    )


_PUBLISHED = (
    _published("MS-TCN on I3D", 52.6, 48.1, 37.9, 61.7, 66.3),
    _published("MS-TCN on IDT", 58.2, 52.9, 40.8, 61.4, 65.1),
    _published("MS-TCN++ on I3D", 64.1, 58.6, 45.9, 65.6, 67.6),
    _published("ASFormer on I3D", 76.0, 70.6, 57.4, 75.0, 73.5),
)
