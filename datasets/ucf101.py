"""UCF101 (Soomro, Zamir, Shah 2012): class folders of AVI files and the official train/test lists."""

from __future__ import annotations

import re
from pathlib import Path

from clipmill.datasets.files import class_number, read_lines, stem_of, text_of
from clipmill.datasets.source import Corpus, CorpusError
from clipmill.datasets.splits import Clip, add, corpus_of, first_folder


def read(root: Path, *, split: int = 1, lists: str = "", videos: str = "") -> Corpus:
    """The clips of the official lists whose files are there, with the classes of ``classInd.txt``.

    split: 1, 2 or 3, which decides train and test; each source's ``extra["splits"]`` has all that are there. lists:
    folder with ``classInd.txt``, ``trainlist01.txt``, ``testlist01.txt``, ... below ``root``; default
    ``ucfTrainTestlist`` or ``root``. videos: folder with the class folders; default ``UCF-101`` or ``root``. Names
    are compared without case (folder and list say HandstandPushups, the files HandStandPushups) and without suffix.

    Key: ``<Class>/v_<Class>_gXX_cYY`` as listed. Listed clips without a file are in ``missing``. Raises CorpusError
    for missing, malformed or contradicting lists, and if no clip is there.
    """
    root = Path(root)
    folder = root / lists if lists else first_folder(root, ("ucfTrainTestlist",), "classInd.txt")
    clips, classes = parse(folder)
    if not any(split in clip.splits for clip in clips):
        raise CorpusError(
            f"{text_of(folder)}: no trainlist{split:02d}.txt and testlist{split:02d}.txt; choose a split that is there"
        )
    place = root / videos if videos else first_folder(root, ("UCF-101", "UCF101", "videos"), "*")
    return corpus_of(clips, place, classes, split)


def parse(folder: Path) -> tuple[list[Clip], tuple[str, ...]]:
    """All clips of the lists in a folder, and the class names by label (from 0)."""
    classes = parse_classes(folder / "classInd.txt")
    label_of = {name: number for number, name in enumerate(classes)}
    clips: dict[str, Clip] = {}
    for path in sorted(folder.glob("*list*.txt")):
        hit = re.fullmatch(r"(train|test)list0*([1-9])\.txt", path.name)
        if hit is None:
            continue
        for number, text in read_lines(path):
            where = f"{text_of(path)} row {number}"
            name, _, given = text.strip().partition(" ")
            if name.count("/") != 1:
                raise CorpusError(
                    f"{where}: {text_of(text)!r} is not `Class/file.avi` or `Class/file.avi label`; correct it"
                )
            label = class_number(name.partition("/")[0], label_of, where)
            if given and given.strip() != str(label + 1):
                raise CorpusError(
                    f"{where}: label {given!r}, but classInd.txt says {label + 1}; correct one of the lists"
                )
            add(clips, stem_of(name), label, int(hit[2]), hit[1], where)
    return list(clips.values()), classes


def parse_classes(path: Path) -> tuple[str, ...]:
    """Class names of a ``classInd.txt``, whose rows are ``<number from 1> <name>``."""
    names = []
    for number, text in read_lines(path):
        place, _, name = text.strip().partition(" ")
        if place != str(len(names) + 1) or not name:
            raise CorpusError(
                f"{text_of(path)} row {number}: {text_of(text)!r} is not `{len(names) + 1} <class>`; correct it"
            )
        names.append(name.strip())
    return tuple(names)
