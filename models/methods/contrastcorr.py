"""ContrastCorr: colours copied between two frames, from the frame's own video and from all videos of the batch.

N. Wang, W. Zhou, H. Li, "Contrastive Transformation for Self-supervised Correspondence Learning", AAAI 2021, arXiv
2012.05057. This follows the released code (594422814/ContrastCorr, on top of Liusifei/UVC), which has a term for
self-reconstruction and drops channels, and whose contrast is a consistency of reconstructions, not InfoNCE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clipmill.models.colour import lab8_from_rgb
from clipmill.models.colour_codec import ColourCodec, learn_colours, unit_lab
from clipmill.models.correspondence import (
    across_videos,
    affinity,
    box_around,
    concentration,
    copied,
    cut,
    expected_places,
    kept_mean,
    lab_distance,
    without_itself,
)
from clipmill.models.encoder import Encoder, EncoderConfig, InputSpec, build_encoder
from clipmill.models.frame_pair import PairDraws, joint_pair, warm_pair
from clipmill.models.method import EpochContext, Method, Output, Recipe, require, require_positive
from clipmill.models.start import below, fill, trained
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.frame_views import FramePairs
from clipmill.pipeline.spec import IMAGENET_MEAN, IMAGENET_STD, RandomResizedCrop, VideoSpec, WholeFrame
from clipmill.pipeline.views import Uniform, View

STRIDES = (1, 2, 1, 1)  # res5 at stride 8
_CHANNELS = 3
_FREE_EPOCHS = {"warm": 1, "joint": 2}  # at the beginning of a stage, without a limit on colour distances


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of ContrastCorr."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Backbone over single frames; its res5 at stride 8 is trained."""
    warm_epochs: int = 100
    """Epochs of the first stage, two crops of one size; then the crop is searched in the whole target frame."""
    start: Path | None = None
    """Run folder to begin from, with its encoder and its colour auto-encoder."""
    gap: int = 50
    """Most frames between reference and target."""
    size: int = 256
    """Crop side in pixels; a multiple of 8."""
    frame: int = 640
    """Side of the square that whole frames are mirrored to; a multiple of 8."""
    multiple: int = 64
    """Frames are resized to the multiple of this number below their size."""
    temperature: float = 1.0
    """Multiplies the affinities of different frames."""
    limit: float = 2.5
    """Samples with a greater colour distance do not count, but in the first epochs."""
    window: int = 8
    """Side, in cells, of the windows whose cells should go to one place."""
    concentration_from: int = 10
    """Epoch of the first stage from which on they should."""
    concentration_weight: float = 0.3
    """Its weight."""
    reverse_weight: float = 0.1
    """Weight of the colour distance from target to reference."""
    drop_channels: float = 0.7
    """Probability that one or two of the three input channels are dropped."""
    codec_width: float = 1.0
    """Width of the colour auto-encoder."""
    codec_steps: int = 4000
    """Steps of its training on patches of the corpus, before the first epoch."""
    codec_patch: int = 64
    """Side of these patches in pixels; a multiple of 8."""
    codec_lr: float = 1e-3
    """Learning rate of its training."""

    def __post_init__(self) -> None:
        require_positive(self, "gap", "multiple", "temperature", "limit", "window", "codec_steps", "codec_lr")
        for name in ("size", "frame", "codec_patch"):
            side = getattr(self, name)
            require(self, name, side >= 16 and side % 8 == 0, "a multiple of 8, 16 or more")
        require(self, "frame", self.frame >= self.size, f"at least size = {self.size}")
        require(self, "drop_channels", 0 <= self.drop_channels <= 1, "0 to 1")
        for name in ("warm_epochs", "concentration_from", "concentration_weight", "reverse_weight"):
            require(self, name, getattr(self, name) >= 0, "at least 0")


class ContrastCorr(Method):
    """Dot products of res5 maps copy the colour features of a frozen auto-encoder from reference to target and back.

    The auto-encoder is trained on patches of the corpus before the first epoch (how the released one was made is not
    known), or comes with ``start``. Which stage it is follows from the epoch; the inter-video affinity and the dropped
    channels are those of a process, as are the batch statistics.
    """

    Config = Config
    epoch: Tensor

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.trunk = encoder or build_encoder(config.encoder.name, width=config.encoder.width, strides=STRIDES)
        self.trunk.spec = InputSpec(size=config.size, mean=IMAGENET_MEAN, std=IMAGENET_STD)  # of Lab channels
        self.codec = ColourCodec(config.codec_width).requires_grad_(False)
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        if config.start is not None:
            tensors = trained(config.start)
            fill(self.trunk, below(tensors, "trunk."), config.start)
            fill(self.codec, below(tensors, "codec."), config.start)

    @property
    def encoder(self) -> Encoder:
        """The trunk; it sees Lab."""
        return self.trunk

    def plan(self) -> FramePairs:
        """Two whole frames, squashed to squares, with the draws of the augmentation, which runs on Lab pictures."""
        spec = VideoSpec(size=self.config.frame, crop=WholeFrame(), ops=())
        reference, target = (View(name=name, modality="image", augment=spec) for name in ("reference", "target"))
        return FramePairs(views=(reference, target), gap=self.config.gap, extras=len(PairDraws._fields))

    @torch.no_grad()
    def before_epoch(self, context: EpochContext) -> None:
        """Count; before the first epoch train the colour auto-encoder, in every process to the same weights."""
        self.epoch.fill_(context.epoch)
        config = self.config
        if context.epoch or config.start is not None:
            return
        spec = VideoSpec(size=config.codec_patch, crop=RandomResizedCrop(scale=(0.05, 1.0)), ops=())
        planner = Uniform(views=(View(name="patch", modality="image", augment=spec),))
        found = context.collect(planner, lambda batch: {"lab8": lab8_from_rgb(batch.video["patch"][:, :, 0]).byte()})
        options = {"steps": config.codec_steps, "batch_size": 16, "lr": config.codec_lr}
        context.log["colour_codec"] = learn_colours(self.codec, found["lab8"], **options)
        for param in self.codec.parameters():
            dist.sum_(param.data).div_(dist.world())

    def forward(self, batch: ClipBatch) -> Output:
        """The sum of all terms of the present stage; metrics are the terms."""
        config = self.config
        joint = self.joint
        with torch.no_grad():
            draws = PairDraws._make(batch.aux[f"draw{number}"] for number in range(len(PairDraws._fields)))
            sizes = torch.stack([batch.aux["height"], batch.aux["width"]], 1).long().tolist()
            reference, target = (batch.video[name][:, :, 0] for name in ("reference", "target"))
            cut_out = joint_pair if joint else warm_pair
            pair = cut_out(reference, target, sizes, draws, config.size, config.frame, config.multiple)
            lab_r, lab_t = (unit_lab(lab8).to(reference) for lab8 in pair)
        channels = dropped_channels(Draws(self.step_key, dist.rank(), "channels"), config.drop_channels)
        f_r, f_t = (
            self.trunk.maps(network_input(lab, channels)[:, :, None], "res5")[:, :, 0] for lab in (lab_r, lab_t)
        )
        found = terms(
            self.codec,
            Pair(f_r, f_t),
            Pair(lab_r, lab_t),
            joint=joint,
            tau=config.temperature,
            limit=config.limit if self.stage_epoch >= _FREE_EPOCHS["joint" if joint else "warm"] else None,
            window=config.window if joint or self.stage_epoch >= config.concentration_from else None,
            concentration_weight=config.concentration_weight,
            reverse_weight=config.reverse_weight,
        )
        return Output(torch.stack(list(found.values())).sum(), {name: term.detach() for name, term in found.items()})

    @property
    def joint(self) -> bool:
        """This is the second stage."""
        return int(self.epoch) >= self.config.warm_epochs

    @property
    def stage_epoch(self) -> int:
        """Epochs since the beginning of the stage."""
        return int(self.epoch) - (self.config.warm_epochs if self.joint else 0)


# --- what the networks see ----------------------------------------------------------------------------------


def dropped_channels(rng: Draws, probability: float) -> list[int]:
    """With the given probability one or two of three channels, any with the same chance."""
    return sorted(rng.distinct(_CHANNELS, 1 + rng.integer(2))) if rng.coin(probability) else []


def network_input(lab: Tensor, dropped: list[int]) -> Tensor:
    """The encoder's input from Lab in [-1, 1]: ImageNet's RGB statistics taken on L, a and b; (N, 3, H, W).

    Dropped channels are 0, the others 3 / (3 - dropped) times as large.
    """
    mean, std = (lab.new_tensor(numbers)[:, None, None] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    kept = lab.new_ones(_CHANNELS)
    kept[dropped] = 0.0
    scale = kept * (_CHANNELS / (_CHANNELS - len(dropped)))
    return ((lab + 1) / 2 - mean) / std * scale[:, None, None]


# --- loss ---------------------------------------------------------------------------------------------------


class Codec(Protocol):
    """Pictures to colour features at the encoder's stride, and back."""

    def encode(self, lab: Tensor) -> Tensor:
        """Features of pictures."""
        ...

    def decode(self, features: Tensor) -> Tensor:
        """Pictures from features."""
        ...


class Pair(NamedTuple):
    """Something of the reference frame and of the target frame."""

    reference: Tensor
    target: Tensor


def terms(
    codec: Codec,
    features: Pair,
    lab: Pair,
    *,
    joint: bool,
    tau: float = 1.0,
    limit: float | None = None,
    window: int | None = None,
    concentration_weight: float = 0.3,
    reverse_weight: float = 0.1,
) -> dict[str, Tensor]:
    """The weighted terms of the loss by name.

    features: (B, C, h, w) and (B, C, H, W). lab: pictures in [-1, 1] at the codec's stride times that. limit: on each
    sample's colour distance. window: of the concentration; None leaves it out. joint: the second stage; the reference
    is searched in the larger target first, all that follows is about the box found, and gradients flow through it.
    """
    (f_r, f_t), (lab_r, lab_t) = features, lab
    size = (f_r.shape[2], f_r.shape[3])
    e_r, e_t = codec.encode(lab_r), codec.encode(lab_t)
    if joint:
        frame = (f_t.shape[2], f_t.shape[3])
        box = box_around(expected_places(f_r, f_t, tau), size, frame)
        picture = (lab_r.shape[2], lab_r.shape[3])
        f_t, e_t, lab_t = (cut(x, box, frame, to) for x, to in ((f_t, size), (e_t, size), (lab_t, picture)))
    raw = affinity(f_r, f_t)
    weights = (tau * raw).softmax(1)
    found_t = codec.decode(copied(e_r, weights, size))
    found_r = codec.decode(copied(e_t, weights.transpose(1, 2), size))  # its columns do not sum to 1
    itself = codec.decode(copied(e_r, without_itself(f_r), size))
    colour = lab_distance(found_t, lab_t) + reverse_weight * lab_distance(found_r, lab_r)
    losses = {"colour": kept_mean(colour, limit), "itself": kept_mean(lab_distance(itself, lab_r), limit)}
    if window is not None:
        losses["concentration"] = concentration_weight * concentration(raw, size, window, tau)
    if joint:
        e_all, mass = across_videos(f_t, f_r, e_r, tau)
        losses["consistency"] = kept_mean(lab_distance(codec.decode(e_all), found_t), limit)
        losses["sparsity"] = (1 - mass).abs().mean()
    return losses


# --- recipes ------------------------------------------------------------------------------------------------


def _trackingnet() -> Mapping[str, object]:
    return {
        "epochs": 100,
        "batch_size": 16,
        "optimiser": "adam",
        "lr": 1e-4,
        "weight_decay": 0.0,
        "schedule": "step",
        "schedule_per": "epoch",
        "milestones": (40, 80),
        "gamma": 0.5,
    }


def trackingnet_warm() -> Recipe:
    """TrackingNet, ResNet-18, the first stage: 100 epochs on pairs of crops. Released with 2 processes of 8 videos."""
    return Recipe(
        about="TrackingNet, ResNet-18, stage A (intra-video), 100 epochs, batch 16 on 2 devices",
        method=Config(),
        train=_trackingnet(),
    )


def trackingnet() -> Recipe:
    """TrackingNet, ResNet-18, the second stage; give the first one's run folder as ``--start``.

    DAVIS-2017 val J 60.5, F 65.5, J&F 63.0 (widely quoted; not checked against the paper). The learning rate begins
    anew. Use as many processes as the first stage did: the batch of a process is part of the method.
    """
    return Recipe(
        about="TrackingNet, ResNet-18, stage B (localise, inter-video), 100 epochs, batch 16 on 2 devices",
        method=Config(warm_epochs=0),
        train=_trackingnet(),
    )


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on crops of 64 of 96 pixels of a small corpus: both stages in about a minute."""
    return Recipe(
        about="a small corpus on a CPU: ResNet-18 x 0.25, crops of 64 of 96 pixels, both stages",
        method=Config(
            encoder=EncoderConfig(width=0.25),
            warm_epochs=6,
            gap=15,
            size=64,
            frame=96,
            multiple=16,
            concentration_from=3,
            codec_width=0.125,
            codec_steps=200,
            codec_patch=32,
        ),
        train={"epochs": 10, "batch_size": 8, "optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0},
    )
