"""Checkpoints: everything comes back bit for bit, and nothing half-written is ever taken for one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clipmill.models.method import ParamGroup
from clipmill.pipeline import checkpoint
from clipmill.pipeline.checkpoint import TrainState
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.optim import build_optimizer
from clipmill.pipeline.order import Cursor


class Net(nn.Module):
    """Two layers that share a weight, a normalisation, and a buffer that grows."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))


def _trained(optimiser: str, steps: int = 3, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    optimizer = build_optimizer([ParamGroup(params=list(net.parameters()))], TrainConfig(optimiser=optimiser))
    for _ in range(steps):
        optimizer.zero_grad()
        net.norm(net.second(net.first(torch.randn(4, 3)))).square().sum().backward()
        optimizer.step()
    return net, optimizer


def _state(step: int = 7) -> TrainState:
    return TrainState(
        step=step, cursor=Cursor(seed=3, epoch=1, position=40, index_digest="ab"), sums={"loss": 0.1 + 0.2}
    )


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars", "larc_adam"])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    net, optimizer = _trained(name)
    net.labels = torch.arange(9)
    state = TrainState(
        step=7,
        cursor=Cursor(seed=3, epoch=1, position=40, index_digest="ab"),
        sums={"loss": 0.1 + 0.2},
        notes={"nmi": 0.5},
        picks=np.array([3, 1, 2]),
        scaler={"scale": 65536.0},
    )
    checkpoint.save(tmp_path, state, net, optimizer)
    other, other_optimizer = _trained(name, steps=1, seed=5)
    (path,) = checkpoint.complete(tmp_path)
    found = checkpoint.restore(path, other, other_optimizer)
    assert found.picks is not None
    assert found.picks.tolist() == [3, 1, 2]
    assert (found.step, found.cursor, found.sums, found.notes, found.scaler) == (
        state.step, state.cursor, state.sums, state.notes, state.scaler,
    )  # fmt: skip
    for key, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key
    before, after = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for number, entry in before.items():
        assert entry.keys() == after[number].keys()
        assert all(torch.equal(torch.as_tensor(after[number][key]), torch.as_tensor(entry[key])) for key in entry)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    net, optimizer = _trained("sgd")
    for step in (5, 10, 15, 100000000):
        checkpoint.save(tmp_path, _state(step), net, optimizer, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000015", "step-100000000"]
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-00000015", "step-100000000"]


def test_incomplete_ones_are_passed_over(tmp_path: Path) -> None:
    net, optimizer = _trained("sgd")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, _state(step), net, optimizer, keep=9)
    parent = tmp_path / "checkpoint"
    with (parent / "step-00000003" / checkpoint.MODEL_FILE).open("r+b") as file:
        file.truncate(100)
    (parent / "step-00000002" / checkpoint.STATE_FILE).unlink()
    (parent / "partial-00000004").mkdir()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, _state(3), net, optimizer, keep=9)  # replaces the damaged one, clears the leftover
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000001", "step-00000003"]
    assert not (parent / "partial-00000004").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = _trained("sgd")
    checkpoint.save(tmp_path, _state(1), net, optimizer)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, _state(2), net, optimizer)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000001"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    net, optimizer = _trained("sgd")
    checkpoint.save(tmp_path, _state(), net, optimizer)
    (path,) = checkpoint.complete(tmp_path)
    with pytest.raises(ValueError, match=r"another model .size mismatch for first.weight"):
        checkpoint.restore(path, Net(width=4))
    body = json.loads((path / checkpoint.STATE_FILE).read_text())
    (path / checkpoint.STATE_FILE).write_text(json.dumps({**body, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99"):
        checkpoint.restore(path, net)


def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    net, optimizer = _trained("sgd")
    with torch.no_grad():
        net.norm.weight[1] = torch.nan
    with pytest.raises(ValueError, match=r"step 7: weights of norm.weight are not finite"):
        checkpoint.save(tmp_path, _state(), net, optimizer)
    assert checkpoint.complete(tmp_path) == []


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.complete(tmp_path / "nowhere") == []
