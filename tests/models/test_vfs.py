"""Invariants of VFS: which frames and crops it sees, its losses, its two heads and its evaluation features."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.encoder import EncoderConfig, build_encoder
from clipmill.models.method import recipes
from clipmill.models.methods.vfs import MAPS, Config, Vfs, agreement_loss, pair_losses, shift_losses
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.frame_views import Halves, segment_length
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.slot import crop_table
from clipmill.pipeline.spec import Blur, Jitter, RandomResizedCrop
from clipmill.pipeline.views import View

SMALL = Config(encoder=EncoderConfig(width=0.125), frames=2, size=32, predictor_dim=8, queue_size=8)


def rows(count: int = 6, dim: int = 5, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=rng, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def video(num_frames: int) -> VideoRecord:
    return cast(VideoRecord, SimpleNamespace(num_frames=num_frames, fps=Fraction(25)))


def batch(method: Vfs, count: int = 4, seed: int = 0) -> ClipBatch:
    rng = torch.Generator().manual_seed(seed)
    size = (count, 3, method.config.frames, method.config.size, method.config.size)
    views = {name: torch.randn(size, generator=rng) for name in ("early", "late")}
    numbers = torch.arange(count)
    return ClipBatch(video=views, audio={}, index=numbers, uid=numbers, label=numbers)


# --- losses -------------------------------------------------------------------------------------------------


def test_all_pairs_equal_the_closed_form() -> None:
    p1, z1, p2, z2 = rows(12)
    units = [nn.functional.normalize(x, dim=1).view(3, 4, -1) for x in (p1, z1, p2, z2)]
    cosines = units[0] @ units[3].transpose(1, 2) + units[1] @ units[2].transpose(1, 2)
    torch.testing.assert_close(shift_losses(p1, z1, p2, z2, 4).sum(), (2 - cosines).mean())


def test_the_order_of_a_views_frames_does_not_matter() -> None:
    p1, z1, p2, z2 = rows(12)
    order = torch.cat([4 * b + torch.randperm(4, generator=torch.Generator().manual_seed(b)) for b in range(3)])
    expected = shift_losses(p1, z1, p2, z2, 4).sum()
    torch.testing.assert_close(shift_losses(p1[order], z1[order], p2, z2, 4).sum(), expected)
    torch.testing.assert_close(shift_losses(p1, z1, p2[order], z2[order], 4).sum(), expected)
    across = torch.arange(12).roll(1)  # rolling the whole batch mixes videos
    assert abs(shift_losses(p1, z1, p2[across], z2[across], 4).sum() - expected) > 1e-3


def test_projections_get_no_gradient_and_the_views_may_be_swapped() -> None:
    p1, z1, p2, z2 = rows()
    loss = shift_losses(p1, z1, p2, z2, 3).sum()
    loss.backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    torch.testing.assert_close(shift_losses(p2, z2, p1, z1, 3).sum(), loss)


def test_one_frame_is_the_simple_form() -> None:
    p1, z1, p2, z2 = rows()
    assert torch.equal(shift_losses(p1, z1, p2, z2, 1)[0], agreement_loss(p1, z1, p2, z2))


def test_the_scale_of_rows_does_not_matter_and_the_loss_lies_between_0_and_4() -> None:
    p1, z1, p2, z2 = rows()
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.1
    loss = shift_losses(p1, z1, p2, z2, 2).sum()
    torch.testing.assert_close(shift_losses(scale * p1, z1 * 3, p2, scale * z2, 2).sum(), loss)
    assert 0 < loss < 4
    torch.testing.assert_close(shift_losses(p1, -p1, p1, -p1, 1).sum().item(), 4.0)
    torch.testing.assert_close(shift_losses(p1, p1, p1, p1, 1).sum().item(), 0.0, rtol=0, atol=1e-12)


def test_pairs_with_negatives_are_cross_entropies() -> None:
    q, k = (nn.functional.normalize(x, dim=1) for x in rows(6)[:2])
    negatives = nn.functional.normalize(rows(7, seed=1)[0], dim=1).T
    found = pair_losses(q, k, negatives, 0.2, 3)
    for b, i, j in np.ndindex(2, 3, 3):
        query = q[3 * b + i]
        logits = torch.cat([(query @ k[3 * b + j])[None], query @ negatives]) / 0.2
        torch.testing.assert_close(found[b, i, j], -logits.log_softmax(0)[0])


# --- what is seen -------------------------------------------------------------------------------------------


def test_one_frame_of_every_segment_the_early_half_first() -> None:
    plan = Vfs(replace(SMALL, frames=4)).plan()
    assert [view.name for view in plan.views] == ["early", "late"]
    for num_frames in (7, 15, 16, 40, 301):
        room = segment_length(num_frames, 8)
        wrapped = 0
        for draw in range(60):
            early, late = plan(video(num_frames), Draws(draw), draw).spans
            frames = [*early.frames, *late.frames]
            assert len(frames) == 8
            assert all(0 <= frame < num_frames for frame in frames)
            wrapped += frames[-1] == 0
            if room and frames[-1] == 0:
                frames[-1] = num_frames  # it was this before it wrapped around
            assert [frame // room for frame in frames] == list(range(8)) if room else frames == sorted(frames)
        assert (wrapped > 0) == ((num_frames + 1) % 8 == 0)


def test_a_video_shorter_than_the_segments_is_spread_without_draws() -> None:
    views = tuple(View(name=name, num_frames=4) for name in ("early", "late"))
    spans = {Halves(views=views)(video(5), Draws(draw), draw).spans for draw in range(5)}
    assert len(spans) == 1


def test_every_frame_has_a_crop_of_its_own_inside_the_picture() -> None:
    plan = Vfs(SMALL).plan()
    draws = np.arange(20, dtype=np.uint64)
    height, width = np.full(20, 72), np.full(20, 96)
    tables = [crop_table(view, draws, np.tile(np.arange(2), (20, 1)), height, width) for view in plan.views]
    boxes = [
        np.stack([table["x"] + table["bx"], table["y"] + table["by"], table["bw"], table["bh"]], -1) for table in tables
    ]
    for box in boxes:
        x, y, w, h = np.moveaxis(box, -1, 0)
        assert (x >= 0).all()
        assert (y >= 0).all()
        assert (x + w <= 96).all()
        assert (y + h <= 72).all()
        assert (box[:, 0] != box[:, 1]).any(-1).all()
    assert (boxes[0] != boxes[1]).any(-1).all()


def test_a_crop_that_does_not_fit_is_the_centre_square() -> None:
    crop = RandomResizedCrop(scale=(0.99, 1.0), fallback="square")
    boxes = crop.boxes(np.arange(50, dtype=np.uint64), np.full(50, 40), np.full(50, 400))
    assert np.array_equal(boxes.clamp, np.tile([180, 0, 220, 40], (50, 1)))


def test_colour_is_for_tracking_only() -> None:
    def operators(name: str) -> list[type]:
        return [type(op) for op in Vfs(recipes("vfs")[name].method).plan().views[0].augment.ops]

    plain, colour = operators("k400_r18"), operators("k400_r18_colour")
    assert Jitter not in plain
    assert {Jitter, Blur} < set(colour)


# --- networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "predictor", "trunk_size", "head_size"), [
    ("resnet18", 128, 11_176_512, 923_008),
    ("resnet50", 512, 23_508_032, 14_702_080),
])  # fmt: skip
def test_published_sizes(backbone: str, predictor: int, trunk_size: int, head_size: int) -> None:
    with torch.device("meta"):
        method = Vfs(Config(encoder=EncoderConfig(name=backbone), predictor_dim=predictor))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    trunk = sum(p.numel() for p in method.encoder.parameters())
    assert trunk == trunk_size
    assert sizes["online"] - trunk + sizes["predictor"] == head_size


def test_the_views_pass_one_after_the_other() -> None:
    torch.manual_seed(0)
    method = Vfs(SMALL)
    twin = Vfs(SMALL)
    twin.load_state_dict(method.state_dict())
    data = batch(method)
    method(data)
    for name in ("early", "late"):
        frames = data.video[name].transpose(1, 2).flatten(0, 1)[:, :, None]
        twin.predictor(twin.online(frames))
    for (name, found), expected in zip(method.named_buffers(), dict(twin.named_buffers()).values(), strict=True):
        assert torch.equal(found, expected), name
    assert int(method.predictor[1].num_batches_tracked) == 2


def test_all_weights_decay() -> None:
    groups = Vfs(SMALL).param_groups()
    assert [group.weight_decay for group in groups] == [None]


def test_keys_of_all_frames_enter_the_queue_and_follow_once() -> None:
    torch.manual_seed(0)
    method = Vfs(replace(SMALL, negatives=True, key_momentum=0.5))
    assert not any(p.requires_grad for p in method.target.parameters())
    before = method.queue.keys.clone()
    method(batch(method, 2)).loss.backward()
    assert int(method.queue.position) == 4
    changed = (method.queue.keys != before).any(0)
    assert changed.tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(method.queue.keys.norm(dim=0), torch.ones(8))
    assert all(p.grad is None for p in method.target.parameters())
    assert not hasattr(method, "predictor")


@pytest.mark.parametrize("pairs", ["all", "same"])
def test_pairs_to_match(pairs: str) -> None:
    torch.manual_seed(0)
    method = Vfs(replace(SMALL, pairs=pairs)).double()
    data = batch(method)
    double = ClipBatch(
        video={k: x.double() for k, x in data.video.items()}, audio={}, index=data.index, uid=data.uid, label=data.label
    )
    loss = method(double).loss
    swapped = ClipBatch(
        video={"early": double.video["early"], "late": double.video["late"].flip(2)},
        audio={}, index=data.index, uid=data.uid, label=data.label,
    )  # fmt: skip
    equal = torch.isclose(method(swapped).loss, loss, rtol=1e-9)
    assert bool(equal) == (pairs == "all")


def test_evaluation_features_have_stride_8_and_the_same_weights() -> None:
    torch.manual_seed(0)
    encoder = Vfs(SMALL).encoder.eval()
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)  # the blocks begin as the identity
    x = torch.randn(1, 3, 1, 45, 61)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        pixel, thing = (encoder.maps(x, **MAPS[name]) for name in ("pixel", "object"))
    assert pixel.shape[3:] == thing.shape[3:] == (6, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    plain = build_encoder("resnet18", width=0.125, strides=(1, 2, 1, 1), zero_init_residual=True).eval()
    plain.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.maps(x, "res4"), pixel)
        assert not torch.allclose(plain.maps(x, "res5"), thing)  # tracking dilates, propagation does not


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ValueError, match="min_area = 0 is not possible"):
        replace(SMALL, min_area=0)
    with pytest.raises(ValueError, match="frames = 0"):
        replace(SMALL, frames=0)
