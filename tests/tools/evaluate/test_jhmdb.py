from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from clipmill.datasets.jhmdb import JOINTS, read
from clipmill.models.encoder import Encoder, InputSpec
from clipmill.tools import cli
from clipmill.tools.evaluate.jhmdb import Config, evaluate, track
from clipmill.tools.evaluate.presets import JHMDB
from clipmill.tools.evaluate.propagation import Maps, Overrides

HEIGHT, WIDTH, FRAMES = 48, 64, 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Dots(Encoder):
    """Tells colours from each other at a stride of 4 pixels: random waves of the colour of every fourth pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.stages = 64, ("dots",)
        self.spec = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.register_buffer("waves", torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) * 25)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        angle = torch.einsum("dc,bcthw->bdthw", self.get_buffer("waves"), x[..., 2::4, 2::4])
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "dots").mean((2, 3, 4))


def write(root: Path, name: str = "wave/w1", speed: int = 4, extra: int = 0, seed: int = 0) -> np.ndarray:
    """A texture of 4-pixel squares that moves to the right with 15 joints on it; (2, 15, T) counted from 1."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4 + FRAMES * speed // 4 + extra, 3)).astype(np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    (root / "Rename_Images" / name).mkdir(parents=True)
    for t in range(FRAMES + extra):
        left = (FRAMES + extra - 1 - t) * speed
        Image.fromarray(texture[:, left : left + WIDTH]).save(root / "Rename_Images" / name / f"{t + 1:05d}.png")
    cells = rng.choice(4 * 8, 15, replace=False)  # away from the left, where what comes in may look like anything
    first = np.stack([4 * (cells % 4 + 7) + 2, 4 * (cells // 4 + 2) + 2])
    positions = np.stack([first + np.array([[speed * t], [0]]) for t in range(FRAMES)], -1) + 1.0
    (root / "joint_positions" / name).mkdir(parents=True)
    savemat(root / "joint_positions" / name / "joint_positions.mat", {"pos_img": positions})
    return positions


def config(preset: str = "crw", **options: object) -> Config:
    size = 48 if preset == "vfs" else 64
    overrides = Overrides(size=size, topk=1, colour="rgb")
    return Config(preset=preset, overrides=overrides, maps=Maps(device="cpu"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("speed", [0, 4])
def test_joints_on_a_moving_texture_are_followed(tmp_path: Path, speed: int) -> None:
    positions = write(tmp_path, speed=speed)
    protocol = config().protocol.protocol
    rule = replace(protocol.rule, free_first=False)  # what comes in may not look like anything far away
    pose = replace(JHMDB["crw"], protocol=replace(protocol, rule=rule, resize="native"))
    (clip,) = read(tmp_path)
    found = np.stack(list(track(Dots(), clip, positions[..., 0] - 1, FRAMES, pose, Maps(device="cpu"))), -1)
    assert found.shape == (2, 15, FRAMES)
    assert abs(found - (positions - 1)).max() <= 2  # half a cell


def test_scores_tables_and_pictures(tmp_path: Path) -> None:
    write(tmp_path, extra=2)
    write(tmp_path, "catch/c1", seed=1)
    report = evaluate(Dots(), tmp_path, tmp_path / "out", config(videos=True))
    assert list(report.metrics)[:5] == ["PCK@0.1", "PCK@0.2", "PCK@0.3", "PCK@0.4", "PCK@0.5"]
    shares = [report.metrics[f"PCK@0.{n}"] for n in range(1, 6)]
    assert shares == sorted(shares)
    assert report.metrics["PCK@0.2"] > 0.5
    assert report.metrics["PCK@0.1-crw"] == report.metrics["PCK@0.1"]
    assert report.metrics["PCK@0.1-vfs"] >= report.metrics["PCK@0.1"]
    assert [(row["clip"], row["frames"]) for row in report.rows] == [("catch/c1", FRAMES), ("wave/w1", FRAMES)]
    joints = list(csv.DictReader((tmp_path / "out" / "joints.csv").read_text().splitlines()))
    assert [row["joint"] for row in joints] == list(JOINTS)
    assert np.mean([float(row["PCK@0.1"]) for row in joints]) == pytest.approx(report.metrics["PCK@0.1"])
    for name in report.artefacts:
        assert (tmp_path / "out" / name).is_file(), name
    with av.open(tmp_path / "out" / "videos" / "wave-w1.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert report.settings["protocol"]["sigma"] == 0.5
    assert json.loads(report.to_json())["settings"]["clips"] == 2


@pytest.mark.parametrize("preset", ["crw", "uvc", "vfs"])
def test_every_preset_runs_and_a_static_clip_keeps_its_joints(tmp_path: Path, preset: str) -> None:
    write(tmp_path, speed=0)
    report = evaluate(Dots(), tmp_path, tmp_path / "out", config(preset))
    assert report.metrics["PCK@0.5"] > 0.9


def test_the_joints_of_vfs_count_with_frame_0(tmp_path: Path) -> None:
    write(tmp_path)
    savemat(
        tmp_path / "joint_positions" / "wave" / "w1" / "joint_positions.mat",
        {"pos_img": np.random.default_rng(0).uniform(10, 40, (2, 15, 1))},
    )
    report = evaluate(Dots(), tmp_path, tmp_path / "out", config("vfs"))
    assert report.metrics["PCK@0.2"] == 1
    assert "PCK@0.2-crw" not in report.metrics
    with pytest.raises(ValueError, match="no joint counts in any frame"):
        evaluate(Dots(), tmp_path, tmp_path / "out", config("crw"))


def test_broken_frames_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "Rename_Images" / "wave" / "w1" / "00004.png"
    Image.new("RGB", (50, 48)).save(path)
    with pytest.raises(ValueError, match=r"00004\.png: 50x48 pixels, but the sequence's labels have 64x48"):
        evaluate(Dots(), tmp_path, tmp_path / "out", config())
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00004\.png: damaged"):
        evaluate(Dots(), tmp_path, tmp_path / "out", config())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    command = ["evaluate", "jhmdb", "baseline:lab", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--size", "64", "--device", "cpu"]) == 0
    assert "PCK@0.1" in capsys.readouterr().out


def test_the_real_clip(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "data" / "jhmdb"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    from clipmill.tools.evaluate.baselines import LabPatches

    report = evaluate(LabPatches(), root, tmp_path, Config(maps=Maps(device="cpu")))
    assert report.rows[0]["frames"] == 40
    assert 0.2 < report.metrics["PCK@0.1"] < report.metrics["PCK@0.2"] < 0.9
