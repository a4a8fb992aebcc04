"""Protocols of label propagation: sizes, labels to the grid and back, colours, the raw-pixel baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipmill.models.colour import converted, lab8_from_rgb, lab_from_rgb
from clipmill.tools.evaluate.baselines import LabPatches, baseline
from clipmill.tools.evaluate.opening import encoder_digest, open_encoder
from clipmill.tools.evaluate.overlay import laid_over
from clipmill.tools.evaluate.presets import DAVIS, JHMDB, VIP
from clipmill.tools.evaluate.propagation import (
    Maps,
    Overrides,
    feature_maps,
    first_labels,
    input_size,
    read_out,
    resized_ids,
    segment,
)


@pytest.mark.parametrize(
    ("preset", "native", "expected"),
    [
        ("vfs", (480, 854), (480, 854)),
        ("vfs", (1080, 1920), (480, 853)),
        ("crw", (481, 911), (481, 911)),
        ("dino", (480, 854), (480, 832)),
        ("dino", (854, 480), (832, 480)),
        ("contrastcorr", (480, 854), (560, 960)),
    ],
)
def test_sizes_of_the_input(preset: str, native: tuple[int, int], expected: tuple[int, int]) -> None:
    assert input_size(DAVIS[preset], *native) == expected
    assert input_size(VIP["uvc"], *native) == (560, 560)
    assert input_size(JHMDB["crw"].protocol, *native) == (320, 320)


def test_overrides_change_what_they_name() -> None:
    changed = Overrides(size=320, tau=0.2, radius=5).apply(DAVIS["vfs"])
    assert changed == replace(DAVIS["vfs"], size=320, rule=replace(DAVIS["vfs"].rule, tau=0.2, radius=5))
    assert Overrides().apply(DAVIS["crw"]) == DAVIS["crw"]
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        Overrides(size=0).apply(DAVIS["vfs"])
    with pytest.raises(ValueError, match="topk must be at least 1, got -1"):
        Overrides(topk=-1).apply(DAVIS["vfs"])


def test_numbers_of_the_maps() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Maps(batch_size=0)


# --- labels -------------------------------------------------------------------------------------------------


def ids(height: int = 37, width: int = 50) -> np.ndarray:
    found = np.zeros((height, width), np.uint8)
    found[4:20, 6:30], found[22:34, 20:44], found[30, 2] = 1, 2, 4
    return found


def test_ids_are_resized_as_pillow_does() -> None:
    found = resized_ids(ids(), (5, 7))
    rows, columns = (np.floor((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((5, 37), (7, 50)))
    np.testing.assert_array_equal(found, ids()[rows[:, None], columns])


def test_an_object_that_is_lost_at_the_grid_has_no_channel() -> None:
    soft, numbers = first_labels(ids(), (5, 7), DAVIS["vfs"])
    assert numbers.tolist() == [0, 1, 2]  # of 4, one pixel, nothing is left
    assert soft.sum(0).eq(1).all()
    soft, numbers = first_labels(ids(), (37, 50), DAVIS["vfs"])
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert not soft[3].any()


def test_masks_interpolated_to_the_grid_are_soft_and_have_the_ids_there_are() -> None:
    soft, numbers = first_labels(ids(), (5, 7), DAVIS["crw"])
    assert numbers.tolist() == [0, 1, 2, 4]
    torch.testing.assert_close(soft.sum(0), torch.ones(5, 7))
    assert ((soft > 0) & (soft < 1)).any()
    found = read_out(soft, np.array([0, 1, 2, 9], np.uint8), (37, 50), (37, 50), "no")
    assert set(np.unique(found)) <= {0, 1, 2, 9}


def test_labels_at_full_size_are_read_back() -> None:
    for preset in ("vfs", "crw"):
        protocol = DAVIS[preset]
        soft, numbers = first_labels(ids(), (37, 50), protocol)
        np.testing.assert_array_equal(read_out(soft, numbers, (37, 50), (37, 50), protocol.rescale), ids())
    double = ids().repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(read_out(soft, numbers, (37, 50), (74, 100), "no"), double)


def test_stretching_gives_weak_objects_a_chance() -> None:
    soft = torch.zeros(2, 4, 6)
    soft[0], soft[0, 1, 2] = 1.0, 0.7
    soft[1] = 1 - soft[0]
    numbers = np.arange(2, dtype=np.uint8)
    assert not read_out(soft, numbers, (4, 6), (4, 6), "no").any()
    assert np.argwhere(read_out(soft, numbers, (4, 6), (4, 6), "flat_loses")).tolist() == [[1, 2]]


def test_a_flat_channel_counts_as_the_official_code_has_it() -> None:
    soft = torch.stack([torch.linspace(0, 0.5, 24).view(4, 6), torch.full((4, 6), 0.5)])
    numbers = np.arange(2, dtype=np.uint8)
    assert not read_out(soft, numbers, (4, 6), (4, 6), "flat_loses").any()  # (x - min) / (max - min + tiny) = 0
    assert read_out(soft, numbers, (4, 6), (4, 6), "flat_wins").all()  # 0 / 0, which arg-max prefers


# --- pictures -----------------------------------------------------------------------------------------------


def frames(folder: Path, count: int = 5, size: tuple[int, int] = (40, 64)) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{t:05d}.png" for t in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("preset", ["vfs", "dino", "uvc", "contrastcorr"])
def test_maps_are_those_of_the_prepared_picture(tmp_path: Path, preset: str) -> None:
    encoder = open_encoder("random:resnet18:width=0.125").eval()
    paths = frames(tmp_path)
    protocol = replace(DAVIS[preset], size=64)
    found = list(feature_maps(encoder, paths, (40, 64), protocol, Maps(batch_size=2, device="cpu")))
    assert len(found) == 5
    size = input_size(protocol, 40, 64)
    with Image.open(paths[3]) as image:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False).round() / 255
    x = converted(x, protocol.colour)
    mean, std = protocol.mean or encoder.spec.mean, protocol.std or encoder.spec.std
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = encoder.maps(x[:, :, None], "res4", strides=(1, 2, 1, 1))[0, :, 0]  # type: ignore[call-arg]
    torch.testing.assert_close(found[3], expected, atol=1e-5, rtol=1e-4)
    assert found[3].shape[1:] == (-(-size[0] // 8), -(-size[1] // 8))


def test_the_first_frame_may_take_the_way_to_the_grid_and_back(tmp_path: Path) -> None:
    paths = frames(tmp_path, 2)
    first = np.zeros((40, 64), np.uint8)
    first[3:17, 5:30] = 1
    options = (baseline("lab").eval(), paths, first, replace(DAVIS["crw"], resize="native"), Maps(device="cpu"))
    np.testing.assert_array_equal(next(segment(*options)), first)
    changed = next(segment(*options, copy_first=False))
    assert 0 < (changed != first).sum() < first.sum() / 2


# --- colours ------------------------------------------------------------------------------------------------


def test_known_colours_in_lab() -> None:
    rgb = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]]).double()
    expected = [  # CIE Lab under D65
        [0, 0, 0],
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [53.39, 0, 0],
    ]
    np.testing.assert_allclose(lab_from_rgb(rgb), expected, atol=0.03)
    stored = lab8_from_rgb(rgb)
    assert stored[1].tolist() == [255, 128, 128]
    assert stored[2].tolist() == [136, 208, 195]


def test_lightness_takes_all_channels() -> None:
    rgb = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    lab = converted(rgb, "lab")
    assert torch.equal(converted(rgb, "lightness"), lab[:, :1].expand(-1, 3, -1, -1))
    assert converted(rgb, "rgb") is rgb
    assert 0 <= lab.min() <= lab.max() < 1


@pytest.mark.parametrize("size", [(16, 24), (17, 25), (5, 3), (48, 61)])
def test_lab_patches_lie_around_every_eighth_pixel(size: tuple[int, int]) -> None:
    encoder = LabPatches()
    x = torch.rand(1, 3, 2, *size, generator=torch.Generator().manual_seed(0))
    maps = encoder.maps(x, "patch")
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert maps.shape == (1, 48, 2, rows, columns)
    assert encoder(x).shape == (1, 48)
    lab = (lab8_from_rgb(x[:, :, 1]) - 128) / 128
    padded = torch.nn.functional.pad(lab, (4, 20, 4, 20), "replicate")
    y, column = rows - 1, columns - 1
    patch = padded[0, :, 8 * y : 8 * y + 16, 8 * column : 8 * column + 16]
    torch.testing.assert_close(
        maps[0, :, 1, y, column].view(3, 4, 4), torch.nn.functional.avg_pool2d(patch, 4), atol=1e-5, rtol=0
    )


def test_the_baseline_by_name() -> None:
    assert isinstance(open_encoder("baseline:lab"), LabPatches)
    assert encoder_digest(open_encoder("baseline:lab")) == encoder_digest(LabPatches())
    with pytest.raises(ValueError, match="unknown baseline 'sift'"):
        open_encoder("baseline:sift")
    with pytest.raises(ValueError, match="no stage 'res4' in LabPatches"):
        LabPatches().maps(torch.zeros(1, 3, 1, 8, 8), "res4")


def test_tint_and_lines() -> None:
    frame = np.full((20, 30, 3), 100, np.uint8)
    found, truth = np.zeros((2, 20, 30), np.uint8)
    found[5:12, 5:12], truth[8:16, 10:20], found[18:, 28:] = 1, 1, 255
    picture = laid_over(frame, found, truth)
    assert picture[7, 7].tolist() == [114, 50, 50]
    assert picture[15, 15].tolist() == [255] * 3
    assert picture[4, 8].tolist() == [0] * 3
    assert picture[19, 29].tolist() == [100] * 3  # void is not tinted
    assert frame.max() == 100
