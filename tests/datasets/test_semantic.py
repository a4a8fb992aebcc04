"""Pictures with a class per pixel: the three layouts made here, and broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipmill.datasets.semantic import LEFT_OUT, VOC_CLASSES, scenes
from clipmill.datasets.source import CorpusError
from clipmill.datasets.synthetic_media import label_map_bytes


def put(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.ndim == 2:
        path.write_bytes(label_map_bytes(array.astype(np.uint8)))
    else:
        Image.fromarray(array.astype(np.uint8)).save(path)


PICTURE = np.zeros((4, 6, 3))


def row(*numbers: int) -> np.ndarray:
    return np.array([numbers])


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for name in ("b", "a", "c"):
        put(tmp_path / "JPEGImages" / f"{name}.jpg", PICTURE)
    put(tmp_path / "SegmentationClass" / "a.png", row(0, 20, 255))
    put(tmp_path / "SegmentationClass" / "b.png", row(1, 2, 3))
    put(tmp_path / "SegmentationClassAug" / "c.png", row(4, 5, 6))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\n")
    (lists / "aug.txt").write_text("c\na\n")
    return tmp_path


def test_voc(voc: Path) -> None:
    found = scenes(voc, "train")
    assert (found.layout, found.classes) == ("voc", VOC_CLASSES)
    assert [item.name for item in found.items] == ["b", "a"]
    assert found.ids(found.items[1]).tolist() == [[0, 20, 255]]
    more = scenes(voc, "train+aug")
    assert [item.name for item in more.items] == ["b", "a", "c"]
    assert more.ids(more.items[2]).tolist() == [[4, 5, 6]]


def test_a_folder_of_ones_own_names_its_classes(voc: Path) -> None:
    (voc / "classes.txt").write_text("sky\nsea\n\n")
    found = scenes(voc, "train")
    assert found.classes == ("sky", "sea")
    with pytest.raises(CorpusError, match="id 2 is no class; ids are 0 to 1, and 255 is left out"):
        found.ids(found.items[0])


def test_what_is_missing_is_named(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no list val\.txt; it has aug, train"):
        scenes(voc, "val")
    (voc / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(CorpusError, match="no mask of b"):
        scenes(voc, "train")
    (voc / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(CorpusError, match="no picture of c"):
        scenes(voc, "aug")
    with pytest.raises(CorpusError, match=r"neither JPEGImages \(VOC\)"):
        scenes(tmp_path / "SegmentationClass", "train")


def test_cityscapes(tmp_path: Path) -> None:
    for city, name in (("ulm", "ulm_0"), ("aachen", "aachen_1")):
        put(tmp_path / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png", PICTURE)
        put(tmp_path / "gtFine" / "val" / city / f"{name}_gtFine_labelIds.png", row(0, 7, 8, 33, 26, 29))
    found = scenes(tmp_path, "val")
    assert [item.name for item in found.items] == ["aachen_1", "ulm_0"]
    assert len(found.classes) == 19
    ids = found.ids(found.items[0])[0]
    assert ids.tolist() == [LEFT_OUT, 0, 1, 18, 13, LEFT_OUT]
    assert [found.classes[number] for number in ids[1:5]] == ["road", "sidewalk", "bicycle", "car"]
    with pytest.raises(CorpusError, match="no pictures there"):
        scenes(tmp_path, "test")
    next((tmp_path / "gtFine").glob("*/ulm/*")).unlink()
    with pytest.raises(CorpusError, match="unpack gtFine"):
        scenes(tmp_path, "val")


def test_camvid_with_ids(tmp_path: Path) -> None:
    put(tmp_path / "train" / "x.png", PICTURE)
    put(tmp_path / "trainannot" / "x.png", row(0, 10, 11, 30))
    found = scenes(tmp_path, "train")
    assert len(found.classes) == 11
    assert found.ids(found.items[0]).tolist() == [[0, 10, LEFT_OUT, LEFT_OUT]]


def test_camvid_in_colour(tmp_path: Path) -> None:
    put(tmp_path / "val" / "x.png", PICTURE)
    colours = [[0, 128, 192], [0, 0, 0], [64, 0, 128]]
    put(tmp_path / "val_labels" / "x_L.png", np.array([colours]))
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nAnimal,64,0,128\nVoid,0,0,0\nBicyclist,0,128,192\n")
    found = scenes(tmp_path, "val")
    assert found.classes == ("Animal", "Bicyclist")
    assert found.ids(found.items[0]).tolist() == [[1, LEFT_OUT, 0]]
    put(tmp_path / "val_labels" / "x_L.png", np.array([[[1, 2, 3]]]))
    with pytest.raises(CorpusError, match=r"the colour \[1, 2, 3\] is not in class_dict.csv"):
        found.ids(found.items[0])
    (tmp_path / "class_dict.csv").write_text("name,r\nAnimal,64\n")
    with pytest.raises(CorpusError, match="needs columns name, r, g, b"):
        scenes(tmp_path, "val")
