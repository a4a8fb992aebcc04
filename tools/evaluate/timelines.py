"""Pictures of labellings: a coloured bar of the truth above one of what was found, for each video."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clipmill.tools.evaluate.evaluator import write_atomic

_MOST_NAMES = 24  # more classes than this are not named


def timeline_picture(
    path: Path, videos: Sequence[str], pairs: Sequence[tuple[np.ndarray, np.ndarray]], classes: Sequence[str]
) -> None:
    """Write a PNG with two bars per video. pairs: of each video, true and found class numbers (T,)."""
    wheel = colormaps["tab20" if len(classes) <= 20 else "gist_ncar"]
    colours = ListedColormap(wheel(np.linspace(0, 0.95, max(len(classes), 2))))
    figure = Figure(figsize=(9, 0.55 * len(videos) + 1.2), layout="constrained")
    figure.suptitle("truth above, found below", fontsize=8)
    for number, (video, pair) in enumerate(zip(videos, pairs, strict=True), 1):
        axes = figure.add_subplot(len(videos), 1, number)
        picture = np.stack(pair)
        axes.imshow(picture, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=len(classes) - 1 or 1)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.set_ylabel(video.replace("$", r"\$")[-24:], rotation=0, ha="right", va="center", fontsize=6)
    used = sorted({int(label) for pair in pairs for part in pair for label in np.unique(part)})
    if len(used) <= _MOST_NAMES:
        patches = [Patch(color=colours(label), label=classes[label].replace("$", r"\$")) for label in used]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(used), 6), fontsize=6)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
