"""DAVIS and VIP: layouts made here, broken ones, and the real masks where they are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmill.datasets import davis, vip
from clipmill.datasets.source import CorpusError
from clipmill.datasets.synthetic_media import label_map_bytes


def touch(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def add(root: Path, name: str, frames: int = 4, masks: int | None = None) -> None:
    touch(root / "JPEGImages" / "480p" / name, [f"{t:05d}.jpg" for t in range(frames)])
    count = frames if masks is None else masks
    touch(root / "Annotations" / "480p" / name, [f"{t:05d}.png" for t in range(count)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("goat", "cows", "bear"):
        add(tmp_path, name)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("goat\r\ncows\r\n")
    return tmp_path


def test_sequences_come_in_the_order_of_the_list(root: Path) -> None:
    (root / "JPEGImages" / "480p" / "goat" / ".DS_Store").touch()
    (root / "JPEGImages" / "480p" / "goat" / "notes.txt").touch()
    videos = davis.read(root)
    assert [video.name for video in videos] == ["goat", "cows"]
    assert [path.name for path in videos[0].frames] == ["00000.jpg", "00001.jpg", "00002.jpg", "00003.jpg"]
    assert [path.stem for path in videos[0].masks] == [path.stem for path in videos[0].frames]
    assert [video.name for video in davis.read(root, sequences=["bear"])] == ["bear"]


def test_the_lists_of_2016(root: Path) -> None:
    rows = "".join(f"/JPEGImages/480p/cows/{t:05d}.jpg /Annotations/480p/cows/{t:05d}.png\n" for t in range(4))
    (root / "ImageSets" / "480p").mkdir()
    (root / "ImageSets" / "480p" / "val.txt").write_text(rows)
    assert [video.name for video in davis.read(root, year="2016")] == ["cows"]
    (root / "ImageSets" / "2016").mkdir()
    (root / "ImageSets" / "2016" / "val.txt").write_text("bear\ngoat\n")
    assert [video.name for video in davis.read(root, year="2016")] == ["bear", "goat"]


def test_without_lists_all_sequences_count(tmp_path: Path) -> None:
    add(tmp_path, "b")
    add(tmp_path, "a")
    touch(tmp_path / "Annotations" / "480p" / "c", ["00000.png", "00001.png"])
    assert [video.name for video in davis.read(tmp_path)] == ["a", "b"]
    masks = davis.read(tmp_path, pictures=False)
    assert [video.name for video in masks] == ["a", "b", "c"]
    assert masks[0].frames == ()


def test_masks_of_2016_may_lie_beside_those_of_2017(root: Path) -> None:
    touch(root / "Annotations_2016" / "480p" / "goat", [f"{t:05d}.png" for t in range(4)])
    (video,) = davis.read(root, year="2016", sequences=["goat"])
    assert "Annotations_2016" in video.masks[0].parts
    (video,) = davis.read(root, sequences=["goat"])
    assert "Annotations_2016" not in video.masks[0].parts


def test_a_test_split_has_first_masks_only(root: Path) -> None:
    add(root, "boat", frames=5, masks=1)
    (video,) = davis.read(root, sequences=["boat"])
    assert (len(video.frames), len(video.masks)) == (5, 1)


def unlink(root: Path, *names: str) -> None:
    for name in names:
        (root / name).unlink()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["Annotations/480p/goat/00000.png"], "no mask of the first frame 00000"),
        (["Annotations/480p/goat/00002.png"], "goat: frame 00002 is missing"),
        (["Annotations/480p/goat/00003.png"], "there is no mask of frame 00003"),
        (["JPEGImages/480p/goat/00001.jpg"], "goat: frame 00001 is missing"),
        (["JPEGImages/480p/goat/00003.jpg"], "there is no frame of mask 00003"),
        ([f"JPEGImages/480p/goat/{t:05d}.jpg" for t in range(4)], r"no .jpg or .jpeg or .png files there"),
    ],
)
def test_what_is_missing_is_named(root: Path, gone: list[str], message: str) -> None:
    unlink(root, *gone)
    with pytest.raises(CorpusError, match=message):
        davis.read(root)


def test_folders_and_lists_that_are_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no list test\.txt; it has val"):
        davis.read(root, split="test")
    with pytest.raises(CorpusError, match=r"480p.zebra: no such folder"):
        davis.read(root, sequences=["zebra"])
    with pytest.raises(
        CorpusError, match=r"JPEGImages.1080p: no such folder; give the folder that holds it as the DAVIS"
    ):
        davis.read(root, resolution="1080p")
    (tmp_path / "empty" / "Annotations" / "480p").mkdir(parents=True)
    with pytest.raises(CorpusError, match="no sequences there"):
        davis.read(tmp_path / "empty", pictures=False)


def test_label_maps_keep_their_numbers(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 2], [3, 255, 7]], np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(label_map_bytes(ids))
    np.testing.assert_array_equal(davis.label_map(path), ids)
    np.testing.assert_array_equal(davis.label_map(path, "2016"), ids > 0)
    Image.fromarray(ids).save(path)  # grey
    np.testing.assert_array_equal(davis.label_map(path), ids)


def test_files_that_are_no_label_maps(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(CorpusError, match=r"a\.png: no such mask"):
        davis.label_map(path)
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(CorpusError, match=r"a\.png: a picture of mode RGB, its colours are no object ids"):
        davis.label_map(path)
    whole = label_map_bytes(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8))
    for content in (b"", b"not a png", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"a\.png: damaged"):
            davis.label_map(path)


def test_real_masks(test_data: Path) -> None:
    root = test_data / "data" / "davis_eval"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    videos = davis.read(root, year="2016")
    assert [(video.name, len(video.frames)) for video in videos] == [("blackswan", 50), ("car-shadow", 40)]
    assert np.unique(davis.label_map(videos[0].masks[0], "2016")).tolist() == [0, 1]
    assert len(davis.read(root, year="2016", pictures=False)) == 5


# --- VIP ----------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    for name, count in (("videos7", 3), ("videos12", 4)):
        touch(tmp_path / "Images" / name, [f"{5 * t + 1:012d}.jpg" for t in range(count)])
        touch(tmp_path / "Annotations" / "Category_ids" / name, [f"{5 * t + 1:012d}.png" for t in range(1, count)])
    return tmp_path


def test_only_annotated_frames_are_a_video(parts: Path) -> None:
    videos = vip.read(parts)
    assert [video.name for video in videos] == ["videos12", "videos7"]
    assert [path.stem for path in videos[1].frames] == ["000000000006", "000000000011"]
    assert [path.stem for path in videos[1].masks] == ["000000000006", "000000000011"]
    (parts / "lists").mkdir()
    (parts / "lists" / "val_videos.txt").write_text("/data/VIP_Fine/Images/videos7/\n")
    assert [video.name for video in vip.read(parts)] == ["videos7"]
    assert [video.name for video in vip.read(parts, videos=["videos12"])] == ["videos12"]
    assert len(vip.CLASSES) == 20


def test_parts_that_are_missing_are_named(parts: Path, tmp_path: Path) -> None:
    unlink(parts, "Images/videos7/000000000011.jpg")
    with pytest.raises(CorpusError, match="no frame of mask 000000000011"):
        vip.read(parts)
    with pytest.raises(CorpusError, match=r"Category_ids: no such folder; give the folder that holds it as the VIP"):
        vip.read(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"videos99: no such folder"):
        vip.read(parts, videos=["videos99"])
