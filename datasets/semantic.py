"""Pictures with a class for every pixel: PASCAL VOC, Cityscapes and CamVid as they lie on disk.

* VOC (Everingham et al., IJCV 2010): ``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png`` (palette; the extra
  annotations of SBD in ``SegmentationClassAug``), ``ImageSets/Segmentation/SPLIT.txt``. A folder of one's own may have
  this layout too, with its class names in ``classes.txt``, a row each.
* Cityscapes (Cordts et al., CVPR 2016): ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and
  ``gtFine/SPLIT/CITY/*_gtFine_labelIds.png``; the 19 classes that are scored.
* CamVid (Brostow et al., 2009): ``SPLIT/NAME.png`` and ``SPLITannot/NAME.png`` with ids, 11 classes (SegNet's release),
  or ``SPLIT_labels/NAME_L.png`` with colours that ``class_dict.csv`` names.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from clipmill.datasets.davis import files, label_map
from clipmill.datasets.files import read_lines, text_of
from clipmill.datasets.source import CorpusError

Layout = Literal["voc", "cityscapes", "camvid"]
LEFT_OUT = 255  # the id of pixels that count neither for training nor for the score

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture and its mask."""

    name: str
    picture: Path
    mask: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """The pictures of a split.

    classes: names by id. table: (256,) uint8 from the number in a mask file to the id, `LEFT_OUT` for what does not
    count. colours: (n, 3) uint8 colours of masks that are written in colour, in the order of ``table``; None: numbers.
    """

    layout: Layout
    classes: tuple[str, ...]
    items: tuple[Scene, ...]
    table: np.ndarray
    colours: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.items)

    def ids(self, scene: Scene) -> np.ndarray:
        """The mask of a scene, (H, W) uint8 class ids; raises CorpusError for one that is damaged or has other ids."""
        numbers = label_map(scene.mask) if self.colours is None else _numbers(scene.mask, self.colours)
        ids = self.table[numbers]
        wrong = np.unique(ids[(ids >= len(self.classes)) & (ids != LEFT_OUT)])
        if len(wrong):
            raise CorpusError(
                f"{text_of(scene.mask)}: id {wrong[0]} is no class; ids are 0 to {len(self.classes) - 1}, and "
                f"{LEFT_OUT} is left out"
            )
        return ids


def scenes(root: Path, split: str) -> Scenes:
    """The pictures of a split of a corpus folder, in the order of its list or of their names.

    split: name of a list or folder; several of a VOC folder are joined by ``+``, e.g. ``train+aug``. Raises CorpusError
    for anything that is missing; nothing is decoded.
    """
    if (root / "JPEGImages").is_dir():
        return _voc(root, split)
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split)
    if (root / split).is_dir():
        return _camvid(root, split)
    raise CorpusError(
        f"{text_of(root)}: neither JPEGImages (VOC) nor leftImg8bit (Cityscapes) nor {split} (CamVid) is there; "
        "name the folder that holds it"
    )


def _voc(root: Path, split: str) -> Scenes:
    lists = root / "ImageSets" / "Segmentation"
    names: list[str] = []
    for part in split.split("+"):
        path = lists / f"{part}.txt"
        if not path.is_file():
            known = ", ".join(sorted(item.stem for item in lists.glob("*.txt"))) or "none"
            raise CorpusError(f"{text_of(lists)}: no list {part}.txt; it has {known}")
        names += [row.split()[0] for _, row in read_lines(path) if row.strip()]
    pictures = {path.stem: path for path in files(root / "JPEGImages", _PICTURES)}
    folders = [root / "SegmentationClass", root / "SegmentationClassAug"]
    items = []
    for name in dict.fromkeys(names):
        mask = next((path for folder in folders if (path := folder / f"{name}.png").is_file()), None)
        if name not in pictures or mask is None:
            what = "mask" if name in pictures else "picture"
            raise CorpusError(f"{text_of(root)}: no {what} of {text_of(name)}; unpack the corpus again")
        items.append(Scene(name=name, picture=pictures[name], mask=mask))
    own = root / "classes.txt"
    classes = tuple(row.strip() for _, row in read_lines(own) if row.strip()) if own.is_file() else VOC_CLASSES
    return _scenes(root, "voc", classes, items, np.arange(256, dtype=np.uint8))


def _cityscapes(root: Path, split: str) -> Scenes:
    folder = root / "leftImg8bit" / split
    tail = "_leftImg8bit.png"
    items = []
    for picture in sorted(folder.glob(f"*/*{tail}")):
        name = picture.name.removesuffix(tail)
        mask = root / "gtFine" / split / picture.parent.name / f"{name}_gtFine_labelIds.png"
        if not mask.is_file():
            raise CorpusError(f"{text_of(mask)}: no such mask; unpack gtFine beside leftImg8bit")
        items.append(Scene(name=name, picture=picture, mask=mask))
    table = np.full(256, LEFT_OUT, np.uint8)
    table[list(_CITYSCAPES)] = np.arange(len(_CITYSCAPES))
    return _scenes(folder, "cityscapes", tuple(_CITYSCAPES.values()), items, table)


def _camvid(root: Path, split: str) -> Scenes:
    pictures = files(root / split, _PICTURES)
    plain, coloured = root / f"{split}annot", root / f"{split}_labels"
    if plain.is_dir():
        table = np.full(256, LEFT_OUT, np.uint8)
        table[: len(_CAMVID)] = np.arange(len(_CAMVID))
        items = [Scene(name=path.stem, picture=path, mask=plain / f"{path.stem}.png") for path in pictures]
        return _scenes(root, "camvid", _CAMVID, items, table)
    if not coloured.is_dir():
        raise CorpusError(f"{text_of(root)}: neither {split}annot nor {split}_labels is there; unpack the masks")
    rows = _class_dict(root / "class_dict.csv")
    classes = tuple(name for name, _ in rows if name.casefold() != "void")
    table = np.full(256, LEFT_OUT, np.uint8)
    for number, (name, _) in enumerate(rows):
        if name in classes:
            table[number] = classes.index(name)
    items = [Scene(name=path.stem, picture=path, mask=coloured / f"{path.stem}_L.png") for path in pictures]
    colours = np.array([colour for _, colour in rows], np.uint8)
    return _scenes(root, "camvid", classes, items, table, colours)


def _scenes(
    where: Path,
    layout: Layout,
    classes: tuple[str, ...],
    items: Sequence[Scene],
    table: np.ndarray,
    colours: np.ndarray | None = None,
) -> Scenes:
    if not items:
        raise CorpusError(f"{text_of(where)}: no pictures there; name a split of the corpus")
    return Scenes(layout=layout, classes=classes, items=tuple(items), table=table, colours=colours)


def _class_dict(path: Path) -> list[tuple[str, tuple[int, int, int]]]:
    """Rows (name, colour) of ``class_dict.csv``."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                (row["name"], (int(row["r"]), int(row["g"]), int(row["b"]))) for row in csv.DictReader(file, restkey="")
            ]
    except FileNotFoundError as error:
        raise CorpusError(f"{text_of(path)}: no such file; it names the colours of the masks") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(f"{text_of(path)}: needs columns name, r, g, b with numbers ({error!r})") from error
    if not 0 < len(rows) < LEFT_OUT:
        raise CorpusError(f"{text_of(path)}: {len(rows)} colours; a mask can tell 1 to {LEFT_OUT - 1} apart")
    return rows


def _numbers(path: Path, colours: np.ndarray) -> np.ndarray:
    """A mask in colour as row numbers of ``colours``; a colour that is not among them is an error."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"), np.int64)
    except (OSError, SyntaxError, ValueError) as error:
        what = "no such mask" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise CorpusError(f"{text_of(path)}: {what}; every picture needs one") from error
    weights = np.array([1 << 16, 1 << 8, 1])
    codes = colours.astype(np.int64) @ weights
    order = codes.argsort()
    flat = pixels @ weights
    place = np.searchsorted(codes, flat, sorter=order).clip(max=len(codes) - 1)
    numbers = order[place]
    if (strange := codes[numbers] != flat).any():
        colour = pixels[strange][0].tolist()
        raise CorpusError(f"{text_of(path)}: the colour {colour} is not in class_dict.csv; masks must not be scaled")
    return numbers
