"""``clipmill evaluate BENCHMARK ENCODER DATA``: measure an encoder on a packed, labelled data set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from clipmill.tools.data_set import DataSet
from clipmill.tools.evaluate.evaluator import benchmark_module, benchmarks
from clipmill.tools.progress import Progress

C = TypeVar("C")
UNTRAINED = ("random:", "baseline:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Args(Generic[C]):
    """Measure an encoder on a packed, labelled data set."""

    benchmark: Annotated[str, tyro.conf.Suppress] = ""
    encoder: tyro.conf.Positional[str]
    """Run folder or encoder folder; or random:FOLDER, the same encoder before training; or
    random:BACKBONE[:width=0.25,seed=1], an untrained one; or baseline:lab, the colours of raw pixels,
    or baseline:logmel, raw spectrograms. - with --score-only."""
    data: tyro.conf.Positional[DataSet]
    """Data set folder made by `clipmill pack`, or the URL of one (s3://bucket/set, https://host/set, ...); for davis,
    otb, jhmdb, vip and semantic_segmentation the folder of the corpus itself. linear, knn, svm, retrieval, finetune and
    crossmodal take that too, and pack it into --cache-dir first."""
    out: Path | None = None
    """Folder for score.json, tables and pictures; default: evaluate/BENCHMARK in the run folder, or the folder that
    --score-only names."""
    cache_dir: Path | None = None
    """Folder for what is fetched of a data set at a URL or packed of a raw one; default $CLIPMILL_CACHE, else
    ~/.cache/clipmill."""
    json: bool = False
    """Print score.json instead of tables."""
    config: C


def usage() -> str:
    """The text of ``clipmill evaluate --help``."""
    found = benchmarks()
    width = max(len(name) for name in found)
    return "\n".join(
        [
            "usage: clipmill evaluate BENCHMARK ENCODER DATA [OPTIONS]",
            "",
            "Measure an encoder on a packed, labelled data set.",
            "",
            "benchmarks:",
            *(f"  {name:<{width}}  {about}" for name, about in found.items()),
            "",
            "  clipmill evaluate BENCHMARK --help   the options of one benchmark",
        ]
    )


def parse(argv: Sequence[str]) -> Args[Any]:
    """Read the command line after ``clipmill evaluate``; prints the help and leaves where it asks for it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    name, *rest = argv
    kind = Args[benchmark_module(name).Config]
    prog = f"clipmill evaluate {name}"
    return replace(tyro.cli(kind, prog=prog, args=rest, config=(tyro.conf.OmitArgPrefixes,)), benchmark=name)


def main(args: Args[Any]) -> int:
    """Evaluate, store the report and print it."""
    from rich.console import Console

    from clipmill.pipeline.pack.write import MANIFEST_FILE
    from clipmill.pipeline.remote import data_folder
    from clipmill.tools.evaluate.opening import open_encoder
    from clipmill.tools.evaluate.over_splits import over_splits
    from clipmill.tools.evaluate.splits import Splits
    from clipmill.tools.on_the_fly import packed

    encoder = None if _rescored(args) is not None else open_encoder(args.encoder)
    out, config = _placed(args)
    with ExitStack() as stack:
        evaluate: Any = benchmark_module(args.benchmark).evaluate
        splits: Splits | None = getattr(config, "splits", None)
        official = splits.official if splits else ()
        data = data_folder(args.data, cache_dir=args.cache_dir, also=(MANIFEST_FILE,) if official else ())
        if splits is not None:
            data = packed(data, cache_dir=args.cache_dir, quiet=args.json)
        if len(official) > 1:
            evaluate = partial(over_splits, evaluate)
        report = evaluate(encoder, data, out, config, progress=_shower(stack, quiet=args.json))
    report = replace(report, settings={"encoder": args.encoder, "data": str(args.data), **report.settings})
    path = report.save(out)
    if args.json:
        print(report.to_json(), end="")
    else:
        report.show(Console())
        print(path)
    return 0


def _rescored(args: Args[Any]) -> Path | None:
    """The folder of results that are scored without an encoder; None where an encoder is measured."""
    return getattr(args.config, "score_only", None)


def _placed(args: Args[Any]) -> tuple[Path, Any]:
    """Where the report goes, and the options; inside a run folder its benchmarks share one cache of features."""
    if args.out is not None:
        return args.out, args.config
    rescored = _rescored(args)
    if rescored is not None:
        return rescored, args.config
    if args.encoder.startswith(UNTRAINED):
        raise ValueError(
            f"an untrained encoder ({args.encoder}) has no run folder; say with --out where the score goes"
        )
    folder = Path(args.encoder) / "evaluate"
    compute = getattr(args.config, "compute", None)
    if compute is None or compute.cache is not None:
        return folder / args.benchmark, args.config
    shared = replace(compute, cache=folder / "features")
    return folder / args.benchmark, replace(args.config, compute=shared)


def _shower(stack: ExitStack, quiet: bool) -> Callable[[str, int, int, str], None]:
    """A callback that shows one piece of work after the other."""
    shown: dict[str, Progress] = {}

    def show(what: str, done: int, total: int, unit: str) -> None:
        if what not in shown:
            stack.close()
            shown[what] = stack.enter_context(Progress(what, total, unit, quiet=quiet))
        shown[what](done, total)

    return show
