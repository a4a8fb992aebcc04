"""Packed data sets of every codec and group structure, whose frames carry their number as black and white blocks."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.record import ShardIndex, VideoRecord, uid_of
from clipmill.pipeline.shard import ShardWriter

HEIGHT, WIDTH = 64, 96
LENGTHS = (41, 1)  # frames of the records of every data set
_BLOCK = WIDTH // 8
_BLACK, _WHITE = 60, 190

_X264 = "keyint={gop}:min-keyint={gop}:scenecut=0:threads=1:"
_X265 = "keyint={gop}:min-keyint={gop}:scenecut=0:log-level=error:pools=none:frame-threads=1:repeat-headers=0:"
_CLOSED = "bframes=0:ref=1:open-gop=0"
_OPEN = "bframes=3:b-pyramid={pyramid}:open-gop=1"


@dataclass(frozen=True)
class Stream:
    """How a data set is encoded. container: packets are taken from an mp4, otherwise as the encoder gives them."""

    encoder: str
    codec: str
    params: str = ""
    container: bool = True
    pix_fmt: str = "yuv420p"


STREAMS = {
    "h264": Stream("libx264", "h264", _X264.format(gop=8) + _CLOSED),
    "h264_intra": Stream("libx264", "h264", _X264.format(gop=1) + _CLOSED),
    "h264_open": Stream("libx264", "h264", _X264.format(gop=12) + _OPEN.format(pyramid="normal")),
    "h264_annexb": Stream("libx264", "h264", _X264.format(gop=8) + _CLOSED, container=False),
    "hevc": Stream("libx265", "hevc", _X265.format(gop=8) + _CLOSED),
    "hevc_open": Stream("libx265", "hevc", _X265.format(gop=12) + _OPEN.format(pyramid=1)),
    "av1": Stream("libsvtav1", "libdav1d", "keyint=8:pred-struct=1:lp=1"),
    "mjpeg": Stream("mjpeg", "mjpeg", container=False, pix_fmt="yuvj420p"),
    "raw": Stream("", "raw", container=False),
}


def picture(frame: int) -> np.ndarray:
    """(HEIGHT * 3 / 2, WIDTH) I420: eight blocks that spell the number, below them slopes that move with it."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    luma = 70 + (rows + 2 * columns + 3 * frame) % 110
    for bit in range(8):
        luma[: HEIGHT // 4, bit * _BLOCK : (bit + 1) * _BLOCK] = _WHITE if frame >> bit & 1 else _BLACK
    half_rows, half_columns = np.mgrid[: HEIGHT // 2, : WIDTH // 2]
    blue, red = 116 + (half_rows + frame) % 24, 116 + (half_columns - frame) % 24
    return np.concatenate([luma.ravel(), blue.ravel(), red.ravel()]).astype(np.uint8).reshape(-1, WIDTH)


def number_in(luma: np.ndarray) -> int:
    """The frame number that the blocks of a decoded luma plane spell."""
    middle = luma[HEIGHT // 16 : HEIGHT // 4 - HEIGHT // 16].astype(float)
    levels = [middle[:, bit * _BLOCK + 3 : (bit + 1) * _BLOCK - 3].mean() for bit in range(8)]
    return sum(1 << bit for bit, level in enumerate(levels) if level > (_BLACK + _WHITE) / 2)


def _frames(stream: Stream, count: int) -> list[av.VideoFrame]:
    frames = [av.VideoFrame.from_ndarray(picture(number), stream.pix_fmt) for number in range(count)]
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, Fraction(1, 25)
    return frames


def _prepare(context: Any, stream: Stream) -> None:
    context.width, context.height, context.pix_fmt = WIDTH, HEIGHT, stream.pix_fmt
    context.time_base, context.framerate, context.thread_count = Fraction(1, 25), Fraction(25), 1
    if stream.encoder == "mjpeg":
        context.options = {"qmin": "2", "qmax": "2"}
        return
    name = "svtav1" if stream.encoder == "libsvtav1" else stream.encoder.removeprefix("lib")
    preset = "10" if name == "svtav1" else "veryfast"
    context.options = {"preset": preset, "crf": "12", f"{name}-params": stream.params}
    context.color_range, context.colorspace = 1, 1  # limited, BT.709


def encode(stream: Stream, count: int) -> tuple[bytes, list[tuple[bytes, int, bool]]]:
    """(extradata, [(packet, frame number, is a key packet)] in the order of decoding)."""
    if stream.codec == "raw":
        return b"", [(picture(number).tobytes(), number, True) for number in range(count)]
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    if not stream.container:
        context = av.CodecContext.create(stream.encoder, "w")
        _prepare(context, stream)
        packets = [packet for frame in [*_frames(stream, count), None] for packet in context.encode(frame)]
        return b"", [(bytes(packet), packet.pts, packet.is_keyframe) for packet in packets]
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        track = container.add_stream(stream.encoder, rate=25)
        _prepare(track.codec_context, stream)
        for packet in [packet for frame in [*_frames(stream, count), None] for packet in track.encode(frame)]:
            if count == 1:
                packet.dts = packet.pts  # libx265 leaves it unset in streams shorter than its delay
            container.mux(packet)
    with av.open(io.BytesIO(out.getvalue())) as container:
        track = container.streams.video[0]
        extradata = bytes(track.codec_context.extradata or b"")
        packets = [packet for packet in container.demux(track) if packet.size]
        ticks = sorted(packet.pts for packet in packets)
        return extradata, [(bytes(p), ticks.index(p.pts), p.is_keyframe) for p in packets]


def record_of(stream: Stream, key: str, shard: str, offset: int, extradata: bytes, packets: list) -> VideoRecord:
    """The index row of packets that lie at ``offset`` of a shard."""
    shown = np.array([number for _, number, _ in packets], np.uint32)
    in_order = (shown == np.arange(len(shown))).all()
    full = stream.codec == "mjpeg"
    return VideoRecord(
        index=0,
        uid=uid_of(key),
        key=key,
        shard=shard,
        codec=CodecConfig(
            codec=stream.codec, extradata=extradata, matrix="bt601" if full else "bt709", full_range=full
        ),
        num_frames=len(packets),
        fps=Fraction(25),
        height=HEIGHT,
        width=WIDTH,
        packet_offset=offset,
        packet_sizes=np.array([len(packet) for packet, _, _ in packets], np.uint32),
        packet_crcs=np.array([zlib.crc32(packet) for packet, _, _ in packets], np.uint32),
        presentation=np.empty(0, np.uint32) if in_order else shown,
        keyframes=np.array([i for i, (_, _, key) in enumerate(packets) if key], np.uint32),
        audio_offset=0,
        num_samples=0,
        audio_hz=0,
        audio_crcs=np.empty(0, np.uint32),
        silent=False,
        salvaged=False,
        label=-1,
        split="train",
        source=key,
        digest=bytes(16),
    )


def write_stream(root: Path, name: str) -> ShardIndex:
    """Write the data set of one entry of `STREAMS`, with a record of each of `LENGTHS`."""
    root.mkdir(parents=True, exist_ok=True)
    records = []
    with ShardWriter(root / "shard-00000.tar") as writer:
        for place, count in enumerate(LENGTHS):
            extradata, packets = encode(STREAMS[name], count)
            offset = writer.add(f"{place:08d}.bin", b"".join(packet for packet, _, _ in packets))
            records.append(record_of(STREAMS[name], f"{name}/{place}", "shard-00000.tar", offset, extradata, packets))
    write_index(root / "index.arrow", records, ["shard-00000.tar"], [])
    return ShardIndex.open(root)


@pytest.fixture(scope="session")
def stream_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ShardIndex]:
    """stream_of(name): the data set of an entry of `STREAMS`, written on first use."""
    written: dict[str, ShardIndex] = {}

    def open_stream(name: str) -> ShardIndex:
        if name not in written:
            written[name] = write_stream(tmp_path_factory.mktemp(name), name)
        return written[name]

    return open_stream


def reference(record: VideoRecord) -> list[np.ndarray]:
    """All frames as I420, by one decoder that reads the record from the beginning to the end."""
    data = Path(record.shard).read_bytes()
    ends = record.packet_offset + np.cumsum(record.packet_sizes, dtype=np.int64)
    packets = [data[end - size : end] for end, size in zip(ends.tolist(), record.packet_sizes.tolist(), strict=True)]
    if record.codec.codec == "raw":
        return [np.frombuffer(packet, np.uint8).reshape(-1, record.width) for packet in packets]
    context = av.CodecContext.create(record.codec.codec, "r")
    context.thread_count = 1
    if record.codec.extradata:
        context.extradata = record.codec.extradata
    found = {}
    for place, data in enumerate([*packets, None]):
        packet = None if data is None else av.Packet(data)
        if packet is not None:
            packet.pts = int(record.presentation[place]) if len(record.presentation) else place
        found.update((frame.pts, frame.to_ndarray()) for frame in context.decode(packet))
    return [found[number] for number in range(record.num_frames)]


def joined(planes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """(height * 3 / 2, width) copy of three planes."""
    return np.concatenate([plane.ravel() for plane in planes]).reshape(-1, planes[0].shape[1])


@pytest.fixture(scope="session")
def frames_of() -> Callable[[VideoRecord], list[np.ndarray]]:
    """`reference`: all frames of a record as I420."""
    return reference


@pytest.fixture(scope="session")
def number_of() -> Callable[[np.ndarray], int]:
    """`number_in`: the frame number that a luma plane spells."""
    return number_in
