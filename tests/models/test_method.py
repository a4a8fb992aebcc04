"""How methods are found, and what they share."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
from torch import nn

from clipmill.models.method import Recipe, input_spec, method_class, method_names, recipes, weights_and_rest
from clipmill.pipeline.config import TrainConfig, from_json, to_json
from clipmill.pipeline.ring import LoaderConfig
from clipmill.pipeline.spec import IMAGENET_MEAN, moco_v2, simclr
from clipmill.pipeline.views import View


def test_unknown_methods_name_near_ones() -> None:
    with pytest.raises(ValueError, match="unknown method 'simclir'; did you mean simclr"):
        method_class("simclir")
    assert {"moco", "simclr"} <= set(method_names())


@pytest.mark.parametrize("name", method_names())
def test_recipes_are_complete_and_valid(name: str) -> None:
    kind, found = method_class(name), recipes(name)
    assert is_dataclass(kind.Config)
    assert "tiny" in found, "every method needs a recipe that trains on a CPU"
    for recipe in found.values():
        assert isinstance(recipe, Recipe)
        assert recipe.about
        assert isinstance(recipe.method, kind.Config)
        TrainConfig(**recipe.train)
        assert from_json(kind.Config, to_json(recipe.method)) == recipe.method


@pytest.mark.parametrize("name", method_names())
def test_options_can_stand_beside_those_of_training_and_loading(name: str) -> None:
    """All are flags of one command line."""
    own = {item.name for item in fields(method_class(name).Config)}
    assert not own & {item.name for item in (*fields(TrainConfig), *fields(LoaderConfig))}
    assert not own & {"data", "out", "resume", "config", "plan", "split", "method", "recipe"}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("moco", "groups", 0),
        ("moco", "key_momentum", 1.5),
        ("simclr", "temperature", 0.0),
        ("simclr", "strength", -1.0),
    ],
)
def test_options_out_of_range_are_named(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} = {value} is not possible; it must be"):
        method_class(name).Config(**{option: value})


def test_weights_are_told_from_the_rest() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False))
    module[2].weight.requires_grad_(False)
    weights, rest = weights_and_rest(module)
    assert list(weights.params) == [module[0].weight]
    assert [param.shape for param in rest.params] == [(4,)] * 3
    assert (weights.adapt, weights.weight_decay, rest.adapt, rest.weight_decay) == (True, None, False, 0.0)
    assert len(weights_and_rest(nn.Linear(2, 2, bias=False))) == 1


def test_encoders_learn_what_they_were_shown() -> None:
    spec = input_spec(View(name="clip", num_frames=8, stride=4, augment=moco_v2(96)))
    assert (spec.num_frames, spec.stride, spec.size, spec.mean) == (8, 4, 96, IMAGENET_MEAN)
    unnormalised = input_spec(View(name="frame", modality="image", augment=simclr(64)))
    assert (unnormalised.mean, unnormalised.std) == ((0.0,) * 3, (1.0,) * 3)
