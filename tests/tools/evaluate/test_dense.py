from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.dense import Dense, Sliding, Stream, extract_dense, sliding
from clipmill.tools.evaluate.features import Compute

SPEC = InputSpec(num_frames=4, size=16, stride=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Levels(Encoder):
    """D = T: the brightness of every frame of a clip, as a luma level. Counts the clips it sees."""

    def __init__(self, stop_after: int = 1 << 30) -> None:
        super().__init__()
        self.dim, self.stages, self.spec = 4, ("pool",), SPEC
        self.gain = nn.Parameter(torch.tensor(219.0))
        self.seen, self.stop_after = 0, stop_after

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return x * self.gain

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        if self.seen > self.stop_after:
            raise KeyboardInterrupt
        return self.maps(x, "pool").mean((1, 3, 4)) + 16


def expected(index: ShardIndex, number: int, frame_level: Callable[[int, int], int], geometry: Sliding) -> np.ndarray:
    """(T, J): every clip on its own, straight from the definition."""
    total = index[number].num_frames
    name = int(index[number].key.rpartition("/")[2])
    columns = []
    for centre in range(geometry.offset, total, geometry.every):
        frames = [centre + (k - geometry.frames // 2) * geometry.stride for k in range(geometry.frames)]
        columns.append([frame_level(name, min(max(frame, 0), total - 1)) for frame in frames])
    return np.array(columns).T


@pytest.mark.parametrize(
    ("options", "offset"),
    [
        (Dense(), 0),
        (Dense(every=3), 0),
        (Dense(every=4, stride=6), 1),
        (Dense(every=16, stride=1, frames=3), 8),  # clips with gaps between them
        (Dense(every=16, frames=1), 8),
        (Dense(every=1, stride=20, frames=5), 0),  # clips longer than the video
        (Dense(every=5, frames=2, stride=1), 3),
    ],
    ids=str,
)
def test_every_clip_is_cut_where_it_belongs(
    dataset: ShardIndex,
    frame_level: Callable[[int, int], int],
    compute: Compute,
    tmp_path: Path,
    options: Dense,
    offset: int,
) -> None:
    geometry = sliding(SPEC, options, offset)
    found = extract_dense(Levels(), dataset, geometry, compute, tmp_path)
    assert len(found) == len(dataset)
    for number in range(len(dataset)):
        assert found[number].dtype == np.float32
        np.testing.assert_allclose(found[number], expected(dataset, number, frame_level, geometry), atol=0.9)


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"batch_size": 200}, {"threads": 3}, {"processes": 1}], ids=str)
def test_batches_and_threads_do_not_matter(
    dataset: ShardIndex, compute: Compute, tmp_path: Path, change: dict[str, int]
) -> None:
    geometry = sliding(SPEC, Dense(every=2))
    one = extract_dense(Levels(), dataset, geometry, compute, tmp_path / "a")
    other = extract_dense(Levels(), dataset, geometry, replace(compute, **change), tmp_path / "b")
    for number in range(len(dataset)):
        np.testing.assert_allclose(one[number], other[number], rtol=1e-6)


def test_no_frame_is_decoded_twice(make_dataset: Callable[..., ShardIndex], compute: Compute, tmp_path: Path) -> None:
    index = make_dataset(tmp_path, num_records=2, num_frames=300, size=(32, 32), audio=False)
    stream = Stream.of(index, sliding(SPEC, Dense(frames=16, stride=3)))
    assert len(stream.picks) > 4
    with stream.loader(index, compute) as loader:
        for _ in loader.epoch():
            pass
        assert loader.stages.frames_decoded == 601


def test_an_interrupted_run_goes_on_where_it_stopped(dataset: ShardIndex, compute: Compute, tmp_path: Path) -> None:
    geometry = sliding(SPEC, Dense())
    with pytest.raises(KeyboardInterrupt):
        extract_dense(Levels(stop_after=100), dataset, geometry, compute, tmp_path)
    assert len(list(tmp_path.glob("*/*.npy"))) == 2  # of 40 and 41 frames
    encoder = Levels()
    found = extract_dense(encoder, dataset, geometry, compute, tmp_path)
    assert encoder.seen == 42 + 43 + 44 + 45
    next(tmp_path.glob("*/*.npy")).write_bytes(b"")  # lost when a machine died
    assert [x.shape for x in extract_dense(encoder, dataset, geometry, compute, tmp_path)] == [
        (4, 40 + i) for i in range(6)
    ]
    whole = extract_dense(Levels(), dataset, geometry, compute, tmp_path / "whole")
    for number in range(6):
        assert np.array_equal(found[number], whole[number])
    assert encoder.training


def test_other_weights_or_clips_are_other_features(dataset: ShardIndex, compute: Compute, tmp_path: Path) -> None:
    few, encoder = dataset.select(np.arange(1)), Levels()
    extract_dense(encoder, few, sliding(SPEC, Dense()), compute, tmp_path)
    extract_dense(encoder, few, sliding(SPEC, Dense(stride=1)), compute, tmp_path)
    with torch.no_grad():
        encoder.gain.fill_(1.0)
    extract_dense(encoder, few, sliding(SPEC, Dense()), compute, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_wrong_use_is_one_clear_error(dataset: ShardIndex, compute: Compute, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Dense(every=0)
    with pytest.raises(ValueError, match="cannot cut 16 pixels from a short side of 8"):
        sliding(SPEC, Dense(resize=8))
    sound = InputSpec(modality="audio", channels=1, mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match="this one hears sound"):
        sliding(sound, Dense())
    with pytest.raises(ValueError, match="record 'video/0' has 40 frames, too few for a feature at frame 43"):
        extract_dense(Levels(), dataset, sliding(SPEC, Dense(), offset=43), compute, tmp_path)
    encoder = Levels()
    with torch.no_grad():
        encoder.gain.fill_(float("nan"))
    with pytest.raises(ValueError, match="features of record 'video/0' are not finite"):
        extract_dense(encoder, dataset, sliding(SPEC, Dense()), compute, tmp_path)
