"""Semantic segmentation: a fully convolutional head over a frozen or fine-tuned encoder; mean intersection over union.

Reads VOC, Cityscapes and CamVid folders as they lie on disk. The training pictures are scaled, cropped, mirrored and
recoloured at random; test pictures pass at once or in windows, and every pixel of the original size counts.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.datasets.semantic import LEFT_OUT, Scenes, scenes
from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.models.encoder import Encoder
from clipmill.models.method import weights_and_rest
from clipmill.pipeline.config import TrainConfig, to_json
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.optim import build_optimizer, set_lr
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_atomic, write_csv
from clipmill.tools.evaluate.features import Compute, Precision
from clipmill.tools.evaluate.opening import encoder_digest
from clipmill.tools.evaluate.overlay import laid_over, thumbnail, write_sheet
from clipmill.tools.evaluate.propagation import read_picture
from clipmill.tools.evaluate.protocols import filled
from clipmill.tools.evaluate.vip import confusion, part_scores
from clipmill.tools.pictures import evenly, strip
from clipmill.tools.segmenter import (
    Augment,
    Segmenter,
    drawn,
    normalised,
    resize,
    resized,
    sample_numbers,
    scaled,
    sliding,
    whole,
)

CLASSES_FILE, TRAINING_FILE, SHEET, MASKS = "classes.csv", "training.csv", "contact_sheet.png", "masks"
_IN_SHEET, _LOG_EVERY = 24, 50

PROTOCOLS: dict[str, dict[str, Any]] = {
    "own": {},
    "voc": {  # of DenseCL: FCN-D8, 20k iterations on train_aug, 16 pictures a step
        "train_split": "train+aug",
        "iterations": 20000,
        "train_batch": 16,
        "crop": 512,
        "short": 512,
        "test_short": 512,
        "auxiliary": 0.4,
    },
    "cityscapes": {
        "iterations": 40000,
        "train_batch": 8,
        "crop": 769,
        "align_corners": True,
        "window": 769,
        "window_stride": 513,
        "auxiliary": 0.4,
    },
}
_SOURCE = "github.com/WXinlong/DenseCL"
PUBLISHED = {
    "voc": [
        {"method": "MoCo v2, resnet50, COCO for 800 epochs", "mIoU": 0.645, "source": _SOURCE},
        {"method": "DenseCL, resnet50, COCO for 800 epochs", "mIoU": 0.675, "source": _SOURCE},
        {"method": "MoCo v2, resnet50, ImageNet", "mIoU": 0.675, "source": _SOURCE},
        {"method": "DenseCL, resnet50, ImageNet", "mIoU": 0.694, "source": _SOURCE},
    ]
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of semantic segmentation."""

    protocol: Literal["own", "voc", "cityscapes"] = "own"
    """Published settings for all options that are left at their default; own: none."""
    train_split: str = "train"
    """Name of the training list or folder; several VOC lists are joined by +."""
    test_split: str = "val"
    """Name of the list or folder that is scored."""
    frozen: bool = False
    """Train the head alone, over the encoder's maps in inference mode."""
    iterations: int = 2000
    """Training steps."""
    train_batch: int = 8
    """Pictures per step."""
    crop: int = 224
    """Side of the training crops in pixels."""
    short: int | None = None
    """Short side of training pictures before they are scaled at random; default: as they are."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale."""
    flip: float = 0.5
    """Probability of mirroring."""
    photometric: bool = True
    """Distort brightness, contrast, saturation and hue."""
    lr: float = 0.01
    """Learning rate; it falls as (1 - step / iterations) ** 0.9 to 1 % of it."""
    encoder_lr_scale: float = 1.0
    """Learning rate of the encoder as a multiple of ``lr``."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of all weights but biases and the parameters of normalisation layers."""
    channels: int = 512
    """Width of the head."""
    convs: int = 2
    """3x3 convolutions of the head before it sees its input again."""
    concat: bool = True
    """One more convolution over the head's input and what it made of it."""
    dropout: float = 0.1
    """Share of channels dropped before the classifier."""
    auxiliary: float = 0.0
    """Weight of a second head's loss over res4 (ResNets over frames); 0: none."""
    strides: tuple[int, int, int, int] = (1, 2, 1, 1)
    """Of res2 to res5 of ResNets over frames; other encoders keep their own."""
    dilations: tuple[int, int, int, int] = (1, 1, 2, 4)
    """Of res2 to res5 of ResNets over frames."""
    align_corners: bool = False
    """Interpolate scores with the corners of the grids laid on each other."""
    test_short: int | None = None
    """Short side of test pictures; default: as they are. Scores are brought back to the original size."""
    window: int = 0
    """Side in pixels of the windows a test picture is cut into; 0: it passes at once."""
    window_stride: int = 0
    """Pixels from one window to the next; 0: two thirds of a window."""
    seed: int = 0
    """Of the head, the order of pictures and what is drawn for them."""
    threads: int = 2
    """Threads that read pictures."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."""
    precision: Precision = "fp32"
    """Precision of the network; fp16 and bf16 run under autocast."""

    def __post_init__(self) -> None:
        _ = self.training, self.machine  # say what is out of range
        for name in ("iterations", "crop", "channels", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not possible; it must be at least 1")
        for name in ("window", "window_stride", "convs", "auxiliary", "encoder_lr_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} is not possible; it must be at least 0")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale = {self.scale} is not possible; it must be a range of factors above 0")

    @property
    def training(self) -> TrainConfig:
        """The same numbers for `clipmill.pipeline.optim`; an epoch is the whole training."""
        return TrainConfig(
            epochs=1,
            batch_size=self.train_batch,
            optimiser="sgd",
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="poly",
            power=0.9,
            lr_end=0.01,
            seed=self.seed,
        )

    @property
    def machine(self) -> Compute:
        """Device and precision."""
        return Compute(device=self.device, precision=self.precision)

    @property
    def augment(self) -> Augment:
        """How training pictures are drawn."""
        return Augment(crop=self.crop, short=self.short, scale=self.scale, flip=self.flip, photometric=self.photometric)


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Train a head (and a copy of the encoder) on one split and score another. See `Evaluator`."""
    config = filled(config, Config(), PROTOCOLS[config.protocol])
    train, test = scenes(root, config.train_split), scenes(root, config.test_split)
    model = model_of(encoder, len(train.classes), config)
    history = fit(model, train, config, progress)
    matrix = score(model, test, out, config, progress)
    rows = class_rows(matrix, test.classes)
    write_csv(out / CLASSES_FILE, rows)
    write_csv(out / TRAINING_FILE, history)
    return Report(
        benchmark="semantic_segmentation",
        metrics=part_scores(matrix) | {"train_loss": history[-1]["loss"]},
        rows=rows,
        artefacts=[CLASSES_FILE, TRAINING_FILE, SHEET],
        settings={
            "config": {name: value for name, value in to_json(config).items() if name not in ("threads", "device")},
            "layout": test.layout,
            "classes": len(test.classes),
            "train_pictures": len(train),
            "test_pictures": len(test),
        },
        digests={"encoder": encoder_digest(encoder), "train": _digest(train), "test": _digest(test)},
        published=PUBLISHED.get(config.protocol, []),
    )


def model_of(encoder: Encoder, classes: int, config: Config) -> Segmenter:
    """A copy of the encoder under new heads, drawn with the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Segmenter(
            copy.deepcopy(encoder),
            classes,
            channels=config.channels,
            convs=config.convs,
            concat=config.concat,
            dropout=config.dropout,
            auxiliary=config.auxiliary > 0,
            frozen=config.frozen,
            strides=config.strides,
            dilations=config.dilations,
        )


def fit(model: Segmenter, train: Scenes, config: Config, progress: Progress = silent) -> list[dict[str, Any]]:
    """Train in place; returns a row per 50 steps: step, mean loss since the last row, learning rate."""
    device, options = config.machine.torch_device, config.training
    model.to(device).train()
    heads = [head for head in (model.head, model.auxiliary) if head is not None]
    groups = [group for head in heads for group in weights_and_rest(head)]
    if config.frozen:
        model.encoder.eval()
    else:
        own = weights_and_rest(model.encoder)
        groups += [replace(group, lr_scale=config.encoder_lr_scale) for group in own]
    optimizer = build_optimizer(groups, options)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    history, losses = [], []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # of dropout
        for step, (x, y) in enumerate(_batches(train, model, config)):
            lr = set_lr(optimizer, options, step, config.iterations)
            x, y = x.to(device), y.to(device)
            with config.machine.autocast():
                scores, extra = model(x)
                loss = _loss(scores, y, config)
                if extra is not None:
                    loss = loss + config.auxiliary * _loss(extra, y, config)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss is {losses[-1]} in step {step}; use a lower --lr than {config.lr}")
            if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.iterations:
                history.append({"step": step + 1, "loss": float(np.mean(losses)), "lr": lr})
                losses.clear()
            progress("training", step + 1, config.iterations, "steps")
    return history


def _loss(scores: Tensor, y: Tensor, config: Config) -> Tensor:
    """Cross-entropy at the size of the labels, over the pixels that count."""
    scores = resized(scores, (y.shape[1], y.shape[2]), config.align_corners)
    sums = F.cross_entropy(scores, y, ignore_index=LEFT_OUT, reduction="sum")
    return sums / (y != LEFT_OUT).sum().clamp_min(1)


def _batches(train: Scenes, model: Segmenter, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the whole training; samples depend on seed and number alone, whatever the threads."""
    spec = model.encoder.spec

    def load(sample: int, number: int) -> tuple[Tensor, Tensor]:
        scene = train.items[number]
        picture, ids = read_picture(scene.picture), train.ids(scene)
        _require_size(scene.name, picture, ids)
        return drawn(picture, ids, config.augment, Draws(config.seed, sample, "segmentation"))

    total, ahead = config.iterations * config.train_batch, 2 * config.train_batch
    todo = islice(sample_numbers(len(train), config.seed), total)
    with ThreadPoolExecutor(config.threads, "pictures") as pool:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque(pool.submit(load, *job) for job in islice(todo, ahead))
        for _ in range(config.iterations):
            pairs = []
            for _ in range(config.train_batch):
                pairs.append(waiting.popleft().result())
                waiting.extend(pool.submit(load, *job) for job in islice(todo, 1))
            x, y = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            yield normalised(x, spec.mean, spec.std), y


def score(model: Segmenter, test: Scenes, out: Path, config: Config, progress: Progress = silent) -> np.ndarray:
    """Confusion matrix (K, K) of all pixels; writes ``masks/NAME.png`` of all pictures and a sheet of some."""
    matrix = np.zeros((len(test.classes), len(test.classes)), np.int64)
    shown, sheet = set(evenly(len(test), _IN_SHEET)), []
    model.to(config.machine.torch_device).eval()
    for number, scene in enumerate(test.items):
        picture, truth = read_picture(scene.picture), test.ids(scene)
        _require_size(scene.name, picture, truth)
        found = predict(model, picture, config)
        matrix += confusion(truth, found, len(test.classes))
        write_atomic(out / MASKS / f"{scene.name}.png", label_map_bytes(found))
        if number in shown:
            pair = [thumbnail(picture), thumbnail(laid_over(picture, found)), thumbnail(laid_over(picture, truth))]
            sheet.append((f"{scene.name}: picture, found, truth", strip(pair)))
        progress("test pictures", number + 1, len(test), "pictures")
    write_sheet(out / SHEET, sheet)
    return matrix


@torch.no_grad()
def predict(model: Segmenter, picture_HW3: np.ndarray, config: Config) -> np.ndarray:
    """Class ids (H, W) uint8 of a picture; the model should be in eval mode."""
    size = (picture_HW3.shape[0], picture_HW3.shape[1])
    spec = model.encoder.spec
    small = resize(picture_HW3, scaled(size, config.test_short))
    x = torch.from_numpy(small).to(config.machine.torch_device).permute(2, 0, 1)[None].float() / 255
    x = normalised(x, spec.mean, spec.std)
    with config.machine.autocast():
        if config.window:
            stride = config.window_stride or max(1, config.window * 2 // 3)
            scores = sliding(model, x, config.window, stride, config.align_corners)
        else:
            scores = whole(model, x, config.align_corners)
        if not torch.isfinite(scores).all():
            raise ValueError("the scores of a test picture are not finite; the training has diverged, use a lower --lr")
        return resized(scores, size, config.align_corners).argmax(1)[0].to(torch.uint8).cpu().numpy()


def class_rows(matrix: np.ndarray, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Pixels, IoU and accuracy of every class that is true or found; None where there is nothing to divide by."""
    right, true = np.diag(matrix), matrix.sum(1)
    union = true + matrix.sum(0) - right
    return [
        {
            "class": classes[number],
            "pixels": int(true[number]),
            "IoU": float(right[number] / union[number]),
            "accuracy": float(right[number] / true[number]) if true[number] else None,
        }
        for number in np.flatnonzero(union)
    ]


def _require_size(name: str, picture: np.ndarray, ids: np.ndarray) -> None:
    if picture.shape[:2] != ids.shape:
        raise ValueError(
            f"{name}: the picture has {picture.shape[1]}x{picture.shape[0]} pixels, its mask "
            f"{ids.shape[1]}x{ids.shape[0]}; unpack the corpus again"
        )


def _digest(part: Scenes) -> str:
    names = "\n".join(scene.name for scene in part.items)
    return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
