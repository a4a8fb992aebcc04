"""Clips as they lie in a slot, for the tests of the augment kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from clipmill.pipeline.augment import augment, op_params
from clipmill.pipeline.draws import fold
from clipmill.pipeline.slot import crop_table
from clipmill.pipeline.spec import MATRICES, Params, VideoSpec
from clipmill.pipeline.views import View


@dataclass(frozen=True)
class PackedClips:
    """Regions of random bytes, hard on every filter, with their table and drawn parameters."""

    payload: np.ndarray
    items: np.ndarray
    spec: VideoSpec
    params: list[Params]

    @property
    def rows(self) -> int:
        return self.items.size if self.spec.per_frame else len(self.items)

    def reference(self) -> torch.Tensor:
        return augment(torch.from_numpy(self.payload), self.items, self.spec, self.params)


def pack_clips(spec: VideoSpec, batch: int = 3, frames: int = 2, size: tuple[int, int] = (72, 100), seed: int = 0):
    """``batch`` clips of frames of ``size``; matrix and range differ from clip to clip."""
    view = View(name="v", num_frames=frames, augment=spec)
    keys = np.array([fold(seed, number) for number in range(batch)], np.uint64)
    table = crop_table(view, keys, np.zeros((batch, frames), int), np.full(batch, size[0]), np.full(batch, size[1]))
    table["matrix"] = np.arange(batch)[:, None] % len(MATRICES)
    table["full_range"] = np.arange(batch)[:, None] % 2
    sizes = (table["w"].astype(np.int64) * table["h"] * 3 // 2).reshape(-1)
    table["offset"] = (np.cumsum(sizes) - sizes).reshape(table.shape)
    payload = np.random.default_rng(seed).integers(0, 256, int(sizes.sum()), np.uint8)
    return PackedClips(payload, table, spec, op_params(spec, keys, frames, fold(seed, "batch"), "v"))


@pytest.fixture(scope="session")
def packed_clips() -> Callable[..., PackedClips]:
    """`pack_clips`."""
    return pack_clips
