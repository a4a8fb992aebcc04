"""DenseCL: MoCo v2 for whole pictures and for every place of the last feature map.

X. Wang, R. Zhang, C. Shen, T. Kong, L. Li, "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR
2021, arXiv 2011.09157; details from the released code (WXinlong/DenseCL). The positive of a place is the place of the
key view with the most similar backbone feature, no geometry is used; its negatives are image-level means of earlier
dense keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.backbones.parts import init_convolutions
from clipmill.models.dense import DenseNeck, DenseOutput, bounded_info_nce, correspondence, matched
from clipmill.models.ema import Follower, teacher_of
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.losses import accuracy, info_nce
from clipmill.models.method import Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.queue import KeyQueue
from clipmill.models.shuffling import in_groups
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import RandomResizedCrop, moco_v2
from clipmill.pipeline.views import Clips, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of DenseCL."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50"))
    """Backbone."""
    size: int = 224
    """Crop side in pixels."""
    min_area: float = 0.2
    """Smallest random crop, as a share of the picture's area."""
    same_frame: bool = True
    """Query and key show one frame; otherwise two random frames of the video, and matches go from one to the other."""
    grid: int = 0
    """Pool the last map to grid x grid places, for matching and heads alike; 0 keeps its size."""
    hidden_dim: int = 2048
    """Width of the hidden layer of both heads."""
    out_dim: int = 128
    """Width of the embeddings."""
    queue_size: int = 65536
    """Keys in each of the two queues; a multiple of the batch size."""
    key_momentum: float = 0.999
    """Share of itself that the key network keeps at every step."""
    temperature: float = 0.2
    """Temperature of both softmaxes."""
    dense_share: float = 0.5
    """Weight lambda of the dense loss; that of the global one is 1 - lambda."""
    dense_from_step: int = 0
    """Optimiser steps during which lambda is 0; of use with a large lambda."""
    shuffle: bool = True
    """Exchange the rows of all processes before the key network, so that batch statistics give nothing away."""
    groups: int = 1
    """Groups of a process's batch with batch statistics of their own, as if each were a process."""
    chunk_mb: int = 64
    """Megabytes that the logits of the dense loss may take at a time; the result does not depend on it."""

    def __post_init__(self) -> None:
        require_positive(self, "size", "hidden_dim", "out_dim", "queue_size", "temperature", "groups", "chunk_mb")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        for name in ("key_momentum", "dense_share"):
            require(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("grid", "dense_from_step"):
            require(self, name, getattr(self, name) >= 0, "at least 0")


class Described(NamedTuple):
    """A view of B pictures: the backbone's last map (B, C, P), and what the heads make of it."""

    map: Tensor
    one: Tensor
    places: Tensor
    mean: Tensor


class Network(nn.Module):
    """A backbone, and both heads over the P places of its last map."""

    def __init__(self, trunk: Encoder, config: Config) -> None:
        super().__init__()
        self.trunk, self.grid = trunk, config.grid
        self.neck = DenseNeck(trunk.dim, config.hidden_dim, config.out_dim)

    def forward(self, x_BCTHW: Tensor) -> Described:
        """See `Described`."""
        planes = self.trunk.maps(x_BCTHW, self.trunk.stages[-1])
        if self.grid:
            planes = F.adaptive_avg_pool3d(planes, (planes.shape[2], self.grid, self.grid))
        map_BCP = planes.flatten(2)
        said: DenseOutput = self.neck(map_BCP)
        return Described(map=map_BCP, one=said.one, places=said.places, mean=said.mean)


class Step(NamedTuple):
    """One step: both losses, weighted; global logits (N, 1 + K); dense matches (N, P) and hits (N * P,); both views."""

    loss_one: Tensor
    loss_dense: Tensor
    logits: Tensor
    match: Tensor
    dense_right: Tensor
    query: Described
    key: Described


class DenseCL(Method):
    """(1 - lambda) InfoNCE of pictures + lambda InfoNCE of places, each with a queue of its own.

    Only the query network has gradients; keys, matches and queues are constants. Batch statistics are kept apart as
    in `clipmill.models.methods.moco.MoCo`.
    """

    Config = Config
    steps: Tensor

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        trunk = encoder or build_encoder(config.encoder.name, width=config.encoder.width)
        if encoder is None:
            init_convolutions(trunk, "fan_in")
        trunk.spec = input_spec(self.plan().views[0])
        self.query = Network(trunk, config)
        self.key = teacher_of(self.query)
        self.queue = KeyQueue(config.out_dim, config.queue_size, whole_writes=True)
        self.queue2 = KeyQueue(config.out_dim, config.queue_size, whole_writes=True)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._follower = Follower()

    @property
    def encoder(self) -> Encoder:
        """The query network without its heads."""
        return self.query.trunk

    def plan(self) -> Clips:
        """Two augmentations of one picture."""
        config = self.config
        augment = replace(moco_v2(config.size), crop=RandomResizedCrop(scale=(config.min_area, 1.0)))
        views = tuple(View(name=name, modality="image", augment=augment) for name in ("query", "key"))
        return Clips(views=views, shared=config.same_frame)

    def forward(self, batch: ClipBatch) -> Output:
        """Loss, its two parts, and the shares of pictures and of places that find their positive."""
        query, key = batch.video["query"], batch.video["key"]
        order = dist.permutation(len(query) * dist.world(), self.step_key, "shuffle")
        step = self.contrast(query, key, order if self.config.shuffle else None)
        metrics = {
            "accuracy": accuracy(step.logits, 0),
            "dense_accuracy": step.dense_right.float().mean(),
            "loss_one": step.loss_one.detach(),
            "loss_dense": step.loss_dense.detach(),
        }
        return Output(step.loss_one + step.loss_dense, metrics)

    def contrast(self, x_q: Tensor, x_k: Tensor, order: Tensor | None) -> Step:
        """One step of N local pictures; pushes the keys of all processes into both queues.

        order: permutation of the rows of all processes for the key pass (shuffling-BN); None keeps them in place.
        """
        config = self.config
        query = self._described(self.query, x_q)
        with torch.no_grad():
            self._follower.follow(self.key, self.query, config.key_momentum)
            key = self._keys(x_k, order)
            negatives, negatives2 = self.queue.keys.clone(), self.queue2.keys  # see `bounded_info_nce` for the second
            match = correspondence(query.map, key.map)
            positives = matched(key.places, match)
        share = config.dense_share * (self.steps >= config.dense_from_step).to(query.one.dtype)
        loss_one, logits = info_nce(query.one, key.one, negatives, config.temperature)
        loss_dense, right = bounded_info_nce(
            query.places.flatten(0, 1), positives.flatten(0, 1), negatives2, config.temperature, config.chunk_mb << 20
        )
        self.queue.push(dist.gather(key.one))
        self.queue2.push(dist.gather(key.mean))
        return Step((1 - share) * loss_one, share * loss_dense, logits, match, right, query, key)

    def _described(self, network: nn.Module, x: Tensor) -> Described:
        parts = [network(part) for part in in_groups(x, self.config.groups)]
        return parts[0] if len(parts) == 1 else Described(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def _keys(self, x_k: Tensor, order: Tensor | None) -> Described:
        if order is None:
            return self._described(self.key, x_k)
        shuffled, back = self._described(self.key, dist.exchange(x_k, order)), dist.inverse(order)
        return Described(*(dist.exchange(piece, back) for piece in shuffled))

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network may follow again."""
        self._follower.renew()
        self.steps.fill_(step + 1)


# --- recipes ------------------------------------------------------------------------------------------------


def _sgd(epochs: int, lr: float) -> dict[str, object]:
    return {
        "epochs": epochs,
        "batch_size": 256,
        "optimiser": "sgd",
        "lr": lr,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "schedule_per": "epoch",
    }


def coco() -> Recipe:
    """COCO train2017 without labels, ResNet-50, 800 epochs, lr 0.3: VOC detection AP 56.7, segmentation mIoU 67.5.

    MoCo v2 has 54.7 and 64.5 (README of WXinlong/DenseCL).
    """
    return Recipe(about="COCO, ResNet-50, 800 epochs, batch 256", method=Config(), train=_sgd(800, 0.3))


def coco_1600ep() -> Recipe:
    """COCO train2017, ResNet-50, 1600 epochs: VOC detection AP 57.2, segmentation mIoU 68.0 (README)."""
    return Recipe(about="COCO, ResNet-50, 1600 epochs, batch 256", method=Config(), train=_sgd(1600, 0.3))


def imagenet() -> Recipe:
    """ImageNet-1k, ResNet-50, 200 epochs, lr 0.03: VOC detection AP 58.7, segmentation mIoU 69.4 (README).

    MoCo v2 has 57.0 and 67.5.
    """
    return Recipe(about="ImageNet, ResNet-50, 200 epochs, batch 256", method=Config(), train=_sgd(200, 0.03))


def imagenet_r101() -> Recipe:
    """ImageNet-1k, ResNet-101, 200 epochs: VOC detection AP 61.3, segmentation mIoU 74.1 (README)."""
    method = Config(encoder=EncoderConfig(name="resnet101"))
    return Recipe(about="ImageNet, ResNet-101, 200 epochs, batch 256", method=method, train=_sgd(200, 0.03))


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on 64-pixel frames of a few thousand pictures, two minutes on two CPU cores.

    Large crops, for the reason of MoCHi's tiny recipe.
    """
    config = Config(
        encoder=EncoderConfig(name="resnet18", width=0.25),
        size=64,
        min_area=0.6,
        hidden_dim=128,
        queue_size=512,
        key_momentum=0.99,
        temperature=0.1,
    )
    train = {"epochs": 30, "batch_size": 64, "optimiser": "adamw", "lr": 1e-3, "warmup_epochs": 1}
    return Recipe(about="a small corpus on a CPU: ResNet-18 x 0.25, 64 pixels", method=config, train=train)
