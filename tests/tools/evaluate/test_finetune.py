from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from clipmill.models.encoder import InputSpec, build_encoder
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.optim import peak_lr
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import Cutout, Flip, Gray, Jitter, Normalize, RandomResizedCrop, VideoSpec
from clipmill.tools.evaluate.features import Compute
from clipmill.tools.evaluate.finetune import Classifier, Config, evaluate, fit, shifted, train_planner
from clipmill.tools.evaluate.opening import encoder_digest, open_encoder
from clipmill.tools.evaluate.protocols import PROTOCOLS
from clipmill.tools.evaluate.splits import Splits
from clipmill.tools.evaluate.views import Views, eval_views


@pytest.fixture
def config(compute: Compute) -> Config:
    views = Views(clips=2, frames=2, size=24)
    return Config(epochs=12, train_batch=8, lr=0.05, warmup_epochs=0, min_area=0.6, views=views, compute=compute)


def test_a_network_learns_the_classes(bright: ShardIndex, config: Config, tmp_path: Path) -> None:
    encoder = open_encoder("random:resnet18:width=0.125")
    encoder.spec = InputSpec(num_frames=2, size=24)
    before = encoder_digest(encoder)
    training = encoder.training
    steps: list[tuple[str, int, int]] = []
    report = evaluate(
        encoder,
        bright.root,
        tmp_path,
        replace(config, epochs=20),
        progress=lambda what, done, total, unit: steps.append((what, done, total)),
    )
    assert report.metrics["top1"] >= 0.75
    assert report.metrics["train_top1"] >= 0.75
    assert report.metrics["train_loss"] < 0.7
    assert encoder_digest(encoder) == before == report.digests["encoder"]
    assert encoder.training == training
    assert steps[:2] == [("fine-tuning", 1, 40), ("fine-tuning", 2, 40)]
    assert steps[-1] == ("test views", 8, 8)
    assert set(report.artefacts) == {"samples.csv", "confusion.png", "training.csv"}
    with (tmp_path / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(20))
    assert float(rows[-1]["loss"]) == report.metrics["train_loss"] < float(rows[0]["loss"])
    assert {row["damaged"] for row in rows} == {"0"}


def test_the_same_seed_gives_the_same_weights(bright: ShardIndex, config: Config) -> None:
    def trained(options: Config) -> str:
        encoder = build_encoder("resnet18", width=0.125)
        encoder.load_state_dict(start)
        encoder.spec = InputSpec(num_frames=2, size=24)
        model = Classifier(encoder, 3, options.dropout, options.seed)
        state = torch.get_rng_state()
        fit(model, bright.split("train"), options, train_planner(encoder, options))
        assert torch.equal(torch.get_rng_state(), state)
        return encoder_digest(model)

    start = build_encoder("resnet18", width=0.125).state_dict()
    short = replace(config, epochs=2, dropout=0.2)
    first = trained(short)
    torch.rand(5)
    assert trained(replace(short, compute=replace(short.compute, threads=2))) == first
    assert trained(replace(short, seed=1)) != first
    assert trained(replace(short, epochs=1)) != first


def test_scratch_forgets_the_weights(bright: ShardIndex, config: Config, tmp_path: Path) -> None:
    short = replace(config, epochs=1, scratch=True)
    scores = []
    for number in range(2):
        torch.manual_seed(number)
        encoder = build_encoder("resnet18", width=0.125)
        encoder.spec = InputSpec(num_frames=2, size=24)
        scores.append(evaluate(encoder, bright.root, tmp_path / str(number), short).metrics)
        assert (tmp_path / str(number) / "training.csv").is_file()
    assert scores[0] == scores[1]
    kept = evaluate(encoder, bright.root, tmp_path / "kept", replace(short, scratch=False))
    assert kept.metrics["train_loss"] != scores[1]["train_loss"]


def test_a_learning_rate_of_zero_freezes_the_encoder(bright: ShardIndex, colour: Any, config: Config) -> None:
    model = Classifier(colour, 3)
    options = replace(config, encoder_lr_scale=0.0, epochs=1)
    head = model.head.weight.detach().clone()
    fit(model, bright.split("train"), options, train_planner(colour, options))
    assert colour.gain.item() == 1.0
    assert (model.head.weight != head).all()
    fit(model, bright.split("train"), replace(options, encoder_lr_scale=1.0), train_planner(colour, options))
    assert colour.gain.item() != 1.0


def test_clips_per_epoch_and_small_sets(bright: ShardIndex, colour: Any, config: Config) -> None:
    def steps(options: Config) -> int:
        counted = []
        model = Classifier(colour, 3)
        train = bright.split("train")
        fit(model, train, options, train_planner(colour, options), lambda *state: counted.append(state))
        return len(counted)

    assert steps(replace(config, epochs=2)) == 4  # 16 records in batches of 8
    assert steps(replace(config, epochs=2, clips_per_epoch=3)) == 12
    assert steps(replace(config, epochs=2, train_batch=5)) == 6  # the odd record is left out
    assert steps(replace(config, epochs=2, train_batch=50)) == 2


def test_schedule_and_gradient_norm(bright: ShardIndex, colour: Any, config: Config) -> None:
    options = replace(
        config, epochs=4, train_batch=16, schedule="step", milestones=(1, 3), gamma=0.5, clip_grad_norm=1e-9, lr=0.1
    )
    model = Classifier(colour, 3)
    head = model.head.weight.detach().clone()
    history = fit(model, bright.split("train"), replace(options, weight_decay=0.0), train_planner(colour, options))
    assert [row["lr"] for row in history] == pytest.approx([0.1, 0.05, 0.05, 0.025])
    torch.testing.assert_close(model.head.weight, head, atol=1e-8, rtol=0)


def test_an_interrupted_training_is_continued(
    bright: ShardIndex, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its seventh epoch, and again while the test views are computed: the outcome is that of one piece."""
    monkeypatch.setattr("clipmill.tools.evaluate.finetune._SAVE_S", 0.0)
    encoder = open_encoder("random:resnet18:width=0.125")
    encoder.spec = InputSpec(num_frames=2, size=24)
    config = replace(config, epochs=8, dropout=0.5)
    whole = evaluate(encoder, bright.root, tmp_path / "whole", config)
    seen: list[int] = []

    def until(what: str, last: int) -> Callable[[str, int, int, str], None]:
        def progress(name: str, done: int, total: int, unit: str) -> None:
            if name == "fine-tuning":
                seen.append(done)
            if (name, done) == (what, last):
                raise KeyboardInterrupt

        return progress

    for what, last in (("fine-tuning", 13), ("test views", 8)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(encoder, bright.root, tmp_path / "parts", config, progress=until(what, last))
    assert seen == [*range(1, 14), *range(13, 17)]
    parts = evaluate(encoder, bright.root, tmp_path / "parts", config, progress=until("fine-tuning", 1))
    assert parts == whole
    for name in parts.artefacts:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts" / "unfinished").exists()
    with pytest.raises(KeyboardInterrupt):  # other options are another training
        evaluate(encoder, bright.root, tmp_path / "other", config, progress=until("fine-tuning", 13))
    other = replace(config, lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        evaluate(encoder, bright.root, tmp_path / "other", other, progress=until("fine-tuning", 1))


def test_training_views_are_light(colour: Any, config: Config) -> None:
    (view,) = train_planner(colour, replace(config, flip=0.5)).views
    assert (view.num_frames, view.stride) == (2, 2)
    assert isinstance(view.augment, VideoSpec)
    assert view.augment.crop == RandomResizedCrop(scale=(0.6, 1.0))
    assert view.augment.ops == (Flip(p=0.5), Normalize())
    (view,) = train_planner(colour, replace(config, flip=0.0)).views
    assert view.augment.ops == (Normalize(),)


def test_training_views_can_be_strong(colour: Any, config: Config) -> None:
    strong = replace(config, jitter=(0.4, 0.3, 0.2, 0.1), grey=0.2, cutout=7, train_size=16)
    (view,) = train_planner(colour, strong).views
    assert isinstance(view.augment, VideoSpec)
    assert view.augment.size == 16
    jitter = Jitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, p=1.0)
    assert view.augment.ops == (Gray(p=0.2), jitter, Flip(), Normalize(), Cutout(max_side=7))


def test_frames_of_equal_parts(bright: ShardIndex, colour: Any, config: Config, tmp_path: Path) -> None:
    """TSN trains on a random frame of each part, and a TSM is tested on the middle ones."""
    planner = train_planner(colour, replace(config, segments=3))
    record = bright[0]
    bounds = [part * record.num_frames // 3 for part in range(4)]
    frames = planner(record, Draws(1), 1).spans[0].frames
    assert all(low <= frame < high for frame, (low, high) in zip(frames, pairwise(bounds), strict=True))
    plan = eval_views(colour.spec, replace(config.views, clips=1, frames=3, spacing="segments"))
    middle = [low + (high - low) // 2 for low, high in pairwise(bounds)]
    assert list(plan.planner(record, Draws(1), 1).spans[0].frames) == middle
    with pytest.raises(ValueError, match="spacing = segments makes one clip of each record, got clips = 2"):
        eval_views(colour.spec, replace(config.views, spacing="segments"))
    encoder = open_encoder("random:resnet18:width=0.125")
    encoder.spec = InputSpec(num_frames=3, size=24)
    views = Views(clips=1, frames=3, size=24, spacing="segments")
    options = replace(config, epochs=16, segments=3, shift=8, views=views)
    assert evaluate(encoder, bright.root, tmp_path, options).metrics["top1"] >= 0.75


def test_a_tsm_has_the_weights_of_its_encoder_and_looks_around() -> None:
    encoder = build_encoder("resnet18", width=0.125)
    tsm = shifted(encoder, 8)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in tsm.state_dict().items())
    x = torch.rand(1, 3, 4, 32, 32)
    assert not torch.allclose(tsm.eval()(x), encoder.eval()(x))
    assert torch.allclose(encoder(x), encoder(x.flip(2)), atol=1e-5)
    assert not torch.allclose(tsm(x), tsm(x.flip(2)), atol=1e-5)
    with pytest.raises(ValueError, match="shift = 8 needs a ResNet over frames"):
        shifted(build_encoder("r3d_18", width=0.125), 8)


@pytest.mark.parametrize(("mode", "moving"), [("train", 20), ("partial", 1), ("frozen", 0)])
def test_running_statistics_move_where_they_may(bright: ShardIndex, config: Config, mode: Any, moving: int) -> None:
    encoder = build_encoder("resnet18", width=0.125)
    encoder.spec = InputSpec(num_frames=2, size=24)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items() if "running_mean" in name}
    model, options = Classifier(encoder, 3), replace(config, epochs=1, batch_norm=mode)
    fit(model, bright.split("train"), options, train_planner(encoder, options))
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, encoder.state_dict()[name])]
    assert len(moved) == moving
    assert mode != "partial" or moved == ["bn1.running_mean"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_can_be_planned(protocol: Any) -> None:
    config = Config(protocol=protocol).resolved()
    spec = InputSpec(num_frames=16, size=112)
    encoder = build_encoder("resnet18", width=0.125)
    encoder.spec = spec
    (view,) = train_planner(encoder, config).views
    assert view.num_frames == (config.segments or config.views.frames or 16)
    plan = eval_views(spec, config.views)
    assert plan.clips == config.views.clips
    assert plan.crops == {"centre": 1, "three": 3, "ten": 10}[config.views.crops]


def test_sound(
    make_dataset: Callable[..., ShardIndex],
    relabel: Callable[..., ShardIndex],
    mel: Any,
    config: Config,
    tmp_path: Path,
) -> None:
    """Class = whether the sine is below or above 1 kHz; a linear layer on the mean spectrum learns it."""
    plain = make_dataset(tmp_path / "plain", num_records=32, num_frames=10)
    labels = [int(number >= 16) for number in range(32)]
    splits = ["test" if number % 4 == 1 else "train" for number in range(32)]
    index = relabel(plain, tmp_path / "data", labels, splits, ["low", "high"])
    options = replace(config, epochs=6, lr=0.01, optimiser="adamw")
    report = evaluate(mel, index.root, tmp_path / "out", options)
    assert report.metrics["top1"] >= 0.75


def test_a_corpus_without_sound_is_refused(
    make_dataset: Callable[..., ShardIndex], mel: Any, config: Config, tmp_path: Path
) -> None:
    index = make_dataset(tmp_path / "data", num_records=6, num_frames=4, audio=False)
    with pytest.raises(ValueError, match="have no sound, the first is"):
        evaluate(mel, index.root, tmp_path / "out", config)


def test_a_loss_that_explodes_is_an_error(bright: ShardIndex, colour: Any, config: Config) -> None:
    with torch.no_grad():
        colour.gain.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 0; use a lower --lr than 0\.05"):
        fit(Classifier(colour, 3), bright.split("train"), config, train_planner(colour, config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs = 0 is not possible"),
        ({"lr": 0.0}, r"lr = 0\.0 is not possible"),
        ({"train_batch": 0}, "batch_size = 0 is not possible"),
        ({"flip": 1.5}, r"flip = 1\.5 is not possible; it must be a share"),
        ({"encoder_lr_scale": -1.0}, "encoder_lr_scale"),
        ({"epochs": 1, "warmup_epochs": 2.0}, "warmup_epochs = 2.0"),
        ({"segments": -1}, "segments = -1 is not possible"),
        ({"grey": 2.0}, "grey = 2.0 is not possible"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


# --- pictures: linear classification and few labels ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_frozen_encoder_keeps_its_weights(bright: ShardIndex, config: Config, mode: Any, tmp_path: Path) -> None:
    encoder = open_encoder("random:resnet18:width=0.125")
    encoder.spec = InputSpec(num_frames=2, size=24)
    options = replace(config, epochs=1, frozen=mode, zero_head=True)
    model = Classifier(encoder, 3, frozen=True, zero=True)
    assert not model.head.weight.any()
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    fit(model, bright.split("train"), options, train_planner(encoder, options))
    assert model.head.weight.any()
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, state[name])}
    assert all("running" in name or "num_batches" in name for name in changed)
    assert bool(changed) == (mode == "train")  # statistics drift as in the released code of HCL


def test_protocols_fill_what_was_not_given() -> None:
    config = Config(protocol="simclr_1pct", train_batch=512, splits=Splits(test="val")).resolved()
    assert (config.epochs, config.train_batch, config.nesterov, config.zero_head) == (60, 512, True, True)
    assert (config.splits.labels, config.splits.test) == (0.01, "val")
    assert (config.views.clips, config.views.centre_crop) == (1, "cut")
    assert peak_lr(config.training) == pytest.approx(0.05 * 512 / 256)
    assert Config().resolved() == Config()
    linear = Config(protocol="moco_linear").resolved()
    assert (linear.frozen, linear.lr, linear.milestones, linear.weight_decay) == ("eval", 30.0, (60, 80), 0.0)
    whole = Config(protocol="simclr_linear").resolved()
    assert peak_lr(whole.training) == pytest.approx(1.6)


def test_pictures_cut_before_they_are_resized_are_so_in_training_too(colour: Any, config: Config) -> None:
    views = replace(config.views, centre_crop="cut")
    (view,) = train_planner(colour, replace(config, views=views)).views
    assert isinstance(view.augment, VideoSpec)
    assert (view.augment.interpolation, view.augment.antialias) == ("bicubic", False)
