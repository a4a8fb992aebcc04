"""``clipmill synth``: synthetic corpora whose motion, sound, masks and boxes are known."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from clipmill.tools.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make a synthetic corpus: real media files in the layout of a known data set.

    Labelled clips show an object moving over a moving background. A class is a motion pattern and a rhythm; both can
    be seen and heard, and neither can be told from one frame. The same options make the same bytes.
    """

    out: Positional[Path]
    """Folder to write to; a run that was interrupted is finished by the same command."""
    kind: Literal["kinetics", "ucf101", "folder", "images", "davis", "otb", "all"] = "kinetics"
    """Layout: kinetics (CSV lists, mp4), ucf101 (split lists, avi), folder (class folders, five containers),
    images (class folders of JPEG and PNG), davis (masks), otb (boxes), or all of them in sub-folders."""
    clips: int = 192
    """Labelled videos."""
    classes: Annotated[tuple[int, int], "motions x rhythms"] = (4, 2)
    """Number of motion patterns (1-6) and of rhythms (1-5); there are as many classes as their product."""
    size: int = 112
    """Short side of clips and images in pixels, at most; it varies down to 0.8 of it."""
    seconds: float = 2.5
    """Mean length of a clip in seconds; it varies by 15 %."""
    looks: int = 8
    """Different textures of objects and of backgrounds; with few, looks do not tell clips apart. For images,
    backgrounds alone."""
    images: int = 300
    """Pictures of the image folder."""
    sequences: int = 6
    """Sequences with masks or boxes."""
    frames: int = 40
    """Frames of each sequence."""
    frame_size: int = 192
    """Short side of the sequences in pixels."""
    objects: int = 3
    """Most objects in one sequence (1-5)."""
    seed: int = 0
    """Another seed makes another corpus."""
    processes: int = 0
    """Worker processes; 0 = one per core. The result does not depend on it."""
    json: bool = False
    """Print what was made as one line of JSON."""


def main(args: Args) -> int:
    """Write the corpus and say what lies where."""
    import json

    from clipmill.datasets.synthetic_write import Settings, write

    if args.processes < 0:
        raise ValueError(f"--processes must be 0 or more, got {args.processes}")
    motions, rhythms = args.classes
    shared = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if name not in ("motions", "rhythms")}
    settings = Settings(motions=motions, rhythms=rhythms, **shared)
    with Progress("synth", unit="items", quiet=args.json) as progress:
        write(args.out, args.kind, settings, processes=args.processes or _cores(), progress=progress)
    files = [path for path in args.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if args.json:
        print(json.dumps({"out": str(args.out), "kind": args.kind, "files": len(files), "bytes": size}))
    else:
        print(f"{args.out}: {args.kind} corpus, {len(files)} files, {size / 1e6:.1f} MB")
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
