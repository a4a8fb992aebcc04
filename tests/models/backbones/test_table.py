"""What every backbone promises, over all that are discovered."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipmill.models.encoder import Encoder, backbone_options, backbones, build_encoder, load_encoder, save_encoder

BUILDERS = backbones()
needs_pytorchvideo = pytest.mark.skipif(find_spec("pytorchvideo") is None, reason="pytorchvideo is not installed")
NAMES = [
    pytest.param(name, marks=needs_pytorchvideo if builder.__module__.endswith(".pytorchvideo") else ())
    for name, builder in BUILDERS.items()
]
WIDTH = 0.125


def tiny(name: str, **options: object) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(name, width=WIDTH, **options)


def some_input(encoder: Encoder, batch: int = 2, num_frames: int = 8, size: tuple[int, int] = (64, 64)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    channels = encoder.spec.channels
    if encoder.spec.modality == "audio":
        return torch.randn(batch, channels, *size, generator=generator)
    return torch.randn(batch, channels, num_frames, *size, generator=generator)


def test_families_are_discovered() -> None:
    expected = {
        *("resnet18", "resnet34", "resnet50", "resnet101", "audio_resnet18", "r3d_18", "mc3_18", "s3d", "c3d"),
        *("r2plus1d_18", "r2plus1d_18_vmz", "r2plus1d_18_avid"),
        *("slow_r50", "slowfast_r50", "x3d_s", "x3d_m", "csn_r101", "r2plus1d_r50"),
    }
    assert expected <= set(BUILDERS)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_maps_have_the_documented_shapes(name: str) -> None:
    encoder = tiny(name).eval()
    x = some_input(encoder)
    with torch.no_grad():
        features = encoder(x)
        maps = {stage: encoder.maps(x, stage) for stage in encoder.stages}
    assert features.shape == (2, encoder.dim)
    assert features.isfinite().all()
    assert tuple(encoder.reductions) == encoder.stages
    for stage, y in maps.items():
        cells = tuple(math.ceil(n / r) for n, r in zip(x.shape[2:], encoder.reductions[stage], strict=True))
        assert y.shape[0] == 2, stage
        assert y.shape[2:] == cells, stage
        assert y.isfinite().all(), stage
    for shallow, deep in pairwise(encoder.stages):
        assert all(a <= b for a, b in zip(encoder.reductions[shallow], encoder.reductions[deep], strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_frames", "size"), [(1, (32, 45)), (5, (33, 32))])
def test_any_length_and_size_passes(name: str, num_frames: int, size: tuple[int, int]) -> None:
    encoder = tiny(name).eval()
    x = some_input(encoder, 1, num_frames, size)
    with torch.no_grad():
        assert encoder(x).shape == (1, encoder.dim)
        for stage in encoder.stages:
            y = encoder.maps(x, stage)
            for cells, n, r in zip(y.shape[2:], x.shape[2:], encoder.reductions[stage], strict=True):
                assert cells in {math.ceil(n / r), max(n // r, 1)}, stage  # one pool of S3D rounds down


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_the_input_get_a_finite_gradient(name: str) -> None:
    encoder = tiny(name).train()
    x = some_input(encoder).requires_grad_()
    encoder(x).square().mean().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_mode_is_deterministic_and_sees_samples_one_by_one(name: str) -> None:
    encoder = tiny(name).eval()
    x = some_input(encoder)
    with torch.no_grad():
        whole = encoder(x)
        torch.testing.assert_close(encoder(x), whole, rtol=0, atol=0)
        torch.testing.assert_close(encoder(x[1:]), whole[1:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(whole[0], whole[1], rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_normalisation_works_in_training_mode(name: str) -> None:
    encoder = tiny(name).eval()
    x = some_input(encoder)
    with torch.no_grad():
        expected = encoder(x)
    encoder.train()
    for part in encoder.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)):
            part.eval()
    before = copy.deepcopy(dict(encoder.named_buffers()))
    torch.testing.assert_close(encoder(x), expected, rtol=0, atol=0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_encoder_loads_bit_equal(name: str, tmp_path: Path) -> None:
    encoder = tiny(name)
    encoder.train()(some_input(encoder))  # running statistics that are not the initial ones
    save_encoder(encoder, tmp_path / "encoder")
    state = torch.random.get_rng_state()
    loaded = load_encoder(tmp_path / "encoder")
    assert torch.equal(torch.random.get_rng_state(), state)
    tensors = loaded.state_dict()
    assert list(tensors) == list(encoder.state_dict())
    for key, tensor in encoder.state_dict().items():
        assert tensors[key].dtype == tensor.dtype, key
        assert torch.equal(tensors[key], tensor), key
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.dim, loaded.stages, loaded.spec) == (encoder.dim, encoder.stages, encoder.spec)
    x = some_input(encoder)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), encoder.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_independent(name: str) -> None:
    encoder = tiny(name).eval()
    twin = copy.deepcopy(encoder)
    x = some_input(encoder, 1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        assert encoder(x).abs().sum() == 0
        assert twin(x).abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_input_channels_are_an_option(name: str) -> None:
    if "channels" not in backbone_options(name):
        assert tiny(name).spec.modality == "audio"
        return
    encoder = tiny(name, channels=2).eval()
    assert (encoder.spec.channels, encoder.spec.mean) == (2, (0.0, 0.0))
    with torch.no_grad():
        assert encoder(some_input(encoder)).shape == (2, encoder.dim)
    with pytest.raises(ValueError, match=r"takes \(B, 2, T, H, W\), got \(2, 3, 4, 32, 32\)"):
        encoder(torch.zeros(2, 3, 4, 32, 32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda name: build_encoder(name, width=0), "width must be a positive number, got 0"),
        (lambda name: build_encoder(name, widht=1), "has no option 'widht'; it has .*width"),
        (lambda name: tiny(name).maps(some_input(tiny(name)), "res6"), "no stage 'res6' in .* it has stem, res2"),
        (lambda name: tiny(name)(torch.zeros(2, 3, 64)), r"takes \(B, .*\), got \(2, 3, 64\)"),
    ],
)
def test_wrong_use_is_one_clear_error(name: str, call: Callable[[str], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(name)
