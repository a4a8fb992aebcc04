"""Training pairs and the training of a tracking head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipmill.datasets.got10k import Track, read
from clipmill.models.encoder import build_encoder
from clipmill.pipeline.draws import Draws
from clipmill.tools.evaluate.baselines import LabPatches
from clipmill.tools.evaluate.evaluator import silent
from clipmill.tools.tracker import TrackerSettings
from clipmill.tools.tracker_crops import resize
from clipmill.tools.tracker_maps import FrozenMaps, MapOptions
from clipmill.tools.tracker_pairs import centre_crop, draw_frames, training_pair, usable, valid_frames
from clipmill.tools.tracker_train import HeadTraining, train_head

Write = Callable[[Path, int], Path]
SIDE = 40


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sequences of five frames in the layout of GOT-10k: a textured square on a coloured ground."""
    root = tmp_path_factory.mktemp("got10k")
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = root / "train" / f"GOT-10k_Train_{number:06d}"
        folder.mkdir(parents=True)
        texture = resize(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8), SIDE, SIDE, "cubic")
        ground = np.tile(rng.integers(90, 160, 3, dtype=np.uint8), (130, 150, 1))
        rows = []
        for t in range(5):
            y, x = 40 + 3 * t, 50 + 2 * t
            picture = ground.copy()
            picture[y : y + SIDE, x : x + SIDE] = texture
            Image.fromarray(picture).save(folder / f"{t + 1:08d}.png")
            rows.append(f"{x + 1},{y + 1},{SIDE},{SIDE}\n")
        (folder / "groundtruth.txt").write_text("".join(rows))
        (folder / "cover.label").write_text("8\n" * 5)
    (root / "train" / "list.txt").write_text("".join(f"GOT-10k_Train_{number:06d}\n" for number in range(6)))
    return root


# --- pairs --------------------------------------------------------------------------------------------------


def test_frames_to_train_on() -> None:
    """Each condition alone rejects a frame."""
    good = (10.0, 10.0, 50.0, 40.0)
    rows = [good, (1, 1, 19, 40), (1, 1, 40, 19), (1, 1, 201, 40), (1, 1, 40, 151), (1, 1, 20, 81), (1, 1, 81, 20)]
    boxes = np.array([*rows, (np.nan,) * 4], float)
    assert valid_frames(boxes, (300, 400)).tolist() == [0]
    assert valid_frames(np.array([(1.0, 1, 501, 400), (1, 1, 500, 400)]), (2000, 2000)).tolist() == [1]
    many = np.tile(good, (4, 1))
    assert valid_frames(many, (300, 400), np.array([8, 3, 2, 0])).tolist() == [0, 1]  # more than 0.3 * 8
    assert valid_frames(many, (300, 400), np.array([2, 2, 1, 0])).tolist() == [0, 1]  # more than 1


def test_frames_of_a_pair() -> None:
    frames = np.array([3, 50, 120, 300])
    seen = {draw_frames(frames, Draws(0, number), 100) for number in range(60)}
    assert {(3, 50), (50, 120)} <= seen
    assert all(a == b or a < b < a + 100 for a, b in seen)
    assert {draw_frames(frames, Draws(0, number), 1) for number in range(60)} <= {(t, t) for t in frames.tolist()}
    assert draw_frames(np.array([7]), Draws(0)) == (7, 7)


def test_a_pair_shows_its_target(corpus: Path) -> None:
    """The target is in the middle of both patches, give or take the shaking, and the earlier frame is the exemplar."""
    (first, *_) = usable(read(corpus))
    settings = TrackerSettings()
    pictures: list[Path] = []

    def load(path: Path) -> np.ndarray:
        pictures.append(path)
        return np.asarray(Image.open(path))

    for number in range(5):
        z, x = training_pair(first, Draws(1, number), settings, load)
        assert z.shape == (120, 120, 3)
        assert x.shape == (239, 239, 3)
        ground = np.asarray(Image.open(first.track.frames[0]))[0, 0].astype(int)
        for patch, side in ((z, 60), (x, 60)):  # 40 pixels in a square of 80, enlarged to 120
            rows, columns = np.nonzero(np.abs(patch.astype(int) - ground).max(2) > 60)
            middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            assert np.abs(np.array(middle) - (len(patch) - 1) / 2).max() < 9
            assert abs(np.ptp(rows) - side) < 9
    assert all(int(a.stem) < int(b.stem) for a, b in zip(pictures[::2], pictures[1::2], strict=True))


def test_a_pair_is_a_function_of_its_key(corpus: Path) -> None:
    (first, *_) = usable(read(corpus))
    settings = TrackerSettings(exemplar_size=40, instance_size=88)
    load = lambda path: np.asarray(Image.open(path))  # noqa: E731
    one, two, other = (training_pair(first, Draws(key), settings, load) for key in (5, 5, 6))
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[1], other[1])


def test_centre_crops() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(centre_crop(picture, 5), picture[2:7, 2:7])
    framed = centre_crop(picture, 13)
    np.testing.assert_array_equal(framed[2:11, 2:11], picture)
    assert (framed[0] == np.rint(picture.mean((0, 1)))).all()


def test_nothing_to_train_on(corpus: Path, tmp_path: Path) -> None:
    tracks = read(corpus)
    tiny = Track(name="tiny", frames=tracks[0].frames, boxes=np.tile([1.0, 1, 5, 5], (5, 1)), cover=None)
    assert len(usable([tiny, *tracks])) == len(tracks)
    with pytest.raises(ValueError, match="none of 1 sequences"):
        usable([tiny])
    broken = tmp_path / "00000001.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00000001\.jpg: not a picture"):
        usable([Track(name="x", frames=(broken,), boxes=np.ones((1, 4)), cover=None)])


# --- training -----------------------------------------------------------------------------------------------

SMALL = TrackerSettings(exemplar_size=48, instance_size=112)


def test_training_lowers_the_loss(corpus: Path) -> None:
    config = HeadTraining(head_epochs=4, head_batch=3, head_lr=1e-2, head_lr_end=1e-3, out_scale=1e-2)
    maps = FrozenMaps(LabPatches(), MapOptions(device="cpu"))
    told: list[tuple[str, int, int, str]] = []
    head, rows = train_head(maps, usable(read(corpus)), SMALL, config, progress=lambda *row: told.append(row))
    assert [row["epoch"] for row in rows] == list(range(4))
    np.testing.assert_allclose([row["lr"] for row in rows], 1e-2 * 0.1 ** (np.arange(4) / 4))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
    assert told[-1] == ("tracking head", 8, 8, "step")
    assert not head.training
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_training_is_repeatable(corpus: Path) -> None:
    """Same seed, same weights, whatever the number of threads; the encoder is left alone."""
    encoder = build_encoder("resnet18", width=0.125).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    maps = FrozenMaps(encoder, MapOptions(device="cpu"))
    heads = []
    for seed, threads in ((0, 1), (0, 3), (1, 1)):
        config = HeadTraining(head_epochs=1, head_batch=4, head_seed=seed, head_loss="balanced")
        head, _ = train_head(maps, usable(read(corpus)), SMALL, config, threads=threads, progress=silent)
        heads.append(head.x.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("change", [{"head_epochs": 0}, {"head_lr": 0.0}, {"head_lr_end": 1.0}, {"max_gap": 0}])
def test_options_that_make_no_sense(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        HeadTraining(**change)  # type: ignore[arg-type]
