"""A plain folder of videos and sound, with or without class folders."""

from __future__ import annotations

from pathlib import Path

from clipmill.datasets.files import MEDIA_SUFFIXES, labelled_folder
from clipmill.datasets.source import Corpus


def read(root: Path, *, classes: bool | None = None) -> Corpus:
    """Every media file below ``root``; the first sub-folder is the class.

    classes: True = every file must lie in a class folder, False = there are no classes, default = there are if no
    file lies directly in ``root``. If all files lie in folders named train, val or test, those are the splits and
    the class folders are inside them. Labels count the class names in order of their bytes, over all splits.

    Key: the path below ``root`` without its suffix. Raises CorpusError for a folder without media.
    """
    return labelled_folder(Path(root), MEDIA_SUFFIXES, "videos or sound files", classes)
