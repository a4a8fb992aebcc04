"""Raw corpora where a packed data set is wanted: packed into the cache first, once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from clipmill.datasets.files import IMAGE_SUFFIXES, MEDIA_SUFFIXES, find
from clipmill.pipeline.pack.plan import fingerprint_of, size_of
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import INDEX_FILE
from clipmill.pipeline.remote import cache_folder
from clipmill.tools import pack as command
from clipmill.tools.progress import Progress


def packed(data: Path, *, cache_dir: Path | None = None, quiet: bool = False) -> Path:
    """The data set folder for ``data``: itself, or for a folder of media what `clipmill pack` makes of it.

    That lies in ``packed`` of the cache folder, under a name of its own for every state of the corpus, so that it is
    packed again only when a file or a list changed. Interrupted packing is continued. A folder that is neither comes
    back as it is. Sources that cannot be packed are counted on stderr.
    """
    if not data.is_dir() or (data / INDEX_FILE).exists() or not find(data, MEDIA_SUFFIXES | IMAGE_SUFFIXES):
        return data
    corpus = command.read_corpus(command.Args(source=data, out=data))
    settings = PackSettings()
    sizes = [size_of(source.path) for source in corpus.sources]
    changed = [
        os.stat(source.path).st_mtime_ns for source, size in zip(corpus.sources, sizes, strict=True) if size >= 0
    ]
    facts = [str(data.resolve()), fingerprint_of(corpus, sizes, settings), changed]
    name = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    out = cache_folder(cache_dir) / "packed" / f"{data.resolve().name}-{name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with Progress(f"pack {data}", unit="files", quiet=quiet) as progress:
        summary = pack(corpus, out, settings, root=data, on_progress=lambda done, total, *_: progress(done, total))
    lost = summary.counts.get("rejected", 0)
    if lost:
        print(f"{data}: {lost} of {sum(summary.counts.values())} files cannot be used, see {out / 'rejects.jsonl'}",
              file=sys.stderr)  # fmt: skip
    return out
