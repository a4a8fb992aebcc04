"""`pack`: the plan of a data set, the engine at work on it, resumption, and the last step.

Shards are cut in corpus order, before anything is opened, and every shard is written in that order; so neither the
number of workers nor an interruption changes a byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill.datasets.source import Corpus, CorpusError, Source
from clipmill.pipeline.pack import write
from clipmill.pipeline.pack.engine import Engine, Failure
from clipmill.pipeline.pack.engine_local import LocalEngine, cores
from clipmill.pipeline.pack.outcome import Rejected, Result
from clipmill.pipeline.pack.probe import Media
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.task import Task, pack_source, remove_payload

OnProgress = Callable[[int, int, int, int, int], object]

_PLAN_FILE = "plan.json"
_PLAN_VERSION = 1
_PART_BYTES_PER_S = 1_000_000  # guessed size of a part of a long file


class PackError(ValueError):
    """Nothing could be packed, or the output folder belongs to something else."""


@dataclass(frozen=True, slots=True)
class Summary:
    """out: the data set. counts: sources by ok, salvaged, rejected, duplicate. reasons: rejected ones by reason.
    already: it was finished before."""

    out: Path
    counts: dict[str, int]
    reasons: dict[str, int]
    already: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decided before the first source is opened: where shards end, and which sources repeat another."""

    corpus: str
    stops: list[int]
    duplicates: dict[int, int]

    def shard(self, number: int) -> list[int]:
        """Numbers of the sources of one shard."""
        first = self.stops[number - 1] if number else 0
        return [source for source in range(first, self.stops[number]) if source not in self.duplicates]


def pack(
    corpus: Corpus,
    out: Path,
    settings: PackSettings,
    *,
    root: Path | None = None,
    workers: int = 0,
    timeout_s: float = 3600.0,
    memory_gb: float = 8.0,
    engine: Engine | None = None,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Pack a corpus into the folder ``out``; continue or confirm what an earlier call with the same arguments began.

    root: sources are recorded relative to it. workers: processes, 0 = one per core. timeout_s, memory_gb: limits per
    source and worker. engine: runs the work instead of local processes. on_progress: called with (sources done, of,
    packed, rejected, bytes written). Raises PackError, CorpusError and OSError (a full disk); what is finished by then
    stays, and the same call continues.
    """
    if not corpus.sources:
        raise CorpusError("the corpus has no source; name a folder or list with media in it")
    sizes = [size_of(source.path) for source in corpus.sources]
    fingerprint = _fingerprint(corpus, sizes, settings)
    about = write.about_settings(settings) | {"sources": len(corpus.sources), "corpus": fingerprint["corpus"]}
    finished = _finished(out, fingerprint)
    if finished is not None:
        return finished
    engine = engine or LocalEngine(workers=workers or cores(), timeout_s=timeout_s, memory_gb=memory_gb)
    created = not out.exists()
    with _locked(out, created):
        finished = _finished(out, fingerprint)  # by a process that held the lock until now
        if finished is not None:
            return finished
        write.clean(out)
        plan = _plan(out, corpus, sizes, settings, fingerprint, engine)
        names = [_recorded(source.path, root) for source in corpus.sources]
        job = _Job(corpus, out, settings, plan, names, on_progress)
        job.run(engine)
        if not job.counts["ok"] + job.counts["salvaged"]:
            reasons = job.reasons()
            _undo(out, created)
            raise PackError(f"{out}: nothing could be packed; of {len(corpus.sources)} sources {_listed(reasons)}")
        duplicates = [job.duplicate(number) for number in plan.duplicates]
        write.finish(out, range(len(plan.stops)), duplicates, corpus, about)
        _clear(out)
    return _summary(out, already=False)


class _Job:
    """The sources on their way through the engine into shards."""

    def __init__(
        self,
        corpus: Corpus,
        out: Path,
        settings: PackSettings,
        plan: Plan,
        names: Sequence[str],
        on_progress: OnProgress | None,
    ) -> None:
        self._corpus = corpus
        self._out = out
        self._settings = settings
        self._plan = plan
        self._names = names
        self._on_progress = on_progress
        self._payloads = out / write.WORK_FOLDER / f"run-{os.getpid()}"
        self._open: dict[int, tuple[set[int], list[write.Row]]] = {}
        self.counts: Counter[str] = Counter()
        self._shard_of: dict[int, int] = {}

    def run(self, engine: Engine) -> None:
        """Pack every source of every shard that is not finished."""
        pending = []
        for number in range(len(self._plan.stops)):
            if write.done_folder(self._out, number).is_dir():
                done = json.loads((write.done_folder(self._out, number) / "shard.json").read_text())
                self.counts.update(done["counts"])
                self.counts["bytes"] += done["shard"]["bytes"] if done["shard"] else 0
            else:
                pending.append(number)
        self._report()
        self._payloads.mkdir()
        try:
            with closing(engine(pack_source, self._tasks(pending))) as answers:
                for task, answer in answers:
                    if isinstance(answer, Failure):
                        remove_payload(task)
                        answer = Result(
                            number=task.number, status="rejected", reason=answer.reason, detail=answer.detail
                        )
                    self._take(answer)
            assert not self._open
        finally:
            shutil.rmtree(self._payloads)

    def duplicate(self, number: int) -> write.Row:
        """The row of a source that repeats another."""
        first = self._corpus.sources[self._plan.duplicates[number]]
        result = Result(number=number, status="rejected", reason="duplicate", detail=f"same content as {first.key}")
        return write.Row(number, self._corpus.sources[number], self._names[number], result)

    def reasons(self) -> Counter[str]:
        """Rejected sources by reason."""
        found: Counter[str] = Counter()
        for number in range(len(self._plan.stops)):
            path = write.done_folder(self._out, number) / write.REJECTS_FILE
            found.update(json.loads(line)["reason"] for line in path.read_text().splitlines())
        return found

    def _tasks(self, shards: Sequence[int]) -> Iterator[Task]:
        for shard in shards:
            numbers = self._plan.shard(shard)
            self._open[shard] = (set(numbers), [])
            self._shard_of.update(dict.fromkeys(numbers, shard))
            if not numbers:
                self._close(shard)
            for number in numbers:
                source = self._corpus.sources[number]
                yield Task(
                    number=number,
                    path=source.path,
                    stem=str(self._payloads / f"{number:08d}"),
                    settings=self._settings,
                    start_s=source.start_s,
                    end_s=source.end_s,
                )

    def _take(self, result: Result) -> None:
        number = result.number
        shard = self._shard_of.pop(number)
        waiting, rows = self._open[shard]
        waiting.remove(number)
        rows.append(write.Row(number, self._corpus.sources[number], self._names[number], result))
        self.counts[result.status] += 1
        if not waiting:
            self._close(shard)
        self._report()

    def _close(self, shard: int) -> None:
        _, rows = self._open.pop(shard)
        rows.sort(key=lambda row: row.number)
        self.counts["bytes"] += write.write_shard(self._out, shard, rows, self._corpus)["bytes"]

    def _report(self) -> None:
        if self._on_progress is not None:
            packed, rejected = self.counts["ok"] + self.counts["salvaged"], self.counts["rejected"]
            total = len(self._corpus.sources) - len(self._plan.duplicates)
            self._on_progress(packed + rejected, total, packed, rejected, self.counts["bytes"])


def digest_source(path: str) -> str:
    """The content digest of a file as hex, or nothing for what cannot be read; runs in a worker."""
    try:
        with Media(path) as media:
            return media.digest().hex()
    except Rejected:
        return ""


def _duplicates(sources: Sequence[Source], sizes: Sequence[int], engine: Engine) -> dict[int, int]:
    """Sources with the same content and part as an earlier one. Only files of equal size are read for it."""
    by_size: dict[tuple, list[int]] = {}
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if size > 0:
            by_size.setdefault((size, source.start_s, source.end_s), []).append(number)
    groups = [numbers for numbers in by_size.values() if len(numbers) > 1]
    paths = list(dict.fromkeys(sources[number].path for numbers in groups for number in numbers))
    digests = {path: answer for path, answer in engine(digest_source, paths) if isinstance(answer, str)}
    found: dict[int, int] = {}
    for numbers in groups:
        first: dict[str, int] = {}
        for number in numbers:
            digest = digests.get(sources[number].path)
            if digest and first.setdefault(digest, number) != number:
                found[number] = first[digest]
    return dict(sorted(found.items()))


def _stops(sources: Sequence[Source], sizes: Sequence[int], settings: PackSettings) -> list[int]:
    """Where shards end: after so many sources, or so many bytes of source files."""
    stops, clips, size = [], 0, 0.0
    for number, source in enumerate(sources):
        part = max(sizes[number], 0)
        if source.end_s is not None:
            part = min(part, (source.end_s - (source.start_s or 0)) * _PART_BYTES_PER_S)
        if clips and (clips == settings.shard_clips or size + part > settings.shard_gb * 1e9):
            stops.append(number)
            clips, size = 0, 0.0
        clips, size = clips + 1, size + part
    return [*stops, len(sources)]


def _plan(
    out: Path,
    corpus: Corpus,
    sizes: Sequence[int],
    settings: PackSettings,
    fingerprint: dict[str, Any],
    engine: Engine,
) -> Plan:
    path = out / write.WORK_FOLDER / _PLAN_FILE
    if path.is_file():
        saved = json.loads(path.read_text())
        _compare(out, saved["fingerprint"], fingerprint, "began to be packed")
        return Plan(fingerprint["corpus"], saved["stops"], {int(k): v for k, v in saved["duplicates"].items()})
    duplicates = _duplicates(corpus.sources, sizes, engine)
    plan = Plan(fingerprint["corpus"], _stops(corpus.sources, sizes, settings), duplicates)
    (out / write.WORK_FOLDER / "done").mkdir(exist_ok=True)
    write.write_json(path, {"fingerprint": fingerprint, "stops": plan.stops, "duplicates": plan.duplicates})
    return plan


def _fingerprint(corpus: Corpus, sizes: Sequence[int], settings: PackSettings) -> dict[str, Any]:
    """What must not change between two calls for the same folder."""
    state = hashlib.blake2b(digest_size=16)
    for source, size in zip(corpus.sources, sizes, strict=True):
        row = (source.key, source.label, source.labels, source.split, source.start_s, source.end_s, size)
        state.update(json.dumps([*row, dict(source.extra)], default=str).encode())
    state.update(json.dumps([corpus.classes, corpus.missing]).encode())
    return {
        "version": _PLAN_VERSION,
        "corpus": state.hexdigest(),
        "sources": len(corpus.sources),
        "settings": settings.to_json(),
    }


def _compare(out: Path, old: dict[str, Any], new: dict[str, Any], how: str) -> None:
    """Raise PackError unless both fingerprints are the same."""
    if old == new:
        return
    remedy = "choose another output folder or remove this one"
    before, now = old["settings"], new["settings"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise PackError(f"{out}: {how} with {name} = {before.get(name)}, not {now.get(name)}; {remedy}")
    raise PackError(
        f"{out}: {how} from other sources ({old['sources']} then, {new['sources']} now, or other names, labels or file "
        f"sizes); {remedy}"
    )


def _finished(out: Path, fingerprint: dict[str, Any]) -> Summary | None:
    path = out / write.DATASET_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        settings = {"profile": data["profile"], **data["settings"]}
        old = {"version": _PLAN_VERSION, "corpus": data["corpus"], "sources": data["sources"], "settings": settings}
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"{path}: damaged; remove {out} and pack again") from error
    _compare(out, old, fingerprint, "was packed")
    _clear(out)
    return _summary(out, already=True)


def _summary(out: Path, *, already: bool) -> Summary:
    counts = json.loads((out / write.DATASET_FILE).read_text())["counts"]
    rows = (out / write.REJECTS_FILE).read_text().splitlines()
    reasons = Counter(json.loads(row)["reason"] for row in rows)
    return Summary(out, counts, dict(reasons.most_common()), already)


@contextmanager
def _locked(out: Path, created: bool) -> Iterator[None]:
    """Own the output folder; it must be new, empty or one that an interrupted call began."""
    work = out / write.WORK_FOLDER
    if not created:
        if not out.is_dir():
            raise PackError(f"{out}: is not a folder; choose another output folder")
        if not work.is_dir() and any(out.iterdir()):
            raise PackError(f"{out}: holds something else already; choose a new or empty output folder")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PackError(f"{out}: another `clipmill pack` is writing there; wait for it") from error
        yield


def _clear(out: Path) -> None:
    """Remove the work folder of a finished data set."""
    work = out / write.WORK_FOLDER
    if work.is_dir():
        shutil.rmtree(work)


def _undo(out: Path, created: bool) -> None:
    """Remove everything of a data set that came to nothing."""
    _clear(out)
    if created:
        with suppress(OSError):
            out.rmdir()


def size_of(path: str) -> int:
    """Bytes of a file, -1 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _recorded(path: str, root: Path | None) -> str:
    """A path as text: below root if it is there, and valid Unicode."""
    if root is not None:
        relative = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
        path = path if relative.startswith("..") else relative
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _listed(reasons: Counter[str]) -> str:
    return "were rejected: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
