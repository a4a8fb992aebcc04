"""The scripts of tools/examples, run with a Slurm made of a few lines, and the Ray file against Ray's own schema."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from clipmill.pipeline.record import ShardIndex
from clipmill.tools import pack as pack_command

EXAMPLES = Path(pack_command.__file__).parent / "examples"
SMALL = ["--encoder.width", "0.125", "--size", "32", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"]
QUICK = [*SMALL, "--no-tensorboard", "--threads", "1", "--processes", "0", "--device", "cpu", "--log-every", "1"]

# Runs the script at once, as many times as the array has numbers, and prints a job number.
SBATCH = """#!{python}
import os, pathlib, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")][: sys.argv[1:].index(os.environ["SCRIPT"])]
script = sys.argv[sys.argv.index(os.environ["SCRIPT"]):]
with open("sbatch.log", "a") as log:
    print(os.environ["STEP"], *options, file=log)
numbers = [word[len("--array="):] for word in options if word.startswith("--array=")]
first, _, last = (numbers or ["1"])[0].partition("-")
numbers = list(range(int(first), int(last or first) + 1))
jobs = [
    subprocess.Popen(script, stdout=sys.stderr, env=os.environ | {{
        "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(len(numbers)), "SLURM_CPUS_PER_TASK": "1",
    }})
    for number in numbers
]
assert [job.wait() for job in jobs] == [0] * len(jobs)
print("4711;here")
"""
# Starts the command once per machine; all machines are this one.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> srun.log; shift; done
echo "$@" >> srun.log
jobs=()
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do "$@" & jobs+=($!); done
for job in "${jobs[@]}"; do wait "$job" || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-2]" ]] && printf 'localhost\\nlocalhost\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with the commands that the scripts call; jobs run in it."""
    (tmp_path / "bin").mkdir()
    clipmill = f'#!/usr/bin/env bash\nexec {sys.executable} -m clipmill.tools.cli "$@"\n'
    torchrun = f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    commands = {"sbatch": SBATCH.format(python=sys.executable), "srun": SRUN, "scontrol": SCONTROL}
    for name, text in (commands | {"clipmill": clipmill, "torchrun": torchrun}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(slurm: Path, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(EXAMPLES / script)
    environment = {"PATH": f"{slurm / 'bin'}:{os.environ['PATH']}", "SCRIPT": path, **environment}
    words, environment = [path, *map(str, arguments)], os.environ | environment
    return subprocess.run(words, cwd=slurm, env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five pictures in two classes."""
    from PIL import Image

    for number in range(5):
        folder = tmp_path / "corpus" / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32 + 2 * number), (40 * number, 90, 30)).save(folder / f"{number}.png")
    return tmp_path / "corpus"


def test_pack_as_an_array_then_finish(slurm: Path, corpus: Path) -> None:
    whole = [
        sys.executable,
        "-m",
        "clipmill.tools.cli",
        "pack",
        str(corpus),
        str(slurm / "whole"),
        "--shard-clips",
        "1",
    ]
    subprocess.run(whole, check=True, capture_output=True)
    done = run(slurm, "pack_slurm.sh", corpus, slurm / "packed", "--shard-clips", "1", TASKS="2")
    assert done.returncode == 0, done.stderr
    log = (slurm / "sbatch.log").read_text().splitlines()
    assert log == ["task --parsable --array=1-2", "finish --dependency=afterok:4711 --cpus-per-task=1"]
    assert "task 1/2: 3 ok" in done.stderr
    assert "task 2/2: 2 ok" in done.stderr
    for path in (slurm / "whole").iterdir():
        assert (slurm / "packed" / path.name).read_bytes() == path.read_bytes()


def test_a_part_of_the_array_is_started_again_by_its_numbers(slurm: Path, corpus: Path) -> None:
    arguments = (corpus, slurm / "packed", "--shard-clips", "1")
    again = run(
        slurm, "pack_slurm.sh", *arguments, STEP="task", TASKS="3", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_COUNT="1"
    )
    assert again.returncode == 0, again.stderr
    assert "task 2/3: 2 ok" in again.stdout
    early = run(slurm, "pack_slurm.sh", *arguments, STEP="finish")
    assert early.returncode == 2
    assert "--task 1/3, 3/3" in early.stderr
    assert run(slurm, "pack_slurm.sh", corpus, "out").returncode != 0  # how many tasks?


def test_pretrain_on_two_machines(slurm: Path, dataset: ShardIndex) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711", "PORT": port,
        "PROCESSES": "1",
    }  # fmt: skip
    arguments = ("simclr", "tiny", "--data", dataset.root, "--out", slurm / "run", *QUICK)
    done = run(slurm, "pretrain_slurm.sh", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    called = (slurm / "srun.log").read_text()
    assert f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} " in called
    rows = [json.loads(line) for line in (slurm / "run" / "log.jsonl").read_text().splitlines()]
    assert done.stdout.count(f"{rows[-1]['step']} steps done; encoder in") == 1  # one run of two processes, not two
    assert (slurm / "run" / "encoder.safetensors").is_file()


# --- Ray ----------------------------------------------------------------------------------------------------

CHECK = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
for path in sys.argv[1:]:
    config = prepare_config(yaml.safe_load(open(path)))
    try:
        validate_config(config)
        print("good", config["max_workers"])
    except Exception as error:
        print("bad", type(error).__name__)
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install clipmill[ray])")
def test_the_ray_cluster_has_rays_schema(tmp_path: Path) -> None:
    good = EXAMPLES / "ray_cluster.yaml"
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("\nsetup_commands:", "\nset_up_commands:"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, str(good), str(bad)],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["good 3", "bad ValidationError"], done.stderr


def test_the_ray_cluster_runs_a_command_that_there_is() -> None:
    text = (EXAMPLES / "ray_cluster.yaml").read_text()
    (command,) = re.findall(r"'clipmill/bin/clipmill pack (.*)'", text)
    args = tyro.cli(pack_command.Args, args=shlex.split(command))
    assert (args.engine, args.address) == ("ray", "auto")
    pack_command._check(args)


def test_scripts_are_executable_and_have_no_mistake() -> None:
    scripts = sorted(EXAMPLES.glob("*.sh"))
    assert len(scripts) == 2
    for script in scripts:
        assert os.access(script, os.X_OK)
        bash = shutil.which("bash")
        assert bash is not None
        assert subprocess.run([bash, "-n", str(script)]).returncode == 0
