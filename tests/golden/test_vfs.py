"""Golden numbers of VFS: losses, head, frames, crops, and the form with negatives.

What concerns evaluation (propagation, poses, the tracking probe) is claimed by the tests of the evaluators.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.ema import follow
from clipmill.models.heads import mlp
from clipmill.models.losses import unit
from clipmill.models.methods.vfs import agreement_loss, disagreement, pair_losses, shift_losses
from clipmill.models.queue import KeyQueue
from clipmill.pipeline import spec
from clipmill.pipeline.frame_views import segment_frames, segment_length
from clipmill.pipeline.spec import RandomResizedCrop

FAMILIES = ("cosine_loss", "head", "intra_video", "frame_sampling", "crop_bbox", "moco_negatives")
ELSEWHERE = ("propagation_attention", "propagation_video", "jhmdb_pose", "siamfc")
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "vfs"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    paths = sorted(golden.glob(f"{name}_*.npz"))
    assert paths, f"no {name}_*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def tensors(data: dict[str, np.ndarray], names: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(data[name], dtype=dtype, requires_grad=True) for name in names]


def close(found: Tensor | None, expected: np.ndarray, what: str = "") -> None:
    assert found is not None, what
    rtol, atol = (1e-9, 1e-12) if found.dtype == torch.float64 else (1e-4, 1e-5)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol, err_msg=what)


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    names = [path.name for path in golden.glob("*.npz")]
    assert [name for name in names if not name.startswith(tuple(f"{one}_" for one in FAMILIES + ELSEWHERE))] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_two_views(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "cosine_loss"):
        p1, z1, p2, z2 = tensors(data, ("p1", "z1", "p2", "z2"), dtype)
        close(disagreement(p1, z2), data["loss_p1_z2"])
        close(disagreement(p1, z2) / 2 - 1, data["negcos_p1_z2"])
        loss = agreement_loss(p1, z1, p2, z2)
        loss.backward()
        close(loss, data["loss"])
        close(p1.grad, data["g.p1"])
        close(p2.grad, data["g.p2"])
        assert z1.grad is None
        assert z2.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_of_all_pairs_of_frames(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "intra_video"):
        p1, z1, p2, z2 = tensors(data, ("p1", "z1", "p2", "z2"), dtype)
        assert len(p1) == int(data["hp.B"]) * int(data["hp.T"])
        losses = shift_losses(p1, z1, p2, z2, int(data["hp.T"]))
        losses.sum().backward()
        close(losses, data["loss_per_shift"])
        close(losses.sum(), data["loss"])
        close(p1.grad, data["g.p1"])
        close(p2.grad, data["g.p2"])


def named(projector: nn.Sequential, predictor: nn.Sequential) -> dict[str, nn.Module]:
    """Layers by their names in the files."""
    layers: dict[str, nn.Module] = {}
    for prefix, head in (("proj", projector), ("pred", predictor)):
        for kind, name in ((nn.Linear, "fc"), (nn.BatchNorm1d, "bn")):
            found = [layer for layer in head if isinstance(layer, kind)]
            layers |= {f"{prefix}.{name}{number}": layer for number, layer in enumerate(found, 1)}
    return layers


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "head"):
        widths = [data["p.proj.fc1.weight"].shape[1], *(len(data[f"p.proj.fc{i}.bias"]) for i in (1, 2, 3))]
        projector = mlp(widths, norm="affine", last_norm="affine").to(dtype)
        hidden = len(data["p.pred.fc1.bias"])
        predictor = mlp([widths[-1], hidden, widths[-1]], norm="affine").to(dtype)
        layers = named(projector, predictor)
        params = {f"{layer}.{name}": p for layer, part in layers.items() for name, p in part.named_parameters()}
        assert {f"p.{name}" for name in params} == {name for name in data if name.startswith("p.")}
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(torch.tensor(data[f"p.{name}"]))
        x1, x2 = tensors(data, ("x1", "x2"), dtype)
        z1 = projector(x1.mean((2, 3)))
        p1 = predictor(z1)
        z2 = projector(x2.mean((2, 3)))
        p2 = predictor(z2)
        for name, found in (("z1", z1), ("p1", p1), ("z2", z2), ("p2", p2)):
            close(found, data[name], name)
        loss = agreement_loss(p1, z1, p2, z2)
        loss.backward()
        close(loss, data["loss"])
        close(x1.grad, data["g.x1"], "x1")
        close(x2.grad, data["g.x2"], "x2")
        for name, param in params.items():
            close(param.grad, data[f"g.{name}"], name)
        statistics = {name: array for name, array in data.items() if name.startswith("after.")}
        assert statistics
        for name, array in statistics.items():
            layer, _, buffer = name.removeprefix("after.").rpartition(".")
            close(getattr(layers[layer], buffer), array, name)


def test_frames(golden: Path) -> None:
    for data in family(golden, "frame_sampling"):
        segments = int(data["hp.num_clips"])
        for row, num_frames in enumerate(data["total_frames"].tolist()):
            room = segment_length(num_frames, segments)
            assert room == data["avg_interval"][row]
            assert (room == 0) == (data["branch"][row] == 1)
            offsets = [offset for offset in data["draws"][row].tolist() if offset >= 0]
            assert segment_frames(num_frames, segments, offsets) == tuple(data["inds"][row].tolist())


def test_crops(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in family(golden, "crop_bbox"):
        area, aspect = data["hp.area_range"], np.log(data["hp.aspect_range"])
        height, width = data["img_hw"].T
        left, top, right, bottom = data["bbox_ltrb"].T
        share = (data["area_fraction"] - area[0]) / (area[1] - area[0])
        shape = (data["log_aspect"] - aspect[0]) / (aspect[1] - aspect[0])
        room_x, room_y = width - (right - left) + 1, height - (bottom - top) + 1
        x, y = (data["x_offset"] + 0.5) / room_x, (data["y_offset"] + 0.5) / room_y
        unit_draws = np.concatenate([share, shape, x[:, None], y[:, None]], 1)
        monkeypatch.setattr(spec, "uniforms", lambda keys, count, draws=unit_draws: draws)
        crop = RandomResizedCrop(
            scale=(area[0], area[1]), ratio=tuple(data["hp.aspect_range"].tolist()), fallback="square"
        )
        boxes = crop.boxes(np.zeros(len(height), np.uint64), height, width)
        np.testing.assert_array_equal(boxes.clamp, data["bbox_ltrb"])
        assert (data["used"] == -1).any() or len(height) < 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_negatives(golden: Path, dtype: torch.dtype) -> None:
    for data in family(golden, "moco_negatives"):
        frames, temperature = int(data["hp.T"]), float(data["hp.temperature"])
        queue = KeyQueue(data["queue"].shape[1], len(data["queue"])).to(dtype)
        queue.keys.copy_(torch.tensor(data["queue"].T))
        queue.position.fill_(int(data["hp.ptr"]))
        for name, gradient in (("loss_all_pairs", "g_all.q"), ("loss_same_index", "g_same.q")):
            q, k = tensors(data, ("q", "k"), dtype)
            losses = pair_losses(unit(q), unit(k), queue.keys, temperature, frames)
            close(losses, data["loss_per_pair"])
            assert losses.shape[0] == int(data["hp.B"])
            loss = losses.mean() if name == "loss_all_pairs" else losses.diagonal(dim1=1, dim2=2).mean()
            loss.backward()
            close(loss, data[name], name)
            close(q.grad, data[gradient], gradient)
            assert k.grad is None
        queue.push(unit(torch.tensor(data["k"], dtype=dtype)))
        close(queue.keys.T, data["queue_after"], "queue")
        assert int(queue.position) == int(data["ptr_after"])
        student, teacher = nn.ParameterList([torch.tensor(data["ema.query"], dtype=dtype)]), nn.ParameterList()
        teacher.append(nn.Parameter(torch.tensor(data["ema.key"], dtype=dtype)))
        follow(teacher, student, float(data["hp.momentum"]))
        close(teacher[0], data["ema.key_after"], "ema")
