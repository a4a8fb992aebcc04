"""The results of a benchmark as text, Markdown and a page with bars; all of it from the JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipmill.tools import html
from clipmill.tools.bench.goals import judged, over, speed

HEAD = ("contestant", "clips/s", "quartiles", "clips per core second", "clipmill / it", "same, per core second",
        "first batch s", "MB", "right")  # fmt: skip
HOW = (
    "All contestants of a table serve the same requests in turn, round after round, each in a process of its own; "
    "medians over the rounds, without the warm-up. Ratios are medians of the ratios of each round. Clips per core "
    "second count processor time, so they suffer less from other work on the machine; one-core goals are judged by "
    "them. right: share of the looked-at requests whose frames are those that were asked for."
)


def machine() -> str:
    """What this machine is, in a few words."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{number} cores, {platform.machine()}, {platform.system()}"


def merged(before: Mapping[str, Any] | None, tables: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """The results with new tables, which replace those of the same track, data and pattern."""
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    new = {_key(table): table | {"date": now, **facts} for table in tables}
    old = {_key(table): table for table in (before or {}).get("tables", [])}
    kept = list((old | new).values())
    return {"tables": kept, "goals": judged(kept)}


def _key(table: Mapping[str, Any]) -> tuple[str, str, str]:
    return table["track"], table["data"], table["pattern"]


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write bench.json, RESULTS.md and bench.html into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (folder / "RESULTS.md").write_text(markdown(results), "utf-8")
    html.write_page(folder / "bench.html", page(results))


# --- rows ---------------------------------------------------------------------------------------------------


def title(table: Mapping[str, Any]) -> str:
    """The heading of a table."""
    return ", ".join(part for part in (table["track"], table["data"], table["pattern"]) if part)


def rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Texts of the columns `HEAD` for all contestants, fastest first; those that did not take part say why."""
    ours = next((one for one in table["results"] if one["label"] == "clipmill" and one["clips_s"]), None)
    found = []
    for one in sorted(table["results"], key=lambda one: -(speed(one, cpu=True) or 0)):
        quartiles = one["quartiles"]
        if not quartiles:
            found.append([one["label"], "-", one["missing"], *["-"] * (len(HEAD) - 3)])
            continue
        ratios = [over(ours, one, cpu) if ours else None for cpu in (False, True)]
        first = sorted(one["first_s"])[len(one["first_s"]) // 2] if one["first_s"] else None
        values = [first or None, one["memory_mb"], one["right_frames"]]
        found.append([
            one["label"], _short(quartiles[1]), f"{_short(quartiles[0])} - {_short(quartiles[2])}",
            _short(speed(one, cpu=True)), *map(_short, ratios), *map(_short, values),
        ])  # fmt: skip
    return found


def goal_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """What was promised, measured, and whether it holds."""
    verdicts = {True: "yes", False: "no", None: "not measured"}
    return [[one["what"], one["goal"], _short(one["measured"]), verdicts[one["met"]]] for one in results["goals"]]


def facts_of(table: Mapping[str, Any]) -> list[list[str]]:
    """Name and text of everything else that was measured."""
    facts = dict(table["facts"])
    for one in table["results"]:
        if one["label"] == "clipmill" and "decoded_per_used" in one["facts"]:
            facts["frames decoded per frame used"] = one["facts"]["decoded_per_used"]
        for name in ("packed_mb_per_10s", "psnr_db"):  # of encodings that are compared
            if name in one["facts"]:
                facts[f"{one['label']}: {name}"] = one["facts"][name]
    return [[name.replace("_", " "), _short(value)] for name, value in facts.items()]


def versions(results: Mapping[str, Any]) -> list[str]:
    """``package version`` of all that took part."""
    found = {
        f"{name} {version}"
        for table in results["tables"]
        for one in table["results"]
        for name, version in one["versions"].items()
    }
    return sorted(found, key=str.lower)


def _short(value: object) -> str:
    return "-" if value is None else html.number(value)


# --- documents ----------------------------------------------------------------------------------------------


def text(results: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = []
    for table in results["tables"]:
        parts.append(title(table))
        if table["results"]:
            parts.append(_columns([list(HEAD), *rows(table)]))
        else:
            parts.append(_columns(facts_of(table)))
    parts += ["goals", _columns([["what", "goal", "measured", "met"], *goal_rows(results)])]
    return "\n\n".join(parts)


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(results: Mapping[str, Any]) -> str:
    """For a repository."""
    parts = ["# Benchmark results", "Written by `clipmill bench --out FOLDER`. " + HOW]
    parts += ["## Goals", _pipes(("what", "goal", "measured", "met"), goal_rows(results))]
    for table in results["tables"]:
        parts += [f"## {title(table)}", f"{table['date']}, {table['machine']}; load {table['load']}."]
        if table["results"]:
            parts.append(_pipes(HEAD, rows(table)))
        if table["facts"]:
            parts.append("; ".join(f"{name} {value}" for name, value in facts_of(table)) + ".")
    parts += ["## Versions", ", ".join(versions(results)) + "."]
    return "\n\n".join(parts) + "\n"


def _pipes(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    made = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in made)


def page(results: Mapping[str, Any]) -> html.Html:
    """A page with a bar per contestant."""
    sections = [("Goals", html.table(("what", "goal", "measured", "met"), goal_rows(results), HOW))]
    for table in results["tables"]:
        body = []
        if table["results"]:
            order = sorted(table["results"], key=lambda one: -(speed(one, cpu=True) or 0))
            bars = [(one["label"], value, _short(value)) for one in order if (value := speed(one, cpu=True))]
            body += [html.bars("clips per core second", bars), html.table(HEAD, rows(table), "all numbers")]
        body.append(html.table(("", ""), facts_of(table), f"{table['date']}, {table['machine']}"))
        sections.append((title(table), html.join(*body)))
    return html.page("clipmill bench", ", ".join(versions(results)), sections)
