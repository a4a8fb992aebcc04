"""VCLR: tuples of frames from all over a video must find each other; frames contrast too, and order must be noticed.

H. Kuang, Y. Zhu, Z. Zhang, X. Li, J. Tighe, S. Schwertfeger, C. Stachniss, M. Li, "Video Contrastive Learning with
Global Context", ICCV Workshops 2021, arXiv 2108.02722, on top of T. Yao et al., "SeCo", AAAI 2021, arXiv 2008.00975.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.ema import follow, teacher_of
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.heads import mlp
from clipmill.models.losses import accuracy, full_precision, info_nce, unit
from clipmill.models.method import Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.queue import KeyQueue
from clipmill.models.shuffling import grouped, shuffled
from clipmill.models.start import below, fill, is_run, trained, trained_encoder
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import RandomResizedCrop, moco_v2
from clipmill.pipeline.views import View
from clipmill.pipeline.views_tuples import Tuples, shuffles

OrderAxis = Literal["segment", "feature"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of VCLR."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50"))
    """Backbone of pictures."""
    start: str = ""
    """Run folder of moco with a two-layer head, whose trunk and head (for all four heads) are the first weights; or
    the folder of an encoder, for the trunk alone. Empty: random weights."""
    segments: int = 3
    """Equal parts of a video with a frame each in a tuple."""
    size: int = 224
    """Crop side in pixels."""
    min_area: float = 0.2
    """Smallest random crop, as a share of the frame's area."""
    out_dim: int = 128
    """Width of the embeddings."""
    queue_size: int = 131072
    """Keys kept as negatives, of frames and of tuples each."""
    key_momentum: float = 0.999
    """Share of itself that the key network keeps at every step."""
    temperature: float = 0.1
    """Temperature of the contrasts against a queue."""
    temperature_intra: float = 0.1
    """Temperature of the contrast within a video."""
    order_axis: OrderAxis = "segment"
    """Axis along which the features of the order term have length 1: segment, as released; feature, as probably
    meant."""
    shuffle: bool = True
    """Exchange the rows of all processes before the key network, so that batch statistics give nothing away."""
    groups: int = 1
    """Groups of a process's batch with batch statistics of their own, as if each were a process."""

    def __post_init__(self) -> None:
        require_positive(self, "size", "out_dim", "queue_size", "temperature", "temperature_intra", "groups")
        require(self, "segments", 3 <= self.segments <= 6, "3 to 6")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "key_momentum", 0 <= self.key_momentum <= 1, "0 to 1")
        require(self, "order_axis", self.order_axis in ("segment", "feature"), "segment or feature")


class Losses(NamedTuple):
    """The four terms and the logits behind the accuracies."""

    inter: Tensor
    intra: Tensor
    order: Tensor
    video: Tensor
    video_logits: Tensor
    order_logits: Tensor


class Tower(nn.Module):
    """A trunk under four heads, and the classifier of orders.

    The heads take pooled features of pictures (B, C): ``inter`` and ``intra`` of a frame, ``order`` of every frame of a
    tuple, ``video`` of the mean over a tuple.
    """

    def __init__(self, trunk: Encoder, out_dim: int, segments: int, order_axis: OrderAxis = "segment") -> None:
        super().__init__()
        self.trunk = trunk
        widths = (trunk.dim, trunk.dim, out_dim)
        self.inter, self.intra, self.order, self.video = mlp(widths), mlp(widths), mlp(widths), mlp(widths)
        self.classifier = nn.Linear(2 * segments * out_dim, 4)
        self.order_axis = order_axis
        self.out_dim = out_dim

    def frame_embeddings(self, f_BC: Tensor) -> Tensor:
        """(B, 2 * D): the unit vectors ``inter`` and ``intra`` side by side."""
        return torch.cat([unit(self.inter(f_BC)), unit(self.intra(f_BC))], 1)

    def tuple_embeddings(self, f_BNC: Tensor) -> Tensor:
        """(B, D + N * D): the unit vector ``video``, then the features of the order term, segment by segment.

        Every feature channel has length 1 over the segments, or with order_axis ``feature`` every segment over its
        channels.
        """
        h_BND = self.order(f_BNC)
        order = unit(h_BND.transpose(1, 2)).transpose(1, 2) if self.order_axis == "segment" else unit(h_BND)
        return torch.cat([unit(self.video(f_BNC.mean(1))), order.flatten(1)], 1)

    def frames(self, x_BCTHW: Tensor) -> Tensor:
        """`frame_embeddings` of pictures (B, 3, 1, H, W)."""
        return self.frame_embeddings(self.trunk(x_BCTHW))

    def tuples(self, x_BCNHW: Tensor) -> Tensor:
        """`tuple_embeddings` of tuples (B, 3, N, H, W)."""
        pictures = x_BCNHW.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return self.tuple_embeddings(self.trunk(pictures).unflatten(0, (len(x_BCNHW), -1)))


class VCLR(Method):
    """The sum of four losses: inter (frames against a queue), intra (within a video), order, video (tuples)."""

    Config = Config

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        trunk = encoder or build_encoder(config.encoder.name, width=config.encoder.width)
        trunk.spec = input_spec(self.plan().views[0])
        self.query = Tower(trunk, config.out_dim, config.segments, config.order_axis)
        if config.start:
            start_from(self.query, config.start)
        self.key = teacher_of(self.query)
        self.frame_queue = KeyQueue(config.out_dim, config.queue_size, init="uniform")
        self.tuple_queue = KeyQueue(config.out_dim, config.queue_size, init="uniform")

    @property
    def encoder(self) -> Encoder:
        """The query network without its heads."""
        return self.query.trunk

    def plan(self) -> Tuples:
        """A query tuple and a key tuple, every frame augmented by itself, and the query's anchor once more."""
        config = self.config
        crop = RandomResizedCrop(scale=(config.min_area, 1.0))
        augment = replace(moco_v2(config.size, per_frame=True), crop=crop)
        query = View(name="query", num_frames=config.segments, augment=augment)
        same = View(name="same", modality="image", augment=augment)
        return Tuples(views=(query, replace(query, name="key"), same))

    def forward(self, batch: ClipBatch) -> Output:
        """The sum of the losses; each loss, and how often tuples find each other and orders are recognised."""
        query, key = batch.video["query"], batch.video["key"]
        query_order, key_order = (batch.aux[name].long() for name in ("query_order", "key_order"))
        anchor, others = anchor_and_others(query, batch.aux["anchor"].long())
        count = len(query) * dist.world()
        pictures = [batch.video["same"], *others]
        orders = [dist.permutation(count, self.step_key, "shuffle", number) for number in range(len(pictures) + 1)]
        losses = self.contrast(
            anchor,
            pictures,
            reordered(query, query_order),
            reordered(key, key_order),
            order_label(query_order, key_order),
            orders if self.config.shuffle else None,
        )
        terms = losses._asdict()
        logits = terms.pop("video_logits"), terms.pop("order_logits")
        metrics = {name: term.detach() for name, term in terms.items()}
        metrics["accuracy"] = accuracy(logits[0], 0)
        metrics["order_accuracy"] = accuracy(logits[1], order_label(query_order, key_order))
        return Output(torch.stack(list(terms.values())).sum(), metrics)

    def contrast(
        self,
        x_q: Tensor,
        x_k: Sequence[Tensor],
        video_q: Tensor,
        video_k: Tensor,
        label: Tensor,
        orders: Sequence[Tensor] | None,
    ) -> Losses:
        """One step: the four losses of B local samples; pushes the keys of all processes.

        x_q: anchors (B, 3, 1, H, W). x_k: the same frame, then the other frames of the tuple, likewise. video_q,
        video_k: tuples (B, 3, N, H, W) in the order the network sees them. label: (B,) of `order_label`. orders: for
        every key input, and last for video_k, the permutation of the rows of all processes (shuffling-BN); None keeps
        rows in place.
        """
        config, width = self.config, self.config.out_dim
        permutations = orders if orders is not None else [None] * (len(x_k) + 1)
        with torch.no_grad():
            *frame_orders, tuple_order = permutations
            keys = [self._keys(self.key.frames, x, order) for x, order in zip(x_k, frame_orders, strict=True)]
            key_tuple = self._keys(self.key.tuples, video_k, tuple_order)
            frame_negatives, tuple_negatives = self.frame_queue.keys.clone(), self.tuple_queue.keys.clone()
        frame = grouped(self.query.frames, x_q, config.groups)
        whole = grouped(self.query.tuples, video_q, config.groups)
        inter_keys, intra_keys = ([key[:, part] for key in keys] for part in (slice(width), slice(width, None)))
        inter, _ = inter_loss(frame[:, :width], inter_keys, frame_negatives, config.temperature)
        intra, _ = intra_loss(frame[:, width:], intra_keys, config.temperature_intra)
        video, video_logits = info_nce(whole[:, :width], key_tuple[:, :width], tuple_negatives, config.temperature)
        order_logits = self.query.classifier(torch.cat([whole[:, width:], key_tuple[:, width:]], 1))
        order = F.cross_entropy(full_precision(order_logits), label)
        self.frame_queue.push(torch.cat([dist.gather(key) for key in inter_keys]))
        self.tuple_queue.push(dist.gather(key_tuple[:, :width]))
        return Losses(inter, intra, order, video, video_logits, order_logits)

    def _keys(self, network: Callable[[Tensor], Tensor], x: Tensor, order: Tensor | None) -> Tensor:
        return shuffled(lambda rows: grouped(network, rows, self.config.groups), x, order)

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network follows the weights of after this step."""
        follow(self.key, self.query, self.config.key_momentum)


# --- tuples and their losses --------------------------------------------------------------------------------


def anchor_and_others(x_BCNHW: Tensor, anchor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The anchor of every tuple (B, C, 1, H, W), and its other frames in temporal order, likewise.

    anchor: (B,) places of the anchors, 0 or N - 1.
    """
    rows, count = torch.arange(len(x_BCNHW), device=x_BCNHW.device), x_BCNHW.shape[2]
    others = [(number + (anchor == 0)) for number in range(count - 1)]
    first, *rest = (x_BCNHW[rows, :, place].unsqueeze(2) for place in (anchor, *others))
    return first, rest


def reordered(x_BCNHW: Tensor, order: Tensor) -> Tensor:
    """Every tuple in its order; order: (B,) numbers of `clipmill.pipeline.views_tuples.shuffles`."""
    table = torch.tensor(shuffles(x_BCNHW.shape[2]), device=x_BCNHW.device)
    rows = torch.arange(len(x_BCNHW), device=x_BCNHW.device)[:, None]
    return x_BCNHW.transpose(1, 2)[rows, table[order]].transpose(1, 2)


def order_label(query_order: Tensor, key_order: Tensor) -> Tensor:
    """(B,) int64: 0 both tuples in temporal order, 1 the query shuffled, 2 the key, 3 both."""
    return (query_order > 0).long() + 2 * (key_order > 0).long()


def inter_loss(q_BD: Tensor, keys: Sequence[Tensor], negatives_DK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The mean InfoNCE of a frame with each of its J positives, all against the same negatives.

    keys: J tensors (B, D). Returns the mean over J * B rows and the logits (J * B, 1 + K), all rows of the first key
    first.
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        q, negatives = full_precision(q_BD), full_precision(negatives_DK)
        others = q @ negatives  # once for all positives
        rows = [torch.cat([(q * full_precision(k)).sum(1, keepdim=True), others], 1) for k in keys]
        logits = torch.cat(rows) / temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64)), logits


def intra_loss(q_BD: Tensor, keys: Sequence[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """The same frame against each other frame of its video: the mean of two-way cross-entropies.

    keys: of the same frame, then of J others, (B, D) each. Returns the loss and the logits (J * B, 2).
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        same, *others = ((full_precision(q_BD) * full_precision(k)).sum(1) for k in keys)
        logits = torch.cat([torch.stack([same, other], 1) for other in others]) / temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64)), logits


def start_from(tower: Tower, folder: str) -> None:
    """Give a tower the trunk of a trained MoCo and its head to all four heads; or the trunk of an encoder alone."""
    if not is_run(folder):
        fill(tower.trunk, trained_encoder(folder), folder)
        return
    tensors = trained(folder)
    head = below(tensors, "query.1.")
    if "2.weight" not in head:
        raise ValueError(f"start = {folder!r}: no two-layer head of moco there; give a run of moco with --mlp")
    fill(tower.trunk, below(tensors, "query.0."), folder)
    for part in (tower.inter, tower.intra, tower.order, tower.video):
        fill(part, head, folder)


# --- recipes ------------------------------------------------------------------------------------------------


def _published(about: str) -> Recipe:
    return Recipe(
        about=about,
        method=Config(),
        train={
            "epochs": 400,
            "batch_size": 256,
            "optimiser": "sgd",
            "lr": 0.1,
            "lr_scaling": "linear",
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "warmup_epochs": 5,
            "lr_start": 0.01,
            "lr_end": 1e-5,
        },
    )


def k400() -> Recipe:
    """Kinetics-400, ResNet-50, 400 epochs: linear SVM 64.1, UCF101 R@1 70.6 (README of the official repository).

    Give the MoCo v2 run it starts from (200 epochs of ImageNet) with --start.
    """
    return _published("Kinetics-400, ResNet-50, 3 frames, 400 epochs, batch 256 (--start: a run of moco imagenet_v2)")


def ucf101() -> Recipe:
    """UCF101 split 1, ResNet-50: R@1 46.8 (README of the official repository).

    The authors lost the settings of their run; these are the ones of Kinetics-400, with which others report more.
    """
    return _published("UCF101 split 1, ResNet-50, with the settings of k400 (--start: a run of moco imagenet_v2)")


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on 3 frames of 64 pixels of a small corpus, about a minute on two CPU cores.

    Crops keep nearly all of the picture: single frames show a motion only by where things are.
    """
    return Recipe(
        about="a small corpus on a CPU: ResNet-18 x 0.25, 3 frames, 64 pixels",
        method=Config(
            encoder=EncoderConfig(name="resnet18", width=0.25),
            size=64,
            min_area=0.9,
            queue_size=192,
            key_momentum=0.99,
        ),
        train={"epochs": 40, "batch_size": 32, "optimiser": "adamw", "lr": 1e-3, "warmup_epochs": 1},
    )
