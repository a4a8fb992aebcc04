"""``clipmill export``: write an encoder's weights in another library's layout, as safetensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from clipmill.models.encoder import Encoder

Layout = Literal["torchvision", "timm", "clipmill"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# Backbones whose tensors another library names and shapes as we do, and what they are called there. The value is the
# model's name, and the attribute that holds the classifier we do not have.
_RESNETS = {name: (name, "fc") for name in ("resnet18", "resnet34", "resnet50", "resnet101")}
_VIDEO = {name: (name, "fc") for name in ("r3d_18", "mc3_18", "r2plus1d_18")}
LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "torchvision": {**_RESNETS, **_VIDEO, "s3d": ("s3d", "classifier")},
    "timm": {**_RESNETS, "audio_resnet18": ("resnet18", "fc")},
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write an encoder's weights for other libraries."""

    encoder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_ENCODER")]
    """Run folder of `clipmill pretrain`, or any folder with encoder.json and encoder.safetensors."""
    out: tyro.conf.Positional[Path]
    """New folder for model.safetensors and config.json (layout clipmill: encoder.safetensors and encoder.json)."""
    layout: Layout = "torchvision"
    """Whose tensor names. torchvision: resnet*, r3d_18, mc3_18, r2plus1d_18, s3d. timm: resnet*, audio_resnet18.
    clipmill: every backbone."""


def main(args: Args) -> int:
    """Run the command."""
    for line in export(args.encoder, args.out, args.layout):
        print(line)
    return 0


def export(source: Path, out: Path, layout: Layout) -> list[str]:
    """Write the encoder in ``source`` to the new folder ``out``; return what to tell the user.

    ``out`` appears complete or not at all. A backbone that the library does not have, and one whose tensors it would
    not accept (another width, another stem), are ValueErrors.
    """
    from clipmill.models.encoder import load_encoder

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name a new one")
    encoder = load_encoder(source)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        load = _write_own(encoder, source, partial) if layout == "clipmill" else _write(encoder, partial, layout)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [f"wrote {out} in the {layout} layout; to load it, in that folder:", *(f"    {line}" for line in load)]


def _write_own(encoder: Encoder, source: Path, folder: Path) -> list[str]:
    from clipmill.models.encoder import encoder_meta, save_encoder

    save_encoder(encoder, folder, encoder_meta(source)["extra"])
    return ["import clipmill", "model = clipmill.load_encoder('.')"]


def _write(encoder: Encoder, folder: Path, layout: Layout) -> list[str]:
    from safetensors.torch import save_file

    from clipmill import __version__

    assert encoder.recipe is not None
    name, recipe = encoder.recipe["name"], encoder.recipe
    if name not in LAYOUTS[layout]:
        known = ", ".join(LAYOUTS[layout])
        raise ValueError(f"{layout} has no {name} of this form, only {known}; use --layout clipmill")
    model, head = LAYOUTS[layout][name]
    tensors = {key: tensor.contiguous() for key, tensor in encoder.state_dict().items()}
    _check(tensors, _reference(model, layout, encoder.spec.channels), head, f"{layout}'s {model}", recipe["options"])
    load = _how_to_load(model, layout, head, encoder.spec.channels)
    config: dict[str, Any] = {
        "layout": layout,
        "model": model,
        "load": load,
        "input": asdict(encoder.spec),
        "dim": encoder.dim,
        "backbone": recipe,
        "clipmill": __version__,
    }
    if layout == "timm":  # what timm.create_model("local-dir:FOLDER", pretrained=True) looks for
        spec = encoder.spec
        size = (spec.size, spec.num_frames) if spec.modality == "audio" else (spec.size, spec.size)
        config |= {"architecture": model, "num_classes": 0, "num_features": encoder.dim}
        config["model_args"] = {"in_chans": spec.channels}
        shape = {"input_size": (spec.channels, *size), "first_conv": "conv1", "classifier": head, "num_classes": 0}
        config["pretrained_cfg"] = shape | {"mean": spec.mean, "std": spec.std}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    note = _note(recipe["options"], layout)
    return [*load, *([f"# {note}"] if note else [])]


def _reference(model: str, layout: Layout, channels: int) -> dict[str, Any]:
    """The tensors that the other library's model has, without memory."""
    import torch

    with torch.device("meta"):
        if layout == "timm":
            import timm

            return timm.create_model(model, in_chans=channels).state_dict()
        import torchvision

        return torchvision.models.get_model(model, weights=None).state_dict()


def _check(tensors: dict[str, Any], reference: dict[str, Any], head: str, whose: str, options: dict[str, Any]) -> None:
    from clipmill.models.encoder import first_difference

    expected = {key: tensor.shape for key, tensor in reference.items() if not key.startswith(f"{head}.")}
    if difference := first_difference(tensors, expected):
        made = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(f"{whose} cannot hold an encoder made with {made}: {difference}; use --layout clipmill")


def _how_to_load(model: str, layout: Layout, head: str, channels: int) -> list[str]:
    if layout == "timm":
        make = ["import timm", f"model = timm.create_model({model!r}, num_classes=0, in_chans={channels})"]
    else:
        make = ["import torch, torchvision", f"model = torchvision.models.get_model({model!r})"]
        make.append(f"model.{head} = torch.nn.Identity()")
    return ["from safetensors.torch import load_file", *make, f"model.load_state_dict(load_file({WEIGHTS!r}))"]


def _note(options: dict[str, Any], layout: Layout) -> str:
    """What the weights do not carry over."""
    other = [f"{key}={options[key]}" for key in ("strides", "temporal_strides", "dilations", "pool") if key in options]
    return f"built with {', '.join(other)}, which {layout}'s model does not have" if other else ""
