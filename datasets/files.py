"""What the readers share: finding media files, naming them, reading lists."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from clipmill.datasets.source import Corpus, CorpusError, Source

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".m2ts", ".mts",
    ".flv", ".wmv", ".asf", ".ogv", ".3gp", ".3g2", ".mxf", ".gif", ".y4m", ".rm", ".rmvb", ".divx", ".h264",
    ".hevc", ".ivf",
))  # fmt: skip
AUDIO_SUFFIXES = frozenset((
    ".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aiff", ".aif", ".au", ".amr",
    ".ac3",
))  # fmt: skip
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
))  # fmt: skip
MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

_UNSAFE = re.compile("[\\\\\udc80-\udcff]")


def find(root: Path, suffixes: frozenset[str]) -> list[str]:
    """Paths below ``root``, relative to it, of everything whose name ends in one of the suffixes (in any case).

    Nothing is opened: a broken link or a pipe is listed like a file, and so is a folder with such a name that holds
    no media. Hidden names (first character ``.``) are left out. Linked folders are entered once, so loops end. The
    order is that of the names' bytes, whatever the file system says.
    """
    if not root.is_dir():
        what = "is not a folder" if os.path.lexists(root) else "no such folder"
        raise CorpusError(f"{text_of(root)}: {what}; name the folder that holds the corpus")
    links: list[str] = []
    whole = root.resolve()
    seen = {_identity(folder) for folder in (whole, *whole.parents)}  # a link to any of them is a loop
    found = _below(root, "", suffixes, links, seen)
    for link in links:  # real folders come first, so that a link never hides the place where a file really is
        if _identity(root / link) not in seen:
            seen.add(_identity(root / link))
            found += _below(root, link, suffixes, links, seen)
    return sorted(found, key=os.fsencode)


def _below(root: Path, folder: str, suffixes: frozenset[str], links: list[str], seen: set) -> list[str]:
    found: list[str] = []
    stack = [folder]
    while stack:
        folder = stack.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise CorpusError(f"{text_of(root / folder)}: {error.strerror}; make the folder readable") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            listed = suffix_of(path) in suffixes
            if entry.is_dir(follow_symlinks=False):
                if _identity(entry) in seen:
                    continue
                seen.add(_identity(entry))
                if listed:
                    found += _below(root, path, suffixes, links, seen) or [path]
                else:
                    stack.append(path)
            elif entry.is_symlink() and os.path.isdir(root / path):  # False for a link to itself
                links.append(path)
            elif listed:
                found.append(path)
    return found


def _identity(entry: Path | os.DirEntry[str]) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def suffix_of(path: str) -> str:
    """The suffix in lower case, with its dot; a leading dash or dot of the name is no suffix."""
    return os.path.splitext(path)[1].lower()


def stem_of(path: str) -> str:
    """A path without its suffix, if that is one of a known kind of media."""
    return os.path.splitext(path)[0] if suffix_of(path) in MEDIA_SUFFIXES | IMAGE_SUFFIXES else path


def key_of(path: str) -> str:
    r"""A path's name in the corpus: UTF-8, with bytes that are none as ``\xNN`` and a backslash doubled.

    Two paths never get the same key. Letters are not normalised: two spellings of one accent stay two names.

    >>> print(key_of(os.fsdecode(b"a\xff/b")))
    a\xff/b
    """
    return _UNSAFE.sub(lambda hit: "\\\\" if hit[0] == "\\" else f"\\x{ord(hit[0]) & 0xFF:02x}", path)


def keys_of(paths: Sequence[str]) -> list[str]:
    """Unique keys: without the suffix, and with it for names that differ in nothing else."""
    full = [key_of(path) for path in paths]
    short = [key_of(stem_of(path)) for path in paths]
    whole = [False] * len(paths)
    while True:  # a name kept whole may be another one's stem; at the latest with all names whole this ends
        keys = [a if keep else b for a, b, keep in zip(full, short, whole, strict=True)]
        count = Counter(keys)
        clash = [count[key] > 1 for key in keys]
        if not any(clash):
            return keys
        whole = [keep or bad for keep, bad in zip(whole, clash, strict=True)]


def utf8(text: str) -> str:
    r"""Text with bytes that are no UTF-8 as ``\xNN``; other than with `key_of`, two texts may become one."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def text_of(path: object) -> str:
    """A path for a message: printable on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def labelled_folder(root: Path, suffixes: frozenset[str], what: str, classes: bool | None = None) -> Corpus:
    """A folder of files whose first sub-folder is their class, below split folders (train, val, test) if there are.

    classes: True = every file must be in a class folder, False = there are none, None = there are if no file lies
    outside a sub-folder. what: the files' name in messages.
    """
    paths = find(root, suffixes)
    if not paths:
        known = " ".join(sorted(suffixes))
        raise CorpusError(f"{text_of(root)}: no {what} in this folder or below; known suffixes are {known}")
    parts = [path.split("/") for path in paths]
    splits = [""] * len(parts)
    if all(len(part) > 1 and part[0].lower() in SPLITS for part in parts):
        splits = [SPLITS[part[0].lower()] for part in parts]
        parts = [part[1:] for part in parts]
    outside = next((path for path, part in zip(paths, parts, strict=True) if len(part) == 1), None)
    if classes and outside is not None:
        raise CorpusError(
            f"{text_of(root / outside)}: lies in no class folder; move it into one or read the folder without classes"
        )
    names: list[str] = []
    if classes or (classes is None and outside is None):
        names = sorted({part[0] for part in parts}, key=os.fsencode)
    label_of = {name: number for number, name in enumerate(names)}
    sources = [
        Source(key=key, path=str(root / path), label=label_of.get(part[0], -1), split=split)
        for key, path, part, split in zip(keys_of(paths), paths, parts, splits, strict=True)
    ]
    return Corpus(sources=tuple(sources), classes=tuple(key_of(name) for name in names))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(row number from 1, text) of the rows of a list that are not blank; bytes that are no UTF-8 are kept."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise CorpusError(f"{text_of(path)}: {error.strerror}; name the list that goes with the corpus") from error
    rows = enumerate(re.split("\r\n|\n|\r", text), 1)
    return [(number, row) for number, row in rows if row.strip()]


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Class names by label number from a text file with one name per row."""
    names = [utf8(row.strip()) for _, row in read_lines(Path(path))]
    double = next((name for name, count in Counter(names).items() if count > 1), None)
    if not names or double is not None:
        problem = "no class names" if double is None else f"class {double!r} twice"
        raise CorpusError(f"{text_of(path)}: {problem}; write each name once, one per row, in label order")
    return tuple(names)


def class_number(name: str, label_of: dict[str, int], where: str) -> int:
    """The label of a class name; an unknown one raises CorpusError with what is near it."""
    if name in label_of:
        return label_of[name]
    near = get_close_matches(name, label_of, n=3)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "add it to the list of classes"
    raise CorpusError(f"{where}: unknown class {text_of(name)!r}; {remedy}")


def lists_in(root: Path, pattern: str) -> list[Path]:
    """The list files a pattern names: a path, or a glob below ``root``, in order of their names."""
    path = root / pattern
    if path.is_file():
        return [path]
    relative = os.path.relpath(pattern, root) if os.path.isabs(pattern) else pattern
    paths = sorted(root.glob(relative), key=os.fsencode) if root.is_dir() else []
    if not paths:
        raise CorpusError(f"{text_of(path)}: no such list; name the list file, from the corpus folder {text_of(root)}")
    return paths


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """(row number from 1, fields) of the rows of a CSV that are neither blank nor comments (``#``)."""
    parsed = []
    for number, text in read_lines(path):
        if text.startswith("#"):
            continue
        try:
            fields = next(csv.reader([text], skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise CorpusError(f"{text_of(path)} row {number}: {error}; write it as CSV, one record per row") from error
        parsed.append((number, [utf8(field.strip()) for field in fields]))
    return parsed


def by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    """Relative paths by file name without folder and suffix."""
    table: dict[str, list[str]] = {}
    for path in paths:
        table.setdefault(stem_of(path.rpartition("/")[2]), []).append(path)
    return table


def best_match(paths: Sequence[str], folders: Iterable[str]) -> str:
    """The one of several paths with most of the wanted folders (case and underscores do not count), a video at best."""
    wanted = {plain(folder) for folder in folders if folder}

    def rank(path: str) -> tuple[int, bool]:
        return len(wanted & {plain(part) for part in path.split("/")[:-1]}), suffix_of(path) in VIDEO_SUFFIXES

    return max(paths, key=rank)


def plain(name: str) -> str:
    """A class name without case and with blanks for underscores, for comparing."""
    return name.casefold().replace("_", " ")
