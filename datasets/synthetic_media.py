"""Scenes as real media files, in memory: the same scene gives the same bytes on the same machine and libraries."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from clipmill.datasets.synthetic import Scene

X264 = {"preset": "superfast", "crf": "21", "flags": "+bitexact"}
MPEG4 = {"flags": "+bitexact+qscale", "global_quality": str(4 * 118)}  # quantiser 4 in FFmpeg's lambda units
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0", "flags": "+bitexact"}
CONTAINERS: dict[str, tuple[str, str, dict[str, str], str]] = {  # suffix: (muxer, video encoder, its options, sound)
    ".mp4": ("mp4", "libx264", X264, "aac"),
    ".mov": ("mov", "mpeg4", MPEG4, "aac"),
    ".avi": ("avi", "mpeg4", MPEG4, "pcm_s16le"),  # AVI cannot say how much delay MP3 adds, so the sound would be late
    ".mkv": ("matroska", "libx264", X264, "flac"),
    ".webm": ("webm", "libvpx-vp9", VP9, "libopus"),
}
JPEG_QUALITY = 92


def encode(scene: Scene, suffix: str = ".mp4", audio_hz: int = 44100, channels: int = 1) -> bytes:
    """A scene as a media file with picture and sound.

    suffix: one of `CONTAINERS`. Video is 8-bit 4:2:0, limited range, BT.601. One thread per encoder and no dates or
    version strings, so the bytes do not depend on the machine's load.
    """
    muxer, video_codec, options, audio_codec = CONTAINERS[suffix]
    out = io.BytesIO()
    with av.open(out, "w", format=muxer, options={"fflags": "+bitexact"}) as container:
        video: Any = container.add_stream(video_codec, rate=scene.fps, options=dict(options))
        video.width, video.height, video.pix_fmt = scene.width, scene.height, "yuv420p"
        video.thread_count = 1
        video.time_base = video.codec_context.time_base = 1 / scene.fps
        video.codec_context.colorspace, video.codec_context.color_range = 6, 1  # SMPTE 170M, limited
        video.codec_context.color_primaries, video.codec_context.color_trc = 6, 6
        layout = "mono" if channels == 1 else "stereo"
        audio: Any = container.add_stream(audio_codec, rate=audio_hz, layout=layout, options={"flags": "+bitexact"})
        wave = np.repeat(scene.sound(audio_hz)[None], channels, 0)
        heard = 0
        for t in range(scene.num_frames):
            picture = av.VideoFrame.from_ndarray(scene.frame(t), "rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601, threads=1)
            picture.pts, picture.time_base = t, 1 / scene.fps
            container.mux(video.encode(picture))
            if t % 16 == 15 or t == scene.num_frames - 1:  # keep the streams together in the file
                until = round((t + 1) / scene.fps * audio_hz)
                sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, heard:until]), "fltp", layout)
                sound.sample_rate, sound.pts, sound.time_base = audio_hz, heard, Fraction(1, audio_hz)
                container.mux(audio.encode(sound))
                heard = until
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return out.getvalue()


def image_bytes(image: np.ndarray, suffix: str) -> bytes:
    """(H, W, 3) uint8 RGB as a ``.jpg`` or ``.png`` file."""
    out = io.BytesIO()
    if suffix == ".png":
        Image.fromarray(image).save(out, "PNG")
    else:
        Image.fromarray(image).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def label_map_bytes(labels: np.ndarray) -> bytes:
    """(H, W) uint8 object numbers as a palette PNG, the form of the DAVIS annotations."""
    image = Image.frombytes("P", labels.shape[::-1], labels.tobytes())
    image.putpalette(voc_palette().tobytes())
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def voc_palette() -> np.ndarray:
    """(256, 3) uint8 colour map of PASCAL VOC: three bits of the number to the top bits of red, green and blue, and on.

    >>> voc_palette()[:4].tolist()
    [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    number = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((number >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette
