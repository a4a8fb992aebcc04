"""``clipmill report``: one or more runs on one self-contained page, side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tyro.conf import Positional

from clipmill.tools import html
from clipmill.tools.runs import AHEAD, LOOP, Run, Score, flat, names, read_run

_FIRST_CURVES = ("loss", "lr", "clips_per_s", "wait_share")
_BUSY = 0.05  # waiting less than this share is not worth a remedy
_MAX_CURVES = 40
_MAX_SIDE = 1400  # pixels of an embedded picture
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write one HTML page of one or more runs: configuration, curves, throughput, views, scores.

    Several runs stand side by side. Missing parts are shown as missing.
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders of `clipmill pretrain`."""
    out: Path | None = None
    """The page; default report.html in the run folder, or in the current folder for several runs."""
    json: bool = False
    """Print the numbers as JSON."""


def main(args: Args) -> int:
    """Write the page; 0 when it is there."""
    if not args.runs:
        raise ValueError("give at least one run folder")
    runs = [read_run(folder, name) for folder, name in zip(args.runs, names(args.runs), strict=True)]
    default = args.runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out = default if args.out is None else args.out
    if out.is_dir():
        out = out / "report.html"
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        ("Overview", _overview(runs)),
        ("Scores", _scores(runs)),
        ("Curves", _curves(runs)),
        ("Throughput", _throughput(runs)),
        ("Sampled views", _samples(runs)),
        ("Configuration", _configuration(runs)),
    ]
    html.write_page(out, html.page(title, ", ".join(str(run.folder) for run in runs), sections))
    if args.json:
        print(json.dumps({"page": str(out), "runs": [_numbers(run) for run in runs]}, indent=2))
    else:
        for run in runs:
            for problem in run.problems:
                print(f"{run.name}: {problem}")
        print(out)
    return 0


def _numbers(run: Run) -> dict[str, Any]:
    """What ``--json`` prints of a run."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "last": dict(run.rows[-1]) if run.rows else {},
        "seconds": {key: run.total_s(key) for key in (*AHEAD, *LOOP)},
        "scores": {score.folder.name: dict(score.part("metrics")) for score in run.scores},
        "problems": list(run.problems),
    }


# --- overview and configuration -----------------------------------------------------------------------------


def _overview(runs: Sequence[Run]) -> html.Html:
    parts: list[html.Html] = []
    if len(runs) == 1:
        parts.append(html.tiles(_facts(runs[0])))
    else:
        facts = [_facts(run) for run in runs]
        heads = list(dict.fromkeys(name for one in facts for name in one))
        rows = [(run.name, *(one.get(name) for name in heads)) for run, one in zip(runs, facts, strict=True)]
        parts.append(html.table(("run", *heads), rows, "Where the runs stand"))
    for run in runs:
        parts += [html.note(f"{run.name}: {problem}" if len(runs) > 1 else problem) for problem in run.problems]
    return html.join(*parts)


def _facts(run: Run) -> dict[str, object]:
    last = run.rows[-1] if run.rows else {}
    rates = [rate for rate in run.series("clips_per_s")[1] if np.isfinite(rate)]
    loop_s = sum(run.total_s(key) for key in LOOP)
    return {
        "method": run.config.get("method"),
        "steps": last.get("step"),
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "clips/s (median)": float(np.median(rates)) if rates else None,
        "waiting for data": f"{100 * run.total_s('wait_s') / loop_s:.1f} %" if loop_s else None,
        "scores": len(run.scores),
    }


def _configuration(runs: Sequence[Run]) -> html.Html:
    pairs = [dict(flat(run.config)) if run.config else {} for run in runs]
    keys = list(dict.fromkeys(key for one in pairs for key in one))
    if not keys:
        return _missing("run.json")
    rows = [(key, *(_short(one.get(key, "–")) for one in pairs)) for key in keys]
    head = ("option", *(run.name for run in runs))
    if len(runs) == 1:
        return html.details(f"All {len(rows)} options", html.table(("option", "value"), rows, "run.json", len(rows)))
    differing = [row for row in rows if len(set(row[1:])) > 1]
    first = (
        html.table(head, differing, "Options that differ", len(rows)) if differing else html.tag("p", "All are equal.")
    )
    return html.join(first, html.details(f"All {len(rows)} options", html.table(head, rows, "run.json", len(rows))))


def _short(value: str) -> str:
    return value if len(value) <= 160 else f"{value[:157]}..."


def _missing(what: str) -> html.Html:
    return html.tag("p", f"{what} is missing.", class_="muted")


# --- curves and throughput ----------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> html.Html:
    logged = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    hidden = {"step", "epoch", *AHEAD, *LOOP}
    keys = [key for key in _FIRST_CURVES if key in logged]
    keys += [key for key in logged if key not in hidden and key not in keys and _is_number(runs, key)]
    if not keys:
        return _missing("log.jsonl")
    charts = [
        html.line_chart(key, {run.name: run.series(key) for run in runs if any(key in row for row in run.rows)}, "step")
        for key in keys[:_MAX_CURVES]
    ]
    return html.grid(*charts)


def _is_number(runs: Sequence[Run], key: str) -> bool:
    return any(np.isfinite(run.series(key)[1]).any() for run in runs)


def _throughput(runs: Sequence[Run]) -> html.Html:
    parts = []
    for run in runs:
        loop = [(key.removesuffix("_s"), run.total_s(key)) for key in LOOP]
        ahead = [(key.removesuffix("_s"), run.total_s(key)) for key in AHEAD]
        loop_s = sum(seconds for _, seconds in loop)
        if not loop_s:
            parts.append(_missing(f"The time of the stages of {run.name}"))
            continue
        boxes = [
            html.bars(f"Training loop, {loop_s:.1f} s", _shares(loop, loop_s), loop_s, stacked=True),
            html.bars("Made ahead in decode threads, in thread seconds", _shares(ahead, loop_s), stacked=True),
        ]
        verdict = _verdict(loop_s, run.total_s("wait_s"), max(ahead, key=lambda stage: stage[1])[0])
        parts.append(html.join(html.tag("h3", run.name), html.tag("p", verdict), html.grid(*boxes)))
    about = (
        "The first bars add up to the wall time of the training loop: waiting for data, augmenting, stepping. "
        "The second ran beside it, so they only matter as far as the loop waits."
    )
    return html.join(html.tag("p", about, class_="muted"), *parts)


def _verdict(loop_s: float, wait_s: float, slowest: str) -> str:
    share = wait_s / loop_s
    if share < _BUSY:
        return f"The loop waits {100 * share:.1f} % of its time: the step sets the pace."
    return f"The loop waits {100 * share:.1f} % of its time for data; most of the work ahead is {slowest}."


def _shares(stages: Sequence[tuple[str, float]], whole_s: float) -> list[tuple[str, float, str]]:
    return [(name, seconds, f"{seconds:.1f} s, {100 * seconds / whole_s:.0f} %") for name, seconds in stages]


# --- pictures and scores ------------------------------------------------------------------------------------


def _samples(runs: Sequence[Run]) -> html.Html:
    found = [_picture(path, f"{run.name}: {path.stem}") for run in runs for path in run.samples]
    return html.tag("div", *found, class_="views") if found else _missing("samples/*.png")


def _picture(path: Path, title: str) -> html.Html:
    """A picture file inside the page, made smaller if it is very large; a remark if it cannot be read."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_MAX_SIDE, 4 * _MAX_SIDE))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return html.note(f"{title}: {path.name} cannot be read ({error})", "warn")
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return html.figure(data.getvalue(), title, title)


def _scores(runs: Sequence[Run]) -> html.Html:
    found: dict[str, list[tuple[Run, Score]]] = {}
    for run in runs:
        for score in run.scores:
            found.setdefault(score.benchmark, []).append((run, score))
    if not found:
        return _missing("evaluate/*/score.json")
    return html.join(*(_benchmark(name, scores) for name, scores in found.items()))


def _benchmark(name: str, scores: Sequence[tuple[Run, Score]]) -> html.Html:
    published = _published(scores)
    metrics = list(dict.fromkeys(metric for _, score in scores for metric in score.part("metrics")))
    metrics += [metric for values in published.values() for metric in values if metric not in metrics]
    rows = [
        (_label(run, score), *(score.part("metrics").get(metric) for metric in metrics), "measured")
        for run, score in scores
    ]
    rows += [(who, *(values.get(metric) for metric in metrics), source) for (who, source), values in published.items()]
    pictures: list[html.Html] = []
    extras: list[html.Html] = []
    for run, score in scores:
        shown, more = _artefacts(_label(run, score), score)
        pictures += shown
        extras += [*more, *_tables(_label(run, score), score)]
    table = html.table(("", *metrics, "source"), rows, f"Scores of {name}")
    return html.join(html.tag("h3", name), table, *_differences(scores), html.grid(*pictures), *extras)


def _label(run: Run, score: Score) -> str:
    """The run's name, with the folder of the score where that is not simply its benchmark's."""
    return run.name if score.folder.name == score.benchmark else f"{run.name} ({score.folder.name})"


def _artefacts(label: str, score: Score) -> tuple[list[html.Html], list[html.Html]]:
    """Pictures, and remarks on the other files."""
    files, lost = score.files()
    pictures = [_picture(path, f"{label}: {path.name}") for path in files if path.suffix.lower() in _PICTURES]
    others = [path.name for path in files if path.suffix.lower() not in _PICTURES]
    remarks = [html.note(f"{label}: missing artefacts: {', '.join(lost)}", "warn")] if lost else []
    if others:
        remarks.append(html.tag("p", f"{label}: more in {score.folder}: {', '.join(others)}", class_="muted"))
    return pictures, remarks


def _tables(label: str, score: Score) -> list[html.Html]:
    """The rows of a score, and its settings, to unfold."""
    found = []
    if items := score.listed("rows"):
        heads = list(dict.fromkeys(key for row in items for key in row))
        grid = html.table(heads, [[row.get(key) for key in heads] for row in items], f"{score.benchmark} of {label}")
        found.append(html.details(f"{label}: {len(items)} rows", grid))
    settings = [*flat(score.part("settings")), *flat(score.part("digests"), "digest")]
    if settings:
        table = html.table(("setting", "value"), settings, "Settings and digests")
        found.append(html.details(f"{label}: settings", table))
    return found


def _published(scores: Sequence[tuple[Run, Score]]) -> dict[tuple[str, str], dict[str, object]]:
    """{(method, source): {metric: value}} of the literature."""
    found: dict[tuple[str, str], dict[str, object]] = {}
    for _, score in scores:
        for item in score.listed("published"):
            who = (str(item.get("method", "published")), str(item.get("source", "")))
            numbers = {name: value for name, value in item.items() if isinstance(value, int | float)}
            found.setdefault(who, {}).update(numbers)
    return found


def _differences(scores: Sequence[tuple[Run, Score]]) -> list[html.Html]:
    """Remarks on settings and data that are not the same in all runs; their scores do not compare."""
    remarks = []
    for part in ("settings", "digests"):
        values = [dict(flat(score.part(part))) for _, score in scores]
        keys = dict.fromkeys(key for one in values for key in one)
        differing = [key for key in keys if len({one.get(key) for one in values}) > 1 and "encoder" not in key]
        if differing:
            remarks.append(html.note(f"these {part} differ between the runs: {', '.join(differing)}", "warn"))
    return remarks
