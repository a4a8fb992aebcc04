"""The training loop: same numbers after a kill, at any cut into parts, and with two processes.

Run as a script, this file is one training process: ``test_train.py ranks|crash ...``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.method import EpochContext, Method, Output, ParamGroup
from clipmill.pipeline import checkpoint, dist
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.loader import LoaderConfig
from clipmill.pipeline.log import read_log
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import Flip, Normalize, VideoSpec
from clipmill.pipeline.train import NonFiniteLossError, TrainResult, train
from clipmill.pipeline.views import Clips, Uniform, View

LOADER = LoaderConfig(threads=1, processes=0)


class Pool(Encoder):
    """One convolution and a normalisation."""

    dim, stages, spec = 8, ("res2",), InputSpec(size=16)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, (1, 3, 3), bias=False)
        self.norm = nn.BatchNorm3d(8)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "res2").mean((2, 3, 4))


@dataclass(frozen=True, kw_only=True)
class Config:
    cluster: bool = False
    noise: float = 0.1
    fail_at: int = -1
    unequal_picks: bool = False
    seconds: float = 0.0


class Tiny(Method):
    """Regress the time of the clip's first frame from a noisy picture; with ``cluster``, labels of its own making."""

    Config = Config
    rank_invariant = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Pool()
        self.head = nn.Linear(8, 2)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(()))

    @property
    def encoder(self) -> Encoder:
        return self.backbone

    def plan(self) -> Clips:
        return Clips(views=(View(name="clip", num_frames=2, augment=VideoSpec(size=16, ops=(Flip(), Normalize()))),))

    def forward(self, batch: ClipBatch) -> Output:
        x = batch.video["clip"]
        if self.config.seconds:
            time.sleep(self.config.seconds)
        y = self.head(self.backbone(x + self.config.noise * torch.randn_like(x)))
        if self.config.cluster:
            loss = nn.functional.cross_entropy(y, self.labels[batch.index])
        else:
            loss = (y[:, 0] - batch.start_s["clip"].to(y)).square().mean()
        if int(self.steps) == self.config.fail_at:
            loss = loss * torch.nan
        return Output(loss, {"mean": y.detach().mean()})

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup(params=list(self.backbone.parameters())), ParamGroup(params=list(self.head.parameters()))]

    def after_step(self, step: int, num_steps: int) -> None:
        assert int(self.steps) == step < num_steps
        self.steps += 1

    def before_epoch(self, context: EpochContext) -> None:
        if not self.config.cluster:
            return
        planner = Uniform(views=(View(name="whole", num_frames=2, augment=VideoSpec(size=16)),))

        def features(batch: ClipBatch) -> Mapping[str, Tensor]:
            assert not self.training
            return {"h": self.backbone(batch.video["whole"]), "index": batch.index}

        found = context.collect(planner, features)
        assert self.training or context.epoch == 0
        assert found["index"].tolist() == list(range(context.num_records))
        h = found["h"].sum(1)
        self.labels = (h > h.median()).long()
        context.picks = np.roll(np.arange(context.num_records), context.epoch)
        if self.config.unequal_picks:
            context.picks = context.picks[:-1]
        with torch.no_grad():
            self.head.weight.normal_()
        context.renewed.extend(self.head.parameters())
        context.log["ones"] = float(self.labels.sum())


def run(index: ShardIndex, folder: Path, method: Config | None = None, resume: bool = False, **options: object):
    values: dict = {"epochs": 4, "batch_size": 4, "lr": 0.05, "log_every": 3, "checkpoint_every": 2}
    config = TrainConfig(**{**values, "tensorboard": False, "device": "cpu", **options})
    torch.manual_seed(config.seed)
    tiny = Tiny(method or Config())
    return tiny, train(tiny, index, config, folder, loader=LOADER, resume=resume, verbose=False)


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(folder: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["mean"], row["lr"], row.get("ones")) for row in read_log(folder)]


@pytest.fixture(scope="module")
def corpus(make_dataset, tmp_path_factory) -> ShardIndex:
    """Thirteen short videos: an epoch of three steps of four samples, one is left over."""
    return make_dataset(tmp_path_factory.mktemp("corpus"), num_records=13, num_frames=12, audio=False)


# --- one process --------------------------------------------------------------------------------------------


def test_a_run_logs_and_stores_what_it_did(corpus: ShardIndex, tmp_path: Path, capsys) -> None:
    tiny, result = run(corpus, tmp_path)
    assert result == TrainResult(step=12, total=12)
    assert [row["step"] for row in read_log(tmp_path)] == [3, 6, 9, 12]
    assert [row["epoch"] for row in read_log(tmp_path)] == [0, 1, 2, 3]
    for row in read_log(tmp_path):
        assert {"clips_per_s", "wait_share", "plan_s", "read_s", "decode_s", "copy_s", "augment_s", "wait_s"} <= set(
            row
        )
        assert row["clips_per_s"] > 0
        assert 0 <= row["wait_share"] <= 1
        assert row["wait_s"] + row["augment_s"] + row["step_s"] == pytest.approx(12 / row["clips_per_s"], rel=1e-6)
    stored = Tiny(Config())
    state = checkpoint.restore(checkpoint.complete(tmp_path)[-1], stored)
    assert same(tiny, stored)
    assert (state.step, state.cursor.epoch, state.cursor.position) == (12, 4, 0)
    assert state.cursor.index_digest == corpus.digest
    assert capsys.readouterr().out == ""


def test_the_same_seed_gives_the_same_bits_and_another_does_not(corpus: ShardIndex, tmp_path: Path) -> None:
    first, _ = run(corpus, tmp_path / "a")
    torch.manual_seed(99)
    second, _ = run(corpus, tmp_path / "b")
    other, _ = run(corpus, tmp_path / "c", seed=1)
    assert same(first, second)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not same(first, other)


@pytest.mark.parametrize("cluster", [False, True])
def test_resuming_at_any_step_changes_nothing(corpus: ShardIndex, tmp_path: Path, cluster: bool) -> None:
    method = Config(cluster=cluster)
    options = {"checkpoint_every": 1, "keep": 99, "optimiser": "adamw", "schedule": "cosine", "warmup_epochs": 1}
    whole, _ = run(corpus, tmp_path / "whole", method, **options)
    saved = checkpoint.complete(tmp_path / "whole")
    assert len(saved) == 12
    for step in (2, 3, 7):  # inside an epoch, at its end, inside a log interval
        folder = tmp_path / str(step)
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "log.jsonl").write_text((tmp_path / "whole" / "log.jsonl").read_text())
        saved[step - 1].rename(folder / "checkpoint" / saved[step - 1].name)
        resumed, result = run(corpus, folder, method, resume=True, **options)
        assert result.step == 12
        assert same(whole, resumed), step
        assert losses(folder) == losses(tmp_path / "whole")


def test_a_finished_run_resumes_to_nothing(corpus: ShardIndex, tmp_path: Path) -> None:
    first, _ = run(corpus, tmp_path)
    before = losses(tmp_path)
    again, result = run(corpus, tmp_path, resume=True)
    assert result == TrainResult(step=12, total=12)
    assert same(first, again)
    assert losses(tmp_path) == before


def test_accumulated_parts_add_up_to_the_whole_batch(corpus: ShardIndex, tmp_path: Path) -> None:
    """Without noise and batch statistics, any cut of the batch gives the same gradient."""

    class Frozen(Tiny):
        def forward(self, batch: ClipBatch) -> Output:
            self.backbone.norm.eval()
            return super().forward(batch)

    models = []
    for parts in (1, 2, 4):
        options = {"accumulate": parts, "optimiser": "sgd", "batch_size": 4, "lr": 0.05, "epochs": 2}
        config = TrainConfig(**options, log_every=1, tensorboard=False, device="cpu")
        torch.manual_seed(0)
        models.append(Frozen(Config(noise=0.0)))
        train(models[-1], corpus, config, tmp_path / str(parts), loader=LOADER, verbose=False)
        assert int(models[-1].steps) == 6  # after_step runs once per optimiser step
    for parts, model in zip((2, 4), models[1:], strict=True):
        for name, param in models[0].named_parameters():
            torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-4, atol=1e-6)
        for one, two in zip(losses(tmp_path / "1"), losses(tmp_path / str(parts)), strict=True):
            assert two[1] == pytest.approx(one[1], rel=1e-4)


def test_the_gradient_norm_is_clipped(corpus: ShardIndex, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Tiny(Config())
    options = {"optimiser": "sgd", "momentum": 0.0, "weight_decay": 0.0, "epochs": 1, "batch_size": 13, "lr": 1.0}
    moved, _ = run(corpus, tmp_path, clip_grad_norm=0.01, schedule="constant", **options)
    change = [new.detach() - old.detach() for new, old in zip(moved.parameters(), start.parameters(), strict=True)]
    assert float(torch.stack([part.norm() for part in change]).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes_to_the_same_bits(corpus: ShardIndex, tmp_path: Path, amp: str) -> None:
    whole, _ = run(corpus, tmp_path / "whole", amp=amp, checkpoint_every=5, keep=9)
    saved = checkpoint.complete(tmp_path / "whole")
    assert [path.name for path in saved] == ["step-00000005", "step-00000010", "step-00000012"]
    (tmp_path / "half" / "checkpoint").mkdir(parents=True)
    saved[0].rename(tmp_path / "half" / "checkpoint" / saved[0].name)
    resumed, _ = run(corpus, tmp_path / "half", amp=amp, checkpoint_every=5, resume=True)
    assert same(whole, resumed)
    assert all(torch.isfinite(param).all() for param in whole.parameters())


def test_a_loss_that_is_not_finite_names_step_and_records(corpus: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 4: the loss is nan; records: video/\d+, .*Lower --lr"):
        run(corpus, tmp_path, Config(fail_at=4))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 14}, "do not fill one batch of 14"),
        ({"batch_size": 26, "accumulate": 13}, "13 samples an epoch do not fill one batch of 26"),
    ],
)
def test_batches_that_do_not_fit_are_refused(corpus: ShardIndex, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(corpus, tmp_path, **options)


def test_epochs_must_be_equally_long(corpus: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the method picked 12; epochs must be equally long"):
        run(corpus, tmp_path, Config(cluster=True, unequal_picks=True))


def test_resuming_another_run_is_refused(corpus: ShardIndex, tmp_path: Path, dataset: ShardIndex) -> None:
    run(corpus, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="made with another seed, batch_size"):
        run(corpus, tmp_path, resume=True, batch_size=3)
    with pytest.raises(ValueError, match="the checkpoint was made on data set"):
        run(dataset, tmp_path, resume=True)


def test_sigterm_stores_a_checkpoint_and_returns(corpus: ShardIndex, tmp_path: Path) -> None:
    class Stopped(Tiny):
        def after_step(self, step: int, num_steps: int) -> None:
            super().after_step(step, num_steps)
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    config = TrainConfig(epochs=4, batch_size=4, lr=0.05, tensorboard=False, device="cpu")
    torch.manual_seed(0)
    before = signal.getsignal(signal.SIGTERM)
    result = train(Stopped(Config()), corpus, config, tmp_path, loader=LOADER, verbose=False)
    assert result == TrainResult(step=5, total=12, signal=signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.complete(tmp_path)[-1].name == "step-00000005"
    whole, _ = run(corpus, tmp_path / "whole")
    resumed, _ = run(corpus, tmp_path, resume=True)
    assert same(whole, resumed)


# --- kill -9 ------------------------------------------------------------------------------------------------


def kill_and_compare(corpus: ShardIndex, folder: Path, kills: int, seed: int) -> None:
    """Kill a training process ``kills`` times at random instants, then let it finish; compare with a whole run."""
    done = subprocess.run(
        [sys.executable, __file__, "crash", str(corpus.root), str(folder), str(kills), str(seed)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


def test_kill_9_once(corpus: ShardIndex, tmp_path: Path) -> None:
    kill_and_compare(corpus, tmp_path, kills=1, seed=1)


@pytest.mark.slow
def test_kill_9_at_five_instants(corpus: ShardIndex, tmp_path: Path) -> None:
    for seed in range(3):
        kill_and_compare(corpus, tmp_path / str(seed), kills=5, seed=seed)


CRASH = {"epochs": 8, "checkpoint_every": 2, "optimiser": "adamw", "keep": 2, "seed": 4}


def compare(out: Path) -> None:
    """The weights and the log of the run that was cut are those of the whole one."""
    models = [Tiny(Config(cluster=True, seconds=0.01)) for _ in range(2)]
    for model, name in zip(models, ("whole", "cut"), strict=True):
        assert checkpoint.restore(checkpoint.complete(out / name)[-1], model).step == 24
    assert same(*models)
    assert losses(out / "whole") == losses(out / "cut")


def crash(root: str, folder: str, kills: str, seed: str) -> None:
    """Fork training processes and kill them, each at a random instant of what an undisturbed run takes."""
    torch.set_num_threads(1)
    index, out = ShardIndex.open(root), Path(folder)
    method = Config(cluster=True, seconds=0.01)

    def child(target: Path, resume: bool) -> int:
        number = os.fork()
        if number == 0:
            try:
                run(index, target, method, resume=resume, **CRASH)
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(1)
        return number

    start_s = time.perf_counter()
    assert os.waitpid(child(out / "whole", False), 0)[1] == 0
    length_s = time.perf_counter() - start_s
    draws, killed = random.Random(int(seed)), 0
    while killed < int(kills):
        number = child(out / "cut", True)
        time.sleep(draws.uniform(0.05, 0.8) * length_s)
        os.kill(number, signal.SIGKILL)
        status = os.waitpid(number, 0)[1]
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):  # it was through before: begin a new one
            assert status == 0
            compare(out)
            shutil.rmtree(out / "cut")
    assert os.waitpid(child(out / "cut", True), 0)[1] == 0
    compare(out)
    print(f"{killed} kills")


# --- several processes --------------------------------------------------------------------------------------


def test_two_processes_continue_what_one_began_and_back(corpus: ShardIndex, tmp_path: Path, run_ranks) -> None:
    """1 -> 2 -> 1 processes over one run, against an undisturbed run; also accumulation and clustering with 2."""
    whole, _ = run(corpus, tmp_path / "whole", Config(noise=0.0), sync_bn=True)
    _stop_at(corpus, tmp_path / "cut", 4)
    run_ranks(__file__, 2, "ranks", corpus.root, tmp_path)
    assert checkpoint.complete(tmp_path / "cut")[-1].name == "step-00000008"
    resumed, result = run(corpus, tmp_path / "cut", Config(noise=0.0), resume=True, sync_bn=True)
    assert result.step == 12
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    mine, theirs = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert [row[0] for row in theirs] == [3, 6, 9, 12]
    for one, two in zip(mine, theirs, strict=True):
        assert two[1] == pytest.approx(one[1], rel=1e-3)
    alone, _ = run(corpus, tmp_path / "alone", Config(noise=0.0, cluster=True), **TOGETHER)
    together = Tiny(Config())
    checkpoint.restore(checkpoint.complete(tmp_path / "together")[-1], together)
    assert torch.equal(together.labels, alone.labels)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


TOGETHER = {"sync_bn": True, "accumulate": 2, "epochs": 1}


def _stop_at(index: ShardIndex, folder: Path, step: int) -> None:
    """Train up to ``step``, stopped by SIGTERM."""

    class Stopped(Tiny):
        def after_step(self, number: int, num_steps: int) -> None:
            super().after_step(number, num_steps)
            if number == step - 1 and dist.rank() == dist.world() - 1:  # one process is told, all must stop
                os.kill(os.getpid(), signal.SIGTERM)

    config = TrainConfig(epochs=4, batch_size=4, lr=0.05, log_every=3, tensorboard=False, device="cpu", sync_bn=True)
    torch.manual_seed(0)
    result = train(Stopped(Config(noise=0.0)), index, config, folder, loader=LOADER, resume=True, verbose=False)
    assert result == TrainResult(step=step, total=12, signal=signal.SIGTERM)


def ranks(root: str, folder: str) -> None:
    torch.set_num_threads(1)
    index, out = ShardIndex.open(root), Path(folder)
    _stop_at(index, out / "cut", 8)
    with pytest.raises(ValueError, match="batch_size = 5 cannot be cut into 2 processes x 1 parts"):
        run(index, out / "bad", batch_size=5)
    model, _ = run(index, out / "together", Config(noise=0.0, cluster=True), **TOGETHER)
    for param in model.parameters():  # all processes hold the same weights
        assert all(torch.equal(param.detach(), part) for part in dist.gather(param[None]))
    dist.teardown()


if __name__ == "__main__":
    {"crash": crash, "ranks": ranks}[sys.argv[1]](*sys.argv[2:])
