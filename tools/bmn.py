"""Boundary-matching network: scores for every (start, duration) of a video, and proposals made of them.

T. Lin, X. Liu, X. Li, E. Ding, S. Wen, "BMN: Boundary-Matching Network for Temporal Action Proposal Generation", ICCV
2019, arXiv 1907.09702; details as in mmaction2 0.11, whose parameter names these are. Times are fractions of the video.
A proposal with duration index d and start index s is [s / T, (s + d + 1) / T]; maps have axes (d, s).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def sample_mask(steps: int, samples: int, bins: int = 3, extend: float = 0.5) -> np.ndarray:
    """(T, N, T, T) float32, axes (time, sample, d, s): how much of each time step is in each sample of a proposal.

    N * bins points lie evenly on the proposal prolonged by ``extend`` of its length at both ends; each gives its weight
    to its two neighbouring steps. A point up to one step before the first gives all of it to that one, as in the
    reference. Proposals beyond the end are zero.
    """
    mask = np.zeros((steps, samples, steps, steps))
    d, s = np.meshgrid(np.arange(steps), np.arange(steps), indexing="ij")
    d, s = d[s + d < steps], s[s + d < steps]
    length = d + 1
    low, high = s - extend * length, s + d + extend * length
    count = samples * bins
    for number in range(count):
        place = low + (high - low) / (count - 1) * number
        base = np.floor(place)
        part = place - base
        left = (place > -1) & (place < 0)
        for index, weight in ((base, 1 - part), (base + 1, np.where(left, 1.0, part))):
            inside = (index >= 0) & (index < steps)
            where: Any = (index[inside].astype(np.int64), number // bins, d[inside], s[inside])
            np.add.at(mask, where, weight[inside] / bins)
    return mask.astype(np.float32)


def valid_cells(steps: int) -> np.ndarray:
    """(d, s) bool: proposals that end inside the video."""
    return np.add.outer(np.arange(steps), np.arange(steps)) < steps


class BMN(nn.Module):
    """features (B, D, T) -> confidence maps (B, 2, d, s) (regression, classification), starts (B, T), ends (B, T).

    widths: of the base, the proposal features after the sample axis, and the map's inner layers.
    """

    mask: Tensor

    def __init__(
        self,
        dim: int,
        *,
        steps: int = 100,
        samples: int = 32,
        bins: int = 3,
        extend: float = 0.5,
        widths: tuple[int, int, int] = (256, 512, 128),
        groups: int = 4,
    ) -> None:
        super().__init__()
        base, deep, plane = widths
        if dim % groups or base % groups:
            raise ValueError(f"{dim} features and a width of {base} cannot be cut into {groups} groups; change groups")
        self.steps, self.samples = steps, samples
        mask = torch.from_numpy(sample_mask(steps, samples, bins, extend))
        self.register_buffer("mask", mask.flatten(1), persistent=False)

        def conv1d(channels: int, out: int, kernel: int = 3, groups: int = 1) -> nn.Conv1d:
            return nn.Conv1d(channels, out, kernel, padding=kernel // 2, groups=groups)

        def boundary() -> nn.Sequential:
            return nn.Sequential(conv1d(base, base, groups=groups), nn.ReLU(), conv1d(base, 1, 1), nn.Sigmoid())

        self.x_1d_b = nn.Sequential(
            conv1d(dim, base, groups=groups), nn.ReLU(), conv1d(base, base, groups=groups), nn.ReLU()
        )
        self.x_1d_s, self.x_1d_e = boundary(), boundary()
        self.x_1d_p = nn.Sequential(conv1d(base, base), nn.ReLU())
        self.x_3d_p = nn.Sequential(nn.Conv3d(base, deep, (samples, 1, 1)), nn.ReLU())
        self.x_2d_p = nn.Sequential(
            nn.Conv2d(deep, plane, 1),
            nn.ReLU(),
            nn.Conv2d(plane, plane, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(plane, plane, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(plane, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, x_BDT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps, starts and ends, all in (0, 1)."""
        base = self.x_1d_b(x_BDT)
        sampled = (self.x_1d_p(base) @ self.mask.to(base.dtype)).unflatten(2, (self.samples, self.steps, self.steps))
        maps = self.x_2d_p(self.x_3d_p(sampled).squeeze(2))
        return maps, self.x_1d_s(base).squeeze(1), self.x_1d_e(base).squeeze(1)


# --- training -----------------------------------------------------------------------------------------------


def labels_of(truth_G2: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets of one video with true segments in [0, 1]: IoU map (d, s), starts (T,) and ends (T,).

    A boundary's label is the share of the step's surroundings, two steps long, that lies within 1.5 steps of a true
    boundary.
    """
    d, s = np.meshgrid(np.arange(steps), np.arange(steps), indexing="ij")
    low, high = s / steps, (s + d + 1) / steps
    step = np.arange(steps)
    around = (step - 0.5) / steps, (step + 1.5) / steps
    iou, start, end = np.zeros((steps, steps)), np.zeros(steps), np.zeros(steps)
    for first, last in np.asarray(truth_G2, np.float64):
        inter = (np.minimum(high, last) - np.maximum(low, first)).clip(0)
        iou = np.maximum(iou, inter / ((high - low) + (last - first) - inter))
        for target, moment in ((start, first), (end, last)):
            reach = np.minimum(around[1], moment + 1.5 / steps) - np.maximum(around[0], moment - 1.5 / steps)
            np.maximum(target, reach.clip(0) / (2 / steps), out=target)
    return iou, start, end


def _balanced(p: Tensor, positive: Tensor, negative: Tensor, count: Tensor) -> Tensor:
    """Sum of weighted logarithms over positives and negatives of ``count`` entries, by their numbers."""
    ratio = (count / positive.sum().clamp(min=1)).clamp(1.05, 21)
    return -(
        0.5 * ratio * positive * (p + 1e-5).log() + 0.5 * ratio / (ratio - 1) * negative * (1 - p + 1e-5).log()
    ).sum()


def boundary_loss(p_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Balanced binary cross-entropy of boundaries, positive above 0.5; scalar."""
    positive = (label_BT > 0.5).to(p_BT.dtype)
    count = positive.new_tensor(positive.numel())
    return _balanced(p_BT, positive, 1 - positive, count) / count


def bmn_loss(
    answer: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor], draws: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The terms ``tem``, ``reg`` and ``cls`` and their sum ``loss`` = tem + 10 reg + cls, pooled over the batch.

    answer: of `BMN`. target: IoU maps, starts and ends. draws: two maps of U(0, 1) that choose among the cells of
    middle and low IoU as many as there are of high IoU (of all, where those are more).
    """
    (maps, start, end), (iou, true_start, true_end) = answer, target
    valid = torch.from_numpy(valid_cells(iou.shape[-1])).to(maps)
    g = iou * valid
    high, middle = (g > 0.7).to(g), ((g > 0.3) & (g <= 0.7)).to(g)
    low = ((g > 0) & (g <= 0.3)).to(g) * valid
    weight = high
    for cells, u in ((middle, draws[0]), (low, draws[1])):
        weight = weight + (cells * u > 1 - high.sum() / cells.sum()).to(g)
    reg = 0.5 * ((maps[:, 0] * weight - g * weight) ** 2).sum() / weight.sum().clamp(min=1)
    positive = (g > 0.9).to(g)
    negative = (g <= 0.9).to(g) * valid
    count = positive.sum().clamp(min=1) + negative.sum()
    cls = _balanced(maps[:, 1], positive, negative, count) / count
    tem = boundary_loss(start, true_start) + boundary_loss(end, true_end)
    return {"loss": tem + 10 * reg + cls, "tem": tem, "reg": reg, "cls": cls}


def train_bmn(
    model: BMN,
    features: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    *,
    epochs: int = 9,
    milestone: int = 7,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train in place with Adam; the rate drops to a tenth after ``milestone`` epochs.

    features: per video (T, D). truths: per video (G, 2) segments in [0, 1].
    """
    if not features:
        raise ValueError("the proposal network needs training videos")
    device = model.mask.device
    x = torch.from_numpy(np.stack(features).astype(np.float32)).transpose(1, 2)
    labels = [labels_of(truth, model.steps) for truth in truths]
    targets = [torch.from_numpy(np.stack(parts).astype(np.float32)) for parts in zip(*labels, strict=True)]
    rng = torch.Generator().manual_seed(seed)
    solver = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    model.train()
    for epoch in range(epochs):
        if epoch == milestone:
            for group in solver.param_groups:
                group["lr"] *= 0.1
        for rows in torch.randperm(len(x), generator=rng).split(batch_size):
            iou, start, end = (target[rows].to(device) for target in targets)
            draws = torch.rand((2, *iou.shape), generator=rng).to(device)
            terms = bmn_loss(model(x[rows].to(device)), (iou, start, end), (draws[0], draws[1]))
            solver.zero_grad()
            terms["loss"].backward()
            solver.step()
        progress(epoch + 1, epochs)
    model.eval()


# --- proposals ----------------------------------------------------------------------------------------------


def _candidates(p_T: np.ndarray, forced: int, forbidden: int) -> np.ndarray:
    """Steps that are local maxima, or above half the maximum, or ``forced``; never ``forbidden``."""
    peak = np.zeros(len(p_T), bool)
    peak[1:-1] = (p_T[1:-1] > p_T[:-2]) & (p_T[1:-1] > p_T[2:])
    chosen = peak | (p_T > 0.5 * p_T.max())
    chosen[forced], chosen[forbidden] = True, False
    return np.flatnonzero(chosen)


def proposals(maps_2DS: np.ndarray, start_T: np.ndarray, end_T: np.ndarray) -> np.ndarray:
    """(P, 3) start, end and score of all pairs of candidate boundaries, times in [0, 1]."""
    steps = len(start_T)
    starts, ends = _candidates(start_T, 0, steps - 1), _candidates(end_T, steps - 1, 0)
    s, e = (axis.ravel() for axis in np.meshgrid(starts, ends, indexing="ij"))
    s, e = s[s < e], e[s < e]
    d = e - s - 1
    score = start_T[s] * end_T[e] * maps_2DS[1, d, s] * maps_2DS[0, d, s]
    return np.stack([s / steps, e / steps, score], 1)


def soft_nms(
    rows_P3: np.ndarray, *, alpha: float = 0.4, low: float = 0.5, high: float = 0.9, top: int = 100
) -> np.ndarray:
    """Up to ``top`` proposals, best first, those near a better one with less score (N. Bodla et al., ICCV 2017).

    A proposal whose IoU with the chosen one is above low + (high - low) * length of the chosen one is multiplied by
    exp(-IoU^2 / alpha).
    """
    rest = np.array(rows_P3, np.float64)
    chosen = []
    while len(rest) and len(chosen) <= top:
        best = rest[:, 2].argmax()
        row = rest[best].copy()
        chosen.append(row)
        rest = np.delete(rest, best, 0)
        length = row[1] - row[0]
        inter = (np.minimum(rest[:, 1], row[1]) - np.maximum(rest[:, 0], row[0])).clip(0)
        iou = inter / (
            length - inter + rest[:, 1] - rest[:, 0]
        )  # in the reference's order: ties with `near` are common
        near = iou > low + (high - low) * length
        rest[near, 2] *= np.exp(-(iou[near] ** 2) / alpha)
    found = np.array(chosen).reshape(-1, 3)
    return found[np.argsort(-found[:, 2], kind="stable")][:top]
