"""Packets with lengths become packets with start codes, checked against FFmpeg's own bitstream filter."""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode import mp4
from clipmill.pipeline.decode.annexb import AnnexB
from clipmill.pipeline.shard import ShardReader


def units(data: bytes) -> list[bytes]:
    """The units between start codes of three or four bytes."""
    return [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")[1:]]


@pytest.mark.parametrize("name", ["h264", "h264_open", "hevc", "hevc_open"])
def test_it_is_what_ffmpegs_filter_gives(name: str, stream_of, tmp_path):
    record = stream_of(name)[0]
    packets = ShardReader().packets(record, 0, 12)
    path = tmp_path / "clip.mp4"
    shown = record.presentation[:12] if len(record.presentation) else np.arange(12)
    path.write_bytes(mp4.wrap(record, packets, np.argsort(np.argsort(shown)), [0]))
    converter = AnnexB.of(record.codec)
    assert converter.length_bytes == 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream_filter = BitStreamFilterContext(f"{record.codec.codec}_mp4toannexb", stream)
        demuxed = [packet for packet in container.demux(stream) if packet.size]
        filtered = [bytes(out) for packet in demuxed for out in stream_filter.filter(packet)]
    assert sorted(units(converter.convert(packets[0], first=True))) == sorted(units(filtered[0]))
    for packet, truth in zip(packets[1:8], filtered[1:8], strict=True):
        assert units(converter.convert(packet, first=False)) == units(truth)


@pytest.mark.parametrize("name", ["h264", "hevc"])
def test_a_decoder_without_extradata_understands_it(name: str, stream_of, frames_of):
    record = stream_of(name)[0]
    converter = AnnexB.of(record.codec)
    context = av.CodecContext.create(record.codec.codec, "r")
    context.thread_count = 1
    data = [converter.convert(p, first=i == 0) for i, p in enumerate(ShardReader().packets(record, 8, 16))]
    frames = [frame for packet in data for frame in context.decode(av.Packet(packet))] + context.decode(None)
    truth = frames_of(record)[8:16]
    assert [(frame.to_ndarray() == wanted).all() for frame, wanted in zip(frames, truth, strict=True)] == [True] * 8


def test_start_codes_stay_and_other_codecs_too(stream_of):
    packet = ShardReader().packets(stream_of("h264_annexb")[0], 0, 1)[0]
    assert AnnexB.of(stream_of("h264_annexb")[0].codec).convert(packet, first=True) == packet
    with_sets = CodecConfig(codec="h264", extradata=b"\0\0\0\1sets")
    assert AnnexB.of(with_sets).convert(b"packet", first=True) == b"\0\0\0\1setspacket"
    assert AnnexB.of(with_sets).convert(b"packet", first=False) == b"packet"
    record = stream_of("av1")[0]
    packet = ShardReader().packets(record, 0, 1)[0]
    assert AnnexB.of(record.codec).convert(packet, first=True) == packet


@pytest.mark.parametrize("name", ["h264", "hevc"])
def test_what_is_cut_off_is_an_error(name: str, stream_of):
    record = stream_of(name)[0]
    for length in (1, 5, 8, 23, len(record.codec.extradata) // 2):
        with pytest.raises(ValueError, match=f"the parameter sets of {name} are cut off"):
            AnnexB.of(replace(record.codec, extradata=record.codec.extradata[:length]))
    packet = ShardReader().packets(record, 0, 1)[0]
    for wrong in (packet[:-1], b"\xff\xff\xff\xffabc", b"\0\0"):
        with pytest.raises(ValueError, match="behind its packet"):
            AnnexB.of(record.codec).convert(wrong, first=False)
