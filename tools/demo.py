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
from statistics import fmean, stdev


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
    seeds: int = 1
    """Runs of each method, with seeds 0, 1, ...; more than one give a mean and a standard deviation."""
    short: bool = False
    """A smaller corpus and very few steps: shows that everything works, not that anything is learnt."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Runs of one kind: top1 and seconds (of training) have one number for each seed."""

    encoder: str
    corpus: str
    top1: tuple[float, ...]
    seconds: tuple[float, ...] = ()


def main(args: Args) -> int:
    """Run all steps; the exit code of the first that fails."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads share the cores with the decoders
    if not args.methods:
        raise ValueError("--methods is empty; name at least one, `clipmill methods` lists them")
    if args.seeds < 1:
        raise ValueError(f"--seeds = {args.seeds} must be at least 1")
    kinds = {method: _kind(method) for method in args.methods}
    for kind in dict.fromkeys(kinds.values()):
        corpus, shards = args.out / f"corpus_{kind}", args.out / kind
        _run("synth", corpus, "--kind", "images" if kind == "images" else "ucf101", *_amount(kind, args.short))
        _run("pack", corpus, shards)
        _run("inspect", shards, "--out", args.out / f"inspect_{kind}")
    rows = [row for method, kind in kinds.items() for row in _method(method, kind, args)]
    page = args.out / "report.html"
    _run("report", *(_folder(args.out, method, seed) for method in kinds for seed in range(args.seeds)), "--out", page)
    _show(rows, args.out)
    for kind in dict.fromkeys(kinds.values()):
        print(f"corpus: {args.out / f'inspect_{kind}' / 'index.html'}")
    print(f"report: {page}")
    return 0


def _folder(out: Path, method: str, seed: int) -> Path:
    return out / (f"{method}-{seed}" if seed else method)


def _kind(method: str) -> str:
    """The corpus a method is shown: one frame of the clips does not tell its class, so image methods get pictures."""
    from clipmill.models.method import method_class, recipes

    known = recipes(method)
    views = method_class(method)(known["tiny"].method).plan().views
    return "images" if all(view.modality == "image" for view in views) else "clips"


def _amount(kind: str, short: bool) -> list[str]:
    few = ["--clips", "48", "--seconds", "1.5", "--size", "64"] if short else ["--clips", "480"]
    if kind == "images":
        few = ["--images", "100" if short else "1500"]
    return [*few, "--looks", "2"]  # so that textures and backgrounds do not tell samples apart, and classes have to


def _method(method: str, kind: str, args: Args) -> list[_Row]:
    """Pretrain with one method and score its encoder before and after."""
    shards = args.out / kind
    look = ["--test", "val"] if kind == "images" else ["--clips", "4"]
    before, after, ceiling, spent, labelled = [], [], [], [], []
    for seed in range(args.seeds):
        run = _folder(args.out, method, seed)
        few = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "16"] if args.short else []
        seeded = ["--seed", str(seed)] if seed else []
        _run("pretrain", method, "tiny", "--data", shards, "--out", run, *few, *seeded, "--resume")
        spent.append(_trained_s(run))
        untrained, scores = f"random:{run}" + (f":seed={seed}" if seed else ""), run / "evaluate"
        _run("evaluate", "linear", untrained, shards, *look, "--out", scores / "linear_random")
        _run("evaluate", "linear", run, shards, *look)
        before.append(_top1(scores / "linear_random"))
        after.append(_top1(scores / "linear"))
        if args.supervised:
            out = scores / "supervised"
            few = ["--epochs", "1" if args.short else "40", "--optimiser", "adamw", "--lr", "0.002"]
            labelled.append(_run("evaluate", "finetune", untrained, shards, *look, *few, *seeded, "--out", out))
            ceiling.append(_top1(out))
    rows = [
        _Row(encoder=f"random ({method}'s)", corpus=kind, top1=tuple(before)),
        _Row(encoder=method, corpus=kind, top1=tuple(after), seconds=tuple(spent)),
    ]
    if args.supervised:
        name = f"labels ({method}'s backbone)"
        rows.append(_Row(encoder=name, corpus=kind, top1=tuple(ceiling), seconds=tuple(labelled)))
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


def _trained_s(run: Path) -> float:
    """Seconds of training, those before an interruption too."""
    from clipmill.pipeline.log import read_log

    return sum(row[name] for row in read_log(run) for name in ("wait_s", "augment_s", "step_s"))


def _top1(folder: Path) -> float:
    return float(json.loads((folder / "score.json").read_text("utf-8"))["metrics"]["top1"])


def _show(rows: Sequence[_Row], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="linear probe")
    table.add_column("encoder")
    table.add_column("corpus")
    for name in ("top-1", "chance", "training"):
        table.add_column(name, justify="right")
    for row in rows:
        classes = json.loads((out / row.corpus / "dataset.json").read_text("utf-8"))["classes"]
        spent = f"{fmean(row.seconds):.0f} s" if row.seconds else "-"
        spread = f" ± {stdev(row.top1):.3f}" if len(row.top1) > 1 else ""
        table.add_row(row.encoder, row.corpus, f"{fmean(row.top1):.3f}{spread}", f"{1 / len(classes):.3f}", spent)
    print()
    Console().print(table)
