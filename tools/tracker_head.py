"""The head of a SiamFC-style tracker: correlation of target and search maps, its two convolutions, labels and losses.

Bertinetto et al., "Fully-Convolutional Siamese Networks for Object Tracking" (arXiv 1606.09549), on frozen features as
Xu and Wang, "Rethinking Self-Supervised Correspondence Learning" (VFS, arXiv 2103.17263, section 4.2) use it: the
features of the target (z) and of the search region (x) each pass through a 1x1 convolution, then one is correlated
with the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill.models.encoder import first_difference
from clipmill.tools.evaluate.evaluator import write_atomic

HEAD_FILE, HEAD_META = "head.safetensors", "head.json"
Loss = Literal["focal", "balanced"]


def correlate(z: Tensor, x: Tensor) -> Tensor:
    """Correlation (B, S, h, w) of target maps (B, C, a, b) with S search maps each, (B, S, C, a + h - 1, b + w - 1).

    One matrix product gives every target cell times every search cell; a response sums what lies on its window. For
    one output channel and such kernels that is many times faster than a convolution, backwards above all.
    """
    batch, searches, _, height, width = x.shape
    a, b = z.shape[2:]
    if height < a or width < b:
        raise ValueError(f"search maps of {height} x {width} cells are smaller than targets of {a} x {b}")
    cells = height * width
    products = torch.matmul(z.flatten(2).transpose(1, 2)[:, None], x.flatten(3)).contiguous()  # (B, S, a b, cells)
    size = (batch, searches, a, b, height - a + 1, width - b + 1)
    stride = (searches * a * b * cells, a * b * cells, b * cells + width, cells + 1, width, 1)
    return products.as_strided(size, stride).sum((2, 3))


def correlate_normalised(z: Tensor, x: Tensor) -> Tensor:
    """As `correlate`, with every channel of either window centred and all of it scaled to length 1: in [-1, 1].

    A window of one colour gives 0.
    """
    a, b = z.shape[2:]
    area = a * b
    centred = z - z.mean((2, 3), keepdim=True)
    means = _window_mean(x.flatten(0, 1), a, b).unflatten(0, x.shape[:2])
    squares = _window_mean((x * x).sum(2), a, b)
    spread = (squares - (means * means).sum(2)).clamp(min=0)
    length = (spread * area).sqrt() * centred.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    noise = 1e-3 * (squares * area).sqrt() * z.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # of the subtraction
    return torch.where(length > noise, correlate(centred, x) / length, 0.0)


def _window_mean(x: Tensor, a: int, b: int) -> Tensor:
    return F.avg_pool2d(F.avg_pool2d(x, (a, 1), 1), (1, b), 1)


class Head(nn.Module):
    """Two 1x1 convolutions and the correlation, times ``out_scale``."""

    def __init__(self, channels: int, out_scale: float, width: int | None = None) -> None:
        super().__init__()
        self.z = nn.Conv2d(channels, width or channels, 1)
        self.x = nn.Conv2d(channels, width or channels, 1)
        self.out_scale = out_scale

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Responses (B, 1, h, w) of pairs of feature maps (B, C, a, b) and (B, C, a + h - 1, b + w - 1)."""
        return correlate(self.z(z), self.x(x)[:, None]) * self.out_scale

    @torch.no_grad()
    def fold(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Kernel (B, C, a, b) and bias (B,) that give, on raw search features, what ``forward`` gives on these targets.

        <W a + b, k> = <a, W^T k> + <b, k>: the convolution of every search map is done once, in the kernel.
        """
        kernel = self.z(z)
        weight, bias = self.x.weight.flatten(1), self.x.bias
        assert bias is not None
        folded = torch.einsum("oc,bohw->bchw", weight, kernel)
        return folded * self.out_scale, (kernel.sum((2, 3)) @ bias) * self.out_scale


def usual_out_scale(channels: int) -> float:
    """1e-3 for ResNet-18's features, 1e-5 for ResNet-50's (VFS)."""
    return 1e-3 if channels < 1024 else 1e-5


# --- training targets ---------------------------------------------------------------------------------------


def labels(size_hw: tuple[int, int], r_pos: float = 16, r_neg: float = 0, stride: int = 8) -> Tensor:
    """(h, w) float32: 1 where |dx| + |dy| from the centre is at most r_pos, 0 from r_neg on, between them 0.5.

    r_pos, r_neg: in pixels of the search region.

    >>> int(labels((17, 17)).sum()), int(labels((16, 16)).sum())
    (13, 12)
    """
    y, x = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size_hw)
    distance = y.abs()[:, None] + x.abs()[None]
    found = torch.where(distance < r_neg / stride, 0.5, 0.0)
    return torch.where(distance <= r_pos / stride, 1.0, found).float()


def focal_loss(responses: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy, each cell weighted by how wrong it is, over the mean weight; scalar.

    weight = y (1 - p)^gamma + (1 - y) p^gamma with p the sigmoid of the response; gradients flow through it, and
    through its mean.
    """
    p = responses.sigmoid()
    positive, negative = targets * (1 - p) ** gamma, (1 - targets) * p**gamma
    loss = -(positive * F.logsigmoid(responses) + negative * F.logsigmoid(-responses))
    return loss.mean() / (positive + negative).mean()


def balanced_loss(responses: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, all cells with label 1 weighing as much as all with label 0, others nothing; scalar."""
    ones, zeros = targets == 1, targets == 0
    weight = torch.zeros_like(responses)
    weight[ones] = 1 / ones.sum()
    weight[zeros] = 1 / zeros.sum()
    return F.binary_cross_entropy_with_logits(responses, targets, weight / weight.sum(), reduction="sum")


# --- stored heads -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A head and what ``head.json`` says of the features it was made for."""

    head: Head
    about: dict[str, Any]


def save_head(head: Head, folder: Path, about: dict[str, Any]) -> None:
    """Write ``head.safetensors`` and ``head.json``. about: facts about the features, JSON-ready."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    shape = {"channels": head.x.in_channels, "width": head.x.out_channels, "out_scale": head.out_scale}
    write_atomic(folder / HEAD_FILE, safetensors.torch.save(tensors))
    write_atomic(folder / HEAD_META, (json.dumps(shape | {"about": about}, indent=2) + "\n").encode())


def load_head(folder: Path) -> StoredHead:
    """Read what `save_head` wrote; raises ValueError naming the file that cannot be used."""
    meta, weights = folder / HEAD_META, folder / HEAD_FILE
    if not meta.is_file() or not weights.is_file():
        raise ValueError(f"{folder}: no {HEAD_META} and {HEAD_FILE} there; train a head with --train-head FOLDER")
    try:
        content = json.loads(meta.read_text())
        head = Head(int(content["channels"]), float(content["out_scale"]), int(content["width"]))
        about = dict(content["about"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{meta}: damaged ({error!r}); train the head again") from error
    try:
        tensors = safetensors.torch.load_file(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights}: damaged ({error}); train the head again") from error
    if difference := first_difference(tensors, {name: t.shape for name, t in head.state_dict().items()}):
        raise ValueError(f"{weights} does not fit {HEAD_META}: {difference}")
    head.load_state_dict(tensors)
    return StoredHead(head=head, about=about)
