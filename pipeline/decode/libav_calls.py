"""The compiled part of the libav backend: from packet table to slot in one call, without Python's lock.

Everything here is plain loops; functions of libavcodec and the C library are called by their addresses. All their
arguments are 64-bit words, which is how the calling conventions of 64-bit Unix systems pass integers and pointers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from clipmill.pipeline.decode.targets import FRAME, OFFSET, H, W, X, Y
from clipmill.pipeline.jit import compiled

# addresses in `calls`
CALLS = ("pread", "av_crc", "avcodec_flush_buffers", "avcodec_send_packet", "avcodec_receive_frame",
         "av_image_copy_plane", "av_gettime_relative")  # fmt: skip
_PREAD, _CRC, _FLUSH, _SEND, _RECEIVE, _COPY_PLANE, _CLOCK = range(7)
# places in `handles`
CONTEXT, PACKET, PICTURE, CRC_TABLE, BUFFER, CAPACITY = range(6)
# fields of AVPacket and AVFrame, in words of 64 or 32 bits (FFmpeg 6 to 8)
PACKET_PTS, PACKET_DATA, PACKET_SIZE32 = 1, 3, 8
PICTURE_DATA, PICTURE_PTS = 0, 17
PICTURE_LINESIZE32, PICTURE_WIDTH32, PICTURE_HEIGHT32, PICTURE_FORMAT32 = 16, 26, 27, 29
# places in `report`
READ_US, COPY_US, DECODED = range(3)
UNUSUAL = -1  # an outcome: let the reference decoder do it

_PLANAR_420 = (0, 12)  # AV_PIX_FMT_YUV420P, AV_PIX_FMT_YUVJ420P
_GAP_BYTES = 32 << 10  # to read so many bytes more costs no more than another read


def _caller(bits: int) -> Any:
    @intrinsic
    def call(typingctx: Any, address: Any, words: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            parts = cgutils.unpack_tuple(builder, arguments[1])
            kind = ir.FunctionType(ir.IntType(bits), [ir.IntType(64)] * len(parts))
            return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), parts)

        return (types.int64 if bits == 64 else types.int32)(types.int64, words), generate

    return call


_call32 = _caller(32)  # (address, arguments): a function that returns int or nothing
_call64 = _caller(64)


@compiled
def closed_runs(keys, targets):
    """(K, 3) int64 of the runs of packets to decode: first, stop, and how many targets are served after it.

    For streams whose packets come in the order of their frames. A run begins at a key packet and ends with the last
    wanted frame of its group; runs that touch are one. An empty result: the first frame has no key frame before it.
    """
    runs = np.empty((len(targets), 3), np.int64)
    count = 0
    for row in range(len(targets)):
        frame = targets[row, FRAME]
        if count and frame < runs[count - 1, 1]:
            runs[count - 1, 2] = row + 1
            continue
        group = np.searchsorted(keys, frame, "right") - 1
        if group < 0:
            return runs[:0]
        first = np.int64(keys[group])
        if count and first <= runs[count - 1, 1]:
            runs[count - 1, 1], runs[count - 1, 2] = frame + 1, row + 1
        else:
            runs[count, 0], runs[count, 1], runs[count, 2] = first, frame + 1, row + 1
            count += 1
    return runs[:count]


@compiled
def fill(
    calls, handles, packet, packet32, picture, picture32, table, runs, keys, fd, offset, targets, payload, size, report
):
    """Read, verify, decode and copy. Returns 0, or the bytes the buffer must have, or `UNUSUAL`: anything went wrong.

    calls, handles: addresses, see `CALLS` and `CONTEXT`. packet, packet32, picture, picture32: the memory of an
    AVPacket and an AVFrame as words. table: (packet sizes, CRCs, frame numbers or empty). runs: see `closed_runs`, or
    empty: what it gives for the key packets ``keys``.
    fd, offset: where packet 0 lies. size: (height, width) of the pictures. report: counters, see `READ_US`.
    """
    sizes, crcs, shown = table
    if len(runs) == 0:
        runs = closed_runs(keys, targets)
        if len(runs) == 0:
            return UNUSUAL
    served = np.zeros(len(targets), np.bool_)
    found, read_from, read_until, position = 0, np.int64(0), np.int64(0), np.int64(0)
    for number in range(len(runs)):
        first, stop = runs[number, 0], runs[number, 1]
        _call32(calls[_FLUSH], (handles[CONTEXT],))
        if read_from <= first < read_until:
            position = handles[BUFFER] + _bytes(sizes, read_from, first)
        else:
            read_until = first
        for place in range(first, stop):
            length = np.int64(sizes[place])
            if place >= read_until:
                start_us = _call64(calls[_CLOCK], ())
                read_from, position = place, handles[BUFFER]
                read_until, wanted = _extent(sizes, runs, number, place, handles[CAPACITY])
                if read_until == place:
                    return length
                if not _read(calls, fd, position, wanted, offset + _bytes(sizes, 0, place)):
                    return UNUSUAL
                report[READ_US] += _call64(calls[_CLOCK], ()) - start_us
            crc = np.int64(_call32(calls[_CRC], (handles[CRC_TABLE], np.int64(0xFFFFFFFF), position, length)))
            if (~crc & 0xFFFFFFFF) != np.int64(crcs[place]):
                return UNUSUAL
            packet[PACKET_DATA], packet32[PACKET_SIZE32] = position, length
            packet[PACKET_PTS] = np.int64(shown[place]) if len(shown) else place
            position += length
            if _call32(calls[_SEND], (handles[CONTEXT], handles[PACKET])) < 0:
                return UNUSUAL
            found += _receive(calls, handles, picture, picture32, targets, served, payload, size, report)
        if found < runs[number, 2]:  # frames that leave the decoder late, or something wrong
            _call32(calls[_SEND], (handles[CONTEXT], np.int64(0)))
            found += _receive(calls, handles, picture, picture32, targets, served, payload, size, report)
            if found < runs[number, 2]:
                return UNUSUAL
    return np.int64(0)


@compiled
def _receive(calls, handles, picture, picture32, targets, served, payload, size, report):
    """Take all frames that the decoder has ready; returns the number of targets served.

    A picture of another size or format than packed serves none.
    """
    found = 0
    height, width = size
    base = payload.ctypes.data
    while _call32(calls[_RECEIVE], (handles[CONTEXT], handles[PICTURE])) >= 0:
        report[DECODED] += 1
        frame = picture[PICTURE_PTS]
        row = np.searchsorted(targets[:, FRAME], frame)
        if row == len(targets) or targets[row, FRAME] != frame or served[row]:
            continue
        kind = picture32[PICTURE_FORMAT32]
        if kind != _PLANAR_420[0] and kind != _PLANAR_420[1]:
            continue
        if picture32[PICTURE_WIDTH32] != width or picture32[PICTURE_HEIGHT32] != height:
            continue
        start_us = _call64(calls[_CLOCK], ())
        while row < len(targets) and targets[row, FRAME] == frame:
            x, y, w, h = targets[row, X], targets[row, Y], targets[row, W], targets[row, H]
            to = base + targets[row, OFFSET]
            for plane in range(3):
                stride = np.int64(picture32[PICTURE_LINESIZE32 + plane])
                source = picture[PICTURE_DATA + plane] + y * stride + x
                _call32(calls[_COPY_PLANE], (to, w, source, stride, w, h))
                to += w * h
                if plane == 0:
                    x, y, w, h = x // 2, y // 2, w // 2, h // 2
            served[row] = True
            row += 1
            found += 1
        report[COPY_US] += _call64(calls[_CLOCK], ()) - start_us
    return found


@compiled
def _extent(sizes, runs, number, place, most):
    """Up to which packet to read in one go, from packet ``place`` of run ``number`` on, and how many bytes that is.

    To the end of the run and of those that follow closely, but at most ``most`` bytes.
    """
    until, length = place, np.int64(0)
    for run in range(number, len(runs)):
        if run > number and _bytes(sizes, until, runs[run, 0]) > _GAP_BYTES:
            break
        while until < runs[run, 1]:
            if length + sizes[until] > most:
                return until, length
            length += np.int64(sizes[until])
            until += 1
    return until, length


@compiled
def _bytes(sizes, first, stop):
    total = np.int64(0)
    for place in range(first, stop):
        total += np.int64(sizes[place])
    return total


@compiled
def _read(calls, fd, address, length, offset):
    """True if all bytes came."""
    done = np.int64(0)
    while done < length:  # the kernel may return less than asked
        got = _call64(calls[_PREAD], (np.int64(fd), address + done, length - done, offset + done))
        if got <= 0:
            return False
        done += got
    return True
