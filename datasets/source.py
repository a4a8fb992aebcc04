"""Source: one row of a raw corpus, before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class CorpusError(ValueError):
    """A corpus folder or list that cannot be read; names the file, the row and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One media file, or a part of one, that should become one record.

    key: unique name in the corpus, valid UTF-8, stable between machines (usually the relative path without suffix).
    path: where the file lies. label: class number from 0, -1 = none. labels: all class numbers where there are
    several (AudioSet). split: train, val, test, ... or empty. start_s, end_s: the part to keep, in seconds on the
    file's own clock; None = from the beginning, to the end. extra: more facts for the record's JSON, JSON-ready.
    """

    key: str
    path: str
    label: int = -1
    labels: tuple[int, ...] = ()
    split: str = ""
    start_s: float | None = None
    end_s: float | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What a reader returns.

    sources: rows in a fixed order that does not depend on the file system. classes: names by label number.
    missing: (row name, reason) of listed rows whose file is not there; they are reported, never dropped silently.
    """

    sources: tuple[Source, ...]
    classes: tuple[str, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
