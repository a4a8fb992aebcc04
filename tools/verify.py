"""``clipmill verify``: check every byte, and if wanted every frame, of a packed data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from clipmill.tools.data_set import DataSet


@dataclass(frozen=True, kw_only=True)
class Args:
    """Check a packed data set against itself: shard digests, every packet and sound block, index and lists.

    Every problem is listed; the exit code is 0 only when there is none.
    """

    dataset: Positional[DataSet]
    """Folder made by `clipmill pack`, or the URL of one; then each shard is fetched to --cache-dir while it is read."""
    decode: bool = False
    """Decode every frame too."""
    workers: int = 0
    """Worker processes; 0 = one per core."""
    timeout_s: float = 3600.0
    """Seconds that one shard may take."""
    cache_dir: Path | None = None
    """Folder for what is fetched of a data set at a URL; default $CLIPMILL_CACHE, else ~/.cache/clipmill."""
    json: bool = False
    """Print the outcome as one line of JSON and no progress."""


def main(args: Args) -> int:
    """Check, and print every problem."""
    import json

    from clipmill.pipeline.pack.audit import audit
    from clipmill.pipeline.pack.engine_local import LocalEngine, cores
    from clipmill.pipeline.pack.write import MANIFEST_FILE, REJECTS_FILE
    from clipmill.pipeline.remote import data_folder
    from clipmill.tools.progress import Progress

    if args.workers < 0:
        raise ValueError(f"--workers must be 0 or more, got {args.workers}")
    engine = LocalEngine(workers=args.workers or cores(), timeout_s=args.timeout_s, memory_gb=8.0)
    with Progress("verify", unit="shards", quiet=args.json) as progress:
        root = data_folder(args.dataset, cache_dir=args.cache_dir, also=(MANIFEST_FILE, REJECTS_FILE))
        problems = audit(root, engine, decode=args.decode, on_progress=progress)
    if args.json:
        rows = [{"where": problem.where, "what": problem.what} for problem in problems]
        print(json.dumps({"dataset": str(args.dataset), "problems": rows}))
    else:
        for problem in problems:
            print(f"{problem.where}: {problem.what}")
        print(f"{args.dataset}: {f'{len(problems)} problems' if problems else 'no problem found'}")
    return 1 if problems else 0
