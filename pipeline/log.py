"""The run's log: log.jsonl, log.csv and TensorBoard, one row per interval, written by the main process alone.

Every row is handed to the operating system at once, so a killed process keeps its rows; a resumed run first drops
the rows that come after the checkpoint it starts from. `Meter` and `Clock` make the numbers of a row.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipmill.pipeline import dist
from clipmill.pipeline.loader import Loader

LOG_JSONL = "log.jsonl"
LOG_CSV = "log.csv"
TENSORBOARD = "tensorboard"
_COUNT = "count"


class RunLog:
    """Writes rows of numbers that have at least ``step``.

    folder: of the run. resume_step: rows with a larger step are dropped from what is there (0: all of them).
    active: False makes every call do nothing (all processes but the main one).
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, tensorboard: bool = True, active: bool = True) -> None:
        self._active = active
        self._folder = folder
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
        if set(row) <= set(self._columns):
            csv.DictWriter(self._csv, self._columns).writerow(row)
            self._csv.flush()
        else:  # a new column: the table is written again
            self._csv.close()
            self._rewrite_csv(read_log(self._folder))
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


# --- the numbers of a row -----------------------------------------------------------------------------------


class Meter:
    """Means over the steps of an interval, summed on the device in float64.

    sums: of an interval that a checkpoint cut, so that a resumed run logs the same numbers.
    """

    def __init__(self, sums: Mapping[str, float], device: torch.device) -> None:
        self._device = device
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in sums.items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one set of scalars."""
        for name, value in {**values, _COUNT: torch.ones(())}.items():
            value = value.detach().to(self._device, torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduced(self) -> dict[str, float]:
        """The sums, averaged over all processes (a collective)."""
        if not self._sums:
            return {}
        packed = dist.sum_(torch.stack(list(self._sums.values()))) / dist.world()
        return dict(zip(self._sums, packed.tolist(), strict=True))

    def mean(self) -> dict[str, float]:
        """Means over the interval and all processes; begins a new interval (a collective)."""
        sums = self.reduced()
        count = sums.pop(_COUNT)
        self._sums = {}
        return {name: value / count for name, value in sums.items()}


class Clock:
    """Throughput, and seconds per stage since the last lap.

    plan_s, read_s, decode_s and copy_s are thread time of this process's decode threads (they can exceed the
    interval, and are 0 where the work happened before it); wait_s (for a batch), augment_s and step_s (all else) are
    the loop's own time and add up to it. Of a data set at a URL also network_mb, megabytes that were received, and
    requests. batch_size: samples of an optimiser step over all processes.
    """

    def __init__(self, source: Loader, batch_size: int) -> None:
        self._source, self._batch_size = source, batch_size
        self._steps = 0
        self._before = self._read()
        self._step_s = 0.0

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        """Time of this interval that was not training."""
        self._before["wall_s"] += seconds

    def lap(self) -> dict[str, float]:
        """clips_per_s, wait_share and what was spent in the interval; begins a new one."""
        now = self._read()
        spent = {name: now[name] - self._before[name] for name in now}
        wall_s = max(spent.pop("wall_s"), 1e-9)
        clips_per_s = self._steps * self._batch_size / wall_s
        self._step_s = wall_s / max(self._steps, 1)
        self._before, self._steps = now, 0
        spent["step_s"] = max(wall_s - spent["wait_s"] - spent["augment_s"], 0.0)
        return {"clips_per_s": clips_per_s, "wait_share": min(spent["wait_s"] / wall_s, 1.0), **spent}

    def left_s(self, steps: int) -> float:
        """Seconds that ``steps`` more will take at the rate of the last lap."""
        return steps * self._step_s

    def _read(self) -> dict[str, float]:
        source, stages = self._source, self._source.stages
        network = {"network_mb": stages.network_bytes / 1e6, "requests": float(stages.requests)}
        return {
            **(network if source.index.url else {}),
            "plan_s": stages.plan_s,
            "read_s": stages.read_s,
            "decode_s": stages.decode_s,
            "copy_s": stages.copy_s,
            "augment_s": source.augment_s,
            "wait_s": source.wait_s,
            "wall_s": time.perf_counter(),
        }
