"""Copying along affinities: the transformations and losses of UVC and ContrastCorr.

X. Li et al., "Joint-task Self-supervised Learning for Temporal Correspondence", NeurIPS 2019, arXiv 1909.11895 (UVC);
N. Wang, W. Zhou, H. Li, "Contrastive Transformation for Self-supervised Correspondence Learning", AAAI 2021, arXiv
2012.05057 (ContrastCorr). As in their released code, features are not normalised and ``tau`` multiplies.

Shapes: features (B, C, h, w) of a reference frame, (B, C, H, W) of a target frame; N = h * w cells, row-major. An
affinity is (B, reference cell, target cell). Everything is computed in at least fp32, also under autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.models.losses import full_precision

LAB_WEIGHTS = (1.0, 10.0, 10.0)


def affinity(reference: Tensor, target: Tensor) -> Tensor:
    """Dot products of all cells, (B, N_r, N_t)."""
    with torch.autocast(reference.device.type, enabled=False):
        return full_precision(reference).flatten(2).transpose(1, 2) @ full_precision(target).flatten(2)


def copied(values: Tensor, weights_BNM: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (B, C, h, w) moved to a grid of ``size``: cell m gets the sum over n of weights[n, m] * values[n]."""
    with torch.autocast(values.device.type, enabled=False):
        return (full_precision(values).flatten(2) @ weights_BNM).unflatten(2, size)


def without_itself(features: Tensor) -> Tensor:
    """How a frame is copied from itself: softmax over the other cells, (B, N, N) with a diagonal of zeros."""
    own = torch.eye(features[0, 0].numel(), dtype=torch.bool, device=features.device)
    return affinity(features, features).masked_fill(own, -torch.inf).softmax(1)


def grid(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) of all cells from -1 to 1, corners included, (h * w, 2)."""
    y, x = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)


def concentration(affinity_BNN: Tensor, size: tuple[int, int], window: int, tau: float = 1.0) -> Tensor:
    """Neighbours should go to one place: spread of the expected positions inside windows, both directions.

    Expected positions in `grid` coordinates are cut into windows of ``window`` cells a side (what is left at the right
    and the bottom does not count); the sum of the two directions' mean squared distances from the window's mean.
    """
    places = grid(*size, affinity_BNN)
    total = affinity_BNN.new_zeros(())
    for one in (affinity_BNN, affinity_BNN.transpose(1, 2)):
        expected = ((tau * one).softmax(1).transpose(1, 2) @ places).unflatten(1, size)  # (B, h, w, 2)
        rows, columns = (n // window * window for n in size)
        parts = expected[:, :rows, :columns].unflatten(2, (-1, window)).unflatten(1, (-1, window))
        total = total + (parts - parts.mean((2, 4), keepdim=True)).square().mean()
    return total


# --- where a reference patch is in a larger frame -----------------------------------------------------------


def expected_places(reference: Tensor, target: Tensor, tau: float = 1.0) -> Tensor:
    """(x, y) of every reference cell in the target, (B, N, 2): from 0 to W and from 0 to H, both included."""
    height, width = target.shape[2:]
    weights = (tau * affinity(reference, target)).softmax(2)
    return weights @ ((grid(height, width, weights) + 1) / 2 * weights.new_tensor([width, height]))


def box_around(places_BN2: Tensor, size: tuple[int, int], frame: tuple[int, int]) -> Tensor:
    """Left, right, top, bottom in cells, (B, 4), of a box of ``size`` around the mean place.

    A box that would begin outside is moved inside; one that would end outside of the frame (H, W) is cut there.
    """
    bounds = []
    for centre, length, limit in zip(places_BN2.mean(1).unbind(1), size[::-1], frame[::-1], strict=True):
        low = (centre - length / 2).clamp(min=0)
        bounds += [low, (low + length).clamp(max=limit)]
    return torch.stack(bounds, 1)


def cut(x: Tensor, box_B4: Tensor, frame: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The content of boxes, resampled to ``size``; (B, C, ., .) to (B, C, *size), differentiable in the boxes.

    box_B4: in cells of a grid of ``frame`` that covers ``x``, whatever the resolution of x. The sampling grid takes
    corners for the outermost points (align_corners), as in the PyTorch release the method was written for.
    """
    with torch.autocast(x.device.type, enabled=False):
        height, width = frame
        left, right, top, bottom = box_B4.unbind(1)
        zero = torch.zeros_like(left)
        across = torch.stack([(right - left) / width, zero, (left + right) / width - 1], 1)
        down = torch.stack([zero, (bottom - top) / height, (top + bottom) / height - 1], 1)
        points = F.affine_grid(torch.stack([across, down], 1), [len(x), 1, *size], align_corners=True)
        return F.grid_sample(full_precision(x), points.to(full_precision(x).dtype), align_corners=True)


# --- over all videos of a batch -----------------------------------------------------------------------------


def across_videos(target: Tensor, reference: Tensor, values: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Reference values copied to target cells that may look at the references of all videos.

    Returns the copies (B, C, h, w) and, for each target cell, the share of its weight that lies on its own video,
    (B, N). Memory: a few times (B * N) ** 2 numbers.
    """
    batch, _, height, width = target.shape
    with torch.autocast(target.device.type, enabled=False):
        rows, columns, colours = (full_precision(x).flatten(2).transpose(1, 2) for x in (target, reference, values))
        weights = (tau * rows.flatten(0, 1) @ columns.flatten(0, 1).T).softmax(1)
        found = (weights @ colours.flatten(0, 1)).view(batch, height, width, -1).permute(0, 3, 1, 2)
        cells = height * width
        mass = torch.einsum("bnbm->bn", weights.view(batch, cells, batch, cells))
        return found, mass


# --- colours ------------------------------------------------------------------------------------------------


def lab_distance(x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
    """Mean absolute difference of each sample in L, a and b, the last two times 10, added up; (B,)."""
    difference = (full_precision(x_B3HW) - full_precision(y_B3HW)).abs().mean((2, 3))
    return difference @ difference.new_tensor(LAB_WEIGHTS)


def kept_mean(distances_B: Tensor, limit: float | None) -> Tensor:
    """Mean over the batch in which samples above ``limit`` count as 0 (and get no gradient)."""
    if limit is None:
        return distances_B.mean()
    return torch.where(distances_B <= limit, distances_B, 0.0).mean()
