"""MoCHi: MoCo whose hardest negatives are mixed, in embedding space and for every query, into harder ones.

Y. Kalantidis, M. B. Sariyildiz, N. Pion, P. Weinzaepfel, D. Larlus, "Hard Negative Mixing for Contrastive Learning",
NeurIPS 2020, arXiv 2010.01028. No official code was published. The setting (N, s, s') of the paper is ``hardest``,
``mixes`` and ``query_mixes``. With N the keys of the queue nearest to a query q:

    h  = (alpha n_i + (1 - alpha) n_j) / |.|,  alpha ~ U(0, 1)      s  mixes of two of them   (eq. 3)
    h' = (beta q + (1 - beta) n_j) / |.|,      beta ~ U(0, 0.5)     s' mixes with the query   (eq. 4)

are further negatives of q alone, constants, and never enter the queue.
"""

from __future__ import annotations

from dataclasses import replace

from clipmill.models.encoder import Encoder, EncoderConfig
from clipmill.models.method import EpochContext, Method, Output, Recipe, require
from clipmill.models.methods import moco
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.views import Clips


class MoCHi(Method):
    """`clipmill.models.methods.moco.MoCo` with ``negatives = "mochi"``: its options are MoCo's."""

    Config = moco.Config

    def __init__(self, config: moco.Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        require(config, "negatives", config.negatives == "mochi", "mochi; for others pretrain with method moco")
        self.config = config
        self.moco = moco.MoCo(config, encoder)

    @property
    def encoder(self) -> Encoder:
        """The query network without its head."""
        return self.moco.encoder

    def plan(self) -> Clips:
        """Two augmentations of one picture or clip, or of two."""
        return self.moco.plan()

    def forward(self, batch: ClipBatch) -> Output:
        """Loss, and the shares of queries that find their key with and without synthetic negatives."""
        self.moco.step_key = self.step_key
        return self.moco(batch)

    def before_epoch(self, context: EpochContext) -> None:
        """The first epochs are plain MoCo."""
        self.moco.before_epoch(context)

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network may follow again."""
        self.moco.after_step(step, num_steps)


# --- recipes ------------------------------------------------------------------------------------------------


def imagenet() -> Recipe:
    """ImageNet-1k, ResNet-50, 200 epochs, (N, s, s') = (1024, 1024, 128) after 15 epochs: linear top-1 68.0.

    MoCo v2 at the same length: 67.5 (paper, table 3). Warm-up and optimiser as the paper and MoCo v2 have them.
    """
    base = moco.imagenet_v2()
    return Recipe(
        about="ImageNet, ResNet-50, MoCHi (1024, 1024, 128), 200 epochs, batch 256",
        method=replace(base.method, negatives="mochi", hardest=1024, mixes=1024, query_mixes=128, plain_epochs=15),
        train=base.train,
    )


def imagenet_detection() -> Recipe:
    """ImageNet-1k, the setting that transfers best to detection, (256, 512, 0): linear 67.7, VOC AP 57.3 (paper)."""
    base = imagenet()
    return Recipe(
        about="ImageNet, ResNet-50, MoCHi (256, 512, 0), 200 epochs, batch 256",
        method=replace(base.method, hardest=256, mixes=512, query_mixes=0),
        train=base.train,
    )


def imagenet100() -> Recipe:
    """ImageNet-100, queue 16384, (1024, 1024, 128) after 10 epochs: linear top-1 79.0, MoCo v2 78.0 (paper)."""
    base = imagenet()
    return Recipe(
        about="ImageNet-100, ResNet-50, MoCHi (1024, 1024, 128), queue 16384, 200 epochs, batch 128",
        method=replace(base.method, queue_size=16384, plain_epochs=10),
        train={**base.train, "batch_size": 128, "lr": 0.015},
    )


def tiny() -> Recipe:
    """A quarter-width ResNet-18 on 64-pixel frames of a few thousand pictures, two minutes on two CPU cores.

    Crops keep most of the picture: where keys are hard to recognise by content, a young network recognises the new ones
    by their age, as its output drifts, and learns nothing else.
    """
    config = moco.Config(
        encoder=EncoderConfig(name="resnet18", width=0.25),
        num_frames=1,
        size=64,
        min_area=0.6,
        queue_size=512,
        key_momentum=0.99,
        temperature=0.1,
        negatives="mochi",
        hardest=64,
        mixes=16,
        query_mixes=4,
        plain_epochs=8,
    )
    train = {"epochs": 30, "batch_size": 64, "optimiser": "adamw", "lr": 1e-3, "warmup_epochs": 1}
    return Recipe(about="a small corpus on a CPU: ResNet-18 x 0.25, 64 pixels", method=config, train=train)
