"""``clipmill pack``: raw videos, images and sound to shards and an index."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from clipmill.datasets.source import Corpus
    from clipmill.pipeline.pack.engine_ray import RayEngine
    from clipmill.pipeline.pack.plan import Share
    from clipmill.pipeline.pack.settings import PackSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """Pack a corpus: check, normalise and re-encode every file once, so that clips can be read fast and exactly.

    Every file ends as ok, salvaged, rejected or duplicate, with the reason in rejects.jsonl. Interrupt it at any time;
    the same command continues, and the result is the same to the byte. So it is on several machines (--task, --engine).
    """

    source: Positional[Path]
    """Folder of the corpus."""
    out: Positional[Path]
    """Folder for the packed data set; new, empty, or one that this command began."""
    reader: str = "auto"
    """How the corpus is laid out: folder, images, kinetics, kinetics_sound, audioset, ucf101, hmdb51, listfile or any
    other module of clipmill.datasets with a read function; auto = found out."""
    lists: str | None = None
    """List files of the corpus, from its folder: a path or pattern, e.g. "train.csv" or "lists/*.txt"."""
    videos: str | None = None
    """Folder with the media files, from the corpus folder, where it is not the reader's default."""
    class_list: str | None = None
    """File with the class names, one per row in label order, from the corpus folder."""
    split: str | None = None
    """ucf101, hmdb51: number of the official split; listfile: name of the split of all rows."""
    classes: bool | None = None
    """folder, images: whether sub-folders are classes; default: if no file lies outside one."""
    trimmed: bool | None = None
    """kinetics, audioset: whether a file named after the id alone is the clip (default) or the whole video."""
    profile: Literal["cpu", "gpu", "intra", "jpeg", "raw", "copy"] = "cpu"
    """Encoding: cpu = H.264 that decodes fast; gpu = HEVC for hardware decoders; intra = H.264 of key frames only;
    jpeg = one JPEG per frame; raw = uncompressed; copy = the source's packets as they are, files that need a change
    are rejected."""
    gop: int = 8
    """Frames from one key frame to the next (cpu, gpu); fewer = faster random access, larger shards."""
    quality: int = 20
    """Constant rate factor, 1 (best) to 51 (cpu, gpu, intra; jpeg uses a quantiser that matches it)."""
    short_side: int | None = None
    """Scale pictures down to this short side in pixels (even); smaller ones are kept as they are."""
    fps: str | None = None
    """Frames per second of all videos, e.g. 25 or 30000/1001; default: each video's own rate."""
    matrix: Literal["bt709", "source"] = "bt709"
    """YUV matrix: convert to BT.709, or keep the source's and record it."""
    audio_hz: int = 16000
    """Sampling rate of the sound in Hz; 0 = leave sound out."""
    damage_budget: float = 0.05
    """Share of a file's packets that may be damaged for its undamaged part still to be kept."""
    shard_clips: int = 1000
    """Most sources in one shard."""
    shard_gb: float = 4.0
    """Most gigabytes of source files in one shard."""
    estimate: bool = False
    """Write nothing: pack a sample and say what size, quality and speed to expect of the whole."""
    sample: int = 8
    """Sources in the sample of --estimate."""
    workers: int = 0
    """Worker processes; 0 = one per core (of the whole cluster with Ray). The result does not depend on it."""
    engine: Literal["local", "ray"] = "local"
    """Where they run: local = on this machine; ray = on a Ray cluster, whose machines share the folders."""
    address: str | None = None
    """Of the Ray cluster, HOST:PORT, auto or local; default: RAY_ADDRESS, else one on this machine."""
    task: str | None = None
    """I/N, e.g. 2/8: pack only the shards of task I of N. Tasks may run at once, on machines that share the folders;
    --finish makes one data set of what they packed."""
    finish: bool = False
    """Pack nothing: make the data set of the shards that the tasks packed."""
    timeout_s: float = 3600.0
    """Seconds that one file may take before it is given up."""
    memory_gb: float = 8.0
    """Gigabytes of memory that one worker may use."""
    json: bool = False
    """Print the outcome as one line of JSON and no progress."""


def main(args: Args) -> int:
    """Pack, and say what became of the corpus."""
    import json
    import sys
    from contextlib import ExitStack, redirect_stdout

    from clipmill.pipeline.pack.run import finish, pack
    from clipmill.pipeline.pack.settings import PackSettings
    from clipmill.tools.progress import Progress

    _check(args)
    share = _share(args.task)
    names = (
        "profile",
        "gop",
        "quality",
        "short_side",
        "matrix",
        "audio_hz",
        "damage_budget",
        "shard_clips",
        "shard_gb",
    )
    settings = PackSettings(**{name: getattr(args, name) for name in names}, fps=_fps(args.fps))
    corpus = read_corpus(args)
    if args.estimate:
        return _estimate(args, corpus, settings)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("pack", unit="files", quiet=args.json or args.finish))

        def report(done: int, total: int, packed: int, rejected: int, size: int) -> None:
            progress(done, total, f"{packed} packed, {rejected} rejected, {size / 1e6:.0f} MB")

        stack.enter_context(redirect_stdout(sys.stderr))  # where Ray prints that a node is lost
        if args.finish:
            summary = finish(corpus, args.out, settings, root=args.source)
        else:
            summary = pack(
                corpus,
                args.out,
                settings,
                root=args.source,
                workers=args.workers,
                timeout_s=args.timeout_s,
                memory_gb=args.memory_gb,
                engine=stack.enter_context(_ray_engine(args)) if args.engine == "ray" else None,
                share=share,
                on_progress=report,
            )
    if args.json:
        facts: dict[str, Any] = {"out": str(args.out), "counts": summary.counts, "reasons": summary.reasons}
        print(json.dumps(facts | {"already": summary.already}))
        return 0
    counts = ", ".join(f"{count} {name}" for name, count in summary.counts.items())
    how = "was packed before: " if summary.already else f"task {share}: " if share else ""
    print(f"{args.out}: {how}{counts}")
    if share and not summary.already:
        print("after all tasks: the same command with --finish instead of --task")
        return 0
    if summary.reasons:
        reasons = ", ".join(f"{count} {name}" for name, count in summary.reasons.items())
        print(f"not packed: {reasons} (see {args.out / 'rejects.jsonl'})")
    return 0


def _check(args: Args) -> None:
    """Options that cannot go together."""
    if args.workers < 0:
        raise ValueError(f"--workers must be 0 or more, got {args.workers}")
    if args.task is not None and args.finish:
        raise ValueError("--finish comes after all tasks; leave --task out")
    if args.address is not None and args.engine != "ray":
        raise ValueError("--address is that of a Ray cluster; add --engine ray")
    if args.engine == "ray" and (args.estimate or args.finish):
        raise ValueError(f"--{'estimate' if args.estimate else 'finish'} runs on this machine; leave --engine ray out")
    if args.estimate and (args.task is not None or args.finish):
        raise ValueError("--estimate writes nothing; leave --task and --finish out")


def _share(text: str | None) -> Share | None:
    from clipmill.pipeline.pack.plan import Share

    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
        raise ValueError(f"--task {text}: give I/N, e.g. 2/8 for the second of eight tasks")
    return Share(int(number), int(of))


def _ray_engine(args: Args) -> RayEngine:
    from clipmill.pipeline.pack.engine_ray import RayEngine

    return RayEngine(
        workers=args.workers,
        timeout_s=args.timeout_s,
        memory_gb=args.memory_gb,
        address=args.address,
        folders=(args.source, args.out),
    )


def _estimate(args: Args, corpus: Corpus, settings: PackSettings) -> int:
    import json

    from clipmill.pipeline.pack.estimate import estimate
    from clipmill.tools.progress import Progress

    with Progress("estimate", unit="files", quiet=args.json) as progress:
        found = estimate(
            corpus,
            settings,
            sample=args.sample,
            workers=args.workers,
            timeout_s=args.timeout_s,
            memory_gb=args.memory_gb,
            on_progress=lambda done, total, *_: progress(done, total),
        )
    print(json.dumps(found.to_json()) if args.json else found.describe())
    return 0


def read_corpus(args: Args) -> Corpus:
    """Read the corpus with the chosen reader; options it does not have are an error."""
    import inspect
    from importlib import import_module

    from clipmill.datasets.source import CorpusError

    if not args.source.is_dir():
        what = "is not a folder" if os.path.lexists(args.source) else "no such folder"
        raise CorpusError(f"{args.source}: {what}; name the folder that holds the corpus")
    name = guess_reader(args.source) if args.reader == "auto" else args.reader
    if name not in readers():
        raise ValueError(f"--reader {name} is not known; choose auto or one of {', '.join(readers())}")
    read = import_module(f"clipmill.datasets.{name}").read
    known = inspect.signature(read).parameters
    given: dict[str, Any] = {}
    for option in ("lists", "videos", "class_list", "split", "classes", "trimmed"):
        value = getattr(args, option)
        if value is None:
            continue
        if option not in known:
            raise ValueError(f"--{option.replace('_', '-')} is not an option of the reader {name}; leave it out")
        given[option] = _split(value) if option == "split" and isinstance(known[option].default, int) else value
    return read(args.source, **given)


def readers() -> list[str]:
    """Modules of clipmill.datasets with a function ``read``."""
    from clipmill.datasets import files

    return sorted(path.stem for path in Path(files.__file__).parent.glob("*.py") if "\ndef read(" in path.read_text())


def guess_reader(root: Path) -> str:
    """The reader for a corpus folder, from the lists in it; a folder of media files where there are none."""
    from clipmill.datasets.files import IMAGE_SUFFIXES, MEDIA_SUFFIXES, find

    if list(root.glob("ucfTrainTestlist/classInd.txt")) or (root / "classInd.txt").is_file():
        return "ucf101"
    if list(root.glob("*/*_test_split1.txt")) or list(root.glob("*_test_split1.txt")):
        return "hmdb51"
    if list(root.glob("*segments*.csv")):
        return "audioset"
    for path in sorted(root.glob("*.csv")):
        with path.open(errors="replace") as file:
            if "youtube_id" in file.readline():
                return "kinetics"
    media, pictures = len(find(root, MEDIA_SUFFIXES)), len(find(root, IMAGE_SUFFIXES))
    return "images" if pictures > media else "folder"


def _split(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--split {text}: this reader's splits are numbers, e.g. 1") from error


def _fps(text: str | None) -> Any:
    from fractions import Fraction

    try:
        return None if text is None else Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--fps {text}: give a number or a fraction, e.g. 25 or 30000/1001") from error
