"""CrissCross: what its loss promises, what its views share, and which parameters learn how."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.backbones.audio_resnet import audio_resnet18
from clipmill.models.backbones.r2plus1d import r2plus1d_18_avid
from clipmill.models.heads import mlp
from clipmill.models.method import recipes
from clipmill.models.methods.crisscross import (
    ASYNC,
    INTRA,
    SYNC,
    Config,
    CrissCross,
    crisscross_loss,
    picture_augment,
    projector,
    sound_augment,
)
from clipmill.pipeline.audio import log_mel
from clipmill.pipeline.augment import op_params
from clipmill.pipeline.draws import fold
from clipmill.pipeline.order import Order
from clipmill.pipeline.slot import crop_table
from clipmill.pipeline.spec import Blur

VIEWS = ("v1", "v2", "a1", "a2")


def parts(seed: int = 0, dim: int = 6) -> tuple[dict[str, Tensor], nn.ModuleDict]:
    torch.manual_seed(seed)
    predictors = nn.ModuleDict({side: mlp([dim, 4, dim], norm="affine") for side in "va"}).double()
    return {name: torch.randn(10, dim, dtype=torch.float64, requires_grad=True) for name in VIEWS}, predictors


def identities() -> nn.ModuleDict:
    return nn.ModuleDict({"v": nn.Identity(), "a": nn.Identity()})


def test_the_loss_is_a_mean_of_cosines() -> None:
    z, predictors = parts()
    loss, terms = crisscross_loss(z, predictors, Config())
    assert loss.item() == pytest.approx(np.mean([term.item() for term in terms.values()]))
    assert all(-1 <= term.item() <= 1 for term in terms.values())
    same = dict.fromkeys(VIEWS, z["v1"])
    assert crisscross_loss(same, identities(), Config())[0].item() == pytest.approx(-1)


def test_no_gradient_reaches_the_targets() -> None:
    z, predictors = parts()

    class Cut(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.detach())

    cut = nn.ModuleDict({side: Cut(predictors[side]) for side in "va"})
    crisscross_loss(z, cut, Config())[0].backward()
    assert all(value.grad is None for value in z.values())


def test_swapping_views() -> None:
    z, predictors = parts()
    loss, terms = crisscross_loss(z, predictors, Config())
    both = {"v1": z["v2"], "v2": z["v1"], "a1": z["a2"], "a2": z["a1"]}
    assert crisscross_loss(both, predictors, Config())[0].item() == pytest.approx(loss.item())
    pictures = {**z, "v1": z["v2"], "v2": z["v1"]}
    _, swapped = crisscross_loss(pictures, predictors, Config())
    for old, new in (("v1a1", "a1v2"), ("v2a2", "v1a2")):
        assert swapped[new].item() == pytest.approx(terms[old].item())
        assert swapped[old].item() == pytest.approx(terms[new].item())


def test_the_divisor_counts_families_not_weights() -> None:
    z, predictors = parts()
    _, terms = crisscross_loss(z, predictors, Config())
    muted, _ = crisscross_loss(z, predictors, Config(async_weight=0.0))
    rest = sum(terms[name].item() for name in (*INTRA, *SYNC))
    assert muted.item() == pytest.approx(rest / 6)
    off, without = crisscross_loss(z, predictors, Config(asynchronous=False))
    assert off.item() == pytest.approx(rest / 4)
    assert all(without[name].item() == 0 for name in ASYNC)


def test_pre_norm_makes_the_length_of_projections_meaningless() -> None:
    z, predictors = parts()
    longer = {name: 3 * value for name, value in z.items()}
    for pre_norm, same in ((True, True), (False, False)):
        losses = [crisscross_loss(x, predictors, Config(pre_norm=pre_norm))[0].item() for x in (z, longer)]
        assert (losses[0] == pytest.approx(losses[1])) is same


def test_published_sizes() -> None:
    def count(module: nn.Module) -> int:
        return sum(param.numel() for param in module.parameters())

    assert count(r2plus1d_18_avid()) == 15_379_136
    assert count(audio_resnet18()) == 11_170_240
    assert count(projector(512, 2048)) == 9_455_616
    assert count(mlp([2048, 512, 2048], norm="affine")) == 2_100_736


def test_the_views_of_the_paper() -> None:
    v1, v2, a1, a2 = CrissCross.plan(type("Holder", (), {"config": Config()})()).views  # type: ignore[arg-type]
    assert (v1.num_frames, v1.fps, v1.augment.size) == (8, 16.0, 112)  # type: ignore[union-attr]
    assert (a1.duration_s, a1.augment.logmel.mels) == (2.0, 80)  # type: ignore[union-attr]
    assert a1.augment.logmel.frames(32000) == 201  # type: ignore[union-attr]
    assert len({v1.key, v2.key, a1.key, a2.key}) == 4  # independent augmentation
    blur = next(op for op in picture_augment(Config()).ops if isinstance(op, Blur))
    assert (blur.taps, blur.sigma, blur.vertical_only) == (11, (2.0, 2.0), True)
    silence = log_mel(torch.zeros(1, 32000), a1.augment.logmel)  # type: ignore[union-attr]
    assert torch.allclose(silence, torch.tensor(-2.397), atol=1e-3)
    assert sound_augment(Config()).logmel == a1.augment.logmel  # type: ignore[union-attr]


def test_frames_share_their_draws_and_views_do_not() -> None:
    method = CrissCross(recipes("crisscross")["tiny"].method)
    v1, v2, _, _ = method.plan().views
    draws = np.array([fold(9, i) for i in range(5)], np.uint64)
    frames = np.tile(np.arange(8), (5, 1))
    sizes = np.full(5, 90), np.full(5, 120)
    tables = [crop_table(view, draws, frames, *sizes) for view in (v1, v2)]
    boxes = [np.stack([table[name] for name in ("x", "y", "bw", "bh")], -1) for table in tables]
    assert all((table == table[:, :1]).all() for table in boxes)
    assert (boxes[0][:, 0] != boxes[1][:, 0]).any()
    params = [op_params(view.augment, draws, 8, 0, view.key) for view in (v1, v2)]  # type: ignore[arg-type]
    assert params[0][1]["factors"].shape == (5, 4)
    assert not np.allclose(params[0][1]["factors"], params[1][1]["factors"])


def test_predictors_keep_a_constant_rate_and_an_epoch_has_five_draws() -> None:
    recipe = recipes("crisscross")["k400"]
    assert len(Order(num_records=7, repeat=recipe.train["repeat"])) == 35
    method = CrissCross(recipes("crisscross")["tiny"].method)
    groups = method.param_groups()
    assert [group.fixed_lr for group in groups] == [False, True, False, True]
    assert Config().predictor_lr_scale * recipe.train["lr"] == pytest.approx(2e-3)


def test_bad_options_are_named() -> None:
    for options, name in (({"layers": 4}, "layers"), ({"min_area": 0.0}, "min_area"), ({"fps": 0.0}, "fps")):
        with pytest.raises(ValueError, match=name):
            Config(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="intra"):
        Config(intra=False, sync=False, asynchronous=False)
