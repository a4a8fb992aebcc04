"""One source from file to payload: what a worker process does. `pack_source` never lets a file's fault escape."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from secrets import token_hex
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from clipmill.pipeline.pack.audio import SoundBuffer, lay_out
from clipmill.pipeline.pack.convert import Canvas
from clipmill.pipeline.pack.encode import encode
from clipmill.pipeline.pack.normalise import DamagedError, Normaliser, Notes, Pictures, Window, longest_run
from clipmill.pipeline.pack.outcome import Picture, Rejected, Result, Sound
from clipmill.pipeline.pack.probe import Media, choose_audio, choose_video, is_cover, is_picture
from clipmill.pipeline.pack.scan import Scan, Scanner, Walk
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.still import pack_still

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class DiskError(OSError):
    """The place where shards are written takes no more; nothing to do with the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One source to pack. number: its place in the corpus. stem: how the paths of its payload files begin.

    Every attempt writes files of its own: one that was given up with its machine may still be writing.
    """

    number: int
    path: str
    stem: str
    settings: PackSettings
    start_s: float | None = None
    end_s: float | None = None


def pack_source(task: Task) -> Result:
    """Pack one source. Raises only DiskError and MemoryError; all else is in the result."""
    folder = Path(task.stem).parent
    if not folder.is_dir():  # on a machine that does not share the output folder, or no longer
        raise DiskError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    task = replace(task, stem=f"{task.stem}{token_hex(4)}")
    try:
        with Media(task.path) as media:
            result = _pack(task, media)
            media.check_unchanged()
            return result
    except Rejected as fault:
        return _rejected(task, fault.reason, fault.detail)
    except MemoryError:
        _remove_payload(task)
        raise
    except OSError as error:
        if error.errno in _DISK:
            _remove_payload(task)
            raise DiskError(error.errno, os.strerror(error.errno or 0), str(folder)) from error
        return _rejected(task, "failed", f"{type(error).__name__}: {error}")
    except Exception as error:
        return _rejected(task, "failed", f"{type(error).__name__}: {error}")


def _rejected(task: Task, reason: str, detail: str) -> Result:
    _remove_payload(task)
    return Result(number=task.number, status="rejected", reason=reason, detail=detail)


def remove_payloads(task: Task) -> None:
    """Delete what the attempts at a task may have written."""
    stem = Path(task.stem)
    for path in stem.parent.glob(f"{stem.name}*"):
        path.unlink(missing_ok=True)


def _remove_payload(task: Task) -> None:
    for suffix in (".mp4", ".yuv", ".jpg", ".wav"):
        Path(task.stem + suffix).unlink(missing_ok=True)


def _pack(task: Task, media: Media) -> Result:
    digest = media.digest()
    origin: dict[str, Any] = {"bytes": media.size, "digest": digest.hex()}
    if is_picture(media):
        picture, facts = pack_still(media, task.stem + ".jpg", task.settings)
        return Result(number=task.number, status="ok", picture=picture, facts={"origin": origin} | facts, digest=digest)
    film = _Film(task, media)
    try:
        film.scan()
        film.pack_video()
        film.pack_sound()
        if film.picture is None and film.sound is None:
            raise Rejected("no_frames", "neither picture nor sound of it decodes")
    finally:
        film.buffer.close()
    reason, detail = film.salvage or ("", "")
    return Result(
        number=task.number,
        status="salvaged" if film.salvage else "ok",
        reason=reason,
        detail=detail,
        picture=film.picture,
        sound=film.sound,
        facts={"origin": origin | film.origin} | film.facts(),
        digest=digest,
    )


class _Film:
    """The state of one source with moving pictures, sound, or both."""

    def __init__(self, task: Task, media: Media) -> None:
        self._task = task
        self._settings = task.settings
        self._media = media
        self.buffer = SoundBuffer(str(Path(task.stem).parent))
        self.picture: Picture | None = None
        self.sound: Sound | None = None
        self.salvage: tuple[str, str] | None = None
        self.origin: dict[str, Any] = {}
        self._scan: Scan | None = None
        self._joints = 0

        self._normaliser: Normaliser | None = None

    def scan(self) -> None:
        """First pass: packets of the video, samples of the sound."""
        with self._media.container() as container:
            video = choose_video(container)
            audio = choose_audio(container) if self._settings.audio_hz else None
            if video is None and audio is None:
                raise _no_stream(container)
            self.origin = _describe(container, video, audio)
            scanner = None if video is None else Scanner(container, video)
            walk = Walk(container, [one for one in (video, audio) if one is not None])
            for packet in walk:
                if scanner is not None and video is not None and packet.stream_index == video.index:
                    scanner.add(packet)
                elif audio is not None:
                    self.buffer.add(packet, audio)
            if audio is not None:
                self.buffer.finish(audio)
            self._joints = walk.joints
            cut = walk.cut
            if scanner is not None and scanner.packets:
                self._scan = scanner.finish(self._media, container, walk)
                cut = self._scan.truncated
            if cut:
                self.salvage = "truncated", cut

    def pack_video(self) -> None:
        """Second pass: the picture, or its longest undamaged part."""
        scan = self._scan
        if scan is None:
            return
        window = self._window(scan.first_s)
        if scan.stop_s is not None:
            window = replace(window, end_s=min(scan.stop_s, window.end_s or scan.stop_s))
        try:
            self.picture = self._encode(scan, window)
        except DamagedError:
            run = self._undamaged(scan, window)
            try:
                self.picture = self._encode(scan, run)
            except DamagedError as error:
                raise Rejected("damaged", "its damage shows differently every time it is decoded") from error

    def pack_sound(self) -> None:
        """Lay the sound on the picture's clock."""
        notes = self.buffer.notes
        if not self.buffer.heard:
            if notes.packets and self.salvage is None:
                self.salvage = "sound_damaged", "the sound does not decode and is left out"
            return
        if notes.errors > max(1, self._settings.damage_budget * notes.packets):
            self.salvage = "sound_damaged", f"{notes.errors} of {notes.packets} sound packets do not decode; left out"
            return
        picture = self.picture
        if picture is not None and self._scan is not None and self._normaliser is not None:
            origin_s = float(self._normaliser.notes.origin_s or 0)
            length_s = float(picture.num_frames / picture.fps)
        else:
            first_s = self.buffer.first_s
            window = self._window(Fraction(first_s))
            origin_s = first_s if window.start_s is None else float(window.start_s)
            length_s = None if window.end_s is None else float(window.end_s) - origin_s
        self.sound = lay_out(self.buffer, self._task.stem + ".wav", origin_s, length_s, self._settings.audio_hz)

    def facts(self) -> dict[str, Any]:
        """Everything that goes into the record's JSON."""
        facts: dict[str, Any] = {}
        if self._normaliser is not None and self._scan is not None:
            facts["timing"], facts["normalised"] = _video_facts(self._normaliser, self._scan, self._settings)
            facts["timing"]["joints"] = self._joints
        if self.buffer.heard:
            notes = self.buffer.notes
            facts["sound"] = notes.source | {
                "errors": notes.errors,
                "gaps": notes.gaps,
                "drift_ppm": notes.drift_ppm,
                "silent": self.sound is not None and self.sound.silent,
            }
        return facts

    def _window(self, first_s: Fraction) -> Window:
        """The part that is asked for, on the container's clock."""
        start_s, end_s = self._task.start_s, self._task.end_s
        return Window(
            None if start_s is None else first_s + Fraction(start_s).limit_denominator(1_000_000),
            None if end_s is None else first_s + Fraction(end_s).limit_denominator(1_000_000),
        )

    def _encode(self, scan: Scan, window: Window) -> Picture:
        with self._media.container() as container:
            video = choose_video(container)
            assert video is not None
            self._normaliser = one = Normaliser(video, scan, self._settings, window)
            frames = one.frames(container)
            path = self._task.stem + self._settings.suffix
            try:
                if self._settings.profile == "copy":
                    from clipmill.pipeline.pack.keep import keep  # with the loader's own decoder, and so with Arrow

                    picture = keep(self._media, one, frames, window, path)
                else:
                    picture = encode(frames, path, self._settings, _canvas(one), one.fps)
            except Rejected as fault:
                if fault.reason == "no_frames" and window.start_s is not None:
                    raise Rejected("segment", f"nothing to be seen from {self._task.start_s} s on") from fault
                raise
        if one.notes.skipped_head and self.salvage is None:
            self.salvage = "no_key_frame", f"{one.notes.skipped_head} packets before the first key frame are left out"
        return picture

    def _undamaged(self, scan: Scan, window: Window) -> Window:
        """The longest part of the window without damage, if there is not too much of it."""
        notes = Notes()
        with self._media.container() as container:
            video = choose_video(container)
            assert video is not None
            pictures = Pictures(container, video, scan, notes)
            run, errors = longest_run(pictures, notes, 1 / scan.rate.fps, window)
        if run.start_s == run.end_s:
            raise Rejected(
                "damaged", f"{notes.errors} of {scan.packets} packets are damaged and no frame is free of it"
            )
        if errors > max(1, self._settings.damage_budget * scan.packets):
            budget = f"{self._settings.damage_budget:.0%}"
            raise Rejected("damaged", f"{errors} of {scan.packets} packets are damaged, more than {budget}")
        seconds = float((run.end_s or 0) - (run.start_s or 0))
        if self.salvage is None and errors:
            self.salvage = "damaged", f"{errors} of {scan.packets} packets; the longest part without is {seconds:.2f} s"
        elif self.salvage is None:
            self.salvage = "truncated", f"nothing after {seconds:.2f} s decodes"
        return run


def _canvas(normaliser: Normaliser) -> Callable[[], tuple[Canvas, str]]:
    def canvas() -> tuple[Canvas, str]:
        assert normaliser.canvas is not None
        return normaliser.canvas, normaliser.matrix

    return canvas


def _no_stream(container: InputContainer) -> Rejected:
    kinds = [one.type for one in container.streams]
    if any(is_cover(one) for one in container.streams.video):
        return Rejected("no_stream", "a cover picture but neither video nor sound")
    if "video" in kinds or "audio" in kinds:
        return Rejected("unsupported", "there is no decoder for its streams")
    return Rejected("no_stream", f"neither video nor sound in it (streams: {kinds or 'none'})")


def _describe(container: InputContainer, video: VideoStream | None, audio: AudioStream | None) -> dict[str, Any]:
    """The source as its headers describe it."""
    facts: dict[str, Any] = {
        "container": container.format.name,
        "streams": len(container.streams),
        "declared_s": None if container.duration is None else round(container.duration / av.time_base, 6),
        "start_s": None if container.start_time is None else round(container.start_time / av.time_base, 6),
    }
    if video is not None:
        context = video.codec_context
        facts["video"] = {
            "stream": video.index,
            "codec": context.name,
            "width": context.width,
            "height": context.height,
            "pix_fmt": context.pix_fmt,
            "fps": None if not video.average_rate else str(video.average_rate),
            "sar": None if not video.sample_aspect_ratio else str(video.sample_aspect_ratio),
            "color_range": int(context.color_range),
            "color_space": int(context.colorspace),
            "color_transfer": int(context.color_trc),
            "color_primaries": int(context.color_primaries),
        }
    if audio is not None:
        facts["audio"] = {"stream": audio.index, "codec": audio.codec_context.name}
    return facts


def _video_facts(one: Normaliser, scan: Scan, settings: PackSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    notes, cadence = one.notes, one.notes.cadence
    assert cadence is not None
    assert one.canvas is not None
    exact = scan.rate.constant and not (settings.fps is None and (cadence.repeated or cadence.dropped))
    timing: dict[str, Any] = {
        "origin_s": round(float(notes.origin_s or 0), 6),
        "source_fps": str(scan.rate.fps),
        "times": scan.times.value,
        "constant": exact,
        "frames_in": notes.frames_in,
        "repeated": cadence.repeated,
        "dropped": cadence.dropped,
        "disordered": notes.disordered,
        "errors": notes.errors,
    }
    if not exact:
        timing["source_times_s"] = notes.times_s.tolist()
    look = notes.looks[0]
    normalised = {
        "size": [one.canvas.width, one.canvas.height],
        "turn": look.turn,
        "sar": str(look.sar),
        "matrix": look.matrix or look.space,
        "matrix_guessed": look.guessed,
        "full_range": look.full_range,
        "pix_fmt": look.pix_fmt,
        "deinterlaced": notes.deinterlaced,
        "sizes": notes.sizes if len(notes.sizes) > 1 else [],
    }
    return timing, normalised
