"""PyTorchVideo's networks: the same as its model zoo's, and a clear error without it."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from clipmill.models.encoder import build_encoder

NAMES = ["slow_r50", "csn_r101", "r2plus1d_r50", "x3d_s", "x3d_m", "slowfast_r50"]


def zoo(name: str) -> nn.Module:
    """The model zoo's network, with random weights."""
    pytest.importorskip("pytorchvideo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script, used by fvcore
        from pytorchvideo.models import hub

        torch.manual_seed(0)
        return getattr(hub, name)().eval()


def clips(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_the_model_zoo(name: str) -> None:
    model = zoo(name)
    encoder = build_encoder(name).eval()
    head = "blocks.5.proj." if name.startswith("x3d") else "blocks.5."
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith((head, "blocks.6."))}
    encoder.load_state_dict(tensors, strict=True)
    x = clips(1, 3, 32 if name == "slowfast_r50" else 8, 64, 64)
    y = [x[:, :, torch.linspace(0, 31, 8).long()], x] if name == "slowfast_r50" else x
    for stage, block in zip(encoder.stages, model.blocks[:5], strict=True):  # type: ignore[index,arg-type]
        y = block(y)
        torch.testing.assert_close(encoder.maps(x, stage), y[0] if isinstance(y, list) else y)
    if isinstance(y, list):
        torch.testing.assert_close(encoder(x), torch.cat([path.mean((2, 3, 4)) for path in y], 1))
    elif not name.startswith("x3d"):
        torch.testing.assert_close(encoder(x), y.mean((2, 3, 4)))


@torch.no_grad()
def test_x3d_features_are_what_the_zoos_classifier_sees() -> None:
    model = zoo("x3d_s")
    encoder = build_encoder("x3d_s").eval()
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("blocks.5.proj.")}
    encoder.load_state_dict(tensors, strict=True)
    head = model.blocks[5]  # type: ignore[index]
    seen: list[Tensor] = []
    head.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = clips(1, 3, encoder.spec.num_frames, encoder.spec.size, encoder.spec.size)
    model(x)
    torch.testing.assert_close(encoder(x), seen[0].flatten(1))


def test_published_inputs_and_dimensions() -> None:
    pytest.importorskip("pytorchvideo")
    with torch.device("meta"):
        encoders = {name: build_encoder(name) for name in NAMES}
    found = {
        name: (encoder.dim, encoder.spec.num_frames, encoder.spec.stride, encoder.spec.size)
        for name, encoder in encoders.items()
    }
    assert found == {
        "slow_r50": (2048, 8, 8, 224),
        "csn_r101": (2048, 32, 2, 224),
        "r2plus1d_r50": (2048, 16, 4, 224),
        "x3d_s": (2048, 13, 6, 160),
        "x3d_m": (2048, 16, 5, 224),
        "slowfast_r50": (2304, 32, 2, 224),
    }


@pytest.mark.parametrize("name", NAMES)
def test_without_pytorchvideo_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [key for key in sys.modules if key.split(".")[0] == "pytorchvideo"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pytorchvideo", None)
    with pytest.raises(ValueError, match=r"needs PyTorchVideo.*pip install 'clipmill\[pytorchvideo\]'"):
        build_encoder(name)
