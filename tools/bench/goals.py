"""What the project promises, and what the tables of a benchmark say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipmill.tools.bench.patterns import PATTERNS

Json = Mapping[str, Any]
_CLIP = PATTERNS["clip"].name
_SPARSE = (PATTERNS["segments"].name, PATTERNS["frame"].name)
_BOUND = "torchcodec kept open"  # not possible over a corpus


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise. measure: value from the tables, None if they do not tell. at_most: else at least ``goal``."""

    what: str
    goal: float
    unit: str
    measure: Callable[[Sequence[Json]], float | None]
    at_most: bool = False

    def judge(self, tables: Sequence[Json]) -> dict[str, Any]:
        """{what, goal, unit, measured, met}; ``met`` is None where nothing was measured."""
        value = self.measure(tables)
        met = None if value is None else bool(value <= self.goal if self.at_most else value >= self.goal)
        sign = "<=" if self.at_most else ">="
        return {"what": self.what, "goal": f"{sign} {self.goal:g}{self.unit}", "measured": value, "met": met}


def speed(result: Json, cpu: bool) -> float | None:
    """Median clips per second of processor time, or by wall clock; None if it did not take part."""
    found = result["cpu_quartiles" if cpu else "quartiles"]
    return found[1] if found else None


def over(mine: Json, other: Json, cpu: bool) -> float | None:
    """Median of the ratios of two contestants' speeds, round by round."""
    name = "cpu_clips_s" if cpu else "clips_s"
    pairs = sorted(a / b for a, b in zip(mine[name], other[name], strict=False))
    return pairs[len(pairs) // 2] if pairs else None


def _named(table: Json, label: str) -> Json | None:
    return next((result for result in table["results"] if result["label"] == label and result["clips_s"]), None)


def _peers(table: Json) -> list[Json]:
    return [one for one in table["results"] if one["role"] == "peer" and one["clips_s"] and one["label"] != _BOUND]


def _least(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return min(found) if found else None


def _over_peers(track: str, patterns: Sequence[str]) -> Callable[[Sequence[Json]], float | None]:
    """Our speed over that of the best peer, the least of all tables of a track and patterns. One core each."""

    def measure(tables: Sequence[Json]) -> float | None:
        return _least(
            over(mine, peer, cpu=True)
            for table in tables
            if table["track"] == track and table["pattern"] in patterns and (mine := _named(table, "clipmill"))
            for peer in _peers(table)
        )

    return measure


def _between(
    track: str, a: str, b: str, patterns: Sequence[str], cpu: bool
) -> Callable[[Sequence[Json]], float | None]:
    """Speed of contestant ``a`` over that of ``b``, the least of all tables of a track and patterns."""

    def measure(tables: Sequence[Json]) -> float | None:
        return _least(
            over(mine, other, cpu)
            for table in tables
            if table["track"] == track and table["pattern"] in patterns
            if (mine := _named(table, a)) and (other := _named(table, b))
        )

    return measure


def _over_both_floors(tables: Sequence[Json]) -> float | None:
    """Our time against that of the decode floor and of the copy floor, one after the other; one core."""
    for table in tables:
        contestants = [_named(table, name) for name in ("clipmill", "decode floor", "copy floor")]
        if table["track"] == "same bits" and table["pattern"] == _CLIP and all(contestants):
            rounds = zip(*(one["cpu_clips_s"] for one in contestants if one), strict=True)
            found = sorted(ours / decode + ours / copy for ours, decode, copy in rounds)
            return found[len(found) // 2]
    return None


def _fact(track: str, name: str, **wanted: object) -> Callable[[Sequence[Json]], float | None]:
    def measure(tables: Sequence[Json]) -> float | None:
        found = [table["facts"] for table in tables if table["track"] == track]
        return next((f[name] for f in found if name in f and wanted.items() <= f.items()), None)

    return measure


def _over_ffmpeg(tables: Sequence[Json]) -> float | None:
    """Of the table of pack with the most videos: with one, the start of the program is half of it."""
    found = [table["facts"] for table in tables if table["track"] == "pack"]
    return max(found, key=lambda facts: facts["videos"]).get("cpu_speed_over_ffmpeg") if found else None


def _frames_per_second(tables: Sequence[Json]) -> float | None:
    """Of the ceiling's ``auto`` setting; a clip has 16 frames."""
    table = next((table for table in tables if table["track"] == "ceiling"), None)
    auto = _named(table, "auto") if table else None
    value = speed(auto, cpu=False) if auto else None
    return value and 16 * value


_MILLION_MB = _fact("index", "index_mb", records=1_000_000)  # resident, mapped pages included
GOALS = (
    Goal("raw files, best peer on them against clipmill on its shard", 30, "x", _over_peers("raw", [_CLIP])),
    Goal("same bits, best peer", 1.8, "x", _over_peers("same bits", [_CLIP])),
    Goal("same bits, libavcodec floor", 0.95, "x", _between("same bits", "clipmill", "decode floor", [_CLIP], True)),
    Goal("same bits, libavcodec and copy floor, in turn", 0.95, "x", _over_both_floors),
    Goal("2 threads over 1", 1.85, "x", _between("scaling", "2 threads", "1 thread", [_CLIP], False)),
    Goal("same bits, sparse frames, best peer", 2, "x", _over_peers("same bits", _SPARSE)),
    Goal("sparse frames, profile intra over cpu", 3, "x", _between("profile", "intra", "cpu", _SPARSE, True)),
    Goal("sparse frames, profile jpeg over cpu", 3, "x", _between("profile", "jpeg", "cpu", _SPARSE, True)),
    Goal("end to end on the CPU, best peer + torchvision v2", 2, "x", _over_peers("end to end", [_CLIP])),
    Goal("pack over ffmpeg's command line", 1, "x", _over_ffmpeg),
    Goal("loader with 32x32 frames", 100_000, " frames/s", _frames_per_second),
    Goal("1,000,000 records: open", 0.5, " s", _fact("index", "open_s", records=1_000_000), at_most=True),
    Goal("1,000,000 records: first batch", 1, " s", _fact("index", "first_batch_s", records=1_000_000), at_most=True),
    Goal("1,000,000 records: memory beyond that of 1,000", 150, " MB", _MILLION_MB, at_most=True),
    Goal("growth over 10,000 clips", 1, " MB", _fact("soak", "slope_mb_per_10000_clips"), at_most=True),
    Goal("GPU: share of waiting for data", 0.02, "", _fact("step", "wait_share", device="cuda"), at_most=True),
    Goal("GPU: augment kernel over copy", 0.6, "x", _fact("augment", "crop_flip_of_copy", device="cuda")),
)


def judged(tables: Sequence[Json]) -> list[dict[str, Any]]:
    """All goals, see `Goal.judge`."""
    return [goal.judge(tables) for goal in GOALS]
