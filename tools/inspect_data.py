"""What `clipmill inspect` finds out: numbers of a packed data set, pictures of sampled records and of real batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipmill.models.method import method_class, recipes
from clipmill.pipeline.decode.decoder import DecodeError, new_decoder
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.order import Order
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.remote import open_reader, shard_bytes
from clipmill.pipeline.shard import ShardError
from clipmill.pipeline.spec import AudioSpec, CenterCrop, LogMel, Normalize, VideoSpec
from clipmill.pipeline.views import Clips, Planner, Sound, View
from clipmill.tools import pictures
from clipmill.tools.progress import track

_FRAMES = 8  # per strip
_MAX_SOUND_S = 60.0
_STRIP_HEIGHT = 96  # pixels

Rows = list[tuple[str, np.ndarray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One record as pictures: a film strip, and a spectrogram of its first ``heard_s`` seconds.

    damage: why a picture is missing that should be there.
    """

    record: VideoRecord
    facts: str
    film: np.ndarray | None = None
    sound: np.ndarray | None = None
    heard_s: float = 0.0
    damage: str = ""


# --- numbers ------------------------------------------------------------------------------------------------


def corpus_numbers(index: ShardIndex) -> dict[str, Any]:
    """Counts and spreads of an index, JSON-ready; durations in seconds, rates in Hz, sizes in pixels."""
    frames, samples = index.column("num_frames").astype(np.int64), index.column("num_samples").astype(np.int64)
    labels, names = index.column("label"), index.classes
    durations_s = durations(index)
    rows = np.unique(index.column("codec"), return_index=True, return_counts=True)
    shards = _shard_bytes(index)
    sizes = zip(index.column("width").tolist(), index.column("height").tolist(), strict=True)
    return {
        "records": len(index),
        "digest": index.digest,
        "shards": len(index.shards),
        "shard_bytes": sum(shards.values()),
        "shards_missing": [path.name for path in index.shards if path.name not in shards],
        "frames": int(frames.sum()),
        "hours": float(durations_s.sum() / 3600),
        "images": int((frames == 1).sum()),
        "with_sound": int((samples > 0).sum()),
        "silent": int(index.column("silent").astype(bool).sum()),
        "sound_only": int((frames == 0).sum()),
        "salvaged": int(index.column("salvaged").astype(bool).sum()),
        "duration_s": _spread(durations_s),
        "splits": _counts(str(name) or "(none)" for name in index.column("split").tolist()),
        "labels": _counts(class_name(names, label) for label in labels.tolist()),
        "sizes": _counts(f"{width}x{height}" for width, height in sizes if width),
        "fps": _counts(f"{rate:.6g}" for rate in _fps(index)[frames > 0].tolist()),
        "audio_hz": _counts(str(rate) for rate in index.column("audio_hz").tolist() if rate),
        "codecs": {index[int(row)].codec.codec: int(n) for _, row, n in zip(*rows, strict=True)},
    }


def _shard_bytes(index: ShardIndex) -> dict[str, int]:
    """Sizes of the shards that are there; of remote ones as dataset.json has them."""
    if index.url:
        return shard_bytes(index.root)
    return {path.name: path.stat().st_size for path in index.shards if path.is_file()}


def durations(index: ShardIndex) -> np.ndarray:
    """Seconds of every record: of its pictures, or of its sound where it has none."""
    frames, samples = index.column("num_frames").astype(np.float64), index.column("num_samples").astype(np.float64)
    sound_s = samples / np.maximum(index.column("audio_hz"), 1)
    return np.where(frames > 0, frames / np.maximum(_fps(index), 1e-9), sound_s)


def label_table(index: ShardIndex) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The names of all splits, and a row (label, records per split ..., all) per label, the largest first."""
    splits = [str(name) or "(none)" for name in index.column("split").tolist()]
    labels = [class_name(index.classes, label) for label in index.column("label").tolist()]
    columns = sorted(set(splits))
    pairs = Counter(zip(labels, splits, strict=True))
    return columns, [(name, *(pairs[name, split] for split in columns), n) for name, n in _counts(labels).items()]


def class_name(names: Sequence[str], label: int) -> str:
    """The name of a class, its number if it has none."""
    if label < 0:
        return "(no label)"
    return names[label] if label < len(names) else str(label)


def _fps(index: ShardIndex) -> np.ndarray:
    return index.column("fps_num") / np.maximum(index.column("fps_den"), 1)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0, 50, 100)).tolist()
    return {"min": low, "median": median, "mean": float(values.mean()), "max": high}


def dataset_json(root: Path) -> dict[str, Any] | None:
    """What `clipmill pack` wrote about the data set; None if it is missing."""
    path = root / "dataset.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}); run `clipmill pack` again to restore it") from error


def reject_rows(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of rejects.jsonl, and what was wrong with it."""
    path = root / "rejects.jsonl"
    if not path.is_file():
        return [], [f"{path.name} is missing: what was rejected is not known"]
    rows, problems = [], []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            problems.append(f"{path.name}: line {number} is not a JSON object and was left out")
    return rows, problems


# --- samples ------------------------------------------------------------------------------------------------


def record_samples(index: ShardIndex, count: int, seed: int, quiet: bool) -> list[Sample]:
    """Film strips and spectrograms of ``count`` records, chosen by the seed, in index order."""
    order = Order(num_records=len(index), seed=seed)
    chosen = sorted(order.records(0, np.arange(min(count, len(index)))).tolist())
    reader = open_reader(index)
    decoder = new_decoder("pyav", reader)
    found = []
    for number in track(chosen, "inspect", len(chosen), "records", quiet=quiet):
        record = index[number]
        film = sound = None
        heard, damage = 0, ""
        try:
            if record.num_frames:
                film = pictures.strip(pictures.record_frames(decoder, record, _FRAMES, _STRIP_HEIGHT))
            if record.num_samples:
                heard = min(record.num_samples, round(_MAX_SOUND_S * record.audio_hz))
                sound = pictures.spectrogram(reader.samples(record, 0, heard) / 32768.0, record.audio_hz)
        except (DecodeError, ShardError) as error:
            damage = str(error)
        heard_s = heard / record.audio_hz if heard else 0.0
        facts = _facts(record, index.classes)
        found.append(Sample(record=record, facts=facts, film=film, sound=sound, heard_s=heard_s, damage=damage))
    reader.close()
    return found


def _facts(record: VideoRecord, classes: Sequence[str]) -> str:
    parts = [class_name(classes, record.label), record.split]
    if record.num_frames:
        parts.append(f"{record.width}x{record.height}, {record.num_frames} frames at {float(record.fps):.4g}/s")
    parts.append(f"{record.duration_s:.2f} s")
    parts.append("silent" if record.silent else f"{record.audio_hz} Hz" if record.num_samples else "no sound")
    return ", ".join(part for part in [*parts, "salvaged" if record.salvaged else ""] if part)


def plain_planner(index: ShardIndex) -> Planner:
    """What is shown when no method is named: a clip (or the image), and sound where every record has it."""
    frames, samples = index.column("num_frames"), index.column("num_samples")
    sound = View(name="sound", modality="audio", duration_s=2.0, augment=AudioSpec(logmel=LogMel()))
    if not (frames > 0).any():
        return Sound(views=(sound,))
    spec = VideoSpec(size=112, crop=CenterCrop(size=112, resize=128), ops=(Normalize(),))
    if bool((frames <= 1).all()):
        clip = View(name="image", modality="image", augment=spec)
    else:
        clip = View(name="clip", num_frames=16, stride=2, augment=spec)
    return Clips(views=(clip, sound) if bool((samples > 0).all()) else (clip,))


def method_planner(name: str, recipe: str = "") -> Planner:
    """The planner of a method: of a named recipe, or of its default configuration."""
    cls = method_class(name)
    if not recipe:
        return cls(cls.Config()).plan()
    known = recipes(name)
    if recipe not in known:
        raise ValueError(f"method {name} has no recipe {recipe!r}; it has {', '.join(sorted(known))}")
    return cls(known[recipe].method).plan()


def view_samples(index: ShardIndex, planner: Planner, count: int, seed: int) -> tuple[Loader, dict[str, Rows]]:
    """One batch of the real loader as {view: [(title, picture)]}, and the loader (closed) for its counters."""
    config = LoaderConfig(threads=1, processes=0, max_damaged=1.0)
    size = min(count, len(index))
    loader = Loader(index, planner, batch_size=size, seed=seed, drop_last=False, config=config)
    with loader:
        try:
            batch = next(loader.epoch(0))
        except RuntimeError as error:  # not one record is left
            raise ValueError(str(error)) from error
    keys = [loader.index[number].key for number in batch.index.tolist()]
    found: dict[str, Rows] = {}
    for view in planner.views:
        tensor = batch.audio[view.name] if view.modality == "audio" else batch.video[view.name]
        starts = batch.start_s[view.name].tolist()
        titles = [f"{key} from {start_s:.2f} s" for key, start_s in zip(keys, starts, strict=True)]
        found[view.name] = list(zip(titles, (_picture(view, one) for one in tensor.numpy()), strict=True))
    return loader, found


def _picture(view: View, x: np.ndarray) -> np.ndarray:
    if isinstance(view.augment, VideoSpec):
        return pictures.clip_strip(x, view.augment, _FRAMES)
    return pictures.wave_picture(x) if x.ndim == 1 else pictures.mel_picture(x[0])


def view_text(view: View) -> str:
    """What a view asks for, in words."""
    spec = view.augment
    if isinstance(spec, AudioSpec):
        form = f"log-mel with {spec.logmel.mels} bands" if spec.logmel else "waveform"
        ops = [type(op).__name__ for op in spec.ops]
        return f"{view.duration_s:g} s of sound at {spec.hz} Hz, {form}; {', '.join(ops) or 'nothing drawn'}"
    pace = f"{view.fps:g} frames/s" if view.fps else f"stride {view.stride}"
    each = "per frame" if spec.per_frame else "per clip"
    ops = [type(spec.crop).__name__, *(type(op).__name__ for op in spec.ops)]
    return f"{view.num_frames} frames, {pace}, {spec.size}x{spec.size}; {', '.join(ops)}, drawn {each}"
