"""The run's log: log.jsonl, log.csv and TensorBoard, one row per interval, written by the main process alone.

Every row is handed to the operating system at once, so a killed process keeps its rows; a resumed run first drops
the rows that come after the checkpoint it starts from.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG_JSONL = "log.jsonl"
LOG_CSV = "log.csv"
TENSORBOARD = "tensorboard"


class RunLog:
    """Writes rows of numbers that have at least ``step``.

    folder: of the run. resume_step: rows with a larger step are dropped from what is there (0: all of them).
    active: False makes every call do nothing (all processes but the main one).
    """

    def __init__(
        self, folder: Path, *, resume_step: int = 0, tensorboard: bool = True, active: bool = True
    ) -> None:
        self._active = active
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_log(folder) if row["step"] <= resume_step]
        self._columns: list[str] = []
        self._csv_path = folder / LOG_CSV
        path = folder / LOG_JSONL
        _replace(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._jsonl = path.open("a")
        self._rewrite_csv(rows)
        self._csv = self._csv_path.open("a", newline="")
        self._rows = rows
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = resume_step + 1 if resume_step else None
            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge, flush_secs=30)

    def row(self, values: Mapping[str, float]) -> None:
        """Append one row."""
        if not self._active:
            return
        row = {name: _plain(value) for name, value in values.items()}
        self._jsonl.write(json.dumps(row) + "\n")
        self._jsonl.flush()
        self._rows.append(row)
        if set(row) <= set(self._columns):
            csv.DictWriter(self._csv, self._columns).writerow(row)
            self._csv.flush()
        else:  # a new column: the table is written again
            self._csv.close()
            self._rewrite_csv(self._rows)
            self._csv = self._csv_path.open("a", newline="")
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(_board_name(name), value, row["step"])
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        if self._active:
            self._jsonl.close()
            self._csv.close()
            if self._board is not None:
                self._board.close()

    def _rewrite_csv(self, rows: list[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        _replace(self._csv_path, text.getvalue())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``log.jsonl``; a last line that was cut off by a kill is left out."""
    path = folder / LOG_JSONL
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is damaged ({error}); delete that line") from error
    return rows


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, newline="")
    partial.replace(path)


def _plain(value: float) -> float | int | None:
    """A JSON number; None where JSON has none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _board_name(name: str) -> str:
    return f"seconds/{name}" if name.endswith("_s") and not name.endswith("per_s") else f"train/{name}"
