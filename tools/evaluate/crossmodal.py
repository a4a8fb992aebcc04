"""Cross-modal retrieval: find the video of a sound and the sound of a video, among all records of the test split.

The two encoders of an audio-visual method need not share a space (XDC's do not), so both are joined by regularised
canonical correlation analysis (Hotelling 1936) of the training split's features; nothing of the test split is used.
A query counts as found at k if its own record is among the k nearest of the other modality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.evaluator import Progress, Report, silent
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.frozen import frozen_features
from clipmill.tools.evaluate.opening import encoder_digest, open_encoder
from clipmill.tools.evaluate.splits import Splits
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import unit_rows

DEPTHS = (1, 5, 10, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of cross-modal retrieval."""

    audio: str = ""
    """The audio encoder, e.g. RUN/audio, or random:RUN/audio."""
    dim: int = 16
    """Canonical directions that are compared."""
    ridge: float = 0.1
    """Added to the variances, as a share of their mean."""
    views: Views = field(default_factory=Views)
    splits: Splits = field(default_factory=Splits)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if self.dim < 1 or self.ridge <= 0:
            raise ValueError(f"dim must be at least 1 and ridge greater than 0, got {self.dim} and {self.ridge}")


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Join both modalities on the training split, retrieve in the test split. See `Evaluator`."""
    if not config.audio:
        raise ValueError("--audio names the encoder of the sound, e.g. --audio RUN/audio")
    sound = open_encoder(config.audio, str(config.compute.torch_device))
    if encoder.spec.modality != "video" or sound.spec.modality != "audio":
        raise ValueError("the encoder must be one for pictures and --audio one for sound")
    seen = frozen_features(encoder, root, out, config, keep_views=False, progress=progress)
    heard = frozen_features(sound, root, out, config, keep_views=False, progress=progress)
    pair = canonical(seen.seen.mean, heard.seen.mean, config.dim, config.ridge)
    video, audio = pair.video(seen.unseen.mean), pair.audio(heard.unseen.mean)
    similarity = unit_rows(audio) @ unit_rows(video).T
    metrics: dict[str, float] = {}
    for name, table in (("audio_to_video", similarity), ("video_to_audio", similarity.T)):
        place = ranks(table)
        metrics |= {f"{name}_r@{depth}": float((place < depth).mean()) for depth in DEPTHS if depth <= len(place)}
        metrics[f"{name}_median_rank"] = float(np.median(place + 1))
    labels = seen.unseen.label
    metrics["audio_to_video_class_r@1"] = float((labels[similarity.argmax(1)] == labels).mean())
    metrics["video_to_audio_class_r@1"] = float((labels[similarity.argmax(0)] == labels).mean())
    metrics["chance_r@1"] = 1 / len(labels)
    return Report(
        benchmark="crossmodal",
        metrics=metrics,
        settings=seen.settings | {"views_audio": heard.settings["views"], "correlations": pair.correlation.tolist()},
        digests=seen.digests | {"audio_encoder": encoder_digest(sound)},
    )


def ranks(similarity_NN: np.ndarray) -> np.ndarray:
    """(N,) how many others are nearer to query i than its own row i; equals count half.

    >>> ranks(np.array([[0.9, 0.1], [0.8, 0.3]])).tolist()
    [0.0, 1.0]
    """
    own = np.diag(similarity_NN)[:, None]
    return (similarity_NN > own).sum(1) + ((similarity_NN == own).sum(1) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Canonical:
    """Directions in which two feature spaces vary together. correlation: (dim,) of the training features."""

    means: tuple[np.ndarray, np.ndarray]
    axes: tuple[np.ndarray, np.ndarray]
    correlation: np.ndarray

    def video(self, x_ND: np.ndarray) -> np.ndarray:
        """(N, dim) coordinates of the first space, scaled by the correlations."""
        return (x_ND - self.means[0]) @ self.axes[0] * self.correlation

    def audio(self, x_ND: np.ndarray) -> np.ndarray:
        """(N, dim) coordinates of the second space, scaled by the correlations."""
        return (x_ND - self.means[1]) @ self.axes[1] * self.correlation


def canonical(x_ND: np.ndarray, y_NE: np.ndarray, dim: int, ridge: float) -> Canonical:
    """Regularised canonical correlation analysis of paired rows.

    Each space is whitened with covariance + ridge * mean variance; the singular vectors of the whitened
    cross-covariance are the directions, their singular values the correlations.
    """
    x, y = x_ND.astype(np.float64), y_NE.astype(np.float64)
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    white = []
    for z in (x, y):
        values, axes = np.linalg.eigh(z.T @ z / len(z))
        white.append(axes / np.sqrt(np.maximum(values, 0) + ridge * max(values.mean(), 1e-12)))
    u, correlation, vt = np.linalg.svd(white[0].T @ (x.T @ y / len(x)) @ white[1], full_matrices=False)
    dim = min(dim, len(correlation))
    axes = white[0] @ u[:, :dim], white[1] @ vt[:dim].T
    return Canonical(means=means, axes=axes, correlation=correlation[:dim])
