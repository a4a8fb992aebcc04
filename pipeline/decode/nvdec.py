"""The nvdec backend: NVDEC through PyNvVideoCodec, packets from the table, no container. Planes are the codec's own.

A session costs tens of milliseconds to open, so each thread keeps one per codec and picture size and feeds it clip
after clip. Pictures are copied to the host: the slot is there, and a clip of 16 frames at 170x128 is half a megabyte,
which the bus moves in a small part of the time that decoding it takes.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode import gpu
from clipmill.pipeline.decode.annexb import AnnexB
from clipmill.pipeline.decode.decoder import DecodeError, Decoder, Emit, Planes, UnsupportedCodecError, check
from clipmill.pipeline.decode.runs import Feed, Run, runs
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader

_CODECS = {"h264": "H264", "hevc": "HEVC", "libdav1d": "AV1"}
_MAX_SESSIONS = 4  # per thread
_MAX_CONVERTERS = 64


def new(reader: Reader) -> Decoder:
    """The backend's constructor. Raises ImportError without a GPU, its driver or PyNvVideoCodec."""
    if gpu.count() == 0:
        raise ImportError("the CUDA driver shows no GPU")
    try:
        import PyNvVideoCodec
    except ModuleNotFoundError:
        raise
    except Exception as error:  # it checks the driver on import and raises whatever it finds
        raise ImportError(f"PyNvVideoCodec does not load: {str(error).splitlines()[0]}") from error
    return NvdecDecoder(reader, PyNvVideoCodec, gpu.number(), gpu.primary_context(gpu.number()))


class NvdecDecoder:
    """Sessions of one thread on GPU ``device``, in the CUDA context with handle ``context``.

    library: the module PyNvVideoCodec (2.x).
    """

    def __init__(self, reader: Reader, library: Any, device: int, context: int) -> None:
        self._feed = Feed(reader)
        self._library = library
        self._device = device
        self._context = context
        self._sessions: OrderedDict[tuple[str, int, int], Any] = OrderedDict()
        self._converters: OrderedDict[CodecConfig, AnnexB] = OrderedDict()
        self.decoded = 0

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._feed.read_s

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        check("nvdec", record, frames, tuple(_CODECS))
        session = self._session(record)
        for run, packets in self._feed.packets(record, runs(record, frames)):
            try:
                missing = self._run(session, record, run, packets, emit)
            except (RuntimeError, ValueError) as error:
                self._sessions.clear()
                raise DecodeError(f"{record.shard}: {record.key!r} does not decode ({error})") from error
            if missing:
                self._sessions.clear()
                raise DecodeError(f"{record.shard}: {record.key!r} gave no frame {min(missing)}")

    def _run(self, session: Any, record: VideoRecord, run: Run, packets: list[memoryview], emit: Emit) -> set[int]:
        """Decode a run and end the stream, so that the session is empty for the next; returns what did not come."""
        converter = self._converter(record.codec)
        missing = set(run.wanted)
        for number, packet in zip(run.numbers(record).tolist(), packets, strict=True):
            data = np.frombuffer(converter.convert(packet, first=packet is packets[0]), np.uint8)
            self._take(session, data, number, record, missing, emit)
        self._take(session, np.empty(0, np.uint8), 0, record, missing, emit)
        return missing

    def _take(
        self, session: Any, data: np.ndarray, number: int, record: VideoRecord, missing: set[int], emit: Emit
    ) -> None:
        """Feed one packet (empty: end of stream) and emit the wanted frames that come out; they live until the next."""
        packet = self._library.PacketData()
        packet.bsl_data = data.ctypes.data if len(data) else 0
        packet.bsl = len(data)
        packet.pts = number
        for frame in session.Decode(packet):
            self.decoded += 1
            shown = int(frame.getPTS())
            if shown in missing:
                missing.discard(shown)
                emit(shown, self._planes(frame, record))

    def _planes(self, frame: Any, record: VideoRecord) -> Planes:
        height, width = record.height, record.width
        size = height * width * 3 // 2
        if frame.format != self._library.Pixel_Format.NV12 or frame.framesize() != size:
            raise DecodeError(f"a frame of {frame.framesize()} bytes in {frame.format}, {width}x{height} NV12 expected")
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(frame.GetPtrToPlane(0)))
        chroma = data[height * width :].reshape(height // 2, width // 2, 2)
        return data[: height * width].reshape(height, width), chroma[..., 0], chroma[..., 1]

    def _session(self, record: VideoRecord) -> Any:
        key = (record.codec.codec, record.height, record.width)
        session = self._sessions.get(key)
        if session is not None:
            self._sessions.move_to_end(key)
            return session
        if len(self._sessions) >= _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        codec = getattr(self._library.cudaVideoCodec, _CODECS[record.codec.codec])
        limits = self._library.GetDecoderCaps(gpuid=self._device, codec=codec)
        if record.width < limits["width_min"] or record.height < limits["height_min"]:
            raise UnsupportedCodecError(
                f"{record.shard}: {record.key!r} is {record.width}x{record.height}, this GPU decodes {key[0]} from "
                f"{limits['width_min']}x{limits['height_min']} up; pack with a larger --short-side or as H.264"
            )
        session = self._sessions[key] = self._library.CreateDecoder(
            gpuid=self._device,
            codec=codec,
            cudacontext=self._context,
            usedevicememory=False,
            maxwidth=record.width,
            maxheight=record.height,
        )
        return session

    def _converter(self, codec: CodecConfig) -> AnnexB:
        converter = self._converters.get(codec)
        if converter is None:
            if len(self._converters) >= _MAX_CONVERTERS:
                self._converters.popitem(last=False)
            converter = self._converters[codec] = AnnexB.of(codec)
        return converter
