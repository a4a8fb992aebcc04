"""Schedules, optimisers and the run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipmill.models.method import ParamGroup
from clipmill.pipeline.config import TrainConfig, from_json, to_json
from clipmill.pipeline.optim import (
    LarcAdam,
    Lars,
    build_optimizer,
    cosine,
    peak_lr,
    schedule,
    schedule_of,
    set_lr,
    trust_ratio,
)

# --- schedules ----------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(60, 500), st.sampled_from(["cosine", "poly"]))
def test_warm_up_rises_to_the_peak_and_the_rest_falls_to_the_end(warmup: int, total: int, shape: str) -> None:
    values = [schedule(t, shape, total=total, warmup=warmup, end=0.25) for t in range(total + 5)]
    assert values[0] == 0.0
    assert values[warmup] == 1.0
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[total:] == [0.25] * 5


def test_warm_up_is_a_straight_line_from_its_start() -> None:
    values = [schedule(t, "constant", total=10, warmup=4, start=0.2) for t in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_and_poly_formulas() -> None:
    assert cosine(3, 12, 0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(3, "poly", total=12, power=0.9) == pytest.approx(0.75**0.9)


def test_milestones_are_epochs_whatever_the_unit() -> None:
    for per in ("step", "epoch"):
        config = TrainConfig(epochs=6, schedule="step", schedule_per=per, milestones=(2, 4), gamma=0.5)
        assert [schedule_of(config, step, 3) for step in range(18)] == [1.0] * 6 + [0.5] * 6 + [0.25] * 6


def test_a_rate_per_epoch_moves_only_between_epochs() -> None:
    config = TrainConfig(epochs=4, schedule="cosine", schedule_per="epoch", warmup_epochs=1, lr_start=0.5)
    values = [schedule_of(config, step, 5) for step in range(20)]
    expected = [0.5, 1.0, 0.5 * (1 + math.cos(math.pi / 3)), 0.5 * (1 + math.cos(2 * math.pi / 3))]
    assert values == pytest.approx([value for value in expected for _ in range(5)])


def test_both_scalings_agree_at_batch_4096() -> None:
    linear = TrainConfig(lr=0.3, lr_scaling="linear", batch_size=4096)
    root = TrainConfig(lr=0.075, lr_scaling="sqrt", batch_size=4096)
    assert peak_lr(linear) == pytest.approx(peak_lr(root)) == pytest.approx(4.8)
    assert peak_lr(TrainConfig(lr=0.3, batch_size=4096)) == 0.3


# --- optimisers ---------------------------------------------------------------------------------------------


def _param(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _first_change(gradient: torch.Tensor, *, adapt: bool, classic: bool) -> torch.Tensor:
    weight = _param(3.0, -4.0)
    weight.grad = gradient.clone()
    Lars([{"params": [weight], "adapt": adapt}], lr=0.5, classic=classic).step()
    return weight.detach() - torch.tensor([3.0, -4.0], dtype=torch.float64)


@pytest.mark.parametrize("classic", [True, False])
def test_lars_ignores_the_size_of_the_gradient_of_adapted_weights_only(classic: bool) -> None:
    gradient = torch.tensor([0.6, 0.8], dtype=torch.float64)
    adapted = [_first_change(c * gradient, adapt=True, classic=classic) for c in (1.0, 7.0)]
    torch.testing.assert_close(adapted[0], adapted[1])
    torch.testing.assert_close(adapted[0], -0.5 * 0.001 * 5.0 * gradient)  # lr * trust * |w| * g / |g|
    plain = [_first_change(c * gradient, adapt=False, classic=classic) for c in (1.0, 7.0)]
    torch.testing.assert_close(plain[1], 7 * plain[0])


def test_trust_ratio_is_one_where_a_norm_is_zero() -> None:
    zero, some = torch.zeros(3), torch.ones(3)
    assert [float(trust_ratio(*pair, 0.001)) for pair in ((zero, some), (some, zero))] == [1.0, 1.0]
    assert float(trust_ratio(some, 2 * some, 0.001)) == pytest.approx(0.0005)


@pytest.mark.parametrize("nesterov", [True, False])
def test_excluded_weights_follow_plain_sgd(nesterov: bool) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5).double(), torch.randn(4, 5).double()
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    lars = Lars([mine], lr=0.1, momentum=0.9, nesterov=nesterov, adapt=False)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=nesterov)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        lars.step(), sgd.step()
    torch.testing.assert_close(mine, theirs)


def test_lars_keeps_the_rate_of_old_gradients() -> None:
    weight = _param(1.0)
    lars = Lars([weight], lr=1.0, momentum=0.5, adapt=False)
    for lr, gradient in ((1.0, 1.0), (0.1, 0.0)):
        lars.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        lars.step()
    assert weight.item() == 1.0 - 1.0 - 0.5  # the second step still moves by momentum * lr of the first


def test_larc_adam_rescales_and_decays_before_adam() -> None:
    torch.manual_seed(1)
    start, gradients = torch.randn(4, 3).double(), torch.randn(3, 4, 3).double()
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    larc = LarcAdam([mine], lr=1e-2, weight_decay=0.1, trust=0.02)
    adam = torch.optim.Adam([theirs], lr=1e-2)
    for gradient in gradients:
        mine.grad = gradient.clone()
        norm, size = float(theirs.detach().norm()), float(gradient.norm())
        ratio = min(0.02 * norm / (size + 0.1 * norm + 1e-8) / 1e-2, 1.0)
        theirs.grad = (gradient + 0.1 * theirs.detach()) * ratio
        larc.step(), adam.step()
    torch.testing.assert_close(mine, theirs)
    assert larc.param_groups[0]["weight_decay"] == 0.1


def test_larc_leaves_zero_weights_and_unadapted_groups_to_adam() -> None:
    zero, plain, oracle = _param(0.0, 0.0), _param(1.0, 2.0), _param(1.0, 2.0)
    larc = LarcAdam([{"params": [zero]}, {"params": [plain], "adapt": False}], lr=0.1, weight_decay=0.5)
    adam = torch.optim.Adam([oracle], lr=0.1, weight_decay=0.5)
    zero.grad, plain.grad, oracle.grad = (torch.tensor([3.0, -3.0], dtype=torch.float64) for _ in range(3))
    larc.step(), adam.step()
    torch.testing.assert_close(zero.detach(), torch.tensor([-0.1, 0.1], dtype=torch.float64))
    torch.testing.assert_close(plain, oracle)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars", "larc_adam"])
def test_group_options_are_respected(name: str) -> None:
    first, second, third = _param(1.0, 1.0), _param(1.0, 1.0), _param(1.0, 1.0)
    groups = [
        ParamGroup(params=[first]),
        ParamGroup(params=[second], lr_scale=10.0, fixed_lr=True, weight_decay=0.0, adapt=False),
        ParamGroup(params=[third], lr_scale=0.5),
    ]
    config = TrainConfig(optimiser=name, lr=0.2, weight_decay=0.3, epochs=4, schedule="cosine")
    optimizer = build_optimizer(groups, config)
    assert set_lr(optimizer, config, step=2, steps_per_epoch=1) == pytest.approx(0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 2.0, 0.05])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]
    for param in (first, second, third):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(second.detach(), torch.ones(2, dtype=torch.float64))  # no gradient and no decay: nothing moves
    if name in ("sgd", "adamw", "adam", "lars"):
        assert bool((first < 1).all())


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs = 0 is not possible; it must be at least 1"),
        ({"lr": -1.0}, "lr = -1.0 is not possible; it must be greater than 0"),
        ({"lr": float("nan")}, "lr = nan is not possible"),
        ({"batch_size": 10, "accumulate": 3}, "batch_size = 10 is not possible; it must be a multiple of accumulate"),
        ({"optimiser": "adamax"}, "optimiser = 'adamax' is not possible; it must be one of sgd, adam"),
        ({"warmup_epochs": 200}, "warmup_epochs = 200 is not possible; it must be at most epochs = 100"),
        ({"milestones": (5, 3)}, "milestones = (5, 3) is not possible; it must be rising"),
        ({"betas": (0.9, 1.0)}, "betas = (0.9, 1.0) is not possible"),
        ({"lr_end": 2.0}, "lr_end = 2.0 is not possible; it must be a share of the peak"),
        ({"nesterov": True, "momentum": 0.0}, "momentum = 0.0 is not possible; it must be above 0"),
    ],
)
def test_values_out_of_range_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(**values)
    assert message in str(error.value)


@dataclass(frozen=True)
class Inner:
    sides: tuple[int, int] = (1, 2)
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float = 1.0
    name: str | None = None


def test_configurations_survive_json() -> None:
    outer = Outer(inner=Inner(sides=(3, 4), mode="b"), rate=2, name="x")
    assert to_json(outer) == {"inner": {"sides": [3, 4], "mode": "b"}, "rate": 2, "name": "x"}
    assert from_json(Outer, to_json(outer)) == outer
    config = TrainConfig(milestones=(3, 5), betas=(0.8, 0.9), amp="bf16", warmup_epochs=2)
    assert from_json(TrainConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {}, "rat": 1.0}, "run.json: unknown field 'rat'; did you mean rate?"),
        ({"rate": 1.0}, "run.json: field 'inner' is missing"),
        ({"inner": {"mode": "c"}}, "run.json: inner: mode = 'c' does not fit"),
        ({"inner": {"sides": [1, 2, 3]}}, "run.json: inner: sides = [1, 2, 3] does not fit"),
        ({"inner": {}, "rate": "fast"}, "run.json: rate = 'fast' does not fit float"),
        ({"inner": {}, "rate": True}, "run.json: rate = True does not fit float"),
    ],
)
def test_json_that_does_not_fit_is_named(data: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_json(Outer, data, "run.json")
    assert message in str(error.value)
