"""Colour spaces that correspondence methods are shown: 8-bit CIE Lab as OpenCV stores it, and its lightness alone."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Colour = Literal["rgb", "lab", "lightness"]

_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)
_MATRIX_BITS, _LINEAR_BITS, _ROOT_BITS = 12, 3, 15  # behind the point, of OpenCV's 8-bit path


def lab_from_rgb(rgb: Tensor) -> Tensor:
    """CIE Lab (white D65) of sRGB in [0, 1], both (N, 3, ...): L in 0..100, a and b around 0. OpenCV's formula."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    mix = rgb.new_tensor(_TO_XYZ) / rgb.new_tensor(_WHITE)[:, None]
    x, y, z = torch.einsum("ij,nj...->in...", mix, linear)
    fx, fy, fz = (torch.where(v > 0.008856, v.clamp(min=1e-6) ** (1 / 3), 7.787 * v + 16 / 116) for v in (x, y, z))
    lightness = torch.where(y > 0.008856, 116 * fy - 16, 903.3 * y)
    return torch.stack([lightness, 500 * (fx - fy), 200 * (fy - fz)], 1)


def lab8_from_rgb(rgb: Tensor) -> Tensor:
    """The 0..255 numbers that OpenCV stores for 8-bit Lab, as floats: L * 255 / 100, a + 128, b + 128.

    rgb: (N, 3, ...) in [0, 1], rounded to 8 bits first. OpenCV computes with tables and integers, and so does this: the
    numbers are the same, where `lab_from_rgb` rounded would differ by 1 in every twelfth.
    """
    gamma, root, matrix = (table.to(rgb.device) for table in _tables())
    linear = gamma[(rgb * 255).round().clamp(0, 255).long()]
    r, g, b = linear.unbind(1)
    x, y, z = (row[0] * r + row[1] * g + row[2] * b for row in matrix)
    fx, fy, fz = (root[_descaled(v, _MATRIX_BITS)] for v in (x, y, z))
    one = 1 << _ROOT_BITS
    lightness = _descaled((116 * 255 + 50) // 100 * fy - (16 * 255 * one + 50) // 100, _ROOT_BITS)
    a = _descaled(500 * (fx - fy) + 128 * one, _ROOT_BITS)
    b = _descaled(200 * (fy - fz) + 128 * one, _ROOT_BITS)
    return torch.stack([lightness, a, b], 1).clamp_(0, 255).to(rgb.dtype)


def _descaled(x: Tensor, bits: int) -> Tensor:
    return (x + (1 << (bits - 1))) >> bits


@cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """int64: linear light of the 256 levels, f of CIE's formula, and the matrix to X, Y, Z over the white."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    steps = 255 << _LINEAR_BITS
    share = np.arange(256 * 3 // 2 << _LINEAR_BITS) / steps
    root = np.where(share < 216 / 24389, share * 841 / 108 + 16 / 116, np.cbrt(share))
    matrix = np.array(_TO_XYZ) / np.array(_WHITE)[:, None]
    scaled = (linear * steps, root * (1 << _ROOT_BITS), matrix * (1 << _MATRIX_BITS))
    gamma, root, matrix = (torch.from_numpy(np.rint(table).astype(np.int64)) for table in scaled)
    return gamma, root, matrix


def converted(rgb: Tensor, colour: Colour) -> Tensor:
    """RGB in [0, 1] (N, 3, H, W) in another space, each channel on a scale from 0 to 1 (Lab: 8-bit value / 256).

    ContrastCorr feeds (value - 128) / 128 mapped back to (x + 1) / 2, which is value / 256; UVC does the same with the
    lightness in all three channels.
    """
    if colour == "rgb":
        return rgb
    lab = lab8_from_rgb(rgb) / 256
    return lab if colour == "lab" else lab[:, :1].expand(-1, 3, -1, -1)
