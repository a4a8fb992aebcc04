"""Published protocols of label propagation, every setting written out.

Where the literature leaves a number open, the comment says so. Sources of the code that the numbers were taken from:
VFS github.com/xvjiarui/VFS, CRW github.com/ajabri/videowalk, DINO github.com/facebookresearch/dino, UVC
github.com/Liusifei/UVC, ContrastCorr github.com/594422814/ContrastCorr.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from clipmill.tools.evaluate.propagation import Protocol
from clipmill.tools.propagate import Rule

_VFS = Rule(
    context=20, topk=10, tau=0.07, window="disc", radius=12, first="repeat", free_first=False, ties="cut", unit=True
)
_CRW = Rule(
    context=20, topk=10, tau=0.05, window="disc", radius=12, first="pad", free_first=True, ties="cut", unit=True
)
_DINO = Rule(
    context=7, topk=5, tau=0.1, window="square", radius=12, first="once", free_first=False, ties="keep", unit=True
)
_UVC = Rule(
    context=7,
    topk=5,
    tau=1.0,
    multiply=True,
    window="none",
    first="once",
    joint=False,
    ties="keep",
    renormalise=False,
    mutual=False,
    unit=False,
)

_vfs = Protocol(rule=_VFS, resize="short", size=480, labels="nearest", argmax_at="native", rescale="flat_loses")
_crw = Protocol(rule=_CRW, resize="native", labels="bilinear", argmax_at="input", exact=True, rescale="no")
_dino = Protocol(
    rule=_DINO,
    resize="short64",
    size=480,
    std=(0.228, 0.224, 0.225),  # 0.228 is the released code's
    mean=(0.485, 0.456, 0.406),
    labels="nearest",
    argmax_at="input",
    rescale="flat_wins",
)
_uvc = Protocol(
    rule=_UVC,
    resize="short64",
    size=480,
    colour="lightness",
    labels="nearest",
    argmax_at="input",
    rescale="flat_wins",
)
_contrastcorr = replace(_uvc, rule=replace(_UVC, mutual=True), size=560, colour="lab")

DAVIS = {
    "vfs": _vfs,
    "vfs_r50": replace(_vfs, rule=replace(_VFS, radius=18)),
    "crw": _crw,
    "dino": _dino,
    "uvc": _uvc,
    "contrastcorr": _contrastcorr,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseProtocol:
    """A `Protocol` for joints, whose labels are heat maps; its settings for ids do not matter."""

    protocol: Protocol
    """Input and propagation."""
    sigma: float
    """Of the Gaussian around a joint, in cells or pixels."""
    draw_at: Literal["grid", "native"]
    """Where heat maps are drawn and read; those drawn at the native size are interpolated to the grid and back."""
    background: bool
    """A channel that is 1 where no joint is."""
    read_top: int
    """Highest places of a heat map that are averaged."""
    first_frame: bool
    """Frame 0, whose joints are given, counts."""
    strict: bool
    """A joint counts if it was found at x > 0, not at x = 0."""


# Poses: context, radius and sizes are those the papers name where their code has none.
JHMDB = {
    "crw": PoseProtocol(
        protocol=replace(_crw, rule=replace(_CRW, radius=5), resize="square", size=320),
        sigma=0.5,
        draw_at="grid",
        background=True,
        read_top=3,
        first_frame=False,
        strict=False,
    ),
    "uvc": PoseProtocol(
        protocol=replace(_uvc, rule=replace(_UVC, topk=20), resize="square", size=320),
        sigma=0.5,
        draw_at="grid",
        background=True,
        read_top=3,
        first_frame=False,
        strict=False,
    ),
    "vfs": PoseProtocol(
        protocol=replace(_vfs, size=320),
        sigma=4,
        draw_at="native",
        background=False,
        read_top=5,
        first_frame=True,
        strict=True,
    ),
}

# Parts: VFS and CRW released no configuration; context, radius and sizes of theirs are our choice within their range.
VIP = {
    "uvc": replace(_uvc, rule=replace(_UVC, context=1), resize="square", size=560),
    "contrastcorr": replace(_contrastcorr, rule=replace(_UVC, context=1, mutual=True), resize="square", size=560),
    "crw": replace(_crw, rule=replace(_CRW, context=4, radius=10), resize="square", size=560),
    "vfs": _vfs,
}


def _published(who: str, scores: tuple[float, float, float], source: str) -> tuple:
    return ({"method": who} | dict(zip(("J&F-Mean", "J-Mean", "F-Mean"), scores, strict=True)) | {"source": source},)


PUBLISHED_DAVIS = {  # of DAVIS-2017 val
    "vfs": _published("VFS, resnet18, Kinetics-400", (0.667, 0.640, 0.695), "xvjiarui/VFS"),
    "vfs_r50": _published("VFS, resnet50, Kinetics-400", (0.695, 0.670, 0.720), "xvjiarui/VFS"),
    "crw": _published("CRW, resnet18, Kinetics-400", (0.676, 0.646, 0.706), "ajabri/videowalk"),
    "uvc": _published("UVC, resnet18, Kinetics-400", (0.578, 0.563, 0.592), "Liusifei/UVC"),
    "contrastcorr": _published("ContrastCorr, resnet18, TrackingNet", (0.630, 0.605, 0.655), "594422814/ContrastCorr"),
}
