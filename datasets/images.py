"""A folder of pictures, with or without class folders: images are videos of one frame."""

from __future__ import annotations

from pathlib import Path

from clipmill.datasets.files import IMAGE_SUFFIXES, labelled_folder
from clipmill.datasets.source import Corpus


def read(root: Path, *, classes: bool | None = None) -> Corpus:
    """Every picture below ``root``: ``<class>/<image>`` or, like ImageNet, ``train/<class>/<image>``.

    classes: True = every picture must lie in a class folder, False = there are no classes, default = there are if no
    picture lies directly in ``root``. If all lie in folders named train, val or test, those are the splits. Labels
    count the class names in order of their bytes, over all splits.

    Key: the path below ``root`` without its suffix. Raises CorpusError for a folder without pictures.
    """
    return labelled_folder(Path(root), IMAGE_SUFFIXES, "pictures", classes)
