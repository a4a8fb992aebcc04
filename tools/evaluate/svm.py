"""Linear SVM on frozen features: one class against the rest, squared hinge loss, no bias.

The linear protocol of VCLR and of many video methods (liblinear's L2-regularised L2-loss SVM in the primal form):
min over w of |w|^2 / 2 + C * sum of max(0, 1 - y w.x)^2 for every class. C is chosen, if several are given, on a
held-out part of the training split; the test split is scored once. VCLR: --costs 1 --clips 30 --spacing rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.classification import classification
from clipmill.tools.evaluate.evaluator import Progress, Report, silent
from clipmill.tools.evaluate.features import Compute, Features
from clipmill.tools.evaluate.frozen import frozen_features
from clipmill.tools.evaluate.linear import held_out
from clipmill.tools.evaluate.published import published
from clipmill.tools.evaluate.splits import Splits
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import standardiser, topk_accuracy, unit_rows

_NEWTON_STEPS, _CG_STEPS, _HALVINGS = 200, 500, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the linear SVM."""

    costs: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """C, the weight of the errors; several are tried on the held-out part."""
    held_out: float = 0.2
    """Share of the training split on which C is chosen, before training on all of it."""
    scaling: Literal["none", "unit", "standard"] = "none"
    """Features: as they are, scaled to length 1, or standardised with training statistics."""
    average: Literal["features", "moments"] = "features"
    """Of a record's views: average their features, or take their mean and standard deviation (lets an encoder of single
    frames see motion)."""
    views: Views = field(default_factory=Views)
    splits: Splits = field(default_factory=Splits)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if not self.costs or min(self.costs) <= 0:
            raise ValueError(f"costs must be positive numbers, got {self.costs}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Train on the training split's features and score the test split. See `Evaluator`."""
    if config.average == "moments" and config.views.clips < 2:
        raise ValueError(f"average = moments needs at least 2 views of time per record, got {config.views.clips}")
    keep = config.average == "moments"
    data = frozen_features(encoder, root, out, config, keep_views=keep, progress=progress)
    seen, unseen = _scaled(_rows(data.seen, config), _rows(data.unseen, config), config)
    held = held_out(data.seen, config.held_out)
    cost, tried = choose(seen, data.seen.label, held, len(data.classes), config, progress)
    coef = squared_hinge(seen, data.seen.label, len(data.classes), cost, config.compute.torch_device)
    outcome = classification(unseen @ coef, data.test, data.classes, out)
    return Report(
        benchmark="svm",
        metrics=outcome.metrics | {"train_top1": topk_accuracy(seen @ coef, data.seen.label, 1)},
        rows=outcome.rows,
        artefacts=outcome.artefacts,
        settings=data.settings | {"chosen": {"cost": cost}, "tried": tried},
        digests=data.digests,
        published=published("svm", data.classes),
    )


def choose(
    x_ND: np.ndarray, label: np.ndarray, held: np.ndarray, num_classes: int, config: Config, progress: Progress = silent
) -> tuple[float, list[dict[str, float]]]:
    """The C that scores best on the held-out rows, the smallest of equals, and all that were tried.

    held: (N,) mask. With one choice nothing is held out.
    """
    if len(config.costs) == 1:
        return config.costs[0], []
    if not held.any() or held.all():
        raise ValueError(
            f"{len(x_ND)} training records are too few to hold out a share of {config.held_out} of every class; "
            "give one value of costs"
        )
    tried = []
    for number, cost in enumerate(sorted(config.costs), 1):
        coef = squared_hinge(x_ND[~held], label[~held], num_classes, cost, config.compute.torch_device)
        tried.append({"cost": cost, "top1": topk_accuracy(x_ND[held] @ coef, label[held], 1)})
        progress("choosing C", number, len(config.costs), "fits")
    return max(tried, key=lambda row: row["top1"])["cost"], tried


def _rows(features: Features, config: Config) -> np.ndarray:
    return (features.moments if config.average == "moments" else features.mean).astype(np.float64)


def _scaled(seen: np.ndarray, unseen: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    if config.scaling == "unit":
        return unit_rows(seen), unit_rows(unseen)
    if config.scaling == "standard":
        shift, scale = standardiser(seen)
        return (seen - shift) / scale, (unseen - shift) / scale
    return seen, unseen


# --- the solver ---------------------------------------------------------------------------------------------


def squared_hinge(
    x_ND: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    cost: float,
    device: torch.device | None = None,
    tolerance: float = 1e-9,
) -> np.ndarray:
    """The exact minimiser for every class, (D, K) float64: class scores are x @ coef.

    Newton's method on all classes at once, its equations solved by conjugate gradients, steps halved until the
    objective falls: it is convex and piecewise quadratic, so that a few steps end at the minimum. A class is done when
    its gradient is ``tolerance`` times what it was at 0. Raises ValueError if that is not reached.
    """
    x = torch.from_numpy(np.ascontiguousarray(x_ND, np.float64)).to(device)
    sign = torch.full((len(x), num_classes), -1.0, dtype=x.dtype, device=x.device)
    sign[torch.arange(len(x)), torch.from_numpy(label.astype(np.int64)).to(x.device)] = 1.0
    w = torch.zeros(x.shape[1], num_classes, dtype=x.dtype, device=x.device)
    score = x @ w
    first = torch.zeros_like(score[0])  # gradient norms at the start
    for number in range(_NEWTON_STEPS):
        slack = (1 - sign * score).clamp_min(0)
        gradient = w - 2 * cost * x.T @ (sign * slack)
        norm = gradient.norm(dim=0)
        first = first if number else norm.clamp_min(torch.finfo(x.dtype).tiny)
        if bool((norm <= tolerance * first).all()):
            return w.cpu().numpy()
        active = (slack > 0).to(x.dtype)
        accuracy = (norm / first).sqrt().clamp_max(0.1) * norm
        step = _solve(lambda v, a=active: v + 2 * cost * x.T @ (a * (x @ v)), -gradient, accuracy)
        along = x @ step
        length = _step_length(w, step, score, along, sign, cost, (gradient * step).sum(0))
        w, score = w + length * step, score + length * along
    raise ValueError(
        f"the SVM with C = {cost} has not converged in {_NEWTON_STEPS} steps; scale the features or lower C"
    )


def _solve(product: Callable[[Tensor], Tensor], b: Tensor, accuracy: Tensor) -> Tensor:
    """Conjugate gradients for the columns of A v = b at once; a column rests when its residual is small enough."""
    v, residual = torch.zeros_like(b), b.clone()
    direction, power = residual.clone(), residual.square().sum(0)
    for _ in range(_CG_STEPS):
        running = power.sqrt() > accuracy
        if not bool(running.any()):
            break
        image = product(direction)
        length = torch.where(running, power / (direction * image).sum(0).clamp_min(1e-300), 0)
        v, residual = v + length * direction, residual - length * image
        fresh = residual.square().sum(0)
        direction = residual + torch.where(power > 0, fresh / power.clamp_min(1e-300), 0) * direction
        power = torch.where(running, fresh, power)
    return v


def _step_length(
    w: Tensor, step: Tensor, score: Tensor, along: Tensor, sign: Tensor, cost: float, slope: Tensor
) -> Tensor:
    """(K,): the largest of 1, 1/2, 1/4, ... with which every class's objective falls enough (Armijo)."""

    def objective(length: Tensor) -> Tensor:
        slack = (1 - sign * (score + length * along)).clamp_min(0)
        return (w + length * step).square().sum(0) / 2 + cost * slack.square().sum(0)

    length = torch.ones_like(slope)
    start = objective(torch.zeros_like(slope))
    for _ in range(_HALVINGS):
        short = objective(length) > start + 1e-4 * length * slope + 1e-14 * start
        if not bool(short.any()):
            break
        length = torch.where(short, length / 2, length)
    return length
