"""One contestant in a process of its own: reads orders from standard input, decodes, answers with its times.

Run as a script by any Python that has the library, so that peers of other versions than ours can take part; therefore
nothing of clipmill is imported here. `clipmill.tools.bench.ours` puts clipmill's contestants behind the same protocol.

Every line is JSON. First an order ``{"name", "files", "sounds", "requests", "out", "cores"}``, answered by
``{"versions"}`` or ``{"missing"}``. Then ``{"round", "count"}``: serve the last ``count`` requests of that round,
answered by times; or ``{"show": count}``: fingerprints of the frames of the first requests of round 0. A request is
``[file, [[frame, ...], ...], [start_s, duration_s] or null]``: clips of one video, and a piece of its sound.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from itertools import pairwise
from typing import Any, Literal

SIZE, BATCH = 112, 32  # of the end-to-end track
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUDIO_HZ = 16000
GRID = 8  # blocks a side of a fingerprint


def step_of(frames):
    """The common difference of frame numbers; 0 if there is none."""
    steps = {b - a for a, b in pairwise(frames)} or {1}
    return steps.pop() if len(steps) == 1 else 0


class Torchcodec:
    """torchcodec on the CPU, one FFmpeg thread, opened per video, a range call where the frames are evenly spaced."""

    modules = ("torchcodec", "torch")
    seek_mode: Literal["exact", "approximate"] = "exact"

    def __init__(self, files, sounds):
        import torch
        from torchcodec.decoders import AudioDecoder, VideoDecoder

        torch.set_num_threads(1)
        self.torch, self.files, self.sounds = torch, files, sounds
        self.video, self.audio = VideoDecoder, AudioDecoder

    def open(self, source):
        """A decoder of a path or of a file's bytes."""
        return self.video(source, seek_mode=self.seek_mode, num_ffmpeg_threads=1, dimension_order="NCHW")

    def clips(self, file, clips):
        """All clips of one video, frames one after the other: (N, C, H, W)."""
        return self.decoded(self.open(self.files[file]), clips)

    def decoded(self, decoder, clips):
        """Frames of clips from an open decoder."""
        parts = []
        for frames in clips:
            step = step_of(frames)
            if len(frames) == 1:
                parts.append(decoder.get_frame_at(frames[0]).data[None])
            elif step > 0:
                parts.append(decoder.get_frames_in_range(frames[0], frames[-1] + 1, step).data)
            else:
                parts.append(decoder.get_frames_at(frames).data)
        return parts[0] if len(parts) == 1 else self.torch.cat(parts)

    def sound(self, file, start_s, duration_s):
        """Samples of one channel at `AUDIO_HZ`."""
        decoder = self.audio(self.sounds[file], sample_rate=AUDIO_HZ, num_channels=1)
        return decoder.get_samples_played_in_range(start_s, start_s + duration_s).data


class TorchcodecApproximate(Torchcodec):
    """As `Torchcodec`, but it trusts the container instead of scanning it."""

    seek_mode = "approximate"


class TorchcodecKept(TorchcodecApproximate):
    """A decoder of every file stays open: not possible over a corpus, but a bound for what is."""

    def __init__(self, files, sounds):
        super().__init__(files, sounds)
        self.kept = {}

    def open(self, source):
        """The decoder that was opened at the first call."""
        if source not in self.kept:
            self.kept[source] = super().open(source)
        return self.kept[source]


class Webdataset(TorchcodecApproximate):
    """webdataset reads a tar of the files from end to end, again and again; torchcodec decodes its members."""

    modules = ("webdataset", "torchcodec", "torch")

    def __init__(self, files, sounds):
        super().__init__(files, sounds)
        import tarfile
        import tempfile

        from webdataset.compat import WebDataset

        self.folder = tempfile.TemporaryDirectory()
        path = os.path.join(self.folder.name, "shard-000000.tar")
        with tarfile.open(path, "w", dereference=True) as tar:
            for number, name in enumerate(files):
                tar.add(name, f"{number:08d}.mp4")
        whole: Any = WebDataset(path, shardshuffle=False, empty_check=False).repeat()
        self.stream = iter(whole.to_tuple("mp4"))
        self.own_order = len(files) > 1

    def clips(self, file, clips):
        """Clips of whatever video comes next; its number is not that of the request."""
        return self.decoded(self.open(next(self.stream)[0]), clips)


class Decord:
    """decord on the CPU with one thread."""

    modules = ("decord",)

    def __init__(self, files, sounds):
        import decord

        self.files, self.decord = files, decord

    def clips(self, file, clips):
        """See `Torchcodec.clips`."""
        reader = self.decord.VideoReader(self.files[file], ctx=self.decord.cpu(0), num_threads=1)
        return reader.get_batch([frame for frames in clips for frame in frames]).asnumpy().transpose(0, 3, 1, 2)


class Pyav:
    """PyAV: seek to the key frame before each clip, decode on, convert what is wanted."""

    modules = ("av", "numpy")

    def __init__(self, files, sounds):
        import av
        import numpy

        self.files, self.sounds, self.av, self.numpy = files, sounds, av, numpy

    def clips(self, file, clips):
        """See `Torchcodec.clips`."""
        found = []
        with self.av.open(self.files[file]) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            tick, start = 1 / (stream.average_rate * stream.time_base), stream.start_time or 0
            for frames in clips:
                near = step_of(frames) > 0
                for first in frames[:1] if near else frames:
                    wanted = set(frames) if near else {first}
                    container.seek(start + int(first * tick), stream=stream)
                    for frame in container.decode(stream):
                        if round((frame.pts - start) / tick) in wanted:
                            found.append(frame.to_ndarray(format="rgb24"))
                            wanted.discard(round((frame.pts - start) / tick))
                            if not wanted:
                                break
        return self.numpy.stack(found).transpose(0, 3, 1, 2)

    def sound(self, file, start_s, duration_s):
        """See `Torchcodec.sound`."""
        parts, resampler = [], self.av.AudioResampler("fltp", "mono", AUDIO_HZ)
        with self.av.open(self.sounds[file]) as container:
            stream = container.streams.audio[0]
            container.seek(int(start_s / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time > start_s + duration_s:
                    break
                parts += [one.to_ndarray() for one in resampler.resample(frame)]
        return self.numpy.concatenate(parts, 1)


class Spdl:
    """SPDL: demultiplex the wanted time, decode and convert to RGB, one thread."""

    modules = ("spdl.io", "numpy")

    def __init__(self, files, sounds):
        import numpy
        from spdl import io  # pyright: ignore[reportMissingImports]

        self.files, self.io, self.numpy, self.rates = files, io, numpy, {}

    def clips(self, file, clips):
        """See `Torchcodec.clips`."""
        io, path = self.io, self.files[file]
        if file not in self.rates:
            rate = io.demux_video(path).frame_rate
            self.rates[file] = rate[0] / rate[1] if isinstance(rate, tuple) else float(rate)
        rate, parts = self.rates[file], []
        for frames in clips:
            step = step_of(frames)
            if step > 0:
                window = ((frames[0] - 0.5) / rate, (frames[-1] + 0.5) / rate)
                pictures = io.decode_packets(io.demux_video(path, timestamp=window))
                parts.append(io.to_numpy(io.convert_frames(pictures))[::step])
            else:
                pictures = io.sample_decode_video(io.demux_video(path), frames)
                parts.append(io.to_numpy(io.convert_frames(pictures)))
        return self.numpy.concatenate(parts).transpose(0, 3, 1, 2)


class Dali:
    """DALI's video decoder on file bytes that are in memory; its CPU build takes MJPEG."""

    modules = ("nvidia.dali", "numpy")

    def __init__(self, files, sounds):
        import numpy
        from nvidia.dali import Pipeline, fn
        from nvidia.dali.types import DALIDataType

        self.numpy, self.data, self.frames = numpy, None, None
        self.files = [numpy.fromfile(name, numpy.uint8) for name in files]
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False,
                            exec_pipelined=False)  # fmt: skip
        with pipeline:
            data = fn.external_source(source=lambda: [self.data], dtype=DALIDataType.UINT8, ndim=1)
            numbers = fn.external_source(source=lambda: [self.frames], dtype=DALIDataType.INT32, ndim=1)
            pipeline.set_outputs(fn.decoders.video(data, device="cpu", frames=numbers))
        pipeline.build()
        self.pipeline = pipeline

    def clips(self, file, clips):
        """See `Torchcodec.clips`."""
        self.data = self.files[file]
        self.frames = self.numpy.array([frame for frames in clips for frame in frames], self.numpy.int32)
        (out,) = self.pipeline.run()
        return self.numpy.array(out.as_cpu().at(0)).transpose(0, 3, 1, 2)


PEERS = {
    "torchcodec": Torchcodec,
    "torchcodec approximate": TorchcodecApproximate,
    "torchcodec kept open": TorchcodecKept,
    "webdataset + torchcodec": Webdataset,
    "decord": Decord,
    "PyAV seek": Pyav,
    "SPDL": Spdl,
    "DALI": Dali,
}


class Transforms:
    """torchvision v2 on the CPU: random resized crop, flip, float, normalise, one draw per clip; then a batch."""

    def __init__(self):
        import torch
        from torchvision.transforms import v2

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.torch, self.waiting = torch, []
        self.apply = v2.Compose([
            v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __call__(self, frames):
        """Add one clip (T, C, H, W) uint8 to the batch."""
        frames = frames if isinstance(frames, self.torch.Tensor) else self.torch.from_numpy(frames)
        self.waiting.append(self.apply(frames).transpose(0, 1))
        if len(self.waiting) == BATCH:
            self.torch.stack(self.waiting)
            self.waiting = []


class Contestant:
    """A peer behind the protocol."""

    def __init__(self, order):
        self.peer = PEERS[order["name"]](order["files"], order["sounds"])
        self.requests = order["requests"]
        self.transforms = Transforms() if order["out"] == "float" else None
        if any(sound for _, _, sound in self.requests[0]) and not hasattr(self.peer, "sound"):
            raise RuntimeError("does not read sound")

    def run(self, number, count):
        """Serve the last ``count`` requests of a round; {frames, first_s: when the first batch was there}."""
        frames, first_s, start_s = 0, 0.0, time.perf_counter()
        for place, (file, clips, sound) in enumerate(self.requests[number][-count:]):
            pictures = self.peer.clips(file, clips)
            if sound:
                self.peer.sound(file, *sound)
            if self.transforms is not None:
                self.transforms(pictures)
            frames += len(pictures)
            if place == min(BATCH, count) - 1:
                first_s = time.perf_counter() - start_s
        return {"frames": frames, "first_s": first_s}

    def show(self, count):
        """Fingerprints of all frames of the first requests, a list per request; None if others are served."""
        if getattr(self.peer, "own_order", False):
            return None
        found = []
        for file, clips, _ in self.requests[0][:count]:
            pictures = self.peer.clips(file, clips)
            luma = [0.299 * one[0] + 0.587 * one[1] + 0.114 * one[2] for one in pictures]
            found.append([fingerprint(one) for one in luma])
        return found


def fingerprint(luma):
    """Mean brightness of the blocks of a picture, `GRID` a side, in one list."""
    height, width = luma.shape
    rows = [round(i * height / GRID) for i in range(GRID + 1)]
    columns = [round(i * width / GRID) for i in range(GRID + 1)]
    return [round(float(luma[a:b, c:d].mean()), 2) for a, b in pairwise(rows) for c, d in pairwise(columns)]


def luma_to_gray(luma):
    """Limited-range luma as the brightness of the RGB picture, which is clipped."""
    return ((luma.astype("float64") - 16) * 255 / 219).clip(0, 255)


def modules_of(order):
    """Packages that an order needs."""
    return PEERS[order["name"]].modules + (("torchvision", "torch") if order["out"] == "float" else ())


def versions(names):
    """{distribution: version} of the modules."""
    from importlib import metadata

    packages = metadata.packages_distributions()
    tops = {name: name.split(".")[0] for name in names}
    found = {}
    for top in tops.values():
        for distribution in packages.get(top, ()):
            if top != "nvidia" or "dali" in distribution:
                found[distribution] = metadata.version(distribution)
    return found


def family():
    """Numbers of this process and of all below it."""
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    waiting += [int(child) for child in file.read().split()]
        except OSError:
            continue
    return found


def memory_mb():
    """Resident memory of the family in MB, where the system tells."""
    total = 0.0
    for pid in family():
        try:
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1]) * resource.getpagesize() / 1e6
        except OSError:
            continue
    return total


def cpu_s():
    """Seconds of processor time of the family, and of its members that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(one.ru_utime + one.ru_stime for one in used)
    for pid in family()[1:]:
        try:
            with open(f"/proc/{pid}/stat") as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return total


def serve(make, modules):
    """Answer until standard input ends. make(order) gives the contestant, modules(order) what it imports."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not disturb the protocol

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    order = json.loads(sys.stdin.readline())
    if order.get("cores") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, order["cores"])
    start_s = time.perf_counter()
    try:
        names = modules(order)
        for name in names:
            importlib.import_module(name)
        contestant = make(order)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        answer({"missing": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        return
    answer({"versions": versions(names), "python": sys.version.split()[0], "start_s": time.perf_counter() - start_s})
    for line in sys.stdin:
        work = json.loads(line)
        if "show" in work:
            answer({"fingerprints": contestant.show(work["show"])})
            continue
        before_s, start_s = cpu_s(), time.perf_counter()
        facts = contestant.run(work["round"], work["count"])
        wall_s = time.perf_counter() - start_s
        answer({"wall_s": wall_s, "cpu_s": cpu_s() - before_s, "memory_mb": memory_mb(), **facts})


if __name__ == "__main__":
    serve(Contestant, modules_of)
