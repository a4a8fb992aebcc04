"""``clipmill inspect``: a packed data set as pictures and numbers, on one self-contained page."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.remote import data_folder
from clipmill.tools import html
from clipmill.tools.data_set import DataSet, full_name

if TYPE_CHECKING:
    from clipmill.tools.inspect_data import Rows, Sample

_BARS = 24  # rows of a bar table
_REJECTS = 100  # files listed


@dataclass(frozen=True, kw_only=True)
class Args:
    """Look at a packed data set: contact sheets, spectrograms, numbers, rejects, and the views a method is given.

    Writes index.html (self-contained) and PNG sheets to --out.
    """

    dataset: Positional[DataSet]
    """Folder made by `clipmill pack`, or the URL of one."""
    out: Path = Path("inspect")
    """Folder for the page and the pictures."""
    method: tuple[str, ...] = ()
    """NAME [RECIPE]: show the views of this method; default one plain clip."""
    split: str = ""
    """Only this split; default all."""
    samples: int = 8
    """Records and clips to show."""
    seed: int = 0
    """Chooses the samples and their random draws."""
    cache_dir: Path | None = None
    """Folder for what is fetched of a data set at a URL; default $CLIPMILL_CACHE, else ~/.cache/clipmill."""
    json: bool = False
    """Print the numbers as JSON."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"--samples must be at least 1, got {self.samples}")
        if len(self.method) > 2:
            raise ValueError(f"--method takes NAME [RECIPE], got {' '.join(self.method)}; put DATASET before it")
        if str(self.out.resolve()) == full_name(self.dataset):
            raise ValueError(f"--out {self.out} is the data set itself; choose another folder")


def main(args: Args) -> int:
    """Write the page; 0 when it is there."""
    from clipmill.tools import inspect_data as data

    root = data_folder(args.dataset, cache_dir=args.cache_dir, also=("rejects.jsonl",))
    index = ShardIndex.open(root)
    if args.split:
        index = index.split(args.split)
    if not len(index):
        raise ValueError(f"{args.dataset}: the data set holds no record; rejects.jsonl there says why")
    about = data.dataset_json(root)
    rejects, problems = data.reject_rows(root)
    planner = data.method_planner(*args.method) if args.method else data.plain_planner(index)
    samples = data.record_samples(index, args.samples, args.seed, args.json)
    loader, views = data.view_samples(index, planner, args.samples, args.seed)
    damaged = {sample.record.key: sample.damage for sample in samples if sample.damage}
    damaged |= {loader.index[number].key: reason for number, reason in loader.damaged.items()}
    numbers = data.corpus_numbers(index)
    numbers["rejected"] = dict(Counter(str(row.get("reason", "?")) for row in rejects).most_common())
    numbers["damaged"] = damaged
    numbers["views"] = {view.name: data.view_text(view) for view in planner.views}
    sections = [
        ("Overview", _overview(numbers, about, problems)),
        ("Distributions", _distributions(numbers, data.durations(index), index.column("num_frames"))),
        ("Labels and splits", _labels(*data.label_table(index))),
        ("Rejects", _rejects(rejects, problems)),
        ("Records", _records(samples)),
        *((f"View: {name}", _view(name, numbers["views"][name], rows, loader.skipped)) for name, rows in views.items()),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "index.html"
    name = full_name(args.dataset).rpartition("/")[2]
    html.write_page(page, html.page(f"Data set {name}", str(args.dataset), sections))
    sheets = {
        "contact-sheet": [(f"{s.record.key}  {s.facts}", s.film) for s in samples if s.film is not None],
        "spectrograms": [(f"{s.record.key}  {s.facts}", s.sound) for s in samples if s.sound is not None],
        **{f"view-{name}": rows for name, rows in views.items()},
    }
    numbers["files"] = [str(page), *_save_sheets(args.out, sheets)]
    _print(numbers, page, args)
    return 0


def _save_sheets(out: Path, sheets: Mapping[str, Rows]) -> list[str]:
    from clipmill.tools.pictures import contact_sheet

    saved = []
    for name, rows in sheets.items():
        if rows:
            path = out / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}.png"
            path.write_bytes(html.png(contact_sheet(rows)))
            saved.append(str(path))
    return saved


# --- the page -----------------------------------------------------------------------------------------------


def _overview(numbers: Mapping[str, Any], about: Mapping[str, Any] | None, problems: Sequence[str]) -> html.Html:
    warnings = [f"shard files are missing: {', '.join(names)}" for names in [numbers["shards_missing"]] if names]
    warnings += [f"damaged record {key}: {reason}" for key, reason in numbers["damaged"].items()] + [*problems]
    if about is None:
        warnings.append("dataset.json is missing: profile and settings are not known")
    about = about or {}
    tiles = {
        "records": numbers["records"],
        "hours": numbers["hours"],
        "frames": numbers["frames"],
        "in shards": html.size_text(numbers["shard_bytes"]),
        "with sound": numbers["with_sound"],
        "silent": numbers["silent"],
        "salvaged": numbers["salvaged"],
        "rejected": sum(numbers["rejected"].values()),
        **{f"{name}s": count for name, count in about.get("counts", {}).items() if name == "duplicate"},
    }
    facts = {"index digest": numbers["digest"], "codecs": numbers["codecs"], "shards": numbers["shards"]}
    facts |= {name: value for name, value in about.items() if name not in ("shards", "classes", "settings")}
    rows = [(name, _plain(value)) for name, value in (facts | about.get("settings", {})).items()]
    table = html.table(("name", "value"), rows, "How it was packed")
    return html.join(
        html.tiles(tiles), *(html.note(text, "warn") for text in warnings), html.details("Settings", table)
    )


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _distributions(numbers: Mapping[str, Any], durations_s: np.ndarray, num_frames: np.ndarray) -> html.Html:
    charts = [html.histogram("Duration", durations_s, "seconds")]
    if (num_frames > 1).any():
        charts.append(html.histogram("Frames per record", num_frames[num_frames > 0], "frames"))
    tables = {
        "Sizes, width x height in pixels": numbers["sizes"],
        "Frames per second": numbers["fps"],
        "Sample rates of sound in Hz": numbers["audio_hz"],
    }
    return html.join(html.grid(*charts), html.grid(*(_bars(name, counts) for name, counts in tables.items() if counts)))


def _bars(caption: str, counts: Mapping[str, int]) -> html.Html:
    rows = [(name, float(count), f"{count:,}") for name, count in counts.items()]
    rest = sum(list(counts.values())[_BARS:])
    more = [(f"{len(rows) - _BARS} more", float(rest), f"{rest:,}")] if rest else []
    return html.bars(caption, rows[:_BARS] + more)


def _labels(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> html.Html:
    chart = _bars("Records per label", {row[0]: row[-1] for row in rows})
    caption = f"{len(rows):,} labels by split"
    return html.grid(chart, html.table(("label", *columns, "all"), rows, caption))


def _rejects(rows: Sequence[Mapping[str, Any]], problems: Sequence[str]) -> html.Html:
    if not rows:
        return html.tag("p", "; ".join(problems) or "Nothing was rejected.", class_="muted")
    reasons = Counter(str(row.get("reason", "?")) for row in rows)
    names = ("key", "path", "reason", "detail")
    listed = [[str(row.get(name, "")) for name in names] for row in rows]
    table = html.table(names, listed, "Rejected files", _REJECTS)
    chart = _bars(f"{len(rows):,} files rejected, by reason", dict(reasons.most_common()))
    return html.join(chart, html.details("Files", table, open_=len(rows) <= 20))


def _records(samples: Sequence[Sample]) -> html.Html:
    about = "Frames over the whole length, and the log-mel spectrogram of the sound (bright is loud)."
    cards = []
    for sample in samples:
        record = sample.record
        parts = [html.tag("h3", record.key), html.tag("p", sample.facts, class_="muted")]
        if sample.damage:
            parts.append(html.note(sample.damage, "warn"))
        if sample.film is not None:
            parts.append(html.figure(sample.film, f"Film strip of {record.key}", "", class_="strip"))
        if sample.sound is not None:
            said = (
                f"0 to {sample.heard_s:.2f} s; mel bands up to {record.audio_hz / 2000:g} kHz, low notes at the bottom"
            )
            parts.append(html.figure(sample.sound, f"Spectrogram of {record.key}", said, class_="strip sound"))
        cards.append(html.tag("div", *parts))
    return html.join(html.tag("p", about, class_="muted"), html.tag("div", *cards, class_="cards"))


def _view(name: str, about: str, rows: Rows, skipped: int) -> html.Html:
    left_out = f" {skipped:,} records cannot serve these views." if skipped else ""
    said = f"{about}. As the loader yields it, normalisation undone.{left_out}"
    figures = [html.figure(picture, f"{name} of {title}", title) for title, picture in rows]
    return html.join(html.tag("p", said, class_="muted"), html.tag("div", *figures, class_="views"))


def _print(numbers: Mapping[str, Any], page: Path, args: Args) -> None:
    if args.json:
        print(json.dumps(numbers, indent=2))
        return
    for key, reason in numbers["damaged"].items():
        print(f"damaged: {key}: {reason}", file=sys.stderr)
    rejected = sum(numbers["rejected"].values())
    counts = f"{numbers['records']:,} records, {numbers['frames']:,} frames, {rejected:,} rejected"
    print(f"{counts}, {numbers['hours']:.3g} h\n{page}")
