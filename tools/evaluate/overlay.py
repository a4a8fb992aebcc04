"""Label maps laid over their frames: single pictures, film strips, and mp4 videos anybody can play."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from clipmill.datasets.synthetic_media import voc_palette
from clipmill.tools.davis_metrics import boundary
from clipmill.tools.evaluate.evaluator import write_atomic
from clipmill.tools.pictures import contact_sheet

_PALETTE = voc_palette()
FPS = 24


def laid_over(frame_HWC: np.ndarray, ids_HW: np.ndarray, truth_HW: np.ndarray | None = None) -> np.ndarray:
    """A frame with every object tinted in its palette colour and a dark rim; the truth, if given, as a white line."""
    picture = frame_HWC.copy()
    inside = (ids_HW > 0) & (ids_HW < 255)
    picture[inside] = (frame_HWC[inside].astype(np.uint16) + _PALETTE[ids_HW[inside]]) // 2
    picture[_rim(ids_HW)] = 0
    if truth_HW is not None:
        picture[_rim(truth_HW)] = 255
    return picture


def _rim(ids_HW: np.ndarray) -> np.ndarray:
    """Pixels where one label ends."""
    edge = np.zeros(ids_HW.shape, bool)
    for number in np.unique(ids_HW):
        if 0 < number < 255:
            edge |= boundary(ids_HW == number)
    return edge


def write_video(path: Path, pictures: Iterable[np.ndarray], fps: int = FPS) -> None:
    """Pictures (H, W, 3) uint8 of one size as H.264 in mp4; an odd last row or column is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w", options={"movflags": "+faststart"}) as container:
        stream = None
        for number, picture in enumerate(pictures):
            height, width = (side // 2 * 2 for side in picture.shape[:2])
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "20"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = Fraction(1, fps)
                stream.codec_context.thread_count = 1
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))


def write_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """Pictures under their titles as one PNG file."""
    out = io.BytesIO()
    Image.fromarray(contact_sheet(rows)).save(out, "PNG")
    write_atomic(path, out.getvalue())


def thumbnail(picture: np.ndarray, height: int = 120) -> np.ndarray:
    """A picture scaled to a height."""
    width = max(round(picture.shape[1] * height / picture.shape[0]), 1)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def skeleton(
    frame_HWC: np.ndarray, found_2J: np.ndarray, truth_2J: np.ndarray, bones: Iterable[tuple[int, int]]
) -> np.ndarray:
    """A frame with two stick figures: the truth in white, what was found in red; a joint at x < 0 was not found."""
    image = Image.fromarray(frame_HWC)
    pen = ImageDraw.Draw(image)
    for joints, colour in ((truth_2J, (255, 255, 255)), (found_2J, (255, 60, 40))):
        places = [tuple(place) for place in joints.T.tolist()]
        for a, b in bones:
            if places[a][0] >= 0 and places[b][0] >= 0:
                pen.line((places[a], places[b]), fill=colour, width=2)
        for x, y in places:
            if x >= 0:
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    return np.asarray(image)
