"""CrissCross: two moments of a video in picture and sound, each predicted from every other.

P. Sarkar, A. Etemad, "Self-Supervised Audio-Visual Representation Learning with Relaxed Cross-Modal Synchronicity",
AAAI 2023, arXiv 2111.05329. Where paper and released code differ (the pictures lie anywhere inside the window of the
sound, the blur is vertical with a fixed sigma, cutout multiplies) this follows the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.heads import mlp
from clipmill.models.losses import full_precision, unit
from clipmill.models.method import (
    Method,
    Output,
    ParamGroup,
    Recipe,
    audio_input_spec,
    input_spec,
    require,
    require_positive,
)
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.sound_spec import AudioSpec, LogMel, Mask, MelCrop, Volume
from clipmill.pipeline.sound_views import Times, TwoMoments
from clipmill.pipeline.spec import Blur, Cutout, Flip, Gray, Jitter, Normalize, Op, RandomResizedCrop, VideoSpec
from clipmill.pipeline.views import Silence, View

INTRA = ("v1v2", "a1a2")
SYNC = ("v1a1", "v2a2")
ASYNC = ("v1a2", "a1v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of CrissCross."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="r2plus1d_18_avid"))
    """Backbone of the pictures."""
    audio_encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="audio_resnet18"))
    """Backbone of the sound."""
    num_frames: int = 8
    """Frames per clip."""
    fps: float = 16.0
    """Frames per second of a clip."""
    size: int = 112
    """Crop side in pixels."""
    min_area: float = 0.08
    """Smallest random crop, as a share of the frame's area."""
    audio_s: float = 2.0
    """Seconds of sound per window."""
    mels: int = 80
    """Mel bands."""
    mask_bands: int = 10
    """Each of two frequency masks is shorter than this."""
    mask_frames: int = 20
    """Each of two time masks is shorter than this."""
    crop_bands: tuple[float, float] = (0.6, 1.5)
    """Height of the random resize crop of a spectrogram, relative to it."""
    crop_time: tuple[float, float] = (0.6, 1.5)
    """Width of the same crop."""
    times: Times = "overlapped"
    """How the two moments lie: see `clipmill.pipeline.sound_views.TwoMoments`."""
    silence: Silence = "skip"
    """Records without sound or with silence are left out (skip), silent windows drawn again (redraw), or zeros (zero);
    keep leaves out only records without sound."""
    layers: int = 3
    """Layers of a projector, 2 or 3."""
    proj_dim: int = 2048
    """Width of a projector."""
    predictor_dim: int = 512
    """Hidden width of a predictor."""
    sound_only: bool = False
    """Learn from the sound alone: the records need no pictures, and the only term is that within the sound."""
    intra: bool = True
    """Terms within a modality, across time."""
    sync: bool = True
    """Terms across modalities at one time."""
    asynchronous: bool = True
    """Terms across modalities and times."""
    video_weight: float = 1.0
    """Of the term within the pictures."""
    audio_weight: float = 1.0
    """Of the term within the sound."""
    sync_weight: float = 1.0
    """Of the synchronous terms."""
    async_weight: float = 1.0
    """Of the asynchronous terms."""
    pre_norm: bool = False
    """Scale projections to length 1 before the predictors, and as targets."""
    predictor_lr_scale: float = 10.0
    """Learning rate of the predictors, constant, as a multiple of the peak rate."""

    def __post_init__(self) -> None:
        require_positive(self, "num_frames", "fps", "size", "audio_s", "mels", "proj_dim", "predictor_dim")
        require_positive(self, "mask_bands", "mask_frames", "predictor_lr_scale")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "layers", self.layers in (2, 3), "2 or 3")
        others = not self.sound_only and (self.sync or self.asynchronous)
        require(self, "intra", self.intra or others, "on, if no other family is")


class CrissCross(Method):
    """SimSiam's loss over the pairs of four views: pictures and sound at two moments.

    A predictor serves targets of both modalities. Every view is a forward pass of its own, so batch statistics are
    never shared between views.
    """

    Config = Config
    rank_invariant = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        first = {view.name[0]: view for view in self.plan().views if view.name.endswith("1")}
        self.trunks, self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for side, view in first.items():
            backbone = config.encoder if side == "v" else config.audio_encoder
            trunk = build_encoder(backbone.name, width=backbone.width)
            if side == "v":
                trunk.spec = input_spec(view)
            else:
                trunk.spec, trunk.audio_view = audio_input_spec(view), view
            self.trunks[side] = trunk
            self.projectors[side] = projector(trunk.dim, config.proj_dim, config.layers)
            self.predictors[side] = mlp([config.proj_dim, config.predictor_dim, config.proj_dim], norm="affine")

    @property
    def encoder(self) -> Encoder:
        """The network of the pictures; of the sound where there is nothing else."""
        return next(iter(self.encoders().values()))

    def encoders(self) -> Mapping[str, Encoder]:
        """The networks of pictures and sound."""
        names = ["encoder", "audio"] if "v" in self.trunks else ["encoder"]
        return dict(zip(names, cast(Iterable[Encoder], self.trunks.values()), strict=True))

    def plan(self) -> TwoMoments:
        """Two clips and two windows of sound, each with random augmentation of its own."""
        config = self.config
        video = View(name="v1", num_frames=config.num_frames, fps=config.fps, augment=picture_augment(config))
        audio = View(name="a1", modality="audio", duration_s=config.audio_s, augment=sound_augment(config))
        return TwoMoments(
            video=() if config.sound_only else (video, replace(video, name="v2")),
            audio=(audio, replace(audio, name="a2")),
            times=config.times,
            silence=config.silence,
        )

    def forward(self, batch: ClipBatch) -> Output:
        """Loss; the mean of each family's terms; and how far projections spread (1 = evenly, 0 = collapsed)."""
        inputs = {**batch.video, **batch.audio}
        z = {name: self.projectors[name[0]](self.trunks[name[0]](x)) for name, x in inputs.items()}
        loss, terms = crisscross_loss(z, self.predictors, self.config)
        metrics = {
            family: torch.stack([terms[name].detach() for name in names]).mean()
            for family, names in (("intra", INTRA), ("sync", SYNC), ("async", ASYNC))
        }
        for side in self.trunks:
            rows = unit(z[f"{side}1"].detach())
            metrics[f"spread_{side}"] = rows.std(0, correction=0).mean() * rows.shape[1] ** 0.5
        return Output(loss, metrics)

    def param_groups(self) -> list[ParamGroup]:
        """Encoder with projector on the schedule, predictor at a constant rate; for each modality."""
        groups = []
        for side, trunk in self.trunks.items():
            groups.append(ParamGroup(params=[*trunk.parameters(), *self.projectors[side].parameters()]))
            predictor = list(self.predictors[side].parameters())
            groups.append(ParamGroup(params=predictor, lr_scale=self.config.predictor_lr_scale, fixed_lr=True))
        return groups


def projector(dim: int, out: int, layers: int = 3) -> nn.Sequential:
    """``layers`` times Linear and BN, with ReLU between them; (B, dim) -> (B, out)."""
    return mlp([dim] + [out] * layers, norm="affine", last_norm="affine")


def crisscross_loss(
    z: Mapping[str, Tensor], predictors: nn.ModuleDict, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of projections z {v1, v2, a1, a2: (N, D)}, and its six terms before their weights.

    D(p, z) = -mean cos(p, stop_grad(z)); L(x, y) = D(p_x, z_y) / 2 + D(p_y, z_x) / 2; the loss is the weighted sum of
    the terms of all enabled families over their number (2 per family), whatever the weights. A term of a family that is
    off, or of a view that is not there, is 0 and is not counted.
    """
    with torch.autocast(next(iter(z.values())).device.type, enabled=False):
        z = {name: full_precision(value) for name, value in z.items()}
        if config.pre_norm:
            z = {name: unit(value) for name, value in z.items()}
        p = {name: predictors[name[0]](value) for name, value in z.items()}
        weights: dict[str, float] = dict(zip(INTRA, (config.video_weight, config.audio_weight), strict=True))
        weights |= dict.fromkeys(SYNC, config.sync_weight) | dict.fromkeys(ASYNC, config.async_weight)
        families = ((INTRA, config.intra), (SYNC, config.sync), (ASYNC, config.asynchronous))
        enabled = [name for names, on in families if on for name in names]
        used = [name for name in enabled if name[:2] in z and name[2:] in z]
        zero = next(iter(z.values())).new_zeros(())
        terms: dict[str, Tensor] = {str(name): zero for name in weights}
        for name in used:
            one, other = name[:2], name[2:]
            terms[name] = (_distance(p[one], z[other]) + _distance(p[other], z[one])) / 2
        return torch.stack([weights[name] * terms[name] for name in used]).sum() / len(used), terms


def _distance(p_ND: Tensor, z_ND: Tensor) -> Tensor:
    return -F.cosine_similarity(p_ND, z_ND.detach(), dim=1, eps=1e-8).mean()


# --- what a view does to pictures and sound -----------------------------------------------------------------


def picture_augment(config: Config) -> VideoSpec:
    """Crop, flip, jitter always, grey, vertical blur, normalise, cutout; one draw for all frames of a clip."""
    taps = config.size // 20 * 2 + 1
    ops: list[Op] = [Flip(), Jitter(hue=0.2, p=1.0), Gray()]
    if taps > 1:
        ops.append(Blur(p=0.5, sigma=(2.0, 2.0), kernel=taps, vertical_only=True))
    crop = RandomResizedCrop(scale=(config.min_area, 1.0))
    return VideoSpec(size=config.size, crop=crop, ops=(*ops, Normalize(), Cutout(max_side=20)))


def front_end(mels: int) -> LogMel:
    """The released log-mel front end: 64 ms windows, 10 ms hop, Slaney bands up to 8 kHz, fixed normalisation."""
    return LogMel(mels=mels, power_floor=2.2e-16, mean=-5.3688107, std=4.410007)


def sound_augment(config: Config) -> AudioSpec:
    """Volume, log-mel, two frequency and two time masks, random resize crop."""
    ops = (
        Volume(),
        Mask(axis="frequency", longest=config.mask_bands),
        Mask(axis="time", longest=config.mask_frames),
        MelCrop(bands=config.crop_bands, time=config.crop_time),
    )
    return AudioSpec(logmel=front_end(config.mels), ops=ops)


# --- recipes ------------------------------------------------------------------------------------------------


def k400() -> Recipe:
    """Kinetics-400, 100 epochs of 5 draws per video, batch 2048 (released configuration).

    Published with this setting: UCF101 91.5, HMDB51 64.7 (fine-tuned), ESC-50 86.8, DCASE 96.0 (model cards of
    pritamqu/CrissCross). The released code steps its schedule after the optimiser, so that the first step takes a rate
    of 1e-3 and the schedule lags by one; here the schedule starts at step 0.
    """
    return Recipe(
        about="Kinetics-400, R(2+1)D-18 and ResNet-18, 8 frames, 2 s of sound, 100 epochs, batch 2048",
        method=Config(),
        train={
            "epochs": 100,
            "repeat": 5,
            "batch_size": 2048,
            "optimiser": "larc_adam",
            "lr": 2e-4,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "warmup_epochs": 2,
            "lr_end": 0.5,
            "amp": "fp16",
            "sync_bn": True,
        },
    )


def tiny_sound() -> Recipe:
    """The sound half alone, for recordings without pictures such as words: windows of 0.4 s, 80 bands.

    Both views show one window: a moment later another part of the word is heard.
    """
    recipe = tiny()
    return Recipe(
        about="a small corpus of recordings on a CPU: ResNet-18 x 0.25, 0.4 s of sound, no pictures",
        method=replace(
            recipe.method,
            sound_only=True,
            times="same",
            audio_s=0.4,
            mels=80,
            mask_bands=8,
        ),
        train=recipe.train,
    )


def tiny() -> Recipe:
    """Narrow networks on 8 frames of 40 pixels and 1.4 s of sound of a small corpus; minutes on two CPU cores.

    Crops keep most of picture and sound, or little motion and pitch stays in such small inputs. Predictors that learn
    faster than the encoders keep the projections from shrinking to a constant.
    """
    return Recipe(
        about="a small corpus on a CPU: R3D-18 x 0.125 and ResNet-18 x 0.25, 8 frames, 40 pixels, 1.4 s of sound",
        method=Config(
            encoder=EncoderConfig(name="r3d_18", width=0.125),
            audio_encoder=EncoderConfig(name="audio_resnet18", width=0.25),
            fps=6.0,
            size=40,
            min_area=0.6,
            audio_s=1.4,
            mels=64,
            mask_bands=4,
            mask_frames=8,
            crop_bands=(0.9, 1.1),
            crop_time=(0.8, 1.25),
            proj_dim=256,
            predictor_dim=64,
            predictor_lr_scale=5.0,
        ),
        train={"epochs": 40, "batch_size": 32, "optimiser": "adam", "lr": 1e-3, "warmup_epochs": 1},
    )
