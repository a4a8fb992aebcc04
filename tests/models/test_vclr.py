"""VCLR: closed forms and invariants of its losses, its tuples, its queues and its key network."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.backbones.resnet import resnet18, temporal_shift
from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.losses import info_nce
from clipmill.models.method import recipes
from clipmill.models.methods.vclr import (
    VCLR,
    Config,
    Losses,
    Tower,
    anchor_and_others,
    inter_loss,
    intra_loss,
    order_label,
    reordered,
)
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.optim import peak_lr, schedule_of
from clipmill.pipeline.record import ShardIndex, VideoRecord
from clipmill.pipeline.views import View
from clipmill.pipeline.views_tuples import TsnSegments, Tuples, segment_bounds, shuffles


class Colours(Encoder):
    """A linear map of mean colours, D = 6."""

    stages, spec = ("pool",), InputSpec()

    def __init__(self) -> None:
        super().__init__()
        self.dim = 6
        self.linear = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.mean((2, 3, 4))))


def small(**options: object) -> VCLR:
    torch.manual_seed(0)
    settings: dict = {"out_dim": 5, "queue_size": 14, "key_momentum": 0.5, "size": 8} | options
    return VCLR(Config(**settings), Colours()).double()


def step(vclr: VCLR, seed: int = 0, count: int = 4, swap: bool = False) -> Losses:
    rng = torch.Generator().manual_seed(seed)
    same, one, two, anchor = (torch.rand(count, 3, 1, 4, 4, generator=rng).double() for _ in range(4))
    video_q, video_k = (torch.rand(count, 3, 3, 4, 4, generator=rng).double() for _ in range(2))
    keys = [same, two, one] if swap else [same, one, two]
    return vclr.contrast(anchor, keys, video_q, video_k, torch.arange(count) % 4, None)


# --- closed forms -------------------------------------------------------------------------------------------


def test_losses_where_everything_is_one_vector() -> None:
    size, one = 9, F.normalize(torch.ones(4, 7).double(), dim=1)
    inter, _ = inter_loss(one, [one] * 3, one[:1].T.expand(7, size), 0.1)
    video, _ = info_nce(one, one, one[:1].T.expand(7, size), 0.1)
    intra, _ = intra_loss(one, [one] * 3, 0.1)
    tower = Tower(Colours(), 7, 3)
    nn.init.zeros_(tower.classifier.weight)
    nn.init.zeros_(tower.classifier.bias)
    order = F.cross_entropy(tower.classifier(torch.randn(4, 42)), torch.arange(4))
    assert inter.item() == pytest.approx(math.log(1 + size))
    assert video.item() == pytest.approx(math.log(1 + size))
    assert intra.item() == pytest.approx(math.log(2))
    assert order.item() == pytest.approx(math.log(4))


def test_the_intra_loss_knows_only_differences_of_similarities() -> None:
    torch.manual_seed(0)
    q, *keys = (F.normalize(torch.randn(5, 6).double(), dim=1) for _ in range(4))
    loss, _ = intra_loss(q, keys, 0.1)
    p = [(q * key).sum(1) for key in keys]
    expected = torch.cat([F.softplus((other - p[0]) / 0.1) for other in p[1:]]).mean()
    assert loss.item() == pytest.approx(expected.item())
    shifted = [key + 0.3 * q for key in keys]  # every similarity grows by 0.3
    assert intra_loss(q, shifted, 0.1)[0].item() == pytest.approx(loss.item())


def test_the_other_frames_may_change_places() -> None:
    one, two = (step(small(), swap=swap) for swap in (False, True))
    assert one.inter.item() == pytest.approx(two.inter.item())
    assert one.intra.item() == pytest.approx(two.intra.item())


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 3, 4])
def test_order_features_have_length_one_over_segments(segments: int) -> None:
    torch.manual_seed(0)
    tower = Tower(Colours(), 5, segments).double()
    f = torch.randn(2, segments, 6).double()
    order = tower.tuple_embeddings(f)[:, 5:].unflatten(1, (segments, 5))
    torch.testing.assert_close(order.square().sum(1), torch.ones(2, 5).double())
    if segments == 1:
        torch.testing.assert_close(order.abs(), torch.ones_like(order))
    last = tower.order[2]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():  # a channel's scale does not matter
        last.weight[2] *= 3.0
        last.bias[2] *= 3.0
    torch.testing.assert_close(tower.tuple_embeddings(f)[:, 5:].unflatten(1, (segments, 5)), order)
    by_feature = Tower(Colours(), 5, segments, "feature").double().tuple_embeddings(f)[:, 5:]
    torch.testing.assert_close(by_feature.unflatten(1, (segments, 5)).norm(dim=2), torch.ones(2, segments).double())


def test_order_of_frames_matters_to_the_order_features_alone() -> None:
    tower = small().query
    x = torch.rand(2, 3, 3, 4, 4).double()
    tower.eval()
    plain, turned = tower.tuples(x), tower.tuples(x[:, :, [2, 0, 1]])
    torch.testing.assert_close(turned[:, :5], plain[:, :5])
    blocks, other = (found[:, 5:].unflatten(1, (3, 5)) for found in (plain, turned))
    torch.testing.assert_close(other, blocks[:, [2, 0, 1]])
    pooled = tower.trunk(x)
    torch.testing.assert_close(tower.trunk(x[:, :, [1, 2, 0]]), pooled)


def test_no_gradient_reaches_keys() -> None:
    vclr = small()
    losses = step(vclr)
    torch.stack(losses[:4]).sum().backward()
    assert all(param.grad is None for param in vclr.key.parameters())
    assert all(param.grad is not None for param in vclr.query.parameters())


# --- queues and the key network -----------------------------------------------------------------------------


def test_queues_hold_the_last_keys_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    vclr = small(queue_size=14)
    frames: list[Tensor] = []
    tuples: list[Tensor] = []
    for queue, pushed in ((vclr.frame_queue, frames), (vclr.tuple_queue, tuples)):

        def push(keys: Tensor, real=queue.push, pushed: list[Tensor] = pushed) -> Tensor:
            pushed.append(keys.clone())
            return real(keys)

        monkeypatch.setattr(queue, "push", push)
    for number in range(4):
        before = vclr.tuple_queue.keys.clone()
        losses = step(vclr, number)
        positive = (tuples[-1] @ before / 0.1).detach()
        assert losses.video_logits.shape == (4, 15)
        assert not torch.isclose(positive.abs().max(), torch.tensor(10.0).double())  # no key of this step among them
    for queue, pushed, rows in ((vclr.frame_queue, frames, 12), (vclr.tuple_queue, tuples, 4)):
        assert all(len(keys) == rows for keys in pushed)
        every = torch.cat(pushed)
        position = int(queue.position)
        assert position == len(every) % 14
        oldest_first = queue.keys.roll(-position, 1).T
        torch.testing.assert_close(oldest_first, every[-14:])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_key_network_follows_after_the_step(momentum: float) -> None:
    vclr = small(key_momentum=momentum)
    before = [param.clone() for param in vclr.key.parameters()]
    sgd = torch.optim.SGD(vclr.query.parameters(), 0.1)
    torch.stack(step(vclr)[:4]).sum().backward()
    for param, old in zip(vclr.key.parameters(), before, strict=True):
        assert torch.equal(param, old)  # not before the optimiser's step
    sgd.step()
    vclr.after_step(0, 10)
    for param, old, new in zip(vclr.key.parameters(), before, vclr.query.parameters(), strict=True):
        torch.testing.assert_close(param, new if momentum == 0 else old)
    query, key = vclr.query.trunk, vclr.key.trunk
    assert isinstance(query, Colours)
    assert isinstance(key, Colours)
    assert not torch.allclose(cast(Tensor, query.norm.running_mean), cast(Tensor, key.norm.running_mean))


def test_groups_are_processes_of_their_own() -> None:
    """Two groups in one process, rows exchanged, equal what each group computes alone."""
    order = torch.tensor([2, 0, 3, 1])
    vclr = small(groups=2)
    x = torch.rand(4, 3, 1, 4, 4).double()
    found = vclr._keys(vclr.key.frames, x, order)
    expected = torch.empty_like(found)
    for rows in (order[:2], order[2:]):
        expected[rows] = vclr.key.frames(x[rows])
    torch.testing.assert_close(found, expected)


# --- tuples -------------------------------------------------------------------------------------------------


def record(num_frames: int) -> VideoRecord:
    return cast(VideoRecord, SimpleNamespace(num_frames=num_frames, fps=Fraction(25)))


def planner(count: int = 3) -> Tuples:
    views = tuple(View(name=name, num_frames=n) for name, n in (("query", count), ("key", count), ("same", 1)))
    return Tuples(views=views)  # type: ignore[arg-type]


def test_tuples_keep_to_their_segments() -> None:
    labels, anchors, orders = [], set(), set()
    for number in range(800):
        num_frames = 6 + number % 30
        drawn = planner()(record(num_frames), Draws(number), number)
        query, key, same = (span.frames for span in drawn.spans)
        for (first, stop), one, other in zip(segment_bounds(num_frames, 3), query, key, strict=True):
            assert one != other
            assert first <= one < stop
            assert first <= other < stop
        assert drawn.aux["anchor"] in (0, 2)
        assert same == (query[int(drawn.aux["anchor"])],)
        label = order_label(*(torch.tensor([int(drawn.aux[f"{name}_order"])]) for name in ("query", "key")))
        labels.append(int(label))
        anchors.add(drawn.aux["anchor"])
        orders.add(drawn.aux["query_order"])
    np.testing.assert_allclose(np.bincount(labels) / 800, 0.25, atol=0.06)
    assert anchors == {0, 2}
    assert orders == {0, 1, 2, 3, 4}
    assert (2, 1, 0) not in shuffles(3)
    assert len(shuffles(4)) == 23


def test_selections_from_tuples() -> None:
    x = torch.arange(6.0).view(2, 1, 3, 1, 1)
    anchor, others = anchor_and_others(x, torch.tensor([0, 2]))
    assert anchor.flatten().tolist() == [0.0, 5.0]
    assert [other.flatten().tolist() for other in others] == [[1.0, 3.0], [2.0, 4.0]]
    assert reordered(x, torch.tensor([0, 3])).flatten().tolist() == [0.0, 1.0, 2.0, 4.0, 5.0, 3.0]
    assert order_label(torch.tensor([0, 1, 0, 4]), torch.tensor([0, 0, 2, 1])).tolist() == [0, 1, 2, 3]


def test_short_videos_are_left_out(dataset: ShardIndex) -> None:
    assert planner().usable(dataset).all()
    assert not planner(23).usable(dataset).any()  # of 40 to 45 frames
    with pytest.raises(ValueError, match=r"views of N, N and 1 frames with N >= 3, got \[2, 2, 1\]"):
        planner(2).usable(dataset)


def test_the_same_tensors_serve_as_anchor_and_tuple() -> None:
    config = replace(recipes("vclr")["tiny"].method, size=8)
    views = VCLR(config).plan().views
    assert [view.num_frames for view in views] == [3, 3, 1]  # seven pictures of six frames
    assert all(view.augment.per_frame for view in views)  # type: ignore[union-attr]


# --- segments of TSN and the shift of TSM -------------------------------------------------------------------


def test_tsn_frames_stay_in_their_segments() -> None:
    view = View(name="clip", num_frames=8)
    for number in range(200):
        (span,) = TsnSegments(views=(view,))(record(41), Draws(number), number).spans
        assert all(5 * place <= frame < 5 * place + 5 for place, frame in enumerate(span.frames))
    assert TsnSegments(views=(view,), middle=True)(record(3), Draws(0), 0).spans[0].frames == (0, 0, 0, 1, 1, 2, 2, 2)


def test_the_shift_moves_channels_in_time_and_needs_no_weights() -> None:
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 8, 2, 2).contiguous() + 1
    y = temporal_shift(x, 3, 8)[:, :, 0, 0]
    assert y[:, 0].tolist() == [2.0, 3.0, 0.0]
    assert y[:, 1].tolist() == [0.0, 1.0, 2.0]
    assert all(y[:, channel].tolist() == [1.0, 2.0, 3.0] for channel in range(2, 8))
    torch.manual_seed(0)
    plain, shifted = resnet18(width=0.125), resnet18(width=0.125, shift=8)
    shifted.load_state_dict(plain.state_dict())
    plain.eval(), shifted.eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(plain(clip), shifted(clip))
        torch.testing.assert_close(plain(clip), plain(clip.flip(2)))
        assert not torch.allclose(shifted(clip), shifted(clip.flip(2)), rtol=1e-3)  # it sees the direction of time
    with pytest.raises(ValueError, match="shift must be 0 or at least 2, got 1"):
        resnet18(shift=1)


# --- recipes ------------------------------------------------------------------------------------------------


def test_the_published_schedule() -> None:
    train = TrainConfig(**recipes("vclr")["k400"].train)
    per_epoch = 10
    rates = [peak_lr(train) * schedule_of(train, number, per_epoch) for number in range(400 * per_epoch + 1)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[5 * per_epoch] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(1e-6)


def test_starting_from_moco(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = small()
    head = {name: torch.randn_like(param) for name, param in source.query.inter.named_parameters()}
    tensors = {f"query.0.{name}": tensor.clone() for name, tensor in source.query.trunk.state_dict().items()}
    tensors |= {f"query.1.{name}": tensor for name, tensor in head.items()}
    folder = tmp_path / "checkpoint" / "step-00000007"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    found = VCLR(Config(out_dim=5, queue_size=14, start=str(tmp_path)), Colours().double()).double()
    for part in (found.query.inter, found.query.order, found.key.video):
        for name, param in part.named_parameters():
            torch.testing.assert_close(param, head[name])
    with pytest.raises(ValueError, match=r"no encoder.safetensors there; give a run folder"):
        VCLR(Config(out_dim=5, start=str(tmp_path / "nothing")), Colours())
    with pytest.raises(ValueError, match=r"does not fit: tensor 2.weight is \(5, 6\), it should be \(4, 6\)"):
        VCLR(Config(out_dim=4, start=str(tmp_path)), Colours())


@pytest.mark.parametrize(
    ("option", "value"), [("segments", 2), ("order_axis", "time"), ("min_area", 0.0), ("key_momentum", 2.0)]
)
def test_options_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option} = {value!r} is not possible; it must be"):
        Config(**{option: value})  # type: ignore[arg-type]
