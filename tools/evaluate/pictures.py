"""Pictures of evaluations: confusion matrices, and records beside their nearest neighbours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import AudioSpec, CenterCrop, LogMel, VideoSpec
from clipmill.pipeline.views import Planner, Uniform, View
from clipmill.tools.evaluate.evaluator import write_atomic
from clipmill.tools.evaluate.views import Windows

_MOST_NAMES = 60  # more class names than this cannot be read
_RIGHT, _WRONG = "#2a9d3a", "#c62828"


def confusion_picture(path: Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Write a PNG of a confusion matrix (K, K): shares of each true class, with counts where they can be read."""
    size = len(matrix)
    side = float(np.clip(0.34 * size, 3.2, 14.0))
    figure = Figure(figsize=(side + 1.6, side + 1.0), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if size <= _MOST_NAMES:
        names = [_plain(name) for name in classes]
        axes.set_xticks(range(size), names, rotation=90, fontsize=7)
        axes.set_yticks(range(size), names, fontsize=7)
    if size <= 24:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = str(matrix[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    _write(path, figure)


def strip_picture(
    path: Path,
    queries: np.ndarray,
    neighbours: Sequence[np.ndarray],
    titles: Sequence[Sequence[str]],
    right: np.ndarray,
) -> None:
    """Write a PNG with one row per query: the query, then its neighbours, nearest first.

    queries: (Q, H, W, 3) uint8. neighbours: Q arrays (k, H, W, 3). titles: Q lists of 1 + k. right: (Q, k) bool, which
    neighbours have the query's class.
    """
    rows, columns = len(queries), 1 + len(neighbours[0])
    figure = Figure(figsize=(1.25 * columns, 1.45 * rows), layout="constrained")
    for row in range(rows):
        for column in range(columns):
            axes = figure.add_subplot(rows, columns, row * columns + column + 1)
            axes.imshow(queries[row] if column == 0 else neighbours[row][column - 1])
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(_plain(titles[row][column])[:24], fontsize=6, pad=2)
            colour = "black" if column == 0 else _RIGHT if right[row, column - 1] else _WRONG
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2.5)
    _write(path, figure)


def thumbnails(index: ShardIndex, numbers: np.ndarray, config: LoaderConfig, size: int = 96) -> np.ndarray:
    """Small pictures (n, size, size, 3) uint8 of records: middle frames, or spectrograms if one has no frame.

    numbers: (n,) record numbers, repeats allowed.
    """
    chosen = index.select(np.asarray(numbers, np.int64))
    sound = bool((chosen.column("num_frames") == 0).any())
    if sound:
        mel = AudioSpec(logmel=LogMel())
        planner: Planner = Windows(views=(View(name="sound", modality="audio", duration_s=2.0, augment=mel),))
    else:
        spec = VideoSpec(size=size, crop=CenterCrop(size=size, resize=size), ops=())
        planner = Uniform(views=(View(name="frame", modality="image", augment=spec),))
    pictures = np.empty((len(chosen), size, size, 3), np.uint8)
    start = 0
    with Loader(chosen, planner, batch_size=16, shuffle=False, drop_last=False, config=config) as loader:
        for batch in loader.epoch():
            for row in range(len(batch)):
                if sound:
                    pictures[start] = _spectrogram(batch.audio["sound"][row, 0].numpy(), size)
                else:
                    x_CHW = batch.video["frame"][row, :, 0].numpy()
                    pictures[start] = np.rint(255 * x_CHW.transpose(1, 2, 0)).astype(np.uint8)
                start += 1
    return pictures


def _spectrogram(mel: np.ndarray, size: int) -> np.ndarray:
    """(mels, frames) as a grey picture, low bands at the bottom."""
    rows = np.arange(size)[::-1] * mel.shape[0] // size
    columns = np.arange(size) * mel.shape[1] // size
    picture = mel[rows][:, columns]
    low, high = float(picture.min()), float(picture.max())
    grey = np.rint(255 * (picture - low) / max(high - low, 1e-6)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2)


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # matplotlib takes text between dollar signs for mathematics


def _write(path: Path, figure: Figure) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
