"""Building, saving and loading encoders: what goes wrong is one clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from clipmill.models.encoder import (
    ENCODER_FILE,
    ENCODER_META,
    Encoder,
    InputSpec,
    backbone_options,
    build_encoder,
    encoder_meta,
    load_encoder,
    save_encoder,
)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder("resnet18", width=0.125, stem="3x3", strides=(1, 2, 2, 1))


@pytest.fixture
def folder(encoder: Encoder, tmp_path: Path) -> Path:
    save_encoder(encoder, tmp_path / "run", {"epochs": 3})
    return tmp_path / "run"


def test_options_spec_and_extra_are_kept(encoder: Encoder, tmp_path: Path) -> None:
    encoder.spec = replace(encoder.spec, num_frames=8, size=56, mean=(0.5, 0.4, 0.3))
    save_encoder(encoder, tmp_path, {"view": "query"})
    loaded = load_encoder(tmp_path)
    assert loaded.spec == encoder.spec
    assert loaded.reductions == encoder.reductions
    assert encoder_meta(tmp_path)["extra"] == {"view": "query"}
    assert encoder_meta(tmp_path)["backbone"]["name"] == "resnet18"
    assert {path.name for path in tmp_path.iterdir()} == {ENCODER_FILE, ENCODER_META}


def test_a_loaded_encoder_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    save_encoder(load_encoder(folder), tmp_path / "again", encoder_meta(folder)["extra"])
    for name in (ENCODER_FILE, ENCODER_META):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_options_can_be_replaced_when_loading(folder: Path) -> None:
    loaded = load_encoder(folder, strides=(1, 1, 1, 1))
    assert loaded.maps(torch.zeros(1, 3, 1, 32, 32), "res5").shape[-2:] == (32, 32)
    with pytest.raises(ValueError, match=r"does not fit resnet18: tensor conv1.weight is \(8,.*should be \(16,"):
        load_encoder(folder, width=0.25)


def test_half_precision_survives(encoder: Encoder, tmp_path: Path) -> None:
    save_encoder(encoder.to(torch.bfloat16), tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.state_dict()["conv1.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded.state_dict()["conv1.weight"], encoder.state_dict()["conv1.weight"])


def test_an_encoder_of_unknown_origin_is_not_saved(tmp_path: Path) -> None:
    from clipmill.models.backbones.resnet import resnet18

    with pytest.raises(ValueError, match="made by build_encoder"):
        save_encoder(resnet18(width=0.125), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_save_leaves_the_old_encoder(encoder: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_encoder(encoder, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no encoder\.json there; give a finished run folder"):
        load_encoder(tmp_path)
    (folder / ENCODER_FILE).unlink()
    with pytest.raises(ValueError, match=r"no encoder\.safetensors beside encoder\.json"):
        load_encoder(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_damaged_weights(folder: Path, keep: int) -> None:
    path = folder / ENCODER_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"encoder.safetensors: damaged \("):
        load_encoder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"backbone": {}}', "\x00\xff"])
def test_damaged_meta(folder: Path, text: str) -> None:
    (folder / ENCODER_META).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"encoder.json: damaged \("):
        load_encoder(folder)


def test_another_format_is_refused(folder: Path) -> None:
    meta = json.loads((folder / ENCODER_META).read_text())
    (folder / ENCODER_META).write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, but this clipmill reads 1"):
        load_encoder(folder)


def edit(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / ENCODER_META).read_text())
    (folder / ENCODER_META).write_text(json.dumps(meta | changes))


def test_unknown_backbone_or_option_in_the_file(folder: Path) -> None:
    edit(folder, backbone={"name": "resent18", "options": {}})
    with pytest.raises(ValueError, match=r"encoder.json: unknown backbone 'resent18'; did you mean .*resnet18"):
        load_encoder(folder)
    edit(folder, backbone={"name": "resnet18", "options": {"depth": 3}})
    with pytest.raises(ValueError, match=r"encoder.json: backbone resnet18 has no option 'depth'"):
        load_encoder(folder)
    edit(folder, backbone={"name": "resnet18", "options": {"width": 0.125}}, spec={"colour": 1})
    with pytest.raises(ValueError, match=r"encoder.json: .*colour"):
        load_encoder(folder)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_wrong_tensors_are_named(folder: Path, change: str) -> None:
    tensors = safetensors.torch.load_file(folder / ENCODER_FILE)
    if change == "missing":
        del tensors["layer2.0.bn1.weight"]
    elif change == "extra":
        tensors["fc.weight"] = torch.zeros(2, 64)
    else:
        tensors["layer3.1.conv2.weight"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, folder / ENCODER_FILE)
    expected = {
        "missing": r"tensor layer2.0.bn1.weight \(16,\) is missing",
        "extra": r"tensor fc.weight \(2, 64\) is not part of it",
        "shape": r"tensor layer3.1.conv2.weight is \(3,\), it should be \(32, 32, 3, 3\)",
    }
    with pytest.raises(ValueError, match=f"does not fit resnet18: {expected[change]}"):
        load_encoder(folder)


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'r3d18'; did you mean .*r3d_18"):
        build_encoder("r3d18")
    with pytest.raises(ValueError, match=r"unknown backbone 'zzz'; did you mean .*audio_resnet18.*s3d"):
        build_encoder("zzz")


def test_options_are_listed() -> None:
    assert set(backbone_options("s3d")) == {"width", "channels", "bn_momentum"}
    assert {"width", "zero_init_residual", "init", "pool", "stem", "strides"} <= set(backbone_options("resnet18"))
    assert "temporal_strides" in backbone_options("r3d_18")
    assert "temporal_strides" not in backbone_options("mc3_18")


def test_input_spec_wants_a_mean_for_each_channel() -> None:
    with pytest.raises(ValueError, match="must have 1 numbers, one a channel"):
        InputSpec(modality="audio", channels=1)
