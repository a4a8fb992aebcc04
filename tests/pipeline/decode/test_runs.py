"""Which packets are read and decoded for which frames."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.pipeline.decode.decoder import DecodeError
from clipmill.pipeline.decode.runs import Feed, Run, reads, runs
from clipmill.pipeline.shard import ShardReader

STREAMS = ("h264", "h264_intra", "h264_open", "hevc_open", "mjpeg", "raw")


@pytest.mark.parametrize("name", STREAMS)
@given(frames=st.sets(st.integers(0, 40), min_size=1).map(sorted))
@settings(max_examples=40, deadline=None)
def test_runs_hold_each_wanted_frame_once_and_nothing_too_much(name: str, frames: list[int], stream_of):
    record = stream_of(name)[0]
    keys = set(record.keyframes.tolist())
    found = runs(record, frames)
    assert [number for run in found for number in run.wanted] == frames
    shown = record.presentation.tolist() if len(record.presentation) else list(range(record.num_frames))
    for run in found:
        assert run.first in keys
        held = run.numbers(record).tolist()
        assert held == shown[run.first : run.stop]
        assert set(run.wanted) <= set(held)
        assert held[-1] in run.wanted  # stops at its last wanted frame
        # decodable from here on: nothing wanted is shown before the key frame, and no later key frame would do
        assert min(run.wanted) >= shown[run.first]
        later = [key for key in keys if key > run.first and shown[key] <= min(run.wanted)]
        assert later == []


def test_an_index_that_names_packets_it_does_not_have(stream_of):
    record = stream_of("h264")[0]
    order = np.arange(record.num_frames, dtype=np.uint32)
    beyond = np.array([0, record.num_frames + 100], np.uint32)
    for lies in ({"presentation": order, "keyframes": beyond}, {"presentation": order[:5]}):
        with pytest.raises(DecodeError, match="names packets that it does not have"):
            runs(replace(record, **lies), [3, 9])


def test_frames_before_the_first_key_frame_are_an_error(stream_of):
    record = replace(stream_of("h264")[0], keyframes=np.array([8, 16], np.uint32))
    with pytest.raises(DecodeError, match="frame 3 has no key frame before it"):
        runs(record, [3, 9])


class Counting(ShardReader):
    """Notes what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def packets(self, record, first, stop):
        self.asked.append((first, stop))
        return super().packets(record, first, stop)


def test_neighbours_are_read_in_one_go_and_distant_ones_are_not(stream_of):
    record = stream_of("raw")[0]  # 9216 bytes a frame: three of them in between are worth another read
    reader = Counting()
    feed = Feed(reader)
    wanted = runs(record, [2, 3, 4, 7, 20, 25, 30, 33])
    found = list(feed.packets(record, wanted))
    assert reader.asked == [(2, 8), (20, 21), (25, 26), (30, 34)]
    assert [run for run, _ in found] == wanted
    for run, packets in found:
        assert [bytes(packet) for packet in packets] == [
            bytes(packet) for packet in ShardReader().packets(record, run.first, run.stop)
        ]
    assert feed.read_s > 0


def test_overlapping_runs_get_all_their_packets(stream_of):
    record = stream_of("hevc_open")[0]
    reader = Counting()
    keys = record.keyframes.tolist()
    overlapping = [Run(keys[0], keys[1] + 3, (0,)), Run(keys[1], keys[1] + 1, (int(record.presentation[keys[1]]),))]
    sizes = [len(packets) for _, packets in Feed(reader).packets(record, overlapping)]
    assert sizes == [keys[1] + 3, 1]
    assert reader.asked == [(0, keys[1] + 3)]


@pytest.mark.parametrize("name", ["h264", "hevc_open", "raw"])
@given(frames=st.sets(st.integers(0, 40), min_size=1).map(sorted), waste=st.sampled_from([0.0, 0.05, 0.5, 4.0]))
@settings(max_examples=40, deadline=None)
def test_a_read_holds_no_more_unwanted_bytes_than_allowed(name: str, frames: list[int], waste: float, stream_of):
    record = stream_of(name)[0]
    wanted = runs(record, frames)
    groups = list(reads(record, wanted, waste))
    assert [run for group, _, _ in groups for run in group] == wanted
    for group, first, stop in groups:
        assert (first, stop) == (group[0].first, max(run.stop for run in group))
        useful = {packet for run in group for packet in range(run.first, run.stop)}
        useless = sum(record.packet_sizes[sorted(set(range(first, stop)) - useful)].tolist())
        assert useless <= waste * sum(sum(record.packet_sizes[run.first : run.stop].tolist()) for run in group)
    freely = list(reads(record, wanted))
    assert len(freely) <= len(groups)
    for (_, _, stop), (after, first, _) in pairwise(freely):  # only what is far away is read by itself
        assert sum(record.packet_sizes[stop:first].tolist()) > 32 << 10, after
