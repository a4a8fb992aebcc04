"""What lies in a run folder, read so that a missing or half-written part is told and never stops a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_FILE, LOG_FILE, SCORE_FILE = "run.json", "log.jsonl", "score.json"
AHEAD = ("plan_s", "read_s", "decode_s", "copy_s")  # thread time, beside the training loop
LOOP = ("wait_s", "augment_s", "step_s")  # wall time of the training loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One ``score.json``. folder: where it lies; data: its content, with every part of the right type."""

    folder: Path
    data: Mapping[str, Any]

    @property
    def benchmark(self) -> str:
        """Its benchmark's name."""
        return str(self.data.get("benchmark", self.folder.name))

    def part(self, name: str) -> Mapping[str, Any]:
        """A part that must be an object; empty if it is not there."""
        value = self.data.get(name)
        return value if isinstance(value, Mapping) else {}

    def listed(self, name: str) -> list[Mapping[str, Any]]:
        """A part that must be a list of objects; empty if it is not there."""
        value = self.data.get(name)
        return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []

    def files(self) -> tuple[list[Path], list[str]]:
        """The artefacts that are there, and names that are missing or lead out of the folder."""
        names = self.data.get("artefacts")
        found, lost = [], []
        for name in names if isinstance(names, list) else []:
            path = (self.folder / str(name)).resolve()
            inside = path.is_relative_to(self.folder.resolve()) and path.is_file()
            found.append(path) if inside else lost.append(str(name))
        return found, lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder.

    config: of ``run.json``. rows: of ``log.jsonl``, one per step. problems: what was not as it should be.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    scores: Sequence[Score]
    samples: Sequence[Path]
    problems: Sequence[str] = ()

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a logged quantity; what is not a number is NaN."""
        rows = [row for row in self.rows if key in row]
        return [float(row["step"]) for row in rows], [_number(row[key]) for row in rows]

    def total_s(self, key: str) -> float:
        """Seconds of a stage over all logged intervals."""
        return sum(value for value in self.series(key)[1] if value == value)


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder; raises ValueError when there is nothing to report in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give run folders of `clipmill pretrain`")
    problems: list[str] = []
    config = _object(folder / RUN_FILE, problems)
    rows = _rows(folder / LOG_FILE, problems)
    scores = [
        Score(folder=path.parent, data=data)
        for path in sorted(folder.glob(f"evaluate/**/{SCORE_FILE}"))
        if (data := _object(path, problems))
    ]
    if not (config or rows or scores):
        raise ValueError(f"{folder}: no {RUN_FILE}, {LOG_FILE} or evaluate/*/{SCORE_FILE} there; is it a run folder?")
    if not scores:
        problems.append("no scores yet; run `clipmill evaluate`")
    samples = sorted(folder.glob("samples/*.png"))
    return Run(
        name=name, folder=folder, config=config, rows=rows, scores=scores, samples=samples, problems=tuple(problems)
    )


def names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart.

    >>> names([Path("a/x"), Path("b/x")])
    ['a/x', 'b/x']
    """
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested objects as (dotted name, text) pairs.

    >>> list(flat({"a": {"b": 1}, "c": [2, 3]}))
    [('a.b', '1'), ('c', '[2, 3]')]
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a remark, when it is missing or damaged."""
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8", "replace")))
    except (ValueError, TypeError) as error:
        problems.append(f"{path.name} in {path.parent.name} is damaged ({error})")
        return {}


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Rows by rising step; of several rows for one step (a resumed run) the last counts."""
    if not path.is_file():
        problems.append(f"{path.name} is missing: no curves")
        return []
    found: dict[float, dict[str, Any]] = {}
    again = 0
    lines = path.read_text("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line))
            step = float(row["step"])
        except (ValueError, TypeError, KeyError):
            half = number == len(lines)
            problems.append(f"{path.name}: line {number} is {'half-written' if half else 'damaged'} and was left out")
            continue
        again += step in found
        found[step] = row
    if again:
        problems.append(f"{path.name}: {again} steps were logged again after a resume; the later rows are shown")
    return [found[step] for step in sorted(found)]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
