"""Which encoder is meant by a word of the command line, and which records are its training and its test set."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipmill.models.encoder import ENCODER_META, Encoder, build_encoder, load_encoder
from clipmill.pipeline.draws import fold, fold_array
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.baselines import BASELINE, baseline

RANDOM = "random:"


def open_encoder(text: str, device: str = "cpu") -> Encoder:
    """An encoder by name: a run folder, an encoder folder, ``random:...`` for an untrained one, or a ``baseline:...``.

    ``random:FOLDER`` is the encoder of that folder before training; ``random:BACKBONE:width=0.25,seed=1`` builds one.
    The same text gives the same weights.
    """
    if text.startswith(BASELINE):
        return baseline(text.removeprefix(BASELINE)).to(device)
    if not text.startswith(RANDOM):
        return load_encoder(text, device)
    name, _, rest = text.removeprefix(RANDOM).partition(":")
    options = _options(text, rest)
    seed = options.pop("seed", 0)
    if not isinstance(seed, int):
        raise ValueError(f"{text}: seed must be an integer, got {seed!r}")
    if (Path(name) / ENCODER_META).is_file():
        if options:
            raise ValueError(f"{text}: a folder fixes the backbone's options; only seed=... may follow")
        return untrained(load_encoder(name), seed).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(name, **options).to(device)


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same backbone for the same input with new random weights; needs an encoder made by `build_encoder`."""
    recipe = encoder.recipe
    if recipe is None:
        raise ValueError(f"{type(encoder).__name__} was not made by build_encoder, so it cannot be built anew")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_encoder(recipe["name"], **recipe["options"])
    fresh.spec = encoder.spec
    fresh.audio_view = encoder.audio_view
    return fresh


def stored_audio_view(encoder: Encoder) -> View | None:
    """How the run that made this encoder prepared its sound; None if nothing is known."""
    return encoder.audio_view


def _options(text: str, rest: str) -> dict[str, Any]:
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{text}: expected name=value after the backbone, got {item!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


# --- splits -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Which records train a classifier (or are searched) and which are scored."""

    train: str = "train"
    """Name of the training split."""
    test: str = "test"
    """Name of the split that is scored."""
    test_fraction: float | None = None
    """Ignore the corpus's splits and score this share of all records, chosen by a hash of their uid."""
    labels: float = 1.0
    """Share of every class of the training split that is used (e.g. 0.01: 1 percent of the labels), chosen by a hash
    of the uid; a smaller share is part of a larger one."""
    label_list: Path | None = None
    """File with the training records that are used, one key or file name per row, e.g. SimCLR's 1percent.txt."""


def split(root: Path, options: Splits) -> tuple[ShardIndex, ShardIndex]:
    """(train, test) of a packed data set, all labelled; an unlabelled record is an error that names it."""
    index = ShardIndex.open(root)
    if options.test_fraction is not None:
        if not 0 < options.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {options.test_fraction}")
        test = smallest_hashes(index.column("uid"), options.test_fraction, "test")
        if test.all() or not test.any():
            raise ValueError(f"{root}: {len(index)} records are too few to score a share of {options.test_fraction}")
        parts = index.select(~test), index.select(test)
    else:
        if not np.any(index.column("split") != ""):
            raise ValueError(f"{root}: the records have no splits; give --test-fraction, e.g. 0.25")
        if options.train == options.test:
            raise ValueError(f"training and test split are both {options.train!r}; name two with --train and --test")
        parts = index.split(options.train), index.split(options.test)
    for part in parts:
        require_labels(part)
    return fewer_labels(parts[0], options), parts[1]


def fewer_labels(train: ShardIndex, options: Splits) -> ShardIndex:
    """The part of a training split whose labels are used; every class keeps one record at least."""
    if options.label_list is not None:
        if options.labels != 1.0:
            raise ValueError(f"labels = {options.labels} and label_list = {options.label_list}: give one of them")
        return _listed(train, options.label_list)
    if not 0 < options.labels <= 1:
        raise ValueError(f"labels = {options.labels} is not possible; it must be a share above 0, at most 1")
    if options.labels == 1:
        return train
    label, uid = train.column("label"), train.column("uid")
    mask = np.zeros(len(train), bool)
    for number in np.unique(label):
        rows = np.flatnonzero(label == number)
        share = max(options.labels, 1 / len(rows))
        mask[rows] = smallest_hashes(uid[rows], share, "labels")
    return train.select(mask)


def _listed(train: ShardIndex, path: Path) -> ShardIndex:
    """The records that a list names by key or by file name, with or without its suffix."""
    try:
        rows = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error}); give a list of keys or file names") from error
    wanted = {part for row in rows if (name := row.strip()) for part in (name, name.rpartition(".")[0] or name)}
    mask = np.array([key in wanted or key.rpartition("/")[2] in wanted for key in train.column("key")], bool)
    if not mask.any():
        raise ValueError(f"{path}: none of its rows is a training record of {train.root}; rows are keys or file names")
    return train.select(mask)


def smallest_hashes(uids: np.ndarray, fraction: float, key: str) -> np.ndarray:
    """Mask of round(fraction * N) records: those whose hashed uid is smallest, whatever their order."""
    hashes = fold_array(np.full(len(uids), fold(key), np.uint64), uids.astype(np.uint64))
    mask = np.zeros(len(uids), bool)
    mask[np.argsort(hashes, kind="stable")[: round(fraction * len(uids))]] = True
    return mask


def require_labels(index: ShardIndex) -> None:
    """Raise ValueError for the first record without a class."""
    missing = np.flatnonzero(index.column("label") < 0)
    if len(missing):
        record = index[int(missing[0])]
        raise ValueError(
            f"{index.root}: {len(missing)} of {len(index)} records have no label, the first is {record.key!r}; "
            "pack with labels or choose labelled splits"
        )


def class_names(index: ShardIndex, *more: ShardIndex) -> list[str]:
    """Names by class number, long enough for every label."""
    top = max(int(part.column("label").max()) for part in (index, *more))
    names = list(index.classes)
    return names + [str(number) for number in range(len(names), top + 1)]


def encoder_digest(encoder: torch.nn.Module) -> str:
    """A short hex name of a network: its class, its recipe and every weight."""
    state = hashlib.blake2b(digest_size=8)
    state.update(f"{type(encoder).__qualname__} {getattr(encoder, 'recipe', '')}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
