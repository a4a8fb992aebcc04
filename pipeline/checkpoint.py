"""Checkpoints: a folder per step, complete or absent, without pickle.

    checkpoint/step-00000120/model.safetensors      parameters and buffers of the method
                             optimizer.safetensors  tensors of the optimiser, and the epoch's explicit picks
                             state.json             step, cursor, sums of the open log interval, sizes of the files

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so that a kill at any instant leaves
either the old ones or the new one too. Optimiser options (rates, decay) are not stored: they belong to the
configuration.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from clipmill.pipeline.order import Cursor

FOLDER = "checkpoint"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_PICKS = "picks"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands.

    step: optimiser steps done. cursor: the loader's next position. sums: of the open log interval, by name. notes:
    numbers of the running epoch that no row holds yet. picks: explicit record numbers of the running epoch, if a
    method set them. scaler: state of the fp16 loss scaler.
    """

    step: int
    cursor: Cursor
    sums: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    picks: np.ndarray | None = None
    scaler: dict[str, Any] = field(default_factory=dict)


def save(run: Path, state: TrainState, method: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 2) -> Path:
    """Write a checkpoint of ``run`` and delete all but the newest ``keep``; returns its folder.

    Raises ValueError when a parameter is not finite: such a run cannot be continued.
    """
    _check_finite(method, state.step)
    parent = run / FOLDER
    final = parent / f"step-{state.step:08d}"
    partial = parent / f"partial-{state.step:08d}"
    _remove_leftovers(parent)
    partial.mkdir(parents=True)
    try:
        _write(partial, state, method, optimizer)
    except BaseException:
        shutil.rmtree(partial)
        raise
    if final.exists():
        _delete(final)
    partial.rename(final)
    _flush(parent)
    for old in complete(run)[:-keep]:
        _delete(old)
    return final


def _write(folder: Path, state: TrainState, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    values, tensors = _optimizer_state(optimizer)
    if state.picks is not None:
        tensors[_PICKS] = torch.from_numpy(np.ascontiguousarray(state.picks))
    safetensors.torch.save_file(_storable(method.state_dict()), folder / MODEL_FILE)
    safetensors.torch.save_file(tensors, folder / OPTIMIZER_FILE)
    body = {
        "schema_version": SCHEMA_VERSION,
        "step": state.step,
        "cursor": asdict(state.cursor),
        "sums": state.sums,
        "notes": state.notes,
        "scaler": state.scaler,
        "optimizer": values,
        "bytes": {name: (folder / name).stat().st_size for name in (MODEL_FILE, OPTIMIZER_FILE)},
    }
    (folder / STATE_FILE).write_text(json.dumps(body, indent=2) + "\n")
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, "."):
        _flush(folder / name)


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    parent = run / FOLDER
    if not parent.is_dir():
        return []
    found = sorted((int(match[1]), path) for path in parent.iterdir() if (match := _NAME.fullmatch(path.name)))
    return [path for _, path in found if _is_complete(path)]


def restore(path: Path, method: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> TrainState:
    """Load a checkpoint into ``method`` and ``optimizer``; raises ValueError if it belongs to other ones."""
    body = json.loads((path / STATE_FILE).read_text())
    if body.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: checkpoint of schema version {body.get('schema_version')}, this clipmill reads {SCHEMA_VERSION}; "
            "start a new run"
        )
    weights = safetensors.torch.load_file(path / MODEL_FILE)
    _grow_buffers(method, weights)
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ValueError(
            f"{path}: the checkpoint is of another model ({first}); use the options of that run"
        ) from error
    tensors = safetensors.torch.load_file(path / OPTIMIZER_FILE)
    picks = tensors.pop(_PICKS, None)
    if optimizer is not None:
        _load_optimizer(path, optimizer, body["optimizer"], tensors)
    return TrainState(
        step=body["step"],
        cursor=Cursor(**body["cursor"]),
        sums=body["sums"],
        notes=body["notes"],
        picks=None if picks is None else picks.numpy(),
        scaler=body["scaler"],
    )


# --- optimiser state ----------------------------------------------------------------------------------------


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain values and tensors by ``parameter number.name``."""
    flat = {
        f"{number}.{name}": value
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return {name: value for name, value in flat.items() if name not in tensors}, _storable(tensors)


def _load_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, values: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    entries: dict[int, dict[str, Any]] = {}
    for name, value in {**values, **tensors}.items():
        number, _, key = name.partition(".")
        entries.setdefault(int(number), {})[key] = value
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, entry in entries.items():
        shapes = {value.shape for value in entry.values() if isinstance(value, Tensor) and value.dim()}
        if number >= len(params) or not shapes <= {params[number].shape}:
            raise ValueError(f"{path}: the optimiser state is of another model; use the options of that run")
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


# --- files --------------------------------------------------------------------------------------------------


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, contiguous, no two sharing memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        if place in seen or stored.untyped_storage().nbytes() != stored.nbytes:
            stored = stored.clone()
        seen.add(place)
        result[name] = stored
    return result


def _grow_buffers(method: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give buffers that are empty until the corpus is known (label stores) the stored shape."""
    for name, buffer in method.named_buffers():
        if buffer.numel() == 0 and name in weights:
            owner, _, leaf = name.rpartition(".")
            setattr(method.get_submodule(owner), leaf, buffer.new_empty(weights[name].shape))


def _check_finite(method: nn.Module, step: int) -> None:
    norms = [torch.linalg.vector_norm(param) for param in method.parameters()]
    if norms and not torch.isfinite(torch.stack([norm.float() for norm in norms])).all():
        broken = (name for name, param in method.named_parameters() if not torch.isfinite(param).all())
        name = next(broken, "the method")
        raise ValueError(f"step {step}: weights of {name} are not finite; lower --lr or set --clip-grad-norm")


def _is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / STATE_FILE).read_text())["bytes"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _delete(path: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that looks like a checkpoint."""
    trash = path.with_name(f"trash-{path.name}")
    path.rename(trash)
    shutil.rmtree(trash)


def _remove_leftovers(parent: Path) -> None:
    if parent.is_dir():
        for path in parent.iterdir():
            if path.name.startswith(("partial-", "trash-")):
                shutil.rmtree(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
