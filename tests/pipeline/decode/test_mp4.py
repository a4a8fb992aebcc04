"""The small mp4: other readers find in it exactly what was put in."""

from __future__ import annotations

import io
from dataclasses import replace

import av
import numpy as np
import pytest

from clipmill.pipeline.decode import mp4
from clipmill.pipeline.shard import ShardReader


def wrapped(record, first: int, stop: int) -> tuple[bytes, list, np.ndarray]:
    packets = ShardReader().packets(record, first, stop)
    shown = record.presentation[first:stop] if len(record.presentation) else np.arange(stop - first)
    pts = np.argsort(np.argsort(shown))
    return mp4.wrap(record, packets, pts, [0]), packets, pts


@pytest.mark.parametrize("name", ["h264", "h264_open", "h264_annexb", "hevc", "hevc_open", "av1", "mjpeg"])
def test_a_demuxer_finds_the_packets_their_times_and_the_parameters(name: str, stream_of):
    record = stream_of(name)[0]
    data, packets, pts = wrapped(record, 0, 20)
    with av.open(io.BytesIO(data)) as container:
        (stream,) = container.streams
        found = [packet for packet in container.demux(stream) if packet.size]
        assert [bytes(packet) for packet in found] == [bytes(packet) for packet in packets]
        assert [packet.pts - mp4.delay(pts) for packet in found] == pts.tolist()
        assert [packet.dts for packet in found] == list(range(20))
        assert found[0].is_keyframe
        assert stream.average_rate == mp4.FPS
        assert (stream.width, stream.height) == (record.width, record.height)
        if record.codec.extradata:
            assert stream.codec_context.extradata == record.codec.extradata
        assert len(data) < len(record.codec.extradata) + sum(map(len, packets)) + 1500


@pytest.mark.parametrize("name", ["h264", "h264_open", "hevc_open", "mjpeg"])
def test_it_decodes_to_the_reference(name: str, stream_of, frames_of):
    record = stream_of(name)[0]
    data, _, pts = wrapped(record, 0, record.num_frames)
    with av.open(io.BytesIO(data)) as container:
        found = [(frame.pts - mp4.delay(pts), frame.to_ndarray()) for frame in container.decode(video=0)]
    assert [number for number, _ in found] == list(range(record.num_frames))
    for (_, frame), truth in zip(found, frames_of(record), strict=True):
        assert np.array_equal(frame, truth)


@pytest.mark.parametrize(("matrix", "code"), [("bt709", 1), ("bt601", 6), ("bt2020", 9)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_are_named_where_the_stream_does_not_name_them(matrix: str, code: int, full_range: bool, stream_of):
    record = stream_of("mjpeg")[0]
    record = replace(record, codec=replace(record.codec, matrix=matrix, full_range=full_range))
    data, _, _ = wrapped(record, 0, 1)
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (code, 2 if full_range else 1)


def test_parameter_sets_with_start_codes_go_before_every_key_packet(stream_of):
    record = stream_of("h264_annexb")[0]
    record = replace(record, codec=replace(record.codec, extradata=b"\0\0\0\1sets"))
    packets = [b"first", b"second", b"third"]
    data = mp4.wrap(record, packets, np.arange(3), [0, 2])
    assert data.endswith(b"\0\0\0\1setsfirst" + b"second" + b"\0\0\0\1setsthird")
    assert b"avcC" not in data
