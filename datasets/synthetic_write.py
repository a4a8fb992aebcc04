"""Synthetic corpora on disk, in the folder layouts of the field's data sets."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path

from clipmill.datasets.synthetic import TEXTURES, Scene, box_of, generator
from clipmill.datasets.synthetic_draw import class_names, draw_clip, draw_image, draw_sequence
from clipmill.datasets.synthetic_media import CONTAINERS, encode, image_bytes, label_map_bytes

VERSION = 1  # of the generator; other numbers make other files
SETTINGS_FILE = "synthetic.json"
AUDIO_RATES_HZ = (16000, 22050, 32000, 44100, 48000)
_LEAST_PER_CLASS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a corpus holds.

    clips: labelled videos; motions, rhythms: their product is the number of classes. size: short side in pixels, at
    most; seconds: mean length; looks: number of textures (few make looks useless for telling clips apart). images:
    pictures of the image folder. sequences, frames, frame_size, objects: of the mask and box sequences (short side in
    pixels). seed: same seed, same bytes.
    """

    clips: int = 192
    motions: int = 4
    rhythms: int = 2
    size: int = 112
    seconds: float = 2.5
    looks: int = 8
    images: int = 300
    sequences: int = 6
    frames: int = 40
    frame_size: int = 192
    objects: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = _LEAST_PER_CLASS * len(class_names(self.motions, self.rhythms))
        limits = {
            "clips": (least, 1_000_000),
            "size": (32, 2160),
            "seconds": (0.1, 3600),
            "looks": (1, 1_000_000),
            "images": (2 * len(TEXTURES), 10_000_000),
            "sequences": (1, 9999),
            "frames": (2, 9999),
            "frame_size": (32, 2160),
            "objects": (1, 5),
            "seed": (0, 2**63),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                why = f" ({_LEAST_PER_CLASS} per class)" if name == "clips" and value < low else ""
                raise ValueError(f"{name} must be {low}{why} to {high}, got {value}")


@dataclass(frozen=True, slots=True)
class Job:
    """Files that are made together. paths: relative to the corpus; make: their bytes, in the same order."""

    paths: tuple[str, ...]
    make: Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write. jobs: media; tables: text files by path, written last, so that a list means a whole corpus."""

    jobs: tuple[Job, ...]
    tables: dict[str, str]


def write(
    root: str | Path,
    kind: str = "kinetics",
    settings: Settings | None = None,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic corpus into the folder ``root`` and return it.

    kind: one of `KINDS`, or ``all`` for each of them in a sub-folder of its name. processes: the bytes do not depend
    on it; with more than one the caller's main module must be importable. progress: called with (done, total).

    Files appear by rename. A run that was interrupted is finished by the same call; files that exist are kept. Raises
    ValueError for a folder that holds something else.
    """
    root, settings = Path(root), settings or Settings()
    if kind not in (*KINDS, "all"):
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join((*KINDS, 'all'))}")
    _claim(root, {"version": VERSION, "kind": kind, **asdict(settings)})
    plans = {f"{name}/": KINDS[name](settings) for name in KINDS} if kind == "all" else {"": KINDS[kind](settings)}
    jobs = [
        replace(job, paths=tuple(prefix + path for path in job.paths))
        for prefix, plan in plans.items()
        for job in plan.jobs
    ]
    for done, _ in enumerate(_run(root, jobs, processes), 1):
        if progress is not None:
            progress(done, len(jobs))
    for prefix, plan in plans.items():
        for path, text in plan.tables.items():
            _publish(root / (prefix + path), text.encode())
    return root


def _claim(root: Path, settings: dict[str, object]) -> None:
    path = root / SETTINGS_FILE
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != settings:
            raise ValueError(f"{path}: this folder was made with other settings; remove it or choose another folder")
    elif root.is_dir() and any(not entry.name.startswith(".") for entry in root.iterdir()):
        raise ValueError(f"{root}: the folder holds other files; choose an empty or a new one")
    else:
        _publish(path, (json.dumps(settings, indent=2) + "\n").encode())


def _run(root: Path, jobs: list[Job], processes: int) -> Iterator[None]:
    if processes <= 1:
        yield from map(_do, repeat(root), jobs)
        return
    chunk = max(1, min(8, len(jobs) // (4 * processes)))
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(_do, repeat(root), jobs, chunksize=chunk)


def _end_with_parent() -> None:
    """Without this, workers of a parent that was killed wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _do(root: Path, job: Job) -> None:
    if not all((root / path).is_file() for path in job.paths):
        for path, payload in zip(job.paths, job.make(), strict=True):
            _publish(root / path, payload)


def _publish(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(payload)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# --- labelled clips -----------------------------------------------------------------------------------------


def clip_scene(settings: Settings, number: int, group: int | None = None) -> Scene:
    """The scene of clip ``number``; its label is ``number`` modulo the number of classes."""
    motion, rhythm = divmod(number % (settings.motions * settings.rhythms), settings.rhythms)
    return draw_clip(
        settings.seed,
        number,
        motion,
        rhythm,
        size=settings.size,
        seconds=settings.seconds,
        looks=settings.looks,
        group=group,
    )


def _clip(settings: Settings, number: int, suffix: str, group: int | None = None) -> Iterator[bytes]:
    rng = generator(settings.seed, "container", number)
    rates = {".webm": (48000,), ".avi": (16000, 22050)}.get(suffix, AUDIO_RATES_HZ)
    audio_hz, channels = rates[int(rng.integers(len(rates)))], int(rng.integers(1, 3))
    yield encode(clip_scene(settings, number, group), suffix, audio_hz, channels)


def _numbered(settings: Settings) -> Iterator[tuple[int, int, str]]:
    """(number of the clip, its number within its class, class name)."""
    names = class_names(settings.motions, settings.rhythms)
    return ((number, number // len(names), names[number % len(names)]) for number in range(settings.clips))


def _folder(settings: Settings) -> Plan:
    suffixes = tuple(CONTAINERS)
    jobs = []
    for number, _, name in _numbered(settings):
        suffix = suffixes[int(generator(settings.seed, "suffix", number).integers(len(suffixes)))]
        jobs.append(Job((f"{name}/clip_{number:05d}{suffix}",), partial(_clip, settings, number, suffix)))
    return Plan(tuple(jobs), {})


def _kinetics(settings: Settings) -> Plan:
    jobs, tables = [], {}
    for split in ("train", "val"):
        rows = ["label,youtube_id,time_start,time_end,split"]
        for number, place, name in _numbered(settings):
            if (place % _LEAST_PER_CLASS == _LEAST_PER_CLASS - 1) != (split == "val"):
                continue
            start_s = int(generator(settings.seed, "start", number).integers(300))
            end_s = start_s + math.ceil(clip_scene(settings, number).duration_s)
            youtube_id = _youtube_id(settings.seed, number)
            path = f"{split}/{name}/{youtube_id}_{start_s:06d}_{end_s:06d}.mp4"
            jobs.append(Job((path,), partial(_clip, settings, number, ".mp4")))
            rows.append(f"{name},{youtube_id},{start_s},{end_s},{split}")
        tables[f"{split}.csv"] = "\n".join(rows) + "\n"
    return Plan(tuple(jobs), tables)


def _youtube_id(seed: int, number: int) -> str:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return base64.urlsafe_b64encode(digest).decode()[:11]


def _ucf101(settings: Settings) -> Plan:
    names = class_names(settings.motions, settings.rhythms)
    titles = {name: "".join(word.capitalize() for word in name.split()) for name in names}
    per_group = min(max(settings.clips // len(names) // 6, 1), 4)
    jobs, rows = [], []
    for number, place, name in sorted(_numbered(settings), key=lambda row: (titles[row[2]], row[1])):
        group, clip = place // per_group + 1, place % per_group + 1
        path = f"{titles[name]}/v_{titles[name]}_g{group:02d}_c{clip:02d}.avi"
        looks = names.index(name) * 100_000 + group  # clips of a group are cut from one video: they look alike
        jobs.append(Job((f"UCF-101/{path}",), partial(_clip, settings, number, ".avi", looks)))
        rows.append((group, path, sorted(titles.values()).index(titles[name]) + 1))
    lists = {"classInd.txt": [f"{i} {title}" for i, title in enumerate(sorted(titles.values()), 1)]}
    for split in (1, 2, 3):  # as in the original, split k tests its own groups
        tested = [(group - 1) % 4 == split - 1 for group, _, _ in rows]
        lists[f"trainlist{split:02d}.txt"] = [
            f"{path} {label}" for (_, path, label), test in zip(rows, tested, strict=True) if not test
        ]
        lists[f"testlist{split:02d}.txt"] = [path for (_, path, _), test in zip(rows, tested, strict=True) if test]
    tables = {f"ucfTrainTestlist/{name}": "".join(f"{line}\r\n" for line in lines) for name, lines in lists.items()}
    return Plan(tuple(jobs), tables)


# --- pictures, masks and boxes ------------------------------------------------------------------------------


def _images(settings: Settings) -> Plan:
    jobs = []
    for number in range(settings.images):
        place, texture = divmod(number, len(TEXTURES))
        split = "val" if place % 4 == 3 else "train"
        path = f"{split}/{TEXTURES[texture]}/img_{number:05d}{'.png' if place % 3 == 2 else '.jpg'}"
        jobs.append(Job((path,), partial(_image, settings, number, texture, path[-4:])))
    return Plan(tuple(jobs), {})


def _image(settings: Settings, number: int, texture: int, suffix: str) -> Iterator[bytes]:
    scene = draw_image(settings.seed, number, texture, size=settings.size, looks=settings.looks)
    yield image_bytes(scene.frame(0), suffix)


def sequence_scene(settings: Settings, number: int) -> Scene:
    """The scene of mask or box sequence ``number``."""
    return draw_sequence(
        settings.seed,
        number,
        size=settings.frame_size // 2 * 2,
        num_frames=settings.frames,
        objects=settings.objects,
    )


def _davis(settings: Settings) -> Plan:
    names = [f"synthetic-{number:04d}" for number in range(settings.sequences)]
    jobs = []
    for number, name in enumerate(names):
        folders = ("JPEGImages/480p", "Annotations/480p")
        paths = [
            f"{folder}/{name}/{t:05d}{suffix}"
            for t in range(settings.frames)
            for folder, suffix in zip(folders, (".jpg", ".png"), strict=True)
        ]
        jobs.append(Job(tuple(paths), partial(_masks, settings, number)))
    lists = {"val": names[::2], "train": names[1::2]}
    tables = {f"ImageSets/2017/{split}.txt": "".join(f"{name}\n" for name in part) for split, part in lists.items()}
    return Plan(tuple(jobs), tables)


def _masks(settings: Settings, number: int) -> Iterator[bytes]:
    scene = sequence_scene(settings, number)
    for t in range(scene.num_frames):
        image, labels = scene.annotated(t)
        yield image_bytes(image, ".jpg")
        yield label_map_bytes(labels)


def _otb(settings: Settings) -> Plan:
    jobs = []
    for number in range(settings.sequences):
        name = f"Synthetic{number:04d}"
        paths = [f"{name}/img/{t + 1:04d}.jpg" for t in range(settings.frames)]
        jobs.append(Job((*paths, f"{name}/groundtruth_rect.txt"), partial(_boxes, settings, number)))
    return Plan(tuple(jobs), {})


def _boxes(settings: Settings, number: int) -> Iterator[bytes]:
    scene = sequence_scene(settings, number)
    rows = []
    for t in range(scene.num_frames):
        image, labels = scene.annotated(t)
        box = box_of(labels == len(scene.bodies))  # the object in front of all
        assert box is not None
        rows.append(f"{box[0] + 1},{box[1] + 1},{box[2]},{box[3]}\n")
        yield image_bytes(image, ".jpg")
    yield "".join(rows).encode()


KINDS: dict[str, Callable[[Settings], Plan]] = {
    "folder": _folder,
    "kinetics": _kinetics,
    "ucf101": _ucf101,
    "images": _images,
    "davis": _davis,
    "otb": _otb,
}
