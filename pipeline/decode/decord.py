"""The decord backend, for comparison and for users who have it. Unmaintained since 2021, x86-64 only.

It counts frames and does not say which one it gives: media that decode with errors can give a wrong one. Damage on the
disk is still found, by the checksums of the packets.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module

import numpy as np

from clipmill.pipeline.decode.decoder import Decoder
from clipmill.pipeline.decode.rgb import RgbDecoder
from clipmill.pipeline.shard import Reader

_CODECS = ("h264", "hevc", "mjpeg")  # its FFmpeg of 2018 has no AV1 decoder


def new(reader: Reader) -> Decoder:
    """The backend's constructor."""
    decord = import_module("decord")

    decord.logging.set_level(decord.logging.FATAL)
    return RgbDecoder(
        "decord", reader, lambda clip: pictures(clip.data, clip.places), _CODECS, (decord.DECORDError, RuntimeError)
    )


def pictures(source: str | bytes, numbers: Sequence[int]) -> np.ndarray:
    """Frames of any file or of its bytes as (N, height, width, 3) uint8 RGB."""
    decord = import_module("decord")

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    video = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
    return video.get_batch(list(numbers)).asnumpy()
