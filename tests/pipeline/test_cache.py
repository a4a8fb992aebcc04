"""The cache of decoded frames: never another batch, never more than its budget, nothing to decode in later epochs."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from clipmill.pipeline.cache import FrameCache
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import RandomResizedCrop, VideoSpec
from clipmill.pipeline.views import Clips, View

FRAME_BYTES = 48 * 64 * 3 // 2
GIB = 2**30


def planner() -> Clips:
    spec = VideoSpec(size=24, crop=RandomResizedCrop(), per_frame=True, ops=())
    sound = View(name="q", num_frames=5, stride=2, augment=spec)
    return Clips(views=(sound, View(name="k", num_frames=3)), shared=False)


def run(index, epochs: int = 3, **config) -> tuple[list[torch.Tensor], Loader, list[int], int]:
    """(tensors of all batches, the closed loader, frames decoded in each epoch, records in the cache)."""
    settings = LoaderConfig(**{"threads": 2, "processes": 0, **config})
    loader = Loader(index, planner(), batch_size=3, seed=5, repeat=2, config=settings)
    parts, decoded, ready = [], [], 0
    with loader:
        for epoch in range(epochs):
            before = loader.stages.frames_decoded
            for batch in loader.epoch(epoch):
                parts += [batch.index, *batch.video.values()]
            decoded.append(loader.stages.frames_decoded - before)
        ready = loader.cache.ready if loader.cache else 0
    return parts, loader, decoded, ready


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("config", [{"threads": 1}, {"threads": 3}, {"processes": 2}, {"decoder": "pyav"}])
def test_later_epochs_decode_nothing_and_no_batch_changes(dataset, config):
    plain, *_ = run(dataset)
    cached, loader, decoded, ready = run(dataset, cache_gb=0.01, **config)
    assert_same(plain, cached)
    assert decoded[0] >= 40 + 41 + 42 + 43 + 44 + 45
    assert decoded[1:] == [0, 0]
    assert ready == 6
    assert loader.stages.clips_cached >= 24
    assert loader.cache is None, "closed with the loader"


def test_a_small_budget_keeps_the_same_records_every_time(dataset):
    plain, _, whole, _ = run(dataset)
    budget = 3 * 50 * FRAME_BYTES
    caches = [FrameCache(dataset, budget) for _ in range(2)]
    assert 1 <= caches[0].records < 6
    assert np.array_equal(caches[0]._starts, caches[1]._starts)
    held = caches[0]._starts >= 0
    counts = np.array([record.num_frames for record in dataset])
    assert counts[held].sum() * FRAME_BYTES <= budget
    cached, _loader, decoded, ready = run(dataset, cache_gb=budget / GIB)
    assert_same(plain, cached)
    assert ready == caches[0].records
    assert all(0 < part < full for part, full in zip(decoded[1:], whole[1:], strict=True))


def test_places_do_not_overlap(dataset):
    cache = FrameCache(dataset, 1 << 24)
    ends = [int(cache._starts[i]) + record.num_frames * FRAME_BYTES for i, record in enumerate(dataset)]
    order = np.argsort(cache._starts)
    assert cache._starts[order[0]] >= len(dataset)
    assert all(ends[a] <= cache._starts[b] for a, b in pairwise(order))
    assert ends[order[-1]] <= len(cache._memory)


def test_a_record_with_a_damaged_end_still_gives_its_healthy_clips(make_dataset, tmp_path):
    index = make_dataset(tmp_path / "whole", num_records=4, num_frames=64, audio=False)
    record = index[1]
    shard = bytearray((index.root / "shard-00000.tar").read_bytes())
    shard[record.packet_offset + int(record.packet_sizes[:-1].sum()) + 3] ^= 255
    (tmp_path / "shard-00000.tar").write_bytes(shard)
    (tmp_path / "index.arrow").write_bytes((index.root / "index.arrow").read_bytes())
    broken = ShardIndex.open(tmp_path)
    view = View(name="q", num_frames=3, augment=VideoSpec(size=16, ops=()))

    def batches(**config):
        settings = LoaderConfig(threads=1, processes=0, **config)
        loader = Loader(broken, Clips(views=(view,)), batch_size=4, repeat=8, shuffle=False, config=settings)
        with loader:
            return [batch.video["q"] for epoch in range(2) for batch in loader.epoch(epoch)], loader.damaged

    plain, cached = batches(), batches(cache_gb=0.01)
    assert_same(plain[0], cached[0])
    assert plain[1] == cached[1]


def test_no_memory_left_means_no_caching_and_nothing_else(dataset, monkeypatch: pytest.MonkeyPatch):
    from clipmill.pipeline.memory import SharedBuffer

    monkeypatch.setattr(SharedBuffer, "claim", lambda *_: False)
    cached, _, _, ready = run(dataset, cache_gb=0.01)
    assert_same(run(dataset)[0], cached)
    assert ready == 0


def test_more_than_the_machine_has_is_refused(dataset):
    with pytest.raises(ValueError, match=r"1000000\.0 GiB does not fit .* lower cache_gb"):
        FrameCache(dataset, 10**6 * GIB)
