"""Runs under torchrun that lose processes and go on with fewer or more: the samples and their order stay the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.method import Method, Output
from clipmill.pipeline import checkpoint, dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.log import read_log
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.ring import LoaderConfig
from clipmill.pipeline.spec import VideoSpec
from clipmill.pipeline.train import train
from clipmill.pipeline.views import Clips, View

STEPS = 16


class Linear(Encoder):
    """One matrix on the frame's pixels."""

    dim, stages, spec = 4, ("res2",), InputSpec(size=16)

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(3 * 16 * 16, 4)

    def maps(self, x: torch.Tensor, stage: str) -> torch.Tensor:
        return self.forward(x)[:, :, None, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix(x[:, :, 0].flatten(1) / 255)


class Watched(Method):
    """Tells which records every step saw, and dies when it is told to.

    deaths: {step: (rank, signal)}; the step has been done, its checkpoint has not been written.
    """

    Config = dict

    def __init__(self, seen: Path, deaths: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        self.trunk = Linear()
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self._seen, self._deaths = seen, deaths

    @property
    def encoder(self) -> Encoder:
        return self.trunk

    def plan(self) -> Clips:
        return Clips(views=(View(name="frame", num_frames=1, augment=VideoSpec(size=16)),))

    def forward(self, batch: ClipBatch) -> Output:
        path = self._seen / f"{os.getpid()}.jsonl"
        row = {"step": int(self.done), "world": dist.world(), "rank": dist.rank(), "index": batch.index.tolist()}
        with path.open("a") as file:
            print(json.dumps(row), file=file)
        return Output(self.trunk(batch.video["frame"]).square().mean())

    def after_step(self, step: int, num_steps: int) -> None:
        self.done += 1
        rank, number = self._deaths.get(step + 1, (-1, 0))
        if rank == dist.rank():
            os.kill(os.getpid(), number)


def run(index: ShardIndex, folder: Path, deaths: dict[int, tuple[int, int]]) -> int:
    """Begin or continue the run in ``folder``; returns the step it ended at."""
    torch.manual_seed(0)
    seen = folder / "seen"
    seen.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        epochs=8, batch_size=12, lr=0.1, log_every=1, checkpoint_every=2, tensorboard=False, device="cpu"
    )
    loader = LoaderConfig(threads=1, processes=0)
    method = Watched(seen, deaths)
    return train(method, index, config, folder / "run", loader=loader, resume=True, verbose=False).step


def order(folder: Path) -> dict[int, list[int]]:
    """The records of every global batch, by step; what was done twice must have been the same."""
    parts: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(dict)
    for path in (folder / "seen").iterdir():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            before = parts[row["step"], row["world"]].setdefault(row["rank"], row["index"])
            assert before == row["index"]
    found: dict[int, list[int]] = {}
    for (step, world), by_rank in parts.items():
        if len(by_rank) == world:  # else a process was killed before the others came so far
            whole = [number for rank in range(world) for number in by_rank[rank]]
            assert found.setdefault(step, whole) == whole
    return found


def torchrun(world: int, restarts: int, root: Path, folder: Path, deaths: dict[int, tuple[int, int]]) -> int:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    words = [sys.executable, *launch, *rendezvous, __file__, str(root), str(folder), json.dumps(deaths)]
    # A restarted group must not find the addresses of the processes before it (pytorch issue 135712).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(words, env=environment, timeout=180, capture_output=True, check=False).returncode


def test_four_then_two_then_three_processes_see_what_one_would(make_dataset, tmp_path: Path) -> None:
    corpus = make_dataset(tmp_path / "corpus", num_records=25, num_frames=6, audio=False)
    assert run(corpus, tmp_path / "alone", {}) == STEPS
    root, folder = corpus.root, tmp_path / "elastic"
    # One of four is killed and torchrun starts them all again, once; later a notice of pre-emption reaches another.
    assert torchrun(4, 1, root, folder, {5: (2, signal.SIGKILL), 7: (3, signal.SIGTERM)}) == 0
    assert checkpoint.complete(folder / "run")[-1].name == "step-00000007"
    assert torchrun(2, 0, root, folder, {12: (1, signal.SIGKILL)}) != 0
    assert checkpoint.complete(folder / "run")[-1].name == "step-00000010"
    assert torchrun(3, 0, root, folder, {}) == 0
    assert order(folder) == order(tmp_path / "alone")
    assert [row["step"] for row in read_log(folder / "run")] == list(range(1, STEPS + 1))
    one, many = (Watched(tmp_path, {}) for _ in range(2))
    for method, place in ((one, tmp_path / "alone"), (many, folder)):
        assert checkpoint.restore(checkpoint.complete(place / "run")[-1], method).step == STEPS
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_global_batch_is_cut_evenly(make_dataset, tmp_path: Path, world: int) -> None:
    """The same property of the order alone, for every rank, without processes."""
    from clipmill.pipeline.loader import Loader

    corpus = make_dataset(tmp_path / "corpus", num_records=25, num_frames=6, audio=False)
    planner = Watched(tmp_path, {}).plan()
    config = LoaderConfig(threads=1, processes=0)

    def batches(rank: int, of: int) -> list[list[int]]:
        with Loader(corpus, planner, batch_size=12 // of, rank=rank, world=of, config=config) as source:
            return [batch.index.tolist() for batch in source.epoch(3)]

    shares = [batches(rank, world) for rank in range(world)]
    together = [[number for share in step for number in share] for step in zip(*shares, strict=True)]
    assert together == batches(0, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    told = {int(step): (rank, number) for step, (rank, number) in json.loads(sys.argv[3]).items()}
    if attempt:  # who was started again is not killed again
        told = {step: (rank, number) for step, (rank, number) in told.items() if number != signal.SIGKILL}
    run(ShardIndex.open(sys.argv[1]), Path(sys.argv[2]), told)
    dist.teardown()
