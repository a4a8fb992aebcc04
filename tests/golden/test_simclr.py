"""Golden numbers of SimCLR: loss, projection head, LARS, schedule and picture operators (google-research/simclr)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clipmill.models.heads import simclr_head
from clipmill.models.losses import accuracy, entropy, nt_xent
from clipmill.pipeline import augment
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.optim import Lars, peak_lr, schedule
from clipmill.pipeline.spec import CutCenter, VideoSpec

FAMILIES = ("ntxent", "proj_head", "lars", "lr", "image_ops")
ADAPTED = ("conv", "dense", "zero")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "simclr"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    paths = sorted(path for path in golden.glob(f"{name}*.npz") if _family_of(path) == name)
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def _family_of(path: Path) -> str:
    return max((name for name in FAMILIES if path.name.startswith(name)), key=len, default="")


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not _family_of(path)] == []


def test_loss_of_a_whole_batch(golden: Path) -> None:
    cases = [data for data in family(golden, "ntxent") if data["hidden"].ndim == 2]
    assert cases
    for data in cases:
        hidden = torch.tensor(data["hidden"], requires_grad=True)
        z1, z2 = hidden.chunk(2)
        options = {"temperature": float(data["temperature"]), "hidden_norm": bool(data["hidden_norm"])}
        loss, logits = nt_xent(z1, z2, reduction="reference", **options)
        loss.backward()
        close(loss, data["loss"], 1e-5)
        close(nt_xent(z1, z2, reduction="paper", **options)[0], data["loss_paper"], 1e-5)
        close(logits, data["logits_ab"], 3e-6)
        close(hidden.grad, data["grad_hidden"], 1e-5)
        target = torch.arange(len(z1))
        assert np.array_equal(data["labels"], np.eye(2 * len(z1))[: len(z1)])
        close(accuracy(logits, target), data["contrast_acc"], 1e-6)
        close(entropy(logits), data["contrast_entropy"], 1e-5)


def test_loss_of_a_batch_in_shards(golden: Path) -> None:
    cases = [data for data in family(golden, "ntxent") if data["hidden"].ndim == 3]
    assert cases
    for data in cases:
        hidden = torch.tensor(data["hidden"], requires_grad=True)  # (R, 2n, d)
        n = hidden.shape[1] // 2
        columns = (hidden[:, :n].flatten(0, 1), hidden[:, n:].flatten(0, 1))
        results = [
            nt_xent(own[:n], own[n:], float(data["temperature"]), columns=columns, offset=r * n, reduction="reference")
            for r, own in enumerate(hidden)
        ]
        losses = torch.stack([loss for loss, _ in results])
        losses.mean().backward()
        close(losses, data["loss_per_replica"], 1e-5)
        close(losses.mean(), data["loss_global"], 1e-5)
        close(torch.stack([logits for _, logits in results]), data["logits_ab"], 3e-6)
        close(hidden.grad, data["grad_hidden"], 1e-5)
        close(hidden.grad, data["grad_hidden_single_device"], 1e-5)
        columns_of = np.argmax(data["labels"], 2)
        assert np.array_equal(columns_of, np.arange(columns_of.size).reshape(columns_of.shape))


def test_projection_head(golden: Path) -> None:
    for data in family(golden, "proj_head"):
        layers = int(data["num_layers"])
        head = simclr_head(data["x"].shape[1], data[f"w{layers - 1}"].shape[1], layers)
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
        with torch.no_grad():
            for i, (kernel, norm) in enumerate(zip(linear, norms, strict=True)):
                norm.eps, norm.momentum = float(data["bn_eps"]), 1 - float(data["bn_decay"])
                kernel.weight.copy_(torch.tensor(data[f"w{i}"].T))
                norm.weight.copy_(torch.tensor(data[f"gamma{i}"]))
                assert (norm.bias is None) == (f"beta{i}" not in data)
                if norm.bias is not None:
                    norm.bias.copy_(torch.tensor(data[f"beta{i}"]))
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.copy_(torch.tensor(data[f"rm{i}"]))
                norm.running_var.copy_(torch.tensor(data[f"rv{i}"]))
        x = torch.tensor(data["x"], requires_grad=True)
        close(head.eval()(x), data["out_eval"], 5e-6)
        y = head.train()(x)
        close(y, data["out_train"], 5e-6)
        loss, _ = nt_xent(*y.chunk(2), 0.1, reduction="reference")
        loss.backward()
        close(loss, data["loss_t01"], 1e-5)
        close(x.grad, data["grad_x"], 5e-5)
        for i, norm in enumerate(norms):
            close(norm.running_mean, data[f"rm{i}_after"], 1e-6)
            # The reference averages the population variance, PyTorch n / (n - 1) times as much.
            kept = float(data["bn_decay"]) * data[f"rv{i}"]
            assert norm.running_var is not None
            population = (norm.running_var.numpy() - kept) * (len(x) - 1) / len(x)
            close(torch.from_numpy(kept + population), data[f"rv{i}_after"], 1e-6)


def test_lars(golden: Path) -> None:
    for data in family(golden, "lars"):
        names = [name.removeprefix("param_") for name in data if name.startswith("param_")]
        params = {name: nn.Parameter(torch.tensor(data[f"param_{name}"])) for name in names}
        decay = float(data["weight_decay"])
        groups = [
            {"params": [params[name]], "adapt": name in ADAPTED, "weight_decay": decay if name in ADAPTED else 0.0}
            for name in names
        ]
        lars = Lars(
            groups,
            lr=float(data["lr"]),
            momentum=float(data["momentum"]),
            trust=float(data["eeta"]),
            nesterov=bool(data["nesterov"]),
            classic=bool(data["classic_momentum"]),
        )
        for step in range(len(data[f"grads_{names[0]}"])):
            for name in names:
                params[name].grad = torch.tensor(data[f"grads_{name}"][step])
            lars.step()
            for name in names:
                close(params[name], data[f"traj_{name}"][step], 3e-7)
                close(lars.state[params[name]]["momentum_buffer"], data[f"mom_{name}"][step], 3e-7)


def test_learning_rates(golden: Path) -> None:
    for data in family(golden, "lr"):
        batch, examples = int(data["batch_size"]), int(data["num_examples"])
        total = examples * int(data["epochs"]) // batch + 1
        warmup = round(float(data["warmup_epochs"]) * examples // batch)
        assert (total, warmup) == (int(data["total_steps"]), int(data["warmup_steps"]))
        scaling = "sqrt" if data["sqrt_scaling"] else "linear"
        peak = peak_lr(TrainConfig(lr=float(data["base_lr"]), lr_scaling=scaling, batch_size=batch))
        rates = [peak * schedule(step, "cosine", total=total, warmup=warmup) for step in data["steps"].tolist()]
        np.testing.assert_allclose(rates, data["lr"], rtol=0, atol=1e-6 * peak)


def test_picture_operators(golden: Path) -> None:
    for data in family(golden, "image_ops"):
        x = picture(data["image"])
        taps = 2 * (int(data["kernel_size_arg"]) // 2) + 1
        sigma = torch.tensor([float(data["sigma"])])
        close(flat(augment.gaussian_blur(x, sigma, taps, "zero")), data["blur"], 2e-6)
        for name, operator in (
            ("brightness", augment.brightness_scale),
            ("contrast", augment.contrast_channel_mean),
            ("saturation", augment.saturation_hsv),
            ("hue", augment.hue_shift),
        ):
            close(flat(operator(x, torch.tensor(float(data[f"f_{name}"])))), data[name], 2e-6)
        close(flat(augment.luma(x).expand_as(x)), data["gray"], 2e-6)


def test_evaluation_crop(golden: Path) -> None:
    for data in family(golden, "image_ops"):
        (rows, columns), image = data["eval_size"].tolist(), data["image"].astype(np.float64)
        height, width = image.shape[:2]
        if columns / rows > width / height:  # crop in the shape of the output, 0.875 of the side that limits it
            cut = (0.875 * width * rows / columns, 0.875 * width)
        else:
            cut = (0.875 * height, 0.875 * height * columns / rows)
        h, w = (int(np.rint(side)) for side in cut)
        top, left = (height - h + 1) // 2, (width - w + 1) // 2
        if rows == columns:
            box = CutCenter().boxes(np.zeros(1, np.uint64), np.array([height]), np.array([width])).box
            assert box.tolist() == [[left, top, w, h]]
        spec = VideoSpec(size=rows, interpolation="bicubic", antialias=False)
        down = augment.resize_matrix(rows, 0, h, 0, h, h, spec)
        across = augment.resize_matrix(columns, 0, w, 0, w, w, spec)
        small = np.einsum("yh,hwc,xw->yxc", down, image[top : top + h, left : left + w], across)
        np.testing.assert_allclose(np.clip(small, 0, 1), data["eval_crop"], rtol=0, atol=3e-4)


def close(found: torch.Tensor | None, expected: np.ndarray, atol: float) -> None:
    assert found is not None
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=atol)


def picture(image_HWC: np.ndarray) -> torch.Tensor:
    """(1, 1, 3, H, W), as the operators take it."""
    return torch.tensor(image_HWC).permute(2, 0, 1)[None, None]


def flat(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `picture`."""
    return x[0, 0].permute(1, 2, 0)
