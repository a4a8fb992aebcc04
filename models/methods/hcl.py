"""HCL: SimCLR's pairs against negatives that are weighted towards the anchor and corrected for its own class.

J. Robinson, C.-Y. Chuang, S. Sra, S. Jegelka, "Contrastive Learning with Hard Negative Samples", ICLR 2021, arXiv
2010.04592; details from the released code (joshr17/HCL, image experiments). beta = 0 is the debiased loss of C.-Y.
Chuang et al., NeurIPS 2020; beta = tau+ = 0 is SimCLR's NT-Xent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from clipmill.models.backbones.resnet import Stem
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.losses import unit
from clipmill.models.method import EpochContext, Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.negatives import hard_nce, pair_logits
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import RandomResizedCrop
from clipmill.pipeline.spec import hcl as augmentation
from clipmill.pipeline.views import Clips, View

_ANNEAL_STEPS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of HCL."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50"))
    """Backbone."""
    stem: Stem = "3x3"
    """3x3: stride 1 and no max-pool, for pictures of about 32 pixels."""
    size: int = 32
    """Crop side in pixels."""
    min_area: float = 0.08
    """Smallest random crop, as a share of the picture's area."""
    same_frame: bool = True
    """Both views show one frame; otherwise two random frames of the video."""
    hidden_dim: int = 512
    """Width of the head's hidden layer."""
    out_dim: int = 128
    """Width of the embedding."""
    temperature: float = 0.5
    """Temperature t of the softmax."""
    beta: float = 1.0
    """Concentration on negatives near the anchor, on similarities over the temperature; 0 weighs all alike."""
    tau_plus: float = 0.1
    """Share tau+ of the negatives taken to be of the anchor's own class."""
    easy: bool = False
    """The plain sum over negatives, neither weighted nor debiased."""
    anneal: bool = False
    """Lower beta in nine equal steps to 0 over the training."""

    def __post_init__(self) -> None:
        require_positive(self, "size", "hidden_dim", "out_dim", "temperature")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "beta", self.beta >= 0, "at least 0")
        require(self, "tau_plus", 0 <= self.tau_plus < 1, "at least 0 and below 1")


class HCL(Method):
    """-log(p / (p + G)) over all 2 N anchors, G a weighted, debiased sum over the batch of all processes.

    The two views pass the network one after the other, so batch statistics are each view's own.
    """

    Config = Config
    rank_invariant = True
    beta: Tensor

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        stem = {} if config.stem == "7x7" else {"stem": config.stem}
        self.backbone = encoder or build_encoder(config.encoder.name, width=config.encoder.width, **stem)
        self.backbone.spec = input_spec(self.plan().views[0])
        self.head = nn.Sequential(
            nn.Linear(self.backbone.dim, config.hidden_dim, bias=False),
            nn.BatchNorm1d(config.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden_dim, config.out_dim),
        )
        self.register_buffer("beta", torch.tensor(config.beta))

    @property
    def encoder(self) -> Encoder:
        """The backbone; its pooled feature is the representation."""
        return self.backbone

    def plan(self) -> Clips:
        """Two views of one frame."""
        config = self.config
        augment = replace(augmentation(config.size), crop=RandomResizedCrop(scale=(config.min_area, 1.0)))
        views = tuple(View(name=name, modality="image", augment=augment) for name in ("view1", "view2"))
        return Clips(views=views, shared=config.same_frame)

    def forward(self, batch: ClipBatch) -> Output:
        """Loss, the share of anchors whose pair is nearer than all negatives, and that of G at its floor."""
        u1, u2 = (unit(self.head(self.backbone(batch.video[name]))) for name in ("view1", "view2"))
        columns = None
        if dist.world() > 1:
            both = dist.gather_with_grad(torch.stack([u1, u2], 1))
            columns = (both[:, 0], both[:, 1])
        loss, positive, negatives, at_floor = self.contrast(u1, u2, columns, dist.rank() * len(u1))
        right = (positive > negatives.amax(1)).float().mean()
        return Output(loss, {"accuracy": right.detach(), "at_floor": at_floor.float().mean()})

    def contrast(
        self, u1_ND: Tensor, u2_ND: Tensor, columns: tuple[Tensor, Tensor] | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss of unit embeddings, logits of 2 N anchors to pair and negatives, and which anchors are at the floor."""
        config = self.config
        with torch.autocast(u1_ND.device.type, enabled=False):
            positive, negatives = pair_logits(u1_ND, u2_ND, config.temperature, columns=columns, offset=offset)
            losses, at_floor = hard_nce(
                positive, negatives, config.temperature, beta=self.beta, tau_plus=config.tau_plus, easy=config.easy
            )
        return losses.mean(), positive, negatives, at_floor

    def before_epoch(self, context: EpochContext) -> None:
        """Lower beta, if asked to."""
        if self.config.anneal:
            self.beta.fill_(annealed(self.config.beta, context.epoch + 1, context.num_epochs))
            context.log["beta"] = float(self.beta)


def annealed(beta: float, epoch: int, num_epochs: int) -> float:
    """beta in epoch 1 ... num_epochs of the released code.

    At every multiple of num_epochs // 9 the next of nine values from beta to 0 is taken; the first of them is beta.

    >>> [annealed(8.0, epoch, 18) for epoch in (1, 2, 3, 4, 16, 18)]
    [8.0, 8.0, 8.0, 7.0, 1.0, 0.0]
    """
    taken = epoch // max(num_epochs // _ANNEAL_STEPS, 1)
    values: Sequence[float] = np.linspace(beta, 0, _ANNEAL_STEPS).tolist()
    return values[min(max(taken, 1), _ANNEAL_STEPS) - 1]


# --- recipes ------------------------------------------------------------------------------------------------

_ADAM = {
    "epochs": 400,
    "batch_size": 256,
    "optimiser": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "schedule": "constant",
    "sync_bn": True,
}


def stl10() -> Recipe:
    """STL-10 (train + unlabeled), ResNet-50, 400 epochs, beta 1, tau+ 0.1: linear top-1 87.44; SimCLR 80.15 (README).

    Adam, lr 1e-3, weight decay 1e-6, batch 256, t = 0.5, 32-pixel crops of the 96-pixel pictures.
    """
    return Recipe(about="STL-10, ResNet-50, beta 1, tau+ 0.1, 400 epochs, batch 256", method=Config(), train=_ADAM)


def stl10_debiased() -> Recipe:
    """STL-10 with beta 0: the debiased loss alone; linear top-1 84.26 (README)."""
    return Recipe(about="STL-10, ResNet-50, debiased only, 400 epochs", method=Config(beta=0.0), train=_ADAM)


def cifar10() -> Recipe:
    """CIFAR-10, ResNet-50, 400 epochs, beta 1, tau+ 0.1 (released defaults)."""
    return Recipe(about="CIFAR-10, ResNet-50, beta 1, tau+ 0.1, 400 epochs, batch 256", method=Config(), train=_ADAM)


def cifar100() -> Recipe:
    """CIFAR-100, ResNet-50, 400 epochs, beta 1, tau+ 0.05: about 3 points above SimCLR (paper, section 5.1)."""
    return Recipe(
        about="CIFAR-100, ResNet-50, beta 1, tau+ 0.05, 400 epochs, batch 256",
        method=Config(tau_plus=0.05),
        train=_ADAM,
    )


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on 64-pixel frames of a small corpus, about a minute on two CPU cores."""
    backbone = EncoderConfig(name="resnet18", width=0.25)
    config = Config(encoder=backbone, stem="7x7", size=64, min_area=0.08, tau_plus=0.05)
    train = {"epochs": 30, "batch_size": 64, "optimiser": "adamw", "lr": 2e-3, "warmup_epochs": 1, "sync_bn": True}
    return Recipe(about="a small corpus on a CPU: ResNet-18 x 0.25, 64 pixels", method=config, train=train)
