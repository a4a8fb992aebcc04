"""JHMDB: a layout made here, broken ones, and the real clip where it is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from clipmill.datasets import jhmdb
from clipmill.datasets.source import CorpusError


def add(root: Path, name: str, frames: int = 3) -> np.ndarray:
    folder = root / "Rename_Images" / name
    folder.mkdir(parents=True)
    for t in range(frames):
        (folder / f"{t + 1:05d}.png").touch()
    (folder / ".AppleDouble").mkdir()
    positions = np.random.default_rng(len(name)).uniform(1, 200, (2, 15, frames))
    (root / "joint_positions" / name).mkdir(parents=True)
    savemat(root / "joint_positions" / name / "joint_positions.mat", {"pos_img": positions, "scale": np.ones(3)})
    return positions


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("wave/w1", "catch/c2", "catch/c 1"):
        add(tmp_path, name)
    return tmp_path


def test_clips_of_a_split(root: Path) -> None:
    assert [clip.name for clip in jhmdb.read(root)] == ["catch/c 1", "catch/c2", "wave/w1"]
    (root / "splits").mkdir()
    (root / "splits" / "catch_test_split1.txt").write_text("c 1.avi 2\nc2.avi 1\n")
    (root / "splits" / "wave_test_split1.txt").write_text("w1.avi 2 \n")
    (root / "splits" / "wave_test_split2.txt").write_text("w1.avi 1\n")
    assert [clip.name for clip in jhmdb.read(root)] == ["catch/c 1", "wave/w1"]
    clips = jhmdb.read(root, clips=["catch/c2"])
    assert [path.name for path in clips[0].frames] == ["00001.png", "00002.png", "00003.png"]


def test_positions_are_as_stored(tmp_path: Path) -> None:
    positions = add(tmp_path, "a/b", 5)
    (clip,) = jhmdb.read(tmp_path)
    np.testing.assert_array_equal(jhmdb.joint_positions(clip.joints), positions)
    assert len(jhmdb.JOINTS) == 15
    assert {joint for bone in jhmdb.BONES for joint in bone} == set(range(15))


def test_what_is_missing_or_broken_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"joint_positions: no such folder; give the folder that holds it as the JHMDB"
    ):
        jhmdb.read(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"catch.c9: no such folder"):
        jhmdb.read(root, clips=["catch/c9"])
    path = root / "joint_positions" / "wave" / "w1" / "joint_positions.mat"
    for arrays, message in (
        ({"pos_img": np.zeros((2, 14, 3))}, r"pos_img has shape \(2, 14, 3\), not \(2, 15, frames\)"),
        ({"pos_img": np.full((2, 15, 3), np.nan)}, "pos_img has numbers that are not finite"),
        ({"pos_world": np.zeros((2, 15, 3))}, "no MATLAB 5 file with pos_img"),
    ):
        savemat(path, arrays)
        with pytest.raises(CorpusError, match=message):
            jhmdb.joint_positions(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorpusError, match="no MATLAB 5 file with pos_img"):
        jhmdb.joint_positions(path)
    path.unlink()
    with pytest.raises(CorpusError, match=r"joint_positions\.mat: no such file"):
        jhmdb.joint_positions(path)
    (root / "splits").mkdir()
    (root / "splits" / "wave_test_split1.txt").write_text("w1.avi\n")
    with pytest.raises(CorpusError, match=r"row 1: 'w1\.avi' is not `CLIP\.avi 1\|2`"):
        jhmdb.read(root)


def test_the_real_clip(test_data: Path) -> None:
    root = test_data / "data" / "jhmdb"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    (clip,) = jhmdb.read(root)
    positions = jhmdb.joint_positions(clip.joints)
    assert clip.name.startswith("catch/")
    assert len(clip.frames) == positions.shape[2] == 40
    assert (positions > 0).mean() > 0.99
    assert positions[0].max() < 330
