"""What SimCLR, HCL, MoCHi and DenseCL promise beyond the conformance suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipmill.models.encoder import Encoder, EncoderConfig, InputSpec
from clipmill.models.method import EpochContext
from clipmill.models.methods import densecl, hcl, mochi, moco, simclr
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.spec import CIFAR_MEAN, Blur, DistortedBox, Jitter, Normalize, RandomResizedCrop, VideoSpec


class Squares(Encoder):
    """Its map is the input averaged over squares of 4 x 4 pixels, through one convolution."""

    stages, reductions, spec = ("map",), {"map": (1, 4, 4)}, InputSpec(size=12)

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.dim = width
        self.conv = torch.nn.Conv3d(3, width, (1, 4, 4), (1, 4, 4))

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "map").mean((2, 3, 4))


def pictures(count: int = 4, seed: int = 0, side: int = 12) -> Tensor:
    return torch.randn(count, 3, 1, side, side, generator=torch.Generator().manual_seed(seed))


def batch(**video: Tensor) -> ClipBatch:
    count = torch.arange(len(next(iter(video.values()))))
    zero = {name: torch.zeros(len(count), dtype=torch.float64) for name in video}
    return ClipBatch(video=video, audio={}, index=count, uid=count, label=count, start_s=zero, aux={})


def epoch(number: int, of: int = 20) -> EpochContext:
    return EpochContext(epoch=number, num_epochs=of, num_records=4, collect=lambda *_: {})


def spec_of(method: Any) -> VideoSpec:
    (one, two) = method.plan().views
    assert one.augment == two.augment
    assert isinstance(one.augment, VideoSpec)
    return one.augment


SMALL = EncoderConfig(name="resnet18", width=0.125)


# --- views --------------------------------------------------------------------------------------------------


def test_simclr_has_the_references_crop_and_the_papers_brightness() -> None:
    plain = spec_of(simclr.SimCLR(simclr.Config(encoder=SMALL)))
    assert plain.crop == RandomResizedCrop(scale=(0.08, 1.0))
    assert next(op for op in plain.ops if isinstance(op, Jitter)).maths == "simclr"
    config = simclr.Config(encoder=SMALL, crop="reference", brightness="shift")
    other = spec_of(simclr.SimCLR(config))
    assert other.crop == DistortedBox(scale=(0.1, 1.0))
    assert next(op for op in other.ops if isinstance(op, Jitter)).maths == "simclr_v1"
    assert not any(isinstance(op, Normalize) for op in other.ops)


def test_hcl_blurs_three_pixels_and_normalises_as_cifar() -> None:
    method = hcl.HCL(hcl.Config(encoder=SMALL))
    spec = spec_of(method)
    assert next(op for op in spec.ops if isinstance(op, Blur)).taps == 3
    assert method.encoder.spec.mean == CIFAR_MEAN
    assert method.encoder.spec.size == 32


# --- HCL ----------------------------------------------------------------------------------------------------


def test_each_view_of_hcl_has_batch_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    method = hcl.HCL(hcl.Config(hidden_dim=8, out_dim=4), Squares())
    x1, x2 = pictures(), pictures(seed=1)
    loss = method(batch(view1=x1, view2=x2)).loss
    torch.testing.assert_close(method(batch(view1=x1, view2=5 + 3 * x2)).loss, loss, atol=1e-3, rtol=0)


def test_beta_falls_in_nine_steps() -> None:
    method = hcl.HCL(hcl.Config(beta=8.0, anneal=True, hidden_dim=8), Squares())
    seen = []
    for number in range(18):
        context = epoch(number, 18)
        method.before_epoch(context)
        seen.append(float(method.beta))
        assert context.log == {"beta": seen[-1]}
    assert seen == [8.0, 8.0, 8.0, 7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 0.0]
    steady = hcl.HCL(hcl.Config(beta=8.0, hidden_dim=8), Squares())
    steady.before_epoch(epoch(17, 18))
    assert float(steady.beta) == 8.0


# --- MoCo's negatives ---------------------------------------------------------------------------------------

MOCO = moco.Config(num_frames=1, out_dim=4, queue_size=16, key_momentum=0.5, hardest=5, mixes=7, query_mixes=3)


def moco_of(**options: Any) -> moco.MoCo:
    torch.manual_seed(0)
    return moco.MoCo(replace(MOCO, **options), Squares())


def test_no_mixes_and_no_weights_are_plain_moco() -> None:
    x_q, x_k = pictures(), pictures(seed=1)
    results = []
    for options in (
        {},
        {"negatives": "mochi", "mixes": 0, "query_mixes": 0},
        {"negatives": "hard", "beta": 0.0, "tau_plus": 0.0},
    ):
        method = moco_of(**options)
        loss, logits = method.contrast(x_q, x_k, None)
        loss.backward()
        results.append((loss.detach(), logits.detach(), method.query[1][0].weight.grad, method.queue.keys.clone()))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_mixes_make_the_task_harder_and_leave_the_queue_alone() -> None:
    plain, mixed, hard = moco_of(), moco_of(negatives="mochi"), moco_of(negatives="hard")
    x_q, x_k = pictures(), pictures(seed=1)
    losses = [method.contrast(x_q, x_k, None)[0] for method in (plain, mixed, hard)]
    assert losses[1] > losses[0]
    assert losses[2] > losses[0]
    assert torch.equal(plain.queue.keys, mixed.queue.keys)
    assert torch.equal(plain.queue.position, mixed.queue.position)


def test_the_first_epochs_have_no_mixes_also_after_a_restart() -> None:
    method = moco_of(negatives="mochi", plain_epochs=2)
    x_q, x_k = pictures(), pictures(seed=1)
    for number, columns in ((0, 17), (1, 17), (2, 27), (3, 27)):
        method.before_epoch(epoch(number))
        assert method.contrast(x_q, x_k, None)[1].shape == (4, columns)
        resumed = moco_of(negatives="mochi", plain_epochs=2)
        resumed.load_state_dict(method.state_dict())
        assert resumed.contrast(x_q, x_k, None)[1].shape == (4, columns)


def test_mochi_is_moco_with_mixes() -> None:
    config = replace(MOCO, negatives="mochi")
    torch.manual_seed(0)
    method, other = mochi.MoCHi(config, Squares()), moco_of(negatives="mochi")
    assert method.plan() == other.plan()
    views = batch(query=pictures(), key=pictures(seed=1))
    outputs = []
    for each in (method, other):
        torch.manual_seed(1)
        outputs.append(each(views))
    assert outputs[0].loss.item() == outputs[1].loss.item()
    assert set(outputs[0].metrics) == {"accuracy", "queue_accuracy"}
    assert method.encoder is method.moco.encoder
    with pytest.raises(ValueError, match="negatives = 'none' is not possible; it must be mochi"):
        mochi.MoCHi(MOCO, Squares())


# --- DenseCL ------------------------------------------------------------------------------------------------

DENSE = densecl.Config(hidden_dim=8, out_dim=4, queue_size=8, key_momentum=0.5)


def dense_of(**options: Any) -> densecl.DenseCL:
    torch.manual_seed(0)
    return densecl.DenseCL(replace(DENSE, **options), Squares())


def test_without_the_dense_loss_the_dense_head_learns_nothing() -> None:
    method = dense_of(dense_share=0.0)
    method(batch(query=pictures(), key=pictures(seed=1))).loss.backward()
    assert all(not p.grad.any() for p in method.query.neck.mlp2.parameters() if p.grad is not None)
    assert any(p.grad.any() for p in method.query.neck.mlp.parameters() if p.grad is not None)


def test_equal_views_match_in_place_and_meet_themselves() -> None:
    method, x = dense_of(), pictures()
    step = method.contrast(x, x, None)
    assert torch.equal(step.match, torch.arange(9).expand(4, 9))
    torch.testing.assert_close(step.query.places, step.key.places)


def test_the_dense_loss_can_begin_later() -> None:
    method, views = dense_of(dense_from_step=2), batch(query=pictures(), key=pictures(seed=1))
    dense = []
    for step in range(4):
        dense.append(float(method(views).metrics["loss_dense"]))
        method.after_step(step, 4)
    assert dense[:2] == [0.0, 0.0]
    assert min(dense[2:]) > 0


def test_a_grid_pools_matches_and_heads_alike() -> None:
    method = dense_of(grid=2)
    step = method.contrast(pictures(side=16), pictures(seed=1, side=16), None)
    assert step.match.shape == (4, 4)
    assert step.query.map.shape == (4, 6, 4)
    one = dense_of(grid=1).contrast(pictures(), pictures(seed=1), None)
    assert not one.match.any()


def test_the_keys_of_a_step_come_after_it() -> None:
    method = dense_of()
    before = method.queue2.keys.clone()
    step = method.contrast(pictures(), pictures(seed=1), None)
    assert torch.equal(method.queue2.keys[:, 4:], before[:, 4:])
    torch.testing.assert_close(method.queue2.keys[:, :4].T, step.key.mean)
    torch.testing.assert_close(method.queue2.keys.norm(dim=0), torch.ones(8))
    assert int(method.queue.position) == int(method.queue2.position) == 4
    assert not any(tensor.requires_grad for tensor in step.key)


def test_chunks_do_not_change_a_step() -> None:
    x_q, x_k = pictures(8), pictures(8, seed=1)
    torch.manual_seed(0)
    whole = densecl.DenseCL(replace(DENSE, queue_size=1 << 14, groups=2), Squares())
    step = whole.contrast(x_q, x_k, None)
    torch.manual_seed(0)
    parts = densecl.DenseCL(replace(DENSE, queue_size=1 << 14, groups=2, chunk_mb=1), Squares())
    other = parts.contrast(x_q, x_k, None)
    torch.testing.assert_close(step.loss_dense, other.loss_dense)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (hcl.Config, "tau_plus", 1.0),
        (hcl.Config, "beta", -1.0),
        (moco.Config, "hardest", 0),
        (moco.Config, "query_mixes", -1),
        (densecl.Config, "dense_share", 1.5),
        (densecl.Config, "grid", -1),
    ],
)
def test_options_out_of_range_are_named(kind: type, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} = {value} is not possible; it must be"):
        kind(**{option: value})
