"""Crops and colours of SimCLR's reference and of HCL, where they differ from torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipmill.pipeline import augment as A
from clipmill.pipeline.draws import fold_array
from clipmill.pipeline.spec import Blur, CutCenter, DistortedBox, Jitter, RandomResizedCrop, hcl, simclr


def frames(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys = fold_array(np.arange(count, dtype=np.uint64), "frame")
    return keys, np.full(count, height), np.full(count, width)


def test_distorted_boxes_have_the_published_distribution() -> None:
    """On 400 x 500 pixels: at least a tenth, 0.407 on average; torchvision's sampler has 0.453 (measured)."""
    boxes = DistortedBox().boxes(*frames(6000, 400, 500))
    x, y, w, h = boxes.box.T
    area, aspect = w * h / 200_000, w / h
    assert 0.1 <= area.min() < 0.102
    assert area.max() <= 1
    assert area.mean() == pytest.approx(0.407, abs=0.008)
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.35
    assert aspect.mean() == pytest.approx((3 / 4 + 4 / 3) / 2, abs=0.02)
    assert min(x.min(), y.min()) == 0
    assert (x + w).max() <= 500
    assert (y + h).max() <= 400
    torchvision = RandomResizedCrop(scale=(0.08, 1.0)).boxes(*frames(6000, 400, 500)).box
    assert (torchvision[:, 2] * torchvision[:, 3] / 200_000).mean() == pytest.approx(0.453, abs=0.01)


def test_a_frame_that_no_box_fits_stays_whole() -> None:
    boxes = DistortedBox(scale=(0.9, 1.0)).boxes(*frames(3, 10, 100))
    np.testing.assert_array_equal(boxes.box, [[0, 0, 100, 10]] * 3)


def test_boxes_depend_on_their_key_alone() -> None:
    keys, height, width = frames(50, 60, 80)
    together = DistortedBox().boxes(keys, height, width).box
    alone = [DistortedBox().boxes(keys[i : i + 1], height[:1], width[:1]).box[0] for i in range(50)]
    np.testing.assert_array_equal(together, alone)


def test_the_centre_is_cut_before_it_is_resized() -> None:
    boxes = CutCenter().boxes(np.zeros(4, np.uint64), np.array([48, 100, 32, 33]), np.array([64, 37, 32, 33]))
    np.testing.assert_array_equal(boxes.box, [[11, 3, 42, 42], [3, 34, 32, 32], [0, 0, 32, 32], [2, 2, 29, 29]])
    np.testing.assert_array_equal(boxes.clamp[0], [11, 3, 53, 45])


def test_brightness_of_the_paper_is_added() -> None:
    picture = torch.full((2, 3, 1, 8, 8), 0.5).transpose(1, 2)
    jitter = Jitter(brightness=0.8, contrast=0.0, saturation=0.0, hue=0.0, p=1.0, maths="simclr_v1")
    drawn = jitter.draw(np.arange(2, dtype=np.uint64))
    added = A._jitter(picture, jitter, drawn)
    expected = (0.5 + torch.from_numpy(drawn["factors"][:, 0] - 1)).clamp(0, 1).float()
    torch.testing.assert_close(added[:, 0, 0, 0, 0], expected)
    assert 0.2 <= drawn["factors"][:, 0].min() < drawn["factors"][:, 0].max() <= 1.8


def test_presets() -> None:
    first, second = simclr(224), simclr(224, maths="simclr_v1")
    assert first != second
    assert (first.interpolation, first.antialias) == ("bicubic", False)
    spec = hcl(32)
    assert [type(op).__name__ for op in spec.ops] == ["Flip", "Jitter", "Gray", "Blur", "Normalize"]
    assert isinstance(spec.ops[3], Blur)
    assert spec.ops[3].taps == 3
