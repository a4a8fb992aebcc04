"""DCASE 2013 acoustic scenes (the set called DCASE or DCASE2014 in audio-visual papers): 10 scenes, train and test."""

from __future__ import annotations

import re
from pathlib import Path

from clipmill.datasets.files import AUDIO_SUFFIXES, find, key_of, text_of
from clipmill.datasets.source import Corpus, CorpusError, Source

_NAME = re.compile(r"(?P<scene>[a-z]+)\d\d")


def read(root: Path) -> Corpus:
    """Recordings ``<scene><two digits>`` below ``root``; those below a folder with ``test`` in its name are the test.

    The released archives unpack to doubled folders (``scenes_stereo/scenes_stereo``); any depth will do. Classes in
    alphabetical order. Key: the path without its suffix. Raises CorpusError for a name of another form, and unless
    both parts are there with the same scenes.
    """
    root = Path(root)
    found: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for path in find(root, AUDIO_SUFFIXES):
        *folders, name = path.split("/")
        match = _NAME.fullmatch(name.rsplit(".", 1)[0])
        if match is None:
            raise CorpusError(
                f"{text_of(root / path)}: not <scene><two digits>; keep other recordings out of the folder"
            )
        found["test" if any("test" in folder.lower() for folder in folders) else "train"][path] = match["scene"]
    scenes = {part: sorted(set(files.values())) for part, files in found.items()}
    if not found["train"] or scenes["train"] != scenes["test"]:
        raise CorpusError(
            f"{text_of(root)}: {len(scenes['train'])} scenes to train on and {len(scenes['test'])} to test; "
            "unpack scenes_stereo and scenes_stereo_testset side by side"
        )
    classes = tuple(scenes["train"])
    sources = [
        Source(key=key_of(path.rsplit(".", 1)[0]), path=str(root / path), label=classes.index(scene), split=part)
        for part, files in found.items()
        for path, scene in files.items()
    ]
    return Corpus(sources=tuple(sorted(sources, key=lambda source: source.key.encode())), classes=classes)
