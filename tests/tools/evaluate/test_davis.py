from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.models.encoder import Encoder, InputSpec, build_encoder, save_encoder
from clipmill.tools import cli
from clipmill.tools.evaluate import davis_score
from clipmill.tools.evaluate.davis import Config, evaluate, probe
from clipmill.tools.evaluate.propagation import Maps, Overrides

HEIGHT, WIDTH = 48, 64
PLAIN = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
KNOWN = Overrides(topk=1, size=HEIGHT, radius=4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Identity(Encoder):
    """Tells every colour from every other: random waves of the pixel's colour, at the resolution of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.stages, self.spec = 64, ("pixels",), PLAIN
        self.register_buffer("waves", torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) * 25)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        angle = torch.einsum("dc,bcthw->bdthw", self.get_buffer("waves"), x)
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "pixels").mean((2, 3, 4))


class Place(Identity):
    """Sees nothing: the feature of a cell says where it is."""

    def maps(self, x: Tensor, stage: str) -> Tensor:
        where = torch.randn(32, *x.shape[3:], generator=torch.Generator().manual_seed(1))
        return where[None, :, None].expand(len(x), -1, x.shape[2], -1, -1)


def write(root: Path, name: str, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p" / name).mkdir(parents=True)
    for t, (frame, ids) in enumerate(zip(frames, masks, strict=True)):
        Image.fromarray(frame).save(root / "JPEGImages" / "480p" / name / f"{t:05d}.png")
        (root / "Annotations" / "480p" / name / f"{t:05d}.png").write_bytes(label_map_bytes(ids))


def scene(boxes: Sequence[Sequence[tuple[int, int, int]]], seed: int = 0) -> tuple[list, list]:
    """Frames and masks: per frame a (top, left, side) per object, each object of pixels of its own colours on black."""
    rng = np.random.default_rng(seed)
    skins = [rng.integers(60, 256, (side, side, 3)).astype(np.uint8) for _, _, side in boxes[0]]
    frames, masks = [], []
    for placed in boxes:
        frame, ids = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, ((top, left, side), skin) in enumerate(zip(placed, skins, strict=True), 1):
            frame[top : top + side, left : left + side] = skin
            ids[top : top + side, left : left + side] = number
        frames.append(frame)
        masks.append(ids)
    return frames, masks


def moving(speed: int = 2, frames: int = 7, side: int = 14) -> list[list[tuple[int, int, int]]]:
    return [[(6, 4 + speed * t, side), (28, 40 - speed * t, 10)] for t in range(frames)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "davis", "two", *scene(moving()))
    write(tmp_path / "davis", "one", *scene([boxes[:1] for boxes in moving(1, 5)], seed=3))
    (tmp_path / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "davis" / "ImageSets" / "2017" / "val.txt").write_text("two\none\n")
    return tmp_path / "davis"


def config(**options: Any) -> Config:
    return Config(**{"overrides": KNOWN, "maps": Maps(device="cpu"), "videos": False, **options})


# --- what is measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["vfs", "crw", "dino"])
def test_features_that_identify_every_point_score_one(root: Path, tmp_path: Path, preset: Any) -> None:
    report = evaluate(Identity(), root, tmp_path / "out", config(preset=preset))  # 64 x 48 suits DINO's multiples of 64
    assert {name: round(value, 12) for name, value in report.metrics.items()} == {
        "J&F-Mean": 1,
        "J-Mean": 1,
        "J-Recall": 1,
        "J-Decay": 0,
        "F-Mean": 1,
        "F-Recall": 1,
        "F-Decay": 0,
    }
    assert [row["object"] for row in report.rows] == ["two_1", "two_2", "one_1"]


def test_a_translated_object_left_behind_scores_what_geometry_says(tmp_path: Path) -> None:
    side, speed, frames, radius = 20, 3, 6, 1  # 1 = ceil(0.008 * diagonal of 48 x 64)
    write(tmp_path, "square", *scene([[(10, 5 + speed * t, side)] for t in range(frames)]))
    report = evaluate(Place(), tmp_path, tmp_path / "out", config())
    away = speed * np.arange(1, frames - 1)
    shared = (side - away) * side
    region = shared / (2 * side**2 - shared)
    # A boundary is the rim of a square of side + 1 pixels. Of the rim left behind, all of the two rows that the other
    # rim or its tolerance reaches is right, and of its right column what is near those rows.
    right = 2 * (side - away + radius + 1) + 2 * radius
    edge = right / (4 * side)
    assert report.metrics["J-Mean"] == pytest.approx(region.mean(), abs=1e-12)
    assert report.metrics["F-Mean"] == pytest.approx(edge.mean(), abs=1e-12)
    assert report.metrics["J-Recall"] == (region > 0.5).mean()


def test_many_objects_are_averaged_over_objects(root: Path, tmp_path: Path) -> None:
    report = evaluate(Place(), root, tmp_path / "out", config())
    assert report.metrics["J-Mean"] == pytest.approx(np.mean([row["J-Mean"] for row in report.rows]))
    table = list(csv.DictReader((tmp_path / "out" / "sequences.csv").read_text().splitlines()))
    assert [(row["sequence"], row["objects"]) for row in table] == [("two", "2"), ("one", "1")]
    assert float(table[0]["J-Mean"]) == pytest.approx(np.mean([row["J-Mean"] for row in report.rows[:2]]))


def test_2016_has_one_object(root: Path, tmp_path: Path) -> None:
    report = evaluate(Identity(), root, tmp_path / "out", config(year="2016"))
    assert [row["object"] for row in report.rows] == ["one_1", "two_1"]  # no list of 2016: all, by name
    assert report.metrics["J&F-Mean"] == 1


# --- what is written ----------------------------------------------------------------------------------------


def test_masks_can_be_scored_by_anybody(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate(Place(), root, out, config(videos=True))
    for name, frames in (("two", 7), ("one", 5)):
        paths = sorted((out / "masks" / name).iterdir())
        assert [path.name for path in paths] == [f"{t:05d}.png" for t in range(frames)]
        with Image.open(paths[1]) as image:
            assert (image.mode, image.size) == ("P", (WIDTH, HEIGHT))
    given = (root / "Annotations" / "480p" / "two" / "00000.png").read_bytes()
    assert (out / "masks" / "two" / "00000.png").read_bytes() == given
    again = evaluate(None, root, tmp_path / "again", config(score_only=out / "masks"))
    assert again.metrics == report.metrics
    assert again.rows == report.rows
    for name in ("global_results-val.csv", "per-sequence_results-val.csv", "objects.csv", "sequences.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    first, second = (out / "global_results-val.csv").read_text().splitlines()
    assert first == "J&F-Mean,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay"
    assert second.split(",")[1] == f"{report.metrics['J-Mean']:.3f}"
    rows = (out / "per-sequence_results-val.csv").read_text().splitlines()
    assert rows[0] == "Sequence,J-Mean,F-Mean"
    assert rows[3] == f"one_1,{report.rows[2]['J-Mean']:.3f},{report.rows[2]['F-Mean']:.3f}"
    for name in report.artefacts:
        assert (out / name).is_file(), name
    times = json.loads((out / "times.json").read_text())
    assert times["frames"] == 12
    assert min(times[f"{stage}_ms_per_frame"] for stage in ("features", "affinity", "labels")) > 0


def test_pictures_show_frame_prediction_and_truth(root: Path, tmp_path: Path) -> None:
    evaluate(Place(), root, tmp_path, config(videos=True))
    with av.open(tmp_path / "videos" / "two.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 7
    assert frames[0].shape == (HEIGHT, WIDTH, 3)
    black = frames[6][2, 2].astype(int)
    assert black.max() < 40
    stale = frames[6][12, 8].astype(int)  # where the object was: tinted red although the frame is black there
    assert stale[0] > 40
    assert stale[0] > 2 * stale[1]
    assert (frames[6][19, 20:28] > 150).all()  # the lower rim of the truth, which has moved
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 600
        assert sheet.height > 250


def test_a_test_split_is_segmented_without_a_score(root: Path, tmp_path: Path) -> None:
    for path in sorted((root / "Annotations" / "480p" / "two").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="1 masks; the first and the last frame are not scored"):
        evaluate(Identity(), root, tmp_path / "out", config(sequences=("two",)))
    report = evaluate(Identity(), root, tmp_path / "out", config(sequences=("two",), score=False))
    assert (dict(report.metrics), list(report.rows)) == ({}, [])
    assert len(list((tmp_path / "out" / "masks" / "two").iterdir())) == 7


def test_settings_say_all_that_decides_the_numbers(root: Path, tmp_path: Path) -> None:
    chosen = config(preset="dino", overrides=Overrides(tau=0.2, size=48, radius=3), sequences=("one",))
    report = evaluate(Identity(), root, tmp_path, chosen)
    protocol = report.settings["protocol"]
    assert (protocol["rule"]["tau"], protocol["rule"]["topk"], protocol["rule"]["context"]) == (0.2, 5, 7)
    assert (protocol["rule"]["window"], protocol["rule"]["ties"], protocol["std"]) == (
        "square",
        "keep",
        (0.228, 0.224, 0.225),
    )
    assert report.settings["stage"] == "pixels"
    assert report.settings["sequences"] == ["one"]
    assert not report.published
    whole = evaluate(Identity(), root, tmp_path, config(preset="vfs"))
    assert whole.published[0]["J&F-Mean"] == 0.667
    assert json.loads(whole.to_json())["settings"]["config"]["overrides"]["topk"] == 1


def test_the_change_of_half_precision_features_is_reported(root: Path, tmp_path: Path) -> None:
    chosen = config(maps=Maps(device="cpu", store="bf16"), compare_fp32=True)
    report = evaluate(Place(), root, tmp_path / "half", chosen)
    full = evaluate(Place(), root, tmp_path / "full", config())
    for name in ("J&F-Mean", "J-Mean", "F-Mean"):
        assert report.metrics[f"{name}-Change"] == pytest.approx(report.metrics[name] - full.metrics[name], abs=1e-15)


# --- encoders -----------------------------------------------------------------------------------------------


def test_a_backbone_is_taken_at_stride_8_and_left_as_it_was(root: Path, tmp_path: Path) -> None:
    encoder = build_encoder("resnet18", width=0.125)
    encoder.layer1[0].eval()  # type: ignore[union-attr,index]
    modes = [part.training for part in encoder.modules()]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    calls = []
    maps = encoder.maps
    encoder.maps = lambda x, stage, strides: (calls.append((stage, strides, x.shape)), maps(x, stage, strides=strides))[
        1
    ]  # type: ignore[method-assign]
    report = evaluate(encoder, root, tmp_path, config())
    assert report.settings["stage"] == "res4"
    assert calls[0][:2] == ("res4", (1, 2, 1, 1))
    assert calls[0][2] == (4, 3, 1, HEIGHT, WIDTH)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_encoders_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AudioResNet hears; propagating labels needs an encoder that sees"):
        evaluate(build_encoder("audio_resnet18", width=0.125), root, tmp_path, config())
    with pytest.raises(ValueError, match="no stage 'res9' in Identity; it has pixels"):
        evaluate(Identity(), root, tmp_path, config(maps=Maps(stage="res9", device="cpu")))

    class Diverged(Identity):
        def maps(self, x: Tensor, stage: str) -> Tensor:
            return super().maps(x, stage) * torch.nan

    with pytest.raises(ValueError, match=r"the encoder's features of .*00000\.png are not finite"):
        evaluate(Diverged(), root, tmp_path, config())


def test_batches_do_not_matter(root: Path, tmp_path: Path) -> None:
    encoder = build_encoder("resnet18", width=0.125)
    rows = [evaluate(encoder, root, tmp_path, config(maps=Maps(batch_size=n, device="cpu"))).rows for n in (1, 3, 7)]
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert a["J-Mean"] == pytest.approx(b["J-Mean"], abs=1e-3)


def test_a_probe_writes_nothing(root: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    encoder = Place().train()
    found = probe(encoder, root, 1, config())()
    assert sorted(tmp_path.rglob("*")) == before
    assert encoder.training
    whole = evaluate(Place(), root, tmp_path / "out", config(sequences=("two",)))
    assert found == {f"davis_{a}": whole.metrics[b] for a, b in (("jf", "J&F-Mean"), ("j", "J-Mean"), ("f", "F-Mean"))}
    with pytest.raises(ValueError, match="no stage 'res9' in Place"):
        probe(encoder, root, 1, config(maps=Maps(stage="res9", device="cpu")))
    break_objects(root)
    with pytest.raises(ValueError, match=r"00000\.png: no object in the first mask"):
        probe(encoder, root, 1, config())


# --- broken input -------------------------------------------------------------------------------------------


def rewrite(root: Path, change: Callable[[np.ndarray, int], np.ndarray], folder: str = "Annotations/480p/two") -> None:
    for t, path in enumerate(sorted((root / folder).iterdir())):
        with Image.open(path) as image:
            ids = np.array(image)
        path.write_bytes(label_map_bytes(change(ids, t)))


def test_an_object_that_vanishes_at_the_grid_is_never_predicted(tmp_path: Path) -> None:
    boxes = [[(10, 4 + t, 12), (30, 50, 2)] for t in range(5)]
    write(tmp_path, "small", *scene(boxes))
    report = evaluate(build_encoder("resnet18", width=0.125), tmp_path, tmp_path / "out", config())
    first, second = report.rows  # two pixels lie between the places that Pillow's NEAREST takes
    assert first["J-Mean"] > 0
    assert (second["J-Mean"], second["F-Mean"]) == (0, 0)


def test_an_object_that_appears_later_is_not_scored(root: Path, tmp_path: Path) -> None:
    before = evaluate(Identity(), root, tmp_path / "a", config(sequences=("two",))).rows

    def appear(ids: np.ndarray, t: int) -> np.ndarray:
        ids = ids.copy()
        ids[44:, :5] = 3 if t > 2 else 0
        return ids

    rewrite(root, appear)
    assert evaluate(Identity(), root, tmp_path / "b", config(sequences=("two",))).rows == before


def test_an_object_without_a_pixel_is_right_when_it_is_not_predicted(root: Path, tmp_path: Path) -> None:
    rewrite(root, lambda ids, t: np.where(ids == 2, 3, ids).astype(np.uint8))  # 1 and 3: the toolkit counts 3 objects
    report = evaluate(Identity(), root, tmp_path, config(sequences=("two",)))
    assert [row["J-Mean"] for row in report.rows] == [1, 1, 1]


def test_void_is_background(root: Path, tmp_path: Path) -> None:
    def mark(ids: np.ndarray, t: int) -> np.ndarray:
        ids = ids.copy()
        ids[:3] = 255
        return ids

    rewrite(root, mark)
    report = evaluate(Identity(), root, tmp_path, config(sequences=("two",)))
    assert report.metrics["J-Mean"] == 1
    assert len(report.rows) == 2


def break_size(root: Path) -> None:
    rewrite(root, lambda ids, t: ids[:, : WIDTH - t // 3])


def break_picture(root: Path) -> None:
    path = root / "JPEGImages" / "480p" / "two" / "00002.png"
    path.write_bytes(path.read_bytes()[:200])


def break_frame_size(root: Path) -> None:
    Image.new("RGB", (60, 40)).save(root / "JPEGImages" / "480p" / "two" / "00005.png")


def break_objects(root: Path) -> None:
    rewrite(root, lambda ids, t: ids * (t > 0))


def break_mask(root: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "Annotations" / "480p" / "two" / "00003.png")


def lose_mask(root: Path) -> None:
    (root / "Annotations" / "480p" / "two" / "00003.png").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_size, r"00003\.png: 63x48 pixels, the first mask has 64x48"),
        (break_picture, r"00002\.png: damaged"),
        (break_frame_size, r"00005\.png: 60x40 pixels, but the sequence's labels have 64x48"),
        (break_objects, r"00000\.png: no object in the first mask"),
        (break_mask, r"00003\.png: a picture of mode RGB"),
        (lose_mask, r"two: frame 00003 is missing"),
    ],
)
def test_one_clear_error(root: Path, tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(root)
    with pytest.raises(ValueError, match=message):
        evaluate(Identity(), root, tmp_path / "out", config(sequences=("two",)))


@pytest.fixture
def results(root: Path, tmp_path: Path) -> Path:
    evaluate(Place(), root, tmp_path / "first", config())
    return tmp_path / "first" / "masks"


def more_objects(folder: Path) -> None:
    rewrite(folder, lambda ids, t: np.where(ids == 2, 5, ids).astype(np.uint8), "two")


def other_size(folder: Path) -> None:
    rewrite(folder, lambda ids, t: ids[:40], "two")


def colours(folder: Path) -> None:
    for path in (folder / "two").iterdir():
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.save(path)


def no_frame(folder: Path) -> None:
    (folder / "two" / "00004.png").unlink()


def no_sequence(folder: Path) -> None:
    (folder / "two").rename(folder / "tow")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (more_objects, "two: a prediction has object 5, but the sequence has 2"),
        (other_size, r"two.00001\.png: 64x40 pixels, the ground truth has 64x48"),
        (colours, r"two.00001\.png: a picture of mode RGB"),
        (no_frame, r"two.00004\.png: no such mask"),
        (no_sequence, r"two.00001\.png: no such mask"),
    ],
)
def test_results_that_cannot_be_scored(
    root: Path, tmp_path: Path, results: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(results)
    with pytest.raises(ValueError, match=message):
        evaluate(None, root, tmp_path / "out", config(score_only=results))


def test_frames_that_are_not_scored_may_be_missing(root: Path, tmp_path: Path, results: Path) -> None:
    whole = evaluate(None, root, tmp_path / "a", config(score_only=results))
    for name in ("00000.png", "00006.png"):
        (results / "two" / name).unlink()
    assert evaluate(None, root, tmp_path / "b", config(score_only=results)).rows == whole.rows


# --- the command --------------------------------------------------------------------------------------------


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_encoder(build_encoder("resnet18", width=0.125), tmp_path / "run")
    options = ["--size", "48", "--sequences", "one", "--device", "cpu", "--no-videos"]
    assert cli.main(["evaluate", "davis", str(tmp_path / "run"), str(root), *options]) == 0
    printed = capsys.readouterr().out
    assert "J&F-Mean" in printed
    assert "protocol.rule.radius = 12" in printed
    folder = tmp_path / "run" / "evaluate" / "davis"
    score = json.loads((folder / "score.json").read_text())
    assert score["settings"]["protocol"]["size"] == 48
    masks = ["--score-only", str(folder / "masks"), "--sequences", "one", "--json"]
    assert cli.main(["evaluate", "davis", "-", str(root), *masks]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == score["metrics"]
    assert json.loads((folder / "masks" / "score.json").read_text()) == again
    lab = ["evaluate", "davis", "baseline:lab", str(root), *options]
    assert cli.main(lab) == 2
    assert "say with --out where the score goes" in capsys.readouterr().err
    assert cli.main([*lab, "--out", str(tmp_path / "lab"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["stage"] == "patch"
    assert cli.main(["evaluate", "davis", "baseline:rgb", str(root), "--out", str(tmp_path / "x")]) == 2
    assert "unknown baseline 'rgb'; there is baseline:lab" in capsys.readouterr().err


def test_published_results_are_rescored_to_the_digit(test_data: Path, tmp_path: Path) -> None:
    corpus = test_data / "data" / "davis_eval"
    results = corpus / "results_contrastcorr"
    if not results.is_dir():
        pytest.skip(f"no {results}")
    evaluate(None, corpus, tmp_path, Config(year="2016", score_only=results))
    name = davis_score.PER_OBJECT.format(split="val")
    published = (results / name).read_text().splitlines()
    found = (tmp_path / name).read_text().splitlines()
    assert found[0] == published[0]
    assert len(found) == 6
    assert set(found) <= set(published)
