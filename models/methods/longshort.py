"""Long-short view feature decomposition: stationary features are shared by views, non-stationary ones add up.

N. Behrmann, M. Fayyaz, J. Gall, M. Noroozi, "Long Short View Feature Decomposition via Contrastive Video
Representation Learning", ICCV 2021, arXiv 2109.11593. There is no official code. That a long view and its short
sub-sequences share stationary features psi, and that an aggregate of the short views' non-stationary features phi must
match the long view's, is the paper's; the rest (MoCo-style queues and keys, head, sizes, schedule) is a choice of ours,
so every number of it is an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from clipmill.models.backbones.channel_range import ChannelRange
from clipmill.models.ema import Follower, teacher_of
from clipmill.models.encoder import Encoder, EncoderConfig, build_encoder
from clipmill.models.heads import mlp
from clipmill.models.losses import accuracy, info_nce, unit
from clipmill.models.method import Method, Output, Recipe, input_spec, require, require_positive
from clipmill.models.queue import KeyQueue
from clipmill.models.shuffling import grouped, shuffled
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import RandomResizedCrop, moco_v2
from clipmill.pipeline.views import LongShort as LongShortPlanner
from clipmill.pipeline.views import View

Aggregate = Literal["mean", "linear", "mlp", "gru"]
TERMS = ("stationary", "non_stationary", "instance")
Terms = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Options of long-short view feature decomposition."""

    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="r3d_18"))
    """Backbone."""
    num_short: int = 2
    """Short views per long view."""
    num_frames: int = 8
    """Frames of a short view; the long view is as long as all short views together."""
    stride: int = 4
    """Source frames between two frames of the long view."""
    short_stride: int = 0
    """Source frames between two frames of a short view; 0 = as in the long view."""
    overlap: int = 0
    """Frames of the long view that two successive short views share; the long view becomes that much shorter."""
    size: int = 112
    """Crop side in pixels."""
    min_area: float = 0.2
    """Smallest random crop, as a share of the frame's area."""
    stationary_share: float = 0.5
    """Share of the pooled features, from the first on, that is stationary (psi); the rest is not (phi)."""
    aggregator: Aggregate = "linear"
    """What joins the short views' phi: their mean, an affine map or an MLP of all, or a GRU in temporal order."""
    out_dim: int = 128
    """Width of each of the three embeddings."""
    queue_size: int = 16384
    """Keys kept as negatives of each term; a multiple of the batch size."""
    key_momentum: float = 0.999
    """Share of itself that the key network keeps at every step."""
    temperature: float = 0.1
    """Temperature of the softmax."""
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the stationary, the non-stationary and the instance term."""
    shuffle: bool = True
    """Exchange the rows of all processes before the key network, so that batch statistics give nothing away."""
    groups: int = 1
    """Groups of a process's batch with batch statistics of their own, as if each were a process."""

    def __post_init__(self) -> None:
        require_positive(self, "num_short", "num_frames", "stride", "size", "out_dim", "queue_size", "temperature")
        require_positive(self, "groups")
        require(self, "min_area", 0 < self.min_area <= 1, "above 0 and at most 1")
        require(self, "key_momentum", 0 <= self.key_momentum <= 1, "0 to 1")
        require(self, "stationary_share", 0 < self.stationary_share < 1, "between 0 and 1, so that both parts exist")
        require(self, "overlap", 0 <= self.overlap < self.num_frames, "at least 0 and less than num_frames")
        require(self, "short_stride", 0 <= self.short_stride <= self.stride, "at least 0 and at most stride")
        require(self, "weights", min(self.weights) >= 0 < max(self.weights), "at least 0 each, and not all 0")


# --- parts --------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A backbone whose pooled features xi are split into (psi, phi), and a head for each of psi, phi and xi.

    Every head is a two-layer MLP as wide as its input. ``psi`` is how many features are stationary.
    """

    def __init__(self, trunk: Encoder, psi: int, out_dim: int) -> None:
        super().__init__()
        self.trunk, self.psi = trunk, psi
        widths = {"stationary": psi, "non_stationary": trunk.dim - psi, "instance": trunk.dim}
        self.heads = nn.ModuleDict({term: mlp([width, width, out_dim]) for term, width in widths.items()})

    def forward(self, x: Tensor, terms: tuple[str, ...]) -> Tensor:
        """Embeddings (B, len(terms), out_dim), not normalised."""
        xi = self.trunk(x)
        parts = {"stationary": xi[:, : self.psi], "non_stationary": xi[:, self.psi :], "instance": xi}
        return torch.stack([self.heads[term](parts[term]) for term in terms], 1)


class Aggregator(nn.Module):
    """g: the embeddings of N short views (B, N, D), not normalised and in temporal order, to one (B, D).

    mean: their average. linear: an affine map of the concatenation. mlp: affine, ReLU, affine; ``hidden`` wide. gru:
    the last state of a one-layer GRU.
    """

    def __init__(self, kind: Aggregate, num_views: int, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.net = {
            "mean": lambda: nn.Identity(),
            "linear": lambda: nn.Linear(num_views * dim, dim),
            "mlp": lambda: mlp([num_views * dim, hidden or dim, dim]),
            "gru": lambda: nn.GRU(dim, dim, batch_first=True),
        }[kind]()

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, D)."""
        if self.kind == "mean":
            return x_BND.mean(1)
        return self.net(x_BND)[1][0] if self.kind == "gru" else self.net(x_BND.flatten(1))


def losses(
    psi_s_BND: Tensor,
    phi_g_BD: Tensor,
    xi_q_BD: Tensor,
    keys: Mapping[str, Tensor],
    queues: Mapping[str, Tensor],
    temperature: float,
) -> Terms:
    """The three InfoNCE terms, each as (mean loss, logits with the positive first).

    psi_s_BND: stationary embeddings of N short views, each a query for the long view's, rows in the order (b, i).
    phi_g_BD: aggregated non-stationary embeddings. xi_q_BD: of a long view as a whole. keys: {term: (B, D)}, of the
    long view. queues: {term: (D, K)} unit columns. Embeddings need not be normalised.
    """
    num_short = psi_s_BND.shape[1]
    queries = {"stationary": psi_s_BND.flatten(0, 1), "non_stationary": phi_g_BD, "instance": xi_q_BD}
    positives = {**keys, "stationary": keys["stationary"].repeat_interleave(num_short, 0)}
    return {term: info_nce(unit(queries[term]), unit(positives[term]), queues[term], temperature) for term in TERMS}


# --- method -------------------------------------------------------------------------------------------------


class LongShort(Method):
    """Short views through a query network against the long view through its moving average.

    Every term has a queue of its own with one key per video and step, so negatives are other videos. Batch statistics
    are kept from giving keys away as in `clipmill.models.methods.moco`.
    """

    Config = Config

    def __init__(self, config: Config, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        trunk = encoder or build_encoder(config.encoder.name, width=config.encoder.width)
        trunk.spec = input_spec(self.plan().views[0])
        psi = min(max(round(config.stationary_share * trunk.dim), 1), trunk.dim - 1)
        self.query = Branch(trunk, psi, config.out_dim)
        self.key = teacher_of(self.query)
        self.aggregate = Aggregator(config.aggregator, config.num_short, config.out_dim)
        self.queues = nn.ModuleDict({term: KeyQueue(config.out_dim, config.queue_size) for term in TERMS})
        self._follower = Follower()

    @property
    def encoder(self) -> Encoder:
        """The query network without its heads: xi = (psi, phi)."""
        return self.query.trunk

    def encoders(self) -> Mapping[str, Encoder]:
        """All features, the stationary ones psi (better for recognition) and the others phi (for segmentation)."""
        trunk, psi = self.query.trunk, self.query.psi
        return {
            "encoder": trunk,
            "stationary": ChannelRange(trunk, 0, psi),
            "non_stationary": ChannelRange(trunk, psi, trunk.dim),
        }

    def plan(self) -> LongShortPlanner:
        """Two augmentations of the long view and one of each short view, of which it consists."""
        config = self.config
        step = config.num_frames - config.overlap
        augment = replace(moco_v2(config.size), crop=RandomResizedCrop(scale=(config.min_area, 1.0)))
        long = View(
            name="long_q",
            num_frames=config.num_short * step + config.overlap,
            stride=config.stride,
            augment=augment,
        )
        short = replace(long, num_frames=config.num_frames, stride=config.short_stride or config.stride)
        return LongShortPlanner(
            views=(long, replace(long, name="long_k"), *(replace(short, name=name) for name in self._short_names)),
            num_long=2,
            starts=tuple(number * step for number in range(config.num_short)),
        )

    @property
    def _short_names(self) -> list[str]:
        return [f"short{number}" for number in range(self.config.num_short)]

    def forward(self, batch: ClipBatch) -> Output:
        """Weighted sum of the terms; each term, and the share of its queries whose own key is the nearest."""
        long_q, long_k = batch.video["long_q"], batch.video["long_k"]
        short = torch.stack([batch.video[name] for name in self._short_names], 1)
        order = dist.permutation(len(long_q) * dist.world(), self.step_key, "shuffle")
        terms = self.contrast(long_q, long_k, short, order if self.config.shuffle else None)
        loss = sum(
            (weight * terms[term][0] for term, weight in zip(TERMS, self.config.weights, strict=True)),
            start=torch.zeros((), device=long_q.device),
        )
        metrics = {f"loss_{term}": value.detach() for term, (value, _) in terms.items()}
        metrics |= {f"accuracy_{term}": accuracy(logits, 0) for term, (_, logits) in terms.items()}
        return Output(loss, metrics)

    def contrast(self, long_q: Tensor, long_k: Tensor, short_BN: Tensor, order: Tensor | None) -> Terms:
        """One step: the terms of B local videos; pushes the keys of all processes.

        long_q, long_k: (B, C, L, H, W). short_BN: (B, N, C, T, H, W). order: permutation of the rows of all processes
        for the key pass; None keeps them in place.
        """
        num_short = short_BN.shape[1]
        xi_q = self._embed(self.query, long_q, TERMS[2:])[:, 0]
        pairs = self._embed(self.query, short_BN.flatten(0, 1), TERMS[:2]).unflatten(0, (-1, num_short))
        with torch.no_grad():
            self._follower.follow(self.key, self.query, self.config.key_momentum)
            keys = self._keys(long_k, order)
            negatives = {
                term: self.queue(term).keys.clone() for term in TERMS
            }  # the backward pass comes after the push
            everyones = dist.gather(torch.stack([unit(keys[term]) for term in TERMS], 1))
        phi_g = self.aggregate(pairs[:, :, 1])
        terms = losses(pairs[:, :, 0], phi_g, xi_q, keys, negatives, self.config.temperature)
        for place, term in enumerate(TERMS):
            self.queue(term).push(everyones[:, place])
        return terms

    def queue(self, term: str) -> KeyQueue:
        """The keys of one term."""
        queue = self.queues[term]
        assert isinstance(queue, KeyQueue)
        return queue

    def _keys(self, x: Tensor, order: Tensor | None) -> dict[str, Tensor]:
        keys = shuffled(lambda rows: self._embed(self.key, rows, TERMS), x, order)
        return dict(zip(TERMS, keys.unbind(1), strict=True))

    def _embed(self, branch: Branch, x: Tensor, terms: tuple[str, ...]) -> Tensor:
        return grouped(lambda part: branch(part, terms), x, self.config.groups)

    def after_step(self, step: int, num_steps: int) -> None:
        """The key network may follow again."""
        self._follower.renew()


# --- recipes ------------------------------------------------------------------------------------------------


def kinetics400() -> Recipe:
    """Kinetics-400, R3D-18, two short views of 8 frames; settings are ours (the published ones are not known).

    The paper reports UCF101 / HMDB51 fine-tuning of 77.2 / 53.7 (recalled from later tables, not re-checked).
    """
    return Recipe(
        about="Kinetics-400, R3D-18, 2 x 8 frames in 16, 112 pixels, 200 epochs, batch 256",
        method=Config(),
        train={
            "epochs": 200,
            "batch_size": 256,
            "optimiser": "sgd",
            "lr": 0.03,
            "lr_scaling": "linear",
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "warmup_epochs": 10,
        },
    )


def kinetics400_c3d() -> Recipe:
    """The same with C3D: UCF101 / HMDB51 fine-tuning of 79.8 / 52.1 (recalled from later tables, not re-checked)."""
    recipe = kinetics400()
    return Recipe(
        about="Kinetics-400, C3D, 2 x 8 frames in 16, 112 pixels, 200 epochs, batch 256",
        method=replace(recipe.method, encoder=EncoderConfig(name="c3d")),
        train=recipe.train,
    )


def tiny() -> Recipe:
    """An eighth-width R3D-18 on 2 x 4 of 8 frames of 56 pixels of a small corpus, about three minutes on two CPU cores.

    The queues are shorter than the corpus, and crops keep most of the picture, for the reasons of MoCo's tiny recipe.
    """
    return Recipe(
        about="a small corpus on a CPU: R3D-18 x 0.125, 2 x 4 frames in 8, 56 pixels",
        method=Config(
            encoder=EncoderConfig(name="r3d_18", width=0.125),
            num_frames=4,
            stride=4,
            size=56,
            min_area=0.6,
            queue_size=128,
            key_momentum=0.9,
        ),
        train={"epochs": 30, "batch_size": 32, "optimiser": "adamw", "lr": 2e-3, "warmup_epochs": 1},
    )
