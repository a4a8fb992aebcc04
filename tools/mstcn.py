"""MS-TCN: several stages of dilated temporal convolutions that label every frame of a video.

Y. Abu Farha, J. Gall, CVPR 2019, arXiv 1903.01945; parameter names are those of the published implementation
(github.com/yabufarha/ms-tcn), so its weights can be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # label of a frame that counts for nothing
Head = Literal["mstcn", "linear"]


class DilatedResidual(nn.Module):
    """x + dropout(1x1(ReLU(dilated 3-tap convolution(x)))), masked."""

    def __init__(self, maps: int, dilation: int) -> None:
        super().__init__()
        self.conv_dilated = nn.Conv1d(maps, maps, 3, padding=dilation, dilation=dilation)
        self.conv_1x1 = nn.Conv1d(maps, maps, 1)
        self.dropout = nn.Dropout()

    def forward(self, x_BMT: Tensor, mask_B1T: Tensor) -> Tensor:
        """(B, M, T)."""
        return (x_BMT + self.dropout(self.conv_1x1(F.relu(self.conv_dilated(x_BMT))))) * mask_B1T


class Stage(nn.Module):
    """1x1 to ``maps`` channels, layers of dilation 1, 2, 4, ..., and 1x1 to class scores."""

    def __init__(self, dim: int, num_classes: int, layers: int, maps: int) -> None:
        super().__init__()
        self.conv_1x1 = nn.Conv1d(dim, maps, 1)
        self.layers = nn.ModuleList(DilatedResidual(maps, 1 << number) for number in range(layers))
        self.conv_out = nn.Conv1d(maps, num_classes, 1)

    def forward(self, x_BDT: Tensor, mask_B1T: Tensor) -> Tensor:
        """Class scores (B, K, T), 0 where the mask is."""
        x = self.conv_1x1(x_BDT)
        for layer in self.layers:
            x = layer(x, mask_B1T)
        return self.conv_out(x) * mask_B1T


class MSTCN(nn.Module):
    """A first stage on features and further stages on the class probabilities of the stage before."""

    def __init__(self, dim: int, num_classes: int, *, stages: int = 4, layers: int = 10, maps: int = 64) -> None:
        super().__init__()
        self.stage1 = Stage(dim, num_classes, layers, maps)
        self.stages = nn.ModuleList(Stage(num_classes, num_classes, layers, maps) for _ in range(stages - 1))

    def forward(self, x_BDT: Tensor, mask_B1T: Tensor) -> Tensor:
        """Class scores of all stages (S, B, K, T). mask: 1 where the video has frames, 0 in the padding."""
        answers = [self.stage1(x_BDT, mask_B1T)]
        for stage in self.stages:
            answers.append(stage(answers[-1].softmax(1) * mask_B1T, mask_B1T))
        return torch.stack(answers)


class FrameClassifier(nn.Module):
    """A linear classifier of single frames, in the form of `MSTCN` with one stage."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, num_classes, 1)

    def forward(self, x_BDT: Tensor, mask_B1T: Tensor) -> Tensor:
        """(1, B, K, T)."""
        return (self.conv(x_BDT) * mask_B1T)[None]


def stage_losses(scores_SBKT: Tensor, target_BT: Tensor, mask_B1T: Tensor) -> tuple[Tensor, Tensor]:
    """Per stage: cross-entropy (S,) over frames that are not ignored, and the truncated smoothing term (S,).

    The smoothing is 0.15 times the mean of min((log p_t - sg(log p_{t-1}))^2, 16) over all elements, padding included
    as 0. Note that the earlier frame is the one without gradient.
    """
    entropies, steps = [], []
    for scores in scores_SBKT:
        entropies.append(F.cross_entropy(scores, target_BT, ignore_index=IGNORED))
        change = scores[:, :, 1:].log_softmax(1) - scores.detach()[:, :, :-1].log_softmax(1)
        smooth = change.square().clamp(max=16.0) * mask_B1T[:, :, 1:]
        steps.append(0.15 * smooth.mean() if smooth.numel() else smooth.sum())
    return torch.stack(entropies), torch.stack(steps)


def train_head(
    kind: Head,
    videos: Sequence[tuple[np.ndarray, np.ndarray]],
    num_classes: int,
    *,
    stages: int = 4,
    layers: int = 10,
    maps: int = 64,
    epochs: int = 50,
    lr: float = 5e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Train a head on videos of (features (D, T), labels (T,)), one video per step, with Adam.

    The weights are the last epoch's. The linear head has no smoothing term. Torch's own generator comes back as it was.
    """
    if not videos:
        raise ValueError("a temporal head needs training videos; none has both features and labels")
    dim = len(videos[0][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            FrameClassifier(dim, num_classes)
            if kind == "linear"
            else MSTCN(dim, num_classes, stages=stages, layers=layers, maps=maps)
        ).to(device)
        model.train()
        solver = torch.optim.Adam(model.parameters(), lr=lr)
        for epoch in range(epochs):
            for number in torch.randperm(len(videos)).tolist():
                features, labels = videos[number]
                x = torch.from_numpy(np.array(features, np.float32)).to(device)[
                    None
                ]  # a copy: stored ones are read-only
                target = torch.as_tensor(labels, dtype=torch.int64, device=device)[None]
                mask = x.new_ones(1, 1, x.shape[-1])
                entropy, smooth = stage_losses(model(x, mask), target, mask)
                loss = entropy.sum() if kind == "linear" else entropy.sum() + smooth.sum()
                solver.zero_grad()
                loss.backward()
                solver.step()
            progress(epoch + 1, epochs)
    return model.eval()


@torch.no_grad()
def label_frames(model: nn.Module, features_DT: np.ndarray) -> np.ndarray:
    """The class of every frame, (T,), by the last stage."""
    device = next(model.parameters()).device
    x = torch.from_numpy(np.array(features_DT, np.float32)).to(device)[None]
    return model(x, x.new_ones(1, 1, x.shape[-1]))[-1, 0].argmax(0).cpu().numpy()
