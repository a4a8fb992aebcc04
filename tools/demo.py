"""``clipmill demo``: the whole pipeline on a synthetic corpus, as the very commands that anyone can type.

synth -> pack -> inspect -> pretrain -> evaluate (before and after) -> report. A demo that was interrupted is continued
by the same command.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROBE = {  # how the linear probe looks at each method's encoder; one frame of this corpus tells nothing by design
    "simclr": ("--clips", "8", "--average", "moments"),
}
CLIP_PROBE = ("--clips", "4")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make a small corpus, pack it, pretrain on it, and compare the encoder with an untrained one.

    Takes about 4 minutes on 2 CPU cores. Every step is printed as the command that does it.
    """

    out: Path = Path("demo")
    """Folder for corpus, shards, runs and the report."""
    methods: tuple[str, ...] = ("moco",)
    """Methods to pretrain with, each with its recipe `tiny`."""
    supervised: bool = False
    """Train the same backbones with labels too: the ceiling."""
    short: bool = False
    """A smaller corpus and very few steps: shows that everything works, not that anything is learnt."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    encoder: str
    top1: float
    seconds: float


def main(args: Args) -> int:
    """Run all steps; the exit code of the first that fails."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads share the cores with the decoders
    if not args.methods:
        raise ValueError("--methods is empty; name at least one, `clipmill methods` lists them")
    corpus, shards = args.out / "corpus", args.out / "shards"
    small = ["--clips", "48", "--seconds", "1.5", "--size", "64"] if args.short else ["--clips", "320"]
    _run("synth", corpus, "--kind", "ucf101", *small)
    _run("pack", corpus, shards)
    _run("inspect", shards, "--out", args.out / "inspect")
    rows: list[_Row] = []
    for method in args.methods:
        rows += _method(method, args, shards)
    page = args.out / "report.html"
    _run("report", *(args.out / method for method in args.methods), "--out", page)
    _show(rows, shards)
    print(f"\ncorpus: {args.out / 'inspect' / 'index.html'}\nreport: {page}")
    return 0


def _method(method: str, args: Args, shards: Path) -> list[_Row]:
    """Pretrain with one method and score its encoder before and after."""
    run = args.out / method
    few = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "16"] if args.short else []
    spent_s = _run("pretrain", method, "tiny", "--data", shards, "--out", run, *few, "--resume")
    probe = PROBE.get(method, CLIP_PROBE)
    untrained, scores = f"random:{run}", run / "evaluate"
    _run("evaluate", "linear", untrained, shards, *probe, "--out", scores / "linear_random")
    _run("evaluate", "linear", run, shards, *probe)
    rows = [
        _Row(encoder=f"random ({method}'s)", top1=_top1(scores / "linear_random"), seconds=0.0),
        _Row(encoder=method, top1=_top1(scores / "linear"), seconds=spent_s),
    ]
    if args.supervised:
        out = scores / "supervised"
        few = ["--epochs", "1" if args.short else "40", "--optimiser", "adamw", "--lr", "0.002"]
        spent_s = _run("evaluate", "finetune", untrained, shards, *few, "--out", out)
        rows.append(_Row(encoder=f"supervised ({method}'s backbone)", top1=_top1(out), seconds=spent_s))
    return rows


def _run(*words: str | Path) -> float:
    """Print a command, run it, and return the seconds it took; ends the demo with its exit code if that is not 0."""
    from clipmill.tools import cli

    argv = [str(word) for word in words]
    print(f"\n$ clipmill {shlex.join(argv)}", flush=True)
    begin_s = time.monotonic()
    code = cli.main(argv)
    if code:
        raise SystemExit(code)
    return time.monotonic() - begin_s


def _top1(folder: Path) -> float:
    return float(json.loads((folder / "score.json").read_text("utf-8"))["metrics"]["top1"])


def _show(rows: Sequence[_Row], shards: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    classes = json.loads((shards / "dataset.json").read_text("utf-8"))["classes"]
    table = Table(title=f"linear probe on {len(classes)} classes of motion x rhythm (chance {1 / len(classes):.3f})")
    table.add_column("encoder")
    table.add_column("top-1", justify="right")
    table.add_column("training", justify="right")
    for row in rows:
        table.add_row(row.encoder, f"{row.top1:.3f}", f"{row.seconds:.0f} s" if row.seconds else "-")
    print()
    Console().print(table)
