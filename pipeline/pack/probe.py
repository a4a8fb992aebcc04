"""Opening untrusted media: what kind of thing it is, and which streams to take.

A source is opened once, and every reader shares that descriptor, so that it cannot be swapped in between. FFmpeg sees
a nameless stream of bytes and may use the demuxers of real media files only: no playlists, no network, no other files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import av
from av.audio.stream import AudioStream
from av.container import Flags, InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from clipmill.datasets.files import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from clipmill.pipeline.pack.outcome import Rejected

_DEMUXERS = (
    "aac,ac3,aiff,ape,apng,asf,au,av1,avi,caf,dts,dv,eac3,flac,flv,gif,h263,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,"
    "mp3,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,tta,vc1,vvc,w64,wav,wtv,wv,yuv4mpegpipe,amr"
)
_PICTURE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*", b"P4\n", b"P5\n", b"P6\n")
_PICTURE_BRANDS = (b"avif", b"heic", b"heix", b"mif1")
_MEDIA_MAGIC = (b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"FLV", b"ID3", b"fLaC", b"\x30\x26\xb2\x75", b"\x00\x00\x01\xba")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
_COVER = Disposition.attached_pic | Disposition.timed_thumbnails
_BUFFER_BYTES = 1 << 16


class Media:
    """One opened source file. Use as a context; raises `Rejected` for whatever is not a readable regular file."""

    def __init__(self, path: str) -> None:
        self.suffix = PurePath(path).suffix.lower()
        try:  # a pipe without a writer would block a plain open for ever
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot_open(error) from error
        self._file = os.fdopen(descriptor, "rb", buffering=0) if _regular(descriptor) else None
        if self._file is None:
            os.close(descriptor)
            raise Rejected("not_a_file", "a folder, pipe, socket or device")
        self._stat = os.fstat(descriptor)
        self.size = self._stat.st_size
        if self.size == 0:
            self._file.close()
            raise Rejected("empty", "zero bytes")

    def __enter__(self) -> Media:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def read(self, count: int = -1) -> bytes:
        """Up to ``count`` bytes from the current position on."""
        assert self._file is not None
        try:
            return self._file.read(count) or b""
        except OSError as error:
            raise Rejected("io", f"reading failed: {error.strerror}") from error

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position."""
        assert self._file is not None
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        assert self._file is not None
        return self._file.tell()

    def head(self) -> bytes:
        """The first bytes, enough to tell kinds apart."""
        self.seek(0)
        return self.read(64)

    def digest(self) -> bytes:
        """BLAKE2b-128 of the whole file."""
        state = hashlib.blake2b(digest_size=16)
        self.seek(0)
        while block := self.read(1 << 20):
            state.update(block)
        return state.digest()

    def check_unchanged(self) -> None:
        """Raise `Rejected` if somebody wrote to the file since it was opened."""
        assert self._file is not None
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise Rejected("changed", f"{self._stat.st_size} bytes when opened, {now.st_size} bytes now")

    @contextmanager
    def container(self) -> Iterator[InputContainer]:
        """The file as FFmpeg sees it, from its beginning."""
        if self.head()[4:8] in _BOXES:
            self._check_index()
        self.seek(0)
        try:
            container = av.open(
                _Bytes(self),
                "r",
                options={"format_whitelist": _DEMUXERS},
                metadata_errors="replace",
                buffer_size=_BUFFER_BYTES,
            )
        except av.FFmpegError as error:
            raise self._unreadable(error) from error
        with container:
            if container.format.name == "avi":
                container.flags &= ~Flags.gen_pts.value
            yield container

    def _check_index(self) -> None:
        """Raise `Rejected` if an mp4 ends within its index: what is left of its tables may be wrong as well.

        Boxes (ISO/IEC 14496-12, 4.2) up to the index: length in 4 bytes, name, and for 1 the length in 8 bytes.
        """
        place = 0
        while place < self.size:
            self.seek(place)
            head = self.read(16)
            length, name = int.from_bytes(head[:4], "big"), head[4:8]
            length = int.from_bytes(head[8:16], "big") if length == 1 else length or self.size - place
            if name == b"moov" and place + length > self.size:
                missing = place + length - self.size
                raise Rejected("unreadable", f"a media file that is cut off: {missing} bytes of its index are missing")
            if name == b"moov" or len(head) < 8 or length < 8:
                return
            place += length

    def _unreadable(self, error: av.FFmpegError) -> Rejected:
        raise_if_memory(error)
        head = self.head()
        if head.startswith(_MEDIA_MAGIC) or head[4:8] in _BOXES:
            return Rejected("unreadable", f"a media file that is damaged or cut off ({error.strerror})")
        return Rejected("not_media", f"no media format recognises it ({error.strerror})")


class _Bytes:
    """What FFmpeg gets of a `Media`: reading and seeking, without a name and without the right to close it."""

    name = ""

    def __init__(self, media: Media) -> None:
        self.read = media.read
        self.tell = media.tell
        self._seek = media.seek

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position; a negative number where there is no such place, as damaged files ask for."""
        try:
            return self._seek(offset, whence)
        except (OSError, OverflowError):
            return -errno.EINVAL


def raise_if_memory(error: av.FFmpegError) -> None:
    """Running into the memory limit is not the media's damage: raise it as what it is."""
    if error.errno == errno.ENOMEM:
        raise MemoryError(str(error)) from error


def _regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _cannot_open(error: OSError) -> Rejected:
    kinds = {
        errno.ENOENT: ("missing", "no such file, or a link that leads nowhere"),
        errno.ENOTDIR: ("missing", "a part of its path is not a folder"),
        errno.ELOOP: ("missing", "a link that leads to itself"),
        errno.EACCES: ("permission", "may not be read"),
        errno.EPERM: ("permission", "may not be read"),
        errno.ENXIO: ("not_a_file", "a socket, or a device without a driver"),
        errno.ENODEV: ("not_a_file", "a device without a driver"),
    }
    return Rejected(*kinds.get(error.errno or 0, ("io", f"cannot be opened: {error.strerror}")))


def is_picture(media: Media) -> bool:
    """True for a still picture; raises `Rejected` where name and content disagree about it."""
    head = media.head()
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    brand = head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS
    picture = (head.startswith(_PICTURE_MAGIC) or webp or brand) and media.suffix not in (".mjpeg", ".mjpg")
    if picture and media.suffix in MEDIA_SUFFIXES:
        raise Rejected("wrong_type", f"a picture under the name of a {media.suffix} file")
    if not picture and media.suffix in IMAGE_SUFFIXES and (head.startswith(_MEDIA_MAGIC) or head[4:8] in _BOXES):
        raise Rejected("wrong_type", f"a media file under the name of a {media.suffix} picture")
    return picture


def is_cover(stream: VideoStream) -> bool:
    """Cover art and thumbnails are pictures inside a file, not its video."""
    return bool(stream.disposition & _COVER)


def choose_video(container: InputContainer) -> VideoStream | None:
    """The stream a player would show: real video with a decoder; default, then larger, then longer, then first."""
    candidates = [one for one in container.streams.video if one.codec_context is not None and not is_cover(one)]

    def rank(stream: VideoStream) -> tuple:
        context = stream.codec_context
        default = bool(stream.disposition & Disposition.default)
        return default, context.width * context.height, stream.frames, -stream.index

    return max(candidates, key=rank, default=None)


def choose_audio(container: InputContainer) -> AudioStream | None:
    """The sound a player would play: default, then more channels, then a higher rate, then first."""
    candidates = [one for one in container.streams.audio if one.codec_context is not None]

    def rank(stream: AudioStream) -> tuple:
        context = stream.codec_context
        default = bool(stream.disposition & Disposition.default)
        return default, context.channels, context.sample_rate, -stream.index

    return max(candidates, key=rank, default=None)
