"""What every decoder backend must do, over all that are discovered: the same frames for the same numbers.

A backend whose libraries are not here is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipmill.pipeline.decode import gpu
from clipmill.pipeline.decode.decoder import DecodeError, Decoder, UnsupportedCodecError, backends, new_decoder
from clipmill.pipeline.decode.targets import fill
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import ShardError, ShardReader

_spec = importlib.util.spec_from_file_location(
    "clipmill_test_streams", Path(__file__).parents[1] / "pipeline/decode/conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
streams = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(streams)
stream_of = streams.stream_of

ALL = tuple(streams.STREAMS)
CODED = tuple(name for name in ALL if name != "raw")
IN_ORDER = tuple(name for name in CODED if not name.endswith("_open"))
GPU = ("h264", "h264_intra", "h264_open", "h264_annexb", "mjpeg")  # the pictures are too small for HEVC and AV1 there

TAKES = {
    "auto": ALL,
    "pyav": CODED,
    "libav": CODED,
    "raw": ("raw",),
    "jpeg": ("mjpeg",),
    "torchcodec": CODED,
    "decord": tuple(name for name in IN_ORDER if name != "av1"),
    "dali": tuple(name for name in GPU if name in IN_ORDER) if gpu.count() else ("mjpeg",),
    "nvdec": tuple(name for name in GPU if name != "mjpeg"),
    "torchcodec_cuda": GPU,
}
RGB = {"torchcodec": 3, "decord": 3, "dali": 5, "torchcodec_cuda": 5}  # levels that planes may differ after RGB

PATTERNS = {
    "sequential": [list(range(41))],
    "first and last": [[0], [40], [0, 40]],
    "borders of groups": [[7], [8], [9], [7, 8], [10, 11, 12, 13], [23, 24, 25], [15, 16, 31, 32, 33]],
    "sparse": [[2, 7, 13, 18, 24, 29, 35, 40], [5, 38]],
    "strided": [list(range(1, 41, 2)), list(range(3, 40, 4))],
    "repeated": [[12, 13], [12, 13], [12, 13]],
    "backwards": [[number] for number in range(40, -1, -1)],
}


def opened(name: str, reader: ShardReader | None = None) -> Decoder:
    """A decoder of a backend that works here."""
    try:
        return new_decoder(name, reader or ShardReader())
    except ValueError as error:
        pytest.skip(str(error))


def pairs(known: bool) -> list:
    """(backend, stream) that the backend takes, or does not."""
    return [
        pytest.param(name, stream, marks=[pytest.mark.gpu] if name in ("nvdec", "torchcodec_cuda") else [])
        for name in backends()
        for stream in ALL
        if (stream in TAKES.get(name, ALL)) == known
    ]


every_backend = pytest.mark.parametrize("name", backends())


def collect(decoder: Decoder, record: VideoRecord, frames: list[int]) -> dict[int, np.ndarray]:
    """Decode and check the form of what comes."""
    found: dict[int, np.ndarray] = {}

    def emit(number, planes):
        assert number not in found
        assert [plane.dtype for plane in planes] == [np.uint8] * 3
        half = (record.height // 2, record.width // 2)
        assert [plane.shape for plane in planes] == [(record.height, record.width), half, half]
        found[number] = streams.joined(planes)

    decoder.decode(record, frames, emit)
    assert sorted(found) == frames
    return found


def compare(name: str, record: VideoRecord, found: dict[int, np.ndarray]) -> None:
    """Every frame says its own number and is the reference's: bit for bit, but for RGB and for JPEG's rounding."""
    allowed = 1 if name == "jpeg" else RGB.get(name, 0)
    truth = streams.reference(record)
    for number, frame in found.items():
        assert streams.number_in(frame[: streams.HEIGHT]) == number
        assert np.abs(frame.astype(int) - truth[number]).max() <= allowed


def test_every_backend_is_in_the_table():
    assert set(backends()) == set(TAKES)


@pytest.mark.parametrize(("name", "stream"), pairs(True))
def test_the_frames_are_those_that_were_asked_for(name: str, stream: str, stream_of):
    decoder, index = opened(name), stream_of(stream)
    rng = np.random.default_rng(0)
    anywhere = [sorted(rng.choice(41, size, replace=False).tolist()) for size in (1, 2, 5, 16)]
    for requests in (*PATTERNS.values(), anywhere):
        for frames in requests:
            before = decoder.decoded
            compare(name, index[0], collect(decoder, index[0], frames))
            assert decoder.decoded - before >= len(frames)
    assert decoder.read_s > 0
    compare(name, index[1], collect(decoder, index[1], [0]))  # a video of one frame


@pytest.mark.parametrize(("name", "stream"), pairs(True))
def test_regions_go_to_their_places_in_a_slot(name: str, stream: str, stream_of):
    decoder, record = opened(name), stream_of(stream)[0]
    rng = np.random.default_rng(2)
    for frames in ([3], [0, 1, 2, 3], [5, 5, 6, 17, 17, 40]):
        rows, end = [], 7
        for frame in frames:
            x, y = 2 * rng.integers(0, record.width // 4), 2 * rng.integers(0, record.height // 4)
            w, h = 2 * rng.integers(1, (record.width - x) // 2 + 1), 2 * rng.integers(1, (record.height - y) // 2 + 1)
            rows.append([frame, x, y, w, h, end])
            end += w * h * 3 // 2
        targets, payload = np.array(rows, np.int64), np.full(end + 5, 77, np.uint8)
        decoded = decoder.decoded
        fill(decoder, record, targets, payload)
        assert decoder.decoded - decoded >= len(set(frames))
        whole = collect(decoder, record, sorted(set(frames)))
        expected = [np.full(7, 77, np.uint8)]
        for frame, x, y, w, h, _ in rows:
            luma, chroma = np.split(whole[frame].ravel(), [record.height * record.width])
            planes = (luma.reshape(record.height, -1), *chroma.reshape(2, record.height // 2, record.width // 2))
            expected.append(planes[0][y : y + h, x : x + w].ravel())
            expected += [plane[y // 2 : (y + h) // 2, x // 2 : (x + w) // 2].ravel() for plane in planes[1:]]
        assert np.array_equal(payload, np.concatenate([*expected, np.full(5, 77, np.uint8)]))


@pytest.mark.parametrize(("name", "stream"), pairs(False))
def test_other_codecs_are_refused_as_such(name: str, stream: str, stream_of):
    decoder, record = opened(name), stream_of(stream)[0]
    with pytest.raises(UnsupportedCodecError, match="choose decoder 'auto'") as caught:
        decoder.decode(record, [0], lambda *_: None)
    assert "decoder '" in str(caught.value)
    assert record.shard in str(caught.value)


@every_backend
def test_frames_that_do_not_exist_are_an_error(name: str, stream_of):
    decoder, record = opened(name), stream_of(TAKES[name][0])[0]
    for frames in ([-1], [41], [40, 41], [7000]):
        with pytest.raises(DecodeError, match="of 41"):
            decoder.decode(record, frames, lambda *_: None)


@every_backend
def test_damage_on_the_disk_is_a_typed_error_and_does_no_harm_to_others(name: str, stream_of, tmp_path: Path):
    decoder, record = opened(name), stream_of(TAKES[name][0])[0]
    copy = Path(shutil.copy(record.shard, tmp_path / "copy.tar"))
    damaged = replace(record, shard=str(copy))
    data = bytearray(copy.read_bytes())
    data[record.packet_offset + int(record.packet_sizes[:10].sum()) + 5] ^= 1  # in packet 10
    copy.write_bytes(data)
    with pytest.raises(ShardError, match="altered"):
        decoder.decode(damaged, [10], lambda *_: None)
    copy.write_bytes(data[: record.packet_offset + 100])
    with pytest.raises(ShardError, match=r"truncated|altered"):
        decoder.decode(damaged, [10], lambda *_: None)
    with pytest.raises(ShardError, match="cannot be opened"):
        decoder.decode(replace(record, shard=str(tmp_path / "gone.tar")), [10], lambda *_: None)
    compare(name, record, collect(decoder, record, [9, 10]))


@pytest.mark.parametrize(("name", "stream"), [pair for pair in pairs(True) if pair.values[1] != "raw"])
def test_packets_that_do_not_decode_are_a_typed_error(name: str, stream: str, stream_of, tmp_path: Path):
    decoder, record = opened(name), stream_of(stream)[0]
    rng = np.random.default_rng(1)
    data = bytearray(Path(record.shard).read_bytes())
    crcs, starts = (
        record.packet_crcs.copy(),
        record.packet_offset + np.cumsum(record.packet_sizes) - record.packet_sizes,
    )
    for number, (start, size) in enumerate(zip(starts.tolist(), record.packet_sizes.tolist(), strict=True)):
        data[start : start + size] = rng.bytes(size)
        crcs[number] = zlib.crc32(data[start : start + size])
    path = tmp_path / "nonsense.tar"
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=r"nonsense\.tar"):
        decoder.decode(replace(record, shard=str(path), packet_crcs=crcs), [3, 10], lambda *_: None)
    compare(name, record, collect(decoder, record, [3, 10, 40]))


@every_backend
def test_threads_share_a_reader_but_no_decoder(name: str, stream_of):
    reader, record = ShardReader(), stream_of(TAKES[name][0])[0]
    opened(name, reader)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            decoder, rng = new_decoder(name, reader), np.random.default_rng(seed)
            for _ in range(6):
                compare(name, record, collect(decoder, record, sorted(rng.choice(41, 6, replace=False).tolist())))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@every_backend
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files and threads in /proc")
def test_neither_files_nor_threads_are_left_behind(name: str, stream_of):
    decoder, record = opened(name), stream_of(TAKES[name][0])[0]

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for _ in range(5):
        collect(decoder, record, [3, 20])
    before = count()
    for number in range(40):
        collect(decoder, record, [number])
    assert count() == before
