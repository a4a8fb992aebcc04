"""GOT-10k folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipmill.datasets import got10k
from clipmill.datasets.source import CorpusError


def sequence(folder: Path, frames: int, cover: str | None = None) -> Path:
    folder.mkdir(parents=True)
    for number in range(1, frames + 1):
        (folder / f"{number:08d}.jpg").touch()
    (folder / got10k.BOXES).write_text("".join(f"{t}.0000,2.0000,30.0000,40.0000\n" for t in range(frames)))
    if cover is not None:
        (folder / got10k.COVER).write_text(cover)
    return folder


def test_listed_sequences(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        sequence(tmp_path / "train" / f"GOT-10k_Train_{number:06d}", number, "8\n" * number)
    (tmp_path / "train" / got10k.LIST).write_text("GOT-10k_Train_000003\nGOT-10k_Train_000001\n")
    for root in (tmp_path, tmp_path / "train"):
        three, one = got10k.read(root)
        assert (three.name, one.name) == ("GOT-10k_Train_000003", "GOT-10k_Train_000001")
        assert [path.name for path in three.frames] == ["00000001.jpg", "00000002.jpg", "00000003.jpg"]
        np.testing.assert_array_equal(three.boxes[:, 0], [0, 1, 2])
        assert three.cover is not None
        assert three.cover.tolist() == [8, 8, 8]


def test_without_list_and_labels(tmp_path: Path) -> None:
    for name in ("b", "a"):
        sequence(tmp_path / name, 2)
    assert [(track.name, track.cover) for track in got10k.read(tmp_path)] == [("a", None), ("b", None)]


def test_an_otb_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "Mine" / "img").mkdir(parents=True)
    (tmp_path / "Mine" / "img" / "0001.jpg").touch()
    (tmp_path / "Mine" / "groundtruth_rect.txt").write_text("1 2 3 4\n")
    (track,) = got10k.read(tmp_path)
    assert (track.name, track.boxes.tolist(), len(track.frames)) == ("Mine", [[1, 2, 3, 4]], 1)


def test_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such folder"):
        got10k.read(tmp_path / "nothing")
    with pytest.raises(CorpusError, match="unpack the corpus"):
        got10k.read(tmp_path)
    folder = sequence(tmp_path / "a", 3, "8\n8\n")
    with pytest.raises(CorpusError, match=r"cover\.label: 2 rows for 3 images"):
        got10k.read(tmp_path)
    (folder / got10k.COVER).write_text("8\n8\nx\n")
    with pytest.raises(CorpusError, match=r"cover\.label: .*from 0 to 8"):
        got10k.read(tmp_path)
    (folder / got10k.COVER).unlink()
    (folder / got10k.BOXES).write_text("1,2,3,4\n")
    with pytest.raises(CorpusError, match=r"groundtruth\.txt: 1 rows for 3 images"):
        got10k.read(tmp_path)
    (tmp_path / got10k.LIST).write_text("nowhere\n")
    with pytest.raises(CorpusError, match="no such folder"):
        got10k.read(tmp_path)
