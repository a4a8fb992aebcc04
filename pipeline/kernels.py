"""The fused kernel by device: packed I420 regions to a view's tensor.

`render` gives what `clipmill.pipeline.augment.augment`, the torch reference, gives, as fast as the device allows:
numba on a CPU, Triton on a GPU, and the reference for operators that a GPU's kernels leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from clipmill.pipeline.augment import apply_ops, augment
from clipmill.pipeline.kernels_cpu import augment_cpu
from clipmill.pipeline.kernels_steps import lower
from clipmill.pipeline.spec import Params, VideoSpec


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def fused(spec: VideoSpec, device: torch.device) -> int:
    """How many of a view's operators, from the front, the device's kernel runs; the rest is for the reference."""
    if device.type == "cpu":
        return len(spec.ops)
    if not _on_gpu(device):
        return 0
    from clipmill.pipeline.kernels_triton import fused as fused_on_gpu  # only where there is a GPU

    return fused_on_gpu(spec.ops)


def steps_of(items: np.ndarray, spec: VideoSpec, params: Sequence[Params], device: torch.device) -> np.ndarray:
    """The steps of the operators that the device's kernel runs, see `clipmill.pipeline.kernels_steps.lower`."""
    count = fused(spec, device)
    return lower(spec.ops[:count], params[:count], items.size if spec.per_frame else len(items), spec.size)


def render(
    payload: Tensor,
    items: np.ndarray,
    spec: VideoSpec,
    params: Sequence[Params],
    *,
    steps: np.ndarray | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B, 3, T, size, size) of ``dtype``, on the payload's device.

    payload, items, spec, params: as in `clipmill.pipeline.augment.augment`. steps: of `steps_of`, made here if not
    given. tables: the bytes of items and steps on a GPU, if they are there already.
    """
    device = payload.device
    if device.type != "cpu" and not _on_gpu(device):
        return augment(payload, items, spec, params).to(dtype)
    if steps is None:
        steps = steps_of(items, spec, params, device)
    if device.type == "cpu":
        return augment_cpu(payload.numpy(), items, spec, steps).to(dtype)
    from clipmill.pipeline.kernels_triton import augment_gpu  # only where there is a GPU

    count = fused(spec, device)
    if tables is None:
        tables = _bytes(items, device), _bytes(steps, device)
    if count == len(spec.ops):
        return augment_gpu(payload, items, spec, steps, tables, dtype)
    x = augment_gpu(payload, items, replace(spec, ops=spec.ops[:count]), steps, tables)
    batch, channels, frames, height, width = x.shape
    rows = (batch * frames, 1) if spec.per_frame else (batch, frames)
    x = x.transpose(1, 2).reshape(*rows, channels, height, width)
    x = apply_ops(x, spec.ops[count:], params[count:])
    return x.view(batch, frames, channels, height, width).transpose(1, 2).contiguous().to(dtype)


def _bytes(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1)).to(device)


def bytes_moved(items: np.ndarray, spec: VideoSpec, dtype: torch.dtype = torch.float32) -> int:
    """The bytes that `render` cannot help moving: every region read once, every output written once."""
    regions = int((items["w"].astype(np.int64) * items["h"]).sum()) * 3 // 2
    return regions + items.size * 3 * spec.size**2 * dtype.itemsize
