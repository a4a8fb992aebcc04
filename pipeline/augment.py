"""Raw regions to normalised clips on the device: the torch reference of the augment kernel, and its colour operators.

`crop_resize` turns packed I420 regions into RGB in [0, 1]; `apply_ops` runs a `VideoSpec`'s operators with parameters
that `clipmill.pipeline.spec` drew. Every function works on whole batches on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.pipeline.draws import fold_array
from clipmill.pipeline.spec import (
    MATRICES,
    Blur,
    Cutout,
    Flip,
    Gray,
    Jitter,
    Normalize,
    Op,
    Params,
    VideoSpec,
    yuv_to_rgb_matrix,
)


def op_params(spec: VideoSpec, draws: np.ndarray, num_frames: int, batch_key: int, view_key: str) -> list[Params]:
    """The random parameters of every operator of a view.

    draws: (B,) uint64 keys of the samples. Returns one dict per operator; arrays have N = B rows, or B * num_frames
    when the view draws per frame.
    """
    keys = spec.item_keys(draws, num_frames, view_key)
    shared = np.broadcast_to(fold_array(np.array([batch_key], np.uint64), view_key), keys.shape)
    params = []
    for number, op in enumerate(spec.ops):
        drawn = op.draw(fold_array(keys, number))
        for name in _batch_wide(op):
            drawn[name] = op.draw(fold_array(shared, number))[name]
        params.append(drawn)
    return params


def _batch_wide(op: Op) -> list[str]:
    names = []
    if isinstance(op, Jitter | Blur) and op.coin == "batch":
        names.append("apply")
    if isinstance(op, Blur) and op.strength == "batch":
        names.append("sigma")
    if isinstance(op, Jitter) and op.order == "batch":
        names.append("order")
    return names


# --- YUV region -> RGB at the output size -------------------------------------------------------------------


def resize_matrix(
    size: int, start: float, length: float, low: int, high: int, width: int, spec: VideoSpec
) -> np.ndarray:
    """(size, width) weights that resample [start, start + length) of a line of ``width`` pixels to ``size`` pixels.

    Pixel centres lie at half integers. Only pixels [low, high) are read; the weights of every output sum to 1.
    """
    scale = length / size
    stretch = max(scale, 1.0) if spec.antialias else 1.0
    centre = start + (np.arange(size) + 0.5) * scale
    distance = (np.arange(width) + 0.5 - centre[:, None]) / stretch
    weights = _FILTERS[spec.interpolation](np.abs(distance))
    weights[:, :low] = 0.0
    weights[:, high:] = 0.0
    return weights / weights.sum(1, keepdims=True)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - x, 0.0)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bilinear": _triangle, "bicubic": _keys_cubic}


def crop_resize(payload: Tensor, items: np.ndarray, spec: VideoSpec) -> Tensor:
    """RGB in [0, 1], (B, T, 3, size, size) float32, from packed I420 regions.

    payload: flat uint8 tensor. items: (B, T) array of `clipmill.pipeline.slot.ITEM`, in region coordinates. Chroma
    is replicated to luma resolution, then every plane is resized with the same weights; values are clipped last.
    """
    batch, frames = items.shape
    out = torch.empty((batch, frames, 3, spec.size, spec.size), device=payload.device)
    for b in range(batch):
        runs = [(0, frames)] if not spec.per_frame else [(t, t + 1) for t in range(frames)]
        for first, stop in runs:
            out[b, first:stop] = _one_region(payload, items[b, first:stop], spec)
    return out


def _one_region(payload: Tensor, items: np.ndarray, spec: VideoSpec) -> Tensor:
    """RGB (T, 3, size, size) of frames that share one region and one box."""
    item, count = items[0], len(items)
    height, width = int(item["h"]), int(item["w"])
    area = height * width
    start = int(item["offset"])
    raw = payload[start : start + count * area * 3 // 2].view(count, area * 3 // 2).to(torch.float32)
    luma = raw[:, :area].view(count, height, width)
    chroma = raw[:, area:].view(count, 2, height // 2, width // 2)
    columns = resize_matrix(
        spec.size, float(item["bx"]), float(item["bw"]), int(item["cx0"]), int(item["cx1"]), width, spec
    )
    rows = resize_matrix(
        spec.size, float(item["by"]), float(item["bh"]), int(item["cy0"]), int(item["cy1"]), height, spec
    )
    down, across = _tensor(rows, raw), _tensor(columns, raw)
    down_half, across_half = (
        _tensor(rows[:, ::2] + rows[:, 1::2], raw),
        _tensor(columns[:, ::2] + columns[:, 1::2], raw),
    )
    y = down @ (luma @ across.T)
    uv = down_half @ (chroma @ across_half.T)
    yuv = torch.cat([y[:, None], uv], 1)
    mix, shift = yuv_to_rgb_matrix(MATRICES[int(item["matrix"])], bool(item["full_range"]))
    rgb = torch.einsum("cd,tdhw->tchw", _tensor(mix, raw), yuv) + _tensor(shift, raw)[:, None, None]
    return rgb.clamp_(0.0, 1.0)


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=like.device, dtype=torch.float32)


# --- operators; x is (N, T, 3, H, W) and every parameter has N rows -----------------------------------------


def augment(payload: Tensor, items: np.ndarray, spec: VideoSpec, params: Sequence[Params]) -> Tensor:
    """(B, 3, T, size, size) float32: crop, resize, convert and run the operators of a view."""
    batch, frames = items.shape
    x = crop_resize(payload, items, spec)
    if spec.per_frame:
        x = x.view(batch * frames, 1, *x.shape[2:])
    x = apply_ops(x, spec.ops, params)
    return x.view(batch, frames, *x.shape[2:]).transpose(1, 2).contiguous()


def apply_ops(x: Tensor, ops: Sequence[Op], params: Sequence[Params]) -> Tensor:
    """Run the operators in order on x (N, T, 3, H, W) with values in [0, 1]."""
    for op, drawn in zip(ops, params, strict=True):
        if isinstance(op, Normalize):
            x = (x - x.new_tensor(op.mean)[:, None, None]) / x.new_tensor(op.std)[:, None, None]
        elif isinstance(op, Jitter):
            x = _jitter(x, op, drawn)
        elif isinstance(op, Cutout):
            x = _cutout(x, drawn)
        else:
            rows = _chosen(drawn["apply"], x)
            if len(rows) == 0:
                continue
            part = x[rows]
            if isinstance(op, Flip):
                part = part.flip(-1)
            elif isinstance(op, Gray):
                part = luma(part, op.weights).expand_as(part)
            else:
                sigma = torch.from_numpy(drawn["sigma"]).to(x.device, x.dtype)[rows]
                part = gaussian_blur(part, sigma, op.taps, op.border, op.vertical_only)
            x = x.index_copy(0, rows, part)
    return x


def _chosen(mask: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(x.device)


def luma(x: Tensor, weights: tuple[float, float, float] = (0.2989, 0.587, 0.114)) -> Tensor:
    """Weighted sum of the channels, channel axis kept with size 1. x: (..., 3, H, W)."""
    return (x * x.new_tensor(weights)[:, None, None]).sum(-3, keepdim=True)


def _jitter(x: Tensor, op: Jitter, drawn: Params) -> Tensor:
    maths = _MATHS[op.maths]
    factors = torch.from_numpy(drawn["factors"]).to(x.device, x.dtype)
    for place in range(4):
        for number in range(4):
            rows = _chosen(drawn["apply"] & (drawn["order"][:, place] == number), x)
            if len(rows):
                factor = factors[rows, number].view(-1, 1, 1, 1, 1)
                x = x.index_copy(0, rows, maths[number](x[rows], factor))
    return x


def brightness_scale(x: Tensor, factor: Tensor) -> Tensor:
    """x * f, clipped."""
    return (x * factor).clamp(0.0, 1.0)


def brightness_add(x: Tensor, factor: Tensor) -> Tensor:
    """x + (f - 1), clipped (kornia 0.5)."""
    return (x + (factor - 1.0)).clamp(0.0, 1.0)


def contrast_gray_mean(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the grey picture (torchvision)."""
    mean = luma(x).mean((-2, -1), keepdim=True)
    return (factor * x + (1.0 - factor) * mean).clamp(0.0, 1.0)


def contrast_channel_mean(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with each channel's own mean (SimCLR's reference)."""
    mean = x.mean((-2, -1), keepdim=True)
    return ((x - mean) * factor + mean).clamp(0.0, 1.0)


def saturation_blend(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey picture (torchvision)."""
    return (factor * x + (1.0 - factor) * luma(x)).clamp(0.0, 1.0)


def saturation_hsv(x: Tensor, factor: Tensor) -> Tensor:
    """Scale S of HSV, clipped to 1 (SimCLR's reference)."""
    h, s, v = rgb_to_hsv(x).unbind(-3)
    return hsv_to_rgb(torch.stack([h, (s.unsqueeze(-3) * factor).clamp(0.0, 1.0).squeeze(-3), v], -3))


def hue_shift(x: Tensor, turns: Tensor) -> Tensor:
    """Add ``turns`` to the hue, modulo one turn."""
    h, s, v = rgb_to_hsv(x).unbind(-3)
    return hsv_to_rgb(torch.stack([torch.remainder(h.unsqueeze(-3) + turns, 1.0).squeeze(-3), s, v], -3))


_MATHS = {
    "torchvision": (brightness_scale, contrast_gray_mean, saturation_blend, hue_shift),
    "simclr": (brightness_scale, contrast_channel_mean, saturation_hsv, hue_shift),
    "simclr_v1": (brightness_add, contrast_channel_mean, saturation_hsv, hue_shift),
    "kornia": (brightness_add, brightness_scale, saturation_hsv, hue_shift),
}


def rgb_to_hsv(x: Tensor) -> Tensor:
    """RGB in [0, 1] to hue (turns), saturation, value; channel axis -3."""
    r, g, b = x.unbind(-3)
    top, bottom = x.amax(-3), x.amin(-3)
    span = top - bottom
    safe = torch.where(span == 0, torch.ones_like(span), span)
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, (b - r) / safe + 2.0, (r - g) / safe + 4.0))
    saturation = span / torch.where(top == 0, torch.ones_like(top), top)
    return torch.stack([torch.remainder(hue / 6.0, 1.0), saturation, top], -3)


def hsv_to_rgb(x: Tensor) -> Tensor:
    """The inverse of `rgb_to_hsv`."""
    h, s, v = x.unbind(-3)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = torch.remainder(offset + h * 6.0, 6.0)
        channels.append(v - v * s * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, -3)


def gaussian_blur(x: Tensor, sigma: Tensor, taps: int, border: str = "reflect", vertical_only: bool = False) -> Tensor:
    """Separable Gaussian blur of x (N, T, C, H, W) with one sigma per row (N,), ``taps`` (odd) per side."""
    radius = taps // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows, height, width = x.shape[0], x.shape[-2], x.shape[-1]
    flat = x.reshape(rows, -1, height, width)
    planes = flat.shape[1]
    mode = "reflect" if border == "reflect" else "constant"
    for axis in (2,) if vertical_only else (3, 2):
        pad = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = F.pad(flat, pad, mode=mode).transpose(0, 1)
        shape = (rows, 1, 1, taps) if axis == 3 else (rows, 1, taps, 1)
        flat = F.conv2d(padded, kernel.view(shape), groups=rows).transpose(0, 1)
    return flat.reshape(rows, planes, height, width).view_as(x)


def _cutout(x: Tensor, drawn: Params) -> Tensor:
    height, width = x.shape[-2:]
    x = x.clone()
    for n in range(x.shape[0]):
        half = int(drawn["side"][n]) // 2
        row, column = int(drawn["row"][n] * height), int(drawn["column"][n] * width)
        top, left = max(row - half, 0), max(column - half, 0)
        mean = x[n, 0].mean()
        x[n, ..., top : min(row + half, height), left : min(column + half, width)] *= mean
    return x
