"""The GPU kernels under Triton's interpreter, against the torch reference."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.pipeline.kernels import steps_of
from clipmill.pipeline.spec import (
    Blur,
    CenterCrop,
    Cutout,
    Flip,
    Gray,
    Jitter,
    Normalize,
    RandomResizedCrop,
    VideoSpec,
    WholeFrame,
    simclr,
)

pytest.importorskip("triton")
from clipmill.pipeline.kernels_triton import fused

STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.5, "p": 0.8}
EVERYTHING = (Gray(p=0.3), Jitter(**STRONG), Blur(p=0.7), Flip(), Normalize())
SPECS = {  # of small pictures: the interpreter is slow
    "all": VideoSpec(size=8, ops=EVERYTHING),
    "all per frame": VideoSpec(size=9, ops=EVERYTHING, per_frame=True),
    "two tiles across": VideoSpec(size=130, crop=WholeFrame(), ops=(Flip(p=1),)),
    "shrink": VideoSpec(size=7, ops=(Flip(), Normalize())),
    "tiny regions": VideoSpec(size=12, crop=RandomResizedCrop(scale=(0.002, 0.01), ratio=(0.2, 5))),
    "bicubic": VideoSpec(size=8, crop=CenterCrop(size=8, resize=9), ops=(), interpolation="bicubic"),
    "simclr": simclr(20),
    "kornia maths": VideoSpec(size=8, ops=(Jitter(**STRONG, maths="kornia"), Jitter(**STRONG), Normalize())),
    "blur of rows": VideoSpec(size=8, ops=(Blur(p=0.5, kernel=7, border="zero", vertical_only=True), Gray(p=0.5))),
    "half precision": VideoSpec(size=8),
}
SIZES = {  # clips, frames, size of a frame
    "all": (3, 2, (36, 48)),
    "all per frame": (2, 2, (36, 48)),
    "two tiles across": (1, 1, (24, 40)),
    "shrink": (1, 2, (64, 80)),
    "tiny regions": (3, 1, (36, 48)),
    "simclr": (2, 1, (36, 48)),
    "blur of rows": (3, 1, (16, 24)),
}


@pytest.fixture(scope="module")
def results(packed_clips, tmp_path_factory):
    """{name: (result, expected)} of all cases, made in one process that interprets the kernels."""
    folder = tmp_path_factory.mktemp("interpreted")
    arrays, cases, expected = {}, {}, {}
    for name, spec in SPECS.items():
        batch, frames, size = SIZES.get(name, (2, 1, (24, 32)))
        clips = packed_clips(spec, batch=batch, frames=frames, size=size)
        assert fused(spec.ops) == len(spec.ops)
        steps = steps_of(clips.items, spec, clips.params, torch.device("cpu"))
        arrays |= {f"{name}/payload": clips.payload, f"{name}/steps": steps}
        arrays[f"{name}/items"] = clips.items.view(np.uint8).reshape(batch, frames, -1)
        blur = next((op for op in spec.ops if isinstance(op, Blur)), None)
        cases[name] = {
            "spec": {key: getattr(spec, key) for key in ("size", "per_frame", "interpolation", "antialias")},
            "blur": blur and {key: getattr(blur, key) for key in ("sigma", "kernel", "border", "vertical_only")},
            "dtype": "bfloat16" if name == "half precision" else "float32",
        }
        expected[name] = clips.reference().numpy()
    np.savez(folder / "in.npz", cases=json.dumps(cases), **arrays)
    script = Path(__file__).parent / "interpret_kernels.py"
    command = [sys.executable, str(script), str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as out:
        return {name: (out[name], expected[name]) for name in SPECS}


@pytest.mark.parametrize("name", SPECS)
def test_the_kernels_equal_the_reference(name, results):
    out, expected = results[name]
    assert out.shape == expected.shape
    tolerance = 0.02 if name == "half precision" else 2e-5 / min(Normalize().std)
    assert np.abs(out - expected).max() < tolerance


def test_what_the_kernels_leave_to_the_reference():
    jitter, blur = Jitter(), Blur()
    assert fused((Flip(), jitter, Gray(), blur, Normalize())) == 5
    assert fused((Flip(), Normalize(), Cutout())) == 2
    assert fused((jitter, blur, blur)) == 2
    assert fused((jitter, Jitter(maths="kornia"), Gray(), jitter)) == 3
    assert fused((blur, jitter)) == 1
    assert fused((blur, Jitter(maths="kornia"))) == 2
