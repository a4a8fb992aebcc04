"""The torchcodec backend on the CPU. It needs FFmpeg's shared libraries (version 4 to 8), which pip does not bring.

Where the system has none, torchcodec can use those inside PyAV: run this file, it prints the folder to search::

    export LD_LIBRARY_PATH=$(python -m clipmill.pipeline.decode.torchcodec)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from clipmill.pipeline.decode import mp4
from clipmill.pipeline.decode.decoder import DecodeError, Decoder
from clipmill.pipeline.decode.rgb import Clip, RgbDecoder
from clipmill.pipeline.shard import Reader

Mode = Literal["exact", "approximate"]


def new(reader: Reader) -> Decoder:
    """The backend's constructor."""
    return decoder("torchcodec", reader, "cpu")


def decoder(name: str, reader: Reader, device: str) -> Decoder:
    """A decoder on a device, ``cpu`` or ``cuda:0``. Raises ImportError where torchcodec does not load."""
    _video_decoder()
    return RgbDecoder(name, reader, lambda clip: _pictures(clip, device), mp4.CODECS, (RuntimeError, IndexError), True)


def pictures(source: str | bytes, numbers: Sequence[int], device: str = "cpu", seek_mode: Mode = "exact") -> np.ndarray:
    """Frames of any file or of its bytes as (N, height, width, 3) uint8 RGB."""
    return _open(source, device, seek_mode).get_frames_at(list(numbers)).data.cpu().numpy()


def _pictures(clip: Clip, device: str) -> np.ndarray:
    # our files have a constant rate from time 0: what torchcodec calls approximate is exact, and opens faster
    video = _open(clip.data, device, "exact" if clip.delay else "approximate")
    batch = video.get_frames_at(clip.places)
    shown = np.rint(batch.pts_seconds.numpy() * mp4.FPS).astype(int) - clip.delay
    if shown.tolist() != clip.places:  # a frame that fails to decode is replaced by the next one
        raise DecodeError(f"frames {shown.tolist()} come instead of {clip.places}")
    return batch.data.cpu().numpy()


def _open(source: str | bytes, device: str, seek_mode: Mode):
    return _video_decoder()(source, num_ffmpeg_threads=1, device=device, seek_mode=seek_mode, dimension_order="NHWC")


def _video_decoder():
    try:
        from torchcodec.decoders import VideoDecoder
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            "torchcodec does not load: it needs FFmpeg's shared libraries of version 4 to 8 and the torch it was built "
            "for. apt-get install ffmpeg, conda install ffmpeg, or use PyAV's: export LD_LIBRARY_PATH="
            "$(python -m clipmill.pipeline.decode.torchcodec)"
        ) from error
    return VideoDecoder


def link_ffmpeg(folder: Path) -> Path:
    """Make ``folder`` one of links by which a dynamic linker finds the FFmpeg libraries inside PyAV's wheel.

    Every library appears under its own name and, since wheels put a hash into it, under the usual one as well.
    """
    import av

    bundled = Path(av.__file__).parent.with_name("av.libs")
    if not bundled.is_dir():
        raise OSError(f"{bundled}: PyAV brings no libraries here; install FFmpeg, or PyAV's wheel from PyPI")
    folder.mkdir(parents=True, exist_ok=True)
    for library in bundled.iterdir():
        stem, _, version = library.name.partition(".so.")
        usual = f"{stem.rpartition('-')[0]}.so.{version.split('.')[0]}"
        for name in (library.name, usual):
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder


if __name__ == "__main__":
    print(link_ffmpeg(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.home() / ".cache" / "clipmill" / "ffmpeg"))
