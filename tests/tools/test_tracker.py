"""The tracker: exact on identity features, equivariant, independent of batching; its head and their algebra."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.models.encoder import build_encoder
from clipmill.tools.evaluate.baselines import LabPatches
from clipmill.tools.ope import score
from clipmill.tools.tracker import Tracker, TrackerSettings, track
from clipmill.tools.tracker_crops import resize
from clipmill.tools.tracker_head import (
    Head,
    balanced_loss,
    correlate,
    correlate_normalised,
    focal_loss,
    labels,
    load_head,
    save_head,
    usual_out_scale,
)
from clipmill.tools.tracker_maps import FrozenMaps, MapOptions

# Sizes at which a patch is a slice of the picture and a peak lies on a sample: places come out exactly.
EXACT = TrackerSettings(instance_size=248, response_up=15, scales=1)
SIDE = 60  # a square target with its margin is then 120 pixels


def pixel_blocks(patches: np.ndarray) -> Tensor:
    """Every pixel, as 192 channels of 8 x 8 cells: identity features of stride 8."""
    x = torch.from_numpy(patches).permute(0, 3, 1, 2).float()
    size = [n // 8 * 8 for n in x.shape[2:]]
    return F.pixel_unshuffle(x[:, :, : size[0], : size[1]], 8)


def scene(
    places: Sequence[tuple[int, int]],
    size: tuple[int, int] = (320, 400),
    *,
    sides: Sequence[int] = (),
    grain: int = 1,
    seed: int = 0,
) -> list[np.ndarray]:
    """A textured square at (y, x) on grey, one picture per place; its details are about ``grain`` pixels large."""
    texture = np.random.default_rng(seed).integers(0, 256, (SIDE // grain, SIDE // grain, 3), dtype=np.uint8)
    pictures = []
    for (y, x), side in zip(places, sides or [SIDE] * len(places), strict=True):
        picture = np.full((*size, 3), 128, np.uint8)
        picture[y : y + side, x : x + side] = resize(texture, side, side, "cubic")
        pictures.append(picture)
    return pictures


def box_at(y: float, x: float) -> np.ndarray:
    return np.array([x + 1, y + 1, SIDE, SIDE], float)


def followed(tracker: Tracker, pictures: Sequence[np.ndarray], box: np.ndarray) -> np.ndarray:
    targets = tracker.start(pictures[:1], [box])
    found = [targets[0].box]
    for picture in pictures[1:]:
        tracker.step(targets, [picture])
        found.append(targets[0].box)
    return np.array(found)


# --- tracking -----------------------------------------------------------------------------------------------

PATH = [(130, 170), (138, 170), (138, 186), (122, 202), (122, 170), (146, 130)]


@pytest.mark.parametrize("crop", ["vfs", "siamfc"])
def test_identity_features_give_exact_boxes(crop) -> None:
    """A texture that moves by whole cells is found at the very pixel."""
    tracker = Tracker(pixel_blocks, replace(EXACT, crop=crop), match="ncc")
    found = followed(tracker, scene(PATH), box_at(*PATH[0]))
    np.testing.assert_allclose(found, [box_at(*place) for place in PATH], atol=1e-9)


def test_default_settings_stay_close() -> None:
    """The published constants take a map of 18 cells for one of 17, and place peaks between two samples."""
    places = [(130 + 2 * t, 170 + 3 * t) for t in range(10)]
    pictures = scene(places, grain=10)
    found = followed(Tracker(LabFeatures(), TrackerSettings(), match="ncc"), pictures, box_at(*places[0]))
    expected = np.array([box_at(*place) for place in places])
    curves = score(expected, found)
    assert curves.precision[5] == 1
    assert curves.success_rate == 1
    assert curves.auc > 0.8


class LabFeatures:
    """The pixel baseline without the machinery around it."""

    def __init__(self) -> None:
        self.maps = FrozenMaps(LabPatches(), MapOptions(device="cpu"))

    def __call__(self, patches: np.ndarray) -> Tensor:
        return self.maps(patches)


def test_equal_features_everywhere_leave_the_target_alone() -> None:
    """With positive equal responses other scales are penalised; the window's peak lies between two samples."""
    settings = TrackerSettings()
    tracker = Tracker(lambda patches: torch.ones(len(patches), 4, *(-(-n // 8) for n in patches.shape[1:3])), settings)
    found = followed(tracker, scene([(130, 170)] * 4), box_at(130, 170))
    assert np.abs(found - found[0]).max() <= 0.75  # half a sample of 0.5 pixels, three times
    np.testing.assert_allclose(found[:, 2:], SIDE)  # the middle scale


def test_moving_everything_moves_the_boxes() -> None:
    rng = np.random.default_rng(3)
    wide = rng.integers(0, 256, (420, 460, 3), dtype=np.uint8)
    pictures = [np.roll(wide, (3 * t, -2 * t), (0, 1)) for t in range(4)]
    tracker = Tracker(pixel_blocks, TrackerSettings(scales=1, window_influence=0.3), match="ncc")
    whole = followed(tracker, pictures, box_at(180, 200))
    part = followed(tracker, [np.ascontiguousarray(picture[14:, 22:]) for picture in pictures], box_at(166, 178))
    np.testing.assert_allclose(whole - part, np.tile([22, 14, 0, 0], (4, 1)), atol=1e-9)


@pytest.mark.parametrize("step", [1.02, 1 / 1.02])
def test_the_size_follows(step: float) -> None:
    """In the right direction, by a factor of at most 1 + 0.59 * 0.0375 per frame."""
    sides = [round(SIDE * step**t) for t in range(9)]
    pictures = scene([(160 - side // 2, 200 - side // 2) for side in sides], sides=sides, grain=10)
    found = followed(Tracker(LabFeatures(), TrackerSettings(), match="ncc"), pictures, box_at(130, 170))
    assert np.abs(found[1:, 2] / found[:-1, 2] - 1).max() <= 0.59 * 0.0375 + 1e-9
    assert (found[-1, 2] - SIDE) * (sides[-1] - SIDE) > 0
    assert abs(found[-1, 2] - sides[-1]) < abs(SIDE - sides[-1])


def test_targets_do_not_influence_each_other(tmp_path: Path) -> None:
    """Lock-step, threads and their number change nothing; videos may differ in length and size."""
    head = Head(48, 0.01)
    videos, store = [], {}
    for number, (count, size) in enumerate([(4, (240, 260)), (1, (240, 260)), (3, (280, 300)), (2, (240, 260))]):
        start = (80 + number, 90)
        pictures = scene([(start[0] + 3 * t, start[1] + 2 * t) for t in range(count)], size, grain=10, seed=number)
        paths = [tmp_path / f"{number}-{t}" for t in range(count)]
        store |= dict(zip(paths, pictures, strict=True))
        videos.append((paths, box_at(*start)))
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for lanes in (1, 2, 4):
            tracker = Tracker(LabFeatures(), TrackerSettings(), head, pool=pool if lanes > 1 else None)
            outcomes = dict(track(tracker, videos, store.__getitem__, lanes=lanes))
            assert sorted(outcomes) == [0, 1, 2, 3]
            for number, (paths, box) in enumerate(videos):
                assert outcomes[number].boxes.shape == (len(paths), 4)
                assert outcomes[number].seconds.shape == (len(paths),)
                np.testing.assert_array_equal(outcomes[number].boxes[0], box)
            found[lanes] = np.concatenate([outcomes[number].boxes for number in range(4)])
    np.testing.assert_allclose(found[2], found[1], atol=1e-3)
    np.testing.assert_allclose(found[4], found[1], atol=1e-3)


def test_what_cannot_be_tracked() -> None:
    pictures = scene([(130, 170)] * 2)
    tracker = Tracker(pixel_blocks, EXACT, match="ncc")
    for box in ((10, 10, 0, 20), (10, 10, 20, -1), (np.nan, 10, 20, 20)):
        with pytest.raises(ValueError, match="needs a size"):
            tracker.start(pictures[:1], [np.array(box)])
    broken = Tracker(lambda patches: pixel_blocks(patches) * torch.nan, EXACT)
    targets = broken.start(pictures[:1], [box_at(130, 170)])
    with pytest.raises(ValueError, match="not finite"):
        broken.step(targets, pictures[1:])
    with pytest.raises(ValueError, match="plain correlation"):
        Tracker(pixel_blocks, EXACT, Head(192, 1.0), "ncc")


@pytest.mark.parametrize(
    "change", [{"exemplar_size": 300}, {"scales": 2}, {"scale_step": 0.0}, {"response_up": 0}, {"stride": 0}]
)
def test_settings_that_make_no_sense(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TrackerSettings(), **change)


# --- maps ---------------------------------------------------------------------------------------------------


def test_maps_of_a_resnet() -> None:
    encoder = build_encoder("resnet18", width=0.125).eval()
    patches = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    maps = FrozenMaps(encoder, MapOptions(device="cpu", batch_size=2))
    assert (maps.stage, maps.stride) == ("res5", 8)
    found = maps(patches)
    assert found.shape == (3, encoder.dim, 8, 8)
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    x = ((torch.from_numpy(patches).float() - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = encoder.maps(x[:, :, None], "res5", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert FrozenMaps(encoder, MapOptions(device="cpu", stage="res3", strides=(1, 1, 2, 2))).stride == 4
    assert FrozenMaps(encoder, MapOptions(device="cpu", strides=(1, 2, 2, 1))).stride == 16
    with pytest.raises(ValueError, match="no stage 'res9'"):
        FrozenMaps(encoder, MapOptions(device="cpu", stage="res9"))


def test_encoders_that_do_not_see_in_colour() -> None:
    with pytest.raises(ValueError, match="does not see colour"):
        FrozenMaps(build_encoder("resnet18", width=0.125, channels=1), MapOptions(device="cpu"))


# --- the head -----------------------------------------------------------------------------------------------


def maps_of(batch: int, searches: int, channels: int = 5, a: int = 3, h: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, channels, a, a + 1, generator=generator, dtype=torch.float64)
    return z, torch.randn(batch, searches, channels, h, h + 2, generator=generator, dtype=torch.float64)


def test_correlation_is_a_convolution_per_target() -> None:
    z, x = maps_of(2, 3)
    expected = torch.stack([F.conv2d(x[b], z[b : b + 1])[:, 0] for b in range(2)])
    torch.testing.assert_close(correlate(z, x), expected)
    with pytest.raises(ValueError, match="smaller than targets"):
        correlate(x[:, 0], z[:, None])


def test_normalised_correlation_by_its_definition() -> None:
    z, x = maps_of(2, 3)
    x = 5 + x
    a, b = z.shape[2:]
    expected = torch.zeros(2, 3, x.shape[3] - a + 1, x.shape[4] - b + 1, dtype=torch.float64)
    for n, s, i, j in np.ndindex(*expected.shape):
        window = x[n, s, :, i : i + a, j : j + b]
        one, two = (m - m.mean((1, 2), keepdim=True) for m in (z[n], window))
        expected[n, s, i, j] = (one * two).sum() / (one.norm() * two.norm())
    found = correlate_normalised(z, x)
    torch.testing.assert_close(found, expected)
    gain = torch.tensor([3.0, 7.0], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(correlate_normalised(z * gain - 4, x * 2 + 1), expected)
    assert not correlate_normalised(z, torch.full_like(x, 0.7)).any()  # a window of one colour


def test_head_and_its_folded_form() -> None:
    torch.manual_seed(0)
    head = Head(5, 0.1, 4).double()
    z, x = maps_of(3, 1)
    expected = F.conv2d(head.x(x[:, 0]).reshape(1, 12, *x.shape[3:]), head.z(z), groups=3).transpose(0, 1) * 0.1
    torch.testing.assert_close(head(z, x[:, 0]), expected)
    kernel, bias = head.fold(z)
    torch.testing.assert_close(correlate(kernel, x) + bias.view(-1, 1, 1, 1), expected)


def test_label_maps() -> None:
    assert [int(labels((n, n)).sum()) for n in (17, 16)] == [13, 12]
    ring = labels((9, 9), 8, 24, 8)
    assert ring[4].tolist() == [0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]
    assert torch.equal(ring, ring.T)


def test_losses_by_their_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    responses = torch.randn(2, 1, 5, 5, generator=generator, dtype=torch.float64)
    targets = labels((5, 5), 8, 24, 8).double().expand_as(responses)
    p = responses.sigmoid()
    weight = targets * (1 - p) ** 2 + (1 - targets) * p**2
    cross = -(targets * (1 - p) ** 2 * p.log() + (1 - targets) * p**2 * (1 - p).log())
    torch.testing.assert_close(focal_loss(responses, targets), cross.mean() / weight.mean())
    plain = F.binary_cross_entropy_with_logits(responses, targets, reduction="none")
    balanced = (plain[targets == 1].mean() + plain[targets == 0].mean()) / 2
    torch.testing.assert_close(balanced_loss(responses, targets), balanced)


def test_stored_heads(tmp_path: Path) -> None:
    head = Head(6, 0.25, 4)
    save_head(head, tmp_path, {"stage": "res5"})
    again = load_head(tmp_path)
    assert again.about == {"stage": "res5"}
    assert again.head.out_scale == 0.25
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.head.state_dict()[name], tensor)
    with pytest.raises(ValueError, match=r"no head\.json"):
        load_head(tmp_path / "nothing")
    meta, weights = tmp_path / "head.json", tmp_path / "head.safetensors"
    text = meta.read_text()
    meta.write_text(text.replace('"width": 4', '"width": 5'))
    with pytest.raises(ValueError, match="does not fit"):
        load_head(tmp_path)
    meta.write_text("{")
    with pytest.raises(ValueError, match=r"head\.json: damaged"):
        load_head(tmp_path)
    meta.write_text(text)
    weights.write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"head\.safetensors: damaged"):
        load_head(tmp_path)


def test_the_scale_of_responses() -> None:
    assert (usual_out_scale(512), usual_out_scale(2048)) == (1e-3, 1e-5)
