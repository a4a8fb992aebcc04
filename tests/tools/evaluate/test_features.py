from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipmill.models.encoder import InputSpec
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.features import Compute, Features, cache_key, extract, forward_views
from clipmill.tools.evaluate.views import EvalPlan, Views, eval_views

STD = (0.229, 0.224, 0.225)
MEAN = (0.485, 0.456, 0.406)


@pytest.fixture
def plan(colour: Any) -> EvalPlan:
    return eval_views(colour.spec, Views(clips=3))


def known(index: ShardIndex, frame_level: Callable[[int, int], int], clips: int = 3) -> np.ndarray:
    """What `MeanColour` must find in the flat grey videos of the fixture, (N, V, 3)."""
    rows = []
    for number, frames in enumerate(index.column("num_frames").tolist()):
        starts = [i * (frames - 3) // (clips - 1) for i in range(clips)]
        luma = np.array([np.mean([frame_level(number, start + t) for t in (0, 2)]) for start in starts])
        rows.append([((value - 16) / 219 - np.array(MEAN)) / STD for value in luma])
    return np.array(rows)


def test_every_record_gives_its_own_features_once(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute, frame_level: Callable[[int, int], int]
) -> None:
    colour.train()
    features = extract(colour, dataset, plan, compute, keep_views=True)
    assert colour.training
    assert colour.seen == 18
    np.testing.assert_array_equal(features.uid, dataset.column("uid"))
    np.testing.assert_array_equal(features.label, dataset.column("label"))
    np.testing.assert_allclose(features.feature, known(dataset, frame_level), atol=0.02)
    mean = extract(colour.eval(), dataset, plan, compute)
    assert not colour.training
    assert mean.feature.shape == (6, 1, 3)
    np.testing.assert_allclose(mean.mean, features.mean, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_overlapping_windows_are_averaged_by_record(
    dataset: ShardIndex, colour: Any, compute: Compute, frame_level: Callable[[int, int], int], batch_size: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Windows of four frames begin at every frame; each record has another number of them."""
    plan = eval_views(colour.spec, Views(spacing="overlap", frames=4, stride=1, crops="three"))
    lengths = dataset.column("num_frames").tolist()
    assert len(set(lengths)) > 1
    levels = [
        np.mean([frame_level(number, start + t) for start in range(frames - 3) for t in range(4)])
        for number, frames in enumerate(lengths)
    ]
    wanted = ((np.array(levels)[:, None] - 16) / 219 - np.array(MEAN)) / STD
    compute = replace(compute, batch_size=batch_size)
    found = extract(colour, dataset, plan, compute, cache=tmp_path, flush_s=0)
    assert found.feature.shape == (len(dataset), 1, 3)
    np.testing.assert_allclose(found.mean, wanted, atol=0.02)
    assert colour.seen == 3 * sum(frames - 3 for frames in lengths)
    for part in sorted(tmp_path.rglob("*.safetensors"))[len(dataset) // 2 :]:  # as if interrupted
        part.unlink()
    again = extract(colour, dataset, plan, compute, cache=tmp_path)
    np.testing.assert_allclose(again.feature, found.feature, rtol=1e-6)
    with pytest.raises(ValueError, match="can only be averaged"):
        extract(colour, dataset, plan, compute, keep_views=True)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 100}, {"threads": 3}, {"processes": 1}],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_batches_and_threads_do_not_matter(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute, change: dict[str, int]
) -> None:
    expected = extract(colour, dataset, plan, compute, keep_views=True)
    other = extract(colour, dataset, plan, replace(compute, **change), keep_views=True)
    np.testing.assert_allclose(other.feature, expected.feature, rtol=1e-6, atol=1e-6)
    if "batch_size" not in change:
        np.testing.assert_array_equal(other.feature, expected.feature)


def test_processes_together_see_every_record_once(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute
) -> None:
    """Three ranks that do not divide six records of batches of four: nothing is padded, nothing is repeated."""
    alone = extract(colour, dataset, plan, compute, keep_views=True).feature
    colour.eval()
    found: dict[int, np.ndarray] = {}
    for rank in range(3):
        options: dict[str, Any] = {"shuffle": False, "drop_last": False, "config": LoaderConfig(processes=0)}
        with Loader(dataset, plan.planner, batch_size=4, rank=rank, world=3, **options) as loader:
            for batch in loader.epoch():
                rows = forward_views(colour, batch, plan, compute).numpy()
                for number, row in zip(batch.index.tolist(), rows, strict=True):
                    assert number not in found
                    found[number] = row
    np.testing.assert_allclose(np.stack([found[i] for i in range(len(dataset))]), alone, rtol=1e-6, atol=1e-6)


def test_an_interrupted_pass_goes_on_where_it_stopped(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute, tmp_path: Path
) -> None:
    expected = extract(colour, dataset, plan, compute, cache=tmp_path / "whole")
    steps: list[tuple[int, int]] = []

    def stop(what: str, done: int, total: int, unit: str) -> None:
        if done == 4:  # the second batch is computed but not yet stored
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(colour, dataset, plan, compute, cache=tmp_path / "broken", progress=stop, flush_s=0.0)
    colour.seen = 0
    again = extract(
        colour,
        dataset,
        plan,
        compute,
        cache=tmp_path / "broken",
        progress=lambda what, done, total, unit: steps.append((done, total)),
        flush_s=0.0,
    )
    assert steps == [(2, 6), (4, 6), (6, 6)]
    assert colour.seen == 12  # 4 of 6 records, 3 views each
    np.testing.assert_array_equal(again.feature, expected.feature)
    colour.seen = 0
    np.testing.assert_array_equal(
        extract(colour, dataset, plan, compute, cache=tmp_path / "broken").feature, again.feature
    )
    assert colour.seen == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other"])
def test_a_damaged_part_is_computed_again(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute, tmp_path: Path, damage: str
) -> None:
    expected = extract(colour, dataset, plan, compute, cache=tmp_path, flush_s=0.0)
    parts = sorted(tmp_path.rglob("*.safetensors"))
    assert len(parts) == 3
    payload = parts[1].read_bytes()
    other = parts[2].read_bytes()
    parts[1].write_bytes({"cut": payload[:-5], "empty": b"", "garbage": b"x" * 90, "other": other}[damage])
    colour.seen = 0
    again = extract(colour, dataset, plan, compute, cache=tmp_path)
    assert colour.seen == 12
    np.testing.assert_array_equal(again.feature, expected.feature)


def test_the_cache_knows_what_features_depend_on(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute
) -> None:
    def key(**change: Any) -> str:
        facts: dict[str, Any] = {"model": colour, "index": dataset, "plan": plan, "compute": compute}
        return cache_key(**(facts | {"keep_views": False} | change))

    original = key()
    assert key(compute=replace(compute, batch_size=3, threads=2, processes=1)) == original
    different = {
        key(plan=eval_views(colour.spec, Views(clips=2))),
        key(plan=eval_views(replace(colour.spec, mean=(0.0, 0.0, 0.0)), Views(clips=3))),
        key(index=dataset.select(np.arange(5))),
        key(compute=replace(compute, precision="bf16")),
        key(keep_views=True),
    }
    with torch.no_grad():
        colour.gain += 1e-6
    different.add(key())
    assert len(different | {original}) == 7


def test_low_precision_stays_close(dataset: ShardIndex, plan: EvalPlan, compute: Compute) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    exact = extract(model, dataset, plan, compute).feature
    rough = extract(model, dataset, plan, replace(compute, precision="bf16")).feature
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.05


def test_a_damaged_record_is_never_replaced_in_silence(
    make_dataset: Callable[..., ShardIndex], colour: Any, plan: EvalPlan, compute: Compute, tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "data", num_records=4, num_frames=6)
    record = index[2]
    with open(record.shard, "r+b") as shard:
        shard.seek(record.packet_offset + 40)
        shard.write(b"\xff" * 8)
    with pytest.raises(ValueError, match=r"record 'video/2' is damaged .*run `clipmill verify`"):
        extract(colour, index, plan, compute)


def test_a_diverged_encoder_is_an_error_that_names_the_record(
    dataset: ShardIndex, colour: Any, plan: EvalPlan, compute: Compute, tmp_path: Path
) -> None:
    with torch.no_grad():
        colour.gain.fill_(float("nan"))
    with pytest.raises(ValueError, match="features of record 'video/0' are not finite"):
        extract(colour, dataset, plan, compute, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sound(dataset: ShardIndex, mel: Any, audio_spec: InputSpec, compute: Compute) -> None:
    """Record r is a sine of 200 + 50 r Hz, so the loudest band rises with r."""
    plan = eval_views(audio_spec, Views(clips=2))
    features = extract(mel, dataset, plan, compute, keep_views=True)
    assert features.feature.shape == (6, 2, 40)
    loudest = features.feature.argmax(2)
    assert (np.diff(loudest, axis=0) >= 0).all()
    assert (loudest[5] > loudest[0]).all()


def test_silent_records_are_named(
    make_dataset: Callable[..., ShardIndex], mel: Any, audio_spec: InputSpec, compute: Compute, tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "data", num_records=2, num_frames=4, audio=False)
    with pytest.raises(ValueError, match="2 of 2 records have no sound, the first is 'video/0'"):
        extract(mel, index, eval_views(audio_spec, Views()), compute)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Compute(batch_size=0)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        _ = Compute(device="gpu").torch_device
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"):
            _ = Compute(device="cuda").torch_device


def test_features_average_their_views() -> None:
    features = Features(
        feature=np.array([[[1.0], [3.0]]], np.float32), label=np.zeros(1, np.int64), uid=np.zeros(1, np.uint64)
    )
    assert len(features) == 1
    assert features.mean.tolist() == [[2.0]]
