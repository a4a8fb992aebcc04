"""OTB folders and box lists: quirks of sequences, spellings, and what is wrong with broken ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clipmill.datasets.otb import BOXES, read, read_boxes, suite_names
from clipmill.datasets.otb_sequences import ATTRIBUTES, ENTRIES, FRAMES, ONLY_SECOND, SHARED, canonical, spelling
from clipmill.datasets.source import CorpusError


def sequence(folder: Path, numbers: Sequence[int], boxes: Sequence[Sequence[float]], name: str = BOXES) -> Path:
    """A sequence folder with empty image files of these numbers."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / "img" / f"{number:04d}.jpg").touch()
    (folder / name).write_text("".join(",".join(map(str, box)) + "\n" for box in boxes))
    return folder


def row(number: int) -> list[int]:
    """A box that says which image it belongs to."""
    return [number, number + 1, 10, 20]


def numbers_of(video) -> list[int]:
    return [int(path.stem) for path in video.frames]


# --- the table ----------------------------------------------------------------------------------------------


def test_the_sets() -> None:
    assert [len(suite_names(suite)) for suite in ("otb2013", "otb50", "otb100", "folder")] == [51, 50, 100, 0]
    assert set(suite_names("otb2013")) | set(suite_names("otb50")) < set(suite_names("otb100"))
    folders = {SHARED.get(name, ONLY_SECOND.get(name, name)) for name in ENTRIES}
    assert len(folders) == 98
    assert {*FRAMES, *SHARED, *ONLY_SECOND} <= set(ENTRIES)
    used = [attribute for entry in ENTRIES.values() for attribute in entry.attributes]
    assert set(used) == set(ATTRIBUTES)
    assert all(len(set(entry.attributes)) == len(entry.attributes) > 0 for entry in ENTRIES.values())


@pytest.mark.parametrize("name", ["Jogging-2", "Jogging.2", "jogging_2", "JOGGING-2"])
def test_spellings(name: str) -> None:
    assert canonical(name) == "Jogging-2"


def test_spellings_stay_apart() -> None:
    assert len({spelling(name) for name in ENTRIES}) == 100
    assert canonical("Jogging") == "Jogging"  # of which target, nobody can know


# --- one sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1,2,3,4\n5,6,7,8\n", "1\t2\t3\t4\r\n5\t6\t7\t8", "1 2 3 4\n\n 5  6 7 8 \n"])
def test_separators(tmp_path: Path, text: str) -> None:
    (tmp_path / BOXES).write_bytes(text.encode())
    np.testing.assert_array_equal(read_boxes(tmp_path / BOXES), [[1, 2, 3, 4], [5, 6, 7, 8]])


def test_missing_numbers_are_kept_and_others_are_errors(tmp_path: Path) -> None:
    path = tmp_path / BOXES
    path.write_text("1,2,3,4\nNaN,NaN,NaN,NaN\n0,0,0,0\n")
    boxes = read_boxes(path)
    assert np.isnan(boxes[1]).all()
    assert not boxes[2].any()
    for text, problem in (("1,2,3,4\n1,2,3\n", "row 2"), ("1,2,3,x\n", "row 1"), ("1,2,3,4,5\n", "not four numbers")):
        path.write_text(text)
        with pytest.raises(CorpusError, match=problem):
            read_boxes(path)


def test_two_targets_and_one_that_is_empty(tmp_path: Path) -> None:
    for target in (1, 2):
        sequence(tmp_path / "Jogging", (1, 2), [[target, 1, 5, 5]] * 2, f"groundtruth_rect.{target}.txt")
    sequence(tmp_path / "Human4", (1, 2), [], "groundtruth_rect.1.txt")
    sequence(tmp_path / "Human4", (1, 2), [row(1), row(2)], "groundtruth_rect.2.txt")
    sequence(tmp_path / "Mine", (1,), [row(1)], "groundtruth_rect.3.txt")
    videos = read(tmp_path, suite="folder")
    assert [video.name for video in videos] == ["Human4-2", "Jogging-1", "Jogging-2", "Mine-3"]
    assert [video.boxes[0, 0] for video in videos] == [1, 1, 2, 1]
    assert videos[1].frames == videos[2].frames
    assert videos[1].attributes == ("OCC", "DEF", "OPR")
    again = read(tmp_path, sequences=("jogging.2", "Human4", "mine_3".replace("_", "-")))
    assert [video.name for video in again] == ["Jogging-2", "Human4-2", "mine-3"]


def test_a_folder_per_target(tmp_path: Path) -> None:
    for target in (1, 2):
        for box_file in (1, 2):
            boxes = [[box_file, 1, 5, 5]]
            sequence(tmp_path / f"Skating2-{target}", (1,), boxes, f"groundtruth_rect.{box_file}.txt")
    videos = read(tmp_path, suite="folder")
    assert [(video.name, video.boxes[0, 0]) for video in videos] == [("Skating2-1", 1), ("Skating2-2", 2)]


@pytest.mark.parametrize(
    ("name", "on_disk", "used"),
    [
        ("David", (1, 770), (300, 770)),
        ("David", (300, 770), (300, 770)),
        ("Football1", (1, 81), (1, 74)),
        ("Diving", (1, 231), (1, 215)),
        ("BlurCar1", (247, 988), (247, 988)),
    ],
)
def test_frames_that_count(tmp_path: Path, name: str, on_disk: tuple[int, int], used: tuple[int, int]) -> None:
    wanted = list(range(used[0], used[1] + 1))
    sequence(tmp_path / name, range(on_disk[0], on_disk[1] + 1), [row(number) for number in wanted])
    (video,) = read(tmp_path, suite="folder")
    assert numbers_of(video) == wanted
    np.testing.assert_array_equal(video.boxes[:, 0], wanted)
    assert len(video.before) == 0


@pytest.mark.parametrize("first", [1, 6])
def test_tiger1_with_and_without_boxes_of_its_first_images(tmp_path: Path, first: int) -> None:
    sequence(tmp_path / "Tiger1", range(1, 355), [row(number) for number in range(first, 355)])
    for pictures in (True, False):
        (video,) = read(tmp_path, suite="folder", pictures=pictures)
        np.testing.assert_array_equal(video.boxes[:, 0], np.arange(6, 355))
        np.testing.assert_array_equal(video.before[:, 0], np.arange(first, 6))
        assert numbers_of(video) == (list(range(6, 355)) if pictures else [])


def test_five_digits_and_other_attributes(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "Board", (), [row(1), row(2)])
    for number in (1, 2):
        (folder / "img" / f"{number:05d}.jpg").touch()
    mine = sequence(tmp_path / "Mine", (1,), [row(1)])
    (mine / "attrs.txt").write_text("IV, OCC\n")
    board, other = read(tmp_path, suite="folder")
    assert numbers_of(board) == [1, 2]
    assert other.attributes == ("IV", "OCC")


# --- what is wrong ------------------------------------------------------------------------------------------


def test_counts_that_do_not_fit(tmp_path: Path) -> None:
    sequence(tmp_path / "a", (1, 2, 3), [row(1), row(2)])
    with pytest.raises(CorpusError, match=r"groundtruth_rect\.txt: 2 boxes for 3 images"):
        read(tmp_path, sequences=("a",))
    sequence(tmp_path / "David", range(1, 771), [row(number) for number in range(300)])
    with pytest.raises(CorpusError, match=r"300 boxes for 471 images \(300 to 770\)"):
        read(tmp_path, sequences=("David",))


def test_missing_pieces(tmp_path: Path) -> None:
    sequence(tmp_path / "gap", (1, 2, 4), [row(1)] * 3)
    with pytest.raises(CorpusError, match="image 3 is missing"):
        read(tmp_path, sequences=("gap",))
    sequence(tmp_path / "Freeman4", range(1, 200), [row(1)] * 199)
    with pytest.raises(CorpusError, match="Freeman4 is images 1 to 283"):
        read(tmp_path, sequences=("Freeman4",))
    with pytest.raises(CorpusError, match=r"98 of 100 sequences are missing|99 of 100 sequences are missing"):
        read(tmp_path)
    sequence(tmp_path / "Jogging", (1,), [row(1)], "groundtruth_rect.1.txt")
    with pytest.raises(CorpusError, match=r"groundtruth_rect\.2\.txt: no such file"):
        read(tmp_path, sequences=("Jogging-2",))
    with pytest.raises(CorpusError, match="no such folder"):
        read(tmp_path / "nothing", suite="folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no sequence there"):
        read(tmp_path / "empty", suite="folder")
    odd = sequence(tmp_path / "odd", (1,), [row(1)])
    (odd / "img" / "cover.jpg").touch()
    with pytest.raises(CorpusError, match=r"cover\.jpg: its name is no image number"):
        read(tmp_path, sequences=("odd",))


# --- lists of boxes -----------------------------------------------------------------------------------------


def test_boxes_from_json_lists(tmp_path: Path) -> None:
    boxes = [[1, 2, 3, 4], [2, 2, 3, 4]]
    content = {"jogging_1": {"gt_rect": boxes, "init_rect": boxes[0]}, "carDark": {"gt_rect": boxes[:1]}}
    (tmp_path / "OTB2015.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    (tmp_path / "scores.json").write_text("[1]")  # somebody's own file
    videos = read(tmp_path, suite="folder", pictures=False)
    assert [video.name for video in videos] == ["Jogging-1", "CarDark"]
    np.testing.assert_array_equal(videos[0].boxes, boxes)
    assert videos[1].attributes == ("IV", "BC")
    (same,) = read(tmp_path / "OTB2015.json.gz", sequences=("Jogging.1",), pictures=False)
    np.testing.assert_array_equal(same.boxes, boxes)
    with pytest.raises(CorpusError, match=r"1 of 1 sequences are missing \(Jogging-1\)"):
        read(tmp_path, sequences=("Jogging-1",))  # images are needed
    sequence(tmp_path / "CarDark", (1,), [[9, 9, 9, 9]])  # a sequence's own file goes before the list
    found = {video.name: video.boxes[0, 0] for video in read(tmp_path, suite="folder", pictures=False)}
    assert found == {"CarDark": 9, "Jogging-1": 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {}}', '{"a": {"gt_rect": [[1, 2]]}}'])
def test_broken_json_lists(tmp_path: Path, text: str) -> None:
    (tmp_path / "OTB100.json").write_text(text)
    with pytest.raises(CorpusError, match=r"OTB100\.json: no list of boxes"):
        read(tmp_path, suite="folder", pictures=False)


# --- the real thing -----------------------------------------------------------------------------------------


def test_real_sequences(test_data: Path) -> None:
    root = test_data / "data" / "otb"
    videos = read(root, suite="folder")
    assert [video.name for video in videos] == ["Crossing", "Jogging-1", "Jogging-2"]
    assert [len(video.frames) for video in videos] == [120, 307, 307]
    listed = {video.name: video for video in read(root / "OTB2015.json.gz", pictures=False)}
    assert len(listed) == 100
    assert sum(len(video.boxes) for video in listed.values()) == 59035
    for video in videos:
        np.testing.assert_array_equal(video.boxes, listed[video.name].boxes)
    for name, (first, last) in FRAMES.items():
        assert len(listed[name].boxes) == last - first + 1, name
    for file, suite in (("cvpr13.txt", "otb2013"), ("tb_50.txt", "otb50"), ("tb_100.txt", "otb100")):
        rows = [line.split("\t") for line in (root / file).read_text().splitlines()]
        assert sorted(name for name, *_ in rows) == sorted(suite_names(suite))
        for name, attributes in rows:
            assert ENTRIES[name].attributes == tuple(attributes.replace(",", " ").split()), name
