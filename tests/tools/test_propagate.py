from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.tools import propagate as module
from clipmill.tools.evaluate.presets import DAVIS
from clipmill.tools.propagate import Rule, Seconds, attend, half_widths, memory_bytes, propagate, source_frames

RULES = {
    **{name: replace(preset.rule, context=3, radius=3) for name, preset in DAVIS.items() if name != "vfs_r50"},
    "free first": Rule(context=2, topk=4, radius=2, free_first=True),
    "one cell": Rule(context=1, topk=1, radius=1),
    "more than there are": Rule(context=2, topk=40, radius=2, first="once"),
    "no window": Rule(context=3, topk=6, window="none", first="pad"),
    "frame by frame": Rule(context=3, topk=3, radius=4, joint=False, first="once"),
    "not renormalised": Rule(context=2, topk=3, radius=3, renormalise=False),
    "square that repeats": Rule(context=4, topk=5, window="square", radius=2, ties="keep"),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def video(frames: int = 6, channels: int = 7, size: tuple[int, int] = (9, 11), seed: int = 0) -> Tensor:
    return torch.randn(frames, channels, *size, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 3, size: tuple[int, int] = (9, 11), seed: int = 1) -> Tensor:
    ids = torch.randint(count, size, generator=torch.Generator().manual_seed(seed))
    return F.one_hot(ids, count).movedim(-1, 0).float()


@pytest.fixture(params=["compiled", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(module, "_compiled", lambda *_: False)
    return request.param


def dense(features: Tensor, first: Tensor, rule: Rule) -> np.ndarray:
    """The textbook: the whole affinity of every source frame, masked, sorted, in float64."""
    x = features.double().numpy()
    if rule.unit:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    frames, channels, height, width = x.shape
    x = x.reshape(frames, channels, -1)
    y, column = np.divmod(np.arange(height * width), width)
    dy, dx = y[:, None] - y, column[:, None] - column
    inside = {
        "disc": dy**2 + dx**2 < rule.radius**2,
        "square": np.maximum(abs(dy), abs(dx)) <= rule.radius,
        "none": np.ones_like(dy, bool),
    }[rule.window]
    soft = [first.double().numpy().reshape(len(first), -1)]
    for t in range(1, frames):
        earlier = list(range(max(0, t - rule.context), t))
        padding = [0] * (rule.context - len(earlier)) if rule.first == "pad" else []
        if rule.first == "once":
            earlier = [s for s in earlier if s]
        sources = [0, *padding, *earlier]
        scores = []
        for number, s in enumerate(sources):
            score = x[s].T @ x[t]  # source cells by target cells
            if rule.mutual:
                score = score * (score / (score.max(0) + 1e-5)) * (score / (score.max(1, keepdims=True) + 1e-5))
            score = score * rule.tau if rule.multiply else score / rule.tau
            scores.append(score if rule.free_first and number == 0 else np.where(inside, score, -np.inf))
        groups = [list(range(len(sources)))] if rule.joint else [[n] for n in range(len(sources))]
        parts = []
        for group in groups:
            score = np.concatenate([scores[n] for n in group])
            value = np.concatenate([soft[sources[n]].T for n in group])
            order = np.argsort(-score, axis=0, kind="stable")[: rule.topk]
            kept = np.zeros_like(score, bool)
            np.put_along_axis(kept, order, True, 0)
            if rule.ties == "keep":
                kept = score >= np.take_along_axis(score, order[-1:], 0)
            power = np.exp(score - score.max(0))
            norm = (power * kept if rule.renormalise else power).sum(0)
            parts.append(value.T @ (power * kept / norm))
        soft.append(np.mean(parts, 0))
    return np.stack(soft[1:]).reshape(frames - 1, len(first), height, width)


def run(features: Tensor, first: Tensor, rule: Rule, **options: object) -> Tensor:
    return torch.stack(list(propagate(features, first, rule, **options)))  # type: ignore[arg-type]


# --- what is computed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_masked_dense_product(name: str, way: str) -> None:
    found = run(video(), labels(), RULES[name])
    np.testing.assert_allclose(found.numpy(), dense(video(), labels(), RULES[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 4), (5, 2), (3, 6), (20, 5), (17, 19), (1, 1)])
@pytest.mark.parametrize("name", ["vfs", "crw", "dino"])
def test_grids_of_all_sizes(name: str, size: tuple[int, int], way: str) -> None:
    features, first = video(4, 5, size), labels(2, size)
    found = run(features, first, RULES[name])
    np.testing.assert_allclose(found.numpy(), dense(features, first, RULES[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RULES)
def test_double_precision(name: str) -> None:
    found = run(video().double(), labels().double(), RULES[name])
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), dense(video(), labels(), RULES[name]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["dino", "uvc"])
def test_cells_that_are_equally_good_all_count(name: str, way: str) -> None:
    rule = replace(RULES[name], topk=2)
    words = torch.tensor([[1.0, 0, 2], [0, 1, 1], [1, 1, 0]])  # three kinds of cells
    kinds = torch.randint(3, (4, 9, 11), generator=torch.Generator().manual_seed(3))
    features = words[kinds].movedim(-1, 1)
    exact = dense(features, labels(), rule)
    np.testing.assert_allclose(run(features, labels(), rule).numpy(), exact, atol=1e-5, rtol=0)
    cut = run(features, labels(), replace(rule, ties="cut")).numpy()
    assert abs(cut - exact).max() > 0.1


def test_a_flat_picture_spreads_its_labels_evenly(way: str) -> None:
    rule = Rule(context=1, topk=2, window="square", radius=1, first="once", ties="keep")
    first = labels()
    (soft,) = run(torch.ones(2, 4, 9, 11), first, rule)
    counts = F.avg_pool2d(torch.ones(1, 1, 9, 11), 3, 1, 1, count_include_pad=True)
    expected = F.avg_pool2d(first[None], 3, 1, 1, count_include_pad=True) / counts
    torch.testing.assert_close(soft, expected[0], atol=1e-6, rtol=0)


def test_tiles_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_compiled", lambda *_: False)
    whole = {}
    for side in (1, 3, 8, 64):
        monkeypatch.setattr(module, "TILE", {"cpu": side})
        for name, rule in RULES.items():
            found = run(video(), labels(), rule)
            torch.testing.assert_close(found, whole.setdefault(name, found), atol=1e-6, rtol=0)


def test_threads_do_not_matter() -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(video(size=(13, 10)), labels(size=(13, 10)), RULES["vfs"]))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# --- invariants ---------------------------------------------------------------------------------------------


def test_identical_frames_keep_the_first_labels(way: str) -> None:
    features = video(1).expand(5, -1, -1, -1)
    for name in ("vfs", "crw", "dino"):
        soft = run(features, labels(), replace(RULES[name], topk=1))
        torch.testing.assert_close(soft, labels().expand(4, -1, -1, -1), atol=1e-6, rtol=0)


def test_labels_of_a_cell_sum_to_one(way: str) -> None:
    for name in ("vfs", "crw", "dino", "frame by frame"):
        total = run(video(), labels(), RULES[name]).sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    assert (run(video(), labels(), RULES["not renormalised"]).sum(1) < 0.999).any()


def test_relabelling_objects_commutes(way: str) -> None:
    order = [2, 0, 1]
    found = run(video(), labels()[order], RULES["vfs"])
    assert torch.equal(found, run(video(), labels(), RULES["vfs"])[:, order])


def test_the_length_of_a_feature_does_not_matter(way: str) -> None:
    scale = torch.rand(6, 1, 9, 11, generator=torch.Generator().manual_seed(5)) + 0.5
    found = run(video() * scale, labels(), RULES["vfs"])
    torch.testing.assert_close(found, run(video(), labels(), RULES["vfs"]), atol=2e-5, rtol=0)


def test_repeated_first_frames_count_as_often_as_they_are_there(way: str) -> None:
    bank, value = video(2).movedim(1, -1).contiguous(), torch.stack([labels(), labels(seed=2)]).movedim(1, -1)
    target = video(1, seed=9)[0].movedim(0, -1).contiguous()
    rule = Rule(topk=5, radius=4)
    one_by_one = torch.stack([bank[0], bank[0], bank[0], bank[1]]), torch.stack([value[0]] * 3 + [value[1]])
    expected = attend(target, one_by_one[0], one_by_one[1].contiguous(), [0, 1, 2, 3], rule)
    found = attend(target, bank, value.contiguous(), [0, 0, 0, 1], rule)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# --- which frames, which cells ------------------------------------------------------------------------------


def test_source_frames() -> None:
    rule = Rule(context=3)
    assert source_frames(1, rule) == [0, 0]
    assert source_frames(5, rule) == [0, 2, 3, 4]
    assert source_frames(1, replace(rule, first="pad")) == [0, 0, 0, 0]
    assert source_frames(5, replace(rule, first="pad")) == [0, 2, 3, 4]
    assert source_frames(1, replace(rule, first="once")) == [0]
    assert source_frames(3, replace(rule, first="once")) == [0, 1, 2]


@pytest.mark.parametrize(("radius", "cells"), [(12, 437), (18, 1005)])
def test_a_disc_holds_as_many_cells_as_published(radius: int, cells: int) -> None:
    assert sum(2 * half + 1 for half in half_widths(Rule(radius=radius), 60, 107) if half >= 0) == cells


def test_a_square_includes_its_radius() -> None:
    rule = Rule(window="square", radius=12)
    assert sum(2 * half + 1 for half in half_widths(rule, 60, 107) if half >= 0) == 625


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"radius": -2}, "radius must be at least 1, got -2"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": float("nan")}, "tau must be positive, got nan"),
        ({"mutual": True}, "mutual matching is defined between whole frames"),
    ],
)
def test_rules_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**options)


def test_a_grid_that_changes_is_an_error() -> None:
    frames = [video(1)[0], video(1, size=(9, 12))[0]]
    with pytest.raises(ValueError, match=r"features of frame 1 are \(9, 12\) cells, labels \(9, 11\)"):
        list(propagate(frames, labels(), RULES["vfs"]))


# --- cost ---------------------------------------------------------------------------------------------------


def test_features_are_asked_for_one_at_a_time() -> None:
    asked = []

    def source() -> Iterator[Tensor]:
        for t, frame in enumerate(video(50)):
            asked.append(t)
            yield frame

    found = propagate(source(), labels(), RULES["vfs"])
    assert len(list(islice(found, 3))) == 3
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_little(dtype: torch.dtype, way: str) -> None:
    full = run(video(), labels(), RULES["vfs"])
    half = run(video(), labels(), RULES["vfs"], store=dtype)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half.argmax(1) == full.argmax(1)).float().mean() > 0.9
    rounded = F.normalize(video(), dim=1).to(dtype).float()
    expected = run(rounded, labels(), replace(RULES["vfs"], unit=False))
    torch.testing.assert_close(half, expected, atol=2e-6, rtol=0)


def test_stages_are_timed() -> None:
    seconds = Seconds()
    run(video(), labels(), RULES["vfs"], seconds=seconds)
    assert min(seconds.features, seconds.affinity, seconds.labels) > 0


MEASURE = """
import re, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from clipmill.tools import propagate as module
from clipmill.tools.propagate import Rule, memory_bytes, propagate
tiles, store, height, width, channels, count = sys.argv[1] == "tiles", sys.argv[2] == "half", 60, 107, 256, 4
if tiles:
    module._compiled, module.TILE = lambda *_: False, {}  # as on a GPU
rule = Rule(context=2, radius=6)
def resident(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
def run(number, height, width):
    first = torch.rand(count, height, width)
    frames = (torch.randn(channels, height, width) for _ in range(number))
    for soft in propagate(frames, first, rule, store=torch.bfloat16 if store else None):
        assert soft.shape == first.shape
run(3, 20, 20)  # what libraries allocate once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
run(4, height, width)
device = "cuda" if tiles else "cpu"
stated = memory_bytes(height, width, channels, count, rule, store_bytes=2 if store else 4, device=device)
print(resident("VmHWM") - before, stated["features"] + stated["labels"] + stated["step"], stated["affinity"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize(("code", "store"), [("compiled", "full"), ("tiles", "full"), ("compiled", "half")])
def test_memory_stays_below_what_is_stated(code: str, store: str) -> None:
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-c", MEASURE, code, store]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=exact)
    used, stated, affinity = (int(number) for number in done.stdout.split())
    print(f"{code}, {store}: used {used >> 20} MiB, stated {stated >> 20}, the whole affinity {affinity >> 20}")
    assert stated / 4 < used < stated + (2 << 20)
    assert stated < affinity / 7


def test_stated_memory_by_resolution() -> None:
    rule = Rule()
    small, large = (memory_bytes(h, w, 256, 3, rule) for h, w in ((60, 107), (135, 240)))
    assert small["features"] == 21 * 6420 * 256 * 4
    assert small["labels"] == 21 * 6420 * 3 * 4
    assert memory_bytes(60, 107, 256, 3, rule, store_bytes=2)["features"] == small["features"] // 2
    assert large["step"] < 6 * small["step"]  # linear in cells,
    assert large["affinity"] > 25 * small["affinity"]  # not quadratic


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_a_gpu_agrees_with_the_cpu(name: str) -> None:
    found = run(video().cuda(), labels().cuda(), RULES[name]).cpu()
    torch.testing.assert_close(found, run(video(), labels(), RULES[name]), atol=1e-5, rtol=0)
