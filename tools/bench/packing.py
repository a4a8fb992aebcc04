"""The pack track: `clipmill pack` against ffmpeg's command line, with the same filters and encoder settings."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from clipmill.pipeline.pack.settings import PackSettings
from clipmill.tools.bench.corpus import videos
from clipmill.tools.bench.peer import cpu_s
from clipmill.tools.bench.tracks import Setting, Table

Times = tuple[float, float]  # seconds by the clock, seconds of processor time


def packing(setting: Setting, folder: Path, short_side: int) -> Table:
    """One worker against one thread, on all videos of a folder. The contestants, in turn:

    clipmill: packs, reads everything back and compares every frame, measures the PSNR, makes checksums and the index.
    ffmpeg: one command per video, which scales, converts and encodes it, and writes its sound; nothing is looked at
    again. ffmpeg, read back: and then decodes what it wrote, as a check that it can be decoded at all.
    """
    from clipmill.datasets.folder import read
    from clipmill.pipeline.pack.run import pack

    sources, out = videos(folder), setting.folder / "packing"
    settings = PackSettings(short_side=short_side)
    commands = [_commands(path, out / str(number), settings) for number, path in enumerate(sources)]

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        pack(read(folder), out, settings, root=folder, workers=1)

    def run(which: int) -> None:
        out.mkdir(exist_ok=True)
        for both in commands:
            subprocess.run(both[which], check=True)

    rows: dict[str, list[Times]] = {"clipmill": [], "ffmpeg": [], "readback": []}
    for number in range(setting.rounds):
        setting.say(f"packing: round {number + 1} of {setting.rounds}")
        rows["clipmill"].append(_timed(ours))
        if shutil.which("ffmpeg"):
            rows["ffmpeg"].append(_timed(lambda: run(0)))
            rows["readback"].append(_timed(lambda: run(1)))
    shutil.rmtree(out, ignore_errors=True)
    return Table("pack", folder.name, f"{len(sources)} videos", [], {"videos": len(sources)} | _facts(rows))


def _facts(rows: dict[str, list[Times]]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, times in rows.items():
        if times:
            facts |= {f"{name}_wall_s": median(t for t, _ in times), f"{name}_cpu_s": median(t for _, t in times)}
    if rows["ffmpeg"]:
        turns = list(zip(rows["clipmill"], rows["ffmpeg"], rows["readback"], strict=False))
    for clock, prefix in enumerate(("", "cpu_") if turns else ()):
        facts[f"{prefix}speed_over_ffmpeg"] = median(b[clock] / a[clock] for a, b, _ in turns)
        facts[f"{prefix}speed_over_ffmpeg_and_readback"] = median((b[clock] + c[clock]) / a[clock] for a, b, c in turns)
    return facts


def _commands(source: Path, target: Path, settings: PackSettings) -> tuple[list[str], list[str]]:
    """ffmpeg's command lines that encode a video as pack does, and that decode what the first one wrote."""
    from clipmill.pipeline.pack.convert import Canvas, Converter, Look
    from clipmill.pipeline.pack.encode import PROFILES
    from clipmill.pipeline.pack.probe import Media, choose_audio, choose_video

    with Media(str(source)) as media, media.container() as container:
        video, heard = choose_video(container), choose_audio(container) is not None
        if video is None:
            raise ValueError(f"{source}: no video in it; name a folder of videos")
        look = Look.of(next(container.decode(video)), video.sample_aspect_ratio)
    filters = Converter(Canvas.of(look, settings.short_side), "bt709").filters(look) or ["null"]
    one = ["-threads", "1"]
    quiet = ["ffmpeg", "-v", "error", "-nostdin", "-y", *one, "-filter_threads", "1"]
    profile = PROFILES[settings.profile]
    values = profile.options(settings)
    values["x264-params"] = values["x264-params"].replace("annexb=0:", "")  # older ffmpegs then write broken files
    options = [text for name, value in values.items() for text in (f"-{name}:v", value)]
    picture = ["-map", "0:v:0", "-vf", ",".join(filters), "-c:v", profile.encoder, *options, *one, f"{target}.mp4"]
    sound = ["-map", "0:a:0", "-c:a", "pcm_s16le", "-ac", "1", "-ar", str(settings.audio_hz), f"{target}.wav"]
    write = [*quiet, "-noautorotate", "-i", str(source), *picture, *(sound if heard else [])]
    return write, [*quiet, "-i", f"{target}.mp4", "-f", "null", "-"]


def _timed(work: Callable[[], object]) -> Times:
    """Of this process and its children."""
    before_s, start_s = cpu_s(), time.perf_counter()
    work()
    return time.perf_counter() - start_s, cpu_s() - before_s
