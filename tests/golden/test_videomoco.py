"""Golden numbers of MoCo's steps, and of VideoMoCo's schedule, clip table and evaluation (official repositories).

VideoMoCo's second stage is in test_videomoco_second_stage.py. Run as a script, this file is one of the processes that
replay a case of several: ``test_videomoco.py FILE``.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.ema import follow
from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.methods.moco import Config, MoCo
from clipmill.pipeline import dist
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.optim import schedule, schedule_of
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.views import Uniform, View, random_start
from clipmill.tools import metrics

FAMILIES = ("moco_steps", "lr_schedule", "clip_sampling", "clip_eval")
# In test_videomoco_second_stage.py.
SECOND_STAGE = ("decay_queue", "frame_drop", "generator", "adversarial_steps", "gpu_augment")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "videomoco"


def family(golden: Path, name: str) -> list[Path]:
    assert name in FAMILIES
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return paths


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    known = (*FAMILIES, *SECOND_STAGE)
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(known)] == []


# --- MoCo ---------------------------------------------------------------------------------------------------


class TinyTrunk(Encoder):
    """The cases' network below its head: convolution 3x3 of stride 2, normalisation, ReLU, global average."""

    stages, spec = ("res2",), InputSpec()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim = width
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return F.relu(self.bn(self.conv(x[:, :, 0])))[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "res2").mean((2, 3, 4))


def moco_of(data: dict[str, np.ndarray], groups: int = 1) -> MoCo:
    dim, size = data["queue_init"].shape
    config = Config(
        num_frames=1,
        mlp=bool(data["mlp"]),
        out_dim=dim,
        queue_size=size,
        key_momentum=float(data["momentum_key"]),
        temperature=float(data["temperature"]),
        groups=groups,
    )
    moco = MoCo(config, TinyTrunk(len(data["init.encoder_q.conv.weight"]))).double()
    state = moco.state_dict()
    names = {name: official(name, config.mlp) for name in state if name.startswith(("query", "key"))}
    stored = {name.removeprefix("init.") for name in data if name.startswith("init.")}
    assert {name for name in names.values() if "num_batches" not in name} == stored
    for name, stored_name in names.items():
        if "num_batches" not in name:
            state[name].copy_(torch.tensor(data[f"init.{stored_name}"]))
    moco.queue.keys.copy_(torch.tensor(data["queue_init"]))
    return moco


def official(name: str, mlp: bool) -> str:
    """The official name of one of our tensors: query.1.0.weight is encoder_q.fc.weight, or .fc.0.weight with MLP."""
    tower, part, rest = name.split(".", 2)
    tower = {"query": "encoder_q", "key": "encoder_k"}[tower]
    if part == "0":
        return f"{tower}.{rest}"
    return f"{tower}.fc.{rest}" if mlp else f"{tower}.fc.{rest.removeprefix('0.')}"


def replay(path: Path, groups: int = 1) -> None:
    """Run the steps of a case in this process's share of them and compare every stored number.

    groups: ranks of the case that this process plays; its running statistics then see all of them and are left out.
    """
    data = dict(np.load(path))
    world = dist.world()
    assert world * groups == int(data["world_size"])
    ranks = slice(dist.rank() * groups, (dist.rank() + 1) * groups)
    moco = moco_of(data, groups)
    mlp = bool(data["mlp"])
    params = [param for param in moco.parameters() if param.requires_grad]
    sgd = torch.optim.SGD(
        params, float(data["lr"]), float(data["momentum_sgd"]), weight_decay=float(data["weight_decay"])
    )
    rows = len(data["im_q"][0]) // world
    mine = slice(dist.rank() * rows, (dist.rank() + 1) * rows)
    for step in range(len(data["perms"])):
        x_q, x_k = (torch.tensor(data[name][step][mine] / 255.0)[:, :, None] for name in ("im_q", "im_k"))
        loss, logits = moco.contrast(x_q, x_k, torch.tensor(data["perms"][step]))
        sgd.zero_grad()
        loss.backward()
        dist.average_gradients(params)
        close(logits, np.concatenate(data["logits"][step, ranks]), f"logits of step {step}")
        close(loss, data["loss"][step, ranks].mean(), f"loss of step {step}")
        close(moco.queue.keys, data["queue_after"][step], f"queue after step {step}")
        assert int(moco.queue.position) == int(data["ptr_after"][step])
        if step == 0:
            for name, param in moco.named_parameters():
                if param.requires_grad:
                    close(param.grad, data[f"grad0.{official(name, mlp)}"], f"gradient of {name}")
        sgd.step()
        moco.after_step(step, len(data["perms"]))
    for name, tensor in moco.state_dict().items():
        if name.startswith(("query", "key")) and "num_batches" not in name:
            expected = data[f"final.{official(name, mlp)}"]
            if "running" not in name:
                close(tensor, expected, f"final {name}")
            elif groups == 1:
                close(tensor, expected[dist.rank()], f"final {name}")


def close(found: Tensor | None, expected: np.ndarray, what: str) -> None:
    assert found is not None
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-10, err_msg=what)


def test_moco_steps(golden: Path, run_ranks) -> None:
    for path in family(golden, "moco_steps"):
        world = int(np.load(path)["world_size"])
        if world == 1:
            replay(path)
        else:
            run_ranks(__file__, world, path)
            replay(path, groups=world)  # one process that plays all of them


def test_groups_must_divide_the_batch() -> None:
    moco = MoCo(Config(num_frames=1, out_dim=4, queue_size=8, groups=3), TinyTrunk(6))
    x = torch.zeros(4, 3, 1, 8, 8)
    with pytest.raises(ValueError, match="4 samples per process cannot be cut into 3 groups"):
        moco.contrast(x, x, None)


def test_the_key_network_follows_once_per_optimiser_step() -> None:
    torch.manual_seed(0)
    moco = MoCo(Config(num_frames=1, out_dim=4, queue_size=8, key_momentum=0.5), TinyTrunk(6))
    with torch.no_grad():
        moco.query[0].conv.weight.add_(1.0)
    expected = MoCo(moco.config, TinyTrunk(6))
    expected.load_state_dict(moco.state_dict())
    follow(expected.key, expected.query, 0.5)
    x = torch.randn(4, 3, 1, 8, 8)
    for _ in range(2):  # two parts of one accumulated batch
        moco.contrast(x, x, torch.arange(4))
    assert torch.equal(moco.key[0].conv.weight, expected.key[0].conv.weight)
    moco.after_step(0, 10)
    moco.contrast(x, x, torch.arange(4))
    assert not torch.equal(moco.key[0].conv.weight, expected.key[0].conv.weight)


# --- schedule, clips, evaluation ----------------------------------------------------------------------------


def test_learning_rates(golden: Path) -> None:
    for data in map(np.load, family(golden, "lr_schedule")):
        epochs, milestones = int(data["epochs"]), tuple(data["schedule"].tolist())
        options = {"schedule_per": "epoch", "epochs": epochs, "gamma": float(data["lr_decay"])}
        start = float(data["warmup_lr"] / data["base_lr"])
        warm = {"warmup_epochs": milestones[0], "lr_start": start, "milestones": milestones[1:]}
        for name, config in (
            ("lr_step", TrainConfig(schedule="step", milestones=milestones, **options)),
            ("lr_cos", TrainConfig(schedule="cosine", **options)),
            ("lr_warmup", TrainConfig(schedule="step", **warm, **options)),
        ):
            rates = [float(data["base_lr"]) * schedule_of(config, epoch * 7 + 3, 7) for epoch in range(epochs)]
            np.testing.assert_allclose(rates, data[name], rtol=1e-10, err_msg=name)
        assert schedule(0, "cosine", total=epochs) == 1.0


def test_clip_table(golden: Path) -> None:
    for data in map(np.load, family(golden, "clip_sampling")):
        length, stride = int(data["frames_per_clip"]), int(data["step_between_clips"])
        windows = np.maximum((data["num_frames"] - length) // stride + 1, 0)
        np.testing.assert_array_equal(windows, data["clips_per_video"])
        starts = [np.arange(count) * stride for count in windows]
        np.testing.assert_array_equal(np.concatenate(starts), data["clip_start"])
        assert int(data["random_count"]) == np.count_nonzero(windows)
        view, one = View(name="clip", num_frames=length), View(name="clip")
        first = np.cumsum(windows) - windows
        count, number = int(data["uniform_num"]), 0
        for video, have in enumerate(windows.tolist()):
            if not have:
                continue
            # A window is a frame of a film of all windows: evenly spread frames are evenly spread windows.
            (span,) = Uniform(views=(one,), clips=count)(_record(have), Draws(0), 0).spans
            rows = slice(number, number + count)
            picked = data["uniform_start"][rows] // stride
            # Where i * (windows - 1) / (count - 1) is whole, the official single-precision arithmetic may end below it.
            below = np.array(span.frames) - picked
            whole = np.arange(count) * (have - 1) % (count - 1) == 0
            assert set(below[~whole].tolist()) <= {0}
            assert set(below[whole].tolist()) <= {0, 1}
            np.testing.assert_array_equal(first[video] + picked, data["uniform_clip_index"][rows])
            np.testing.assert_array_equal(picked * stride, data["uniform_start"][rows])
            assert set(data["uniform_video"][rows].tolist()) == {video}
            if stride == 1:
                record = _record(int(data["num_frames"][video]))
                (clips,) = Uniform(views=(view,), clips=count)(record, Draws(0), 0).spans
                assert clips.frames[::length] == span.frames
                drawn = {random_start(view, record, Draws(seed)) for seed in range(40 * have if have < 30 else 0)}
                assert not drawn or drawn == set(range(have))
            number += count
        assert number == len(data["uniform_start"])


def _record(num_frames: int) -> VideoRecord:
    return cast(VideoRecord, SimpleNamespace(num_frames=num_frames, fps=Fraction(25)))


def test_accuracy_of_averaged_clips(golden: Path) -> None:
    for data in map(np.load, family(golden, "clip_eval")):
        label = data["label"]
        clips = data["clip_logits"].reshape(len(label), int(data["clips_per_video"]), -1).astype(np.float64)
        scores = metrics.average_views(clips, "score")
        np.testing.assert_allclose(scores, data["video_logits"], rtol=1e-6, atol=1e-6)
        loss = F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(label))
        np.testing.assert_allclose(loss.item(), data["loss"], rtol=1e-6)
        for k in (1, 5):
            np.testing.assert_allclose(100 * metrics.topk_accuracy(scores, label, k), data[f"acc{k}"], rtol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.setup("cpu")
    replay(Path(sys.argv[1]))
    dist.teardown()
