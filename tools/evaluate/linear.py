"""Linear probe: a linear classifier trained on frozen features.

Multinomial logistic regression on features that are extracted once, so training costs seconds. Options are chosen, if
several are given, on a held-out part of the training split; the test split is scored once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.classification import classification
from clipmill.tools.evaluate.evaluator import Progress, Report, silent
from clipmill.tools.evaluate.features import Compute, Features
from clipmill.tools.evaluate.frozen import frozen_features
from clipmill.tools.evaluate.splits import Splits, smallest_hashes
from clipmill.tools.evaluate.views import Views
from clipmill.tools.metrics import Average, average_views, standardiser, topk_accuracy, unit_rows

Pooling = Literal["features", "moments", "prob", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of the linear probe."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: full-batch, to convergence, nothing random. sgd: mini-batches, for training sets too large for it."""
    weight_decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """L2 penalties wd in mean cross-entropy + wd / 2 |W|^2; several are tried on the held-out part."""
    lrs: tuple[float, ...] = (0.1,)
    """Learning rates of sgd; several are tried on the held-out part."""
    epochs: int = 100
    """Passes of sgd over the training features; iterations of lbfgs."""
    momentum: float = 0.9
    """Of sgd."""
    train_batch: int = 256
    """Training rows per step of sgd."""
    held_out: float = 0.2
    """Share of the training split on which options are chosen, before training on all of it."""
    scaling: Literal["standard", "unit", "none"] = "standard"
    """Features: standardised with training statistics, scaled to length 1, or as they are."""
    average: Pooling = "features"
    """Of a record's views: average their features; take their mean and standard deviation (moments: lets an encoder of
    single frames see motion); or train on every view and average what it gives (prob, score)."""
    seed: int = 0
    """Of the order of mini-batches."""
    views: Views = field(default_factory=Views)
    splits: Splits = field(default_factory=Splits)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        if not self.weight_decays or min(self.weight_decays) < 0 or not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"need weight_decays >= 0 and lrs > 0, got {self.weight_decays} and {self.lrs}")
        if self.epochs < 1 or self.train_batch < 1:
            raise ValueError(f"epochs and train_batch must be at least 1, got {self.epochs} and {self.train_batch}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Train on the training split's features and score the test split. See `Evaluator`."""
    keep_views = config.average != "features"
    if config.average == "moments" and config.views.clips < 2:
        raise ValueError(
            f"average = moments needs at least 2 views of time per record, got clips = {config.views.clips}"
        )
    data = frozen_features(encoder, root, out, config, keep_views=keep_views, progress=progress)
    (lr, weight_decay), tried = choose(data.seen, len(data.classes), config, progress)
    probe = fit(data.seen, len(data.classes), config, lr, weight_decay)
    outcome = classification(probe.scores(data.unseen, config.average), data.test, data.classes, out)
    train_top1 = topk_accuracy(probe.scores(data.seen, config.average), data.seen.label, 1)
    return Report(
        benchmark="linear",
        metrics=outcome.metrics | {"train_top1": train_top1},
        rows=outcome.rows,
        artefacts=outcome.artefacts,
        settings=data.settings | {"chosen": {"lr": lr, "weight_decay": weight_decay}, "tried": tried},
        digests=data.digests,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A trained linear classifier: scaled features @ weight + bias.

    weight (D, K), bias (K,). shift, scale (D,): features become (x - shift) / scale, or unit vectors with ``unit``.
    """

    weight: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    unit: bool

    def scores(self, features: Features, average: Pooling) -> np.ndarray:
        """(N, K) class scores."""
        x = _inputs(features, average)
        x = unit_rows(x) if self.unit else (x - self.shift) / self.scale
        how: Average = "prob" if average == "prob" else "score"
        return average_views(x @ self.weight + self.bias, how)


def choose(
    features: Features, num_classes: int, config: Config, progress: Progress = silent
) -> tuple[tuple[float, float], list[dict[str, float]]]:
    """The (lr, weight decay) that scores best on a held-out part of these features, and all that were tried.

    The part is the same for every encoder: records with the smallest hashed uid of each class. Equal scores keep the
    smaller held-out loss. With one choice nothing is held out.
    """
    lrs = config.lrs if config.solver == "sgd" else config.lrs[:1]
    grid = list(product(lrs, config.weight_decays))
    if len(grid) == 1:
        return grid[0], []
    held = held_out(features, config.held_out)
    if not held.any() or held.all():
        raise ValueError(
            f"{len(features)} training records are too few to hold out a share of {config.held_out} of every class; "
            "give one value of weight_decays and lrs"
        )
    inner, outer = _rows(features, ~held), _rows(features, held)
    tried = []
    for number, (lr, weight_decay) in enumerate(grid):
        scores = fit(inner, num_classes, config, lr, weight_decay).scores(outer, config.average)
        answers = torch.from_numpy(scores)
        log_p = answers.clamp_min(1e-12).log() if config.average == "prob" else answers.log_softmax(1)
        loss = float(F.nll_loss(log_p, torch.from_numpy(outer.label)))
        top1 = topk_accuracy(scores, outer.label, 1)
        tried.append({"lr": lr, "weight_decay": weight_decay, "top1": top1, "loss": loss})
        progress("choosing options", number + 1, len(grid), "fits")
    best = min(range(len(grid)), key=lambda i: (-tried[i]["top1"], tried[i]["loss"]))
    return grid[best], tried


def held_out(features: Features, fraction: float) -> np.ndarray:
    """Mask of the held-out records, ``fraction`` of every class."""
    mask = np.zeros(len(features), bool)
    for label in np.unique(features.label):
        rows = np.flatnonzero(features.label == label)
        mask[rows] = smallest_hashes(features.uid[rows], fraction, "held-out")
    return mask


def fit(features: Features, num_classes: int, config: Config, lr: float, weight_decay: float) -> Probe:
    """Train on all records; with view-wise averages every view is a row of its own."""
    views = _inputs(features, config.average)
    rows = np.ascontiguousarray(views.reshape(-1, views.shape[-1]))
    labels = np.repeat(features.label, views.shape[1])
    shift, scale = np.zeros(rows.shape[1], np.float32), np.ones(rows.shape[1], np.float32)
    if config.scaling == "standard":
        shift, scale = standardiser(rows)
    unit = config.scaling == "unit"
    device = config.compute.torch_device
    x_ND = torch.from_numpy(unit_rows(rows) if unit else (rows - shift) / scale).to(device)
    y_N = torch.from_numpy(labels).to(device)
    weight = torch.zeros(rows.shape[1], num_classes, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    train = _lbfgs if config.solver == "lbfgs" else _sgd
    train(x_ND, y_N, weight, bias, config, lr, weight_decay)
    weight_DK, bias_K = (tensor.detach().cpu().numpy() for tensor in (weight, bias))
    return Probe(weight=weight_DK, bias=bias_K, shift=shift, scale=scale, unit=unit)


def _lbfgs(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, config: Config, lr: float, weight_decay: float) -> None:
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=config.epochs,
        max_eval=2 * config.epochs,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return float(loss.detach())

    solver.step(closure)


def _sgd(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, config: Config, lr: float, weight_decay: float) -> None:
    """Momentum SGD with a cosine schedule; the penalty falls on the weights alone."""
    groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias]}]
    solver = torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.epochs * -(-len(x) // config.train_batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(config.train_batch):
            solver.zero_grad()
            F.cross_entropy(x[rows] @ weight + bias, y[rows]).backward()
            solver.step()
            schedule.step()


def _inputs(features: Features, average: Pooling) -> np.ndarray:
    """(N, V, D): the vectors that are classified, one per record or one per view."""
    if average in ("prob", "score"):
        return features.feature
    return (features.moments if average == "moments" else features.mean)[:, None]


def _rows(features: Features, mask: np.ndarray) -> Features:
    return Features(feature=features.feature[mask], label=features.label[mask], uid=features.uid[mask])
