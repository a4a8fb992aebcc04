"""Sound classification: ESC-50, acoustic scenes (DCASE) or any labelled sound, by a linear classifier.

Each fold is scored once by a classifier that was trained on all others; a corpus with the splits train and test is one
fold. Features are those of the last stage of a frozen audio encoder, pooled over time, of several windows of each
recording; window scores are averaged. Protocols of CrissCross's released code (AAAI 2023) and of XDC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.encoder import Encoder
from clipmill.pipeline.audio import log_mel, resample, waveform_to_view
from clipmill.pipeline.config import to_json
from clipmill.pipeline.draws import Draws, fold
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.remote import open_reader
from clipmill.pipeline.shard import Reader
from clipmill.pipeline.sound_spec import AudioSpec, LogMel, Mask, MelCrop, TimeWarp, Volume
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.classification import classification
from clipmill.tools.evaluate.evaluator import Progress, Report, silent
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.opening import encoder_digest, stored_audio_view
from clipmill.tools.evaluate.splits import class_names, require_labels
from clipmill.tools.evaluate.views import plain_audio_view
from clipmill.tools.linear_svm import choose_cost, fit_svm
from clipmill.tools.metrics import softmax, topk_accuracy

_CRISSCROSS = {"AudioSet": (0.905, 0.970), "Kinetics-400": (0.868, 0.960), "Kinetics-Sound": (0.828, 0.930)}


def _published(folds: int, classes: int) -> list[dict[str, Any]]:
    """Of ESC-50 and DCASE 2013, which are known by their numbers of folds and classes."""
    column = {(5, 50): 0, (1, 10): 1}.get((folds, classes))
    source = "pritamqu/CrissCross, model cards"
    if column is None:
        return []
    return [
        {"method": f"CrissCross, {name}", "top1": row[column], "source": source} for name, row in _CRISSCROSS.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of sound classification."""

    classifier: Literal["svm", "linear"] = "svm"
    """svm: linear support vector machine (ESC-50). linear: linear layer trained with Adam (DCASE)."""
    features: Literal["maps", "pooled"] = "maps"
    """maps: the last stage, max-pooled over time. pooled: the encoder's pooled vector."""
    window_s: float | None = None
    """Seconds per window; default: what the encoder was trained on."""
    test_windows: int = 10
    """Windows of a recording that are scored, evenly spread over it."""
    train_windows: int = 10
    """Random windows of a recording to train on (CrissCross: 100 for ESC-50, 60 for DCASE); 0 = those of the test."""
    augment: bool = True
    """Augment the random training windows: volume, time warp, masks, random resize crop."""
    costs: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1.0)
    """svm: costs C to choose from by cross-validation over the training folds."""
    best_cost_on_test: bool = False
    """svm: choose C on the scored fold instead, as the released code does; the score is then optimistic."""
    max_iter: int = 20000
    """svm: iterations of liblinear."""
    epochs: int = 200
    """linear: passes over the training windows."""
    lr: float = 7e-3
    """linear: rate of Adam."""
    weight_decay: float = 1e-5
    """linear: L2 penalty in the gradient."""
    dropout: float = 0.1
    """linear: before the layer."""
    train_batch: int = 512
    """linear: windows per step."""
    trim: bool = False
    """Cut every recording to its first window before windows are spread over it, as the released code does."""
    seed: int = 0
    """Of random windows, their augmentation and the linear layer."""
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if not self.costs or min(self.costs) <= 0:
            raise ValueError(f"costs must be greater than 0, got {self.costs}")
        if self.test_windows < 1 or self.train_windows < 0 or self.epochs < 1 or self.train_batch < 1:
            raise ValueError("test_windows, epochs and train_batch must be at least 1, train_windows at least 0")


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Train and score a classifier for each fold. See `Evaluator`."""
    if encoder.spec.modality != "audio":
        raise ValueError("this encoder is for pictures; name one for sound, e.g. the folder RUN/audio of the run")
    index = ShardIndex.open(root)
    require_labels(index)
    folds = folds_of(index)
    view = plain_audio_view(encoder.spec, stored_audio_view(encoder), config.window_s)
    seen, unseen = describe(encoder, index, view, config, progress)
    labels, classes = index.column("label").astype(np.int64), class_names(index)
    scores = np.zeros((len(index), len(classes)))
    rows: list[dict[str, Any]] = []
    for number, (name, test) in enumerate(folds):
        train = np.flatnonzero(~test if len(folds) > 1 else index.column("split") == "train")
        groups = index.column("split")[train] if len(folds) > 2 else train % 5
        fitted = _svm if config.classifier == "svm" else _linear
        scores[test], facts = fitted(seen[train], labels[train], groups, unseen[test], labels[test], classes, config)
        top1 = topk_accuracy(scores[test], labels[test], 1)
        rows.append({"fold": name, "train": len(train), "test": int(test.sum()), "top1": top1, **facts})
        progress("folds", number + 1, len(folds), "folds")
    tested = np.any([test for _, test in folds], 0)
    outcome = classification(scores[tested], index.select(tested), classes, out)
    per_fold = [row["top1"] for row in rows]
    metrics = {"top1": float(np.mean(per_fold)), "top1_std": float(np.std(per_fold))}
    if "top5" in outcome.metrics:
        parts = [topk_accuracy(scores[test], labels[test], 5) for _, test in folds]
        metrics["top5"] = float(np.mean(parts))
    options = to_json(config)
    options.pop("compute")
    return Report(
        benchmark="sound",
        metrics=metrics,
        rows=rows,
        artefacts=outcome.artefacts,
        settings={"config": options, "view": repr(view), "records": len(index)},
        digests={"data": index.digest, "encoder": encoder_digest(encoder)},
        published=_published(len(folds), len(classes)),
    )


def folds_of(index: ShardIndex) -> list[tuple[str, np.ndarray]]:
    """(name, mask of the scored records) of every fold, by name.

    With the splits train and test there is one fold, test; else every split is one. Raises ValueError for fewer than
    two splits and for a fold whose complement lacks one of its classes.
    """
    split = index.column("split")
    names = sorted(set(split.tolist()) - {""})
    if (split == "").any() or len(names) < 2:
        raise ValueError(f"{index.root}: every record needs a fold, as its split; read the corpus as esc50 or folds")
    if {"train", "test"} <= set(names):
        return [("test", split == "test")]
    label = index.column("label")
    for name in names:
        absent = set(label[split == name].tolist()) - set(label[split != name].tolist())
        if absent:
            raise ValueError(f"{index.root}: class {min(absent)} of fold {name!r} is in no other fold to learn from")
    return [(name, split == name) for name in names]


# --- windows and features -----------------------------------------------------------------------------------


def window_starts(total: int, length: int, count: int) -> np.ndarray:
    """First columns of ``count`` windows spread over a spectrogram of ``total`` columns, int64.

    int(linspace(0, total - length, count)), at least 1 column of room as in the released code; a window longer than
    the signal gives -1: it is taken whole.

    >>> window_starts(501, 200, 4).tolist(), window_starts(501, 200, 1).tolist(), window_starts(150, 200, 2).tolist()
    ([0, 100, 200, 301], [0], [-1, -1])
    """
    if length > total:
        return np.full(count, -1)
    return np.linspace(0, max(total - length, 1), count).astype(np.int64)


def describe(
    encoder: Encoder, index: ShardIndex, view: View, config: Config, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Features of all recordings, (N, windows, D) float32 each: to train on, and to be scored."""
    compute = config.compute
    encoder.to(compute.torch_device)
    was_training = encoder.training
    encoder.eval()
    seen: list[np.ndarray] = []
    unseen: list[np.ndarray] = []
    try:
        for number, (train, test) in enumerate(_windows(index, view, config)):
            fixed = _features(encoder, test, config)
            unseen.append(fixed)
            seen.append(_features(encoder, train, config) if train is not None else fixed)
            if not np.isfinite(fixed).all():
                raise ValueError(f"the features of record {index[number].key!r} are not finite; the encoder diverged")
            progress("features", number + 1, len(index), "records")
    finally:
        encoder.train(was_training)
    return np.stack(seen), np.stack(unseen)


def _windows(index: ShardIndex, view: View, config: Config) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Spectrograms (windows, 1, mels, columns) of each record: random ones if any, and those of the test."""
    spec = view.augment
    assert isinstance(spec, AudioSpec)
    if spec.logmel is None:
        raise ValueError("this encoder was trained on waveforms; sound classification needs a log-mel front end")
    mel, device = spec.logmel, config.compute.torch_device
    columns = round(view.duration_s * mel.hz) // mel.hop
    reader = open_reader(index)
    try:
        for number in range(len(index)):
            record = index[number]
            if not record.num_samples:
                raise ValueError(f"{index.root}: record {record.key!r} has no sound; leave it out of the corpus")
            pcm = _recording(reader, record, view, config.trim)
            train = None
            if config.train_windows:
                drawn = random_windows(pcm, record, view, config)
                train = drawn.to(device)[..., :columns]
            wave = torch.from_numpy(pcm)[None].to(device, torch.float32) / 32768.0
            wave = resample(wave, record.audio_hz, mel.hz, round(len(pcm) * mel.hz / record.audio_hz))
            whole = log_mel(wave, mel)[0]
            starts = window_starts(whole.shape[1], columns, config.test_windows).clip(0).tolist()
            yield train, torch.stack([whole[None, :, start : start + columns] for start in starts])
    finally:
        reader.close()


def _recording(reader: Reader, record: VideoRecord, view: View, trim: bool) -> np.ndarray:
    """int16 samples of a record, with zeros behind them if it is shorter than a window."""
    least = round(view.duration_s * record.audio_hz)
    return reader.samples(record, 0, least if trim else max(least, record.num_samples))


def random_windows(pcm: np.ndarray, record: VideoRecord, view: View, config: Config) -> Tensor:
    """(train_windows, 1, mels, columns): windows that begin anywhere, augmented if wanted."""
    length, count = round(view.duration_s * record.audio_hz), config.train_windows
    rng = Draws(config.seed, record.uid, "windows")
    starts = [rng.integer(len(pcm) - length + 1) for _ in range(count)]
    pieces = torch.from_numpy(np.stack([pcm[start : start + length] for start in starts]))
    keys = np.array([fold(config.seed, record.uid, number) for number in range(count)], np.uint64)
    return waveform_to_view(pieces, record.audio_hz, strong(view) if config.augment else view, keys)


def strong(view: View) -> View:
    """The view with the released training augmentation, masks in proportion to a spectrogram of 80 x 201."""
    spec = view.augment
    assert isinstance(spec, AudioSpec)
    assert isinstance(spec.logmel, LogMel)
    columns = spec.logmel.frames(round(view.duration_s * spec.hz))
    bands = max(2, round(spec.logmel.mels * 10 / 80))
    frames = max(2, round(columns * 20 / 201))
    ops = (
        Volume(),
        TimeWarp(window=frames),
        Mask(axis="frequency", longest=bands),
        Mask(axis="time", longest=frames),
        MelCrop(),
    )
    augment = AudioSpec(hz=spec.hz, logmel=spec.logmel, ops=ops)
    return View(name=view.name, modality="audio", duration_s=view.duration_s, augment=augment)


@torch.no_grad()
def _features(encoder: Encoder, x: Tensor, config: Config) -> np.ndarray:
    found = []
    for part in x.split(config.compute.batch_size):
        with config.compute.autocast():
            if config.features == "pooled":
                found.append(encoder(part).float())
                continue
            maps = encoder.maps(part, encoder.stages[-1]).float()
        found.append(svm_features(maps) if config.classifier == "svm" else probe_features(maps))
    return torch.cat(found).cpu().numpy()


def svm_features(maps_BCHW: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, D): maps max-pooled over time by 3 with stride 2, unit length along time, flattened.

    Divided by sqrt(1 + eps) as the untrained batch normalisation of the released code does.
    """
    pooled = F.max_pool2d(maps_BCHW, (1, min(3, maps_BCHW.shape[-1])), (1, 2))
    return F.normalize(pooled, dim=-1).flatten(1) / (1.0 + eps) ** 0.5


def probe_features(maps_BCHW: Tensor) -> Tensor:
    """(B, D): the same pooling, flattened, each row of unit length."""
    pooled = F.max_pool2d(maps_BCHW, (1, min(3, maps_BCHW.shape[-1])), (1, 2))
    return F.normalize(pooled.flatten(1), dim=1)


# --- classifiers: (N, windows, D) features to (M, K) scores of the scored recordings, and facts for the report -------

_Answer = tuple[np.ndarray, dict[str, Any]]


def _svm(
    seen: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    unseen: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    config: Config,
) -> _Answer:
    rows, targets = seen.reshape(-1, seen.shape[-1]), np.repeat(labels, seen.shape[1])

    def scores(cost: float) -> tuple[np.ndarray, bool]:
        machine = fit_svm(rows, targets, cost, num_classes=len(classes), max_iter=config.max_iter)
        return machine.decisions(unseen).mean(1), machine.converged

    if config.best_cost_on_test and len(config.costs) > 1:
        cost = max(sorted(config.costs), key=lambda c: topk_accuracy(scores(c)[0], truth, 1))
    else:
        cost, _ = choose_cost(rows, targets, np.repeat(groups, seen.shape[1]), config.costs, max_iter=config.max_iter)
    found, converged = scores(cost)
    found = np.where(np.isfinite(found), found, np.min(found[np.isfinite(found)]) - 1)  # classes never seen come last
    return found, {"cost": cost, "converged": converged}


def _linear(
    seen: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    unseen: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    config: Config,
) -> _Answer:
    device = config.compute.torch_device
    x = torch.from_numpy(seen.reshape(-1, seen.shape[-1])).to(device)
    y = torch.from_numpy(np.repeat(labels, seen.shape[1])).to(device)
    test = torch.from_numpy(unseen).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    layer = nn.Linear(x.shape[1], len(classes)).to(device)
    with torch.no_grad():
        layer.weight.copy_(nn.init.orthogonal_(torch.empty(len(classes), x.shape[1]), generator=generator))
        layer.bias.zero_()
    solver = torch.optim.Adam(layer.parameters(), config.lr, weight_decay=config.weight_decay)
    best, found = 0.0, np.zeros((len(truth), len(classes)))
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(config.train_batch):
            part = x[rows.to(device)]
            keep = torch.rand(part.shape, generator=generator).to(device) >= config.dropout
            solver.zero_grad()
            F.cross_entropy(layer(part * keep / (1 - config.dropout)), y[rows.to(device)]).backward()
            solver.step()
        with torch.no_grad():
            found = softmax(layer(test).double().cpu().numpy()).mean(1)
        best = max(best, topk_accuracy(found, truth, 1))
    return found, {"top1_best_epoch": best}
