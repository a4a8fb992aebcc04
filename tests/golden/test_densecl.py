"""Golden numbers of DenseCL: whole steps of the official classes above given feature maps (WXinlong/DenseCL)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.methods.densecl import Config, DenseCL, Described

FAMILIES = ("step", "dense", "single")
NECK = [f"{part}.{layer}.{kind}" for part in ("mlp", "mlp2") for layer in (0, 2) for kind in ("weight", "bias")]


class Identity(Encoder):
    """Its input is its last map."""

    stages, reductions = ("map",), {"map": (1, 1, 1)}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dim = channels
        self.spec = InputSpec(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4))


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "densecl"


def cases(golden: Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    paths = sorted(golden.glob("*.npz"))
    assert paths
    assert [path.name for path in paths if not path.name.startswith(FAMILIES)] == []
    return [(path.name, dict(np.load(path))) for path in paths]


def close(found: Tensor | None, expected: np.ndarray, what: str) -> None:
    assert found is not None, what
    found = found.detach().reshape(expected.shape)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9, err_msg=what)


def model_of(data: dict[str, np.ndarray], chunk_mb: int = 64) -> DenseCL:
    hidden, channels = data["q_mlp.0.weight"].shape
    config = Config(
        hidden_dim=hidden,
        out_dim=len(data["queue0"]),
        queue_size=int(data["queue_len"]),
        key_momentum=float(data["momentum"]),
        temperature=float(data["temperature"]),
        dense_share=float(data["loss_lambda"]),
        chunk_mb=chunk_mb,
    )
    model = DenseCL(config, Identity(channels)).double()
    state = model.state_dict()
    for tower, letter in (("query", "q"), ("key", "k")):
        for name in NECK:
            tensor = state[f"{tower}.neck.{name}"]
            tensor.copy_(torch.tensor(data[f"{letter}_{name}"]).view_as(tensor))
    model.queue.keys.copy_(torch.tensor(data["queue0"]))
    model.queue2.keys.copy_(torch.tensor(data["queue2_0"]))
    return model


def test_steps(golden: Path) -> None:
    for name, data in cases(golden):
        model = model_of(data)
        size = data["feat_q"].shape[-2:]
        for step, (feat_q, feat_k) in enumerate(zip(data["feat_q"], data["feat_k"], strict=True)):
            x_q, x_k = (torch.tensor(feat)[:, :, None].requires_grad_() for feat in (feat_q, feat_k))
            found = model.contrast(x_q, x_k, torch.arange(len(x_q)).flip(0))  # a shuffle changes nothing here
            model.zero_grad()
            loss = found.loss_one + found.loss_dense
            loss.backward()
            where = f"{name} step {step}"
            close(loss, data[f"loss_{step}"], f"{where} loss")
            close(found.loss_one, data[f"loss_single_{step}"], f"{where} global loss")
            close(found.loss_dense, data[f"loss_dense_{step}"], f"{where} dense loss")
            close(x_q.grad, data[f"grad_feat_q_{step}"], f"{where} gradient of the map")
            assert x_k.grad is None
            for key in NECK:
                close(model.get_parameter(f"query.neck.{key}").grad, data[f"grad_q_{key}_{step}"], f"{where} {key}")
                close(model.get_parameter(f"key.neck.{key}"), data[f"k_{key}_after_{step}"], f"{where} key {key}")
            assert found.match.tolist() == data[f"match_idx_{step}"].tolist()
            assert found.match.shape[1] == size[0] * size[1]
            _views(found.query, found.key, data, step, where)
            close(model.queue.keys, data[f"queue_after_{step}"], f"{where} queue")
            close(model.queue2.keys, data[f"queue2_after_{step}"], f"{where} dense queue")
            assert int(model.queue.position) == int(model.queue2.position) == int(data[f"ptr_{step}"])
            model.after_step(step, len(data["feat_q"]))


def _views(query: Described, key: Described, data: dict[str, np.ndarray], step: int, where: str) -> None:
    close(query.one, data[f"q_{step}"], f"{where} q")
    close(key.one, data[f"k_{step}"], f"{where} k")
    close(query.places.transpose(1, 2), data[f"q_grid_{step}"], f"{where} q_grid")
    close(key.places.transpose(1, 2), data[f"k_grid_{step}"], f"{where} k_grid")
    close(key.mean, data[f"k2_{step}"], f"{where} k2")
