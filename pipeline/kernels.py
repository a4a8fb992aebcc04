"""The fused kernel by device: packed I420 regions to a view's tensor.

`render` gives what `clipmill.pipeline.augment.augment`, the torch reference, gives, as fast as the device allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clipmill.pipeline.augment import apply_ops, augment
from clipmill.pipeline.kernels_cpu import augment_cpu, supported
from clipmill.pipeline.spec import Params, VideoSpec


def render(payload: Tensor, items: np.ndarray, spec: VideoSpec, params: Sequence[Params]) -> Tensor:
    """(B, 3, T, size, size) float32 of one view. Arguments as in `clipmill.pipeline.augment.augment`."""
    if payload.device.type != "cpu":
        return augment(payload, items, spec, params)
    fused = supported(spec.ops)
    x = augment_cpu(payload.numpy(), items, spec, spec.ops[:fused], params[:fused])
    if fused == len(spec.ops):
        return x
    batch, channels, frames, height, width = x.shape
    rows = (batch * frames, 1) if spec.per_frame else (batch, frames)
    x = x.transpose(1, 2).reshape(*rows, channels, height, width)
    x = apply_ops(x, spec.ops[fused:], params[fused:])
    return x.view(batch, frames, channels, height, width).transpose(1, 2).contiguous()
