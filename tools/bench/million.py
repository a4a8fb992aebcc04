"""The index track: an index of many records, written bit by bit, opened and used by a process that only loads.

And the order of its epochs on many ranks: every record once, equal shares, and any position at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from clipmill.pipeline.index_file import write_index
from clipmill.pipeline.record import INDEX_FILE, ShardIndex, VideoRecord, uid_of
from clipmill.tools.bench.memory import status_mb

_FEW = 1000


class Repeated(Sequence[VideoRecord]):
    """``count`` records that differ in their names only and are made when they are looked at.

    All of them lie at the bytes of the records of ``index``, so they can be decoded. frames: the first so many of each.
    """

    def __init__(self, index: ShardIndex, count: int, frames: int) -> None:
        self._models = [_shortened(record, frames) for record in index]
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> VideoRecord: ...
    @overload
    def __getitem__(self, place: slice) -> list[VideoRecord]: ...
    def __getitem__(self, place: int | slice) -> VideoRecord | list[VideoRecord]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(self._count))]
        key = f"class {place % 400}/video {place:09d}"
        return replace(self._models[place % len(self._models)], index=place, uid=uid_of(key), key=key, source=key)

    def __iter__(self) -> Iterator[VideoRecord]:
        return (self[number] for number in range(self._count))


def _shortened(record: VideoRecord, frames: int) -> VideoRecord:
    frames = min(frames, record.num_frames)
    keys = record.keyframes[record.keyframes < frames]
    sizes, crcs = record.packet_sizes[:frames], record.packet_crcs[:frames]
    shard = Path(record.shard).name
    return replace(
        record, shard=shard, num_frames=frames, packet_sizes=sizes, packet_crcs=crcs, keyframes=keys, label=-1
    )


def measure(index: ShardIndex, folder: Path, count: int, frames: int) -> dict[str, Any]:
    """Write an index of ``count`` records into ``folder`` and let a fresh process open and use it."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in index.shards:
        link = folder / shard.name
        if not link.exists():
            link.symlink_to(shard.resolve())
    shards = [path.name for path in index.shards]
    write_index(folder / INDEX_FILE, Repeated(index, _FEW, frames), shards, [])
    few = _trials(folder)
    start_s = time.perf_counter()
    write_index(folder / INDEX_FILE, Repeated(index, count, frames), shards, [])
    facts: dict[str, Any] = {"records": count, "frames_per_record": frames, "write_s": time.perf_counter() - start_s}
    facts["file_mb"] = (folder / INDEX_FILE).stat().st_size / 1e6
    facts |= _trials(folder)
    (folder / INDEX_FILE).unlink()
    facts["same_with_few_mb"] = few["resident_mb"]  # the program and its first batches
    facts["index_mb"] = facts["resident_mb"] - few["resident_mb"]
    return facts | order_of(count)


def _trials(folder: Path) -> dict[str, float]:
    """What `use` says in five fresh processes, medians."""
    command = [sys.executable, "-m", "clipmill.tools.bench.million", str(folder)]
    trials = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    return {name: sorted(trial[name] for trial in trials)[2] for name in trials[0]}


def order_of(records: int, world: int = 1024, batch: int = 8) -> dict[str, Any]:
    """An epoch of ``records`` on ``world`` ranks: who sees what, and what it costs.

    A rank's shares are those of the loader: of every global batch of world x batch positions its own block.
    """
    import numpy as np

    from clipmill.pipeline.order import Order

    order = Order(num_records=records, seed=1)
    whole = records // (world * batch) * (world * batch)
    seen, ranks_s = np.zeros(records, np.uint8), []
    shares = np.zeros(world, np.int64)
    for rank in range(world):
        start_s = time.perf_counter()
        firsts = np.arange(rank * batch, whole, world * batch)
        mine = order.records(3, (firsts[:, None] + np.arange(batch)).reshape(-1))
        ranks_s.append(time.perf_counter() - start_s)
        np.add.at(seen, mine, 1)
        shares[rank] = len(mine)
    rest = order.records(3, np.arange(whole, records))
    np.add.at(seen, rest, 1)
    start_s = time.perf_counter()
    positions = np.random.default_rng(0).integers(0, max(whole - batch, 1), 256)
    for position in positions.tolist():
        order.records(3, np.arange(position, min(position + batch, records)))
    return {
        "ranks": world,
        "seen_once": bool((seen == 1).all()),  # disjoint and complete
        "share_min": int(shares.min()),
        "share_max": int(shares.max()),
        "left_over": len(rest),
        "rank_epoch_s": sorted(ranks_s)[world // 2],
        "resume_s": (time.perf_counter() - start_s) / len(positions),
    }


def use(folder: Path) -> dict[str, float]:
    """Open an index, make the first batch of a shuffled epoch, and say how long that took and how much memory."""
    import numpy as np

    from clipmill.pipeline.fill import Engine
    from clipmill.pipeline.order import Order
    from clipmill.pipeline.slot import Job, Shape, Slot
    from clipmill.pipeline.views import Clips, View

    base_mb = status_mb("VmRSS")
    start_s = time.perf_counter()
    index = ShardIndex.open(folder)
    open_s = time.perf_counter() - start_s
    planner = Clips(views=(View(name="clip", num_frames=16),))
    usable = planner.usable(index)
    assert usable.all()
    shape = Shape.of(planner, index[0], 32)
    engine = Engine(index, planner, Order(num_records=len(index), seed=1), shape, threads=1)
    start_s = time.perf_counter()
    engine.submit(Job(0, 0, 32, 0), lambda size: Slot(np.empty(size, np.uint8), shape)).result()
    first_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    for number in range(1, 17):
        engine.submit(Job(0, 32 * number, 32, number), lambda size: Slot(np.empty(size, np.uint8), shape)).result()
    later_s = (time.perf_counter() - start_s) / 16
    engine.close()
    return {
        "open_s": open_s,
        "first_batch_s": open_s + first_s,
        "later_batch_s": later_s,
        "libraries_mb": base_mb,
        "resident_mb": status_mb("VmRSS"),
        "own_mb": status_mb("RssAnon"),
    }


if __name__ == "__main__":
    print(json.dumps(use(Path(sys.argv[1]))))
