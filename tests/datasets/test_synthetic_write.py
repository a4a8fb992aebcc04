"""Synthetic corpora on disk: layouts, readers, repeatability, interruption."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from clipmill.datasets import folder, images, kinetics, ucf101
from clipmill.datasets.source import Corpus
from clipmill.datasets.synthetic import TEXTURES
from clipmill.datasets.synthetic_draw import class_names
from clipmill.datasets.synthetic_write import SETTINGS_FILE, Settings, clip_scene, sequence_scene, write
from clipmill.tools import cli

TINY = Settings(
    clips=16, motions=2, rhythms=1, size=32, seconds=0.3, images=30, sequences=3, frames=6, frame_size=48, objects=3
)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("synthetic"), "all", TINY)


def lengths(corpus: Corpus) -> list[int]:
    counts = []
    for source in corpus.sources:
        with av.open(source.path) as container:
            assert container.streams.audio
            counts.append(sum(1 for _ in container.decode(video=0)))
    return counts


def test_bytes_do_not_depend_on_the_processes(everything: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    again = contents(write(tmp_path, "all", TINY, processes=2, progress=lambda done, total: seen.append((done, total))))
    assert again == contents(everything)
    total = 3 * 16 + 30 + 2 * 3
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert contents(write(tmp_path / "alone", "davis", TINY)).keys() == {
        SETTINGS_FILE,
        *(path[6:] for path in again if path.startswith("davis/")),
    }


def test_finished_files_are_kept_and_missing_ones_made(tmp_path: Path) -> None:
    write(tmp_path, "kinetics", TINY)
    before = contents(tmp_path)
    victim = next(tmp_path.glob("train/*/*.mp4"))
    kept = next(path for path in tmp_path.glob("train/*/*.mp4") if path != victim)
    stamp = kept.stat().st_mtime_ns
    victim.rename(victim.with_name(f".{victim.name}.part"))  # as a run that was killed leaves it
    (tmp_path / "train.csv").unlink()
    write(tmp_path, "kinetics", TINY)
    assert contents(tmp_path) == before
    assert kept.stat().st_mtime_ns == stamp


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "images", TINY)
    with pytest.raises(ValueError, match=r"synthetic\.json: this folder was made with other settings"):
        write(tmp_path / "a", "otb", TINY)
    (tmp_path / "a" / SETTINGS_FILE).write_text("{")
    with pytest.raises(ValueError, match="other settings"):
        write(tmp_path / "a", "images", TINY)
    with pytest.raises(ValueError, match="holds other files"):
        write(tmp_path, "images", TINY)
    with pytest.raises(ValueError, match=r"unknown kind 'imagenet'; choose one of folder, kinetics"):
        write(tmp_path / "b", "imagenet", TINY)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clips", 7, r"clips must be 32 \(4 per class\)"),
        ("size", 8, "size must be 32 to"),
        ("seconds", 0.0, "0.1"),
        ("seed", -1, "seed"),
    ],
)
def test_settings_out_of_range(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{name: value})


def test_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device", str(self))

    write(tmp_path, "images", TINY)
    for path in tmp_path.glob("train/dots/*"):
        path.unlink()
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "images", TINY)
    assert not list((tmp_path / "train" / "dots").iterdir())


def test_kinetics(everything: Path) -> None:
    corpus = kinetics.read(everything / "kinetics")
    assert corpus.classes == tuple(sorted(class_names(2, 1)))
    assert not corpus.missing
    assert Counter((source.label, source.split) for source in corpus.sources) == {
        (label, split): count for label in (0, 1) for split, count in (("train", 6), ("val", 2))
    }
    assert all(re.fullmatch(r"[\w-]{11}_\d{6}_\d{6}", source.key) for source in corpus.sources)
    assert sorted(lengths(corpus)) == sorted(clip_scene(TINY, number).num_frames for number in range(16))


def test_folder(everything: Path) -> None:
    corpus = folder.read(everything / "folder")
    assert corpus.classes == tuple(sorted(class_names(2, 1)))
    numbers = [int(source.key[-5:]) for source in corpus.sources]
    assert sorted(numbers) == list(range(16))
    names = class_names(2, 1)
    assert [corpus.classes[source.label] for source in corpus.sources] == [names[number % 2] for number in numbers]
    assert lengths(corpus) == [clip_scene(TINY, number).num_frames for number in numbers]
    assert len({Path(source.path).suffix for source in corpus.sources}) >= 3


def test_ucf101(everything: Path) -> None:
    corpus = ucf101.read(everything / "ucf101")
    assert corpus.classes == ("BouncingSlowBeats", "SwayingSlowBeats")
    assert len(corpus.sources) == 16
    assert not corpus.missing
    sides: dict[tuple[str, str], set[str]] = {}
    for source in corpus.sources:
        parts = source.extra["splits"]
        assert isinstance(parts, dict)
        for split, part in parts.items():
            sides.setdefault((source.key.rpartition("_")[0], split), set()).add(part)
    assert all(len(parts) == 1 for parts in sides.values())
    for split in (1, 2, 3):
        found = Counter(
            (source.label, source.split) for source in ucf101.read(everything / "ucf101", split=split).sources
        )
        assert set(found) == {(label, part) for label in (0, 1) for part in ("train", "test")}
    lists = everything / "ucf101" / "ucfTrainTestlist"
    assert (lists / "classInd.txt").read_bytes() == b"1 BouncingSlowBeats\r\n2 SwayingSlowBeats\r\n"
    assert min(lengths(corpus)) >= 1


def test_clips_of_a_ucf101_group_look_alike() -> None:
    (one,), (two,), (other,) = (clip_scene(TINY, n, group=group).bodies for n, group in ((0, 1), (2, 1), (4, 2)))
    assert (one.surface, one.shape) == (two.surface, two.shape)
    assert (one.phase, one.radius) != (two.phase, two.radius)
    assert (one.surface, one.shape) != (other.surface, other.shape)


def test_images(everything: Path) -> None:
    corpus = images.read(everything / "images")
    assert corpus.classes == tuple(sorted(TEXTURES))
    assert Counter(source.split for source in corpus.sources) == {"train": 25, "val": 5}
    assert {Path(source.path).suffix for source in corpus.sources} == {".jpg", ".png"}
    for source in corpus.sources:
        with Image.open(source.path) as image:
            assert image.mode == "RGB"


def test_davis(everything: Path) -> None:
    root = everything / "davis"
    splits = {split: (root / f"ImageSets/2017/{split}.txt").read_text().split() for split in ("train", "val")}
    assert splits == {"val": ["synthetic-0000", "synthetic-0002"], "train": ["synthetic-0001"]}
    for number in range(3):
        scene, name = sequence_scene(TINY, number), f"synthetic-{number:04d}"
        for t in range(6):
            with Image.open(root / f"Annotations/480p/{name}/{t:05d}.png") as mask:
                assert mask.mode == "P"
                assert np.array_equal(np.asarray(mask), scene.label_map(t))
            with Image.open(root / f"JPEGImages/480p/{name}/{t:05d}.jpg") as image:
                assert np.abs(np.asarray(image).astype(int) - scene.frame(t)).mean() < 8
    assert len(contents(root)) == 3 * 6 * 2 + 2


def test_otb(everything: Path) -> None:
    for number in range(3):
        scene, root = sequence_scene(TINY, number), everything / "otb" / f"Synthetic{number:04d}"
        assert sorted(path.name for path in (root / "img").iterdir()) == [f"{t + 1:04d}.jpg" for t in range(6)]
        rows = np.loadtxt(root / "groundtruth_rect.txt", delimiter=",", dtype=int)
        assert rows.shape == (6, 4)
        for t, (x, y, width, height) in enumerate(rows):
            inside = scene.label_map(t) == len(scene.bodies)
            box = np.zeros_like(inside)
            box[y - 1 : y - 1 + height, x - 1 : x - 1 + width] = True
            assert not (inside & ~box).any()
            edges = (inside[y - 1], inside[y + height - 2], inside[:, x - 1], inside[:, x + width - 2])
            assert all(edge.any() for edge in edges)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "corpus"
    options = ["--classes", "2", "1", "--clips", "8", "--size", "32", "--seconds", "0.2", "--processes", "1"]
    assert cli.main(["synth", str(out), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == len(contents(out)) == 8 + 3
    assert told["bytes"] == sum(map(len, contents(out).values()))
    assert len(kinetics.read(out).sources) == 8
    assert cli.main(["synth", str(out), *options]) == 0
    assert "kinetics corpus, 11 files" in capsys.readouterr().out
    assert cli.main(["synth", str(out), *options, "--seed", "1"]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert cli.main(["synth", str(tmp_path / "b"), "--classes", "9", "2"]) == 2
    assert "motions must be 1 to 6, got 9" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def running(group: int) -> list[str]:
    """The processes of a process group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended while we looked
            continue
        if int(number) == group and state not in "ZX":
            found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
def test_killed_run_leaves_no_worker_and_is_finished_by_the_next(tmp_path: Path) -> None:
    options = ["--classes", "2", "1", "--clips", "80", "--size", "32", "--seconds", "0.5", "--processes", "2"]
    command = [sys.executable, "-m", "clipmill.tools.cli", "synth", str(tmp_path), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 60
    while not list(tmp_path.rglob("*.mp4")) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(running(process.pid)) >= 3
    process.kill()
    process.wait()
    while running(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(process.pid)
    assert 1 <= len(list(tmp_path.rglob("*.mp4"))) < 80
    write(tmp_path, "kinetics", Settings(clips=80, motions=2, rhythms=1, size=32, seconds=0.5))
    assert len(kinetics.read(tmp_path).sources) == 80
    assert not list(tmp_path.rglob(".*.part"))
