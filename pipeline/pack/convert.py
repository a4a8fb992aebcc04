"""One kind of frame to the canonical kind: size, square pixels, upright, 8-bit 4:2:0, limited range, one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame

from clipmill.pipeline.pack.outcome import Rejected
from clipmill.pipeline.pack.settings import MAX_SIDE

# without bitexact and accurate_rnd the result would depend on the instruction set
_SCALE = "flags=bicubic+accurate_rnd+full_chroma_int+bitexact:sws_dither=none"
# colour space numbers of ITU-T H.273: the colorspace filter's name, and the matrix of a record
_SPACES = {
    1: ("bt709", "bt709"), 5: ("bt470bg", "bt601"), 6: ("smpte170m", "bt601"), 9: ("bt2020ncl", "bt2020"),
    10: ("bt2020ncl", "bt2020"), 4: ("fcc", ""), 7: ("smpte240m", ""), 8: ("ycgco", ""),
}  # fmt: skip
_TICK = Fraction(1, 1000)  # of the filters; they do not use it
_H273 = {"bt709": 1, "bt601": 6, "bt2020": 9}
_TURNS = {(False, False): "", (True, False): "hflip", (False, True): "vflip", (True, True): "hflip,vflip"}
_TRANSPOSES = {(1, 1): "cclock_flip", (1, -1): "clock", (-1, 1): "cclock", (-1, -1): "clock_flip"}


@dataclass(frozen=True, slots=True)
class Look:
    """All properties of a decoded frame that decide how it is converted.

    turn: filters that put it upright. space: name of its YUV matrix, empty for RGB and grey. guessed: the file does not
    say the matrix; then, as players do, BT.709 from HD sizes up and BT.601 below.
    """

    width: int
    height: int
    pix_fmt: str
    sar: Fraction
    turn: str
    space: str
    matrix: str
    full_range: bool
    guessed: bool

    @staticmethod
    def of(frame: VideoFrame, sar: Fraction | None) -> Look:
        """Look at a frame of a stream with this sample aspect ratio."""
        width, height = frame.width, frame.height
        space = int(frame.colorspace)
        yuv = not frame.format.is_rgb and not frame.format.has_palette
        guessed = yuv and space not in _SPACES
        if guessed:
            space = 1 if width >= 1280 or height > 576 else 6
        name, matrix = _SPACES[space] if yuv else ("", "bt709")
        full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
        if sar is None or not Fraction(1, 8) <= sar <= 8:  # not said, or nonsense
            sar = Fraction(1)
        return Look(width, height, frame.format.name, sar, upright(frame), name, matrix, full, guessed)


def upright(frame: VideoFrame) -> str:
    """The filters that undo a frame's display matrix: a multiple of 90 degrees, perhaps mirrored.

    Source: FFmpeg's display matrix (libavutil/display.h): (x', y') = (a x + c y, b x + d y), in 16.16 fixed point.
    """
    data = cast(Mapping[Type, Any], frame.side_data).get(Type.DISPLAYMATRIX)
    if data is None:
        return ""
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):  # nearer to 0 or 180 degrees than to 90 or 270
        return _TURNS[a < 0, d < 0]
    return "transpose=" + _TRANSPOSES[1 if b > 0 else -1, 1 if c > 0 else -1]


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size of all frames of a record, in pixels, upright and square; both even."""

    width: int
    height: int

    @staticmethod
    def of(look: Look, short_side: int | None) -> Canvas:
        """The canonical size for the first frame of a source. Odd sizes lose one row or column, scaled ones are
        rounded to even."""
        width, height = look.width * look.sar, Fraction(look.height)
        if look.turn.startswith("transpose"):
            width, height = height, width
        scale = min(Fraction(1), Fraction(short_side or MAX_SIDE) / min(width, height)) if short_side else Fraction(1)
        if scale == 1 and look.sar == 1:
            size = int(width) & ~1, int(height) & ~1
        else:
            size = 2 * round(width * scale / 2), 2 * round(height * scale / 2)
        if max(size) > MAX_SIDE:
            raise Rejected("too_large", f"{size[0]}x{size[1]} pixels, {MAX_SIDE} is the largest side")
        return Canvas(max(size[0], 2), max(size[1], 2))


class Converter:
    """Turns decoded frames into canonical ones; frames that are canonical already pass through untouched.

    matrix, full_range: the YUV matrix and range of what comes out.
    """

    def __init__(self, canvas: Canvas, matrix: str, full_range: bool = False) -> None:
        self.canvas = canvas
        self.matrix = matrix
        self.full_range = full_range
        self._look: Look | None = None
        self._graph: tuple[Graph, Any, Any] | None = None

    def __call__(self, frame: VideoFrame, look: Look) -> VideoFrame:
        """The canonical frame."""
        if look != self._look:
            filters = self.filters(look)
            self._graph = _graph(look, filters) if filters else None
            self._look = look
        if self._graph is not None:
            _, source, sink = self._graph
            frame.pts, frame.time_base = 0, _TICK
            source.push(frame)
            frame = sink.pull()
        return frame

    def filters(self, look: Look) -> list[str]:
        """The chain for one kind of frame."""
        width, height = self.canvas.width, self.canvas.height
        if look.turn.startswith("transpose"):
            width, height = height, width
        chain: list[str] = []
        cropped = replace(look, width=look.width & ~1, height=look.height & ~1)
        if look.sar == 1 and (cropped.width, cropped.height) == (width, height) and cropped != look:
            chain.append(f"crop={width}:{height}:0:0:exact=1")
            look = cropped
        inside = look.space or "bt709"
        form = (look.width, look.height, look.pix_fmt, look.matrix)
        if self.full_range and look.full_range and form == (width, height, "yuvj420p", self.matrix):
            return chain + (look.turn.split(",") if look.turn else [])
        if (look.width, look.height, look.pix_fmt, look.full_range) != (width, height, "yuv420p", False):
            matrices = "bt2020" if inside == "bt2020ncl" else inside
            if inside == "ycgco":  # libswscale does not know it; the next filter does the change
                matrices = "bt709"
            source = f"in_color_matrix={matrices}:" if look.space else ""
            in_range = "in_range=pc:" if look.full_range and look.space else ""
            chain.append(f"scale={width}:{height}:{source}out_color_matrix={matrices}:{in_range}out_range=tv:{_SCALE}")
            chain.append("format=yuv420p")
        target = next(name for name, matrix in _SPACES.values() if matrix == self.matrix)
        if look.matrix != self.matrix:
            rest = "iprimaries=bt709:itrc=bt709:primaries=bt709:trc=bt709:fast=1:format=yuv420p"
            chain.append(f"colorspace=ispace={inside}:irange=tv:space={target}:range=tv:{rest}")
        if self.full_range:
            chain += [f"scale=in_range=tv:out_range=pc:{_SCALE}", "format=yuvj420p"]
        if look.turn:
            chain += look.turn.split(",")
        return chain


def _graph(look: Look, filters: list[str]) -> tuple[Graph, Any, Any]:
    graph = Graph()
    graph.threads = 1
    space = next((number for number, (name, _) in _SPACES.items() if name == look.space), 2)
    source = graph.add(
        "buffer",
        video_size=f"{look.width}x{look.height}",
        pix_fmt=look.pix_fmt,
        time_base=str(_TICK),
        pixel_aspect="1/1",
        colorspace=str(space),
        range="pc" if look.full_range else "tv",
    )
    nodes = [source, *(graph.add(*text.split("=", 1)) for text in filters), graph.add("buffersink")]
    graph.link_nodes(*nodes)
    graph.configure()
    return graph, source, nodes[-1]


def deinterlacer(frame: VideoFrame) -> tuple[Graph, Any, Any]:
    """A graph that deinterlaces frames marked as interlaced and lets others pass; one frame out for one in."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 90000)
    )
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    sink = graph.add("buffersink")
    graph.link_nodes(source, bwdif, sink)
    graph.configure()
    return graph, source, sink


def h273(matrix: str) -> int:
    """The number of a record's matrix in ITU-T H.273."""
    return _H273[matrix]
