"""The profile `copy`: a source's own packets, where nothing about the source needs to be changed.

Kept are whole files with pictures at a constant rate, upright, of square pixels and even size, progressive, in 8-bit
4:2:0, of which every group of pictures gives the same frames when decoding starts at its key frame. Everything else is
rejected (``not_copyable``) with the property that stands in the way.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode.decoder import DecodeError, Planes
from clipmill.pipeline.decode.pyav import PyavDecoder
from clipmill.pipeline.pack.convert import Converter
from clipmill.pipeline.pack.normalise import Normaliser, Window
from clipmill.pipeline.pack.outcome import Picture, Rejected
from clipmill.pipeline.pack.probe import Media, choose_video, raise_if_memory
from clipmill.pipeline.pack.scan import Walk
from clipmill.pipeline.pack.verify import LOSSLESS_DB, planes, read_table
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import ShardError, ShardReader


def keep(media: Media, normaliser: Normaliser, frames: Iterator[VideoFrame], window: Window, path: str) -> Picture:
    """Write the packets of a source to the mp4 ``path`` and prove that they give its frames from every key frame on.

    frames: of the normaliser, which passes them on as they are decoded. Raises `Rejected`.
    """
    if window.start_s is not None or window.end_s is not None:
        raise _cannot("only a part of it is wanted or undamaged")
    expected = []
    for frame in frames:
        _check_untouched(normaliser)
        expected.append(_crc(planes(frame)))
    notes = normaliser.notes
    if not expected or notes.cadence is None or normaliser.canvas is None:
        raise Rejected("no_frames", "no picture in it decodes")
    if notes.cadence.repeated or notes.cadence.dropped or notes.disordered or notes.skipped_head:
        raise _cannot("its frames do not come at a constant rate from a key frame on")
    codec, order = _remux(media, path)
    try:
        table = read_table(path)
    except (av.FFmpegError, Rejected) as error:
        if isinstance(error, av.FFmpegError):
            raise_if_memory(error)
        raise _cannot("an mp4 of its packets cannot be read") from error
    if not len(table.sizes) == len(order) == len(expected):
        raise _cannot(f"its {len(order)} packets give {len(expected)} frames")
    picture = Picture(
        path=path,
        suffix=".mp4",
        codec=CodecConfig(
            codec=codec, extradata=table.extradata, matrix=normaliser.matrix, full_range=normaliser.full_range
        ),
        num_frames=len(expected),
        fps=normaliser.fps,
        height=normaliser.canvas.height,
        width=normaliser.canvas.width,
        first_packet=table.first,
        sizes=table.sizes,
        crcs=table.crcs,
        presentation=order if (np.diff(order.astype(np.int64)) != 1).any() else np.empty(0, np.uint32),
        keyframes=table.keyframes,
        psnr_db=LOSSLESS_DB,
        psnr_min_db=LOSSLESS_DB,
    )
    _prove(picture, expected)
    return picture


def _cannot(why: str) -> Rejected:
    return Rejected("not_copyable", f"{why}; pack it with another profile")


def _check_untouched(normaliser: Normaliser) -> None:
    """Raise `Rejected` if the last frame was changed on its way."""
    look, canvas = normaliser.notes.looks[-1], normaliser.canvas
    assert canvas is not None
    if normaliser.notes.deinterlaced:
        raise _cannot("it is interlaced")
    if len(normaliser.notes.looks) > 1:
        raise _cannot("its pictures change their size or kind on the way")
    if not look.matrix or Converter(canvas, normaliser.matrix, normaliser.full_range).filters(look):
        shape = f"{look.width}x{look.height} {look.pix_fmt}, matrix {look.matrix or look.space}"
        turn = f", turned ({look.turn})" if look.turn else ""
        raise _cannot(f"its pictures are {shape}, pixels {look.sar}{turn}")


def _crc(picture: Planes | list[np.ndarray]) -> int:
    crc = 0
    for plane in picture:
        crc = zlib.crc32(plane.tobytes(), crc)
    return crc


def _remux(media: Media, path: str) -> tuple[str, np.ndarray]:
    """Write the packets of the video stream to an mp4. Returns the decoder's name and (P,) which frame each shows."""
    times: list[int] = []
    with media.container() as container, open(path, "wb", buffering=0) as file:
        video = choose_video(container)
        assert video is not None
        try:
            new = cast(OutputContainer, av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}))
            with new:
                stream = new.add_stream_from_template(video, opaque=True)
                for packet in Walk(container, [video]):
                    if packet.pts is None or packet.is_discard:
                        raise _cannot("some of its packets have no time or are not to be shown")
                    times.append(packet.pts)
                    packet.stream = stream
                    new.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, av.FFmpegError):
                raise_if_memory(error)
            raise _cannot(f"its packets cannot lie in an mp4 ({error})") from error
        codec = video.codec_context.name
    ranks = np.empty(len(times), np.uint32)
    ranks[np.argsort(times, kind="stable")] = np.arange(len(times))
    if len(set(times)) < len(times):
        raise _cannot("several of its packets have the same time")
    return codec, ranks


def _prove(picture: Picture, expected: list[int]) -> None:
    """Decode group by group, each from its key frame as the loader does; all frames must be the expected ones."""
    record = VideoRecord(
        index=0, uid=0, key=picture.path, shard=picture.path, codec=picture.codec, num_frames=picture.num_frames,
        fps=Fraction(picture.fps), height=picture.height, width=picture.width, packet_offset=picture.first_packet,
        packet_sizes=picture.sizes, packet_crcs=picture.crcs, presentation=picture.presentation,
        keyframes=picture.keyframes, audio_offset=0, num_samples=0, audio_hz=0, audio_crcs=np.empty(0, np.uint32),
        silent=False, salvaged=False, label=-1, split="", source="", digest=b"",
    )  # fmt: skip
    wrong: list[int] = []

    def compare(number: int, yuv: Planes) -> None:
        if _crc(yuv) != expected[number]:
            wrong.append(number)

    reader = ShardReader()
    try:
        PyavDecoder(reader).decode(record, range(picture.num_frames), compare)
    except (DecodeError, ShardError) as error:
        raise _cannot("not all of its groups of pictures decode by themselves") from error
    finally:
        reader.close()
    if wrong:
        raise _cannot(f"{len(wrong)} frames, the first {wrong[0]}, are others when decoding starts at their key frame")
