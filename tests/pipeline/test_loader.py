"""The loader: right frames, same batches whatever the threads, processes and world size, and honest about damage."""

import threading

import numpy as np
import pytest
import torch

from clipmill.pipeline.loader import DamageBudgetError, Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import AudioSpec, RandomResizedCrop, VideoSpec, WholeFrame
from clipmill.pipeline.views import Clips, Segments, Uniform, View

RAW = VideoSpec(size=16, crop=WholeFrame(), ops=())
ONE = LoaderConfig(threads=1, processes=0)


def luma(x):
    """8-bit luma of grey RGB in [0, 1]."""
    return torch.round(x.mean((-1, -2, 1)) * 219 + 16).int()


def clip_planner(num_frames=6, stride=2, spec=RAW):
    return Clips(views=(View(name="clip", num_frames=num_frames, stride=stride, augment=spec),))


def collect(loader, epoch=0, position=0):
    with loader:
        return list(loader.epoch(epoch, position))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.index, b.index)
        for name in a.video:
            assert torch.equal(a.video[name], b.video[name])
        for name in a.audio:
            assert torch.equal(a.audio[name], b.audio[name])


def numbers(batches):
    return [number for batch in batches for number in batch.index.tolist()]


def test_every_frame_is_the_planned_one(dataset, frame_level):
    loader = Loader(dataset, clip_planner(), batch_size=3, config=ONE)
    seen = []
    for epoch in range(6):
        for batch in loader.epoch(epoch):
            seen += batch.index.tolist()
            assert batch.video["clip"].shape == (3, 3, 6, 16, 16)
            levels = luma(batch.video["clip"])
            starts = (batch.start_s["clip"] * 25).round().int()
            for row, (number, start) in enumerate(zip(batch.index.tolist(), starts.tolist(), strict=True)):
                expected = [frame_level(number, start + 2 * k) for k in range(6)]
                assert (levels[row] - torch.tensor(expected)).abs().max() <= 1
            assert batch.label.tolist() == [number % 3 for number in batch.index.tolist()]
    loader.close()
    assert np.bincount(seen).tolist() == [6] * 6
    assert loader.stages.clips == 36
    assert loader.stages.frames_used == 36 * 6
    assert loader.stages.frames_decoded >= loader.stages.frames_used


def test_sequential_order_covers_everything_once(dataset):
    planner = Uniform(views=(View(name="clip", num_frames=2, augment=RAW),), clips=2)
    batches = collect(Loader(dataset, planner, batch_size=4, shuffle=False, drop_last=False, config=ONE))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert batches[1].video["clip"].shape == (2, 3, 4, 16, 16)


def av_planner():
    spec = VideoSpec(size=24, crop=RandomResizedCrop(), per_frame=True)
    sound = View(name="sound", modality="audio", duration_s=0.4, augment=AudioSpec(hz=16000))
    return Clips(views=(View(name="q", num_frames=4, augment=spec), View(name="k", num_frames=4), sound))


@pytest.mark.parametrize("config", [LoaderConfig(threads=3, processes=0), LoaderConfig(threads=1, processes=2)])
def test_threads_and_processes_change_nothing(dataset, config):
    def run(config):
        return collect(Loader(dataset, av_planner(), batch_size=2, seed=4, repeat=2, config=config))

    assert_same(run(ONE), run(config))


@pytest.mark.parametrize("world", [2, 3])
def test_a_global_batch_does_not_depend_on_the_world_size(dataset, world):
    whole = collect(Loader(dataset, av_planner(), batch_size=6, seed=9, config=ONE))
    parts = [
        collect(Loader(dataset, av_planner(), batch_size=6 // world, rank=rank, world=world, seed=9, config=ONE))
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        for name in batch.video:
            assert torch.equal(batch.video[name], torch.cat([part[step].video[name] for part in parts]))
        assert torch.equal(batch.audio["sound"], torch.cat([part[step].audio["sound"] for part in parts]))


def test_incomplete_last_batch_over_ranks_covers_without_repeats(make_dataset, tmp_path):
    index = make_dataset(tmp_path, num_records=7, num_frames=4, audio=False)
    loaders = [
        Loader(index, clip_planner(2, 1), batch_size=2, rank=r, world=2, shuffle=False, drop_last=False, config=ONE)
        for r in range(2)
    ]
    seen = [[batch.index.tolist() for batch in collect(loader)] for loader in loaders]
    assert seen == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    assert [len(loader) for loader in loaders] == [2, 2]


def test_resuming_continues_with_the_same_batches(dataset):
    def loader():
        return Loader(dataset, av_planner(), batch_size=2, seed=3, config=ONE)

    whole = collect(loader(), epoch=2)
    cursor = loader().cursor(2, 1)
    assert (cursor.epoch, cursor.position, cursor.index_digest) == (2, 2, dataset.digest)
    assert_same(whole[1:], collect(loader(), cursor.epoch, cursor.position))


def test_crops_and_copies_agree_with_decoding_whole_frames(make_dataset, tmp_path):
    """The copied region gives exactly what the whole frame gives."""
    index = make_dataset(tmp_path, num_records=4, num_frames=12, size=(120, 160))
    planner = clip_planner(3, 1, VideoSpec(size=32, crop=RandomResizedCrop(scale=(0.05, 0.3)), ops=()))
    (batch,) = collect(Loader(index, planner, batch_size=4, config=ONE))
    spread = batch.video["clip"].amax((-1, -2)) - batch.video["clip"].amin((-1, -2))
    assert spread.max() <= 1.01 / 219


def test_segments_decode_only_what_they_need(make_dataset, tmp_path):
    index = make_dataset(tmp_path, num_records=4, num_frames=160, gop=8, audio=False)
    planner = Segments(views=(View(name="s", num_frames=4, augment=RAW),))
    loader = Loader(index, planner, batch_size=4, config=ONE)
    collect(loader)
    assert loader.stages.frames_used == 16
    assert loader.stages.frames_decoded <= 16 * 8


def test_picks_replace_the_order(dataset):
    loader = Loader(dataset, clip_planner(), batch_size=2, picks=np.array([5, 5, 1, 1]), config=ONE)
    assert sorted(numbers(loader.epoch(0))) == [1, 1, 5, 5]
    loader.set_picks(np.array([2, 2, 2, 2]))
    assert numbers(loader.epoch(1)) == [2, 2, 2, 2]
    loader.close()


def damage(dataset, folder, records):
    shard = bytearray((dataset.root / "shard-00000.tar").read_bytes())
    for number in records:
        shard[dataset[number].packet_offset + 3] ^= 0xFF
    (folder / "shard-00000.tar").write_bytes(shard)
    (folder / "index.arrow").write_bytes((dataset.root / "index.arrow").read_bytes())
    return ShardIndex.open(folder)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_record_is_counted_and_replaced_by_its_successor(dataset, tmp_path, processes):
    index = damage(dataset, tmp_path, [2])
    config = LoaderConfig(threads=2, processes=processes)
    loader = Loader(index, clip_planner(40, 1), batch_size=3, shuffle=False, config=config)
    batches = collect(loader)
    assert numbers(batches) == [0, 1, 3, 3, 4, 5]
    assert list(loader.damaged) == [2]
    assert "is altered" in loader.damaged[2]


def test_too_much_damage_stops_the_run(dataset, tmp_path):
    index = damage(dataset, tmp_path, [1, 2, 3])
    loader = Loader(index, clip_planner(40, 1), batch_size=6, config=ONE)
    with pytest.raises(DamageBudgetError, match=r"3 damaged records, 1 allowed.*clipmill verify"), loader:
        list(loader.epoch())


def test_a_wrong_packet_table_is_damage_not_a_wrong_frame(dataset):
    """Valid packets that yield fewer frames than promised are reported."""
    from clipmill.pipeline.decode.decoder import DecodeError, new_decoder
    from clipmill.pipeline.shard import ShardReader

    decoder = new_decoder("pyav", ShardReader())
    with pytest.raises(DecodeError, match=r"frames 40\.\.40 of 40"):
        decoder.decode(dataset[0], [40], lambda *_: None)
    with pytest.raises(ValueError, match="no decoder 'nonsense'"):
        new_decoder("nonsense", ShardReader())


def test_leaving_early_frees_threads_and_the_loader_can_go_on(dataset):
    loader = Loader(dataset, clip_planner(), batch_size=1, config=LoaderConfig(threads=2, processes=0, ahead=3))
    for _ in range(3):
        stream = loader.epoch()
        first = next(stream)
        stream.close()
    assert torch.equal(first.video["clip"], next(iter(loader.epoch())).video["clip"])
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipmill-decode")]


@pytest.mark.parametrize("processes", [0, 1])
def test_batches_that_outlive_their_loader_hang_nobody(dataset, processes):
    with Loader(dataset, clip_planner(), batch_size=1, repeat=50, config=LoaderConfig(processes=processes)) as loader:
        dropped, asked = loader.epoch(0), loader.epoch(1)
        next(dropped)
        next(asked)
    ended = threading.Thread(target=dropped.close, daemon=True)
    ended.start()
    ended.join(20)
    assert not ended.is_alive()
    with pytest.raises(RuntimeError, match=r"closed before|decode process"):
        list(asked)


def test_unusable_requests_are_one_clear_error(dataset):
    with pytest.raises(ValueError, match="do not fill one batch of 100 x 1"):
        Loader(dataset, clip_planner(), batch_size=100)
    planner = Clips(views=(View(name="clip", num_frames=500),), short="skip")
    with pytest.raises(ValueError, match="none of the 6 records"):
        Loader(dataset, planner, batch_size=1)
    with pytest.raises(ValueError, match="distinct names"):
        Loader(dataset, Clips(views=(View(name="a"), View(name="a"))), batch_size=1)


def test_records_that_cannot_serve_are_counted(dataset):
    planner = Clips(views=(View(name="clip", num_frames=43, augment=RAW),), short="skip")
    loader = Loader(dataset, planner, batch_size=1, shuffle=False, config=ONE)
    assert loader.skipped == 3
    assert [batch.uid.numpy().astype(np.uint64)[0] for batch in collect(loader)] == [dataset[i].uid for i in (3, 4, 5)]
