"""The nvdec backend on a stand-in for PyNvVideoCodec that decodes with FFmpeg, and on a GPU where there is one.

The stand-in has the parts of the library's interface (2.x) that are used, and its habits: packets by address, start
codes wanted, frames by time stamp, in memory that is overwritten by the next packet, an empty packet ends the stream.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from clipmill.pipeline.decode import gpu, nvdec
from clipmill.pipeline.decode.decoder import DecodeError, UnsupportedCodecError
from clipmill.pipeline.shard import ShardReader

STREAMS = ("h264", "h264_intra", "h264_open", "h264_annexb", "hevc", "hevc_open", "av1")


class Codec(Enum):
    H264 = "h264"
    HEVC = "hevc"
    AV1 = "libdav1d"


class Frame:
    def __init__(self, frame: av.VideoFrame) -> None:
        self.data = frame.to_ndarray(format="nv12").copy()
        self.pts = frame.pts
        self.format = "NV12"

    def getPTS(self) -> int:
        return self.pts

    def framesize(self) -> int:
        return self.data.size

    def GetPtrToPlane(self, plane: int) -> int:
        assert plane == 0
        return self.data.ctypes.data


class Session:
    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.frames: list[Frame] = []
        self._open()

    def _open(self) -> None:
        self.context = av.CodecContext.create(self.codec.value, "r")
        self.context.thread_count = 1

    def Decode(self, packet: Any) -> list[Frame]:
        for frame in self.frames:
            frame.data[:] = 255
        try:
            if packet.bsl == 0:
                found = self.context.decode(None)
                self._open()
            else:
                data = bytes((ctypes.c_uint8 * packet.bsl).from_address(packet.bsl_data))
                if self.codec is not Codec.AV1:
                    assert data.startswith((b"\0\0\0\1", b"\0\0\1"))
                fed = av.Packet(data)
                fed.pts = packet.pts
                found = self.context.decode(fed)
        except av.FFmpegError as error:
            raise RuntimeError(f"cuvidParseVideoData: {error}") from error
        self.frames = [Frame(frame) for frame in found]
        return self.frames


class Library:
    def __init__(self, smallest: int = 16) -> None:
        self.Pixel_Format = SimpleNamespace(NV12="NV12")
        self.cudaVideoCodec = Codec
        self.smallest = smallest
        self.opened: list[dict] = []

    def PacketData(self) -> SimpleNamespace:
        return SimpleNamespace(bsl_data=0, bsl=0, pts=0)

    def GetDecoderCaps(self, gpuid: int, codec: Codec) -> dict[str, int]:
        return {"width_min": self.smallest, "height_min": self.smallest}

    def CreateDecoder(self, **arguments: Any) -> Session:
        self.opened.append(arguments)
        return Session(arguments["codec"])


def decoder_on(library: Library) -> nvdec.NvdecDecoder:
    return nvdec.NvdecDecoder(ShardReader(), library, 3, 4711)


def check_frames(decoder: nvdec.NvdecDecoder, record, frames: list[int], truth: list[np.ndarray]) -> None:
    found = {}

    def emit(number, planes):
        assert number not in found
        found[number] = np.concatenate([plane.ravel() for plane in planes])

    decoder.decode(record, frames, emit)
    assert sorted(found) == frames
    for number, data in found.items():
        assert np.array_equal(data, truth[number].ravel())


@pytest.mark.parametrize("name", STREAMS)
def test_planes_are_bit_equal_and_one_session_serves_all_clips(name: str, stream_of, frames_of):
    record, library = stream_of(name)[0], Library()
    decoder, truth = decoder_on(library), frames_of(record)
    requests = [[0], [40], [7, 8, 9], [3, 17, 39], list(range(41)), [12], [13, 25, 29], [2]]
    for frames in requests:
        check_frames(decoder, record, frames, truth)
    check_frames(decoder, stream_of(name)[1], [0], frames_of(stream_of(name)[1]))
    (arguments,) = library.opened
    assert arguments["codec"].value == record.codec.codec
    assert (arguments["gpuid"], arguments["cudacontext"]) == (3, 4711)
    assert (arguments["maxwidth"], arguments["maxheight"]) == (record.width, record.height)
    assert arguments["usedevicememory"] is False
    assert decoder.read_s > 0
    assert decoder.decoded >= sum(map(len, requests))


def test_a_session_per_codec_and_size_up_to_a_bound(stream_of):
    library = Library()
    decoder = decoder_on(library)
    record = stream_of("h264")[0]
    for width in range(16, 16 + 2 * nvdec._MAX_SESSIONS + 4, 2):
        decoder._session(replace(record, width=width))
        decoder._session(replace(record, width=width))
    assert len(library.opened) == nvdec._MAX_SESSIONS + 2
    assert len(decoder._sessions) == nvdec._MAX_SESSIONS
    decoder._session(stream_of("hevc")[0])
    assert len(library.opened) == nvdec._MAX_SESSIONS + 3


def test_what_goes_wrong_is_typed_and_the_session_is_given_up(stream_of, frames_of):
    record, library = stream_of("h264")[0], Library()
    decoder = decoder_on(library)
    with pytest.raises(DecodeError, match="a frame of 9216 bytes in NV12, 48x64 NV12 expected"):
        decoder.decode(replace(record, width=48), [0], lambda *_: None)
    silent = SimpleNamespace(Decode=lambda packet: [])  # as with pictures that the hardware cannot decode
    decoder._sessions["h264", record.height, record.width] = silent
    with pytest.raises(DecodeError, match="gave no frame 3"):
        decoder.decode(record, [3, 4], lambda *_: None)
    check_frames(decoder, record, [3], frames_of(record))
    assert len(library.opened) == 2


def test_pictures_below_the_hardwares_smallest_size_are_refused(stream_of):
    with pytest.raises(UnsupportedCodecError, match="is 96x64, this GPU decodes hevc from 144x144 up"):
        decoder_on(Library(smallest=144)).decode(stream_of("hevc")[0], [0], lambda *_: None)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "count", lambda: 0)
    with pytest.raises(ImportError, match="shows no GPU"):
        nvdec.new(ShardReader())


def test_the_gpu_of_a_process_is_its_place_on_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert gpu.number() == 0
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert gpu.number() == 5


def test_without_a_driver_there_is_no_context(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "_driver", lambda: None)
    assert gpu.count() == 0
    with pytest.raises(RuntimeError, match="no GPU 0 for the CUDA driver"):
        gpu.primary_context(0)


def test_the_drivers_answers_are_used(monkeypatch: pytest.MonkeyPatch):
    def count(pointer) -> int:
        pointer._obj.value = 2
        return 0

    def device(pointer, number) -> int:
        pointer._obj.value = number
        return 0 if number < 2 else 101

    def retain(pointer, handle) -> int:
        pointer._obj.value = 0x1000 + handle.value
        return 0 if handle.value == 0 else 2

    driver = SimpleNamespace(cuDeviceGetCount=count, cuDeviceGet=device, cuDevicePrimaryCtxRetain=retain)
    monkeypatch.setattr(gpu, "_driver", lambda: driver)
    assert gpu.count() == 2
    assert gpu.primary_context(0) == 0x1000
    with pytest.raises(RuntimeError, match=r"GPU 1 cannot be used \(CUDA error 2\)"):
        gpu.primary_context(1)
    with pytest.raises(RuntimeError, match=r"no GPU 2 for the CUDA driver \(it shows 2\)"):
        gpu.primary_context(2)
