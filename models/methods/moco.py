"""MoCo v1 and v2 on clips or pictures: a query must find its key among a queue of older keys.

K. He, H. Fan, Y. Wu, S. Xie, R. Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR
2020, arXiv 1911.05722 (v1); X. Chen, H. Fan, R. Girshick, K. He, "Improved Baselines with Momentum Contrastive
Learning", arXiv 2003.04297 (v2). Clip-level use: T. Pan et al., "VideoMoCo", CVPR 2021, arXiv 2103.05905. The queue's
hard negatives can be favoured (``negatives`` = hard) or mixed (mochi), see `clipmill.models.negatives`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.ema import Follower, teacher_of
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.heads import mlp
from clipmill.models.losses import accuracy, info_nce, unit
from clipmill.models.method import EpochContext, Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.negatives import draw_mixes, hard_nce, hardest, synthesise, with_synthetic
from clipmill.models.queue import KeyQueue
from clipmill.models.shuffling import grouped, shuffled
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import RandomResizedCrop, moco_v1, moco_v2
from clipmill.pipeline.views import Clips, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of MoCo."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="r2plus1d_18"))
    """Backbone."""
    num_frames: int = 16
    """Frames per clip; 1 = pictures."""
    stride: int = 1
    """Source frames between two frames of a clip."""
    size: int = 112
    """Crop side in pixels."""
    augment: Literal["v1", "v2"] = "v2"
    """Augmentation of MoCo v1 or v2."""
    min_area: float = 0.2
    """Smallest random crop, as a share of the frame's area."""
    per_frame: bool = False
    """Every frame of a clip draws its own augmentation; otherwise they share one."""
    same_clip: bool = True
    """Query and key show the same frames; otherwise two random clips of the video."""
    mlp: bool = True
    """Two-layer head (v2) instead of a linear one (v1)."""
    out_dim: int = 128
    """Width of the embedding."""
    queue_size: int = 65536
    """Keys kept as negatives; a multiple of the batch size."""
    key_momentum: float = 0.999
    """Share of itself that the key network keeps at every step."""
    temperature: float = 0.2
    """Temperature of the softmax."""
    shuffle: bool = True
    """Exchange the rows of all processes before the key network, so that batch statistics give nothing away."""
    groups: int = 1
    """Groups of a process's batch with batch statistics of their own, as if each were a process."""
    negatives: Literal["none", "hard", "mochi"] = "none"
    """none: the queue as it is; hard: weighted and debiased (HCL); mochi: with mixes of the hardest keys (MoCHi)."""
    beta: float = 1.0
    """hard: concentration on keys near the query, on similarities over the temperature; 0 weighs all alike."""
    tau_plus: float = 0.0
    """hard: share of the queue taken to be of the query's own class."""
    hardest: int = 1024
    """mochi: keys nearest to a query (N) that are mixed."""
    mixes: int = 1024
    """mochi: mixes of two of them per query (s)."""
    query_mixes: int = 128
    """mochi: mixes of the query with one of them per query (s')."""
    plain_epochs: int = 0
    """mochi: first epochs without mixes."""

    def __post_init__(self) -> None:
        require_positive(self, "num_frames", "stride", "size", "out_dim", "queue_size", "temperature", "groups")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "key_momentum", 0 <= self.key_momentum <= 1, "0 to 1")
        require_positive(self, "hardest")
        for name in ("beta", "mixes", "query_mixes", "plain_epochs"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "tau_plus", 0 <= self.tau_plus < 1, "at least 0 and below 1")


class MoCo(Method):
    """InfoNCE of a query network against keys of its moving average.

    A key shares its batch statistics with its own query but with no other key of the queue, which would tell it apart
    without looking at the content. With several processes the exchange of rows prevents that; one process needs
    ``groups``.
    """

    Config = Config
    mixing: Tensor  # bool: this epoch has synthetic negatives

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        trunk = encoder or build_encoder(config.encoder.name, width=config.encoder.width)
        trunk.spec = input_spec(self.plan().views[0])
        hidden = [trunk.dim] if config.mlp else []
        self.query = nn.Sequential(trunk, mlp([trunk.dim, *hidden, config.out_dim]))
        self.key = teacher_of(self.query)
        self.queue = KeyQueue(config.out_dim, config.queue_size, whole_writes=True)
        self.register_buffer("mixing", torch.tensor(config.negatives == "mochi" and config.plain_epochs == 0))
        self._mixing: bool | None = None  # the same here, so that no step waits for a device
        self._follower = Follower()

    @property
    def encoder(self) -> Encoder:
        """The query network without its head."""
        trunk = self.query[0]
        assert isinstance(trunk, Encoder)
        return trunk

    def plan(self) -> Clips:
        """Two augmentations of one clip, or of two."""
        config = self.config
        augment = (moco_v1 if config.augment == "v1" else moco_v2)(config.size, config.per_frame)
        view = View(
            name="query",
            modality="image" if config.num_frames == 1 else "video",
            num_frames=config.num_frames,
            stride=config.stride,
            augment=replace(augment, crop=RandomResizedCrop(scale=(config.min_area, 1.0))),
        )
        return Clips(views=(view, replace(view, name="key")), shared=config.same_clip)

    def forward(self, batch: ClipBatch) -> Output:
        """Loss, and the share of queries whose own key is nearer than all negatives (and than all of the queue)."""
        query, key = batch.video["query"], batch.video["key"]
        order = dist.permutation(len(query) * dist.world(), self.step_key, "shuffle")
        loss, logits = self.contrast(query, key, order if self.config.shuffle else None)
        metrics = {"accuracy": accuracy(logits, 0)}
        if self.config.negatives == "mochi":
            metrics["queue_accuracy"] = accuracy(logits[:, : 1 + self.queue.size], 0)
        return Output(loss, metrics)

    def contrast(self, x_q: Tensor, x_k: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step: loss and logits (N, 1 + K) of N local queries; pushes the keys of all processes.

        order: permutation of the rows of all processes for the key pass (shuffling-BN); None keeps them in place.
        Synthetic negatives, if any, are further columns of the logits.
        """
        q = self._embed(self.query, x_q)
        with torch.no_grad():
            self._follower.follow(self.key, self.query, self.config.key_momentum)
            k = self._keys(x_k, order)
            negatives = self.queue.keys.clone()  # the backward pass needs them after the push
            everyones = dist.gather(k)
        loss, logits = info_nce(q, k, negatives, self.config.temperature)
        if self.config.negatives == "hard":
            loss = self._hard(logits)
        elif self._has_mixes():
            loss, logits = self._mixed(q, negatives, logits)
        self.queue.push(everyones)
        return loss, logits

    def _hard(self, logits: Tensor) -> Tensor:
        config = self.config
        losses, _ = hard_nce(
            logits[:, 0], logits[:, 1:], config.temperature, beta=config.beta, tau_plus=config.tau_plus
        )
        return losses.mean()

    def _mixed(self, q: Tensor, negatives_DK: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits (N, 1 + K + s + s') with each query's own synthetic negatives (MoCHi)."""
        config = self.config
        hard = hardest(logits[:, 1:], config.hardest)
        mixes = draw_mixes(len(q), hard.shape[1], config.mixes, config.query_mixes, q.device)
        synthetic = synthesise(q, negatives_DK.T, hard, mixes)
        logits = with_synthetic(logits, q, synthetic, config.temperature)
        return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.int64)), logits

    def _has_mixes(self) -> bool:
        if self._mixing is None:
            self._mixing = bool(self.mixing)
        return self._mixing

    def _keys(self, x_k: Tensor, order: Tensor | None) -> Tensor:
        return shuffled(lambda rows: self._embed(self.key, rows), x_k, order)

    def _embed(self, network: nn.Module, x: Tensor) -> Tensor:
        return unit(grouped(network, x, self.config.groups))

    def before_epoch(self, context: EpochContext) -> None:
        """Synthetic negatives begin after the first ``plain_epochs`` epochs."""
        self._mixing = self.config.negatives == "mochi" and context.epoch >= self.config.plain_epochs
        self.mixing.fill_(self._mixing)

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network may follow again."""
        self._follower.renew()


# --- recipes ------------------------------------------------------------------------------------------------


def _imagenet(epochs: int) -> dict[str, object]:
    return {
        "epochs": epochs,
        "batch_size": 256,
        "optimiser": "sgd",
        "lr": 0.03,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule_per": "epoch",
    }


def imagenet_v1() -> Recipe:
    """MoCo v1, ImageNet-1k, ResNet-50, 200 epochs: linear top-1 60.6 (README of facebookresearch/moco)."""
    return Recipe(
        about="ImageNet, ResNet-50, MoCo v1, 200 epochs, batch 256",
        method=Config(
            encoder=EncoderConfig(name="resnet50"),
            num_frames=1,
            size=224,
            augment="v1",
            mlp=False,
            temperature=0.07,
        ),
        train={**_imagenet(200), "schedule": "step", "milestones": (120, 160)},
    )


def imagenet_v2() -> Recipe:
    """MoCo v2, ImageNet-1k, ResNet-50, 200 epochs: linear top-1 67.7 (README of facebookresearch/moco)."""
    return Recipe(
        about="ImageNet, ResNet-50, MoCo v2, 200 epochs, batch 256",
        method=Config(encoder=EncoderConfig(name="resnet50"), num_frames=1, size=224),
        train={**_imagenet(200), "schedule": "cosine"},
    )


def imagenet_v2_800ep() -> Recipe:
    """MoCo v2, ImageNet-1k, ResNet-50, 800 epochs: linear top-1 71.1 (README of facebookresearch/moco)."""
    return Recipe(
        about="ImageNet, ResNet-50, MoCo v2, 800 epochs, batch 256",
        method=imagenet_v2().method,
        train={**_imagenet(800), "schedule": "cosine"},
    )


def k400_r2plus1d() -> Recipe:
    """VideoMoCo's first stage: MoCo v1 on Kinetics-400 with R(2+1)D-18, 32 frames at 112 pixels, 100 epochs.

    Batch 32, lr 0.005, x 0.1 at epochs 120 and 160 of 200 (the second stage goes on from here), queue 65536, momentum
    0.999, temperature 0.07 (released command). The released code draws colours and flips per frame with kornia's
    operators; here they are drawn per clip with torchvision's.
    """
    return Recipe(
        about="Kinetics-400, R(2+1)D-18, 32 frames, MoCo v1, 100 epochs, batch 32 (VideoMoCo's first stage)",
        method=Config(num_frames=32, augment="v1", mlp=False, temperature=0.07),
        train={
            "epochs": 100,
            "batch_size": 32,
            "optimiser": "sgd",
            "lr": 0.005,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "step",
            "schedule_per": "epoch",
            "milestones": (120, 160),
        },
    )


def tiny() -> Recipe:
    """An eighth-width R3D-18 on 8 frames of 64 pixels of a small corpus, about two minutes on two CPU cores.

    The queue is shorter than the corpus, or most negatives would be the query's own video. Crops keep most of the
    picture, so that motion stays in sight.
    """
    return Recipe(
        about="a small corpus on a CPU: R3D-18 x 0.125, 8 frames, 64 pixels",
        method=Config(
            encoder=EncoderConfig(name="r3d_18", width=0.125),
            num_frames=8,
            stride=4,
            size=64,
            min_area=0.6,
            queue_size=128,
            key_momentum=0.9,
            temperature=0.1,
        ),
        train={"epochs": 30, "batch_size": 32, "optimiser": "adamw", "lr": 2e-3, "warmup_epochs": 1},
    )
