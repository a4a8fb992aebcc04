"""Temporal action localisation: proposals of a boundary-matching network on dense frozen features; AR@AN, AUC, mAP.

The protocol of ActivityNet 1.3: features of one snippet per 16 frames brought to 100 points in time, BMN (T. Lin et
al., ICCV 2019), soft-NMS; for mAP, proposals get the classes that a linear classifier gives the whole video. All scores
are in percent, as the field writes them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.bmn import BMN, proposals, soft_nms, train_bmn
from clipmill.tools.evaluate import linear
from clipmill.tools.evaluate.dense import Dense, extract_dense, sliding
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_csv
from clipmill.tools.evaluate.features import Compute, Features
from clipmill.tools.evaluate.localisation_files import (
    Annotated,
    bare,
    corrected_s,
    read_features,
    read_results,
    read_truth,
    write_features,
    write_results,
)
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.localisation_metrics import (
    DetectionScore,
    Labelled,
    ProposalScore,
    rescale,
    score_detection,
    score_proposals,
)
from clipmill.tools.metrics import softmax

PROPOSALS, DETECTIONS, CURVE = "proposals.json", "detections.json", "average_recall.csv"
_DECIMALS = 4  # of stored features; used unrounded, exported files would give other scores
_AT = (1, 5, 10, 100)

Truth = Mapping[str, Annotated]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of action localisation."""

    annotations: tuple[Path, ...] = ()
    """JSON files of ActivityNet or mmaction; default: annotations.json in the data set's folder."""
    train: str = "train"
    """Subset that trains."""
    test: str = "val"
    """Subset that is scored."""
    interval: int = 16
    """Frames per feature; its frame is the one in the middle."""
    points: int = 100
    """Points in time that a video's features are brought to."""
    bins: int = 3
    """Places that are averaged for each point."""
    samples: int = 32
    """Points at which the network looks at each proposal."""
    widths: tuple[int, int, int] = (256, 512, 128)
    """Channels of the network: base, proposal, map."""
    groups: int = 4
    """Groups of its first convolutions; must divide the number of features."""
    epochs: int = 9
    """Passes over the training videos."""
    milestone: int = 7
    """Epochs after which the rate drops to a tenth."""
    lr: float = 1e-3
    """Of Adam."""
    weight_decay: float = 1e-4
    """Of Adam."""
    train_batch: int = 16
    """Videos per step."""
    top: int = 100
    """Proposals kept per video."""
    classes_per_video: int = 2
    """Classes a video's proposals are labelled with, each with its probability."""
    seed: int = 0
    """Of the network's weights, its order of videos and of sampled cells."""
    features: Path | None = None
    """Folder of stored features v_ID.csv to use instead of the encoder's."""
    export: bool = False
    """Write the features as features/v_ID.csv, with 4 decimals."""
    score_only: Path | None = None
    """Score proposals.json and detections.json of this folder, whoever made them; write - for the encoder."""
    dense: Dense = field(default_factory=Dense)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        positive = ("interval", "points", "bins", "samples", "groups", "epochs", "train_batch", "top")
        for name in (*positive, "classes_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.train == self.test:
            raise ValueError(f"training and test subset are both {self.train!r}; name two with --train and --test")
        if self.dense.every != 1:
            raise ValueError(f"--every is set by --interval here, got {self.dense.every}; leave it out")


def evaluate(encoder: Encoder | None, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Propose and label segments of the test subset, and score them. See `Evaluator`.

    Annotated videos that are not in the data set count for nothing; the settings say how many there are.
    """
    truth = read_truth(*(config.annotations or (root / "annotations.json",)))
    facts: dict[str, Any] = {}
    digests: dict[str, str] = {}
    if config.score_only is None:
        assert encoder is not None, "an encoder is given unless results are rescored"
        for name in (config.train, config.test):
            _subset(truth, name)  # before hours of work
        features, truth, facts, digests = _features(encoder, root, out, truth, config, progress)
        train, test = (_subset(truth, name) for name in (config.train, config.test))
        found = _propose(features, train, test, config, progress)
        labelled = _label(features, train, test, found, config)
        write_results(out / PROPOSALS, {name: _json_rows(rows) for name, rows in found.items()})
        write_results(out / DETECTIONS, {name: _json_rows(*rows) for name, rows in labelled.items()})
        folder = out
    else:
        test, folder = _subset(truth, config.test), config.score_only
    metrics, rows, artefacts = _score(folder, out, test)
    options = to_json(config)
    compute = options.pop("compute")
    return Report(
        benchmark="localisation",
        metrics=metrics,
        rows=rows,
        artefacts=artefacts,
        settings={
            "config": options | {"precision": compute["precision"], "decoder": compute["decoder"]},
            "test_videos": len(test),
            "test_segments": sum(len(one.segments) for one in test.values()),
        }
        | facts,
        digests=digests,
        published=_PUBLISHED if len({label for one in truth.values() for label in one.labels}) == 200 else (),
    )


def _subset(truth: Truth, name: str) -> dict[str, Annotated]:
    found = {video: one for video, one in truth.items() if one.subset == name and len(one.segments)}
    if not found:
        subsets = sorted({one.subset for one in truth.values()})
        raise ValueError(f"no video of subset {name!r} has segments; the annotations have {', '.join(subsets)}")
    return found


# --- features -----------------------------------------------------------------------------------------------


def _features(
    encoder: Encoder, root: Path, out: Path, truth: Truth, config: Config, progress: Progress
) -> tuple[dict[str, np.ndarray], Truth, dict[str, Any], dict[str, str]]:
    """{id: (points, D)}, the truth of those videos with their lengths, settings and digests."""
    wanted = {video: one for video, one in truth.items() if one.subset in (config.train, config.test)}
    if config.features is not None:
        stored = {video: config.features / f"v_{video}.csv" for video in wanted}
        there = {video: one for video, one in wanted.items() if stored[video].is_file()}
        if not there:
            raise ValueError(f"{config.features}: no features v_ID.csv of any annotated video; name their folder")
        x = {video: read_features(stored[video]) for video in there}
        x = {video: one if len(one) == config.points else rescale(one, config.points) for video, one in x.items()}
        return x, there, {"missing_videos": len(wanted) - len(there)}, {}
    index = ShardIndex.open(root)
    number_of = {bare(key): number for number, key in enumerate(index.column("key").tolist())}
    there = [video for video in wanted if video in number_of]
    if not there:
        raise ValueError(f"{root}: no record has the id of an annotated video; pack the videos under their ids")
    chosen = index.select(np.array([number_of[video] for video in there]))
    geometry = sliding(encoder.spec, replace(config.dense, every=config.interval), offset=config.interval // 2)
    cache = config.compute.cache or out / "features"
    dense = extract_dense(encoder, chosen, geometry, config.compute, cache / "dense", progress=progress)
    x, known = {}, {}
    for number, video in enumerate(there):
        record, one = chosen[number], wanted[video]
        x[video] = np.round(rescale(dense[number].T, config.points, config.bins), _DECIMALS)
        known[video] = replace(one, num_frames=record.num_frames, duration_s=one.duration_s or record.duration_s)
        if config.export:
            write_features(out / "features" / f"v_{video}.csv", x[video])
    facts = {"clips": repr(geometry), "missing_videos": len(wanted) - len(there)}
    return x, known, facts, {"data": index.digest, "videos": chosen.digest, "encoder": encoder_digest(encoder)}


def _length_s(one: Annotated, interval: int) -> float:
    """What 1 means on the network's time axis."""
    length_s = corrected_s(one.num_frames, one.duration_s, interval)
    if length_s <= 0:
        raise ValueError("an annotated video has no duration; give annotations with `duration` in seconds")
    return length_s


# --- proposals and classes ----------------------------------------------------------------------------------


def _propose(
    features: Mapping[str, np.ndarray], train: Truth, test: Truth, config: Config, progress: Progress
) -> dict[str, np.ndarray]:
    """{test video: (P, 3) start and end in seconds, score}, best first."""
    dim = next(iter(features.values())).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = BMN(dim, steps=config.points, samples=config.samples, widths=config.widths, groups=config.groups)
    model.to(config.compute.torch_device)
    train_bmn(
        model,
        [features[video] for video in train],
        [(one.segments / _length_s(one, config.interval)).clip(0, 1) for one in train.values()],
        epochs=config.epochs,
        milestone=config.milestone,
        lr=config.lr,
        weight_decay=config.weight_decay,
        batch_size=config.train_batch,
        seed=config.seed,
        progress=lambda done, total: progress("proposal network", done, total, "epochs"),
    )
    found = {}
    for done, (video, one) in enumerate(test.items(), 1):
        x = torch.from_numpy(features[video].T.astype(np.float32))[None].to(model.mask.device)
        with torch.no_grad():
            answer = (part[0].double().cpu().numpy() for part in model(x))
        rows = soft_nms(proposals(*answer), top=config.top)
        rows[:, :2] *= _length_s(one, config.interval)
        found[video] = rows
        progress("proposals", done, len(test), "videos")
    return found


def _label(
    features: Mapping[str, np.ndarray], train: Truth, test: Truth, found: Mapping[str, np.ndarray], config: Config
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{video: (rows, labels)}: every proposal once for each of the video's likeliest classes, scores multiplied."""
    names = sorted({label for one in train.values() for label in one.labels.tolist()})
    number = {name: place for place, name in enumerate(names)}
    seen, unseen = (
        Features(
            feature=np.stack([features[video].mean(0) for video in part]).astype(np.float32)[:, None],
            label=np.array([number.get(one.labels[0], -1) for one in part.values()]),
            uid=np.arange(len(part), dtype=np.uint64),
        )
        for part in (train, test)
    )
    options = linear.Config(weight_decays=(1e-3,), compute=config.compute)
    probe = linear.fit(seen, len(names), options, options.lrs[0], options.weight_decays[0])
    shares = softmax(probe.scores(unseen, "features"))
    labelled = {}
    for video, share in zip(test, shares, strict=True):
        best = np.argsort(-share, kind="stable")[: config.classes_per_video]
        rows = np.concatenate([found[video] * (1, 1, share[label]) for label in best])
        labels = np.repeat(np.array([names[label] for label in best], object), len(found[video]))
        order = np.argsort(-rows[:, 2], kind="stable")
        labelled[video] = rows[order], labels[order]
    return labelled


def _json_rows(rows_P3: np.ndarray, labels_P: np.ndarray | None = None) -> list[dict[str, Any]]:
    rows = [{"score": score, "segment": [start, end]} for start, end, score in rows_P3.tolist()]
    return (
        rows if labels_P is None else [{"label": str(label)} | row for label, row in zip(labels_P, rows, strict=True)]
    )


# --- scores -------------------------------------------------------------------------------------------------


def _score(folder: Path, out: Path, test: Truth) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
    """Metrics, rows and artefacts of the result files in ``folder``: of either, or of both."""
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    artefacts = []
    if (folder / PROPOSALS).is_file():
        found: Mapping[Hashable, np.ndarray] = {
            name: np.column_stack(parts[1:]) for name, parts in read_results(folder / PROPOSALS).items()
        }
        score = score_proposals(found, {video: one.segments for video, one in test.items()})
        metrics |= {"auc": score.auc} | {f"ar@{number}": 100 * score.at(number) for number in _AT}
        _write_curve(out / CURVE, score)
        artefacts += [PROPOSALS, CURVE]
    if (folder / DETECTIONS).is_file():
        truth = Labelled.of({video: (one.labels, one.segments) for video, one in test.items()})
        results = {name: parts for name, parts in read_results(folder / DETECTIONS).items() if name in test}
        if not results:
            raise ValueError(f"{folder / DETECTIONS}: none of its videos is in the test subset; check their ids")
        detection = score_detection(Labelled.of(results), truth)
        metrics |= _maps(detection)
        rows = _class_rows(detection, truth)
        artefacts.append(DETECTIONS)
    if not artefacts:
        raise ValueError(f"{folder}: neither {PROPOSALS} nor {DETECTIONS} there; name the folder of results")
    return metrics, rows, artefacts if folder == out else [name for name in artefacts if name == CURVE]


def _maps(score: DetectionScore) -> dict[str, float]:
    by = 100 * score.by_threshold
    return {
        "map": 100 * score.average,
        "map@0.5": float(by[0]),
        "map@0.75": float(by[5]),
        "map@0.95": float(by[9]),
        "unknown_detections": float(score.unknown),
    }


def _class_rows(score: DetectionScore, truth: Labelled) -> list[dict[str, Any]]:
    return [
        {
            "class": name,
            "segments": int((truth.label == name).sum()),
            "ap@0.5": 100 * float(column[0]),
            "ap": 100 * float(column.mean()),
        }
        for name, column in zip(score.classes, score.ap.T, strict=True)
    ]


def _write_curve(path: Path, score: ProposalScore) -> None:
    pairs = zip(score.numbers.tolist(), (100 * score.average_recall).tolist(), strict=True)
    write_csv(path, [{"proposals_per_video": f"{x:.6g}", "average_recall": f"{y:.6g}"} for x, y in pairs])


_PUBLISHED = (
    {"method": "VCLR (class scores of a fine-tuned TSN)", "auc": 65.5, "ar@100": 73.8, "source": "VCLR repository"},
    {
        "method": "BMN on supervised TSN",
        "auc": 67.1,
        "ar@100": 75.0,
        "map@0.5": 50.1,
        "map@0.75": 34.8,
        "map@0.95": 8.3,
        "map": 33.9,
        "source": "BMN paper, recalled",
    },
)
