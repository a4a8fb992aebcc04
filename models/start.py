"""Weights of an earlier run to start another method from: trunks, heads and queues."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipmill.models.encoder import ENCODER_FILE, first_difference

_MODEL_FILES = "checkpoint/step-*/model.safetensors"  # of a run folder; a step's folder appears when it is complete


def is_run(folder: str | Path) -> bool:
    """Whether a folder has checkpoints."""
    return any(Path(folder).glob(_MODEL_FILES))


def trained(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint of a run, by their names in the method; on the CPU."""
    found = sorted(Path(folder).glob(_MODEL_FILES))
    if not found:
        raise ValueError(f"start = {str(folder)!r}: no checkpoint there; give the folder of a `clipmill pretrain` run")
    return _read(found[-1])


def trained_encoder(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a stored encoder."""
    path = Path(folder) / ENCODER_FILE
    if not path.is_file():
        raise ValueError(f"start = {str(folder)!r}: no {ENCODER_FILE} there; give a run folder or an exported encoder")
    return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); start from another run") from error


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it.

    >>> below({"a.b": Tensor(1), "c": Tensor(1)}, "a.").keys()
    dict_keys(['b'])
    """
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fill(module: nn.Module, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Load all tensors of a module; raises ValueError naming the first that does not fit."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if difference := first_difference(tensors, expected):
        raise ValueError(f"start = {str(folder)!r} does not fit: {difference}; use the backbone options of that run")
    module.load_state_dict(tensors)
