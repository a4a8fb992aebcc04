"""HMDB51 (Kuehne et al., ICCV 2011): class folders of AVI files and the official 70/30 splits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from clipmill.datasets.files import class_number, read_classes, read_lines, stem_of, text_of, utf8
from clipmill.datasets.source import Corpus, CorpusError
from clipmill.datasets.splits import Clip, add, corpus_of, first_folder

PARTS = {"0": "unused", "1": "train", "2": "test"}


def read(root: Path, *, split: int = 1, lists: str = "", videos: str = "", class_list: str = "") -> Corpus:
    """The clips of the official lists whose files are there; classes in alphabetical order.

    split: 1, 2 or 3, which decides train and test; clips that it leaves out have the split ``unused``. Each source's
    ``extra["splits"]`` has all splits that are there. lists: folder below ``root`` with
    ``<class>_test_split<1-3>.txt`` (rows ``<file>.avi 0|1|2``), default ``testTrainMulti_7030_splits`` or ``root``.
    Lists of all classes in one file are read too (see `parse_flat`); then the classes are those of the folders, or of
    class_list, a text file with one per row. videos: folder with the class folders, default ``hmdb51``,
    ``hmdb51_org``, ``videos`` or ``root``.

    Key: ``<class>/<file>`` without suffix. Listed clips without a file are in ``missing``. Raises CorpusError for
    missing, malformed or contradicting lists, and if no clip is there.
    """
    root = Path(root)
    folder = root / lists if lists else first_folder(root, ("testTrainMulti_7030_splits", "splits"), "*split*.txt")
    place = root / videos if videos else first_folder(root, ("hmdb51", "hmdb51_org", "videos"), "*")
    clips, classes = parse(folder)
    flat = not clips
    if flat:
        clips = parse_flat(folder)
    if not any(split in clip.splits for clip in clips):
        raise CorpusError(f"{text_of(folder)}: no lists of split {split}; name the folder with the official lists")
    corpus = corpus_of(clips, place, classes, split)
    return _by_folder(corpus, read_classes(root / class_list) if class_list else ()) if flat else corpus


def _by_folder(corpus: Corpus, classes: tuple[str, ...]) -> Corpus:
    """Take class and key from the class folder; the labels of such lists count in an order of their own."""
    folders = [utf8(Path(source.path).parent.name) for source in corpus.sources]
    classes = classes or tuple(sorted(set(folders)))
    label_of = {name: number for number, name in enumerate(classes)}
    listed: dict[int, str] = {}
    sources = []
    for source, name in zip(corpus.sources, folders, strict=True):
        if listed.setdefault(source.label, name) != name:
            raise CorpusError(
                f"{text_of(source.path)}: listed in class {source.label} like files of "
                f"{text_of(listed[source.label])}; correct the lists or move the file"
            )
        label = class_number(name, label_of, text_of(source.path))
        sources.append(replace(source, key=f"{name}/{source.key}", label=label))
    sources.sort(key=lambda source: source.key.encode())
    return replace(corpus, sources=tuple(sources), classes=classes)


def parse(folder: Path) -> tuple[list[Clip], tuple[str, ...]]:
    """All clips of the official lists in a folder, and the class names by label."""
    files = {path: re.fullmatch(r"(.+)_test_split([1-9])\.txt", path.name) for path in sorted(folder.glob("*.txt"))}
    found = {path: (hit[1], int(hit[2])) for path, hit in files.items() if hit is not None}
    classes = tuple(sorted({name for name, _ in found.values()}))
    clips: dict[str, Clip] = {}
    for path, (name, split) in found.items():
        for number, text in read_lines(path):
            where = f"{text_of(path)} row {number}"
            file, _, flag = text.rstrip().rpartition(" ")
            if not file.strip() or flag not in PARTS:
                raise CorpusError(f"{where}: {text_of(text)!r} is not `<file>.avi 0|1|2`; correct it")
            add(clips, f"{name}/{stem_of(file.strip())}", classes.index(name), split, PARTS[flag], where)
    return list(clips.values()), tuple(map(utf8, classes))


def parse_flat(folder: Path) -> list[Clip]:
    """All clips of lists of all classes: ``trainlist01.txt``, ``..._train_split_1.txt``, and so for test or val.

    A row is ``<folder>/<clip> <frames> <label from 0>`` or ``<clip> <label from 1>``; keys are the bare clips.
    """
    clips: dict[str, Clip] = {}
    for path in sorted(folder.glob("*.txt")):
        hit = re.search(r"(train|test|val)(?:list|_split_)0*([1-9])\.txt$", path.name)
        if hit is None:
            continue
        for number, text in read_lines(path):
            where = f"{text_of(path)} row {number}"
            words = text.split()
            if len(words) not in (2, 3) or not all(word.isdecimal() for word in words[1:]):
                raise CorpusError(f"{where}: {text_of(text)!r} is not `<clip> [<frames>] <label>`; correct it")
            label = int(words[-1]) - (len(words) == 2)
            part = "train" if hit[1] == "train" else "test"
            add(clips, stem_of(words[0].rpartition("/")[2]), label, int(hit[2]), part, where)
    return list(clips.values())
