"""A range of another encoder's feature channels, for features whose parts mean different things."""

from __future__ import annotations

from torch import Tensor

from clipmill.models.encoder import Encoder, build_encoder


class ChannelRange(Encoder):
    """Channels first ... last - 1 of the pooled features of ``trunk``; maps keep all channels."""

    def __init__(self, trunk: Encoder, first: int, last: int) -> None:
        super().__init__()
        if not 0 <= first < last <= trunk.dim:
            raise ValueError(f"channels {first} to {last} are no part of the {trunk.dim} features of the backbone")
        self.trunk = trunk
        self.first, self.last = first, last
        self.dim = last - first
        self.stages, self.reductions, self.spec = trunk.stages, trunk.reductions, trunk.spec
        if trunk.recipe is not None:
            options = {"backbone": trunk.recipe["name"], "first": first, "last": last, **trunk.recipe["options"]}
            self.recipe = {"name": "channel_range", "options": options}

    def maps(self, x: Tensor, stage: str) -> Tensor:
        """Maps of the whole backbone after ``stage``."""
        return self.trunk.maps(x, stage)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, last - first)."""
        return self.trunk(x)[:, self.first : self.last]


def channel_range(
    *,
    backbone: str = "r3d_18",
    first: int = 0,
    last: int | None = None,
    width: float = 1.0,
    channels: int = 3,
) -> Encoder:
    """Features first ... last - 1 of a backbone (None = to its end), built with ``width`` and input ``channels``."""
    trunk = build_encoder(backbone, width=width, channels=channels)
    return ChannelRange(trunk, first, trunk.dim if last is None else last)
