"""Still pictures: a JPEG that every decoder reads the same way is kept byte for byte, everything else becomes one."""

from __future__ import annotations

import io
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageOps, UnidentifiedImageError

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.pack.outcome import Picture, Rejected
from clipmill.pipeline.pack.probe import Media
from clipmill.pipeline.pack.settings import MAX_SIDE, PackSettings
from clipmill.pipeline.pack.verify import Check

_FORMATS = ["JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"]
_MAX_PIXELS = 300_000_000
_QUALITY = 95
_ORIENTATION = 0x0112
_CODEC = CodecConfig(codec="mjpeg", matrix="bt601", full_range=True)


def pack_still(media: Media, path: str, settings: PackSettings) -> tuple[Picture, dict[str, Any]]:
    """Write the picture as a JPEG to ``path``; returns the track and what was done, JSON-ready."""
    media.seek(0)
    payload = media.read()
    image = _open(payload)
    facts: dict[str, Any] = {
        "container": (image.format or "").lower(),
        "video": {"codec": (image.format or "").lower(), "width": image.width, "height": image.height},
        "mode": image.mode,
        "images": getattr(image, "n_frames", 1),
    }
    rgb = _load(image)
    turned = rgb.getexif().get(_ORIENTATION, 1) not in (0, 1)
    size = canonical_size(rgb.width, rgb.height, settings.short_side)
    kept = not turned and size == rgb.size and is_plain_jpeg(payload)
    if not kept:
        rgb = _resized(ImageOps.exif_transpose(rgb), settings.short_side)
        out = io.BytesIO()
        rgb.save(out, "JPEG", quality=_QUALITY, subsampling="4:2:0")
        payload = out.getvalue()
    facts["normalised"] = {"kept": kept, "turned": turned, "size": list(rgb.size)}
    Path(path).write_bytes(payload)
    try:
        return _picture(path, payload, rgb), facts
    except Rejected as fault:
        if kept:  # it is not ours
            raise Rejected("damaged", f"decoders do not agree what it shows ({fault.detail})") from fault
        raise


def canonical_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Even size after scaling down to ``short_side``; an odd row or column is cut off rather than resampled."""
    if short_side and min(width, height) > short_side:
        scale = Fraction(short_side, min(width, height))
        width, height = 2 * round(width * scale / 2), 2 * round(height * scale / 2)
    return max(width & ~1, 2), max(height & ~1, 2)


def is_plain_jpeg(data: bytes) -> bool:
    """Baseline, 8 bit, three components as YCbCr 4:2:0, one scan, and nothing after its end."""
    if not data.startswith(b"\xff\xd8"):
        return False
    position, components = 2, b""
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == 0xC0:
            components = body[:1] + body[5:]
        elif marker in (0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)):
            return False
        elif marker == 0xEE and body.startswith(b"Adobe") and body[11:12] != b"\x01":
            return False  # RGB or YCCK
        elif marker == 0xDA:
            sampling = [components[i : i + 1] for i in (3, 6, 9)]
            plain = components[:2] == b"\x08\x03" and len(components) == 11 and body[:1] == b"\x03"
            end = data.find(b"\xff\xd9", position + 2 + length)
            names = (components[2], components[5], components[8]) if plain else ()
            return plain and sampling == [b"\x22", b"\x11", b"\x11"] and names != (82, 71, 66) and end == len(data) - 2
        position += 2 + length
    return False


def _open(payload: bytes) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None  # checked below, with our own words
    Image.init()
    try:
        image = Image.open(io.BytesIO(payload), formats=[one for one in _FORMATS if one in Image.OPEN])
    except UnidentifiedImageError as error:
        raise Rejected("unsupported", "a picture in a format that is not read here") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise Rejected("unreadable", f"a damaged picture ({error})") from error
    if image.width * image.height > _MAX_PIXELS:
        raise Rejected("too_large", f"{image.width}x{image.height} pixels, {_MAX_PIXELS} is the limit")
    return image


def _load(image: Image.Image) -> Image.Image:
    """The first frame as 8-bit RGB, all of it decoded; exif data stays with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata are no concern of a batch run
            image.load()
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                levels = np.asarray(image).astype(np.float64)
                scale = 256.0 if image.mode != "F" or levels.max() > 255 else 1.0
                gray = Image.fromarray(np.clip(levels / scale, 0, 255).astype(np.uint8))
                gray.info["exif"] = image.getexif().tobytes()
                image = gray
            exif = image.getexif()
            rgb = image.convert("RGB")
            rgb.getexif().update(exif)
            return rgb
    except MemoryError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error) as error:
        raise Rejected("unreadable", f"a damaged or truncated picture ({error})") from error


def _resized(image: Image.Image, short_side: int | None) -> Image.Image:
    size = canonical_size(image.width, image.height, short_side)
    if max(size) > MAX_SIDE:
        raise Rejected("too_large", f"{size[0]}x{size[1]} pixels, {MAX_SIDE} is the largest side; use a short side")
    if size[0] <= image.width < size[0] + 2 and size[1] <= image.height < size[1] + 2:
        return image.crop((0, 0, *size))
    return image.resize(size, Image.Resampling.LANCZOS)


def _picture(path: str, payload: bytes, rgb: Image.Image) -> Picture:
    """Decode the file as the loader does and compare it with the picture that went in."""
    check = Check("mjpeg", None)
    check.expect(_reference(rgb))
    check.packet(payload, 0)
    check.finish()
    return Picture(
        path=path,
        suffix=".jpg",
        codec=_CODEC,
        num_frames=1,
        fps=Fraction(1),
        height=rgb.height,
        width=rgb.width,
        first_packet=0,
        sizes=np.array([len(payload)], np.uint32),
        crcs=np.array([zlib.crc32(payload)], np.uint32),
        presentation=np.empty(0, np.uint32),
        keyframes=np.zeros(1, np.uint32),
        psnr_db=check.mean_db,
        psnr_min_db=check.worst_db,
    )


def _reference(rgb: Image.Image) -> VideoFrame:
    """Full-range BT.601 4:2:0 planes of a picture, by Pillow and a 2x2 mean, independent of FFmpeg."""
    y, u, v = (np.asarray(plane) for plane in rgb.convert("YCbCr").split())
    frame = VideoFrame(rgb.width, rgb.height, "yuvj420p")
    for plane, full in zip(frame.planes, (y, u, v), strict=True):
        if plane.width != rgb.width or plane.height != rgb.height:
            quads = full.reshape(rgb.height // 2, 2, rgb.width // 2, 2).astype(np.uint16)
            full = ((quads.sum((1, 3)) + 2) // 4).astype(np.uint8)
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = full
        plane.update(rows.tobytes())
    return frame
