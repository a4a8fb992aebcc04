"""One evaluation on several official splits, one after the other, and the mean of their scores."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.models.encoder import Encoder
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.evaluator import SCORE_FILE, Evaluator, Progress, Report, silent
from clipmill.tools.evaluate.opening import encoder_digest


def over_splits(
    evaluate: Evaluator, encoder: Encoder, root: Path, out: Path, config: Any, *, progress: Progress = silent
) -> Report:
    """Evaluate each of ``config.splits.official`` in folder ``out/split_N``; the metrics are means over them.

    Features of frozen encoders are computed once. Splits whose score is there already are not evaluated again.
    """
    if config.compute.cache is None:
        config = replace(config, compute=replace(config.compute, cache=out / "features"))
    numbers = config.splits.official
    reports = []
    for number in numbers:
        one = replace(config, splits=replace(config.splits, official=(number,)))
        folder, key = out / f"split_{number}", _key(encoder, root, one)
        report = _stored(folder, key)
        if report is None:
            report = evaluate(encoder, root, folder, one, progress=progress)
            report = replace(report, digests={**report.digests, "evaluation": key})
            report.save(folder)
        reports.append(report)
        progress("splits", len(reports), len(numbers), "splits")
    first = reports[0]
    names = [name for name in first.metrics if all(name in report.metrics for report in reports)]
    return replace(
        first,
        metrics={name: float(np.mean([report.metrics[name] for report in reports])) for name in names},
        rows=[{"split": number, **report.metrics} for number, report in zip(numbers, reports, strict=True)],
        artefacts=[
            f"split_{number}/{name}"
            for number, report in zip(numbers, reports, strict=True)
            for name in (SCORE_FILE, *report.artefacts)
        ],
        settings={**first.settings, "official_splits": list(numbers)},
        digests={name: first.digests[name] for name in ("data", "encoder") if name in first.digests},
    )


def _key(encoder: Encoder, root: Path, config: Any) -> str:
    """A hex name of all that a score depends on."""
    facts = (encoder_digest(encoder), ShardIndex.open(root).digest, repr(config))
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def _stored(folder: Path, key: str) -> Report | None:
    """The report in a folder, if it is of the same evaluation."""
    path = folder / SCORE_FILE
    if not path.is_file():
        return None
    body = json.loads(path.read_text("utf-8"))
    return Report(**body) if body.get("digests", {}).get("evaluation") == key else None
