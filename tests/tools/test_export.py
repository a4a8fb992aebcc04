"""Exported files load into the other library and give the same features."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from torch import Tensor, nn

from clipmill.models.encoder import Encoder, encoder_meta, load_encoder, save_encoder
from clipmill.models.encoder import build_encoder as build
from clipmill.tools import export


def trained(name: str, folder: Path, **options: object) -> Encoder:
    """Save an encoder whose normalisation layers are not as initialised; return it in evaluation mode."""
    torch.manual_seed(0)
    encoder = build(name, **options)
    for part in encoder.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
    save_encoder(encoder, folder, {"epochs": 2})
    return encoder.eval()


def run(source: Path, out: Path, *options: str) -> dict:
    assert export.main(tyro.cli(export.Args, args=[str(source), str(out), *options])) == 0
    name = export.CONFIG if (out / export.CONFIG).exists() else "encoder.json"
    return json.loads((out / name).read_text())


def as_told(load: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Run the printed instructions."""
    names: dict = {}
    monkeypatch.chdir(folder)
    exec("\n".join(load), names)
    return names["model"].eval()


def clips(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (2, 3, 1, 64, 64)),
        ("resnet50", (1, 3, 1, 64, 64)),
        ("r3d_18", (1, 3, 4, 32, 32)),
        ("mc3_18", (1, 3, 4, 32, 32)),
        ("r2plus1d_18", (1, 3, 4, 32, 32)),
        ("s3d", (1, 3, 16, 224, 224)),  # torchvision's S3D averages windows of 2x7x7: one window at this size
    ],
)
@torch.no_grad()
def test_torchvision_gives_the_same_features(
    name: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = trained(name, tmp_path / "run")
    config = run(tmp_path / "run", tmp_path / "out", "--layout", "torchvision")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {export.WEIGHTS, export.CONFIG}
    model = as_told(config["load"], tmp_path / "out", monkeypatch)
    assert type(model).__module__.startswith("torchvision.")
    x = clips(*shape)
    torch.testing.assert_close(model(x[:, :, 0] if name.startswith("resnet") else x), encoder(x))
    assert config["input"]["mean"] == list(encoder.spec.mean)
    assert (config["dim"], config["backbone"]["name"]) == (encoder.dim, name)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "audio_resnet18"])
@torch.no_grad()
def test_timm_gives_the_same_features(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    encoder = trained(name, tmp_path / "run")
    config = run(tmp_path / "run", tmp_path / "out", "--layout", "timm")
    x = clips(2, 1, 80, 64) if name.startswith("audio") else clips(2, 3, 64, 64)
    expected = encoder(x if name.startswith("audio") else x[:, :, None])
    torch.testing.assert_close(as_told(config["load"], tmp_path / "out", monkeypatch)(x), expected)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(model(x), expected)
    assert tuple(model.pretrained_cfg["mean"]) == encoder.spec.mean


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in export.LAYOUTS for name in export.LAYOUTS[layout]]
)
def test_every_listed_backbone_fits_its_layout(layout: str, name: str) -> None:
    with torch.device("meta"):
        encoder = build(name)
    model, head = export.LAYOUTS[layout][name]
    theirs = export._reference(model, layout, encoder.spec.channels)
    ours = encoder.state_dict()
    assert {key for key in theirs if not key.startswith(head)} == set(ours)
    export._check(ours, theirs, head, model, {})


@torch.no_grad()
def test_own_layout_takes_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = trained("r2plus1d_18_vmz", tmp_path / "run", width=0.125)
    meta = run(tmp_path / "run", tmp_path / "deep" / "out", "--layout", "clipmill")
    assert meta["extra"] == encoder_meta(tmp_path / "run")["extra"] == {"epochs": 2}
    x = clips(1, 3, 4, 32, 32)
    torch.testing.assert_close(load_encoder(tmp_path / "deep" / "out").eval()(x), encoder(x), rtol=0, atol=0)
    lines = export.export(tmp_path / "run", tmp_path / "second", "clipmill")
    model = as_told([line.strip() for line in lines[1:]], tmp_path / "second", monkeypatch)
    torch.testing.assert_close(model(x), encoder(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "layout", "message"),
    [
        ("resnet18", {"width": 0.5}, "torchvision", r"resnet18 cannot hold .* width=0.5: tensor conv1.weight is \(32,"),
        ("resnet18", {"stem": "3x3"}, "timm", r"stem=3x3: tensor conv1.weight is \(64, 3, 3, 3\)"),
        ("resnet18", {"channels": 1}, "torchvision", r"channels=1: .*use --layout clipmill"),
        ("r2plus1d_18_vmz", {"width": 0.125}, "torchvision", "torchvision has no r2plus1d_18_vmz .*only resnet18"),
        ("r3d_18", {"width": 0.125}, "timm", "timm has no r3d_18 .*use --layout clipmill"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    name: str, options: dict, layout: export.Layout, message: str, tmp_path: Path
) -> None:
    trained(name, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=message):
        export.export(tmp_path / "run", tmp_path / "out", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    trained("resnet18", tmp_path / "run", width=0.125)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="out exists and is not an empty folder; name a new one"):
        export.export(tmp_path / "run", tmp_path / "out", "clipmill")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "out" / "mine.txt").unlink()
    export.export(tmp_path / "run", tmp_path / "out", "clipmill")
    assert load_encoder(tmp_path / "out").dim == 64


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("resnet18", tmp_path / "run")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.export(tmp_path / "run", tmp_path / "out", "torchvision")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, clipmill.tools.export; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        export.export(tmp_path / "nowhere", tmp_path / "out", "clipmill")


def test_other_strides_are_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained("resnet18", tmp_path / "run", strides=(1, 2, 1, 1))
    run(tmp_path / "run", tmp_path / "out")
    assert "built with strides=[1, 2, 1, 1], which torchvision's model does not have" in capsys.readouterr().out
