"""VideoMoCo: closed forms and invariants of fading keys, dropped frames, the generator and its gradients.

Run as a script, this file is one of two processes that train together.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.frame_dropper import FrameScorer, drop_frames, pooled_side
from clipmill.models.method import recipes
from clipmill.models.methods.moco import Config as MoCoConfig
from clipmill.models.methods.moco import MoCo
from clipmill.models.methods.videomoco import Config, VideoMoCo, adversarial_loss, augmentation
from clipmill.pipeline import dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.optim import schedule_of
from clipmill.pipeline.slot import crop_table
from clipmill.pipeline.spec import Flip, Jitter
from clipmill.pipeline.views import View

SIDE, FRAMES = 11, 4


class Colours(Encoder):
    """A linear map of the mean colours of every frame, with normalisation; D = 6."""

    stages, spec = ("pool",), InputSpec()

    def __init__(self) -> None:
        super().__init__()
        self.dim = 6
        self.linear = nn.Linear(3 * FRAMES, 6)
        self.norm = nn.BatchNorm1d(6)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x.square().mean((3, 4)).flatten(1)))


def small(**options: object) -> VideoMoCo:
    torch.manual_seed(0)
    settings: dict = {"num_frames": FRAMES, "size": SIDE, "out_dim": 5, "queue_size": 12, "hidden": 6, "drop": 1}
    return VideoMoCo(Config(**(settings | options)), Colours()).double()


def clips(seed: int = 0, count: int = 4) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, FRAMES, SIDE, SIDE, generator=rng).double()


# --- the contrastive loss -----------------------------------------------------------------------------------


def test_without_drop_and_decay_it_is_moco() -> None:
    ours = small(drop=0, decay=1.0)
    torch.manual_seed(0)
    config = MoCoConfig(num_frames=FRAMES, size=SIDE, out_dim=5, queue_size=12, mlp=False, temperature=0.07)
    theirs = MoCo(config, Colours()).double()
    for part in ("query", "key", "queue"):
        getattr(theirs, part).load_state_dict(getattr(ours, part).state_dict())
    order = torch.tensor([1, 3, 0, 2])
    for number in range(3):
        step = ours.contrast(clips(number), clips(10 + number), order)
        loss, logits = theirs.contrast(clips(number), clips(10 + number), order)
        assert step.loss.item() == loss.item()
        assert torch.equal(step.logits, logits)
        assert step.loss_g.item() == 0.0
        assert not step.dropped.any()


@pytest.mark.parametrize("age", [0, 3, 500])
def test_loss_where_everything_is_one_vector(age: int) -> None:
    method = small(drop=0, decay=0.99)
    one = F.normalize(torch.ones(4, 5).double(), dim=1)
    method.queue.keys.copy_(one[:1].T.expand(5, 12))
    method.age.fill_(age)
    loss, _ = method.classify(one, one)
    weight = 0.99**age
    assert loss.item() == pytest.approx(math.log(1 + 12 * math.exp((weight - 1) / 0.07)))


def test_ages_in_steps() -> None:
    method = small(drop=0)
    written = np.zeros(12, int)  # step of the last write of every column, from 1; 0 = never
    rows = F.normalize(torch.randn(4, 5).double(), dim=1)
    for step in range(1, 8):
        method.classify(rows, rows)
        place = 4 * (step - 1) % 12
        written[place : place + 4] = step
        expected = np.where(written > 0, step - written + 1, step)
        np.testing.assert_array_equal(method.age.numpy(), expected)
    assert int(method.age.max()) == 12 // 4


def test_ages_in_keys() -> None:
    method = small(drop=0, decay_unit="key")
    rows = F.normalize(torch.randn(4, 5).double(), dim=1)
    for _ in range(3):
        method.classify(rows, rows)
    np.testing.assert_array_equal(method.age.numpy(), np.arange(12, 0, -1))


def test_fading_is_exact_in_single_precision() -> None:
    method = small(drop=0, decay=0.99999, decay_unit="key", temperature=1.0).float()
    method.age.fill_(65536)
    one = F.normalize(torch.ones(4, 5), dim=1)
    method.queue.keys.copy_(one[:1].T.expand(5, 12))
    _, logits = method.classify(one, one)
    torch.testing.assert_close(logits[:, 1:], torch.full((4, 12), 0.99999**65536), rtol=1e-6, atol=0)


def test_ages_are_saved_and_stay_whole() -> None:
    method = small()
    assert method.state_dict()["age"].dtype == torch.int64
    assert method.half().age.dtype == torch.int64


# --- dropped frames and the generator -----------------------------------------------------------------------


def test_exactly_the_lowest_frames_become_their_mean() -> None:
    x, scores = clips(), torch.rand(4, FRAMES).double().requires_grad_()
    found, dropped = drop_frames(x, scores, 2)
    assert dropped.sum(1).tolist() == [2] * 4
    assert (scores[dropped].view(4, 2).amax(1) < scores[~dropped].view(4, 2).amin(1)).all()
    for row, frame in torch.cartesian_prod(torch.arange(4), torch.arange(FRAMES)).tolist():
        if dropped[row, frame]:
            assert found[row, :, frame].max() == found[row, :, frame].min()
            torch.testing.assert_close(found[row, :, frame].mean(), x[row, :, frame].mean())
        else:
            assert torch.equal(found[row, :, frame], x[row, :, frame])
    found.sum().backward()
    assert scores.grad is not None
    assert (scores.grad == 3 * SIDE * SIDE).all()


def test_scores_sum_to_one_and_do_not_depend_on_neighbours_in_eval_mode() -> None:
    torch.manual_seed(0)
    scorer = FrameScorer(3 * FRAMES, FRAMES, SIDE, 6).double()
    x, order = clips(), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(scorer(x).sum(1), torch.ones(4).double())
    scorer.eval()
    torch.testing.assert_close(scorer(x[order]), scorer(x)[order])
    torch.testing.assert_close(scorer(x.flatten(1, 2)), scorer(x))  # colour by colour
    with pytest.raises(ValueError, match="frames are scored at 11 x 11 pixels, got"):
        scorer(x[..., 1:])


def test_the_published_generator_has_its_size() -> None:
    scorer = FrameScorer(96, 32, 112)
    assert scorer.lstm.input_size == 169
    assert sum(param.numel() for param in scorer.parameters()) == pytest.approx(0.56e6, rel=0.01)
    assert [pooled_side(side) for side in (112, 40, 11, 10)] == [13, 4, 1, 0]
    with pytest.raises(ValueError, match="clips of 10 pixels are too small to score"):
        FrameScorer(3, 1, 10)


def test_running_statistics_are_updated_once_per_use() -> None:
    scorer = FrameScorer(3 * FRAMES, FRAMES, SIDE, 6).double()
    scorer(clips())
    counts = [int(norm.num_batches_tracked) for norm in scorer.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert sorted(counts) == [1, 3, 6]


# --- the step -----------------------------------------------------------------------------------------------


def split(method: VideoMoCo) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    assert method.generator is not None
    return list(method.query.parameters()), list(method.generator.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_who_gets_which_gradient(strict: bool) -> None:
    """The same two losses, differentiated one after the other by the book."""
    method, book = small(strict=strict), small()
    out = method.contrast(clips(0), clips(1), None)
    out.loss.backward()
    assert book.generator is not None
    d_params, g_params = split(book)
    scores = book.generator(clips(0))
    x_dropped, _ = drop_frames(clips(0), scores, 1)
    q_full, q_dropped = book._embed(book.query, clips(0)), book._embed(book.query, x_dropped)
    loss_d, _ = book.classify(q_dropped, book._keys(clips(1), None))
    loss_g = adversarial_loss(q_dropped, q_full)
    of_g = torch.autograd.grad(loss_g, g_params, retain_graph=True)
    of_d = torch.autograd.grad(loss_d, [*d_params, *g_params])
    assert out.loss.item() == pytest.approx(loss_d.item())
    assert out.loss_g.item() == pytest.approx(loss_g.item())
    found_d, found_g = split(method)
    for param, expected in zip(found_d, of_d[: len(d_params)], strict=True):
        torch.testing.assert_close(param.grad, expected)
    for param, own, leak in zip(found_g, of_g, of_d[len(d_params) :], strict=True):
        torch.testing.assert_close(param.grad, own if strict else own + leak)
    assert any(leak.abs().max() > 0 for leak in of_d[len(d_params) :])
    assert all(param.grad is None for param in method.key.parameters())


def test_the_generators_loss_is_bounded_and_the_key_knows_no_generator() -> None:
    one, other = small(), small()
    _, params = split(other)
    with torch.no_grad():
        for param in params:
            param.add_(0.1)
    found = [method.contrast(clips(0), clips(1), None) for method in (one, other)]
    assert torch.equal(one.queue.keys, other.queue.keys)
    for step in found:
        assert -100 * 2 / math.sqrt(5) <= step.loss_g.item() <= 0
    far = torch.eye(5).double()
    assert adversarial_loss(far, -far).item() == pytest.approx(-100 * 2 / 5)
    assert adversarial_loss(far, far).item() == 0.0


def test_without_gradients_it_computes_the_losses() -> None:
    with torch.no_grad():
        out = small().contrast(clips(0), clips(1), None)
    assert out.loss.item() == out.loss_d.item()


def test_both_networks_stay_equal_in_two_processes(run_ranks) -> None:
    run_ranks(__file__, 2, timeout_s=400)


def train_together() -> None:
    method = small(strict=False, queue_size=16)
    model = DistributedDataParallel(method, broadcast_buffers=False)
    sgd = torch.optim.SGD([param for param in method.parameters() if param.requires_grad], 0.1, 0.9)
    start = [param.detach().clone() for params in split(method) for param in params]
    for number in range(3):
        seed = 2 * number + dist.rank()
        empty = torch.zeros(4, dtype=torch.int64)
        video = {"query": clips(seed), "key": clips(100 + seed)}
        method.step_key = number
        loss = model(ClipBatch(video=video, audio={}, index=empty, uid=empty, label=empty)).loss
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        method.after_step(number, 3)
    for param, before in zip((p for params in split(method) for p in params), start, strict=True):
        assert torch.equal(*dist.gather(param[None])), "the processes have drifted apart"
        assert not torch.equal(param, before) or before.shape == method.generator.lstm.weight_hh_l0_reverse.shape
    assert torch.equal(*dist.gather(method.queue.keys[None]))
    assert torch.equal(*dist.gather(method.age[None]))


# --- augmentation, stages, options --------------------------------------------------------------------------


def test_frames_share_their_crop_but_not_their_colours() -> None:
    spec = augmentation(16, "v1", 0.2, per_frame=True)
    view = View(name="query", num_frames=5, augment=spec)
    draws = np.arange(3, dtype=np.uint64)
    table = crop_table(view, draws, np.tile(np.arange(5), (3, 1)), np.full(3, 40), np.full(3, 60))
    for name in ("x", "y", "w", "h", "bw", "bh"):
        assert (table[name] == table[name][:, :1]).all(), name
    assert len({tuple(row) for row in table[["x", "y", "w"]][:, 0].tolist()}) == 3
    flip = next(op for op in spec.ops if isinstance(op, Flip))
    applied = flip.draw(spec.item_keys(draws, 5, view.key))["apply"].reshape(3, 5)
    assert (applied != applied[:, :1]).any()
    consistent = augmentation(16, "v1", 0.2, per_frame=False)
    assert consistent.item_keys(draws, 5, view.key).shape == (3,)


def test_the_released_operators() -> None:
    v1, v2 = (augmentation(112, version, 0.2, True) for version in ("v1", "v2"))
    assert [type(op).__name__ for op in v1.ops] == ["Gray", "Jitter", "Flip", "Normalize"]
    assert [type(op).__name__ for op in v2.ops] == ["Jitter", "Gray", "Blur", "Flip", "Normalize"]
    jitter = next(op for op in v1.ops if isinstance(op, Jitter))
    assert (jitter.hue, jitter.p, jitter.maths, jitter.order) == (0.4, 1.0, "kornia", "batch")
    assert v2.ops[2].kernel == 11  # type: ignore[union-attr]


def test_the_second_stage_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first = small(drop=0)
    for number in range(2):
        first.contrast(clips(number), clips(9 + number), None)
    folder = tmp_path / "checkpoint" / "step-00000009"
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in first.state_dict().items()}, folder / "model.safetensors")
    second = small(start=str(tmp_path))
    for name in ("query", "key", "queue"):
        for mine, theirs in zip(
            getattr(second, name).state_dict().values(), getattr(first, name).state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, theirs.to(mine.dtype))
    assert int(second.age.max()) == 0
    with pytest.raises(ValueError, match=r"does not fit: tensor keys is \(5, 12\), it should be \(5, 24\)"):
        small(start=str(tmp_path), queue_size=24)
    with pytest.raises(ValueError, match="no checkpoint there; give the folder of a `clipmill pretrain` run"):
        small(start=str(tmp_path / "none"))


def test_the_published_rates_of_both_stages() -> None:
    """Together the stages fall at epochs 120 and 160 of 200."""
    found = recipes("videomoco")
    for first, second in (("k400_first", "k400"), ("k400_r3d_first", "k400_r3d")):
        rates = []
        for name in (first, second):
            train = TrainConfig(**found[name].train)
            rates += [train.lr * schedule_of(train, epoch, 1) for epoch in range(train.epochs)]
        expected = [0.005 * (1 if epoch < 120 else 0.1 if epoch < 160 else 0.01) for epoch in range(200)]
        np.testing.assert_allclose(rates, expected)


@pytest.mark.parametrize(("option", "value"), [("drop", 32), ("decay", 0.0), ("decay_unit", "epoch"), ("hidden", 7)])
def test_options_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option} = {value!r} is not possible; it must be"):
        Config(**{option: value})  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.setup("cpu")
    train_together()
    dist.teardown()
