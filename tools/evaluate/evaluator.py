"""Evaluators: what a benchmark is, how one is found by its module name, and how its outcome is stored.

A benchmark is a module of this folder with a frozen dataclass ``Config`` and a function ``evaluate`` (`Evaluator`).
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from clipmill.pipeline.config import to_json
from clipmill.tools.runs import flat

if TYPE_CHECKING:
    from rich.console import Console

    from clipmill.models.encoder import Encoder

SCORE_FILE = "score.json"
_ROWS_SHOWN = 20

Progress = Callable[[str, int, int, str], None]  # (what, done, total, unit)


def silent(what: str, done: int, total: int, unit: str) -> None:
    """A `Progress` that says nothing."""


class Evaluator(Protocol):
    """The function ``evaluate`` of a benchmark module."""

    def __call__(self, encoder: Encoder, root: Path, out: Path, config: Any, *, progress: Progress = silent) -> Report:
        """Measure ``encoder`` on the packed data set ``root``; pictures and tables go to folder ``out``.

        config: an instance of the module's ``Config``. Raises ValueError for data or options that do not fit. The
        encoder comes back in the mode it was in, with the same weights.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an evaluation found.

    benchmark: name of its module. metrics: {name: number}, accuracies as fractions of 1. rows: one mapping per item
    (class, sequence, ...), JSON-ready. artefacts: names of files in the output folder. settings: everything that
    decides the numbers. digests: of the data, its splits and the encoder. published: numbers of the same protocol
    from the literature, each a mapping with ``source``.
    """

    benchmark: str
    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]] = ()
    artefacts: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    published: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> str:
        """The text of ``score.json``; equal reports give equal bytes."""
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{self.benchmark}: the metric {name!r} is {value}; look at the features of the data")
        return json.dumps(to_json(self), indent=2, allow_nan=False, default=_plain) + "\n"

    def save(self, out: Path) -> Path:
        """Write ``score.json`` to folder ``out``; it appears complete or not at all."""
        path = out / SCORE_FILE
        write_atomic(path, self.to_json().encode())
        return path

    def show(self, console: Console) -> None:
        """Print the settings, the metrics and, if they are few, the rows."""
        from rich.table import Table

        for name, value in flat(json.loads(json.dumps(to_json(self.settings), default=_plain))):
            console.print(f"{name} = {value}", markup=False, highlight=False)
        table = Table(title=self.benchmark, show_header=False)
        table.add_column(justify="left")
        table.add_column(justify="right")
        for name, value in self.metrics.items():
            table.add_row(name, _number(value))
        console.print(table)
        if 0 < len(self.rows) <= _ROWS_SHOWN:
            names = list(self.rows[0])
            items = Table(*names)
            for row in self.rows:
                items.add_row(*(_number(row.get(name, "")) for name in names))
            console.print(items)
        for item in self.published:
            console.print("published: " + ", ".join(f"{name} {value}" for name, value in item.items()), markup=False)


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """numpy numbers as Python's, paths as text."""
    return value.item() if hasattr(value, "item") else str(value)


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file so that ``path`` holds either the old content or the whole new one; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table with a header line, written atomically; the first row names the columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


# --- benchmarks by module name ------------------------------------------------------------------------------


def benchmarks() -> dict[str, str]:
    """{name: first line of its docstring} of all benchmarks, without importing any."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "Config" in classes and "evaluate" in functions:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def benchmark_module(name: str) -> ModuleType:
    """The module of a benchmark; an unknown name lists near ones."""
    if name not in (known := benchmarks()):
        near = get_close_matches(name, known, n=3) or list(known)
        raise ValueError(f"unknown benchmark {name!r}; did you mean {' or '.join(near)}?")
    return import_module(f"clipmill.tools.evaluate.{name}")
