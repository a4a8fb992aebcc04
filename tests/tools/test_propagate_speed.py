"""Processor time and memory of one step at 480p against the whole affinity, in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = """
import json, re, sys, time, torch
import torch.nn.functional as F
from pathlib import Path
from clipmill.models.encoder import build_encoder
from clipmill.tools import propagate as module
from clipmill.tools.evaluate.presets import DAVIS
from clipmill.tools.evaluate.propagation import read_out
from clipmill.tools.propagate import attend, memory_bytes

torch.set_num_threads(int(sys.argv[1]))
torch.set_grad_enabled(False)
rule, height, width, channels, count = DAVIS["vfs"].rule, 60, 107, 256, 4
cells, slots = height * width, rule.context + 1

def resident(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def measured(work, again=1):
    Path("/proc/self/clear_refs").write_text("5")
    before, best = resident("VmRSS"), float("inf")
    for _ in range(again):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return result, best, resident("VmHWM") - before

generator = torch.Generator().manual_seed(0)
def near(x, by):  # what a video's features are like: those of the frame before, and something new
    return F.normalize(x + by * torch.randn(x.shape, generator=generator), dim=-1)
bank = torch.empty(slots, height, width, channels)
bank[0] = near(torch.zeros(height, width, channels), 1)
for s in range(1, slots):
    bank[s] = near(bank[s - 1], 0.02)
target = near(bank[-1], 0.02)
labels = torch.rand(slots, height, width, count, generator=generator)

def dense():
    affinity = target.view(cells, channels) @ bank.view(-1, channels).T
    y, x = torch.arange(cells) // width, torch.arange(cells) % width
    far = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 >= rule.radius**2
    affinity.view(cells, slots, cells).masked_fill_(far[:, None], -torch.inf)
    value, place = affinity.topk(rule.topk, 1)
    weight = (value / rule.tau).softmax(1)
    return torch.einsum("nk,nkc->nc", weight, labels.view(-1, count)[place]).view(height, width, count)

def windowed():
    return attend(target, bank, labels, list(range(slots)), rule)

attend(target[:8, :8], bank[:1, :8, :8], labels[:1, :8, :8], [0], rule)  # compile
rows = {}
found, rows["windows_s"], rows["windows_bytes"] = measured(windowed, 3)
module._compiled = lambda *_: False
tiles, rows["tiles_s"], rows["tiles_bytes"] = measured(windowed, 2)
expected, rows["dense_s"], rows["dense_bytes"] = measured(dense)
rows["difference"] = max(float((found - expected).abs().max()), float((tiles - expected).abs().max()))
encoder = build_encoder("resnet18").eval()
picture = torch.rand(1, 3, 1, 480, 854)
_, rows["features_s"], _ = measured(lambda: encoder.maps(picture, "res4", strides=(1, 2, 1, 1)), 2)
soft, ids = found.movedim(-1, 0), torch.arange(count, dtype=torch.uint8).numpy()
_, rows["labels_s"], _ = measured(lambda: read_out(soft, ids, (480, 854), (480, 854), "flat_loses"), 3)
stated = memory_bytes(height, width, channels, count, rule)
rows["stated_step_bytes"] = stated["step"]
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_windows_against_the_whole_affinity() -> None:
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", COMPARE, "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=exact)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for name, value in rows.items():
        print(f"{name:18} {value / 2**20:10.1f} MiB" if name.endswith("bytes") else f"{name:18} {value:10.4g}")
    assert rows["difference"] < 1e-5
    assert rows["dense_s"] > 5 * rows["windows_s"]
    assert rows["dense_bytes"] > 10 * rows["windows_bytes"]
    assert rows["dense_bytes"] > 10 * rows["stated_step_bytes"]
