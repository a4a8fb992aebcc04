"""The page writer: escaping, self-containment, well-formed markup, charts that say what the numbers are."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipmill.tools import html

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Fails on tags that do not nest; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def parsed(document: str) -> Checker:
    checker = Checker()
    checker.feed(document)
    checker.close()
    assert checker.open == []
    return checker


def everything() -> html.Html:
    rng = np.random.default_rng(0)
    steps = np.arange(1000.0)
    body = html.join(
        html.tiles({"records": 12345, "loss": 0.12345, "none": None}),
        html.note("careful <here>", "warn"),
        html.table(("name", "n"), [("a<b", 1), ("c", None)], "Two rows"),
        html.figure(rng.integers(0, 255, (8, 9, 3), np.uint8), "noise", "eight by nine"),
        html.line_chart("loss", {"one": (steps, steps**0.5), "two": (steps, -steps)}, "step"),
        html.histogram("sizes", rng.normal(size=100), "pixels"),
        html.bars("stages", [("read", 1.0, "1 s"), ("decode", 3.0, "3 s")], stacked=True),
        html.details("more", html.tag("p", "inside")),
    )
    return html.page("Title & more", "sub", [("First", body), ("Second", html.tag("p", "x"))])


def test_a_page_is_well_formed_and_asks_for_nothing_outside():
    document = everything()
    checker = parsed(document)
    links = [value for _, attributes in checker.seen for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith(("data:image/", "#s")) for link in links)
    assert "script" not in {tag for tag, _ in checker.seen}
    assert not re.search(r"url\(|@import|https?:", document)
    policy = [a["content"] for a in checker.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_page_can_be_used_without_seeing_it():
    checker = parsed(everything())
    assert checker.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in checker.all("img"))
    charts = [svg for svg in checker.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(charts) == 2
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    assert len(checker.all("caption")) == len(checker.all("table")) == 2
    assert all(cell["scope"] for cell in checker.all("th"))
    targets = {attributes["id"] for _, attributes in checker.seen if "id" in attributes}
    assert {a["href"].lstrip("#") for a in checker.all("a")} <= targets


def test_both_colour_schemes_and_small_screens_are_styled():
    document = everything()
    assert "prefers-color-scheme:dark" in document
    assert "width=device-width" in document
    light, dark = document.split("@media (prefers-color-scheme:dark)")[:2]
    assert set(re.findall(r"--[\w-]+(?=:)", light)) == set(re.findall(r"--[\w-]+(?=:)", dark.split("}}")[0]))


@given(st.text())
def test_text_cannot_become_markup(words: str):
    assert parsed(html.tag("p", words, title=words)).seen[0][0] == "p"
    assert len(parsed(html.tag("p", words, title=words)).seen) == 1


def test_broken_unicode_and_control_characters_can_be_written(tmp_path: Path):
    page = tmp_path / "new" / "page.html"
    html.write_page(page, html.page("a\x00b\udcff\u202e", "", [("x", html.tag("p", "é–ü"))]))
    assert "a\ufffdb\ufffd\ufffd" in page.read_text("utf-8")
    assert "é–ü" in page.read_text("utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_writing_that_fails_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "page.html"
    html.write_page(page, html.Html("old"))

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        html.write_page(page, html.Html("new"))
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_pictures_are_inside_without_loss():
    pixels = np.random.default_rng(1).integers(0, 255, (5, 7, 3), np.uint8)
    address = parsed(html.figure(pixels, "noise", "")).all("img")[0]["src"]
    head, data = address.split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)


def test_a_table_aligns_numbers_and_says_what_it_leaves_out():
    checker = parsed(html.table(("name", "n"), [(f"r{i}", i) for i in range(9)], "Rows", limit=4))
    assert len(checker.all("tr")) == 5
    assert [cell.get("class") for cell in checker.all("td")[:2]] == [None, "num"]
    assert "Rows (the first 4 of 9 rows)" in checker.words


def coordinates(path: str) -> list[list[tuple[float, float]]]:
    """The runs of points of an SVG path of M and L commands."""
    runs = [run.split("L") for run in path.split("M")[1:]]
    return [[tuple(map(float, point.split("h")[0].split())) for point in run] for run in runs]


def test_a_line_goes_through_its_points_and_leaves_gaps():
    xs, ys = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 5.0, float("nan"), 10.0, 0.0]
    chart = html.line_chart("loss", {"run": (xs, ys)}, "step")
    runs = coordinates(next(p["d"] for p in parsed(chart).all("path") if p["class"].startswith("line")))
    assert [len(run) for run in runs] == [2, 2]
    points = [point for run in runs for point in run]
    scale = (points[3][0] - points[0][0]) / 4
    assert points[1][0] - points[0][0] == pytest.approx(scale, abs=0.1)
    assert points[0][1] == points[3][1]
    assert points[0][1] - points[1][1] == pytest.approx((points[0][1] - points[2][1]) / 2, abs=0.1)
    assert "1 not finite" in chart
    assert "last 0, from 0 to 10" in chart


@pytest.mark.parametrize("ys", [[], [float("nan")] * 3])
def test_a_chart_without_values_says_so(ys: list[float]):
    assert "no finite values" in html.line_chart("loss", {"run": (list(range(len(ys))), ys)}, "step")


def test_single_and_constant_values_have_a_chart():
    for ys in ([3.0], [2.0, 2.0, 2.0], [1e-9, 2e-9], [1e12, 3e12], [-4.0]):
        chart = parsed(html.line_chart("x", {"run": (list(range(len(ys))), ys)}, "step"))
        assert "nan" not in str(chart.seen)
        assert any(path["class"] == "line c0" for path in chart.all("path"))


def test_many_points_are_averaged_and_gaps_kept():
    xs = np.arange(24_000.0)
    ys = np.where((xs > 8000) & (xs < 12_000), np.nan, 7.0)
    d = next(p["d"] for p in parsed(html.line_chart("x", {"a": (xs, ys)}, "s")).all("path") if p["class"][:4] == "line")
    runs = coordinates(d)
    assert len(runs) == 2
    assert sum(map(len, runs)) <= html.MAX_POINTS
    assert len({y for run in runs for _, y in run}) == 1


def test_more_than_one_line_has_a_legend_and_differs_by_more_than_colour():
    chart = parsed(html.line_chart("x", {f"run {i}": ([0, 1], [i, i + 1]) for i in range(4)}, "step"))
    assert len(chart.all("li")) == 4
    strokes = [p["stroke-dasharray"] for p in chart.all("path") if p["class"].startswith("line")]
    assert len(set(strokes)) == 4


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_histogram_counts_every_value_once(values: list[float]):
    chart = html.histogram("x", np.array(values), "units")
    counts = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+)</title>", chart)]
    assert sum(counts) == len(values)


def test_stacked_bars_begin_where_the_last_one_ended():
    rows = [("wait", 1.0, ""), ("augment", 2.0, ""), ("step", 5.0, "")]
    styles = [div["style"] for div in parsed(html.bars("loop", rows, stacked=True)).all("div")]
    numbers = [tuple(map(float, re.findall(r"[\d.]+(?=%)", style))) for style in styles]
    assert numbers == [(0.0, 12.5), (12.5, 25.0), (37.5, 62.5)]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_numbers_inside(low: float, span: float):
    found = html.ticks(low, low + span)
    slack = 1e-6 * max(abs(low), span)
    assert 1 <= len(found) <= 11
    assert found[0] >= low - slack
    assert found[-1] <= low + span + slack
