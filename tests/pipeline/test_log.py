"""The run's log files, also after a kill and a resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from clipmill.pipeline.log import LOG_CSV, LOG_JSONL, Meter, RunLog, read_log


def _csv(folder: Path) -> list[dict[str, str]]:
    with (folder / LOG_CSV).open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_in_both_files(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.row({"step": 1, "loss": 2.5})
    log.row({"step": 2, "loss": float("nan")})
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]  # before close
    assert _csv(tmp_path) == [{"step": "1", "loss": "2.5"}, {"step": "2", "loss": ""}]
    log.close()


def test_a_late_column_reaches_the_table(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    for row in ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "nmi": 0.5}, {"step": 3, "loss": 0.5}):
        log.row(row)
    log.close()
    assert [row["nmi"] for row in _csv(tmp_path)] == ["", "0.5", ""]
    assert [row["loss"] for row in _csv(tmp_path)] == ["2.0", "1.0", "0.5"]


def test_resume_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.row({"step": step, "loss": float(step)})
    log.close()
    with (tmp_path / LOG_JSONL).open("a") as file:
        file.write('{"step": 6, "lo')
    log = RunLog(tmp_path, resume_step=3, tensorboard=False)
    log.row({"step": 4, "loss": 44.0})
    log.close()
    expected = [1.0, 2.0, 3.0, 44.0]
    assert [row["loss"] for row in read_log(tmp_path)] == expected
    assert [float(row["loss"]) for row in _csv(tmp_path)] == expected


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LOG_JSONL).write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_log(tmp_path)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", active=False)
    log.row({"step": 1, "loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_every_number_and_forgets_what_a_resume_drops(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.row({"step": step, "loss": float(step), "wait_s": 0.5})
    log.close()
    log = RunLog(tmp_path, resume_step=2)
    log.row({"step": 3, "loss": 33.0, "wait_s": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 33.0)]
    assert [event.value for event in events.Scalars("seconds/wait_s")] == [0.5, 0.5, 0.5]


def test_meter_continues_exactly_from_stored_sums() -> None:
    torch.manual_seed(0)
    values = torch.randn(7).tolist()
    device = torch.device("cpu")
    whole, first = Meter({}, device), Meter({}, device)
    for value in values:
        whole.add({"loss": torch.tensor(value)})
    for value in values[:4]:
        first.add({"loss": torch.tensor(value)})
    second = Meter(json.loads(json.dumps(first.reduced())), device)
    for value in values[4:]:
        second.add({"loss": torch.tensor(value)})
    assert second.mean() == whole.mean()
    assert second.reduced() == {}
