"""What every method must do, whatever it is: run over all that are discovered.

Run as a script, this file is one of two processes: ``test_methods.py METHOD ...``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipmill.models.encoder import EncoderConfig, load_encoder, save_encoder
from clipmill.models.method import EpochContext, Method, Output, method_class, method_names, recipes
from clipmill.pipeline import checkpoint, dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.log import read_log
from clipmill.pipeline.optim import build_optimizer, set_lr
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.ring import LoaderConfig
from clipmill.pipeline.slot import Shape
from clipmill.pipeline.spec import AudioSpec, VideoSpec
from clipmill.pipeline.train import train
from clipmill.pipeline.views import Planner

BATCH = 4
SMALL = {"size": 32, "queue_size": BATCH, "groups": 2, "clusters": 2, "pca_dim": 2, "codec_steps": 40}
LEARNT = {"contrastcorr": 0.99}  # most of that loss is the error of a frozen auto-encoder
every_method = pytest.mark.parametrize("name", method_names())


def build(name: str, seed: int = 0, **more: int) -> Method:
    """The method of the ``tiny`` recipe with narrower encoders, smaller pictures and a shorter queue."""
    config = recipes(name)["tiny"].method
    changes: dict = {key: value for key, value in (SMALL | more).items() if hasattr(config, key)}
    for item in fields(config):
        if isinstance(value := getattr(config, item.name), EncoderConfig):
            changes[item.name] = replace(value, width=0.125)
    torch.manual_seed(seed)
    return method_class(name)(replace(config, **changes))


def begun(method: Method) -> Method:
    """The method after its hook before the first epoch, of a corpus of `BATCH` records."""

    @torch.no_grad()
    def collect(planner: Planner, function: Callable[[ClipBatch], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        dtype = next(method.parameters()).dtype
        method.eval()
        rows = dict(function(part_of(batch_of(planner, BATCH), slice(None), dtype)))
        method.train()
        return rows

    torch.manual_seed(0)
    method.before_epoch(EpochContext(epoch=0, num_epochs=1, num_records=BATCH, collect=collect))
    return method


def record(number: int = 0) -> VideoRecord:
    """A video of 20 s with sound that no file holds."""
    empty = np.empty(0, np.uint32)
    return VideoRecord(
        index=number,
        uid=number,
        key=str(number),
        shard="",
        codec=CodecConfig(codec="h264"),
        num_frames=500,
        fps=Fraction(25),
        height=128,
        width=160,
        packet_offset=0,
        packet_sizes=empty,
        packet_crcs=empty,
        presentation=empty,
        keyframes=empty,
        audio_offset=0,
        num_samples=320000,
        audio_hz=16000,
        audio_crcs=empty,
        silent=False,
        salvaged=False,
        label=number % 3,
        split="train",
        source="",
        digest=b"",
    )


def batch_of(planner: Planner, count: int, seed: int = 0) -> ClipBatch:
    """What the loader would deliver: each sample a coarse pattern of its own, each view some noise on it."""
    rng = torch.Generator().manual_seed(seed)
    shape = Shape.of(planner, record(), count)
    patterns = torch.randn(count, 3, 4, 4, generator=rng)
    video: dict[str, Tensor] = {}
    audio: dict[str, Tensor] = {}
    for view in planner.views:
        spec = view.augment
        if isinstance(spec, VideoSpec):
            size = (count, 3, shape.frames[view.name], spec.size, spec.size)
            coarse = nn.functional.interpolate(patterns, (spec.size, spec.size))[:, :, None]
            video[view.name] = coarse + 0.2 * torch.randn(size, generator=rng)
        else:
            assert isinstance(spec, AudioSpec)
            samples = round(view.duration_s * spec.hz)
            plane = (samples,) if spec.logmel is None else (1, spec.logmel.mels, spec.logmel.frames(samples))
            coarse = patterns[:, :1] if spec.logmel else patterns.flatten(1)[:, None, None]
            wide = nn.functional.interpolate(coarse, (1, 1, *plane)[-2:]).reshape(count, *plane)
            audio[view.name] = wide + 0.2 * torch.randn((count, *plane), generator=rng)
    drawn = [planner(record(i), Draws(seed, i), i) for i in range(count)]
    return ClipBatch(
        video=video,
        audio=audio,
        index=torch.arange(count),
        uid=torch.arange(count),
        label=torch.arange(count) % 3,
        start_s={
            view.name: torch.tensor([one.spans[place].start_s for one in drawn], dtype=torch.float64)
            for place, view in enumerate(planner.views)
        },
        aux={key: torch.tensor([one.aux[key] for one in drawn], dtype=torch.float64) for key in shape.aux},
    )


def part_of(batch: ClipBatch, rows: slice, dtype: torch.dtype) -> ClipBatch:
    return ClipBatch(
        video={name: x[rows].to(dtype) for name, x in batch.video.items()},
        audio={name: x[rows].to(dtype) for name, x in batch.audio.items()},
        index=batch.index[rows],
        uid=batch.uid[rows],
        label=batch.label[rows],
        start_s={name: x[rows] for name, x in batch.start_s.items()},
        aux={name: x[rows] for name, x in batch.aux.items()},
    )


def steps(method: Method, count: int, lr: float = 2e-3) -> list[Output]:
    """Optimiser steps on one fixed batch."""
    batch = batch_of(begun(method).plan(), BATCH)
    config = TrainConfig(optimiser="adamw", lr=lr, schedule="constant", weight_decay=0.0, epochs=count)
    optimizer = build_optimizer(method.param_groups(), config)
    outputs = []
    for step in range(count):
        set_lr(optimizer, config, step, 1)
        method.step_key = step
        torch.manual_seed(step)
        outputs.append(method(batch))
        optimizer.zero_grad()
        outputs[-1].loss.backward()
        optimizer.step()
        method.after_step(step, count)
    return outputs


@every_method
def test_gradients_reach_every_trainable_weight_and_no_teacher(name: str) -> None:
    method = build(name)
    output = steps(method, 1)[0]
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    for metric, value in output.metrics.items():
        assert value.shape == (), metric
        assert not value.requires_grad, metric
        assert torch.isfinite(value), metric
    for key, param in method.named_parameters():
        if param.requires_grad:
            assert param.grad is not None, f"{key} has no gradient"
            assert torch.isfinite(param.grad).all(), f"the gradient of {key} is not finite"
        else:
            assert param.grad is None, f"{key} is not trainable but has a gradient"
    listed = [id(param) for group in method.param_groups() for param in group.params]
    assert sorted(listed) == sorted(id(param) for param in method.parameters() if param.requires_grad)


@every_method
def test_a_fixed_batch_is_learnt(name: str) -> None:
    losses = [output.loss.item() for output in steps(build(name), 24)][1:]  # the first step may meet random negatives
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < LEARNT.get(name, 0.9) * np.mean(losses[:5]), losses


@every_method
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    first, second = build(name, seed=3), build(name, seed=3)
    one, two = steps(first, 2), steps(second, 2)
    assert [output.loss.item() for output in one] == [output.loss.item() for output in two]
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@every_method
def test_encoders_are_exported_and_come_back(name: str, tmp_path: Path) -> None:
    method = build(name)
    steps(method, 1)
    encoders = method.encoders()
    assert next(iter(encoders.values())) is method.encoder
    for key, encoder in encoders.items():
        save_encoder(encoder, tmp_path / key)
        other = load_encoder(tmp_path / key)
        assert other.spec == encoder.spec
        spec = encoder.spec
        plane = (spec.num_frames, spec.size, spec.size) if spec.modality == "video" else (40, 100)
        x = torch.randn(2, spec.channels, *plane, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = encoder.eval()(x)
            assert features.shape == (2, encoder.dim)
            assert torch.equal(features, other.eval()(x))
            stage = encoder.stages[-1]
            assert torch.equal(encoder.maps(x, stage), other.maps(x, stage))


@every_method
def test_training_from_shards_resumes_to_the_same_bits(name: str, dataset: ShardIndex, tmp_path: Path) -> None:
    """Through the real loader and loop: 4 steps at once, and 2 steps, a restart and 2 more."""
    recipe = {**recipes(name)["tiny"].train, "epochs": 2, "batch_size": 2, "warmup_epochs": 0, "milestones": ()}
    config = TrainConfig(**recipe, checkpoint_every=2, log_every=1, keep=9, tensorboard=False, device="cpu")
    loader = LoaderConfig(threads=1, processes=0)
    whole = build(name, groups=1)  # a group of one picture is too small to normalise
    few = dataset.select(np.arange(4))
    train(whole, few, config, tmp_path / "whole", loader=loader, verbose=False)
    saved = checkpoint.complete(tmp_path / "whole")
    assert [path.name for path in saved] == ["step-00000002", "step-00000004"]
    (tmp_path / "half" / "checkpoint").mkdir(parents=True)
    saved[0].rename(tmp_path / "half" / "checkpoint" / saved[0].name)
    resumed = build(name, seed=1, groups=1)
    train(resumed, few, config, tmp_path / "half", loader=loader, resume=True, verbose=False)
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert [row["loss"] for row in read_log(tmp_path / "whole")][2:] == [
        row["loss"] for row in read_log(tmp_path / "half")
    ]


def test_two_processes(run_ranks) -> None:
    run_ranks(__file__, 2, *method_names(), timeout_s=400)


def two_processes(name: str, alone: tuple[float, dict[str, Tensor]]) -> None:
    """One step of two processes: weights stay equal in both, and where promised equal those of one process."""
    method = begun(build(name, groups=1).double())
    if method.rank_invariant:
        dist.sync_batch_norm(method, torch.device("cpu"))
    model = DistributedDataParallel(method, broadcast_buffers=False)
    rows = slice(dist.rank() * BATCH // 2, (dist.rank() + 1) * BATCH // 2)
    torch.manual_seed(0)
    loss = model(part_of(batch_of(method.plan(), BATCH), rows, torch.float64)).loss
    loss.backward()
    grads = gradients(method)
    for key, grad in grads.items():
        assert torch.equal(*dist.gather(grad[None])), f"{name}: processes differ in the gradient of {key}"
    if method.rank_invariant:
        mean = dist.sum_(loss.detach().clone()) / 2
        torch.testing.assert_close(mean.item(), alone[0], rtol=1e-9, atol=1e-12)
        for key, grad in grads.items():
            scale = float(alone[1][key].abs().max())
            torch.testing.assert_close(
                grad, alone[1][key], rtol=1e-6, atol=1e-8 * max(scale, 1e-6), msg=f"{name}: {key}"
            )


def gradients(method: Method) -> dict[str, Tensor]:
    return {key: param.grad for key, param in method.named_parameters() if param.grad is not None}


def one_process(name: str) -> tuple[float, dict[str, Tensor]]:
    method = begun(build(name, groups=1).double())
    torch.manual_seed(0)
    loss = method(part_of(batch_of(method.plan(), BATCH), slice(None), torch.float64)).loss
    loss.backward()
    return loss.item(), copy.deepcopy(gradients(method))


if __name__ == "__main__":
    torch.set_num_threads(1)
    expected = {name: one_process(name) for name in sys.argv[1:]}  # before there is a group
    dist.setup("cpu")
    for name, alone in expected.items():
        two_processes(name, alone)
    dist.teardown()
