"""SimCLR: two augmentations of a picture must recognise each other among all others of the batch.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020, arXiv 2002.05709; details from the reference implementation (google-research/simclr). Video is treated as a
bag of frames: one random frame per video and epoch, two crops from one decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from clipmill.models.encoder import Encoder, EncoderConfig, backbone_options, build_encoder
from clipmill.models.heads import simclr_head
from clipmill.models.losses import Reduction, accuracy, entropy, full_precision, nt_xent
from clipmill.models.method import (
    Method,
    Output,
    ParamGroup,
    Recipe,
    input_spec,
    require,
    require_positive,
    weights_and_rest,
)
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import DistortedBox, RandomResizedCrop
from clipmill.pipeline.spec import simclr as augmentation
from clipmill.pipeline.views import Clips, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of SimCLR."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50"))
    """Backbone."""
    stem: Literal["7x7", "3x3"] = "7x7"
    """3x3: stride 1 and no max-pool, for pictures of about 32 pixels."""
    size: int = 224
    """Crop side in pixels."""
    min_area: float = 0.08
    """Smallest random crop, as a share of the picture's area."""
    crop: Literal["torchvision", "reference"] = "torchvision"
    """Sampler of random crops; that of the reference takes smaller ones on average, of 10 % of the area at least."""
    brightness: Literal["scale", "shift"] = "scale"
    """Multiply the brightness, as the released code, or add to it, as the paper's pseudo-code."""
    strength: float = 1.0
    """Strength s of the colour jitter: brightness, contrast, saturation 0.8 s, hue 0.2 s."""
    blur: bool = True
    """Gaussian blur with probability 0.5."""
    same_frame: bool = True
    """Both views show one frame; otherwise two random frames of the video."""
    head_layers: int = 2
    """Layers of the projection head: 2 in the paper, 3 in the released code."""
    out_dim: int = 128
    """Width of the embedding."""
    temperature: float = 0.1
    """Temperature tau of the softmax."""
    reduction: Reduction = "paper"
    """paper: mean over all 2 N rows; reference: twice that, as the released code."""
    hidden_norm: bool = True
    """Divide embeddings by their L2 norm."""

    def __post_init__(self) -> None:
        require_positive(self, "size", "head_layers", "out_dim", "temperature")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "strength", self.strength >= 0, "at least 0")


class SimCLR(Method):
    """NT-Xent between two views over the batch of all processes, with a differentiable gather."""

    Config = Config
    rank_invariant = True

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = encoder or _backbone(config)
        self.backbone.spec = input_spec(self.plan().views[0])
        self.head = simclr_head(self.backbone.dim, config.out_dim, config.head_layers)

    @property
    def encoder(self) -> Encoder:
        """The backbone; its pooled feature h is the representation."""
        return self.backbone

    def plan(self) -> Clips:
        """Two views of one frame."""
        config = self.config
        maths = "simclr" if config.brightness == "scale" else "simclr_v1"
        augment = augmentation(config.size, config.strength, config.blur, maths=maths)
        if config.crop == "reference":  # which also wants a tenth of the picture to be covered
            crop = DistortedBox(scale=(max(config.min_area, 0.1), 1.0))
        else:
            crop = RandomResizedCrop(scale=(config.min_area, 1.0))
        views = tuple(
            View(name=name, modality="image", augment=replace(augment, crop=crop)) for name in ("view1", "view2")
        )
        return Clips(views=views, shared=config.same_frame)

    def forward(self, batch: ClipBatch) -> Output:
        """Loss, contrastive accuracy (among the N candidates of the other view) and its entropy."""
        x = torch.cat([batch.video["view1"], batch.video["view2"]])  # batch statistics cover both views
        z1, z2 = full_precision(self.head(self.backbone(x))).chunk(2)
        columns = None
        if dist.world() > 1:
            both = dist.gather_with_grad(torch.stack([z1, z2], 1))
            columns = (both[:, 0], both[:, 1])
        offset = dist.rank() * len(z1)
        loss, logits = nt_xent(
            z1,
            z2,
            self.config.temperature,
            columns=columns,
            offset=offset,
            reduction=self.config.reduction,
            hidden_norm=self.config.hidden_norm,
        )
        target = offset + torch.arange(len(z1), device=z1.device)
        return Output(loss, {"accuracy": accuracy(logits, target), "entropy": entropy(logits)})

    def param_groups(self) -> Sequence[ParamGroup]:
        """Weights, and what neither LARS nor the decay touches: biases and normalisation."""
        return weights_and_rest(self)


def _backbone(config: Config) -> Encoder:
    """The backbone with the reference's initialisation where it has such options: gamma 0 at the end of residuals."""
    known = backbone_options(config.encoder.name)
    wanted = {"stem": config.stem, "zero_init_residual": True, "init": "variance_scaling"}
    if config.stem != "7x7" and "stem" not in known:
        raise ValueError(f"backbone {config.encoder.name} has no stem for small pictures; use a resnet or stem = '7x7'")
    options = {name: value for name, value in wanted.items() if name in known}
    return build_encoder(config.encoder.name, width=config.encoder.width, **options)


# --- recipes ------------------------------------------------------------------------------------------------

_LARS = {
    "optimiser": "lars",
    "momentum": 0.9,
    "weight_decay": 1e-6,
    "schedule": "cosine",
    "warmup_epochs": 10,
    "sync_bn": True,
}


def imagenet() -> Recipe:
    """ImageNet-1k, ResNet-50, 1000 epochs at batch 4096: linear top-1 69.3, top-5 89.0 (paper, table 6).

    LARS, lr 0.3 * batch / 256 = 4.8, weight decay 1e-6, 10 epochs of warm-up, then cosine; temperature 0.1.
    """
    train = {**_LARS, "epochs": 1000, "batch_size": 4096, "lr": 0.3, "lr_scaling": "linear"}
    return Recipe(about="ImageNet, ResNet-50, 1000 epochs, batch 4096, LARS", method=Config(), train=train)


def imagenet_100ep() -> Recipe:
    """ImageNet-1k, ResNet-50, 100 epochs at batch 4096: linear top-1 about 64.5 (README of the reference)."""
    return Recipe(
        about="ImageNet, ResNet-50, 100 epochs, batch 4096, LARS",
        method=Config(),
        train={**imagenet().train, "epochs": 100},
    )


def imagenet_sqrt() -> Recipe:
    """ImageNet-1k at a small batch: lr 0.075 * sqrt(batch), which the paper finds better there (appendix B.1)."""
    train = {**_LARS, "epochs": 100, "batch_size": 512, "lr": 0.075, "lr_scaling": "sqrt"}
    return Recipe(about="ImageNet, ResNet-50, 100 epochs, batch 512, LARS, sqrt scaling", method=Config(), train=train)


def imagenet_v2() -> Recipe:
    """The released code's defaults: 3-layer head, weight decay 1e-4, doubled loss (SimCLR v2, arXiv 2006.10029)."""
    return Recipe(
        about="ImageNet, ResNet-50, released defaults: 3-layer head, weight decay 1e-4",
        method=Config(head_layers=3, reduction="reference"),
        train={**imagenet_100ep().train, "weight_decay": 1e-4},
    )


def cifar10() -> Recipe:
    """CIFAR-10, ResNet-18 with a small stem, 1000 epochs at batch 512: linear top-1 about 91 (README).

    lr 1.0 * batch / 256, weight decay 1e-4, temperature 0.5, jitter strength 0.5, no blur.
    """
    config = Config(
        encoder=EncoderConfig(name="resnet18"),
        stem="3x3",
        size=32,
        strength=0.5,
        blur=False,
        temperature=0.5,
        head_layers=3,
        reduction="reference",
    )
    train = {**_LARS, "weight_decay": 1e-4, "epochs": 1000, "batch_size": 512, "lr": 1.0, "lr_scaling": "linear"}
    return Recipe(about="CIFAR-10, ResNet-18, 1000 epochs, batch 512, LARS", method=config, train=train)


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on 64-pixel frames of a small corpus, about a minute on two CPU cores."""
    config = Config(encoder=EncoderConfig(name="resnet18", width=0.25), size=64, strength=0.5, temperature=0.2)
    train = {
        "epochs": 30,
        "batch_size": 64,
        "optimiser": "adamw",
        "lr": 2e-3,
        "weight_decay": 1e-4,
        "warmup_epochs": 1,
        "sync_bn": True,
    }
    return Recipe(about="a small corpus on a CPU: ResNet-18 x 0.25, 64 pixels", method=config, train=train)
