"""The CPU kernel against the torch reference, its threads, its memory and its cache."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clipmill.pipeline.jit as jit
from clipmill.pipeline.kernels import bytes_moved, render, steps_of
from clipmill.pipeline.kernels_cpu import augment_cpu
from clipmill.pipeline.kernels_steps import END, MEAN, MIRROR, ROW, SLOT, SMOOTH, STOP, WIDTH, lower, room
from clipmill.pipeline.simd import larger, load8, load16, smaller, store, transpose8, where, whole
from clipmill.pipeline.spec import (
    Blur,
    CenterCrop,
    CutCenter,
    Cutout,
    DistortedBox,
    Flip,
    Gray,
    Jitter,
    Normalize,
    RandomResizedCrop,
    ResizedRandomCrop,
    VideoSpec,
    WholeFrame,
    eval_spec,
    hcl,
    moco_v1,
    moco_v2,
    simclr,
)

TOLERANCE = 2e-5  # of values in [0, 1]; a level of 8 bits is 4e-3
STRONG = Jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, p=0.9)


def strong(maths):
    return Jitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, p=0.9, maths=maths)


SPECS = {
    "nothing": VideoSpec(size=32, ops=()),
    "all": VideoSpec(size=40, ops=(Gray(p=0.3), STRONG, Blur(p=0.7), Flip(), Normalize())),
    "all per frame": VideoSpec(size=40, ops=(Gray(p=0.3), STRONG, Blur(p=0.7), Flip(), Normalize()), per_frame=True),
    "enlarge": VideoSpec(size=150, crop=RandomResizedCrop(scale=(0.05, 0.3))),
    "shrink": VideoSpec(size=9, ops=(Flip(),)),
    "odd size": VideoSpec(size=33, ops=(STRONG, Blur(p=1), Normalize())),
    "one block": VideoSpec(size=16, crop=WholeFrame(), ops=(STRONG,)),
    "tiny regions": VideoSpec(size=24, crop=RandomResizedCrop(scale=(0.0005, 0.004), ratio=(0.2, 5))),
    "bicubic": VideoSpec(size=30, ops=(), interpolation="bicubic", antialias=False),
    "bicubic filtered": VideoSpec(size=30, ops=(), interpolation="bicubic"),
    "unfiltered": VideoSpec(size=30, ops=(), antialias=False),
    "centre": eval_spec(48),
    "scale jitter": VideoSpec(size=40, crop=ResizedRandomCrop(size=40, resize=(48, 80))),
    "not upscaled": VideoSpec(size=56, crop=CenterCrop(size=56, resize=72), ops=(Flip(p=1),)),
    "moco v1": moco_v1(32),
    "moco v2": moco_v2(32, per_frame=True),
    "simclr": simclr(32),
    "simclr maths": VideoSpec(size=32, ops=(strong("simclr"), Normalize())),
    "simclr v1 maths": VideoSpec(size=32, ops=(strong("simclr_v1"), Normalize())),
    "simclr's crop": VideoSpec(size=32, crop=DistortedBox(), interpolation="bicubic", antialias=False),
    "simclr's test crop": VideoSpec(size=32, crop=CutCenter(), interpolation="bicubic", antialias=False),
    "hcl": hcl(32),
    "kornia maths": VideoSpec(size=32, ops=(strong("kornia"), Gray(), Normalize()), per_frame=True),
    "blur of rows": VideoSpec(size=32, ops=(Blur(p=0.7, kernel=9, border="zero", vertical_only=True),)),
    "blur with a black border": VideoSpec(size=32, ops=(Blur(p=1, sigma=(2, 4), border="zero"), Flip())),
    "cutout": VideoSpec(size=32, ops=(Flip(), Normalize(), Cutout())),
    "cutout per frame": VideoSpec(size=32, ops=(Flip(), Cutout(), Normalize()), per_frame=True),
    "flip after cutout": VideoSpec(size=31, ops=(Flip(), Cutout(), Flip(), Normalize())),
    "two of each": VideoSpec(size=32, ops=(STRONG, Blur(), Cutout(), strong("simclr"), Blur(), Cutout(), Flip())),
    "normalised first": VideoSpec(size=32, ops=(Normalize(), Jitter(brightness=0, contrast=0, saturation=0, hue=0))),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_equals_the_reference(name, packed_clips):
    clips = packed_clips(SPECS[name], batch=6)
    out = render(torch.from_numpy(clips.payload), clips.items, clips.spec, clips.params)
    expected = clips.reference()
    assert out.shape == expected.shape == (6, 3, 2, clips.spec.size, clips.spec.size)
    assert (out - expected).abs().max() < TOLERANCE / min(Normalize().std)


OPS = st.lists(
    st.one_of(
        st.builds(Flip),
        st.builds(Gray),
        st.builds(Jitter, hue=st.sampled_from([0, 0.2]), maths=st.sampled_from(["torchvision", "simclr", "kornia"])),
        st.builds(Blur, kernel=st.sampled_from([0, 5]), border=st.sampled_from(["reflect", "zero"])),
        st.builds(Cutout, max_side=st.integers(1, 30)),
    ),
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(OPS, st.integers(8, 40), st.booleans(), st.integers(0, 1000))
def test_any_operators_in_any_order(packed_clips, ops, size, per_frame, seed):
    clips = packed_clips(VideoSpec(size=size, ops=tuple(ops), per_frame=per_frame), batch=2, size=(40, 48), seed=seed)
    out = render(torch.from_numpy(clips.payload), clips.items, clips.spec, clips.params)
    assert (out - clips.reference()).abs().max() < TOLERANCE


def test_threads_change_nothing(packed_clips):
    clips = packed_clips(moco_v2(24), batch=11)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(render(torch.from_numpy(clips.payload), clips.items, clips.spec, clips.params))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_clip_does_not_depend_on_its_batch(packed_clips):
    clips = packed_clips(moco_v2(24), batch=5)
    together = render(torch.from_numpy(clips.payload), clips.items, clips.spec, clips.params)
    alone = [{name: values[3:4] for name, values in drawn.items()} for drawn in clips.params]
    assert torch.equal(together[3:4], render(torch.from_numpy(clips.payload), clips.items[3:4], clips.spec, alone))


def test_memory_in_use_is_never_given_out_again(packed_clips):
    """Results are made in memory of earlier ones that nobody holds, and only in that."""
    clips = packed_clips(VideoSpec(size=32), batch=4)
    payload = torch.from_numpy(clips.payload)
    first = render(payload, clips.items, clips.spec, clips.params)
    kept, view, plain = first.clone(), first[2:, :, 0], first.numpy()
    addresses = {first.data_ptr()}
    del first
    for held in (view, plain):  # a part of the memory is all of it
        other = render(255 - payload, clips.items, clips.spec, clips.params)
        assert other.data_ptr() not in addresses
        assert not torch.equal(other, kept)
        del other, held
    assert torch.equal(view, kept[2:, :, 0])
    assert np.array_equal(plain, kept.numpy())
    address = plain.ctypes.data
    del view, plain
    assert render(payload, clips.items, clips.spec, clips.params).data_ptr() == address


def test_several_threads_may_render_at_once(packed_clips):
    clips = packed_clips(VideoSpec(size=24), batch=3)
    expected, wrong = clips.reference(), []

    def work():
        for _ in range(40):
            out = render(torch.from_numpy(clips.payload), clips.items, clips.spec, clips.params)
            if (out - expected).abs().max() > 1e-3:
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_half_precision_is_the_rounded_result(packed_clips):
    clips = packed_clips(VideoSpec(size=24))
    payload = torch.from_numpy(clips.payload)
    whole_precision = render(payload, clips.items, clips.spec, clips.params)
    half = render(payload, clips.items, clips.spec, clips.params, dtype=torch.bfloat16)
    assert torch.equal(half, whole_precision.bfloat16())


def test_bytes_that_must_be_moved(packed_clips):
    clips = packed_clips(VideoSpec(size=24), batch=3, frames=2)
    assert bytes_moved(clips.items, clips.spec) == len(clips.payload) + 3 * 2 * 3 * 24 * 24 * 4
    half = bytes_moved(clips.items, clips.spec, torch.bfloat16)
    assert half == len(clips.payload) + 3 * 2 * 3 * 24 * 24 * 2


# --- operators as steps -------------------------------------------------------------------------------------


def test_heads_and_steps(packed_clips):
    spec = VideoSpec(size=32, ops=(Flip(), Jitter(hue=0), Blur(), Normalize()))
    clips = packed_clips(spec, batch=40)
    steps = steps_of(clips.items, spec, clips.params, torch.device("cpu"))
    assert steps.shape == (40, room(spec.ops), WIDTH) == (40, 7, WIDTH)
    flip, jitter, blur, _ = clips.params
    assert np.array_equal(steps[:, 0, MIRROR], flip["apply"])
    assert np.array_equal(steps[:, 0, MEAN] > 0, jitter["apply"])
    assert np.array_equal(steps[:, 0, SMOOTH] > 0, blur["apply"])
    assert np.array_equal(steps[:, 0, STOP], 2 + 3 * jitter["apply"] + blur["apply"])  # a hue of 0 is left out
    for row, stop in enumerate(steps[:, 0, STOP].astype(int)):
        assert (steps[row, 1:stop, 0] != END).all()
        assert (steps[row, stop:, 0] == END).all()
    blurred = np.flatnonzero(blur["apply"])
    assert np.array_equal(steps[: len(blurred), 0, ROW], blurred)
    assert np.array_equal(steps[blurred, 0, SLOT], np.arange(len(blurred)))


def test_a_blur_larger_than_the_picture_is_one_clear_error():
    ops = (Blur(kernel=23),)
    with pytest.raises(ValueError, match="a blur of 23 taps needs pictures of more than 11 pixels: 11"):
        lower(ops, [{"apply": np.ones(1, bool), "sigma": np.ones(1)}], 1, 11)


# --- vectors ------------------------------------------------------------------------------------------------


@numba.njit
def _vector_maths(a, b, out):
    x, y = load8(a, 1), load8(b, 0)
    store(out, 0, x + y)
    store(out, 8, x - 2 * y)
    store(out, 16, 0.5 * x / y)
    store(out, 24, smaller(x, y))
    store(out, 32, larger(x, 0.0))
    store(out, 40, where(x > y, x, 7))
    store(out, 48, where(x == y, 1.0, y))
    store(out, 56, where(x >= 0.0, whole(x), whole(-1.0 * x)))


def test_vectors_compute_what_numpy_computes():
    rng = np.random.default_rng(0)
    a, b, out = rng.normal(size=9).astype("f4") * 3, rng.normal(size=8).astype("f4"), np.zeros(64, "f4")
    a[3] = b[2]
    _vector_maths(a, b, out)
    x = a[1:]
    expected = [x + b, x - 2 * b, 0.5 * x / b, np.minimum(x, b), np.maximum(x, 0), np.where(x > b, x, 7)]
    expected += [np.where(x == b, 1, b), np.where(x >= 0, np.floor(x), np.floor(-x))]
    assert np.allclose(out.reshape(8, 8), expected, rtol=1e-6)


@numba.njit
def _turn(pixels, turned, wide):
    v = transpose8((
        load8(pixels, 0), load8(pixels, 8), load8(pixels, 16), load8(pixels, 24),
        load8(pixels, 32), load8(pixels, 40), load8(pixels, 48), load8(pixels, 56),
    ))  # fmt: skip
    for k, column in enumerate(v):
        store(turned, 8 * k, column)
    store(wide, 0, load16(pixels, 3))


def test_bytes_are_widened_and_turned():
    pixels, turned, wide = (
        np.random.default_rng(1).integers(0, 256, 64, np.uint8),
        np.zeros(64, "f4"),
        np.zeros(16, "f4"),
    )
    _turn(pixels, turned, wide)
    assert np.array_equal(turned.reshape(8, 8), pixels.reshape(8, 8).T)
    assert np.array_equal(wide, pixels[3:19])


# --- the cache of machine code ------------------------------------------------------------------------------


@pytest.fixture
def cache_folder():
    """`cache_folder`, as if asked for the first time."""
    function = jit.cache_folder
    function.cache_clear()
    yield function
    function.cache_clear()


def test_machine_code_goes_where_it_can_be_written(cache_folder, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    for source in ("simd.py", "kernels_cpu.py"):
        shutil.copy(Path(jit.__file__).parent / source, package)
    monkeypatch.setattr(jit, "__file__", str(package / "jit.py"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = cache_folder()
    assert first is not None
    assert first.parent == package / "__pycache__"

    (package / "simd.py").write_text("# changed")  # functions that it is compiled into are outdated with it
    cache_folder.cache_clear()
    changed = cache_folder()
    assert changed is not None
    assert changed.name != first.name

    shutil.rmtree(package / "__pycache__")
    (package / "__pycache__").write_text("no folder can be made here")
    cache_folder.cache_clear()
    assert cache_folder() == tmp_path / "home/clipmill" / changed.name

    (tmp_path / "other").write_text("nor here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    cache_folder.cache_clear()
    assert cache_folder() is None

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "named"))
    cache_folder.cache_clear()
    assert cache_folder() == tmp_path / "named" / changed.name


_PROBE = """
import sys
import numpy as np
from clipmill.pipeline.jit import compiled
from clipmill.pipeline.kernels_cpu_resize import filters

line = lambda kind: np.zeros(64, kind)
filters(0.0, 8.0, 0, 8, 8, 1, True, False, line(np.int64), line("f4"), line(np.int64), line("f4"))
stats = filters.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_another_process_finds_the_machine_code(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    seen = [
        subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert seen == [["0", "1"], ["1", "0"]]


def test_without_any_cache_it_still_compiles(monkeypatch):
    monkeypatch.setattr(jit, "cache_folder", lambda: None)
    assert jit.compiled(lambda x: x + 1)(1) == 2


def test_steps_may_come_from_a_larger_table(packed_clips):
    """Unused steps at the end, as in a slot, do nothing."""
    clips = packed_clips(SPECS["all"])
    steps = steps_of(clips.items, clips.spec, clips.params, torch.device("cpu"))
    larger_table = np.zeros((len(steps), steps.shape[1] + 3, WIDTH), np.float32)
    larger_table[:, : steps.shape[1]] = steps
    expected = augment_cpu(clips.payload, clips.items, clips.spec, steps).clone()
    assert torch.equal(augment_cpu(clips.payload, clips.items, clips.spec, larger_table), expected)
