"""What `clipmill doctor` tries in child processes: imports, CUDA, and decoding of tiny streams."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

_LIMIT_S = 120.0
_SIDE, _FRAMES, _GOP = 64, 8, 4  # of the tiny streams
_ENCODED = {"h264": ("libx264", "yuv420p"), "hevc": ("libx265", "yuv420p"), "mjpeg": ("mjpeg", "yuvj420p")}


def child(code: str, *arguments: str) -> tuple[list[Any], str]:
    """Run Python code in a child process; returns the JSON lines it printed, and how it failed ("" if it did not)."""
    command = [sys.executable, "-P", "-c", code, *arguments]  # -P: nothing of the current folder is imported
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        return _lines(error.stdout or b""), f"no answer after {_LIMIT_S:.0f} s"
    error = ""
    if done.returncode < 0:
        error = f"crashed with {_signal_name(-done.returncode)}"
    elif done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        error = last[-1].strip() if last else f"exit code {done.returncode}"
    return _lines(done.stdout), error


def _lines(text: str | bytes) -> list[Any]:
    """The lines that are JSON; other libraries may print too."""
    found = []
    for line in (text.decode("utf-8", "replace") if isinstance(text, bytes) else text).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _signal_name(number: int) -> str:
    known = {item.value: item.name for item in signal.Signals}
    return known.get(number, f"signal {number}")


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """{module: why it does not import, "" if it does}. After a crash the rest is tried in a new process."""
    code = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        why = ""
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
    print(json.dumps([name, why]), flush=True)
"""
    found: dict[str, str] = {}
    left = list(modules)
    while left:
        lines, error = child(code, *left)
        found.update((name, why) for name, why in lines)
        left = [name for name in left if name not in found]
        if left and error:
            found[left.pop(0)] = error
        elif left:
            return found | dict.fromkeys(left, "the import ended the process")
    return found


def media_facts() -> tuple[dict[str, Any], str]:
    """FFmpeg's library versions and the names of all encoders."""
    code = """
import json, av
versions = [f"{name} {'.'.join(map(str, v))}" for name, v in sorted(av.library_versions.items())]
encoders = []
for name in sorted(av.codecs_available):
    try:
        av.Codec(name, "w")
        encoders.append(name)
    except ValueError:
        continue
print(json.dumps({"libraries": versions, "encoders": encoders}))
"""
    lines, error = child(code)
    return (lines[0] if lines else {}), error


def cuda_facts() -> tuple[dict[str, Any], str]:
    """{built, devices, why, driver}: torch's CUDA version, what the devices are, why there is none, the driver."""
    code = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = []
for number in range(count):
    facts = torch.cuda.get_device_properties(number)
    x = torch.ones(64, 64, device=f"cuda:{number}")
    assert float((x @ x).sum()) == 64.0**3, "wrong result of a matrix product"
    memory, capability = f"{facts.total_memory / 2**30:.0f} GiB", f"{facts.major}.{facts.minor}"
    devices.append(f"{facts.name}, {memory}, compute capability {capability}")
why = " ".join(str(caught[0].message).split()) if caught else ""
print(json.dumps({"built": torch.version.cuda, "devices": devices, "why": why}))
"""
    lines, error = child(code)
    return {**(lines[0] if lines else {}), "driver": _driver()}, error


def _driver() -> str | None:
    """The NVIDIA driver's version, None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (nvidia-smi does not answer)"
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


# --- decoders -----------------------------------------------------------------------------------------------


def backends() -> list[str]:
    """Names of all backends: the modules of ``pipeline/decode`` with a function ``new``, without importing them."""
    package = import_module("clipmill.pipeline.decode")
    found = []
    for path in sorted(Path(next(iter(package.__path__))).glob("*.py")):
        body = ast.parse(path.read_text("utf-8")).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "new" for node in body):
            found.append(path.stem)
    return found


def try_decoder(name: str) -> tuple[dict[str, Any], str]:
    """{works: [codec], wrong: {codec: what}, refused: {codec: why}} of a backend, from a child process."""
    code = "import sys; from clipmill.tools.doctor_child import trial; trial(sys.argv[1])"
    lines, error = child(code, name)
    if not lines:
        return {}, error or "no answer"
    return lines[-1], error or lines[-1].get("error", "")


def trial(name: str) -> None:
    """Decode a tiny stream of every codec with a backend and print the outcome as a JSON line."""
    from clipmill.pipeline.shard import ShardReader

    found: dict[str, Any] = {"works": [], "wrong": {}, "refused": {}}
    reader = ShardReader()
    try:
        decoder = import_module(f"clipmill.pipeline.decode.{name}").new(reader)
    except Exception as error:
        print(json.dumps({**found, "error": f"{type(error).__name__}: {error}"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        for codec in (*_ENCODED, "raw"):
            try:
                path = Path(folder, codec)
                wrong = _wrong_frames(decoder, path, codec)
            except Exception as error:  # a codec that this backend does not take
                found["refused"][codec] = f"{type(error).__name__}: {error}"
                continue
            if wrong:
                found["wrong"][codec] = wrong
            else:
                found["works"].append(codec)
        reader.close()
    print(json.dumps(found))


def level(frame: int) -> int:
    """The luma of a frame of the tiny streams."""
    return 30 + 24 * frame


def _wrong_frames(decoder: Any, path: Path, codec: str) -> str:
    """Write a tiny stream and read three frames back; says what is wrong with them, "" for nothing."""
    import numpy as np

    from clipmill.pipeline.codec import CodecConfig
    from clipmill.pipeline.record import VideoRecord, uid_of

    packets = _raw_packets() if codec == "raw" else _packets(*_ENCODED[codec])
    path.write_bytes(b"".join(packets))
    intra = codec in ("raw", "mjpeg")
    record = VideoRecord(
        index=0,
        uid=uid_of(codec),
        key=codec,
        shard=str(path),
        codec=CodecConfig(codec=codec, full_range=codec == "mjpeg"),
        num_frames=_FRAMES,
        fps=Fraction(25),
        height=_SIDE,
        width=_SIDE,
        packet_offset=0,
        packet_sizes=np.array([len(packet) for packet in packets], np.uint32),
        packet_crcs=np.array([zlib.crc32(packet) for packet in packets], np.uint32),
        presentation=np.empty(0, np.uint32),
        keyframes=np.arange(0, _FRAMES, 1 if intra else _GOP, dtype=np.uint32),
        audio_offset=0,
        num_samples=0,
        audio_hz=0,
        audio_crcs=np.empty(0, np.uint32),
        silent=False,
        salvaged=False,
        label=-1,
        split="",
        source=codec,
        digest=bytes(16),
    )
    seen: dict[int, float] = {}
    wanted = [1, _GOP, _FRAMES - 1]
    decoder.decode(record, wanted, lambda number, planes: seen.update({number: float(planes[0].mean())}))
    if sorted(seen) != wanted:
        return f"frames {sorted(seen)} instead of {wanted}"
    off = [number for number in wanted if abs(seen[number] - level(number)) > 6]
    return f"frame {off[0]} has luma {seen[off[0]]:.0f} instead of {level(off[0])}" if off else ""


def _raw_packets() -> list[bytes]:
    area = _SIDE * _SIDE
    return [bytes([level(t)]) * area + bytes([128]) * (area // 2) for t in range(_FRAMES)]


def _packets(encoder: str, pix_fmt: str) -> list[bytes]:
    """One packet per frame, in order, a key frame every `_GOP` frames, without a container."""
    import av
    import numpy as np

    options = {
        "libx264": {"x264-params": f"keyint={_GOP}:min-keyint={_GOP}:scenecut=0:bframes=0", "preset": "veryfast"},
        "libx265": {
            "x265-params": f"keyint={_GOP}:min-keyint={_GOP}:scenecut=0:bframes=0:open-gop=0:log-level=error",
            "preset": "ultrafast",
        },
        "mjpeg": {},
    }
    context = av.CodecContext.create(encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = _SIDE, _SIDE, pix_fmt
    context.framerate, context.time_base, context.thread_count = Fraction(25), Fraction(1, 25), 1
    context.options = options[encoder]
    packets = []
    for t in range(_FRAMES):
        planes = np.full((_SIDE * 3 // 2, _SIDE), 128, np.uint8)
        planes[:_SIDE] = level(t)
        frame = av.VideoFrame.from_ndarray(planes, pix_fmt)
        frame.pts = t
        packets += [bytes(packet) for packet in context.encode(frame)]
    return packets + [bytes(packet) for packet in context.encode(None)]
