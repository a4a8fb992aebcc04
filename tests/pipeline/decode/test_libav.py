"""The compiled libav backend: the frames of the reference, region by region, from every kind of stream."""

import numpy as np
import pytest

from clipmill.pipeline.decode import libav, libav_calls
from clipmill.pipeline.decode.decoder import DecodeError, new_decoder
from clipmill.pipeline.decode.targets import FRAME, Sink, copy_stored, fill
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import ShardError, ShardReader

KINDS = ("h264", "h264_intra", "h264_open", "h264_annexb", "hevc", "hevc_open", "av1", "mjpeg")


def regions(record, frames, rng=None) -> tuple[np.ndarray, np.ndarray]:
    """Targets for the sorted ``frames``, whole or random regions, and an empty payload for them."""
    table = np.zeros((len(frames), 6), np.int64)
    table[:, FRAME] = frames
    table[:, 3:5] = record.width, record.height
    for row in table if rng is not None else ():
        for place, side in ((1, record.width), (2, record.height)):
            row[place] = 2 * rng.integers(side // 2)
            row[place + 2] = 2 * rng.integers(1, (side - row[place]) // 2 + 1)
    sizes = table[:, 3] * table[:, 4] * 3 // 2
    table[:, 5] = np.cumsum(sizes) - sizes
    return table, np.zeros(sizes.sum(), np.uint8)


def expected(record, truth, table) -> np.ndarray:
    """The same payload from whole frames that are already decoded."""
    payload = np.zeros(int((table[:, 3] * table[:, 4] * 3 // 2).sum()), np.uint8)
    sink = Sink(table, payload)
    area = record.height * record.width
    for frame in np.unique(table[:, FRAME]).tolist():
        whole = truth[frame].ravel()
        u, v = whole[area:].reshape(2, record.height // 2, record.width // 2)
        sink.put(frame, (whole[:area].reshape(record.height, record.width), u, v))
    return payload


@pytest.mark.parametrize("name", KINDS)
def test_random_regions_of_random_frames_are_those_of_the_reference(name: str, stream_of, frames_of):
    index = stream_of(name)
    decoder = new_decoder("libav", ShardReader())
    rng = np.random.default_rng(len(name))
    for record in index:
        truth = frames_of(record)
        for _ in range(12):
            frames = np.sort(rng.integers(record.num_frames, size=rng.integers(1, 12)))  # some of them twice
            table, payload = regions(record, frames, rng)
            fill(decoder, record, table, payload)
            assert np.array_equal(payload, expected(record, truth, table))
    assert decoder._reference.decoded == 0, "everything was left to the reference"


def test_each_group_is_decoded_up_to_its_last_wanted_frame(stream_of):
    record = stream_of("h264")[0]
    decoder = new_decoder("libav", ShardReader())
    for frames, decoded in (([0], 1), ([7], 8), ([8], 1), ([3, 4, 17], 5 + 2), ([6, 9], 7 + 2), ([2, 26], 3 + 3)):
        before = decoder.decoded
        fill(decoder, record, *regions(record, frames))
        assert decoder.decoded - before == decoded
    intra = stream_of("h264_intra")[0]
    before = decoder.decoded
    fill(decoder, intra, *regions(intra, [1, 5, 9, 40]))
    assert decoder.decoded - before == 4


def test_a_small_buffer_is_read_in_parts_and_grows_for_a_large_packet(stream_of, frames_of):
    record = stream_of("h264")[0]
    decoder = libav.LibavDecoder(ShardReader())
    decoder._grow(max(16, int(record.packet_sizes.min())))
    table, payload = regions(record, range(record.num_frames))
    fill(decoder, record, table, payload)
    assert np.array_equal(payload, expected(record, frames_of(record), table))
    assert len(decoder._buffer) == record.packet_sizes.max()
    assert decoder._reference.decoded == 0


def test_runs_end_at_gaps_and_key_frames():
    def runs(keys, frames):
        table = np.zeros((len(frames), 6), np.int64)
        table[:, FRAME] = frames
        return libav_calls.closed_runs(np.array(keys, np.uint32), table).tolist()

    assert runs([0, 8, 16], [3, 4, 4]) == [[0, 5, 3]]
    assert runs([0, 8, 16], [7, 8, 20]) == [[0, 9, 2], [16, 21, 3]]
    assert runs([0, 8, 16], [0, 15]) == [[0, 1, 1], [8, 16, 2]]
    assert runs([4, 8], [3, 9]) == []


def altered(index, folder, change) -> ShardIndex:
    for path in index.root.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".tar":
            data = change(data)
        (folder / path.name).write_bytes(data)
    return ShardIndex.open(folder)


def test_damage_is_told_as_the_reference_tells_it(stream_of, tmp_path):
    whole = stream_of("h264")
    record = whole[0]

    def flip(data):
        data[record.packet_offset + int(record.packet_sizes[:9].sum()) + 4] ^= 8
        return data

    (tmp_path / "flip").mkdir()
    broken = altered(whole, tmp_path / "flip", flip)[0]
    decoder = new_decoder("libav", ShardReader())
    with pytest.raises(ShardError, match=r"packet 9 of .* is altered"):
        fill(decoder, broken, *regions(broken, [12]))
    table, payload = regions(broken, [3])
    fill(decoder, broken, table, payload)  # the rest of it still works
    assert payload.any()

    (tmp_path / "cut").mkdir()
    cut = altered(whole, tmp_path / "cut", lambda data: data[: record.packet_offset + 10])[0]
    with pytest.raises(ShardError, match="truncated"):
        fill(decoder, cut, *regions(cut, [12]))
    for frames in ([-1], [record.num_frames]):
        with pytest.raises(DecodeError, match=f"of {record.num_frames}"):
            fill(decoder, record, *regions(record, frames))


def test_a_lying_index_is_damage(stream_of):
    from dataclasses import replace

    record = stream_of("h264")[0]
    decoder = new_decoder("libav", ShardReader())
    with pytest.raises(DecodeError, match="decodes to 96x64, packed 64x48"):
        fill(decoder, *(one := replace(record, width=64, height=48),), *regions(one, [2]))
    late = replace(record, keyframes=record.keyframes[1:])
    with pytest.raises(DecodeError, match="no key frame before it"):
        fill(decoder, late, *regions(late, [2]))
    unknown = replace(record, codec=replace(record.codec, codec="nonsense"))
    with pytest.raises(ValueError, match="nonsense"):
        fill(decoder, unknown, *regions(unknown, [2]))


def test_contexts_are_bounded(stream_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libav, "_MAX_CONTEXTS", 2)
    decoder = libav.LibavDecoder(ShardReader())
    for name in ("h264", "hevc", "mjpeg", "h264_open", "h264"):
        record = stream_of(name)[0]
        fill(decoder, record, *regions(record, [5]))
    assert len(decoder._contexts) == 2


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch):
    libav.library.cache_clear()
    monkeypatch.setattr(libav_calls, "PACKET_SIZE32", 9)
    with pytest.raises(ImportError, match="not known"):
        libav.library()
    monkeypatch.undo()
    monkeypatch.setattr(libav, "_MAJORS", (57,))
    with pytest.raises(ImportError, match="libavcodec"):
        libav.library()
    libav.library.cache_clear()


def test_stored_frames_are_copied_region_by_region(stream_of, frames_of):
    record = stream_of("h264")[0]
    truth = frames_of(record)
    table, payload = regions(record, np.array([0, 0, 7, 31]), np.random.default_rng(1))
    copy_stored(np.concatenate(truth).ravel(), record.height, record.width, table, payload)
    assert np.array_equal(payload, expected(record, truth, table))
