"""Semantic segmentation over a made corpus whose classes are colours, and its parts."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from clipmill.datasets.davis import label_map
from clipmill.datasets.semantic import LEFT_OUT, scenes
from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.models.encoder import Encoder, InputSpec, build_encoder
from clipmill.pipeline.draws import Draws
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.semantic_segmentation import Config, class_rows, evaluate, fit, model_of
from clipmill.tools.segmenter import Augment, FCNHead, drawn, normalised, sample_numbers, sliding, starts, whole

COLOURS = np.array([[20, 20, 20], [220, 30, 30], [30, 60, 220]])
SMALL = Config(
    iterations=30,
    train_batch=4,
    crop=32,
    scale=(0.8, 1.2),
    photometric=False,
    lr=0.1,
    channels=8,
    convs=1,
    test_split="val",
    device="cpu",
    threads=1,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures with two coloured boxes each; a rim of the first is left out."""
    folder = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(10):
        ids = np.zeros((40, 48), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, 20), rng.integers(0, 24)
            ids[top : top + 20, left : left + 24] = label
        picture = COLOURS[ids] + rng.integers(-15, 15, (40, 48, 3))
        if number == 0:
            ids[:2] = LEFT_OUT
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "JPEGImages" / f"{number}.png")
        (folder / "SegmentationClass" / f"{number}.png").write_bytes(label_map_bytes(ids))
    lists = folder / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join(map(str, range(7))))
    (lists / "val.txt").write_text("\n".join(map(str, range(7, 10))))
    (folder / "classes.txt").write_text("ground\nred\nblue\n")
    return folder


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    made = build_encoder("resnet18", width=0.125)
    made.spec = InputSpec(size=32)
    return made


class Pixels(Encoder):
    """Its map is the picture."""

    stages, reductions, spec = ("map",), {"map": (1, 1, 1)}, InputSpec(size=32)

    def __init__(self) -> None:
        super().__init__()
        self.dim = 3
        self.gain = nn.Parameter(torch.ones(()))

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return self.gain * x

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4))


def test_colours_are_told_apart_pixel_by_pixel(root: Path, tmp_path: Path) -> None:
    eyes = Pixels()
    report = evaluate(eyes, root, tmp_path, replace(SMALL, frozen=True, iterations=60))
    assert report.metrics["mIoU"] > 0.8
    assert [row["class"] for row in report.rows] == ["ground", "red", "blue"]
    assert sum(row["pixels"] for row in report.rows) == 3 * 40 * 48
    assert label_map(tmp_path / "masks" / "8.png").shape == (40, 48)
    with (tmp_path / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["50", "60"]
    assert float(rows[-1]["lr"]) < 0.006
    assert eyes.gain.item() == 1.0
    assert json.loads(report.to_json())["settings"]["train_pictures"] == 7


def test_fine_tuning_changes_a_copy_only(root: Path, tmp_path: Path) -> None:
    start = encoder()
    before = encoder_digest(start)
    config = replace(SMALL, iterations=4, auxiliary=0.4)
    reports = [evaluate(start, root, tmp_path / str(i), replace(config, threads=1 + i)) for i in range(2)]
    assert encoder_digest(start) == before == reports[0].digests["encoder"]
    assert reports[0].metrics == reports[1].metrics  # whatever the threads
    assert reports[0].metrics["train_loss"] > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_encoders_keep_weights_and_statistics(root: Path, frozen: bool) -> None:
    model = model_of(encoder(), 3, replace(SMALL, frozen=frozen, iterations=2))
    before = encoder_digest(model.encoder)
    head = model.head.classify.weight.detach().clone()
    fit(model, scenes(root, "train"), replace(SMALL, frozen=frozen, iterations=2))
    assert (encoder_digest(model.encoder) == before) == frozen
    assert not torch.equal(model.head.classify.weight, head)


def test_the_network_is_dilated_and_has_a_second_head() -> None:
    model = model_of(encoder(), 3, replace(SMALL, auxiliary=0.4)).train()
    scores, extra = model(torch.zeros(2, 3, 64, 64))
    assert scores.shape == (2, 3, 8, 8)
    assert extra is not None
    assert extra.shape == (2, 3, 8, 8)
    assert model.eval()(torch.zeros(1, 3, 64, 64))[1] is None
    with pytest.raises(ValueError, match="use --auxiliary 0"):
        model_of(Pixels(), 3, replace(SMALL, auxiliary=0.4))


def test_heads() -> None:
    plain = FCNHead(5, 4, channels=7, convs=0, concat=False)
    assert [p.shape for p in plain.parameters()] == [(4, 5, 1, 1), (4,)]
    deep = FCNHead(5, 4, channels=7, convs=2, concat=True)
    assert deep(torch.zeros(2, 5, 6, 6)).shape == (2, 4, 6, 6)
    assert deep.joint is not None
    assert deep.joint[0].weight.shape == (7, 12, 3, 3)


# --- samples and windows ------------------------------------------------------------------------------------


def test_pictures_and_masks_are_drawn_together() -> None:
    ids = np.zeros((30, 50), np.uint8)
    ids[:, 25:] = 1
    picture = np.repeat((100 * ids)[..., None], 3, 2).astype(np.uint8)
    plain = Augment(crop=24, scale=(1.0, 1.0), photometric=False)
    mirrored = 0
    for seed in range(40):
        x, y = drawn(picture, ids, plain, Draws(seed))
        assert x.shape == (3, 24, 24)
        assert torch.equal((x[0] > 0.2).long(), y)
        assert set(y.unique().tolist()) == {0, 1}  # a crop of one class is drawn again
        mirrored += int(y[0, 0])
    assert 8 < mirrored < 32


def test_small_pictures_are_padded_with_nothing() -> None:
    ids = np.ones((10, 12), np.uint8)
    picture = np.full((10, 12, 3), 255, np.uint8)
    x, y = drawn(picture, ids, Augment(crop=16, scale=(1.0, 1.0), photometric=False), Draws(0))
    assert int((y == LEFT_OUT).sum()) == 16 * 16 - 120
    assert torch.equal(x[0].isnan(), y == LEFT_OUT)
    z = normalised(x, (0.5,) * 3, (0.25,) * 3)
    assert z[:, y == LEFT_OUT].abs().max() == 0
    assert bool((z[:, y == 1] == 2).all())


def test_colours_are_distorted_within_bounds() -> None:
    ids = np.zeros((8, 8), np.uint8)
    picture = np.full((8, 8, 3), (128, 90, 60), np.uint8)
    seen = torch.stack([drawn(picture, ids, Augment(crop=8, scale=(1, 1)), Draws(s))[0][:, 0, 0] for s in range(60)])
    assert float(seen.std(0).min()) > 0.02
    assert 0 <= float(seen.min()) < float(seen.max()) <= 1


def test_every_picture_comes_once_in_each_pass() -> None:
    numbers = sample_numbers(5, seed=1)
    passes = [[next(numbers) for _ in range(5)] for _ in range(3)]
    assert [sample for one in passes for sample, _ in one] == list(range(15))
    assert all(sorted(number for _, number in one) == list(range(5)) for one in passes)
    assert len({tuple(number for _, number in one) for one in passes}) > 1


def test_windows_cover_a_picture_and_agree_with_the_whole() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    x = torch.rand(1, 3, 20, 33)
    torch.testing.assert_close(sliding(Same(), x, 8, 5), whole(Same(), x))
    torch.testing.assert_close(sliding(Same(), x, 64, 40), whole(Same(), x))
    covered = {place for start in starts(33, 8, 5) for place in range(start, start + 8)}
    assert covered == set(range(33))
    assert starts(2048, 769, 513) == [0, 513, 1026, 1279]


def test_windows_of_a_real_network(root: Path, tmp_path: Path) -> None:
    config = replace(SMALL, iterations=2, window=32, test_short=36)
    report = evaluate(encoder(), root, tmp_path, config)
    assert 0 <= report.metrics["mIoU"] <= 1


def test_rows_of_classes_that_do_not_occur_are_left_out() -> None:
    matrix = np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]])
    rows = class_rows(matrix, ("a", "b", "c"))
    assert [(row["class"], row["IoU"], row["accuracy"]) for row in rows] == [("a", 0.75, 0.75), ("b", 0.0, None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations = 0 is not possible"),
        ({"scale": (2.0, 1.0)}, "scale = "),
        ({"lr": 0.0}, r"lr = 0\.0 is not possible"),
        ({"window": -1}, "window = -1 is not possible"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_mask_of_another_size_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("x")
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("x")
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / "x.png")
    (tmp_path / "SegmentationClass" / "x.png").write_bytes(label_map_bytes(np.zeros((4, 8), np.uint8)))
    with pytest.raises(ValueError, match="x: the picture has 8x8 pixels, its mask 8x4"):
        evaluate(Pixels(), tmp_path, tmp_path / "out", SMALL)
