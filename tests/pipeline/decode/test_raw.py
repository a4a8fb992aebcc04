"""Raw frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipmill.pipeline.decode.decoder import DecodeError
from clipmill.pipeline.decode.raw import new
from clipmill.pipeline.shard import ShardReader


def test_frames_are_the_stored_bytes_without_a_copy(stream_of):
    record = stream_of("raw")[0]
    stored = Path(record.shard).read_bytes()[record.packet_offset :]
    size = record.height * record.width * 3 // 2
    decoder = new(ShardReader())

    def emit(number, planes):
        assert b"".join(plane.tobytes() for plane in planes) == stored[number * size : (number + 1) * size]
        assert not any(plane.flags.owndata for plane in planes)

    decoder.decode(record, [0, 1, 5, 40], emit)
    assert decoder.decoded == 4


def test_packets_of_another_size_are_an_error(stream_of):
    record = stream_of("raw")[0]
    with pytest.raises(DecodeError, match="frame 3 of 'raw/0' has 9216 bytes, 96x32 needs 4608"):
        new(ShardReader()).decode(replace(record, height=32), [3], lambda *_: None)


def test_packet_numbers_are_frame_numbers_even_in_an_odd_index(stream_of):
    record = stream_of("raw")[0]
    seen: dict[int, int] = {}
    few_keys = replace(record, keyframes=np.array([0], np.uint32))
    new(ShardReader()).decode(few_keys, [4], lambda number, planes: seen.update({number: int(planes[0][40, 3])}))
    truth: dict[int, int] = {}
    new(ShardReader()).decode(record, [4], lambda number, planes: truth.update({number: int(planes[0][40, 3])}))
    assert seen == truth
