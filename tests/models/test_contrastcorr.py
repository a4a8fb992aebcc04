"""Invariants of ContrastCorr: affinities, boxes, limits, what is frozen, and the pictures that go in."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from clipmill.models import correspondence as cc
from clipmill.models.colour_codec import ColourCodec, learn_colours, unit_lab
from clipmill.models.encoder import EncoderConfig
from clipmill.models.frame_pair import PairDraws, crop, degrees_of, joint_pair, loaded, ratio_of, scaled_crop, warm_pair
from clipmill.models.method import EpochContext
from clipmill.models.methods.contrastcorr import Config, ContrastCorr, Pair, dropped_channels, network_input, terms
from clipmill.models.resample8 import padded, resized, rotated
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.frame_views import FramePairs
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.views import View

SMALL = Config(
    encoder=EncoderConfig(width=0.125),
    warm_epochs=1,
    size=32,
    frame=64,
    multiple=16,
    codec_width=0.125,
    codec_steps=2,
    codec_patch=16,
    concentration_from=0,
    window=2,
)


def maps(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.rand(shape, generator=rng, dtype=torch.float64)).requires_grad_()


# --- affinities ---------------------------------------------------------------------------------------------


def test_weights_sum_to_one_and_nothing_is_copied_from_itself() -> None:
    f_r, f_t = maps(3, 5, 4, 6), maps(3, 5, 4, 6, seed=1)
    weights, own = cc.affinity(f_r, f_t).softmax(1), cc.without_itself(f_r)
    for each in (weights, own):
        torch.testing.assert_close(each.sum(1), torch.ones(3, 24, dtype=torch.float64))
    assert (own.diagonal(dim1=1, dim2=2) == 0).all()
    ones = torch.ones(3, 1, 4, 6, dtype=torch.float64)
    found, mass = cc.across_videos(f_t, f_r, ones)
    torch.testing.assert_close(found, ones)
    assert (mass > 0).all()
    assert (mass < 1).all()


def test_alone_in_the_batch_all_videos_are_ones_own() -> None:
    f_r, f_t, colours = maps(1, 5, 3, 4), maps(1, 5, 3, 4, seed=1), maps(1, 2, 3, 4, seed=2)
    found, mass = cc.across_videos(f_t, f_r, colours, 0.7)
    torch.testing.assert_close(mass, torch.ones_like(mass))
    torch.testing.assert_close(found, cc.copied(colours, (0.7 * cc.affinity(f_r, f_t)).softmax(1), (3, 4)))


def test_distinct_features_copy_every_cell_to_itself() -> None:
    distinct = 30 * torch.eye(12, dtype=torch.float64).view(1, 12, 3, 4)
    colours = maps(1, 2, 3, 4)
    raw = cc.affinity(distinct, distinct)
    torch.testing.assert_close(cc.copied(colours, raw.softmax(1), (3, 4)), colours)
    places = cc.grid(3, 4, raw).view(3, 4, 2)[:2]  # one row of windows of 2
    parts = places.view(1, 2, 2, 2, 2)
    spread = (parts - parts.mean((1, 3), keepdim=True)).square().mean()
    torch.testing.assert_close(cc.concentration(raw, (3, 4), 2), 2 * spread)


def test_concentration_is_0_for_one_place_and_symmetric() -> None:
    raw = torch.zeros(2, 16, 16, dtype=torch.float64)
    raw[:, 5] = 1e3  # every target cell comes from reference cell 5
    one_way = cc.concentration(raw, (4, 4), 2)
    nowhere = cc.concentration(torch.zeros_like(raw), (4, 4), 2)
    torch.testing.assert_close(nowhere, torch.zeros_like(nowhere))
    assert one_way < cc.concentration(1e3 * torch.eye(16, dtype=torch.float64).expand(2, 16, 16), (4, 4), 2)
    some = maps(2, 16, 16)
    torch.testing.assert_close(cc.concentration(some, (4, 4), 2), cc.concentration(some.transpose(1, 2), (4, 4), 2))


# --- boxes --------------------------------------------------------------------------------------------------


def peaks(top: int, left: int, size: tuple[int, int] = (3, 4), frame: tuple[int, int] = (12, 14)) -> Pair:
    """Distinct reference cells, and a target that shows them at a place."""
    count = size[0] * size[1]
    reference = 40 * torch.eye(count, dtype=torch.float64).view(1, count, *size)
    target = torch.zeros(1, count, *frame, dtype=torch.float64)
    target[:, :, top : top + size[0], left : left + size[1]] = reference
    return Pair(reference, target)


def box_of(pair: Pair) -> Tensor:
    frame = (pair.target.shape[2], pair.target.shape[3])
    return cc.box_around(cc.expected_places(*pair), (3, 4), frame)[0]


def test_the_box_follows_the_target() -> None:
    first, moved = box_of(peaks(4, 4)), box_of(peaks(6, 5))
    cell = torch.tensor([14 / 13, 14 / 13, 12 / 11, 12 / 11], dtype=torch.float64)  # grid corners lie on the border
    torch.testing.assert_close(moved - first, cell * torch.tensor([1.0, 1, 2, 2], dtype=torch.float64))
    torch.testing.assert_close(first[1] - first[0], first.new_tensor(4.0))
    torch.testing.assert_close(first[3] - first[2], first.new_tensor(3.0))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (9, 10), (0, 10), (9, 0)])
def test_the_box_never_leaves_the_frame(top: int, left: int) -> None:
    left_edge, right, above, below = box_of(peaks(top, left)).tolist()
    assert 0 <= left_edge < right <= 14
    assert 0 <= above < below <= 12


def test_a_box_on_whole_cells_of_a_picture_of_that_size() -> None:
    x = maps(2, 3, 9, 9)
    whole = torch.tensor([[0.0, 9, 0, 9]], dtype=torch.float64).expand(2, 4)
    torch.testing.assert_close(cc.cut(x, whole, (9, 9), (9, 9)), x)


def test_gradients_reach_the_target_outside_of_the_box() -> None:
    f_r, f_t = maps(2, 6, 4, 4), maps(2, 6, 9, 10, seed=1)
    lab_r, lab_t = (2 * maps(2, 3, 8 * h, 8 * w, seed=h) - 1 for h, w in ((4, 4), (9, 10)))
    codec = ColourCodec(0.125).double().requires_grad_(False)
    found = terms(codec, Pair(f_r, f_t), Pair(lab_r.detach(), lab_t.detach()), joint=True, window=2)
    (gradient,) = torch.autograd.grad(found["colour"], f_t)
    box = cc.box_around(cc.expected_places(f_r, f_t), (4, 4), (9, 10))
    outside = gradient[0, :, :, : int(box[0, 0]) - 1]
    assert outside.numel() > 0
    assert (outside != 0).any()
    assert set(found) == {"colour", "itself", "concentration", "consistency", "sparsity"}


# --- colours ------------------------------------------------------------------------------------------------


def test_a_sample_above_the_limit_counts_as_0() -> None:
    x, y = maps(4, 3, 5, 5), maps(4, 3, 5, 5, seed=1).detach()
    distances = cc.lab_distance(x, y)
    limit = float(distances.detach().sort().values[1]) + 1e-9
    kept = distances <= limit
    assert kept.sum() == 2
    loss = cc.kept_mean(distances, limit)
    torch.testing.assert_close(loss, distances[kept].sum() / 4)
    (gradient,) = torch.autograd.grad(loss, x)
    assert ((gradient != 0).flatten(1).any(1) == kept).all()


def test_the_codec_has_the_published_size_and_learns() -> None:
    whole = ColourCodec()
    assert [sum(p.numel() for p in part.parameters()) for part in whole.children()] == [621_132, 620_867]
    torch.manual_seed(0)
    codec = ColourCodec(0.125)
    patches = (100 + 56 * maps(6, 3, 2, 2).detach()).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()

    def distance() -> float:
        lab = unit_lab(patches)
        with torch.no_grad():
            return cc.lab_distance(codec.decode(codec.encode(lab)), lab).mean().item()

    before = distance()
    learn_colours(codec, patches, steps=60, batch_size=6, lr=3e-3)
    assert distance() < 0.9 * before
    assert not any(p.requires_grad or p.grad is not None for p in codec.parameters())


# --- the method ---------------------------------------------------------------------------------------------


def batch(method: ContrastCorr, count: int = 3) -> ClipBatch:
    rng = torch.Generator().manual_seed(0)
    side = method.config.frame
    blocks = torch.rand(count, 3, 1, 8, 8, generator=rng)
    frame = blocks.repeat_interleave(side // 8, 3).repeat_interleave(side // 8, 4)
    views = {"reference": frame, "target": frame.roll(side // 8, 4)}
    numbers = torch.arange(count)
    aux = {f"draw{n}": torch.rand(count, generator=rng, dtype=torch.float64) for n in range(len(PairDraws._fields))}
    sizes = {"height": torch.full((count,), 50.0).double(), "width": torch.full((count,), 70.0).double()}
    return ClipBatch(video=views, audio={}, index=numbers, uid=numbers, label=numbers, aux=aux | sizes)


def started(config: Config = SMALL, epoch: int = 0) -> ContrastCorr:
    torch.manual_seed(0)
    method = ContrastCorr(config)
    method.epoch.fill_(epoch)
    return method


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_codec_never_changes(epoch: int) -> None:
    method = started(epoch=epoch)
    assert method.joint == (epoch == 1)
    before = {name: tensor.clone() for name, tensor in method.codec.state_dict().items()}
    optimizer = torch.optim.Adam([p for group in method.param_groups() for p in group.params], 1e-3)
    for _ in range(2):
        method(batch(method)).loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in method.codec.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.codec.state_dict().items())


def test_the_terms_of_the_stages() -> None:
    config = replace(SMALL, warm_epochs=3, concentration_from=1, limit=1e-9)
    found = {epoch: started(config, epoch)(batch(started(config))).metrics for epoch in (0, 1, 3, 5)}
    assert set(found[0]) == {"colour", "itself"}
    assert set(found[1]) == {"colour", "itself", "concentration"}
    assert set(found[3]) == set(found[1]) | {"consistency", "sparsity"}
    # A limit that nothing meets applies from the second epoch of the first stage and the third of the second.
    assert [bool(found[epoch]["colour"] > 0) for epoch in (0, 1, 3, 5)] == [True, False, True, False]


def test_before_the_first_epoch_the_codec_learns_the_corpus() -> None:
    method = started()
    before = {name: tensor.clone() for name, tensor in method.codec.state_dict().items()}
    patches = torch.rand(5, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(5)
    corpus = ClipBatch(video={"patch": patches}, audio={}, index=numbers, uid=numbers, label=numbers)
    for epoch in (0, 1):
        asked: list[object] = []

        def collect(planner: object, function, asked: list[object] = asked) -> dict[str, Tensor]:
            asked.append(planner)
            return function(corpus)

        context = EpochContext(epoch=epoch, num_epochs=2, num_records=5, collect=collect)
        method.before_epoch(context)
        assert len(asked) == (epoch == 0)
        assert int(method.epoch) == epoch
        assert ("colour_codec" in context.log) == (epoch == 0)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in method.codec.state_dict().items())


def test_channels_are_dropped_in_both_frames_alike() -> None:
    lab = unit_lab(torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)))
    plain = network_input(lab, [])
    for dropped in ([1], [0, 2]):
        found = network_input(lab, dropped)
        kept = [c for c in range(3) if c not in dropped]
        assert (found[:, dropped] == 0).all()
        torch.testing.assert_close(found[:, kept], plain[:, kept] * 3 / len(kept))
    drawn = [tuple(dropped_channels(Draws(n), 0.7)) for n in range(4000)]
    shares = {kind: drawn.count(kind) / 4000 for kind in set(drawn)}
    assert set(shares) == {(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)}
    assert shares.pop(()) == pytest.approx(0.3, abs=0.03)
    assert all(share == pytest.approx(0.7 / 6, abs=0.03) for share in shares.values())


def test_the_encoder_sees_lab_at_stride_8() -> None:
    encoder = started().encoder.eval()
    assert encoder.spec.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        assert encoder.maps(torch.zeros(1, 3, 1, 32, 48), "res5").shape[3:] == (4, 6)


def test_a_run_goes_on_from_another_ones_weights(tmp_path) -> None:
    import safetensors.torch

    first = started()
    folder = tmp_path / "checkpoint" / "step-00000001"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(first.state_dict(), folder / "model.safetensors")
    torch.manual_seed(9)
    second = ContrastCorr(replace(SMALL, warm_epochs=0, start=tmp_path))
    for part in ("trunk", "codec"):
        expected = getattr(first, part).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in getattr(second, part).state_dict().items())

    def collect(*_: object) -> dict[str, Tensor]:
        raise AssertionError("the colours have been learnt")

    second.before_epoch(EpochContext(epoch=0, num_epochs=1, num_records=1, collect=collect))
    assert second.joint


def test_a_bad_option_is_named() -> None:
    with pytest.raises(ValueError, match="size = 36 is not possible; it must be a multiple of 8, 16 or more"):
        replace(SMALL, size=36)
    with pytest.raises(ValueError, match="frame = 24 is not possible; it must be at least size = 32"):
        replace(SMALL, frame=24)


# --- frames and pictures ------------------------------------------------------------------------------------


def test_the_two_frames_of_a_pair() -> None:
    views = (View(name="reference", modality="image"), View(name="target", modality="image"))
    planner = FramePairs(views=views, gap=50, extras=2)
    for num_frames in (1, 30, 51, 52, 200):
        record = SimpleNamespace(num_frames=num_frames, fps=Fraction(25), height=48, width=64)
        drawn = [planner(cast(VideoRecord, record), Draws(n), n) for n in range(300)]
        pairs = np.array([[span.frames[0] for span in one.spans] for one in drawn])
        assert pairs.min() >= 0
        assert pairs.max() < num_frames
        gaps = pairs[:, 1] - pairs[:, 0]
        if num_frames > 51:
            assert gaps.min() >= 1
            assert gaps.max() <= 50
        elif num_frames > 1:
            assert gaps.min() < 0 < gaps.max()
        assert drawn[0].aux.keys() == {"draw0", "draw1", "height", "width"}


def test_draws_cover_their_ranges() -> None:
    draws = np.linspace(0, 1, 500, endpoint=False)
    assert {degrees_of(draw) for draw in draws} == set(range(-10, 11))
    assert ratio_of(0.0) == pytest.approx(1 / 1.2)
    assert ratio_of(1.0) == pytest.approx(1.2)


def some_picture(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height))


def test_geometry_that_changes_nothing() -> None:
    x = some_picture(21, 30)
    assert torch.equal(rotated(x, 0), x)
    for kernel in ("linear", "cubic", "lanczos4"):
        assert (resized(x, 21, 30, kernel) - x).abs().max() <= (1 if kernel == "linear" else 0), kernel
    assert torch.equal(padded(x, 10, 30), x)
    assert torch.equal(scaled_crop(x, 1.0, 21, 0.5, 0.5), x[..., 5:26])


def test_a_half_turn_mirrors_both_axes() -> None:
    x = some_picture(20, 20)
    turned = rotated(x, 180)
    assert torch.equal(turned[:, 1:, 1:], x.flip(-1, -2)[:, :-1, :-1])


@pytest.mark.parametrize("kernel", ["linear", "cubic", "lanczos4"])
def test_resizing_agrees_with_torch_where_it_can(kernel: str) -> None:
    x = some_picture(24, 36)
    found = resized(x, 40, 50, kernel).double()  # type: ignore[arg-type]
    if kernel == "lanczos4":
        smooth = torch.arange(36).expand(1, 24, 36) * 7
        expected = (torch.arange(50) + 0.5) * 36 / 50 - 0.5
        inner = resized(smooth, 40, 50, "lanczos4")[0, 20, 8:-8]
        assert (inner - 7 * expected[8:-8]).abs().max() <= 1
        return
    mode = {"linear": "bilinear", "cubic": "bicubic"}[kernel]
    expected = torch.nn.functional.interpolate(x[None].double(), (40, 50), mode=mode, align_corners=False)[0]
    assert (found - expected.clamp(0, 255)).abs().max() <= 1.1


@pytest.mark.parametrize("ratio", [0.83, 1.17])
def test_only_the_window_is_computed(ratio: float) -> None:
    x = some_picture(48, 64)
    height, width = int(ratio * 48), int(ratio * 64)
    all_of_it = resized(x, height, width, "lanczos4" if ratio < 1 else "cubic")
    for draw in (0.0, 0.4, 0.99):
        assert torch.equal(
            scaled_crop(x, ratio, 32, draw, 1 - draw - 0.001), crop(all_of_it, 32, draw, 1 - draw - 0.001)
        )


def test_padding_mirrors_with_and_without_the_edge() -> None:
    x = torch.arange(4).expand(1, 4, 4)
    assert padded(x, 4, 8)[0, 0].tolist() == [2, 1, 0, 1, 2, 3, 3, 2]


def test_crops_of_a_pair_share_all_but_their_place() -> None:
    method = started()
    data = batch(method)
    draws = PairDraws(*(data.aux[f"draw{n}"] for n in range(7)))
    same = draws._replace(target_x=draws.reference_x, target_y=draws.reference_y)
    frame = data.video["reference"][:, :, 0]
    sizes = [(50, 70)] * 3
    first, second = warm_pair(frame, frame, sizes, same, 32, 64, 16)
    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, second)
    _, elsewhere = warm_pair(frame, frame, sizes, draws, 32, 64, 16)
    assert not torch.equal(first, elsewhere)
    reference, whole = joint_pair(frame, frame, sizes, draws, 32, 64, 16)
    assert reference.shape == (3, 3, 32, 32)
    assert whole.shape == (3, 3, 64, 64)
    lab8 = loaded(frame[0], 50, 70, 16)
    assert lab8.shape == (3, 48, 64)
    assert torch.equal(whole[0, :, 8:56], lab8)
    assert torch.equal(crop(whole[0], 64, 0.9, 0.9), whole[0])
