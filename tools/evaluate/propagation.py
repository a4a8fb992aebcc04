"""From frames and a first label to label maps: what the benchmarks of label propagation share.

A `Protocol` says how pictures and labels are prepared, propagated (`clipmill.tools.propagate.Rule`) and read out; the
published ones stand in `clipmill.tools.evaluate.presets`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipmill.models.colour import Colour, converted
from clipmill.models.encoder import Encoder
from clipmill.tools.evaluate.features import Compute, Precision
from clipmill.tools.propagate import Rule, Seconds, propagate

Size = tuple[int, int]
Rescale = Literal["no", "flat_loses", "flat_wins"]
_STORE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEFAULT_STAGE = "res4"
_MULTIPLE = 64
_READERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way to measure correspondence by propagating labels."""

    rule: Rule
    """How labels travel."""
    resize: Literal["native", "short", "short64", "square"] = "short"
    """Input size: as it is; short side ``size``; that with the other side rounded down to 64s; ``size`` squared."""
    size: int = 480
    """Of the input, in pixels."""
    colour: Colour = "rgb"
    """Colour space of the input."""
    mean: tuple[float, ...] | None = None
    """Subtracted from the input; None = what the encoder was made for."""
    std: tuple[float, ...] | None = None
    """Divides the input; None = what the encoder was made for."""
    labels: Literal["nearest", "bilinear"] = "nearest"
    """First labels at the grid: ids by nearest neighbour, or masks by bilinear interpolation (soft from the start)."""
    argmax_at: Literal["native", "input"] = "native"
    """Size at which labels become hard; from the input size, ids go to the native one by nearest neighbour."""
    exact: bool = False
    """Interpolate labels in double precision, whose ties fall as OpenCV's do; torch's do not."""
    rescale: Rescale = "flat_loses"
    """Stretch every label channel that has labels to [0, 1] first; what a channel of one value then counts as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Settings to change in a preset; one left out keeps the preset's value."""

    size: int | None = None
    """Input size in pixels, as the preset's resize rule understands it."""
    colour: Colour | None = None
    """Colour space of the input."""
    context: int | None = None
    """Previous frames that are sources."""
    topk: int | None = None
    """Source cells that count."""
    tau: float | None = None
    """Temperature."""
    radius: int | None = None
    """Of the window, in cells."""

    def apply(self, protocol: Protocol) -> Protocol:
        """The protocol with these settings."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        outer = {name: given.pop(name) for name in ("size", "colour") if name in given}
        if outer.get("size", 1) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {outer['size']}")
        return replace(protocol, rule=replace(protocol.rule, **given), **outer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """Which feature maps are taken, and how they are computed and kept."""

    stage: str = ""
    """Stage of the encoder; default: res4 where there is one, else its last."""
    strides: tuple[int, int, int, int] = (1, 2, 1, 1)
    """Of res2 to res5 of ResNets over frames (stride 8 after res4); other encoders keep their own."""
    batch_size: int = 4
    """Frames per forward pass."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."""
    precision: Precision = "fp32"
    """Precision of the network; fp16 and bf16 run under autocast."""
    store: Precision = "fp32"
    """Precision of the features that are kept and compared; sums are fp32."""

    def __post_init__(self) -> None:
        self.compute  # noqa: B018  (checks the numbers)

    @property
    def compute(self) -> Compute:
        """Device and precision."""
        return Compute(batch_size=self.batch_size, device=self.device, precision=self.precision)

    def stage_of(self, encoder: Encoder) -> str:
        """The stage that is meant; raises ValueError for one the encoder does not have."""
        if encoder.spec.modality != "video":
            raise ValueError(f"{type(encoder).__name__} hears; propagating labels needs an encoder that sees")
        stage = self.stage or (_DEFAULT_STAGE if _DEFAULT_STAGE in encoder.stages else encoder.stages[-1])
        encoder.depth(stage)
        return stage


# --- sizes --------------------------------------------------------------------------------------------------


def input_size(protocol: Protocol, height: int, width: int) -> Size:
    """(height, width) of the network's input for a picture.

    >>> from clipmill.tools.evaluate.presets import DAVIS
    >>> [input_size(DAVIS[name], 480, 910) for name in ("vfs", "dino", "contrastcorr")]
    [(480, 910), (480, 896), (560, 1024)]
    """
    size = protocol.size
    if protocol.resize == "native":
        return height, width
    if protocol.resize == "square":
        return size, size
    if protocol.resize == "short":
        scale = size / min(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)
    long = int(size * max(height, width) / min(height, width)) // _MULTIPLE * _MULTIPLE
    return (long, size) if height > width else (size, long)


def resized_ids(ids_HW: np.ndarray, size: Size) -> np.ndarray:
    """Ids (H, W) uint8 at another size, each that of Pillow's nearest pixel."""
    if ids_HW.shape == tuple(size):
        return ids_HW
    return np.array(Image.fromarray(ids_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))


def bilinear(x_NCHW: Tensor, size: Size) -> Tensor:
    """Bilinear interpolation with half-pixel centres and without antialiasing, as OpenCV does it."""
    if x_NCHW.shape[2:] == tuple(size):
        return x_NCHW
    return F.interpolate(x_NCHW, tuple(size), mode="bilinear", align_corners=False)


# --- labels -------------------------------------------------------------------------------------------------


def first_labels(ids_HW: np.ndarray, grid: Size, protocol: Protocol) -> tuple[Tensor, np.ndarray]:
    """Soft labels (K, h, w) of the first frame and the id of each channel, (K,) uint8.

    ``nearest``: as many channels as the highest id left at the grid says, so that the last object may vanish for good,
    as in the official code. ``bilinear``: one channel for every id in the picture.
    """
    if protocol.labels == "nearest":
        ids_HW = resized_ids(ids_HW, grid)
        ids = np.arange(int(ids_HW.max()) + 1)
    else:
        ids_HW = resized_ids(ids_HW, input_size(protocol, *ids_HW.shape))
        ids = np.unique(ids_HW)
    one_hot = torch.from_numpy((ids_HW[None] == ids[:, None, None]).astype(np.float64))  # exact interpolation weights
    return bilinear(one_hot[None], grid)[0].float(), ids.astype(np.uint8)


def read_out(soft_KHW: Tensor, ids: np.ndarray, size: Size, native: Size, rescale: Rescale) -> np.ndarray:
    """Ids (H, W) uint8 at the native size from soft labels (K, h, w), which become hard at ``size``.

    ids: (K,) uint8, that of each channel. rescale: see `Protocol`.
    """
    best, hard = None, None
    for number, scores in enumerate(bilinear(soft_KHW[None], size)[0]):  # a strided arg-max is slow on a CPU
        scores = _rescaled(scores, rescale)
        if best is None or hard is None:
            best, hard = scores, torch.zeros(size, dtype=torch.uint8, device=scores.device)
            continue
        hard.masked_fill_(scores > best, number)
        best = torch.maximum(best, scores)
    assert hard is not None
    return resized_ids(ids[hard.cpu().numpy()], native)


def _rescaled(scores_HW: Tensor, rescale: Rescale) -> Tensor:
    """One channel of labels, stretched to [0, 1] if the protocol says so and it reaches above 0."""
    if rescale == "no":
        return scores_HW
    low, high = scores_HW.min(), scores_HW.max()
    if high <= 0:
        return scores_HW
    if high == low:
        return torch.full_like(scores_HW, torch.inf if rescale == "flat_wins" else 0.0)
    return (scores_HW - low) / (high - low)


# --- pictures to maps ---------------------------------------------------------------------------------------


def read_picture(path: Path) -> np.ndarray:
    """A picture file as (H, W, 3) uint8 RGB; raises ValueError, naming the file, where there is none."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        what = "no such frame" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise ValueError(f"{path}: {what}; unpack the corpus again") from error


@contextmanager
def placed(encoder: Encoder, maps: Maps) -> Iterator[None]:
    """The encoder in eval mode on the device of ``maps``; afterwards as it was before."""
    before = [(part, part.training) for part in encoder.modules()]
    home = next((tensor.device for tensor in chain(encoder.parameters(), encoder.buffers())), None)
    encoder.eval().to(maps.compute.torch_device)
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
        if home is not None:
            encoder.to(home)


def feature_maps(
    encoder: Encoder, frames: Sequence[Path], native: Size, protocol: Protocol, maps: Maps
) -> Iterator[Tensor]:
    """Feature maps (C, h, w) float32 of pictures of one size, in order, on the device of ``maps``.

    Raises ValueError, naming the frame, for one of another size and for features that are not finite. The encoder
    should be in eval mode and on that device.
    """
    stage = maps.stage_of(encoder)
    options: dict[str, Any] = {}
    if "strides" in inspect.signature(encoder.maps).parameters:
        options["strides"] = maps.strides
    size = input_size(protocol, *native)
    mean, std = protocol.mean or encoder.spec.mean, protocol.std or encoder.spec.std
    compute = maps.compute
    shape = (1, len(mean), 1, 1)
    with ThreadPoolExecutor(_READERS, "frames") as readers:
        for start in range(0, len(frames), maps.batch_size):
            paths = frames[start : start + maps.batch_size]
            pictures = list(readers.map(read_picture, paths))
            for path, picture in zip(paths, pictures, strict=True):
                if picture.shape[:2] != tuple(native):
                    raise ValueError(
                        f"{path}: {picture.shape[1]}x{picture.shape[0]} pixels, but the sequence's labels have "
                        f"{native[1]}x{native[0]}; unpack the corpus again"
                    )
            with torch.no_grad(), compute.autocast():
                x = torch.from_numpy(np.stack(pictures)).to(compute.torch_device).permute(0, 3, 1, 2).float()
                x = converted(bilinear(x, size).round() / 255, protocol.colour)
                x = (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
                found = encoder.maps(x[:, :, None], stage, **options).float().mean(2)
            for path, one in zip(paths, found, strict=True):
                if not torch.isfinite(one).all():
                    raise ValueError(f"the encoder's features of {path} are not finite; it may have diverged")
                yield one


def soft_labels(
    features: Iterable[Tensor], first: Tensor, protocol: Protocol, maps: Maps, seconds: Seconds | None = None
) -> Iterator[Tensor]:
    """Soft labels (K, h, w) of frames 1, 2, ... by the rule of a protocol; see `propagate`."""
    return propagate(features, first, protocol.rule, store=_STORE[maps.store], seconds=seconds)


def segment(
    encoder: Encoder,
    frames: Sequence[Path],
    first_ids: np.ndarray,
    protocol: Protocol,
    maps: Maps,
    seconds: Seconds | None = None,
    *,
    copy_first: bool = True,
) -> Iterator[np.ndarray]:
    """Label maps (H, W) uint8 of all frames from that of the first.

    copy_first: pass the first on as it is; otherwise it makes the way to the grid and back like the others. The
    encoder must be in eval mode and on the device of ``maps``.
    """
    native = first_ids.shape[0], first_ids.shape[1]
    size = native if protocol.argmax_at == "native" else input_size(protocol, *native)
    seconds = seconds or Seconds()
    features = feature_maps(encoder, frames, native, protocol, maps)
    since = time.perf_counter()
    opening = next(features)
    seconds.add("features", since)
    first, ids = first_labels(first_ids, grid_of(opening), protocol)
    yield first_ids if copy_first else read_out(_precise(first, protocol), ids, size, native, protocol.rescale)
    for soft in soft_labels(chain([opening], features), first, protocol, maps, seconds):
        since = time.perf_counter()
        hard = read_out(_precise(soft, protocol), ids, size, native, protocol.rescale)
        seconds.add("labels", since)
        yield hard


def _precise(soft: Tensor, protocol: Protocol) -> Tensor:
    return soft.double() if protocol.exact else soft


def grid_of(maps: Tensor) -> Size:
    """(h, w) of feature maps (..., h, w)."""
    return maps.shape[-2], maps.shape[-1]
