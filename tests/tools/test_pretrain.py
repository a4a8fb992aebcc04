"""`clipmill pretrain` and `clipmill methods`: flags, run folders, exit codes, several processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from clipmill.datasets.synthetic_media import label_map_bytes
from clipmill.models.encoder import load_encoder
from clipmill.models.method import method_names
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.log import read_log
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.ring import LoaderConfig
from clipmill.pipeline.views import Clips, View
from clipmill.tools import cli, methods, pretrain
from clipmill.tools.pretrain_plan import record_cost

SMALL = ["--encoder.width", "0.125", "--size", "32", "--batch-size", "4", "--epochs", "2", "--warmup-epochs", "0"]
QUICK = [*SMALL, "--no-tensorboard", "--threads", "1", "--processes", "0", "--device", "cpu", "--log-every", "1"]


def command(dataset: ShardIndex, out: Path, *more: str, method: str = "simclr") -> list[str]:
    return ["pretrain", method, "tiny", "--data", str(dataset.root), "--out", str(out), *QUICK, *more]


def weights(out: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(out / "encoder.safetensors")


# --- the command line ---------------------------------------------------------------------------------------


def test_every_setting_is_a_flag_and_the_recipe_gives_its_default() -> None:
    args = pretrain.parse(["moco", "--data", "d", "--out", "o"])
    assert (args.method, args.recipe, args.options.data, args.options.resume) == ("moco", "tiny", Path("d"), False)
    assert (args.config.queue_size, args.train.batch_size, args.loader) == (128, 32, LoaderConfig())
    flags = "--lr 0.5 --milestones 3 4 --queue-size 64 --encoder.width 0.5 --no-mlp --ahead 3 --amp bf16 --resume"
    args = pretrain.parse(["moco", "imagenet_v1", "--data", "d", "--out", "o", *flags.split()])
    assert (args.train.lr, args.train.milestones, args.train.amp) == (0.5, (3, 4), "bf16")
    assert (args.config.queue_size, args.config.encoder.width, args.config.encoder.name) == (64, 0.5, "resnet50")
    assert (args.config.mlp, args.config.temperature, args.loader.ahead) == (False, 0.07, 3)
    assert args.options.resume


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("simclir --data d --out o", "unknown method 'simclir'; did you mean simclr?"),
        ("simclr imagnet --data d --out o", "method simclr has no recipe 'imagnet'; did you mean imagenet"),
        ("simclr --data d --out o --lr 0", "lr = 0.0 is not possible; it must be greater than 0"),
        ("--data d", f"pretrain needs a METHOD before --data: {', '.join(method_names())}"),
        ("simclr --config", "--config needs a file"),
        ("simclr --config nowhere.json", "nowhere.json: No such file"),
        ("simclr --data /nowhere --out o", "/nowhere: no index.arrow there"),
    ],
)
def test_wrong_use_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("clipmill: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_help_lists_methods_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--help"]) == 0
    assert f"methods: {', '.join(method_names())}" in capsys.readouterr().out
    assert cli.main(["pretrain"]) == 2
    assert "usage: clipmill pretrain METHOD" in capsys.readouterr().err
    assert cli.main(["pretrain", "simclr", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--data", "--temperature", "--optimiser", "--threads", "--encoder.width"):
        assert flag in text


# --- a run --------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_it_should_and_its_file_replays_it(
    dataset: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    assert cli.main(command(dataset, first)) == 0
    assert re.search(r"step 2/2  epoch 1  loss \d.*clips/s  wait \d+ %", capsys.readouterr().out)
    run = json.loads((first / "run.json").read_text())
    assert (run["method"], run["recipe"], run["split"]) == ("simclr", "tiny", "train")
    assert run["config"]["encoder"] == {"name": "resnet18", "width": 0.125}
    assert run["data_digest"] == dataset.split("train").digest
    assert len(read_log(first)) == 2
    encoder = load_encoder(first)
    assert (encoder.spec.size, encoder.spec.num_frames) == (32, 1)
    for view in ("view1", "view2"):
        with Image.open(first / "samples" / f"{view}.png") as picture:
            assert picture.height > 4 * 100

    again = ["pretrain", "--config", str(first / "run.json"), "--data", str(dataset.root), "--out"]
    assert cli.main([*again, str(tmp_path / "second")]) == 0
    for name, tensor in weights(first).items():
        np.testing.assert_array_equal(weights(tmp_path / "second")[name], tensor)
    assert cli.main([*again, str(tmp_path / "third"), "--seed", "1"]) == 0
    assert any((weights(tmp_path / "third")[name] != tensor).any() for name, tensor in weights(first).items())

    capsys.readouterr()
    for words, message in (
        (command(dataset, first), "holds a run already; add --resume"),
        (command(dataset, first, "--resume", "--seed", "3"), "has seed = 0, this command 3"),
        (command(dataset, first, "--resume", "--temperature", "0.5"), "has temperature = 0.2, this command 0.5"),
        (command(dataset, first, "--resume", "--split", "test"), "has split = train, this command test"),
        (command(dataset, dataset.root), "is not empty and holds no run"),
        (["pretrain", "moco", *again[1:], "x"], "is a run of simclr, not of moco"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    assert cli.main(command(dataset, first, "--resume", "--log-every", "5")) == 0  # there is nothing left to do


def test_sigterm_ends_with_a_checkpoint_and_resume_finishes(dataset: ShardIndex, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch = [sys.executable, "-m", "clipmill.tools.cli"]  # each in a process of its own, whose state is the same
    more = ["--epochs", "60", "--log-every", "1"]
    subprocess.run([*launch, *command(dataset, whole, *more)], check=True)
    process = subprocess.Popen([*launch, *command(dataset, cut, *more)], stdout=subprocess.PIPE, text=True)
    while not read_log(cut):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "with --resume continues" in output
    assert not (cut / "encoder.json").exists()
    assert 0 < len(read_log(cut)) < 60
    subprocess.run([*launch, *command(dataset, cut, *more, "--resume")], check=True)
    for name, tensor in weights(whole).items():
        np.testing.assert_array_equal(weights(cut)[name], tensor)


def test_two_processes_under_torchrun(dataset: ShardIndex, davis: Path, tmp_path: Path) -> None:
    """The main process probes meanwhile."""

    def torchrun(*more: str) -> subprocess.CompletedProcess[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "clipmill.tools.cli"]
        words = [*launch, *command(dataset, tmp_path / "run", *more)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)

    done = torchrun("--probe", "davis:1", "--probe-data", str(davis), "--probe-every", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps done; encoder in") == 1
    assert done.stdout.count("step 2/2") == 1
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["davis_jf"] <= 1 for row in rows)
    refused = torchrun()
    assert refused.returncode != 0
    assert refused.stderr.count("holds a run already") >= 1
    assert len(read_log(tmp_path / "run")) == 2


# --- probes -------------------------------------------------------------------------------------------------


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """One sequence of three frames: a bright square that moves."""
    root = tmp_path / "davis"
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p" / "square").mkdir(parents=True)
    for t in range(3):
        ids = np.zeros((30, 40), np.uint8)
        ids[8:20, 6 + 4 * t : 18 + 4 * t] = 1
        Image.fromarray(90 + 120 * ids).convert("RGB").save(root / "JPEGImages/480p/square" / f"{t:05d}.png")
        (root / "Annotations/480p/square" / f"{t:05d}.png").write_bytes(label_map_bytes(ids))
    return root


def test_a_probe_is_logged_and_changes_nothing(dataset: ShardIndex, davis: Path, tmp_path: Path) -> None:
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    more = ["--epochs", "5", "--log-every", "3"]
    assert cli.main(command(dataset, plain, *more)) == 0
    probe = ["--probe", "davis:1", "--probe-data", str(davis), "--probe-every", "4"]
    assert cli.main(command(dataset, probed, *more, *probe)) == 0
    rows = read_log(probed)
    assert [row["step"] for row in read_log(plain)] == [3, 5]
    assert [row["step"] for row in rows] == [3, 4, 5]
    assert "davis_jf" not in rows[0]
    for row in rows[1:]:
        assert 0 < row["davis_j"] <= 1
        assert row["davis_jf"] == pytest.approx((row["davis_j"] + row["davis_f"]) / 2)
    for name, tensor in weights(plain).items():
        np.testing.assert_array_equal(weights(probed)[name], tensor)
    encoder = str(probed)
    assert cli.main(["evaluate", "davis", encoder, str(davis), "--no-videos", "--device", "cpu"]) == 0
    score = json.loads((probed / "evaluate" / "davis" / "score.json").read_text())
    assert score["metrics"]["J&F-Mean"] == pytest.approx(rows[-1]["davis_jf"], abs=1e-9)


def test_a_probe_that_cannot_be_is_told_before_training(
    dataset: ShardIndex, davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--probe", "davis:1"], "--probe needs the folder of its corpus (--probe-data)"),
        (["--probe", "davis:1", "--probe-data", str(davis), "--probe-every", "0"], "--probe-every of at least 1"),
        (["--probe", "davis:0", "--probe-data", str(davis)], "probe 'davis:0' is not possible; write davis:N or otb:N"),
        (["--probe", "knn:3", "--probe-data", str(davis)], "probe 'knn:3' is not possible"),
        (["--probe", "davis:1", "--probe-data", "/nowhere"], "no such folder"),
        (["--probe", "otb:1", "--probe-data", str(davis)], "no sequence there"),
    ):
        assert cli.main(command(dataset, tmp_path / "run", *words)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# --- plan and methods ---------------------------------------------------------------------------------------


def test_the_plan_counts_and_does_not_train(
    dataset: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(dataset, tmp_path / "run", "--plan", method="moco")) == 0
    text = capsys.readouterr().out
    assert "1 per epoch x 2 epochs = 2" in text
    assert "8 x 32 x 32, stride 4" in text
    assert re.search(r"step +\d+ ms for 4 samples \(measured on \d+ CPU threads\)", text)
    assert re.search(r"forecast +\d+\.\d clips/s per process with 1 decode threads on \d+ cores", text)
    assert not (tmp_path / "run").exists()
    given = ["--what-if.step-ms", "100", "--what-if.cores", "64", "--what-if.read-mb-s", "1"]
    assert cli.main(command(dataset, tmp_path / "run", "--plan", *given, method="moco")) == 0
    text = capsys.readouterr().out
    assert "100 ms for 4 samples (given)" in text
    assert "to keep busy  40.0 clips/s" in text
    assert "1 decode threads on 64 cores" in text
    assert cli.main(command(dataset, tmp_path / "run", "--plan", "--size", "1024", method="moco")) == 0
    assert "is not tried on this CPU; give --what-if.step-ms" in capsys.readouterr().out
    assert cli.main(command(dataset, tmp_path / "run", "--plan", "--batch-size", "5")) == 2
    assert "do not fill one batch of 5" in capsys.readouterr().err


def test_the_cost_of_a_sample_is_what_the_loader_reads(dataset: ShardIndex) -> None:
    planner = Clips(views=(View(name="clip", num_frames=3, stride=5),))
    record = dataset[0]
    drawn = planner(record, Draws(1), 1)
    frames = drawn.spans[0].frames
    packets = {packet for frame in frames for packet in range(frame // 8 * 8, frame + 1)}  # a group has 8 frames
    expected = (int(record.packet_sizes[sorted(packets)].sum()), len(packets), 3)
    assert record_cost(record, drawn) == expected


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("simclr: SimCLR") for line in lines)
    assert any(re.match(r"  imagenet_v1 +ImageNet, ResNet-50, MoCo v1", line) for line in lines)
    assert cli.main(["methods", "--json"]) == 0
    listed = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert listed["moco"]["recipes"]["k400_r2plus1d"]["train"]["lr"] == 0.005
    assert methods.listing() == list(listed.values())
