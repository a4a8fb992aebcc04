"""Pictures of tracking results: success and precision curves, scores by attribute, boxes over frames."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from clipmill.tools import ope
from clipmill.tools.evaluate.evaluator import write_atomic

TRUTH, FOUND = (255, 255, 255), (255, 60, 40)
_LINE = "#c62828"


def curves_picture(path: Path, sequences: Mapping[str, ope.Curves], title: str) -> None:
    """Write a PNG with the three curves of a set, bold, over those of its sequences."""
    mean = ope.mean(list(sequences.values()))
    panels = (
        ("success", "overlap threshold", ope.OVERLAPS, f"AUC {mean.auc:.3f}", None),
        ("precision", "centre error in px", ope.ERRORS_PX, f"at 20 px {mean.precision_20px:.3f}", 20),
        ("norm_precision", "centre error / box", ope.NORM_ERRORS, f"at 0.2 {mean.norm_precision_20:.3f}", 0.2),
    )
    figure = Figure(figsize=(12.0, 3.9), layout="constrained")
    for number, (name, label, places, legend, mark) in enumerate(panels):
        axes = figure.add_subplot(1, 3, number + 1)
        for one in sequences.values():
            axes.plot(places, getattr(one, name), color="0.75", linewidth=0.7)
        axes.plot(places, getattr(mean, name), color=_LINE, linewidth=2.4, label=f"{title}: {legend}")
        if mark is not None:
            axes.axvline(mark, color="0.3", linewidth=0.8, linestyle=":")
        axes.set(xlabel=label, ylabel="share of frames", xlim=(places[0], places[-1]), ylim=(0, 1.02))
        axes.set_title(name.replace("norm_", "normalised "))
        axes.grid(color="0.9")
        axes.legend(loc="upper right" if name == "success" else "lower right", fontsize=8)
    _write(path, figure)


def attributes_picture(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a PNG of bars: success AUC and precision of every attribute."""
    figure = Figure(figsize=(max(0.75 * len(rows) + 1.5, 4.0), 3.2), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for shift, (name, colour) in zip((-0.2, 0.2), (("success_auc", _LINE), ("precision_20px", "#1565c0")), strict=True):
        axes.bar(places + shift, [float(str(row[name])) for row in rows], 0.38, label=name, color=colour)
    axes.set_xticks(places, [f"{row['attribute']}\n({row['sequences']})" for row in rows], fontsize=8)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    _write(path, figure)


def boxed(picture_HWC: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """A frame with the true box in white and the tracker's in red; boxes without a size are left out."""
    image = Image.fromarray(picture_HWC)
    pen = ImageDraw.Draw(image)
    for box, colour in ((truth, TRUTH), (found, FOUND)):
        if np.isfinite(box).all() and (box[2:] > 0).all():
            x, y, width, height = np.clip(box - [1, 1, 0, 0], -1e4, 1e4).tolist()  # pixel 1 is column 0
            corners = [round(x), round(y), round(x + width - 1), round(y + height - 1)]
            pen.rectangle(
                (*corners[:2], max(corners[2:3] + corners[:1]), max(corners[3:] + corners[1:2])), None, colour, 2
            )
    return np.asarray(image)


def _write(path: Path, figure: Figure) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
