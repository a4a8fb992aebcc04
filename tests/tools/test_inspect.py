"""Inspection: numbers equal to what was written, pictures equal to the frames, views equal to the loader's."""

from __future__ import annotations

import io
import json
import re
import shutil
from base64 import b64decode
from dataclasses import dataclass, replace
from fractions import Fraction
from html import unescape
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipmill.models import method as method_module
from clipmill.models.method import Method, Output, Recipe
from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import file_digest
from clipmill.pipeline.spec import AudioSpec, Cutout, Flip, Normalize, VideoSpec, WholeFrame
from clipmill.pipeline.views import Clips, Uniform, View
from clipmill.tools import cli, inspect_data, pictures
from clipmill.tools.inspect import Args, main


@pytest.fixture
def packed(dataset: ShardIndex, tmp_path: Path) -> Path:
    """A copy of the small data set with the files that `pack` writes beside the index."""
    root = tmp_path / "packed"
    shutil.copytree(dataset.root, root)
    about = {"schema_version": 1, "profile": "cpu", "settings": {"gop": 8}, "counts": {"ok": 6, "duplicate": 2}}
    (root / "dataset.json").write_text(json.dumps(about))
    rows = [{"key": f"bad<{i}>", "path": f"/x/{i}.mp4", "reason": r, "detail": "d"} for i, r in enumerate("aab")]
    (root / "rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words(page: str) -> str:
    """The visible text, without the style sheet."""
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))))


def images(page: str) -> dict[str, np.ndarray]:
    """The pictures of a page by their alternative text."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', page)
    return {unescape(alt): np.asarray(Image.open(io.BytesIO(b64decode(data)))) for data, alt in found}


def inspect(root: Path, out: Path, *more: str) -> str:
    assert cli.main(["inspect", str(root), "--out", str(out), *more]) == 0
    return (out / "index.html").read_text("utf-8")


def test_the_page(packed: Path, tmp_path: Path):
    page = inspect(packed, tmp_path / "out", "--samples", "3")
    text = words(page)
    for part in ("Overview", "Distributions", "Labels and splits", "Rejects", "Records", "View: clip", "View: sound"):
        assert f" {part} " in text
    assert "records 6 " in text
    assert "rejected 3 duplicates 2 " in text
    assert "profile cpu " in text
    assert "gop 8 " in text
    assert " class0 2 0 2 class1 0 2 2 " in text  # test, train, all
    assert "3 files rejected, by reason a 2 b 1 " in text
    assert "bad<0> /x/0.mp4 a d " in text
    assert "missing" not in text
    assert "Attention" not in text
    alts = list(images(page))
    assert [alt.split(" of ")[0] for alt in alts] == ["Film strip", "Spectrogram"] * 3 + ["clip"] * 3 + ["sound"] * 3
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "contact-sheet.png", "spectrograms.png", "view-clip.png", "view-sound.png"}


def test_numbers_equal_what_was_written(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inspect(packed, tmp_path / "out", "--json", "--samples", "2")
    told = json.loads(capsys.readouterr().out)
    frames = [40 + number for number in range(6)]
    assert told["records"] == 6
    assert told["frames"] == sum(frames)
    assert told["hours"] == pytest.approx(sum(frames) / 25 / 3600)
    assert told["duration_s"] == pytest.approx({"min": 1.6, "median": 1.7, "mean": 1.7, "max": 1.8})
    assert told["splits"] == {"train": 4, "test": 2}
    assert told["labels"] == {"class0": 2, "class1": 2, "class2": 2}
    assert told["sizes"] == {"64x48": 6}
    assert told["fps"] == {"25": 6}
    assert told["audio_hz"] == {"16000": 6}
    assert told["codecs"] == {"h264": 6}
    assert told["shard_bytes"] == (packed / "shard-00000.tar").stat().st_size
    assert told["rejected"] == {"a": 2, "b": 1}
    assert told["damaged"] == {}
    assert Path(told["files"][0]).name == "index.html"
    assert all(Path(name).is_file() for name in told["files"])


def test_numbers_of_a_mixed_corpus(dataset: ShardIndex, tmp_path: Path):
    records = list(dataset)
    records[0] = replace(records[0], num_frames=1, label=-1, split="")
    records[1] = replace(records[1], num_frames=0, label=9)
    records[2] = replace(records[2], num_samples=0, audio_hz=0, salvaged=True)
    records[3] = replace(records[3], silent=True, fps=Fraction(30000, 1001))
    (tmp_path / "mixed").mkdir()
    shards = ["shard-00000.tar"]
    records = [replace(record, shard=shards[0]) for record in records]
    write_index(tmp_path / "mixed" / "index.arrow", records, shards, dataset.classes)
    told = inspect_data.corpus_numbers(ShardIndex.open(tmp_path / "mixed"))
    assert (told["images"], told["sound_only"], told["salvaged"], told["silent"]) == (1, 1, 1, 1)
    assert told["with_sound"] == 5
    assert told["shards_missing"] == shards
    assert told["labels"] == {"class2": 2, "(no label)": 1, "9": 1, "class0": 1, "class1": 1}
    assert told["splits"] == {"train": 4, "(none)": 1, "test": 1}
    assert told["fps"] == {"25": 4, "29.97": 1}
    assert told["duration_s"]["max"] == pytest.approx(1.8)
    assert inspect_data.durations(ShardIndex.open(tmp_path / "mixed"))[1] == pytest.approx(41 / 25)


def test_film_strips_hold_the_frames_they_claim(dataset: ShardIndex, frame_level):
    (first, *_) = inspect_data.record_samples(dataset, 6, 0, quiet=True)
    assert first.film is not None
    record = first.record
    tiles = np.split(np.delete(first.film, [c for i in range(1, 8) for c in range(i * 131 - 3, i * 131)], 1), 8, 1)
    numbers = pictures.evenly(record.num_frames, 8)
    assert numbers[0] == 0
    assert numbers[-1] == record.num_frames - 1
    for number, tile in zip(numbers, tiles, strict=True):
        luma = frame_level(record.index, number)
        expected = np.clip((luma - 16) / 219 * 255, 0, 255)
        assert abs(float(tile.mean()) - expected) < 3


def test_colours_are_those_of_ffmpeg():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for matrix, space, full in (("bt709", 1, False), ("bt601", 5, False), ("bt709", 1, True)):
        frame = av.VideoFrame.from_ndarray(base, "rgb24").reformat(
            format="yuv420p", dst_colorspace=space, dst_color_range=2 if full else 1
        )
        y, u, v = (np.frombuffer(bytes(p), np.uint8).reshape(-1, p.line_size) for p in frame.planes)
        ours = pictures.rgb((y[:48, :64], u[:24, :32], v[:24, :32]), matrix, full)
        assert np.abs(ours[2::8, 2::8].astype(int) - base[2::8, 2::8]).max() <= 4


def test_a_view_is_shown_as_the_loader_yields_it(packed: Path, tmp_path: Path):
    page = inspect(packed, tmp_path / "out", "--samples", "2", "--seed", "5")
    index = ShardIndex.open(packed)
    planner = inspect_data.plain_planner(index)
    config = LoaderConfig(threads=1, processes=0)
    with Loader(index, planner, batch_size=2, seed=5, drop_last=False, config=config) as loader:
        batch = next(loader.epoch(0))
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (Normalize().mean, Normalize().std))
    found = [picture for alt, picture in images(page).items() if alt.startswith("clip of ")]
    for x, shown in zip(batch.video["clip"], found, strict=True):
        frames = (x * std + mean).permute(1, 2, 3, 0)[pictures.evenly(16, 8)].numpy()
        tiles = [shown[:, i * 115 : i * 115 + 112] for i in range(8)]
        assert np.abs(np.stack(tiles) - np.clip(frames * 255, 0, 255)).max() <= 0.51
    titles = [alt for alt in images(page) if alt.startswith("clip of ")]
    keys = [index[i].key for i in batch.index.tolist()]
    assert titles == [
        f"clip of {key} from {s:.2f} s" for key, s in zip(keys, batch.start_s["clip"].tolist(), strict=True)
    ]


@pytest.mark.parametrize("size", [16, 48, 200])
def test_the_normalisation_is_undone(size: int):
    rng = np.random.default_rng(0)
    x = rng.random((3, 4, size, size))
    spec = VideoSpec(size=size, ops=(Flip(), Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)), Cutout()))
    normal = (x - np.array([0.1, 0.2, 0.3]).reshape(3, 1, 1, 1)) / np.array([0.5, 0.25, 2.0]).reshape(3, 1, 1, 1)
    assert np.abs(pictures.shown(normal, spec) - np.rint(x * 255).transpose(1, 2, 3, 0)).max() <= 1
    strip = pictures.clip_strip(normal, spec)
    side = {16: 112, 48: 96, 200: 112}[size]
    assert strip.shape == (side, 4 * side + 9, 3)


def test_values_outside_the_visible_range_are_clipped():
    plain = VideoSpec(size=2, ops=())
    x = np.array([-1.0, 0.5, 2.0, np.nan]).reshape(1, 1, 2, 2).repeat(3, 0)
    assert pictures.shown(x, plain)[0, ..., 0].tolist() == [[0, 128], [255, 0]]


def test_a_tone_is_bright_in_its_mel_band_and_silence_is_dark():
    hz, tone_hz = 16000, 1000
    wave = 0.5 * np.sin(2 * np.pi * tone_hz * np.arange(2 * hz) / hz)
    picture = pictures.spectrogram(wave, hz, mels=64)
    bands = librosa.mel_frequencies(66, fmin=0, fmax=hz / 2)[1:-1]
    loudest = 63 - int(picture.sum(2)[:, picture.shape[1] // 2].argmax())  # the lowest note is the last row
    assert loudest == np.abs(bands - tone_hz).argmin()
    assert pictures.spectrogram(np.zeros(hz), hz).max() < 60
    assert pictures.spectrogram(np.zeros(3), 8000).shape[0] == 64
    assert pictures.spectrogram(np.zeros(60 * hz), hz).shape[1] <= 641


def test_a_waveform_shows_its_envelope():
    wave = np.concatenate([np.zeros(500), np.full(500, 0.5)]).astype(np.float32)
    picture = pictures.wave_picture(wave, width=10, height=101)
    lit = (picture[..., 2] > 200).sum(0)
    assert set(lit[:5].tolist()) == {1}
    rows = np.flatnonzero(picture[:, 7, 2] > 200)
    assert rows.tolist() == [25]


def test_a_contact_sheet_holds_its_pictures():
    parts = [("one", np.full((5, 20, 3), 200, np.uint8)), ("two\n\u4e2d", np.full((9, 30, 3), 100, np.uint8))]
    sheet = pictures.contact_sheet(parts)
    assert sheet.shape == (10 + 5 + 30 + 9 + 30, 50, 3)
    assert (sheet == 200).all(2).sum() >= 100
    assert (sheet[65:74, 10:40] == 100).all()


@dataclass(frozen=True)
class FakeConfig:
    size: int = 24
    num_frames: int = 2


class FakeMethod(Method):
    """A method with two views of which one is sound."""

    Config = FakeConfig

    def __init__(self, config) -> None:
        super().__init__()
        self.config, self.net = config, nn.Linear(1, 1)

    def plan(self):
        spec = VideoSpec(size=self.config.size, crop=WholeFrame(), ops=(Normalize(),))
        sound = View(name="wave", modality="audio", duration_s=0.5, augment=AudioSpec())
        query = View(name="query", num_frames=self.config.num_frames, augment=spec)
        return Clips(views=(query, sound))

    def forward(self, batch) -> Output:
        raise NotImplementedError

    @property
    def encoder(self):
        raise NotImplementedError


@pytest.fixture
def fake_method(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"tiny": Recipe(about="small", method=FakeConfig(size=12, num_frames=3))}
    monkeypatch.setattr(method_module, "method_names", lambda: ["fake"])
    monkeypatch.setattr(inspect_data, "method_class", lambda name: FakeMethod)
    monkeypatch.setattr(inspect_data, "recipes", lambda name: known)


@pytest.mark.usefixtures("fake_method")
def test_the_views_of_a_method(packed: Path, tmp_path: Path):
    page = inspect(packed, tmp_path / "a", "--samples", "2", "--method", "fake")
    assert " View: query 2 frames, stride 1, 24x24; WholeFrame, Normalize, drawn per clip. " in words(page)
    assert " View: wave 0.5 s of sound at 16000 Hz, waveform; nothing drawn. " in words(page)
    text = words(inspect(packed, tmp_path / "b", "--samples", "2", "--method", "fake", "tiny"))
    assert " View: query 3 frames, stride 1, 12x12" in text


@pytest.mark.usefixtures("fake_method")
def test_an_unknown_recipe_names_those_that_exist(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(packed), "--out", str(tmp_path / "out"), "--method", "fake", "tony"]) == 2
    assert "no recipe 'tony'; it has tiny" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_and_sounds_have_views_of_their_own(dataset: ShardIndex, tmp_path: Path):
    for name, change in (("images", {"num_frames": 1, "num_samples": 0}), ("sounds", {"num_frames": 0})):
        root = tmp_path / name
        root.mkdir()
        shutil.copy(dataset.root / "shard-00000.tar", root)
        records = [replace(record, shard="shard-00000.tar", **change) for record in dataset]
        write_index(root / "index.arrow", records, ["shard-00000.tar"], dataset.classes)
    text = words(inspect(tmp_path / "images", tmp_path / "a", "--samples", "2"))
    assert " View: image 1 frames" in text
    assert "Spectrogram of" not in text
    assert "dataset.json is missing" in text
    assert "rejects.jsonl is missing" in text
    text = words(inspect(tmp_path / "sounds", tmp_path / "b", "--samples", "2"))
    assert " View: sound 2 s of sound" in text
    assert "Film strip" not in text


def test_one_split(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inspect(packed, tmp_path / "out", "--split", "test", "--json", "--samples", "9")
    assert json.loads(capsys.readouterr().out)["splits"] == {"test": 2}


def test_a_damaged_record_is_told_and_the_rest_is_shown(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    index = ShardIndex.open(packed)
    record = index[2]
    with (packed / "shard-00000.tar").open("r+b") as file:
        file.seek(record.packet_offset + int(record.packet_sizes[0]) // 2)
        file.write(b"\xaa\x55\xaa")
    page = inspect(packed, tmp_path / "out", "--samples", "6")
    assert f"damaged: {record.key}: " in capsys.readouterr().err
    assert f"damaged record {record.key}: " in words(page)
    assert "is altered (checksum differs)" in words(page)
    strips = [alt for alt in images(page) if alt.startswith("Film strip")]
    assert len(strips) == 5
    assert sum(alt.startswith("clip of ") for alt in images(page)) >= 5


def test_a_corpus_that_is_damaged_all_over_is_one_error(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    size = (packed / "shard-00000.tar").stat().st_size
    (packed / "shard-00000.tar").write_bytes(bytes(size))
    assert cli.main(["inspect", str(packed), "--out", str(tmp_path / "out")]) == 2
    assert "every record is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_lists_are_told(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (packed / "rejects.jsonl").write_text('{"reason": "a"}\n[1]\n{"reas')
    page = inspect(packed, tmp_path / "out", "--samples", "1")
    assert "rejects.jsonl: line 2 is not a JSON object and was left out" in words(page)
    assert "rejects.jsonl: line 3 is not a JSON object and was left out" in words(page)
    (packed / "dataset.json").write_text("{")
    assert cli.main(["inspect", str(packed), "--out", str(tmp_path / "new")]) == 2
    assert "dataset.json: not readable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{tmp}/nowhere", "--out", "{tmp}/o"], "no index.arrow there; is this a folder made by `clipmill pack`?"),
        (["{packed}", "--out", "{packed}"], "is the data set itself; choose another folder"),
        (["{packed}", "--out", "{tmp}/o", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["{packed}", "--out", "{tmp}/o", "--split", "dev"], "no split 'dev'; it has"),
        (["{packed}", "--out", "{tmp}/o", "--method", "no_such_method"], "unknown method 'no_such_method'"),
        (["{packed}", "--out", "{tmp}/o", "--method", "a", "b", "c"], "--method takes NAME [RECIPE]"),
    ],
)
def test_wrong_use_is_one_clear_error(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
):
    assert cli.main(["inspect", *(text.format(tmp=tmp_path, packed=packed) for text in options)]) == 2
    flat = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert said in flat
    assert not (tmp_path / "o").exists()


def test_arguments_have_units_and_defaults():
    args = Args(dataset=Path("a"), out=Path("b"))
    assert (args.samples, args.seed, args.json) == (8, 0, False)
    assert main.__doc__


def test_uniform_planners_are_shown_too(packed: Path):
    spec = VideoSpec(size=16, ops=())
    planner = Uniform(views=(View(name="v", num_frames=4, augment=spec),), clips=2)
    _, found = inspect_data.view_samples(ShardIndex.open(packed), planner, 3, 0)
    assert [picture.shape for _, picture in found["v"]] == [(112, 8 * 112 + 21, 3)] * 3


def test_real_clips(test_data: Path):
    clips = sorted((test_data / "data").rglob("*.mp4"))
    if not clips:
        pytest.skip("no mp4 in the test data")
    with av.open(str(clips[0])) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == "yuv420p"
    space = {1: "bt709"}.get(int(frame.colorspace), "bt601")
    planes = [np.frombuffer(bytes(p), np.uint8).reshape(-1, p.line_size) for p in frame.planes]
    half = (frame.height // 2, frame.width // 2)
    ours = pictures.rgb(
        (planes[0][: frame.height, : frame.width], planes[1][: half[0], : half[1]], planes[2][: half[0], : half[1]]),
        space,
    )
    theirs = frame.to_ndarray(format="rgb24", interpolation="POINT")
    assert np.abs(ours.astype(int) - theirs).mean() < 2


def test_a_data_set_at_a_url_looks_like_its_folder(packed: Path, tmp_path: Path, capsys):
    about = json.loads((packed / "dataset.json").read_text())
    shards = [{"name": path.name, "bytes": path.stat().st_size} for path in packed.glob("*.tar")]
    files = {name: file_digest(packed / name) for name in ("index.arrow", "rejects.jsonl")}
    (packed / "dataset.json").write_text(json.dumps(about | {"shards": shards, "files": files}))
    found = {}
    for name, place in (("folder", str(packed)), ("url", f"file://{packed}")):
        options = ["--out", str(tmp_path / name), "--samples", "3", "--cache-dir", str(tmp_path / "cache"), "--json"]
        assert cli.main(["inspect", place, *options]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert all(Path(file).is_file() for file in found[name].pop("files"))
    assert found["folder"] == found["url"]
    assert found["url"]["shard_bytes"] == shards[0]["bytes"]
    for picture in ("contact-sheet", "spectrograms", "view-clip"):
        there = [(tmp_path / name / f"{picture}.png").read_bytes() for name in found]
        assert there[0] == there[1]
