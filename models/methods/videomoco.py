"""VideoMoCo: MoCo on clips of which an adversary drops the frames that matter, against keys that fade with age.

T. Pan, Y. Song, T. Yang, W. Jiang, W. Liu, "VideoMoCo: Contrastive Video Representation Learning with Temporally
Adversarial Examples", CVPR 2021, arXiv 2103.05905; in detail as in the released code (tinapan-pt/VideoMoCo).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipmill.models.ema import Follower, teacher_of
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.frame_dropper import FrameScorer, drop_frames
from clipmill.models.heads import mlp
from clipmill.models.losses import accuracy, full_precision, info_nce, unit
from clipmill.models.method import Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.queue import KeyQueue
from clipmill.models.shuffling import grouped, shuffled
from clipmill.models.start import below, fill, trained
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import Blur, Flip, Gray, Jitter, Normalize, Op, RandomResizedCrop, VideoSpec
from clipmill.pipeline.views import Clips, View

Unit = Literal["step", "key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of VideoMoCo."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="r2plus1d_18"))
    """Backbone."""
    start: str = ""
    """Run folder of the first stage, whose networks and queue are the first ones here. Empty: random weights."""
    num_frames: int = 32
    """Frames per clip."""
    stride: int = 1
    """Source frames between two frames of a clip."""
    size: int = 112
    """Crop side in pixels."""
    augment: Literal["v1", "v2"] = "v1"
    """Augmentation of MoCo v1 or v2, with the released code's operators."""
    min_area: float = 0.2
    """Smallest random crop, as a share of the frame's area."""
    per_frame: bool = True
    """Every frame of a clip draws its own colours and mirroring, as released; otherwise they share them. Crops are
    shared either way."""
    mlp: bool = False
    """Two-layer head (MoCo v2) instead of a linear one (v1)."""
    out_dim: int = 128
    """Width of the embedding."""
    queue_size: int = 65536
    """Keys kept as negatives; a multiple of the batch size."""
    key_momentum: float = 0.999
    """Share of itself that the key network keeps at every step."""
    temperature: float = 0.07
    """Temperature of the softmax."""
    decay: float = 0.99999
    """Factor of a negative's similarity per unit of its age; 1 = keys do not fade."""
    decay_unit: Unit = "step"
    """What age is counted in: steps since the key was made, as released; or keys since then, as the paper reads."""
    drop: int = 8
    """Frames that the generator drops from a query; 0 = no generator (the first stage)."""
    hidden: int = 128
    """Twice the width of the generator's LSTM."""
    adversarial_weight: float = 100.0
    """Weight of the generator's loss, the mean absolute change of the embedding."""
    strict: bool = False
    """The generator gets the gradient of its own loss alone; as released, that of the contrastive loss is added."""
    shuffle: bool = True
    """Exchange the rows of all processes before the key network, so that batch statistics give nothing away."""
    groups: int = 1
    """Groups of a process's batch with batch statistics of their own, as if each were a process."""

    def __post_init__(self) -> None:
        require_positive(self, "num_frames", "stride", "size", "out_dim", "queue_size", "temperature", "groups")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "key_momentum", 0 <= self.key_momentum <= 1, "0 to 1")
        require(self, "decay", 0 < self.decay <= 1, "above 0 and at most 1")
        require(self, "decay_unit", self.decay_unit in ("step", "key"), "step or key")
        require(self, "drop", 0 <= self.drop < self.num_frames, f"0 to {self.num_frames - 1}")
        require(self, "hidden", self.hidden > 0 and self.hidden % 2 == 0, "an even number above 0")


class Step(NamedTuple):
    """What one step computed.

    loss: its gradient is the encoder's and the generator's; its value is that of ``loss_d``. loss_d: contrastive.
    loss_g: the generator's. q_full, q_dropped: (N, D) embeddings of the whole and of the dropped clip. dropped: (N, T)
    bool.
    """

    loss: Tensor
    loss_d: Tensor
    loss_g: Tensor
    q_full: Tensor
    q_dropped: Tensor
    logits: Tensor
    dropped: Tensor


class VideoMoCo(Method):
    """MoCo whose query has lost frames chosen by a generator, which is trained to change the query's embedding.

    Both networks take their step from one backward pass, so that gradients are averaged over processes as in any
    other method: the gradient of the generator's loss is computed ahead, down to the scores, without touching the
    encoder's weights.

    Buffers: ``age`` (K,) int64 of the queue's keys.
    """

    Config = Config
    age: Tensor

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        trunk = encoder or build_encoder(config.encoder.name, width=config.encoder.width)
        trunk.spec = input_spec(self.plan().views[0])
        hidden = [trunk.dim] if config.mlp else []
        self.query = nn.Sequential(trunk, mlp([trunk.dim, *hidden, config.out_dim]))
        self.key = teacher_of(self.query)
        self.queue = KeyQueue(config.out_dim, config.queue_size, whole_writes=True)
        self.register_buffer("age", torch.zeros(config.queue_size, dtype=torch.int64))
        if config.start:
            tensors = trained(config.start)
            for name in ("query", "key", "queue"):
                fill(getattr(self, name), below(tensors, f"{name}."), config.start)
        self.generator = None
        if config.drop:
            self.generator = FrameScorer(3 * config.num_frames, config.num_frames, config.size, config.hidden)
        self._follower = Follower()

    @property
    def encoder(self) -> Encoder:
        """The query network without its head."""
        trunk = self.query[0]
        assert isinstance(trunk, Encoder)
        return trunk

    def plan(self) -> Clips:
        """Two augmentations of one clip; videos shorter than a clip are left out."""
        config = self.config
        augment = augmentation(config.size, config.augment, config.min_area, config.per_frame)
        view = View(name="query", num_frames=config.num_frames, stride=config.stride, augment=augment)
        return Clips(views=(view, replace(view, name="key")), shared=True, short="skip")

    def forward(self, batch: ClipBatch) -> Output:
        """The contrastive loss; the generator's, and the share of queries whose own key is the nearest."""
        query, key = batch.video["query"], batch.video["key"]
        order = dist.permutation(len(query) * dist.world(), self.step_key, "shuffle")
        step = self.contrast(query, key, order if self.config.shuffle else None)
        return Output(step.loss, {"loss_g": step.loss_g.detach(), "accuracy": accuracy(step.logits, 0)})

    def contrast(self, x_q: Tensor, x_k: Tensor, order: Tensor | None) -> Step:
        """One step of N local clips (N, 3, T, H, W); pushes the keys of all processes. ``order`` as in MoCo."""
        config = self.config
        if self.generator is None:
            q = self._embed(self.query, x_q)
            loss, logits = self.classify(q, self._keys(x_k, order))
            untouched = torch.zeros(x_q.shape[0], x_q.shape[2], dtype=torch.bool, device=x_q.device)
            return Step(loss, loss, torch.zeros_like(loss), q, q, logits, untouched)
        scores = grouped(self.generator, x_q, config.groups)
        seen = scores.detach().requires_grad_() if config.strict else scores
        x_dropped, dropped = drop_frames(x_q, seen, config.drop)
        with torch.no_grad():  # only the generator's loss reads it, and the encoder gets no gradient of that
            q_full = self._embed(self.query, x_q)
        q_dropped = self._embed(self.query, x_dropped)
        loss_d, logits = self.classify(q_dropped, self._keys(x_k, order))
        loss_g = adversarial_loss(q_dropped, q_full, config.adversarial_weight)
        loss = loss_d
        if scores.requires_grad:
            (pull,) = torch.autograd.grad(loss_g, seen, retain_graph=True)
            surrogate = (scores * pull).sum()  # its gradient is that of loss_g
            loss = loss_d + (surrogate - surrogate.detach())
        return Step(loss, loss_d, loss_g, q_full, q_dropped, logits, dropped)

    def classify(self, q_ND: Tensor, k_ND: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE of unit rows against the faded keys: loss and logits (N, 1 + K); pushes the keys of all processes.

        Fading scales the similarity, inside the exponential. Keys pushed in this step have age 1 in the next one, and
        one more in every later step; in units of keys, the n keys of a push have ages n to 1 and then n more in every
        step. Those of the beginning start at 0.
        """
        queue, config = self.queue, self.config
        weights = (config.decay ** self.age.double()).to(full_precision(q_ND).dtype)  # 1 - decay is too fine for fp32
        loss, logits = info_nce(q_ND, k_ND, queue.keys.clone(), config.temperature, weights_K=weights)
        columns = queue.push(dist.gather(k_ND))
        count = len(columns)
        per_key = config.decay_unit == "key"
        self.age.add_(count if per_key else 1)
        self.age[columns] = torch.arange(count, 0, -1, device=columns.device) if per_key else torch.ones_like(columns)
        return loss, logits

    @torch.no_grad()
    def _keys(self, x_k: Tensor, order: Tensor | None) -> Tensor:
        self._follower.follow(self.key, self.query, self.config.key_momentum)
        return shuffled(lambda rows: self._embed(self.key, rows), x_k, order)

    def _embed(self, network: nn.Module, x: Tensor) -> Tensor:
        return unit(grouped(network, x, self.config.groups))

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network may follow again."""
        self._follower.renew()


def adversarial_loss(q_dropped_ND: Tensor, q_full_ND: Tensor, weight: float = 100.0) -> Tensor:
    """-weight times the mean absolute difference of two sets of unit rows; at least -2 * weight / sqrt(D)."""
    return -weight * (q_dropped_ND - q_full_ND).abs().mean()


def augmentation(size: int, version: Literal["v1", "v2"], min_area: float, per_frame: bool) -> VideoSpec:
    """The released code's augmentation: one crop per clip, then kornia's operators, by default on every frame alone.

    v2 tosses its coins for jitter and blur once per batch, and v1 and v2 draw the order of the jitter once per batch.
    Crops are interpolated without antialiasing, as torchvision's video transforms did.
    """
    jitter = Jitter(hue=0.4, p=1.0, maths="kornia", order="batch")
    gray, flip = Gray(weights=(0.299, 0.587, 0.114)), Flip()
    ops: tuple[Op, ...] = (gray, jitter, flip, Normalize())
    if version == "v2":
        taps = int(0.1 * size) // 2 * 2 + 1
        ops = (
            replace(jitter, hue=0.1, p=0.8, coin="batch"),
            gray,
            Blur(kernel=taps, coin="batch", strength="batch"),
            flip,
            Normalize(),
        )
    crop = RandomResizedCrop(scale=(min_area, 1.0))
    return VideoSpec(size=size, crop=crop, ops=ops, per_frame=per_frame, one_crop=True, antialias=False)


# --- recipes ------------------------------------------------------------------------------------------------


def _recipe(about: str, method: Config, milestones: tuple[int, ...], batch_size: int = 32, lr: float = 0.005) -> Recipe:
    return Recipe(
        about=about,
        method=method,
        train={
            "epochs": 100,
            "batch_size": batch_size,
            "optimiser": "sgd",
            "lr": lr,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "step",
            "schedule_per": "epoch",
            "milestones": milestones,
        },
    )


def k400_first() -> Recipe:
    """First stage on Kinetics-400: R(2+1)D-18 alone, 100 epochs at full rate (the README; its code is not released).

    Presumably plain MoCo on whole clips; whether keys faded is not known, here they do not.
    """
    return _recipe(
        "Kinetics-400, R(2+1)D-18, 32 frames, first stage without generator, 100 epochs, batch 32",
        Config(drop=0, decay=1.0),
        (),
    )


def k400() -> Recipe:
    """Second stage: UCF101 78.7, HMDB51 49.2 (paper's listings), UCF101 82.5 (README), all fine-tuned R(2+1)D-18.

    Epochs 100 to 199 of the released command, whose rate falls at 120 and 160. Give the first stage with --start.
    """
    return _recipe(
        "Kinetics-400, R(2+1)D-18, 32 frames, second stage, 100 epochs, batch 32 (--start: a run of k400_first)",
        Config(),
        (20, 60),
    )


def k400_r3d_first() -> Recipe:
    """`k400_first` with a 3D-ResNet-18."""
    return _recipe(
        "Kinetics-400, R3D-18, 32 frames, first stage without generator, 100 epochs, batch 32",
        Config(encoder=EncoderConfig(name="r3d_18"), drop=0, decay=1.0),
        (),
    )


def k400_r3d() -> Recipe:
    """`k400` with a 3D-ResNet-18: UCF101 74.1, HMDB51 43.6 after fine-tuning (paper's listings)."""
    return _recipe(
        "Kinetics-400, R3D-18, 32 frames, second stage, 100 epochs, batch 32 (--start: a run of k400_r3d_first)",
        Config(encoder=EncoderConfig(name="r3d_18")),
        (20, 60),
    )


def k400_batch256() -> Recipe:
    """`k400` with the batch of the journal extension's README: 256 clips, rate 0.04."""
    return _recipe(
        "Kinetics-400, R(2+1)D-18, 32 frames, second stage, 100 epochs, batch 256 (--start: a first stage)",
        Config(),
        (20, 60),
        batch_size=256,
        lr=0.04,
    )


def tiny() -> Recipe:
    """An eighth-width R3D-18 on 8 frames of 64 pixels of a small corpus, about three minutes on two CPU cores.

    Both networks from the start, without a first stage; colours are drawn per clip, and crops keep most of the picture.
    """
    return Recipe(
        about="a small corpus on a CPU: R3D-18 x 0.125, 8 frames, 64 pixels",
        method=Config(
            encoder=EncoderConfig(name="r3d_18", width=0.125),
            num_frames=8,
            stride=4,
            size=64,
            augment="v2",
            min_area=0.6,
            per_frame=False,
            mlp=True,
            queue_size=128,
            key_momentum=0.9,
            temperature=0.1,
            drop=2,
        ),
        train={"epochs": 30, "batch_size": 32, "optimiser": "adamw", "lr": 2e-3, "warmup_epochs": 1},
    )
