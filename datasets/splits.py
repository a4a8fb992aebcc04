"""What UCF101 and HMDB51 share: clips in class folders, and three lists of which are for training and for testing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipmill.datasets.files import MEDIA_SUFFIXES, find, key_of, stem_of, text_of
from clipmill.datasets.source import Corpus, CorpusError, Source


@dataclass(slots=True, kw_only=True)
class Clip:
    """A listed clip. name: ``<class>/<file without suffix>``, or only the file. where: the row that named it first.

    splits: ``train``, ``test`` or ``unused`` by number of the split.
    """

    name: str
    label: int
    where: str
    splits: dict[int, str] = field(default_factory=dict)


def add(clips: dict[str, Clip], name: str, label: int, split: int, part: str, where: str) -> None:
    """Enter one row of a list; CorpusError if it contradicts an earlier one."""
    clip = clips.setdefault(name, Clip(name=name, label=label, where=where))
    if clip.label != label:
        raise CorpusError(f"{where}: {text_of(name)} has another class in {clip.where}; correct one of the lists")
    if clip.splits.setdefault(split, part) != part:
        raise CorpusError(
            f"{where}: {text_of(name)} is {part} and {clip.splits[split]} of split {split}; correct one of the lists"
        )


def corpus_of(clips: Sequence[Clip], videos: Path, classes: Sequence[str], split: int) -> Corpus:
    """Find the files of listed clips below ``videos``, in class folders or (for names without one) anywhere.

    Case and suffix do not count. Each source's ``split`` is that of split number ``split``; ``extra["splits"]`` has
    all of them. The key is the name as listed. Clips without a file are in ``missing``.
    """
    files: dict[str, str] = {}
    for path in find(videos, MEDIA_SUFFIXES):
        stem = stem_of(path).casefold()
        files.setdefault("/".join(stem.split("/")[-2:]), path)
        files.setdefault(stem.rpartition("/")[2], path)
    sources, missing = [], []
    for clip in sorted(clips, key=lambda clip: key_of(clip.name).encode()):
        path = files.get(clip.name.casefold())
        if path is None:
            missing.append((clip.where, f"no file {text_of(clip.name)}.* below {text_of(videos)}"))
            continue
        source = Source(
            key=key_of(clip.name),
            path=str(videos / path),
            label=clip.label,
            split=clip.splits.get(split, "unused"),
            extra={"splits": {str(number): part for number, part in sorted(clip.splits.items())}},
        )
        sources.append(source)
    if not sources:
        raise CorpusError(f"{text_of(videos)}: none of the {len(clips)} listed clips is there; name the videos' folder")
    return Corpus(sources=tuple(sources), classes=tuple(classes), missing=tuple(missing))


def first_folder(root: Path, names: Sequence[str], sample: str) -> Path:
    """The first of some sub-folders of ``root`` in which a file like ``sample`` (a pattern) lies; else ``root``."""
    return next((root / name for name in names if any((root / name).glob(sample))), root)
