"""XDC and its siblings SDC, MDC and CDC: classify each clip into the clusters of its sound, and the other way round.

H. Alwassel, D. Mahajan, B. Korbar, L. Torresani, B. Ghanem, D. Tran, "Self-Supervised Learning by Cross-Modal
Audio-Video Clustering", NeurIPS 2020, arXiv 1911.12667. No training code was released; the mechanics of a round are
DeepCluster's (M. Caron et al., ECCV 2018, arXiv 1807.05520).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models import clustering
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.losses import accuracy, full_precision
from clipmill.models.method import (
    EpochContext,
    Method,
    Output,
    ParamGroup,
    Recipe,
    audio_input_spec,
    input_spec,
    require,
    require_positive,
    weights_and_rest,
)
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.sound_spec import AudioSpec, LogMel
from clipmill.pipeline.spec import Flip, Normalize, ResizedRandomCrop, VideoSpec, eval_spec
from clipmill.pipeline.views import Clips, Silence, Uniform, View

Variant = Literal["xdc", "sdc", "mdc", "cdc"]
Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, ...] = ("video", "audio")

TARGETS: dict[Variant, dict[Modality, tuple[str, ...]]] = {  # whose clusters each encoder learns, one head for each
    "sdc": {"video": ("video",), "audio": ("audio",)},
    "mdc": {"video": ("video", "audio"), "audio": ("audio", "video")},
    "cdc": {"video": ("both",), "audio": ("both",)},
    "xdc": {"video": ("audio",), "audio": ("video",)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of XDC, SDC, MDC and CDC."""

    variant: Variant = "xdc"
    """Whose clusters supervise whom. xdc: the other modality's. sdc: one's own. mdc: both, by two heads. cdc: those of
    both features joined."""
    clusters: int = 64
    """Clusters of each clustering."""
    epochs_per_round: int = 1
    """Epochs from one clustering to the next."""
    iterations: int = 20
    """Iterations of k-means."""
    pca_dim: int = 0
    """Whiten the features on this many principal axes and scale them to length 1 before clustering; 0 = neither."""
    unit_joined: bool = True
    """cdc: scale each modality's features to length 1 before they are joined."""
    balance: Literal["weights", "video", "audio", "none"] = "weights"
    """Against one cluster that swallows all. weights: a clip counts inversely to the size of its cluster, for each
    encoder by itself. video, audio: epochs are drawn uniformly over the clusters that this encoder learns."""
    second_weight: float = 1.0
    """mdc: weight of the head that learns the other modality's clusters."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="r2plus1d_18_vmz"))
    """Backbone of the pictures."""
    audio_encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="audio_resnet18"))
    """Backbone of the sound."""
    num_frames: int = 8
    """Frames per clip."""
    fps: float = 30.0
    """Frames per second of a clip."""
    size: int = 224
    """Crop side in pixels."""
    resize: tuple[int, int] = (256, 320)
    """Range of the short side before the random crop."""
    audio_s: float = 1.0
    """Seconds of sound, from the first frame of the clip on."""
    audio_jitter_s: float = 0.0
    """The sound begins up to this much earlier or later than the clip."""
    mels: int = 40
    """Mel bands."""
    silence: Silence = "skip"
    """Records without sound or with silence are left out (skip), silent windows drawn again (redraw), or zeros (zero);
    keep leaves out only records without sound. Silent records would share one cluster."""

    def __post_init__(self) -> None:
        require_positive(self, "epochs_per_round", "iterations", "num_frames", "fps", "size", "audio_s", "mels")
        require(self, "clusters", self.clusters >= 2, "at least 2")
        require(self, "pca_dim", self.pca_dim >= 0, "0 or a number of axes")
        require(self, "variant", self.variant in TARGETS, f"one of {', '.join(TARGETS)}")


class Xdc(Method):
    """Rounds of clustering the corpus and of learning its clusters.

    Labels belong to records: they are kept by the record's uid, whatever the order of clips. They are buffers, so that
    a run can be resumed in the middle of a round.
    """

    Config = Config
    rank_invariant = True
    uids: Tensor
    rows: Tensor
    labels: Tensor
    weights: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.video = build_encoder(config.encoder.name, width=config.encoder.width)
        self.audio = build_encoder(config.audio_encoder.name, width=config.audio_encoder.width)
        clip, sound = self.plan().views
        self.video.spec = input_spec(clip)
        self.audio.spec, self.audio.audio_view = audio_input_spec(sound), sound
        targets = TARGETS[config.variant]
        self.sets = tuple(dict.fromkeys(name for modality in MODALITIES for name in targets[modality]))
        self.heads = nn.ModuleDict()
        for modality in MODALITIES:
            width = self.encoder_of(modality).dim
            self.heads[modality] = nn.ModuleList(nn.Linear(width, config.clusters) for _ in targets[modality])
        self.renew_heads()
        self.register_buffer("uids", torch.empty(0, dtype=torch.int64))  # (N,) ascending
        self.register_buffer("rows", torch.empty(0, dtype=torch.int64))  # (N,) record number of each of them
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))  # (sets, N) by record number
        self.register_buffer("weights", torch.ones(len(self.sets), config.clusters))

    @property
    def encoder(self) -> Encoder:
        """The network of the pictures."""
        return self.video

    def encoders(self) -> Mapping[str, Encoder]:
        """Both networks."""
        return {"encoder": self.video, "audio": self.audio}

    def encoder_of(self, modality: Modality) -> Encoder:
        """The network of one modality."""
        return self.video if modality == "video" else self.audio

    def plan(self) -> Clips:
        """One clip with scale jitter and flip, and the sound that begins with it."""
        config = self.config
        crop = ResizedRandomCrop(size=config.size, resize=config.resize)
        augment = VideoSpec(size=config.size, crop=crop, ops=(Flip(), Normalize()))
        clip = View(name="clip", num_frames=config.num_frames, fps=config.fps, augment=augment)
        mel = LogMel(mels=config.mels, n_fft=1024, win=320, mean=-5.3688107, std=4.410007)
        sound = View(name="sound", modality="audio", duration_s=config.audio_s, augment=AudioSpec(logmel=mel))
        views = (clip, sound)
        return Clips(views=views, short="repeat", audio_jitter_s=config.audio_jitter_s, silence=config.silence)

    def still(self) -> Uniform:
        """What is clustered: the middle of every record, nothing random."""
        clip, sound = self.plan().views
        resize = self.config.resize[0]
        clip = replace(clip, augment=eval_spec(self.config.size, resize))
        return Uniform(views=(clip, sound), short="repeat", silence=self.config.silence)

    def forward(self, batch: ClipBatch) -> Output:
        """Sum of both encoders' losses, and how often each head is right."""
        features: dict[Modality, Tensor] = {
            "video": self.video(batch.video["clip"]),
            "audio": self.audio(batch.audio["sound"]),
        }
        labels = self.labels_of(batch.uid)
        losses, metrics = [], {}
        for modality in MODALITIES:
            targets = TARGETS[self.config.variant][modality]
            heads = self.heads[modality]
            assert isinstance(heads, nn.ModuleList)
            logits = [head(features[modality]) for head in heads]
            answers = [labels[self.sets.index(name)] for name in targets]
            weights = [self.weights[self.sets.index(name)] for name in targets]
            losses.append(cluster_loss(logits, answers, weights, self.config.second_weight))
            metrics[f"loss_{modality}"] = losses[-1].detach()
            metrics[f"accuracy_{modality}"] = accuracy(logits[0], answers[0])
        return Output(torch.stack(losses).sum(), metrics)

    def labels_of(self, uid: Tensor) -> Tensor:
        """(sets, B) clusters of the records with these uids (B,)."""
        if not self.uids.numel():
            raise ValueError("there are no clusters yet; call before_epoch before the first batch, as training does")
        place = torch.searchsorted(self.uids, uid).clamp(max=len(self.uids) - 1)
        return self.labels[:, self.rows[place]]

    def param_groups(self) -> Sequence[ParamGroup]:
        """Networks on the schedule; heads, which are new in every round, at the peak rate without decay."""
        heads = ParamGroup(params=list(self.heads.parameters()), fixed_lr=True, weight_decay=0.0)
        return [*weights_and_rest(self.video), *weights_and_rest(self.audio), heads]

    # --- rounds -------------------------------------------------------------------------------------------------

    def before_epoch(self, context: EpochContext) -> None:
        """Cluster again if a round begins; draw the epoch's records if they are to be balanced."""
        if context.epoch % self.config.epochs_per_round == 0 or not self.uids.numel():
            seed = int(torch.randint(1234, ()))  # DeepCluster's range; another one in every round
            self._cluster(context, seed)
            self.renew_heads()
            context.renewed += list(self.heads.parameters())
        if self.config.balance in MODALITIES:
            labels = self.labels[self.sets.index(TARGETS[self.config.variant][self.config.balance][0])]
            rng = np.random.RandomState(int(torch.randint(1 << 31, ())))
            context.picks = clustering.balanced_epoch(labels.cpu().numpy(), context.num_records, rng)

    def _cluster(self, context: EpochContext, seed: int) -> None:
        rows = context.collect(self.still(), self._describe)
        found = None
        if dist.is_main():  # one process clusters: others might round differently
            found = self._label({name: rows[name].numpy() for name in MODALITIES}, seed)
        labels, inertia = next(answer for answer in dist.gather_objects(found) if answer is not None)
        before = self.labels.cpu().numpy()
        for number, name in enumerate(self.sets):
            context.log[f"kmeans_{name}"] = inertia[number]
            context.log[f"clusters_{name}"] = float(len(np.unique(labels[number])))
            if before.shape == labels.shape:
                context.log[f"nmi_{name}"] = clustering.nmi(before[number], labels[number])
        device = self.weights.device
        order = torch.argsort(rows["uid"])
        self.uids, self.rows = rows["uid"][order].to(device), order.to(device)
        self.labels = torch.from_numpy(labels).to(device)
        if self.config.balance == "weights":
            shares = np.stack([clustering.balance_weights(row, self.config.clusters) for row in labels])
            self.weights.copy_(torch.from_numpy(shares))

    def _describe(self, batch: ClipBatch) -> dict[str, Tensor]:
        video, audio = self.video(batch.video["clip"]), self.audio(batch.audio["sound"])
        return {"uid": batch.uid, "video": video.float(), "audio": audio.float()}

    def _label(self, features: Mapping[str, np.ndarray], seed: int) -> tuple[np.ndarray, list[float]]:
        """(sets, N) labels, and the k-means loss of each set per sample."""
        config, labels, inertia = self.config, [], []
        for name in self.sets:
            x = joined(features["video"], features["audio"], config.unit_joined) if name == "both" else features[name]
            if config.pca_dim:
                x = clustering.unit(clustering.whiten(x, config.pca_dim))
            answer = clustering.kmeans(x, config.clusters, iterations=config.iterations, seed=seed)
            labels.append(answer.labels)
            inertia.append(answer.inertia / len(x))
        return np.stack(labels), inertia

    def renew_heads(self) -> None:
        """Draw all heads anew: weights N(0, 0.01), bias 0. Cluster numbers mean nothing from one round to the next."""
        with torch.no_grad():
            for head in self.heads.modules():
                if isinstance(head, nn.Linear):
                    head.weight.normal_(0.0, 0.01)
                    head.bias.zero_()


def cluster_loss(
    logits: Sequence[Tensor], labels: Sequence[Tensor], weights: Sequence[Tensor], second_weight: float = 1.0
) -> Tensor:
    """Loss of one encoder: mean over the batch of each head's weighted cross-entropy, summed over its heads.

    logits: (B, k) of each head. labels: (B,) of each. weights: (k,) of each, ones for the plain mean. The second head
    counts ``second_weight``.
    """
    with torch.autocast(logits[0].device.type, enabled=False):
        total = logits[0].new_zeros((), dtype=full_precision(logits[0]).dtype)
        for number, (scores, target, weight) in enumerate(zip(logits, labels, weights, strict=True)):
            each = F.cross_entropy(full_precision(scores), target, reduction="none")
            term = (each * weight[target].to(each)).mean()
            total = total + (term if number == 0 else second_weight * term)
        return total


def joined(video_ND: np.ndarray, audio_ND: np.ndarray, unit: bool) -> np.ndarray:
    """Features of both modalities side by side, each scaled to length 1 first if ``unit``."""
    parts = [clustering.unit(x) if unit else x for x in (video_ND, audio_ND)]
    return np.concatenate(parts, 1)


# --- recipes ------------------------------------------------------------------------------------------------


def _kinetics(variant: Variant) -> Recipe:
    """The ablation setting. Numbers of rounds and rates were not published and are ours."""
    return Recipe(
        about=f"Kinetics-400, {variant.upper()}, R(2+1)D-18 and ResNet-18, 8 frames, 64 clusters, 10 rounds",
        method=Config(variant=variant, epochs_per_round=5),
        train={
            "epochs": 50,
            "batch_size": 256,
            "optimiser": "sgd",
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 1e-5,
            "schedule": "constant",
            "warmup_epochs": 1,
            "amp": "fp16",
        },
    )


def xdc() -> Recipe:
    """XDC on Kinetics, 8 frames. Published with 65 M videos and 32 frames: UCF101 95.5, HMDB51 68.9 (model card)."""
    return _kinetics("xdc")


def sdc() -> Recipe:
    """Single-modality deep clustering, the baseline: each encoder learns its own clusters."""
    return _kinetics("sdc")


def mdc() -> Recipe:
    """Multi-head deep clustering: each encoder learns its own clusters and the other one's."""
    return _kinetics("mdc")


def cdc() -> Recipe:
    """Concatenation deep clustering: both encoders learn the clusters of the joined features."""
    return _kinetics("cdc")


def audioset() -> Recipe:
    """XDC on AudioSet, 32 frames: UCF101 93.0, HMDB51 63.7 (model card of HumamAlwassel/XDC)."""
    recipe = _kinetics("xdc")
    return Recipe(
        about="AudioSet, XDC, R(2+1)D-18 and ResNet-18, 32 frames, 224 pixels, 256 clusters",
        method=replace(recipe.method, num_frames=32, audio_s=2.0, clusters=256),
        train=recipe.train,
    )


def _tiny(variant: Variant) -> Recipe:
    return Recipe(
        about=f"a small corpus on a CPU: {variant.upper()}, R3D-18 x 0.125, ResNet-18 x 0.25, 40 pixels, 1.4 s",
        method=Config(
            variant=variant,
            clusters=16,
            epochs_per_round=4,
            pca_dim=16,
            encoder=EncoderConfig(name="r3d_18", width=0.125),
            audio_encoder=EncoderConfig(name="audio_resnet18", width=0.25),
            fps=6.0,
            size=40,
            resize=(42, 50),
            audio_s=1.4,
            audio_jitter_s=0.2,
            mels=64,
        ),
        train={
            "epochs": 40,
            "batch_size": 32,
            "optimiser": "adamw",
            "lr": 1e-3,
            "schedule": "constant",
            "warmup_epochs": 1,
        },
    )


def tiny() -> Recipe:
    """XDC with narrow networks on 8 frames of 40 pixels and 1.4 s of sound; minutes on two CPU cores."""
    return _tiny("xdc")


def tiny_sdc() -> Recipe:
    """The same for SDC."""
    return _tiny("sdc")


def tiny_mdc() -> Recipe:
    """The same for MDC."""
    return _tiny("mdc")


def tiny_cdc() -> Recipe:
    """The same for CDC."""
    return _tiny("cdc")
