"""One self-contained HTML file: escaped text, pictures and charts inside, light and dark, no script, no request.

Everything returns `Html`, text that is already markup; whatever else reaches `tag` is escaped. Charts are drawn in a
small coordinate system so that their letters stay readable on a phone, and stand in a grid on wide screens.
"""

from __future__ import annotations

import base64
import html as _escape
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipmill.tools.html_style import STYLE

MAX_POINTS = 240  # per line of a chart; more are averaged in bins
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4", "4 4", "12 3 3 3")
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 10, 36

Pairs = tuple[Sequence[float], Sequence[float]]


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a value; control characters and broken Unicode become visible replacements.

    >>> text("<b> & \\x00")
    '&lt;b&gt; &amp; \\ufffd'
    """
    if isinstance(value, Html):
        return value
    clean = "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in str(value))
    return Html(_escape.escape(clean))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Attributes: ``class_`` gives ``class``, other underscores become dashes, None leaves one out.

    >>> tag("a", "1 < 2", class_="x", data_n=3)
    '<a class="x" data-n="3">1 &lt; 2</a>'
    """
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    head = "".join(f' {key}="{text(value)}"' for key, value in pairs)
    if name in ("img", "br", "meta"):
        return Html(f"<{name}{head}>")
    return Html(f"<{name}{head}>{''.join(map(text, children))}</{name}>")


def join(*parts: object) -> Html:
    """Parts one after the other."""
    return Html("".join(map(text, parts)))


def page(title: str, subtitle: object, sections: Sequence[tuple[str, Html]]) -> Html:
    """A whole document: a heading, a list of contents, and titled sections."""
    names = [(f"s{number}", name) for number, (name, _) in enumerate(sections)]
    contents = tag("nav", *(tag("a", name, href=f"#{mark}") for mark, name in names), aria_label="Contents")
    bodies = [
        tag("section", tag("h2", name, id=mark), body, aria_labelledby=mark)
        for (mark, name), (_, body) in zip(names, sections, strict=True)
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = join(
        Html('<meta charset="utf-8">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    top = tag("header", tag("h1", title), tag("p", subtitle, class_="muted"), contents if len(sections) > 1 else "")
    return Html(
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{top}{tag("main", *bodies)}</body></html>\n'
    )


def write_page(path: Path, document: Html) -> None:
    """Write a document; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(document, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- text and tables ----------------------------------------------------------------------------------------


def number(value: object) -> str:
    """A number in at most about four digits; other values as they are, None as a dash.

    >>> number(0.123456), number(1234567), number(3.0), number(2.5e-05), number(None), number("x")
    ('0.1235', '1,234,567', '3', '2.5e-05', '–', 'x')
    """
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(float(value))
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def size_text(num_bytes: float) -> str:
    """Bytes in binary units.

    >>> size_text(1536), size_text(3 << 30)
    ('1.5 KiB', '3.0 GiB')
    """
    power = 0
    while num_bytes >= 1024 and power < 4:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def note(message: object, kind: str = "info") -> Html:
    """A remark in a box; ``kind`` is ``info`` or ``warn``."""
    return tag("p", tag("strong", "Attention: ") if kind == "warn" else "", message, class_=f"note {kind}")


def tiles(values: Mapping[str, object]) -> Html:
    """Key numbers side by side."""
    boxes = [tag("div", tag("dt", name), tag("dd", cell(value))) for name, value in values.items()]
    return tag("dl", *boxes, class_="tiles")


def cell(value: object) -> Html:
    """A table cell's content: numbers short, everything else escaped."""
    return text(value if isinstance(value, Html) else number(value))


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str, limit: int = 200) -> Html:
    """A table that scrolls sideways when it is wide. Only ``limit`` rows are shown, and the caption says so."""
    kinds = ["num" if _is_numeric([row[i] for row in rows]) else None for i in range(len(head))]
    titles = [tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True)]
    body = [
        tag("tr", *(tag("td", cell(value), class_=kind) for value, kind in zip(row, kinds, strict=True)))
        for row in rows[:limit]
    ]
    more = f" (the first {limit:,} of {len(rows):,} rows)" if len(rows) > limit else ""
    grid = tag("table", tag("caption", caption + more), tag("thead", tag("tr", *titles)), tag("tbody", *body))
    return tag("div", grid, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _is_numeric(values: Sequence[object]) -> bool:
    kinds = [isinstance(value, int | float | np.number) for value in values if value is not None]
    return bool(kinds) and all(kinds)


def details(summary: str, body: Html, open_: bool = False) -> Html:
    """A part that unfolds on a click."""
    return tag("details", tag("summary", summary), body, open="" if open_ else None)


def grid(*parts: Html) -> Html:
    """Parts side by side where there is room."""
    return tag("div", *parts, class_="grid")


# --- pictures -----------------------------------------------------------------------------------------------


def png(picture: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", optimize=True)
    return out.getvalue()


def figure(picture: np.ndarray | bytes, alt: str, caption: object, kind: str = "png", class_: str = "picture") -> Html:
    """A picture inside the page. ``picture``: pixels, or the bytes of a file of the given kind."""
    data = png(picture) if isinstance(picture, np.ndarray) else picture
    address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    frame = tag("div", tag("img", src=address, alt=alt), class_="scroll", tabindex=0, role="region", aria_label=alt)
    return tag("figure", frame, tag("figcaption", caption), class_=class_)


# --- charts -------------------------------------------------------------------------------------------------


def line_chart(title: str, lines: Mapping[str, Pairs], x_label: str, y_label: str = "") -> Html:
    """A chart of one or more lines. Values that are not finite leave gaps and are counted under the chart."""
    thinned = {name: _thin(np.asarray(xs, float), np.asarray(ys, float)) for name, (xs, ys) in lines.items()}
    finite = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in thinned.values()]
    xs, ys = (np.concatenate([pair[i] for pair in finite] or [np.empty(0)]) for i in (0, 1))
    if not len(xs):
        return tag("figure", tag("h3", title), tag("p", "no finite values", class_="muted"), class_="chart")
    x_ticks, y_ticks = ticks(xs.min(), xs.max()), ticks(ys.min(), ys.max())
    frame = _Frame((xs.min(), xs.max()), (min(ys.min(), y_ticks[0]), max(ys.max(), y_ticks[-1])))
    paths = [
        Html(f'<path class="line c{i % 8}" stroke-dasharray="{_DASHES[i % 8]}" d="{frame.path(x, y)}">')
        + tag("title", name)
        + "</path>"
        for i, (name, (x, y)) in enumerate(thinned.items())
    ]
    said = "; ".join(
        f"{name}: {number(y[0])} to {number(y[-1])}" for name, (_, y) in zip(lines, finite, strict=True) if len(y)
    )
    parts = [tag("h3", title), frame.svg(Html("".join(paths)), x_ticks, y_ticks, x_label, y_label, f"{title}. {said}")]
    if len(lines) > 1:
        parts.append(_legend(list(lines)))
    return tag("figure", *parts, tag("figcaption", _summary(lines)), class_="chart")


def _summary(lines: Mapping[str, Pairs]) -> str:
    parts = []
    for name, (_, values) in lines.items():
        y = np.asarray(values, float)
        good = y[np.isfinite(y)]
        said = (
            f"last {number(good[-1])}, from {number(good.min())} to {number(good.max())}" if len(good) else "no values"
        )
        lost = f", {len(y) - len(good)} not finite" if len(good) < len(y) else ""
        parts.append(f"{name}: {said}{lost}" if len(lines) > 1 else said + lost)
    return "; ".join(parts)


def histogram(title: str, values: np.ndarray, x_label: str, bins: int = 24) -> Html:
    """Columns that count values."""
    values = np.asarray(values, float)
    if not len(values):
        return tag("figure", tag("h3", title), tag("p", "no values", class_="muted"), class_="chart")
    low, high = float(values.min()), float(values.max())
    pad = 0.0 if high > low else max(abs(high) * 0.05, 0.5)
    counts, edges = np.histogram(values, _bin_count(len(values), bins) if high > low else 1, (low - pad, high + pad))
    y_ticks = [tick for tick in ticks(0, counts.max()) if tick == int(tick)]
    frame = _Frame((edges[0], edges[-1]), (0.0, max(y_ticks[-1], counts.max())))
    columns = []
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        (x0, y0), (x1, y1) = frame.at(left, count), frame.at(right, 0)
        label = tag("title", f"{number(left)} to {number(right)}: {count:,}")
        wide = max(x1 - x0 - 1, 0.5)
        columns.append(
            f'<rect class="column" x="{x0:.1f}" y="{y0:.1f}" width="{wide:.1f}" height="{y1 - y0:.1f}">{label}</rect>'
        )
    middle = f"median {number(float(np.median(values)))}, from {number(low)} to {number(high)}"
    picture = frame.svg(Html("".join(columns)), ticks(edges[0], edges[-1]), y_ticks, x_label, "", f"{title}: {middle}")
    return tag(
        "figure", tag("h3", title), picture, tag("figcaption", f"{len(values):,} values, {middle}"), class_="chart"
    )


def _bin_count(num_values: int, most: int) -> int:
    return min(most, max(8, math.ceil(2 * num_values**0.5)))


def bars(
    caption: str, rows: Sequence[tuple[str, float, str]], total: float | None = None, stacked: bool = False
) -> Html:
    """Horizontal bars as a real table: (name, value, what to print).

    total: the value of a full bar, default the largest (or the sum if stacked). stacked: every bar begins where the
    one before it ended (a waterfall).
    """
    whole = total or (sum(value for _, value, _ in rows) if stacked else max((v for _, v, _ in rows), default=0)) or 1.0
    lines, start = [], 0.0
    for i, (name, value, said) in enumerate(rows):
        style = f"margin-left:{100 * start / whole:.2f}%;width:{100 * value / whole:.2f}%"
        bar = tag("div", class_=f"bar b{i % 8 if stacked else 0}", style=style)
        lines.append(
            tag("tr", tag("th", name, scope="row"), tag("td", bar, class_="track"), tag("td", said, class_="num"))
        )
        start += value if stacked else 0.0
    return tag("table", tag("caption", caption), tag("tbody", *lines), class_="bars")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers in [low, high]; around the value when both are one.

    >>> ticks(0, 9.4), ticks(3, 3)
    ([0.0, 2.0, 4.0, 6.0, 8.0], [2.6, 2.8, 3.0, 3.2, 3.4])
    """
    if not high > low:
        pad = abs(low) / 6 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal bins when there are more points than a chart can show; a bin without a finite value is a gap."""
    if len(x) <= MAX_POINTS:
        return x, y
    bounds = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
    good = np.isfinite(y)
    sums, counts = np.add.reduceat(np.where(good, y, 0.0), bounds[:-1]), np.add.reduceat(good.astype(int), bounds[:-1])
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.add.reduceat(x, bounds[:-1]) / np.diff(bounds), means


class _Frame:
    """The plotting area: values to coordinates, and the axes around it."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x0, self.y0 = x_range[0], y_range[0]
        self.x_span = (x_range[1] - x_range[0]) or 1.0
        self.y_span = (y_range[1] - y_range[0]) or 1.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / self.x_span * (_WIDTH - _LEFT - _RIGHT)
        up = (y - self.y0) / self.y_span * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    def path(self, xs: np.ndarray, ys: np.ndarray) -> str:
        parts, pen = [], "M"
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            if math.isfinite(y):
                parts.append("{}{:.1f} {:.1f}".format(pen, *self.at(x, y)))
                pen = "L"
            else:
                pen = "M"
        if len(parts) == 1:
            parts.append("h0.1")  # a lone point still shows, by its round cap
        return "".join(parts)

    def svg(
        self, marks: Html, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str, said: str
    ) -> Html:
        parts = []
        for tick in y_ticks:
            _, y = self.at(self.x0, tick)
            parts.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(tag("text", _tick_text(tick, y_ticks), x=_LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"))
        for tick in x_ticks:
            x, _ = self.at(tick, self.y0)
            anchor = "end" if x > _WIDTH - _RIGHT - 12 else "middle"  # the last label stays inside
            label = _tick_text(tick, x_ticks)
            parts.append(tag("text", label, x=f"{x:.1f}", y=_HEIGHT - _BOTTOM + 14, text_anchor=anchor))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(tag("text", x_label, x=middle, y=_HEIGHT - 6, text_anchor="middle", class_="label"))
        if y_label:
            turned = f"translate(10 {(_HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)"
            parts.append(tag("text", y_label, transform=turned, text_anchor="middle", class_="label"))
        box = f"0 0 {_WIDTH} {_HEIGHT}"
        return tag("svg", Html("".join(parts)), marks, viewBox=box, role="img", aria_label=said)


def _tick_text(tick: float, all_ticks: Sequence[float]) -> str:
    step = abs(all_ticks[1] - all_ticks[0]) if len(all_ticks) > 1 else abs(tick)
    largest = max(abs(value) for value in all_ticks)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return f"{tick:.3g}" if tick else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    if step and abs(round(step, decimals) - step) > step * 1e-6:
        decimals += 1  # steps of 2.5
    return f"{tick:,.{decimals}f}"


def _legend(names: Sequence[str]) -> Html:
    items = []
    for i, name in enumerate(names):
        stroke = Html(f'<path class="line c{i % 8}" stroke-dasharray="{_DASHES[i % 8]}" d="M1 4H23"/>')
        sample = tag("svg", stroke, viewBox="0 0 24 8", aria_hidden="true")
        items.append(tag("li", sample, name))
    return tag("ul", *items, class_="legend")
