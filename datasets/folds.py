"""A plain folder in folds: ``<fold>/<class>/<file>``, for cross-validation."""

from __future__ import annotations

from pathlib import Path

from clipmill.datasets.files import MEDIA_SUFFIXES, find, key_of, keys_of, text_of
from clipmill.datasets.source import Corpus, CorpusError, Source


def read(root: Path) -> Corpus:
    """Every media file below ``root``: the first folder is its fold (the record's split), the second its class.

    Labels count the class names in order of their bytes, over all folds. Key: the path without its suffix. Raises
    CorpusError for a file that lies higher, and for fewer than two folds.
    """
    root = Path(root)
    paths = find(root, MEDIA_SUFFIXES)
    parts = [path.split("/") for path in paths]
    flat = next((path for path, part in zip(paths, parts, strict=True) if len(part) < 3), None)
    if flat is not None:
        raise CorpusError(f"{text_of(root / flat)}: not in <fold>/<class>/; move it there or use the reader folder")
    folds = {part[0] for part in parts}
    if len(folds) < 2:
        raise CorpusError(f"{text_of(root)}: {len(folds)} folds; need at least two folders <fold>/<class>/")
    classes = sorted({part[1] for part in parts}, key=lambda name: name.encode("utf-8", "surrogateescape"))
    number = {name: place for place, name in enumerate(classes)}
    sources = [
        Source(key=key, path=str(root / path), label=number[part[1]], split=key_of(part[0]))
        for key, path, part in zip(keys_of(paths), paths, parts, strict=True)
    ]
    return Corpus(sources=tuple(sources), classes=tuple(key_of(name) for name in classes))
