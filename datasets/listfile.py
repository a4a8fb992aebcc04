"""Text lists with one ``path label`` per row, as mmaction and many others write them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from clipmill.datasets.files import SPLITS, class_number, keys_of, lists_in, read_classes, read_lines, text_of, utf8
from clipmill.datasets.source import Corpus, CorpusError, Source


def read(
    root: Path,
    *,
    lists: str = "*.txt",
    videos: str = "",
    class_list: str = "",
    split: str = "",
    labelled: bool = True,
) -> Corpus:
    """The files that lists name.

    lists: a path or pattern below ``root``. A row is a path and a label, parted at the last blank, so that paths may
    contain blanks. If every label is an integer it is the class number (-1 = none), else labels are class names.
    videos: folder that the paths start from, below ``root``. class_list: text file with one class per row, in label
    order; default: the names of the lists, alphabetically, or the numbers as names. split: of all rows; default: the
    word train, val or test in the list's file name. labelled: False = a row is a path and nothing else.

    Key: the path as listed, without its suffix. Rows whose file is not there, and repeated ones, are in ``missing``.
    Raises CorpusError for a missing list, a malformed row, a file with two labels, and if no file is there.
    """
    root = Path(root)
    names = read_classes(root / class_list) if class_list else ()
    kept: dict[str, tuple[str, str, str]] = {}  # path: (label, split, where)
    missing: list[tuple[str, str]] = []
    rows = 0
    for file in lists_in(root, lists):
        if class_list and file == root / class_list:
            continue
        for number, text in read_lines(file):
            rows += 1
            where = f"{text_of(file)} row {number}"
            path, label = _parse(text, labelled, where)
            path = os.path.normpath(path)
            if path in kept and kept[path][0] != label:
                raise CorpusError(f"{where}: {text_of(path)} has another label in {kept[path][2]}; remove one of them")
            if path in kept:
                missing.append((where, f"the same file as {kept[path][2]}"))
            elif not os.path.lexists(root / videos / path):
                missing.append((where, f"no file {text_of(root / videos / path)}"))
            else:
                kept[path] = label, split or _split_of(file.name), where
    if not kept:
        raise CorpusError(f"{text_of(root / videos)}: none of the {rows} listed files is there; name their folder")
    paths = sorted(kept, key=os.fsencode)
    labels, classes = _number([(kept[path][0], kept[path][2]) for path in paths], names)
    sources = [
        Source(key=key, path=str(root / videos / path), label=label, split=kept[path][1])
        for key, path, label in zip(keys_of(paths), paths, labels, strict=True)
    ]
    return Corpus(sources=tuple(sources), classes=classes, missing=tuple(missing))


def _parse(text: str, labelled: bool, where: str) -> tuple[str, str]:
    if not labelled:
        return text, ""
    hit = re.fullmatch(r"(.*\S)[ \t]+(\S+)\s*", text)
    if hit is None:
        raise CorpusError(f"{where}: {text_of(text)!r} is not `path label`; add the label or read with labelled=False")
    return hit[1], utf8(hit[2])


def _split_of(name: str) -> str:
    words = re.split("[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def _number(labels: Sequence[tuple[str, str]], names: tuple[str, ...]) -> tuple[list[int], tuple[str, ...]]:
    if not any(label for label, _ in labels):
        return [-1] * len(labels), names
    if all(re.fullmatch("-1|[0-9]{1,9}", label) for label, _ in labels):
        numbers = [int(label) for label, _ in labels]
        names = names or tuple(map(str, range(max(numbers) + 1)))
        for number, (_, where) in zip(numbers, labels, strict=True):
            if number >= len(names):
                raise CorpusError(f"{where}: label {number}, but there are {len(names)} classes; correct one of them")
        return numbers, names
    names = names or tuple(sorted({label for label, _ in labels}))
    label_of = {name: number for number, name in enumerate(names)}
    return [class_number(label, label_of, where) for label, where in labels], names
