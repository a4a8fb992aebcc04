"""2-D ResNets against torchvision, and what is adjustable in them."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

from clipmill.models.backbones.resnet import FrameResNet
from clipmill.models.encoder import Encoder, build_encoder


def frames(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def lively(model: nn.Module) -> nn.Module:
    """Give normalisation layers statistics and scales that matter, and set evaluation mode."""
    generator = torch.Generator().manual_seed(4)
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)):
            assert part.running_mean is not None
            assert part.running_var is not None
            for tensor, low, high in (
                (part.running_mean, -0.2, 0.2),
                (part.running_var, 0.5, 1.5),
                (part.weight.data, 0.5, 1.5),
                (part.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def torchvision_twin(name: str, encoder: Encoder, **options: object) -> nn.Module:
    model = lively(torchvision.models.get_model(name, **options))
    model.fc = nn.Identity()
    encoder.load_state_dict(model.state_dict(), strict=True)
    encoder.eval()
    return model


def tapped(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All stages of a torchvision ResNet."""
    parts = {
        "stem": nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool),  # type: ignore[arg-type]
        **{f"res{number + 1}": getattr(model, f"layer{number}") for number in range(1, 5)},
    }
    return {stage: (x := part(x)) for stage, part in parts.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@torch.no_grad()
def test_equals_torchvision_frame_by_frame(name: str) -> None:
    encoder = build_encoder(name)
    model = torchvision_twin(name, encoder)
    clip = frames(2, 3, 2, 64, 48)
    expected = torch.stack([model(clip[:, :, t]) for t in range(2)]).mean(0)
    torch.testing.assert_close(encoder(clip), expected)
    stages = tapped(model, clip[:, :, 1])
    assert tuple(stages) == encoder.stages
    for stage, expected in stages.items():
        torch.testing.assert_close(encoder.maps(clip, stage)[:, :, 1], expected)


@torch.no_grad()
def test_bottleneck_dilations_are_torchvisions() -> None:
    encoder = build_encoder("resnet50")
    model = torchvision_twin("resnet50", encoder, replace_stride_with_dilation=[False, True, True])
    x = frames(1, 3, 1, 64, 72)
    assert isinstance(encoder, FrameResNet)
    for stage, expected in tapped(model, x[:, :, 0]).items():
        y = encoder.maps(x, stage, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
        torch.testing.assert_close(y[:, :, 0], expected)


@torch.no_grad()
def test_basic_block_dilates_its_first_convolution_only() -> None:
    encoder = build_encoder("resnet18", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    model = torchvision_twin("resnet18", encoder)
    for layer, first, second in ((model.layer3, 1, 2), (model.layer4, 2, 4)):
        layer[0].conv1.stride = layer[0].downsample[0].stride = (1, 1)  # type: ignore[index]
        for block, dilation in ((layer[0], first), (layer[1], second)):  # type: ignore[index]
            block.conv1.dilation = block.conv1.padding = (dilation, dilation)
    x = frames(1, 3, 1, 64, 72)
    torch.testing.assert_close(encoder.maps(x, "res5")[:, :, 0], tapped(model, x[:, :, 0])["res5"])


@torch.no_grad()
def test_strides_are_adjustable_per_call_without_other_parameters() -> None:
    encoder = build_encoder("resnet18", width=0.125).eval()
    assert isinstance(encoder, FrameResNet)
    for size, cells in (((120, 120), (15, 15)), ((255, 255), (32, 32)), ((48, 86), (6, 11))):
        x = frames(1, 3, 1, *size)
        y = encoder.maps(x, "res5", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
        assert y.shape == (1, 64, 1, *cells)
        assert encoder.maps(x, "res4", strides=(1, 2, 1, 1)).shape == (1, 32, 1, *cells)
    before = encoder(x)
    other = build_encoder("resnet18", width=0.125, strides=(1, 2, 1, 1), dilations=[1, 1, 2, 4]).eval()
    assert other.reductions["res5"] == (1, 8, 8)
    other.load_state_dict(encoder.state_dict(), strict=True)
    torch.testing.assert_close(
        other.maps(x, "res5"), encoder.maps(x, "res5", (1, 2, 1, 1), (1, 1, 2, 4)), rtol=0, atol=0
    )
    torch.testing.assert_close(encoder(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.125])
def test_tensors_do_not_depend_on_the_strides(width: float) -> None:
    with torch.device("meta"):
        usual = build_encoder("resnet18", width=width)
        other = build_encoder("resnet18", width=width, strides=(1, 1, 1, 1))
    shapes = {key: tensor.shape for key, tensor in usual.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in other.state_dict().items()}


@torch.no_grad()
def test_small_stem_keeps_32_pixels() -> None:
    encoder = build_encoder("resnet18", stem="3x3")
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    encoder.load_state_dict(lively(model).state_dict(), strict=True)
    x = frames(2, 3, 1, 32, 32)
    torch.testing.assert_close(encoder.eval()(x), model(x[:, :, 0]))
    assert encoder.reductions["stem"] == (1, 1, 1)
    assert encoder.reductions["res5"] == (1, 8, 8)
    assert encoder.spec.size == 32


@torch.no_grad()
def test_pooling_over_time() -> None:
    mean = build_encoder("resnet18", width=0.125).eval()
    highest = build_encoder("resnet18", width=0.125, pool="max").eval()
    highest.load_state_dict(mean.state_dict())
    clip = frames(2, 3, 5, 40, 40)
    alone = torch.stack([mean(clip[:, :, t : t + 1]) for t in range(5)])
    torch.testing.assert_close(mean(clip), alone.mean(0))
    torch.testing.assert_close(highest(clip), alone.amax(0))


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name: str, last: str) -> None:
    encoder = build_encoder(name, width=0.125, zero_init_residual=True)
    for key, parameter in encoder.named_parameters():
        if ".bn" in key and key.endswith("weight"):
            assert (parameter == (0 if last in key else 1)).all(), key
    if name == "resnet18":  # without a convolution in the shortcut a block is then the identity
        x = frames(2, 3, 1, 32, 32)
        torch.testing.assert_close(encoder.maps(x, "res2"), encoder.maps(x, "stem"), rtol=0, atol=0)


def test_weight_initialisation() -> None:
    torch.manual_seed(0)
    stds = {
        "fan_out": math.sqrt(2 / (512 * 9)),
        "fan_in": math.sqrt(2 / (256 * 9)),
        "variance_scaling": math.sqrt(1 / (256 * 9)),
    }
    for init, std in stds.items():
        weight = build_encoder("resnet18", init=init).state_dict()["layer4.0.conv1.weight"]  # 512 x 256 x 3 x 3
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert weight.mean().item() == pytest.approx(0, abs=std / 100)
        longest = weight.abs().max().item() / std
        assert longest < 2 / 0.8796 + 1e-3 if init == "variance_scaling" else longest > 3


def test_width_scales_every_channel() -> None:
    wide = build_encoder("resnet50", width=2)
    assert wide.dim == 4096
    assert wide.state_dict()["layer2.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert sum(p.numel() for p in build_encoder("resnet18").parameters()) == 11_176_512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "sum"}, "pool must be mean or max, got 'sum'"),
        ({"stem": "5x5"}, "stem must be 7x7 or 3x3, got '5x5'"),
        ({"init": "zeros"}, "init must be fan_out, fan_in or variance_scaling, got 'zeros'"),
        ({"strides": (1, 2, 1)}, r"strides must be 4 positive integers, .* got \(1, 2, 1\)"),
        ({"strides": (2, 2, 2, 2)}, r"strides must begin with 1, got \(2, 2, 2, 2\)"),
        ({"dilations": (1, 1, 0, 1)}, r"dilations must be 4 positive integers"),
        ({"width": -1}, "width must be a positive number, got -1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder("resnet18", **options)


@torch.no_grad()
def test_audio_resnet_is_resnet18_with_one_channel() -> None:
    encoder = build_encoder("audio_resnet18")
    assert sum(p.numel() for p in encoder.parameters()) == 11_170_240
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.fc = nn.Identity()  # type: ignore[assignment]
    encoder.load_state_dict(lively(model).state_dict(), strict=True)
    sound = frames(2, 1, 80, 201)
    torch.testing.assert_close(encoder.eval()(sound), model(sound))
    assert encoder.maps(sound, "res5").shape == (2, 512, 3, 7)
    assert encoder.reductions["res4"] == (16, 16)
