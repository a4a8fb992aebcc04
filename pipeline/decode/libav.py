"""The libav backend: PyAV's own libavcodec, called from compiled code. The same frames as ``pyav``, faster.

A clip is one call that runs without Python's lock, from the packet table to the slot: read, verify, decode, copy the
wanted regions. So Python costs nothing per frame, and decode threads do not wait for each other. What is unusual
(damage, other pixel formats, whole frames for `decode`) is left to the ``pyav`` backend.

The library is the one that PyAV brings. What is used of its structures has been the same from FFmpeg 6 to 8; `library`
checks that before the first use.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode import targets as wanted
from clipmill.pipeline.decode.decoder import Decoder, Emit
from clipmill.pipeline.decode.pyav import PyavDecoder
from clipmill.pipeline.decode.runs import runs
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.shard import Reader

_MAX_CONTEXTS = 16
_BUFFER_BYTES = 1 << 20
_MAJORS = (60, 61, 62)  # of libavcodec: FFmpeg 6 to 8
_PADDING = 64  # zero bytes that FFmpeg wants after what it parses
_CRC_32_IEEE_LE = 4  # number of the polynomial
_NO_PTS = -(1 << 63)
_PACKET_WORDS, _PICTURE_WORDS = 6, 18  # of 64 bits, from the beginning of the structure to the last field used
_NO_RUNS = np.empty((0, 3), np.int64)
_EXTRADATA = 16  # bytes into AVCodecParameters: pointer, then size


def new(reader: Reader) -> Decoder:
    """The backend's constructor. Raises ImportError where PyAV's libavcodec is not one that is known."""
    return LibavDecoder(reader)


class LibavDecoder:
    """Persistent codec contexts, one per configuration, flushed between groups of pictures."""

    def __init__(self, reader: Reader) -> None:
        from clipmill.pipeline.decode import libav_calls  # imports the compiler

        self._code = libav_calls
        self._lib = library()
        self._calls = np.array([_address(self._lib, name) for name in libav_calls.CALLS], np.int64)
        self._reader = reader
        self._reference = PyavDecoder(reader)
        self._contexts: OrderedDict[tuple[CodecConfig, int, int], int] = OrderedDict()
        self._handles = np.zeros(6, np.int64)
        self._handles[libav_calls.CRC_TABLE] = self._lib.av_crc_get_table(_CRC_32_IEEE_LE)
        packet, picture = self._lib.av_packet_alloc(), self._lib.av_frame_alloc()
        self._handles[[libav_calls.PACKET, libav_calls.PICTURE]] = packet, picture
        self._words = (*_words(packet, _PACKET_WORDS), *_words(picture, _PICTURE_WORDS))
        self._report = np.zeros(3, np.int64)
        self._grow(_BUFFER_BYTES)
        weakref.finalize(self, _free, self._lib, packet, picture, self._contexts)

    @property
    def read_s(self) -> float:
        """Seconds spent reading."""
        return self._reference.read_s + int(self._report[self._code.READ_US]) / 1e6

    @property
    def decoded(self) -> int:
        """Frames decoded."""
        return self._reference.decoded + int(self._report[self._code.DECODED])

    def decode(self, record: VideoRecord, frames: Sequence[int], emit: Emit) -> None:
        """See `Decoder.decode`."""
        self._reference.decode(record, frames, emit)

    def fill(self, record: VideoRecord, targets: np.ndarray, payload: np.ndarray) -> float:
        """See `clipmill.pipeline.decode.targets.fill`."""
        before_us = int(self._report[self._code.COPY_US])
        if not self._filled(record, targets, payload):
            self._drop(record)
            return wanted.fill(self._reference, record, targets, payload)
        return (int(self._report[self._code.COPY_US]) - before_us) / 1e6

    def _filled(self, record: VideoRecord, targets: np.ndarray, payload: np.ndarray) -> bool:
        """Try to serve all targets in compiled code."""
        frames = targets[:, wanted.FRAME]
        table = (record.packet_sizes, record.packet_crcs, record.presentation)
        packets = len(table[0])
        if len(table[1]) != packets or len(table[2]) not in (0, packets):
            return False
        if not 0 <= frames[0] <= frames[-1] < min(record.num_frames, packets):
            return False
        todo = _NO_RUNS
        if len(record.presentation):
            found = runs(record, np.unique(frames).tolist())
            served = frames.searchsorted([run.wanted[-1] for run in found], "right").tolist()
            todo = np.array([(run.first, run.stop, n) for run, n in zip(found, served, strict=True)], np.int64)
        self._handles[self._code.CONTEXT] = context = self._context(record)
        place = (self._reader.descriptor(record.shard), record.packet_offset)
        size = (record.height, record.width)
        while context:
            outcome = self._code.fill(
                self._calls, self._handles, *self._words, table, todo, record.keyframes, *place, targets, payload, size,
                self._report,
            )  # fmt: skip
            if outcome <= 0:
                return outcome == 0
            if outcome > os.fstat(place[0]).st_size + _BUFFER_BYTES:  # a damaged index may ask for any amount
                return False
            self._grow(outcome)
        return False

    def _grow(self, size: int) -> None:
        self._buffer = np.empty(size, np.uint8)
        self._handles[[self._code.BUFFER, self._code.CAPACITY]] = self._buffer.ctypes.data, size

    def _context(self, record: VideoRecord) -> int:
        key = (record.codec, record.height, record.width)
        context = self._contexts.get(key)
        if context is None:
            while len(self._contexts) >= _MAX_CONTEXTS:
                _close(self._lib, self._contexts.popitem(last=False)[1])
            context = self._contexts[key] = _open(self._lib, record.codec)
        else:
            self._contexts.move_to_end(key)
        return context

    def _drop(self, record: VideoRecord) -> None:
        context = self._contexts.pop((record.codec, record.height, record.width), None)
        if context:
            _close(self._lib, context)


def _free(lib: ctypes.CDLL, packet: int, picture: int, contexts: dict) -> None:
    for context in contexts.values():
        _close(lib, context)
    lib.av_packet_free(ctypes.byref(ctypes.c_void_p(packet)))
    lib.av_frame_free(ctypes.byref(ctypes.c_void_p(picture)))


# --- the library --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """PyAV's libavcodec and libavutil; ImportError where something is not as expected."""
    import av.codec.context

    from clipmill.pipeline.decode import libav_calls as at

    if sys.maxsize < 1 << 32 or not sys.platform.startswith(("linux", "darwin")):
        raise ImportError(f"the libav backend is for 64-bit Linux and macOS, not {sys.platform}")
    lib = ctypes.CDLL(av.codec.context.__file__)  # symbols are looked up in what this module is linked with
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    prototypes = {
        "avcodec_version": (integer,),
        "avcodec_find_decoder_by_name": (pointer, ctypes.c_char_p),
        "avcodec_alloc_context3": (pointer, pointer),
        "avcodec_free_context": (None, pointer),
        "avcodec_parameters_alloc": (pointer,),
        "avcodec_parameters_free": (None, pointer),
        "avcodec_parameters_from_context": (integer, pointer, pointer),
        "avcodec_parameters_to_context": (integer, pointer, pointer),
        "avcodec_open2": (integer, pointer, pointer, pointer),
        "av_opt_set_int": (integer, pointer, ctypes.c_char_p, ctypes.c_int64, integer),
        "av_mallocz": (pointer, size),
        "av_crc_get_table": (pointer, integer),
        "av_packet_alloc": (pointer,),
        "av_packet_free": (None, pointer),
        "av_new_packet": (integer, pointer, integer),
        "av_frame_alloc": (pointer,),
        "av_frame_free": (None, pointer),
        "av_frame_get_buffer": (integer, pointer, integer),
    }
    try:
        for name, (result, *arguments) in prototypes.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        known = lib.avcodec_version() >> 16 in _MAJORS and _as_expected(lib)
        known = known and all(_address(lib, name) for name in at.CALLS)
    except AttributeError as error:
        raise ImportError(f"PyAV's libavcodec lacks a function ({error})") from error
    if not known:
        raise ImportError(f"PyAV's libavcodec {lib.avcodec_version() >> 16} is laid out in a way that is not known")
    return lib


def _as_expected(lib: ctypes.CDLL) -> bool:
    """Whether the library puts into an AVPacket and an AVFrame what the compiled code expects, where it expects it."""
    from clipmill.pipeline.decode import libav_calls as at

    packet, picture = lib.av_packet_alloc(), lib.av_frame_alloc()
    try:
        words, words32 = _words(packet, _PACKET_WORDS)
        good = words[at.PACKET_PTS] == _NO_PTS and lib.av_new_packet(packet, 77) == 0
        good = good and words32[at.PACKET_SIZE32] == 77 and words[at.PACKET_DATA] != 0
        words, words32 = _words(picture, _PICTURE_WORDS)
        good = good and words[at.PICTURE_PTS] == _NO_PTS and words32[at.PICTURE_FORMAT32] == -1
        words32[[at.PICTURE_WIDTH32, at.PICTURE_HEIGHT32, at.PICTURE_FORMAT32]] = 50, 30, 0  # 0: yuv420p
        good = good and lib.av_frame_get_buffer(picture, 0) == 0
        good = good and words[at.PICTURE_DATA : at.PICTURE_DATA + 3].all()
        luma, *chroma = words32[at.PICTURE_LINESIZE32 : at.PICTURE_LINESIZE32 + 4].tolist()
        return bool(good) and 50 <= luma < 1024 and 25 <= chroma[0] == chroma[1] < 1024 and chroma[2] == 0
    finally:
        _free(lib, packet, picture, {})


def _words(address: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory of the library as words of 64 and of 32 bits."""
    memory = (ctypes.c_int64 * count).from_address(address)
    words = np.frombuffer(memoryview(memory), np.int64)
    return words, words.view(np.int32)


def _address(lib: ctypes.CDLL, name: str) -> int:
    """Where a function is; AttributeError if the library does not have it."""
    return ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0


def _open(lib: ctypes.CDLL, codec: CodecConfig) -> int:
    """A new AVCodecContext with one thread; 0 if there is no such decoder or it does not open."""
    decoder = lib.avcodec_find_decoder_by_name(codec.codec.encode())
    if not decoder:
        return 0
    context, parameters = lib.avcodec_alloc_context3(decoder), lib.avcodec_parameters_alloc()
    good = lib.avcodec_parameters_from_context(parameters, context) >= 0
    if codec.extradata:
        data = lib.av_mallocz(len(codec.extradata) + _PADDING)  # belongs to the parameters, which free it
        ctypes.memmove(data, codec.extradata, len(codec.extradata))
        ctypes.c_void_p.from_address(parameters + _EXTRADATA).value = data
        ctypes.c_int.from_address(parameters + _EXTRADATA + 8).value = len(codec.extradata)
    good = good and lib.avcodec_parameters_to_context(context, parameters) >= 0
    lib.avcodec_parameters_free(ctypes.byref(ctypes.c_void_p(parameters)))
    good = good and lib.av_opt_set_int(context, b"threads", 1, 0) >= 0
    if good and lib.avcodec_open2(context, decoder, None) >= 0:
        return context
    _close(lib, context)
    return 0


def _close(lib: ctypes.CDLL, context: int) -> None:
    lib.avcodec_free_context(ctypes.byref(ctypes.c_void_p(context)))
