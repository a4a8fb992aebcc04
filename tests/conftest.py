"""Fixtures shared by all tests: a packed data set written by hand, whose every frame names itself."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path

import av
import numpy as np
import pytest

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.record import ShardIndex, VideoRecord, uid_of
from clipmill.pipeline.shard import ShardWriter, audio_crcs

AUDIO_HZ = 16000


def pytest_configure() -> None:
    """One thread per operation, here and in subprocesses: layers of test size only lose by more (up to 40 times)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is later


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The optional folder with golden numbers and real media."""
    root = os.environ.get("CLIPMILL_TEST_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("CLIPMILL_TEST_DATA does not name a folder")
    return Path(root)


def luma_of(record: int, frame: int) -> int:
    """The luma level that says which frame of which record this is."""
    return 16 + (37 * record + 2 * frame) % 219


def encode(number: int, num_frames: int, height: int, width: int, fps: int, gop: int) -> tuple[bytes, bytes, list]:
    """A lossless-enough H.264 mp4 whose frame t is a flat grey of level luma_of(number, t)."""
    out = io.BytesIO()
    params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:ref=1:open-gop=0"
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"preset": "veryfast", "crf": "4", "tune": "fastdecode", "x264-params": params}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for t in range(num_frames):
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            planes[:height] = luma_of(number, t)
            frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
            frame.pts, frame.time_base = t, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    payload = out.getvalue()
    with av.open(io.BytesIO(payload)) as container:
        stream = container.streams.video[0]
        extradata = bytes(stream.codec_context.extradata or b"")
        packets = [(p.pos, bytes(p), p.is_keyframe) for p in container.demux(stream) if p.size]
    return payload, extradata, packets


def write_dataset(
    root: Path,
    num_records: int = 6,
    num_frames: int = 40,
    size: tuple[int, int] = (48, 64),
    fps: int = 25,
    gop: int = 8,
    audio: bool = True,
    classes: int = 3,
) -> ShardIndex:
    """Write a packed data set; record r has num_frames + r frames, a sine of 200 + 50 r Hz, label r % classes."""
    root.mkdir(parents=True, exist_ok=True)
    height, width = size
    records = []
    shard = "shard-00000.tar"
    with ShardWriter(root / shard) as writer:
        for number in range(num_records):
            frames = num_frames + number
            payload, extradata, packets = encode(number, frames, height, width, fps, gop)
            offset = writer.add(f"{number:08d}.mp4", payload)
            count = round(frames * AUDIO_HZ / fps) if audio else 0
            tone = np.sin(2 * np.pi * (200 + 50 * number) * np.arange(count) / AUDIO_HZ)
            pcm = (tone * 8000).astype("<i2").tobytes()
            audio_offset = writer.add(f"{number:08d}.wav", bytes(44) + pcm) + 44 if audio else 0
            records.append(
                VideoRecord(
                    index=number,
                    uid=uid_of(f"video/{number}"),
                    key=f"video/{number}",
                    shard=shard,
                    codec=CodecConfig(codec="h264", extradata=extradata),
                    num_frames=frames,
                    fps=Fraction(fps),
                    height=height,
                    width=width,
                    packet_offset=offset + packets[0][0],
                    packet_sizes=np.array([len(packet) for _, packet, _ in packets], np.uint32),
                    packet_crcs=np.array([zlib.crc32(packet) for _, packet, _ in packets], np.uint32),
                    presentation=np.empty(0, np.uint32),
                    keyframes=np.array([i for i, (_, _, key) in enumerate(packets) if key], np.uint32),
                    audio_offset=audio_offset,
                    num_samples=count,
                    audio_hz=AUDIO_HZ if audio else 0,
                    audio_crcs=np.array(audio_crcs(pcm), np.uint32),
                    silent=False,
                    salvaged=False,
                    label=number % classes,
                    split="train" if number % 3 else "test",
                    source=f"video/{number}.mp4",
                    digest=blake2b(payload, digest_size=16).digest(),
                )
            )
    write_index(root / "index.arrow", records, [shard], [f"class{i}" for i in range(classes)])
    return ShardIndex.open(root)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., ShardIndex]:
    """`write_dataset`, for tests that need special sizes."""
    return write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """A small packed data set: 6 videos of 40..45 frames, 48x64, with sound."""
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def frame_level() -> Callable[[int, int], int]:
    """`luma_of`: the luma level of frame t of record r."""
    return luma_of


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """run_ranks(script, world, *arguments): run a Python file as ``world`` processes of one group, as torchrun would.

    The script's own exit codes decide; the first that is not 0 stops the others and fails the test with its output.
    """

    def run(script: str | Path, world: int, *arguments: object, timeout_s: float = 120.0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output}"

    return run
