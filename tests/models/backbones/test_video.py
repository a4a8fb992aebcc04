"""Video backbones against torchvision and against their papers' descriptions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from clipmill.models.encoder import build_encoder


def clips(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def lively(model: nn.Module) -> nn.Module:
    """Give normalisation layers statistics and scales that matter, and set evaluation mode."""
    generator = torch.Generator().manual_seed(4)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm3d):
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


def num_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_encoder(name).parameters())


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
@torch.no_grad()
def test_equals_torchvision(name: str) -> None:
    model = lively(torchvision.models.get_model(name))
    model.fc = nn.Identity()
    encoder = build_encoder(name).eval()
    encoder.load_state_dict(model.state_dict(), strict=True)
    x = clips(1, 3, 5, 48, 36)
    torch.testing.assert_close(encoder(x), model(x))
    y = x
    for part, stage in zip(("stem", "layer1", "layer2", "layer3", "layer4"), encoder.stages, strict=True):
        y = getattr(model, part)(y)
        torch.testing.assert_close(encoder.maps(x, stage), y)


@torch.no_grad()
def test_s3d_equals_torchvision() -> None:
    model = lively(torchvision.models.video.s3d())
    model.classifier = nn.Identity()
    encoder = build_encoder("s3d").eval()
    encoder.load_state_dict(model.state_dict(), strict=True)
    x = clips(1, 3, 16, 64, 96)
    expected = model.features(x)  # type: ignore[operator]
    assert expected.shape == (1, 1024, 2, 2, 3)
    torch.testing.assert_close(encoder.maps(x, "res5"), expected)
    torch.testing.assert_close(encoder(x), expected.mean((2, 3, 4)))
    assert {part.momentum for part in encoder.modules() if isinstance(part, nn.BatchNorm3d)} == {0.1}
    assert {part.eps for part in encoder.modules() if isinstance(part, nn.BatchNorm3d)} == {1e-3}


def test_s3d_has_the_strides_of_a_resnet() -> None:
    encoder = build_encoder("s3d", width=0.125)
    assert encoder.reductions == {
        "stem": (2, 2, 2),
        "res2": (2, 4, 4),
        "res3": (2, 8, 8),
        "res4": (4, 16, 16),
        "res5": (8, 32, 32),
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("r3d_18", 33_371_472 - 400 * 513),  # torchvision's published counts, less the classifier
        ("mc3_18", 11_695_440 - 400 * 513),
        ("r2plus1d_18", 31_505_325 - 400 * 513),
        ("r2plus1d_18_vmz", 33_165_639),
        ("r2plus1d_18_avid", 15_379_136),
        ("s3d", 8_320_048 - 400 * 1025),
        ("c3d", 27_655_936 + 2752),  # with normalisation instead of biases
    ],
)
def test_parameters_at_width_1(name: str, count: int) -> None:
    assert num_parameters(name) == count


def test_c3d_is_that_of_the_paper_up_to_its_dense_layers() -> None:
    with torch.device("meta"):
        encoder = build_encoder("c3d", norm=False)
    count = sum(part.numel() for part in encoder.parameters())
    dense = (512 * 4 * 4 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 101
    assert count + dense == 78_409_573  # of the common implementations with the 101 classes of UCF101
    encoder = build_encoder("c3d", width=0.125)
    shapes = [tuple(encoder.maps(clips(1, 3, 16, 112, 112), stage).shape[2:]) for stage in encoder.stages]
    assert shapes == [(16, 112, 112), (16, 56, 56), (8, 28, 28), (4, 14, 14), (2, 7, 7)]


def test_vmz_form_has_a_mid_width_per_convolution() -> None:
    with torch.device("meta"):
        encoder = build_encoder("r2plus1d_18_vmz")
    shapes = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    assert shapes["stem.0.weight"] == (45, 3, 1, 7, 7)
    mids = [
        [shapes[f"layer{layer}.{block}.conv{conv}.0.0.weight"][0] for block in (0, 1) for conv in (1, 2)]
        for layer in (1, 2, 3, 4)
    ]
    assert mids == [[144] * 4, [230, 288, 288, 288], [460, 576, 576, 576], [921, 1152, 1152, 1152]]
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm3d)]
    assert {(part.eps, part.momentum) for part in norms} == {(1e-3, 0.9)}


@torch.no_grad()
def test_vmz_form_shares_all_but_the_mid_widths_with_torchvisions() -> None:
    torch.manual_seed(0)
    vmz, other = build_encoder("r2plus1d_18_vmz", width=0.25), build_encoder("r2plus1d_18", width=0.25)
    tensors = other.state_dict()
    same = [key for key, tensor in vmz.state_dict().items() if tensor.shape == tensors[key].shape]
    changed = set(tensors) - set(same)
    assert set(vmz.state_dict()) == set(tensors)
    assert {key.split(".")[1] + key.split(".")[2] for key in changed} == {"0conv2"}  # of strided blocks


@torch.no_grad()
def test_avid_form_follows_its_description() -> None:
    encoder = lively(build_encoder("r2plus1d_18_avid", width=0.125))
    p = encoder.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        stats = (p[f"{name}.running_mean"], p[f"{name}.running_var"], p[f"{name}.weight"], p[f"{name}.bias"])
        return F.batch_norm(x, *stats, eps=1e-5)

    def conv(x: Tensor, name: str, stride: tuple[int, int, int], padding: tuple[int, int, int]) -> Tensor:
        return F.conv3d(x, p[f"{name}.weight"], None, stride, padding)

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        y = F.relu(norm(conv(x, f"{name}.conv1.0", (1, stride, stride), (0, 1, 1)), f"{name}.conv1.1"))
        y = F.relu(norm(conv(y, f"{name}.conv1.3", (stride, 1, 1), (1, 0, 0)), f"{name}.norm1"))
        y = F.relu(norm(conv(y, f"{name}.conv2.0", (1, 1, 1), (0, 1, 1)), f"{name}.conv2.1"))
        y = conv(y, f"{name}.conv2.3", (1, 1, 1), (1, 0, 0))
        if f"{name}.downsample.weight" in p:
            x = conv(x, f"{name}.downsample", (stride, stride, stride), (0, 0, 0))
        return F.relu(norm(y + x, f"{name}.norm"))

    x = clips(2, 3, 8, 56, 40)
    y = F.relu(norm(conv(x, "stem.0", (1, 2, 2), (1, 3, 3)), "stem.1"))
    y = F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for layer, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        y = block(block(y, f"layer{layer}.0", stride), f"layer{layer}.1", 1)
    torch.testing.assert_close(encoder(x), y.mean((2, 3, 4)))  # type: ignore[operator]


@torch.no_grad()
def test_avid_form_at_its_published_size() -> None:
    encoder = build_encoder("r2plus1d_18_avid").eval()
    assert encoder.maps(clips(1, 3, 8, 112, 112), "res5").shape == (1, 512, 1, 4, 4)


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18", "r2plus1d_18_vmz", "r2plus1d_18_avid"])
@torch.no_grad()
def test_strides_are_adjustable_without_other_parameters(name: str) -> None:
    usual = build_encoder(name, width=0.125).eval()
    other = build_encoder(name, width=0.125, strides=(1, 2, 1, 1), temporal_strides=[1, 1, 1, 1]).eval()
    other.load_state_dict(usual.state_dict(), strict=True)
    x = clips(1, 3, 4, 64, 64)
    stem = other.reductions["stem"][1]
    y = other.maps(x, "res5")
    assert y.shape[2:] == (4, 64 // stem // 2, 64 // stem // 2)
    # stride 1 computes what stride 2 does at every second cell, as far as only one stage was changed
    one = build_encoder(name, width=0.125, strides=(1, 1, 2, 2)).eval()
    one.load_state_dict(usual.state_dict(), strict=True)
    assert one.maps(x, "res3").shape[-1] == 2 * usual.maps(x, "res3").shape[-1]


def test_mc3_keeps_time() -> None:
    encoder = build_encoder("mc3_18", width=0.125)
    assert encoder.reductions["res5"] == (1, 16, 16)
    assert encoder.state_dict()["layer2.0.conv1.0.weight"].shape[2:] == (1, 3, 3)
    with pytest.raises(ValueError, match="mc3_18 has no option 'temporal_strides'"):
        build_encoder("mc3_18", temporal_strides=(1, 1, 1, 1))


@torch.no_grad()
def test_zero_init_residual_makes_blocks_identities() -> None:
    encoder = build_encoder("r2plus1d_18", width=0.125, zero_init_residual=True)
    x = clips(1, 3, 4, 32, 32)
    torch.testing.assert_close(encoder.maps(x, "res2"), encoder.maps(x, "stem"), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18_avid"])
def test_wrong_strides(name: str) -> None:
    with pytest.raises(ValueError, match=r"temporal_strides must begin with 1, got \(2, 1, 1, 1\)"):
        build_encoder(name, temporal_strides=(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"strides must be 4 positive integers"):
        build_encoder(name, strides=(1, 2.5, 1, 1))
