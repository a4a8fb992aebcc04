"""Fine-tuning: the whole network trained with labels under a new linear classifier, scored with several views.

On a pretrained encoder it measures how well its weights start off a supervised task; with ``--scratch`` (or a
``random:`` encoder) the same training from random weights is the supervised ceiling of that backbone on that corpus.
With ``--frozen`` only the classifier is trained, on augmented pictures: linear classification as the literature does it
(the benchmark ``linear`` takes features that are extracted once). ``--labels 0.01`` trains on 1 % of the labels;
``--protocol`` names published settings. The test split is scored once, after the last epoch. The same command
continues a run that was interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.encoder import Encoder, backbone_options, build_encoder
from clipmill.models.method import weights_and_rest
from clipmill.pipeline import checkpoint
from clipmill.pipeline.checkpoint import TrainState
from clipmill.pipeline.config import TrainConfig, to_json
from clipmill.pipeline.draws import fold
from clipmill.pipeline.loader import Loader
from clipmill.pipeline.optim import build_optimizer, set_lr
from clipmill.pipeline.order import Cursor
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import Cutout, Flip, Gray, Jitter, Op, RandomResizedCrop, VideoSpec
from clipmill.pipeline.views import Clips, Planner, Segments, Sound, View
from clipmill.tools.evaluate.classification import classification
from clipmill.tools.evaluate.evaluator import Progress, Report, silent, write_atomic, write_csv
from clipmill.tools.evaluate.features import Compute, extract, require_usable
from clipmill.tools.evaluate.frozen import digests, settings
from clipmill.tools.evaluate.opening import stored_audio_view, untrained
from clipmill.tools.evaluate.protocols import PROTOCOLS, Protocol, filled
from clipmill.tools.evaluate.published import published
from clipmill.tools.evaluate.splits import Splits, class_names, split
from clipmill.tools.evaluate.views import Views, clip_shape, eval_views, normalize, plain_audio_view, resampling
from clipmill.tools.metrics import Average

TRAINING_FILE = "training.csv"
UNFINISHED = "unfinished"  # folder with the state of the training, until there is a score
_HISTORY = "history.json"
_SAVE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of fine-tuning."""

    protocol: Protocol = "own"
    """Published settings for all options that are left at their default; own: none."""
    epochs: int = 10
    """Passes over the training split."""
    train_batch: int = 32
    """Training clips per step."""
    clips_per_epoch: int = 1
    """Random clips of every record per epoch."""
    optimiser: Literal["sgd", "adam", "adamw", "lars"] = "sgd"
    """Update rule."""
    lr: float = 0.01
    """Peak learning rate of the classifier, before lr_scaling."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """none: lr as it is; linear: lr * train_batch / 256; sqrt: lr * sqrt(train_batch)."""
    encoder_lr_scale: float = 1.0
    """Learning rate of the encoder as a multiple of ``lr``."""
    weight_decay: float = 1e-4
    """Of all weights but biases and the parameters of normalisation layers."""
    momentum: float = 0.9
    """Of sgd and lars."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the step schedule multiplies the rate by gamma."""
    gamma: float = 0.1
    """Factor of the step schedule."""
    clip_grad_norm: float = 0.0
    """Largest L2 norm of the gradient; 0 leaves it alone."""
    dropout: float = 0.0
    """Before the classifier."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    min_area: float = 0.4
    """Least share of the frame that a random crop takes."""
    flip: float = 0.5
    """Probability of mirroring a training clip; use 0 where left and right make a class."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of random brightness, contrast, saturation and hue in training."""
    grey: float = 0.0
    """Probability of a training clip without colours."""
    cutout: int = 0
    """Largest side in pixels of a blank square in training clips."""
    train_size: int | None = None
    """Side of training clips in pixels; default: as in the test."""
    segments: int = 0
    """Train on so many frames, a random one of each equal part of the video (TSN), instead of a clip."""
    shift: int = 0
    """8 makes a ResNet over frames a TSM: in every block 1/8 of the channels look a frame ahead and 1/8 one back."""
    batch_norm: Literal["train", "partial", "frozen"] = "train"
    """Running statistics: those of each batch (train), fixed but for the first layer (partial, as in TSN), or fixed."""
    frozen: Literal["no", "eval", "train"] = "no"
    """Train the classifier alone, the encoder with its running batch statistics (eval), or with those of each batch
    and running ones that drift, as the released code of HCL does (train)."""
    zero_head: bool = False
    """The classifier starts at 0 instead of small random numbers."""
    scratch: bool = False
    """Train the same backbone from random weights."""
    seed: int = 0
    """Of the classifier, the order of records and the augmentation."""
    average: Average = "prob"
    """Of a record's views: average their probabilities or their scores."""
    views: Views = field(default_factory=Views)
    splits: Splits = field(default_factory=Splits)
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        _ = self.training  # says what is out of range
        shares = {"min_area": self.min_area, "flip": self.flip, "dropout": self.dropout, "grey": self.grey}
        for name, value in (shares | {"label_smoothing": self.label_smoothing}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value} is not possible; it must be a share, 0 to 1")
        if self.encoder_lr_scale < 0:
            raise ValueError(f"encoder_lr_scale = {self.encoder_lr_scale} is not possible; it must be at least 0")
        for name in ("segments", "shift", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} is not possible; it must be at least 0")

    @property
    def training(self) -> TrainConfig:
        """The same numbers for `clipmill.pipeline.optim`."""
        names = ("epochs", "optimiser", "lr", "weight_decay", "momentum", "warmup_epochs", "schedule", "milestones")
        more = ("gamma", "clip_grad_norm", "seed", "lr_scaling", "nesterov")
        options: dict[str, Any] = {name: getattr(self, name) for name in (*names, *more)}
        return TrainConfig(batch_size=self.train_batch, repeat=self.clips_per_epoch, **options)

    def resolved(self) -> Config:
        """With the settings of the protocol for all options that are left at their default."""
        return filled(self, Config(), PROTOCOLS[self.protocol])


class Classifier(nn.Module):
    """An encoder under dropout and a linear layer: clips to class scores (B, K).

    The layer starts from N(0, 0.01^2) weights drawn with ``seed`` (or from 0), zero bias. frozen: the encoder's
    features are constants.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        dropout: float = 0.0,
        seed: int = 0,
        *,
        frozen: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, frozen
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.dim, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()
            if zero:
                self.head.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of clips (B, C, T, H, W) or spectrograms."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder(x)
        return self.head(self.dropout(features))


def evaluate(encoder: Encoder, root: Path, out: Path, config: Config, *, progress: Progress = silent) -> Report:
    """Train a copy of the encoder and a classifier, then score the test split. See `Evaluator`."""
    config = config.resolved()
    train, test = split(root, config.splits)
    source = digests(encoder, root, train, test)
    classes = class_names(train, test)
    start = untrained(encoder, config.seed) if config.scratch else copy.deepcopy(encoder)
    start = shifted(start, config.shift) if config.shift else start
    audio_view = stored_audio_view(encoder)
    frozen = config.frozen != "no"
    model = Classifier(start, len(classes), config.dropout, config.seed, frozen=frozen, zero=config.zero_head)
    unfinished = out / UNFINISHED / _key(config, source)
    history = fit(model, train, config, train_planner(start, config, audio_view), progress, unfinished)
    plan = eval_views(start.spec, config.views, audio_view)
    scores = nn.Sequential(model, nn.Softmax(-1)) if config.average == "prob" else model
    answers = extract(scores, test, plan, config.compute, cache=unfinished, what="test views", progress=progress)
    outcome = classification(answers.mean, test, classes, out)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    write_csv(out / TRAINING_FILE, history)
    last = history[-1]
    return Report(
        benchmark="finetune",
        metrics=outcome.metrics | {"train_top1": last["train_top1"], "train_loss": last["loss"]},
        rows=outcome.rows,
        artefacts=[*outcome.artefacts, TRAINING_FILE],
        settings=settings(config, plan, train, test) | {"epoch_scored": "last"},
        digests=source,
        published=published("finetune", classes),
    )


def _key(config: Config, digests: dict[str, str]) -> str:
    """A hex name of all that the outcome depends on."""
    facts = to_json(config)
    compute = facts.pop("compute")
    facts |= {name: compute[name] for name in ("device", "precision", "decoder")}
    return hashlib.blake2b(json.dumps([facts, digests], default=str).encode(), digest_size=8).hexdigest()


def train_planner(encoder: Encoder, config: Config, audio_view: View | None = None) -> Planner:
    """One lightly augmented random clip (or window of sound) per draw, in a view named ``clip``."""
    spec = encoder.spec
    if spec.modality == "audio":
        window = plain_audio_view(spec, audio_view, config.views.duration_s)
        return Sound(views=(View(name="clip", modality="audio", duration_s=window.duration_s, augment=window.augment),))
    ops: tuple[Op, ...] = (Flip(p=config.flip), normalize(spec)) if config.flip else (normalize(spec),)
    if any(config.jitter):
        brightness, contrast, saturation, hue = config.jitter
        ops = (Jitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=1.0), *ops)
    if config.grey:
        ops = (Gray(p=config.grey), *ops)
    if config.cutout:
        ops = (*ops, Cutout(max_side=config.cutout))
    crop = RandomResizedCrop(scale=(config.min_area, 1.0))
    size = config.train_size or config.views.size or spec.size
    augment = VideoSpec(size=size, crop=crop, ops=ops, **resampling(config.views))
    if config.segments:
        return Segments(views=(View(name="clip", num_frames=config.segments, augment=augment),))
    view = View(name="clip", **clip_shape(spec, config.views), augment=augment)
    return Clips(views=(view,), short=config.views.short)


def shifted(encoder: Encoder, share: int) -> Encoder:
    """The same weights in a network that looks ahead and back (TSM); ValueError if the backbone cannot."""
    recipe = encoder.recipe
    if recipe is None or "shift" not in backbone_options(recipe["name"]):
        raise ValueError(
            f"shift = {share} needs a ResNet over frames, such as resnet50; this is {type(encoder).__name__}"
        )
    fresh = build_encoder(recipe["name"], **{**recipe["options"], "shift": share})
    fresh.load_state_dict(encoder.state_dict())
    fresh.spec = encoder.spec
    return fresh


def fix_statistics(encoder: nn.Module, mode: Literal["train", "partial", "frozen"]) -> None:
    """Put normalisation layers into eval mode: all of them (frozen), or all but the first (partial)."""
    norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms[{"train": len(norms), "partial": 1, "frozen": 0}[mode] :]:
        norm.eval()


def fit(
    model: Classifier,
    train: ShardIndex,
    config: Config,
    planner: Planner,
    progress: Progress = silent,
    unfinished: Path | None = None,
) -> list[dict[str, Any]]:
    """Train in place; returns one row per epoch: loss, accuracy on the training clips, last learning rate, and the
    number of damaged records so far, in whose place the loader put others.

    unfinished: folder that keeps the state, after an epoch, at most every half minute; a training that it holds is
    continued.
    The last incomplete batch of an epoch is left out where there are others: normalisation layers cannot do with one
    clip.
    """
    require_usable(train, planner)
    device = config.compute.torch_device
    model.to(device).train()
    fix_statistics(model.encoder, config.batch_norm)
    if config.frozen == "eval":
        model.encoder.eval()
    options = config.training
    groups = [replace(group, adapt=False) for group in weights_and_rest(model.head)]  # LARS leaves the classifier alone
    if not model.frozen:
        scale = config.encoder_lr_scale
        groups += [replace(group, lr_scale=scale) for group in weights_and_rest(model.encoder)]
    optimizer = build_optimizer(groups, options)
    scaler = torch.amp.GradScaler(device.type, enabled=config.compute.precision == "fp16")
    clips = len(train) * config.clips_per_epoch
    loader = Loader(
        train,
        planner,
        batch_size=config.train_batch,
        seed=config.seed,
        repeat=config.clips_per_epoch,
        drop_last=clips >= config.train_batch,
        device=device,
        config=config.compute.loader,
    )
    history: list[dict[str, Any]] = []
    total = config.epochs * len(loader)
    if unfinished is not None and (found := checkpoint.complete(unfinished)):
        state = checkpoint.restore(found[-1], model, optimizer)
        scaler.load_state_dict(state.scaler)
        history = json.loads((unfinished / _HISTORY).read_text("utf-8"))[: state.cursor.epoch]
    step, saved_s = len(history) * len(loader), time.monotonic()
    with loader, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for epoch in range(len(history), config.epochs):
            torch.manual_seed(fold(config.seed, epoch, "dropout") >> 1)
            loss_sum, right, seen, lr = 0.0, 0, 0, 0.0
            for batch in loader.epoch(epoch):
                lr = set_lr(optimizer, options, step, len(loader))
                x = next(iter({**batch.video, **batch.audio}.values()))
                with config.compute.autocast():
                    scores = model(x)
                    loss = F.cross_entropy(scores.float(), batch.label, label_smoothing=config.label_smoothing)
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(f"the loss is {value} in epoch {epoch}; use a lower --lr than {config.lr}")
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                if config.clip_grad_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                loss_sum += value * len(batch)
                right += int((scores.argmax(1) == batch.label).sum())
                seen += len(batch)
                step += 1
                progress("fine-tuning", step, total, "steps")
            row = {"epoch": epoch, "loss": loss_sum / seen, "train_top1": right / seen, "lr": lr}
            history.append(row | {"damaged": len(loader.damaged)})
            if unfinished is not None and time.monotonic() - saved_s >= _SAVE_S:
                write_atomic(unfinished / _HISTORY, json.dumps(history).encode())
                state = TrainState(step=step, cursor=Cursor(epoch=epoch + 1), scaler=scaler.state_dict())
                checkpoint.save(unfinished, state, model, optimizer, keep=1)
                saved_s = time.monotonic()
    return history
