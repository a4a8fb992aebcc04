"""A packed corpus whose classes can be seen, and an encoder whose features are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.features import Compute

SPEC = InputSpec(num_frames=2, size=16, stride=2)


class MeanColour(Encoder):
    """D = 3: the mean of each channel, times ``gain``. Counts its forward passes."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.dim, self.stages, self.spec = 3, ("pool",), SPEC
        self.gain = nn.Parameter(torch.tensor(gain))
        self.noise = nn.Dropout(0.5)
        self.seen = 0

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return x * self.gain

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.noise(self.maps(x, "pool")).mean((2, 3, 4))


class MeanMel(Encoder):
    """D = mels: the mean spectrum."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.dim, self.stages, self.spec = spec.size, ("pool",), spec
        self.gain = nn.Parameter(torch.ones(()))

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return x * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "pool").mean((1, 3))


@pytest.fixture
def colour() -> MeanColour:
    return MeanColour()


@pytest.fixture(scope="session")
def audio_spec() -> InputSpec:
    return InputSpec(modality="audio", channels=1, num_frames=21, size=40, mean=(0.0,), std=(1.0,))


@pytest.fixture
def mel(audio_spec: InputSpec) -> MeanMel:
    return MeanMel(audio_spec)


@pytest.fixture(scope="session")
def compute() -> Compute:
    return Compute(batch_size=8, threads=1, processes=0, device="cpu")


Relabel = Callable[..., ShardIndex]


@pytest.fixture(scope="session")
def relabel() -> Relabel:
    """Copy a data set with other labels and splits, and only the first ``num_frames`` frames of every video."""

    def make(
        index: ShardIndex,
        root: Path,
        labels: Sequence[int],
        splits: Sequence[str],
        classes: Sequence[str] = (),
        num_frames: int = 1 << 30,
    ) -> ShardIndex:
        root.mkdir(parents=True)
        for shard in index.shards:
            shutil.copy(shard, root)
        records = [
            replace(
                record,
                shard=Path(record.shard).name,
                label=int(label),
                split=name,
                num_frames=min(record.num_frames, num_frames),
                packet_sizes=record.packet_sizes[:num_frames],
                packet_crcs=record.packet_crcs[:num_frames],
                keyframes=record.keyframes[record.keyframes < num_frames],
            )
            for record, label, name in zip(index, labels, splits, strict=True)
        ]
        write_index(root / "index.arrow", records, [shard.name for shard in index.shards], classes)
        return ShardIndex.open(root)

    return make


@pytest.fixture(scope="session")
def bright(
    make_dataset: Callable[..., ShardIndex],
    relabel: Relabel,
    frame_level: Callable[[int, int], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> ShardIndex:
    """24 videos of 5 frames, class = dark, grey or light; 16 to train, 8 to test. The frames of a video are alike."""
    base = tmp_path_factory.mktemp("bright")
    plain = make_dataset(base / "plain", num_records=66, num_frames=5, size=(32, 40), audio=True)
    level = np.array([frame_level(number, 0) for number in range(66)])
    fifth = (level - 16) // 44  # 0, 2, 4 are the classes; what lies between is left out
    chosen = np.concatenate([np.flatnonzero((fifth == 2 * label) & (level < 222))[:8] for label in range(3)])
    assert len(chosen) == 24
    splits = np.where(np.arange(24) % 3 == 0, "test", "train")
    names = ["dark", "grey", "light"]
    return relabel(plain.select(chosen), base / "bright", fifth[chosen] // 2, splits.tolist(), names, num_frames=5)
