"""torchcodec: what is said where it does not load, and PyAV's FFmpeg lent to it."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipmill.pipeline.decode import torchcodec
from clipmill.pipeline.decode.decoder import DecodeError, new_decoder
from clipmill.pipeline.shard import ShardReader


def needs_torchcodec() -> None:
    try:
        torchcodec.new(ShardReader())
    except ImportError as error:
        pytest.skip(str(error))


def test_without_ffmpeg_the_ways_to_get_it_are_named(monkeypatch: pytest.MonkeyPatch):
    ordinary = builtins.__import__

    def without_ffmpeg(name, *rest):
        if name == "torchcodec.decoders":
            raise RuntimeError("Could not load libtorchcodec. Likely causes: ...")
        return ordinary(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_ffmpeg)
    with pytest.raises(ValueError, match="decoder 'torchcodec' does not work here") as caught:
        new_decoder("torchcodec", ShardReader())
    assert "apt-get install ffmpeg" in str(caught.value)
    assert "LD_LIBRARY_PATH=$(python -m clipmill.pipeline.decode.torchcodec)" in str(caught.value)
    assert "pip install" not in str(caught.value)


def test_links_give_pyavs_libraries_their_usual_names(tmp_path: Path):
    folder = torchcodec.link_ffmpeg(tmp_path / "links")
    torchcodec.link_ffmpeg(folder)  # again
    names = {path.name for path in folder.iterdir()}
    for library in ("libavcodec", "libavformat", "libavutil", "libswscale"):
        usual = [name for name in names if name.startswith(f"{library}.so.")]
        assert len(usual) == 1
        assert usual[0].count(".") == 2
        assert (folder / usual[0]).resolve().name in names


def test_torchcodec_loads_with_pyavs_ffmpeg_and_finds_the_frames(tmp_path: Path, stream_of):
    needs_torchcodec()
    index = stream_of("h264_open")
    code = (
        "import sys\nfrom torchcodec._core import ops\nfrom clipmill.pipeline.record import ShardIndex\n"
        "from clipmill.pipeline.decode.torchcodec import new\nfrom clipmill.pipeline.shard import ShardReader\n"
        "seen, record = [], ShardIndex.open(sys.argv[1])[0]\n"
        "new(ShardReader()).decode(record, [3, 13, 40], lambda number, planes: seen.append(number))\n"
        "print(seen, ops.ffmpeg_major_version)"
    )
    made = subprocess.run(
        [sys.executable, "-m", "clipmill.pipeline.decode.torchcodec", str(tmp_path / "links")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": made.stdout.strip()}
    done = subprocess.run(
        [sys.executable, "-c", code, str(index.root)], env=environment, capture_output=True, text=True, check=False
    )
    import av

    version = av.library_versions["libavcodec"][0] - 54  # 62 is FFmpeg 8
    assert (done.stdout.strip(), done.returncode) == (f"[3, 13, 40] {version}", 0), done.stderr


def test_a_frame_that_was_replaced_by_another_is_an_error(stream_of, monkeypatch: pytest.MonkeyPatch):
    needs_torchcodec()
    record = stream_of("h264")[0]
    decoder = torchcodec.new(ShardReader())
    ordinary = torchcodec._open

    class Another:
        """Gives the frame beside the wanted one; torchcodec gives the next when one does not decode."""

        def __init__(self, *arguments):
            self.video = ordinary(*arguments)

        def get_frames_at(self, places):
            return self.video.get_frames_at([place - 1 for place in places])

    monkeypatch.setattr(torchcodec, "_open", Another)
    with pytest.raises(DecodeError, match=r"frames \[2\] come instead of \[3\]"):
        decoder.decode(record, [3], lambda *_: None)


def test_pictures_of_any_file(stream_of, tmp_path: Path, frames_of):
    needs_torchcodec()
    from clipmill.pipeline.decode import mp4

    record = stream_of("h264")[0]
    data = mp4.wrap(record, ShardReader().packets(record, 0, 41), np.arange(41), record.keyframes.tolist())
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    for source in (data, str(path)):
        pictures = torchcodec.pictures(source, [30, 2, 30])
        assert pictures.shape == (3, 64, 96, 3)
        assert np.array_equal(pictures[0], pictures[2])
        luma = frames_of(record)[30][:64].astype(float)
        assert abs(pictures[0].mean() - (luma - 16).mean() * 255 / 219) < 12
