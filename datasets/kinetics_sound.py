"""Kinetics-Sound: the 32 classes of Kinetics-400 that can be heard.

Arandjelović and Zisserman, "Look, Listen and Learn", ICCV 2017, in the form that current Kinetics-400 allows (their
list had two more classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipmill.datasets import kinetics
from clipmill.datasets.files import lists_in, plain, text_of
from clipmill.datasets.source import Corpus, CorpusError

CLASSES = (
    "blowing nose",
    "blowing out candles",
    "bowling",
    "chopping wood",
    "dribbling basketball",
    "laughing",
    "mowing lawn",
    "playing accordion",
    "playing bagpipes",
    "playing bass guitar",
    "playing clarinet",
    "playing drums",
    "playing guitar",
    "playing harmonica",
    "playing keyboard",
    "playing organ",
    "playing piano",
    "playing saxophone",
    "playing trombone",
    "playing trumpet",
    "playing violin",
    "playing xylophone",
    "ripping paper",
    "shoveling snow",
    "shuffling cards",
    "singing",
    "stomping grapes",
    "strumming guitar",
    "tap dancing",
    "tapping guitar",
    "tapping pen",
    "tickling",
)


def read(root: Path, *, lists: str = "*.csv", videos: str = "", trimmed: bool = True) -> Corpus:
    """The Kinetics-Sound part of a Kinetics corpus; labels number `CLASSES`.

    lists, videos, trimmed: as in `clipmill.datasets.kinetics.read`. Rows of other classes are left out. Raises
    CorpusError if no row belongs to the 32 classes.
    """
    root = Path(root)
    rows = [row for path in lists_in(root, lists) for row in kinetics.parse(path) if row.label in CLASSES]
    if not rows:
        raise CorpusError(
            f"{text_of(root / lists)}: no row of a Kinetics-Sound class; read a list with labels of Kinetics-400"
        )
    return kinetics.match(rows, root / videos, CLASSES, trimmed)


def select(corpus: Corpus, classes: Sequence[str] = CLASSES) -> Corpus:
    """The sources of a corpus that belong to the given classes, relabelled in their order; ``missing`` stays.

    Names are compared without regard to case and underscores. Raises CorpusError if none of them is there.
    """
    number = {plain(name): place for place, name in enumerate(classes)}
    new = {old: number[plain(name)] for old, name in enumerate(corpus.classes) if plain(name) in number}
    sources = tuple(replace(source, label=new[source.label]) for source in corpus.sources if source.label in new)
    if not sources:
        raise CorpusError(f"no clip of the classes {_some(classes)}; the corpus has {_some(corpus.classes)}")
    return Corpus(sources=sources, classes=tuple(classes), missing=corpus.missing)


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], "..."][: len(names)]) or "none"
