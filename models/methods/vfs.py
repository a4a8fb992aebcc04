"""VFS: frames of one video are views of each other; correspondence emerges inside the convolutional maps.

J. Xu, X. Wang, "Rethinking Self-Supervised Correspondence Learning: A Video Frame-level Similarity Perspective", ICCV
2021, arXiv 2103.17263. Where paper and released code differ, this follows the code (xvjiarui/VFS), which gave the
published numbers. The form with negatives was not released; here it is MoCo v2 over all pairs of frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.ema import Follower, teacher_of
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.heads import mlp
from clipmill.models.losses import full_precision, unit
from clipmill.models.method import Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.queue import KeyQueue
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.frame_views import Halves
from clipmill.pipeline.spec import Blur, Flip, Gray, Jitter, Normalize, Op, RandomResizedCrop, VideoSpec
from clipmill.pipeline.views import View

MAPS: dict[str, dict[str, Any]] = {  # arguments of `Encoder.maps` for the two evaluations, both at stride 8
    "pixel": {"stage": "res4", "strides": (1, 2, 1, 1)},  # label propagation (DAVIS, JHMDB, VIP)
    "object": {"stage": "res5", "strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},  # tracking (OTB)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of VFS."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Backbone over single frames."""
    frames: int = 4
    """Frames of each of the two views; the video is cut into twice as many segments."""
    size: int = 224
    """Crop side in pixels."""
    min_area: float = 0.2
    """Smallest random crop, as a share of the frame's area."""
    colour: bool = False
    """Jitter, grey and blur, which help tracking (OTB) and hurt the propagation of masks (DAVIS)."""
    predictor_dim: int = 128
    """Width of the predictor's hidden layer; 128 for ResNet-18, 512 for ResNet-50."""
    negatives: bool = False
    """MoCo with a queue instead of SimSiam; a reading of the paper, not released code."""
    pairs: Literal["all", "same"] = "all"
    """With several frames per view: match every frame with every one of the other view, or with its namesake."""
    queue_size: int = 65536
    """Keys kept as negatives."""
    key_momentum: float = 0.999
    """Share of itself that the key network keeps at every step."""
    temperature: float = 0.2
    """Temperature of the softmax over negatives."""

    def __post_init__(self) -> None:
        require_positive(self, "frames", "size", "predictor_dim", "queue_size", "temperature")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "key_momentum", 0 <= self.key_momentum <= 1, "0 to 1")


class Vfs(Method):
    """Two views, the first and the second half of the video, one or more frames each, as still pictures.

    Without negatives: predictor(projector(trunk)) of one view is pulled to projector(trunk) of the other, both ways.
    The views pass one after the other, so that each has batch statistics of its own.
    """

    Config = Config
    rank_invariant = True

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        options = {"width": config.encoder.width, "zero_init_residual": True}
        trunk = encoder or build_encoder(config.encoder.name, **options)
        trunk.spec = input_spec(self.plan().views[0])
        widths = [trunk.dim] * 4
        last = "none" if config.negatives else "affine"
        self.online = nn.Sequential(trunk, mlp(widths, norm="affine", last_norm=last))
        if config.negatives:
            self.target = teacher_of(self.online)
            self.queue = KeyQueue(trunk.dim, config.queue_size)
        else:
            self.predictor = mlp([trunk.dim, config.predictor_dim, trunk.dim], norm="affine")
        self._follower = Follower()

    @property
    def encoder(self) -> Encoder:
        """The trunk."""
        trunk = self.online[0]
        assert isinstance(trunk, Encoder)
        return trunk

    def plan(self) -> Halves:
        """An early and a late view; every frame draws its own augmentation."""
        config = self.config
        spec = VideoSpec(
            size=config.size,
            crop=RandomResizedCrop(scale=(config.min_area, 1.0), fallback="square"),
            ops=operators(config.colour),
            per_frame=True,
            antialias=False,
        )
        views = (View(name=name, num_frames=config.frames, augment=spec) for name in ("early", "late"))
        return Halves(views=tuple(views))

    def forward(self, batch: ClipBatch) -> Output:
        """Loss, the mean cosine between frames of the two views, and how far the embeddings spread (0 = collapsed)."""
        early, late = (x.transpose(1, 2).flatten(0, 1)[:, :, None] for x in (batch.video["early"], batch.video["late"]))
        if self.config.negatives:
            q, k = unit(self.online(early)), self._keys(late)
            loss = self._contrast(q, k)
            z1, z2 = q, k
        else:
            z1 = self.online(early)
            p1 = self.predictor(z1)
            z2 = self.online(late)
            p2 = self.predictor(z2)
            loss = self._agreement(p1, z1, p2, z2)
        with torch.no_grad():
            cosine = F.cosine_similarity(full_precision(z1), full_precision(z2)).mean()
            spread = unit(z1.detach()).std(0, correction=0).norm()
        return Output(loss, {"cosine": cosine, "spread": spread})

    def _agreement(self, p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor) -> Tensor:
        frames = self.config.frames if self.config.pairs == "all" else 1
        return shift_losses(p1, z1, p2, z2, frames).sum()

    def _contrast(self, q: Tensor, k: Tensor) -> Tensor:
        losses = pair_losses(q, k, self.queue.keys.clone(), self.config.temperature, self.config.frames)
        self.queue.push(dist.gather(k))
        return losses.mean() if self.config.pairs == "all" else losses.diagonal(dim1=1, dim2=2).mean()

    @torch.no_grad()
    def _keys(self, x: Tensor) -> Tensor:
        self._follower.follow(self.target, self.online, self.config.key_momentum)
        return unit(self.target(x))

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network may follow again."""
        self._follower.renew()


def operators(colour: bool) -> tuple[Op, ...]:
    """Flip and normalise; between them jitter, grey and a blur whose default range (0.1, 0.2) hardly blurs."""
    paint = (Jitter(), Gray(weights=(0.299, 0.587, 0.114)), Blur(sigma=(0.1, 0.2))) if colour else ()
    return (Flip(), *paint, Normalize())


# --- losses -------------------------------------------------------------------------------------------------


def disagreement(p_ND: Tensor, z_ND: Tensor) -> Tensor:
    """2 - 2 cos(p, z) of each row, (N,); no gradient to z."""
    with torch.autocast(p_ND.device.type, enabled=False):
        return 2 - 2 * (unit(p_ND) * unit(z_ND.detach())).sum(1)


def agreement_loss(p1_ND: Tensor, z1_ND: Tensor, p2_ND: Tensor, z2_ND: Tensor) -> Tensor:
    """Mean over rows of half the `disagreement` of each prediction with the other view's projection."""
    return (0.5 * disagreement(p1_ND, z2_ND) + 0.5 * disagreement(p2_ND, z1_ND)).mean()


def shift_losses(p1_ND: Tensor, z1_ND: Tensor, p2_ND: Tensor, z2_ND: Tensor, frames: int) -> Tensor:
    """`agreement_loss` with the second view rolled by 0 ... T - 1 frames inside each video, each over T; (T,).

    Rows are video-major, N = B * T. The sum is the mean over all T * T pairs of frames of each video, from 0 to 4.
    """

    def rolled(x: Tensor, shift: int) -> Tensor:
        return x.unflatten(0, (-1, frames)).roll(shift, 1).flatten(0, 1)

    shifts = range(frames)
    losses = [agreement_loss(p1_ND, z1_ND, rolled(p2_ND, i), rolled(z2_ND, i)) for i in shifts]
    return torch.stack(losses) / frames


def pair_losses(q_ND: Tensor, k_ND: Tensor, negatives_DK: Tensor, temperature: float, frames: int) -> Tensor:
    """InfoNCE of every pair of a query frame and a key frame of one video against the same K negatives; (B, T, T).

    q_ND, k_ND: unit rows, video-major. Entry (b, i, j) is the cross-entropy of query frame i and key frame j.
    """
    with torch.autocast(q_ND.device.type, enabled=False):
        q, k = (x.unflatten(0, (-1, frames)) for x in (q_ND, k_ND.detach()))
        positive_BTT = q @ k.transpose(1, 2) / temperature
        negative_BT = (q @ negatives_DK / temperature).logsumexp(-1)
        return torch.logaddexp(negative_BT[:, :, None], positive_BTT) - positive_BTT


# --- recipes ------------------------------------------------------------------------------------------------


def _kinetics(batch_size: int, repeat: int) -> dict[str, object]:
    return {
        "epochs": 100,
        "repeat": repeat,
        "batch_size": batch_size,
        "optimiser": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "sync_bn": True,
    }


def k400_r18() -> Recipe:
    """Kinetics-400, ResNet-18, 8 frames, for masks: DAVIS-2017 J&F 66.7, J 64.0, F 69.5 (README of xvjiarui/VFS).

    An epoch visits every video twice: 200 passes in all. Released with 2 processes of 32 videos each.
    """
    return Recipe(
        about="Kinetics-400, ResNet-18, 2 x 4 frames, no colour, 100 x 2 epochs, batch 64 (DAVIS)",
        method=Config(),
        train=_kinetics(64, 2),
    )


def k400_r18_colour() -> Recipe:
    """Kinetics-400, ResNet-18, 8 frames, for tracking: OTB-100 precision 70.0, success 52.3 (its README)."""
    return Recipe(
        about="Kinetics-400, ResNet-18, 2 x 4 frames, colour, 100 x 2 epochs, batch 64 (OTB)",
        method=Config(colour=True),
        train=_kinetics(64, 2),
    )


def _resnet50(colour: bool) -> Config:
    return Config(encoder=EncoderConfig(name="resnet50"), frames=1, predictor_dim=512, colour=colour)


def k400_r50() -> Recipe:
    """Kinetics-400, ResNet-50, 2 frames, for masks: DAVIS-2017 J&F 69.5, J 67.0, F 72.0 (README of xvjiarui/VFS).

    An epoch visits every video five times: 500 passes in all. Released with 8 processes of 32 videos each.
    """
    return Recipe(
        about="Kinetics-400, ResNet-50, 2 x 1 frame, no colour, 100 x 5 epochs, batch 256 (DAVIS)",
        method=_resnet50(colour=False),
        train=_kinetics(256, 5),
    )


def k400_r50_colour() -> Recipe:
    """Kinetics-400, ResNet-50, 2 frames, for tracking: OTB-100 precision 73.9, success 52.5 (its README)."""
    return Recipe(
        about="Kinetics-400, ResNet-50, 2 x 1 frame, colour, 100 x 5 epochs, batch 256 (OTB)",
        method=_resnet50(colour=True),
        train=_kinetics(256, 5),
    )


def k400_r18_negatives() -> Recipe:
    """Kinetics-400, ResNet-18 with a queue of negatives: the paper's ablation, whose settings were not released.

    Schedule and data of `k400_r18`, queue, momentum and temperature of MoCo v2.
    """
    return Recipe(
        about="Kinetics-400, ResNet-18, 2 x 4 frames, MoCo's negatives, 100 x 2 epochs, batch 64",
        method=Config(negatives=True),
        train=_kinetics(64, 2),
    )


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on 2 x 2 frames of 64 pixels of a small corpus, about a minute on two CPU cores."""
    return Recipe(
        about="a small corpus on a CPU: ResNet-18 x 0.25, 2 x 2 frames, 64 pixels",
        method=Config(encoder=EncoderConfig(width=0.25), frames=2, size=64, predictor_dim=32),
        train={"epochs": 20, "batch_size": 32, "optimiser": "sgd", "lr": 0.05, "weight_decay": 1e-4},
    )
