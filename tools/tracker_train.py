"""Training of a tracking head on frozen features: VFS' linear probe for object-level correspondence.

Xu, Wang, arXiv 2103.17263: GOT-10k, one pair per sequence and epoch, Adam without weight decay (nothing but the two 1x1
convolutions learns), the rate falling exponentially from 1e-3 to 1e-5 over 50 epochs, focal loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.draws import Draws
from clipmill.tools.evaluate.evaluator import Progress, silent
from clipmill.tools.evaluate.propagation import read_picture
from clipmill.tools.tracker import TrackerSettings
from clipmill.tools.tracker_head import Head, Loss, balanced_loss, focal_loss, labels, usual_out_scale
from clipmill.tools.tracker_maps import FrozenMaps
from clipmill.tools.tracker_pairs import Usable, training_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTraining:
    """How a tracking head is trained; the defaults are the published ones."""

    head_epochs: int = 50
    """Passes over the training sequences, one pair of each per pass."""
    head_batch: int = 8
    """Pairs per step; pairs that do not fill a last batch are left out."""
    head_lr: float = 1e-3
    """Learning rate of Adam at the first epoch."""
    head_lr_end: float = 1e-5
    """Rate it falls to exponentially."""
    head_loss: Loss = "focal"
    """focal: the published one; balanced: SiamFC's cross-entropy with equal weight for both labels."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss."""
    r_pos: float = 16.0
    """Pixels around the centre of the response that are positive."""
    r_neg: float = 0.0
    """Pixels from which on cells are negative, if larger than r_pos; between them the label is 0.5."""
    max_gap: int = 100
    """Two frames of a pair are less than this apart."""
    out_scale: float | None = None
    """Factor on responses; default: 1e-3 below 1024 channels, else 1e-5."""
    head_seed: int = 0
    """Of the pairs and the first weights."""

    def __post_init__(self) -> None:
        if self.head_epochs < 1 or self.head_batch < 1 or self.max_gap < 1:
            raise ValueError("head_epochs, head_batch and max_gap must be at least 1")
        if not 0 < self.head_lr_end <= self.head_lr:
            raise ValueError(f"need 0 < head_lr_end <= head_lr, got {self.head_lr_end} and {self.head_lr}")


def train_head(
    maps: FrozenMaps,
    sequences: Sequence[Usable],
    settings: TrackerSettings,
    config: HeadTraining,
    *,
    threads: int = 2,
    progress: Progress = silent,
) -> tuple[Head, list[dict[str, Any]]]:
    """A trained head, and a row {epoch, lr, loss} per epoch. The encoder behind ``maps`` must be in eval mode.

    The outcome does not depend on ``threads``.
    """
    device = maps.compute.torch_device
    batch = min(config.head_batch, len(sequences))
    steps = len(sequences) // batch
    head: Head | None = None
    rows = []
    with ThreadPoolExecutor(threads, "pairs") as pool:
        for epoch in range(config.head_epochs):
            order = Draws(config.head_seed, "order", epoch).shuffle(range(len(sequences)))[: steps * batch]
            lr = config.head_lr * (config.head_lr_end / config.head_lr) ** (epoch / config.head_epochs)
            losses = []
            for step, (z, x) in enumerate(_batches(pool, sequences, order, batch, epoch, settings, config, threads)):
                z_maps, x_maps = maps(z), maps(x)
                if head is None:
                    head = _fresh(z_maps.shape[1], config).to(device)
                    optimiser = torch.optim.Adam(head.parameters(), lr)
                optimiser.param_groups[0]["lr"] = lr
                loss = _loss(head(z_maps, x_maps), maps.stride, config)
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"the head's loss is {float(loss)} in epoch {epoch}; the features may be too large"
                    )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
                progress("tracking head", epoch * steps + step + 1, config.head_epochs * steps, "step")
            rows.append({"epoch": epoch, "lr": lr, "loss": float(torch.stack(losses).mean())})
    assert head is not None
    return head.eval().requires_grad_(False), rows


def _fresh(channels: int, config: HeadTraining) -> Head:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.head_seed)
        return Head(channels, config.out_scale or usual_out_scale(channels))


def _loss(responses: Tensor, stride: int, config: HeadTraining) -> Tensor:
    size = responses.shape[2], responses.shape[3]
    targets = labels(size, config.r_pos, config.r_neg, stride).to(responses.device).expand_as(responses)
    if config.head_loss == "focal":
        return focal_loss(responses, targets, config.focal_gamma)
    return balanced_loss(responses, targets)


def _batches(
    pool: ThreadPoolExecutor,
    sequences: Sequence[Usable],
    order: Sequence[int],
    batch: int,
    epoch: int,
    settings: TrackerSettings,
    config: HeadTraining,
    threads: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of target and search patches, a few of them prepared in advance."""

    def make(number: int) -> tuple[np.ndarray, np.ndarray]:
        draws = Draws(config.head_seed, "pair", epoch, number)
        return training_pair(sequences[number], draws, settings, read_picture, config.max_gap)

    rest = iter(order)
    ahead: list[Future] = [pool.submit(make, number) for number in islice(rest, 2 * batch + threads)]
    while ahead:
        pairs = [ahead.pop(0).result() for _ in range(batch)]
        ahead += [pool.submit(make, number) for number in islice(rest, batch)]
        yield np.stack([z for z, _ in pairs]), np.stack([x for _, x in pairs])
