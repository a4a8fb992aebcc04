"""`pack`: a corpus through an engine into shards, alone or as one task of several; resumption, and the last step.

Shards are cut in corpus order, before anything is opened, and every shard is written in that order; so neither the
engine, the number of workers, a division into tasks nor an interruption changes a byte.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from clipmill.datasets.source import Corpus, CorpusError
from clipmill.pipeline.pack import folder, write
from clipmill.pipeline.pack.engine import Engine, Failure
from clipmill.pipeline.pack.engine_local import LocalEngine, cores
from clipmill.pipeline.pack.outcome import Result
from clipmill.pipeline.pack.plan import (
    PLAN_FILE,
    PLAN_VERSION,
    PackError,
    Plan,
    Share,
    compare,
    fingerprint_of,
    make_plan,
    size_of,
)
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.task import Task, pack_source, remove_payloads

OnProgress = Callable[[int, int, int, int, int], object]


@dataclass(frozen=True, slots=True)
class Summary:
    """out: the data set. counts: sources by ok, salvaged, rejected, duplicate. reasons: rejected ones by reason.
    already: it was finished before."""

    out: Path
    counts: dict[str, int]
    reasons: dict[str, int]
    already: bool


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
    share: Share | None = None,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Pack a corpus into the folder ``out``; continue or confirm what earlier calls with the same arguments began.

    root: sources are recorded relative to it. workers: processes, 0 = one per core. timeout_s, memory_gb: limits per
    source and worker. engine: runs the work instead of local processes. share: pack only the shards of this task, and
    leave the last step to `finish`; the summary is of them. on_progress: called with (sources done, of, packed,
    rejected, bytes written). Raises PackError, CorpusError and OSError (a full disk); what is finished by then stays,
    and the same call continues.
    """
    work = _Work(corpus, out, settings, root)
    finished = work.finished()
    if finished is not None:
        return finished
    engine = engine or LocalEngine(workers=workers or cores(), timeout_s=timeout_s, memory_gb=memory_gb)
    created = not out.exists()
    with folder.owned(out, share):
        finished = work.finished()  # by a process that was at work until now
        if finished is not None:
            return finished
        if share is None:
            folder.clean(out)
        with folder.planning(out):
            plan = make_plan(out, corpus, work.sizes, settings, work.fingerprint, engine)
        shards = range(len(plan.stops))
        if share is not None:
            shards = share.shards(len(shards))
            folder.clean(out, share, len(plan.stops))
        job = _Job(work, plan, shards, share, on_progress)
        job.run(engine)
        if share is None:
            return work.merge(plan, created)
        counts = {name: job.counts[name] for name in ("ok", "salvaged", "rejected")}
        return Summary(out, counts, dict(_reasons(out, shards).most_common()), already=False)


def finish(corpus: Corpus, out: Path, settings: PackSettings, *, root: Path | None = None) -> Summary:
    """The last step after all tasks: make one data set of the shards in ``out``, byte for byte that of a plain `pack`.

    Raises PackError if shards are missing, and says which tasks have to pack them.
    """
    work = _Work(corpus, out, settings, root)
    finished = work.finished()
    if finished is not None:
        return finished
    _check_begun(out)
    with folder.owned(out):
        finished = work.finished()
        if finished is not None:
            return finished
        _check_begun(out)  # it may have come to nothing meanwhile
        plan = make_plan(out, corpus, work.sizes, settings, work.fingerprint, _no_engine)
        missing = [number for number in range(len(plan.stops)) if not write.done_folder(out, number).is_dir()]
        if missing:
            raise PackError(_missing(out, missing, len(plan.stops)))
        folder.clean(out)
        return work.merge(plan, created=False)


class _Work:
    """A data set in the making: of what, how, where."""

    def __init__(self, corpus: Corpus, out: Path, settings: PackSettings, root: Path | None) -> None:
        if not corpus.sources:
            raise CorpusError("the corpus has no source; name a folder or list with media in it")
        self.corpus = corpus
        self.out = out
        self.settings = settings
        self.sizes = [size_of(source.path) for source in corpus.sources]
        self.names = [_recorded(source.path, root) for source in corpus.sources]
        self.fingerprint = fingerprint_of(corpus, self.sizes, settings)

    def finished(self) -> Summary | None:
        """The summary if it was finished before; PackError if something else was."""
        path = self.out / write.DATASET_FILE
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            settings = {"profile": data["profile"], **data["settings"]}
            old = {"version": PLAN_VERSION, "corpus": data["corpus"], "sources": data["sources"], "settings": settings}
        except (ValueError, KeyError, TypeError) as error:
            raise PackError(f"{path}: damaged; remove {self.out} and pack again") from error
        compare(self.out, old, self.fingerprint, "was packed")
        folder.clear(self.out)
        return _summary(self.out, already=True)

    def merge(self, plan: Plan, created: bool) -> Summary:
        """Make the data set of its finished shards."""
        shards = range(len(plan.stops))
        counts = sum((Counter(_shard(self.out, number)["counts"]) for number in shards), Counter())
        if not counts["ok"] + counts["salvaged"]:
            reasons = _reasons(self.out, shards)
            folder.undo(self.out, created)
            raise PackError(
                f"{self.out}: nothing could be packed; of {len(self.corpus.sources)} sources {_listed(reasons)}"
            )
        duplicates = [self._duplicate(number, first) for number, first in plan.duplicates.items()]
        facts = {"sources": len(self.corpus.sources), "corpus": self.fingerprint["corpus"]}
        about = write.about_settings(self.settings) | facts
        write.finish(self.out, shards, duplicates, self.corpus, about)
        folder.clear(self.out)
        return _summary(self.out, already=False)

    def _duplicate(self, number: int, first: int) -> write.Row:
        detail = f"same content as {self.corpus.sources[first].key}"
        result = Result(number=number, status="rejected", reason="duplicate", detail=detail)
        return write.Row(number, self.corpus.sources[number], self.names[number], result)


class _Job:
    """Sources on their way through the engine into shards."""

    def __init__(
        self, work: _Work, plan: Plan, shards: Sequence[int], share: Share | None, on_progress: OnProgress | None
    ) -> None:
        self._work = work
        self._plan = plan
        self._shards = shards
        self._on_progress = on_progress
        self._payloads = work.out / write.WORK_FOLDER / f"{folder.run_name(share)}-{token_hex(4)}"
        self._total = sum(len(plan.shard(number)) for number in shards)
        self._open: dict[int, tuple[set[int], list[write.Row]]] = {}
        self.counts: Counter[str] = Counter()
        self._shard_of: dict[int, int] = {}

    def run(self, engine: Engine) -> None:
        """Pack every source of every shard that is not finished."""
        pending = []
        for number in self._shards:
            if write.done_folder(self._work.out, number).is_dir():
                done = _shard(self._work.out, number)
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
                        remove_payloads(task)
                        answer = Result(
                            number=task.number, status="rejected", reason=answer.reason, detail=answer.detail
                        )
                    self._take(answer)
            assert not self._open
        finally:
            folder.remove_tree(self._payloads)

    def _tasks(self, shards: Sequence[int]) -> Iterator[Task]:
        for shard in shards:
            numbers = self._plan.shard(shard)
            self._open[shard] = (set(numbers), [])
            self._shard_of.update(dict.fromkeys(numbers, shard))
            if not numbers:
                self._close(shard)
            for number in numbers:
                source = self._work.corpus.sources[number]
                yield Task(
                    number=number,
                    path=os.path.abspath(source.path),  # a worker may stand in another folder
                    stem=os.path.abspath(self._payloads / f"{number:08d}-"),
                    settings=self._work.settings,
                    start_s=source.start_s,
                    end_s=source.end_s,
                )

    def _take(self, result: Result) -> None:
        number = result.number
        shard = self._shard_of.pop(number)
        waiting, rows = self._open[shard]
        waiting.remove(number)
        rows.append(write.Row(number, self._work.corpus.sources[number], self._work.names[number], result))
        self.counts[result.status] += 1
        if not waiting:
            self._close(shard)
        self._report()

    def _close(self, shard: int) -> None:
        _, rows = self._open.pop(shard)
        rows.sort(key=lambda row: row.number)
        self.counts["bytes"] += write.write_shard(self._work.out, shard, rows, self._work.corpus)["bytes"]

    def _report(self) -> None:
        if self._on_progress is not None:
            packed, rejected = self.counts["ok"] + self.counts["salvaged"], self.counts["rejected"]
            self._on_progress(packed + rejected, self._total, packed, rejected, self.counts["bytes"])


def _check_begun(out: Path) -> None:
    if not (out / write.WORK_FOLDER / PLAN_FILE).is_file():
        raise PackError(f"{out}: nothing has been packed there yet; run `clipmill pack` with --task 1/N to N/N first")


def _no_engine(run_task: object, tasks: object) -> Any:
    raise AssertionError("the plan is there, so that nothing is left to run")


def _shard(out: Path, number: int) -> dict[str, Any]:
    """What is known of a finished shard."""
    return json.loads((write.done_folder(out, number) / "shard.json").read_text())


def _reasons(out: Path, shards: Sequence[int]) -> Counter[str]:
    """Rejected sources of finished shards by reason."""
    found: Counter[str] = Counter()
    for number in shards:
        path = write.done_folder(out, number) / write.REJECTS_FILE
        found.update(json.loads(line)["reason"] for line in path.read_text().splitlines())
    return found


def _missing(out: Path, missing: Sequence[int], count: int) -> str:
    """Who has to pack the shards that are not there."""
    names = ", ".join(str(number) for number in missing[:10]) + (", ..." if len(missing) > 10 else "")
    what = f"{out}: {len(missing)} of {count} shards are missing ({names})"
    seen = folder.shares(out)
    if not seen:
        return f"{what}; run `clipmill pack` again without --finish"
    of = seen[-1].of
    tasks = sorted({number % of + 1 for number in missing})
    shown = ", ".join(f"{number}/{of}" for number in tasks[:10]) + (", ..." if len(tasks) > 10 else "")
    return f"{what}; run `clipmill pack` again with --task {shown}"


def _summary(out: Path, *, already: bool) -> Summary:
    counts = json.loads((out / write.DATASET_FILE).read_text())["counts"]
    rows = (out / write.REJECTS_FILE).read_text().splitlines()
    reasons = Counter(json.loads(row)["reason"] for row in rows)
    return Summary(out, counts, dict(reasons.most_common()), already)


def _recorded(path: str, root: Path | None) -> str:
    """A path as text: below root if it is there, and valid Unicode."""
    if root is not None:
        relative = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
        path = path if relative.startswith("..") else relative
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _listed(reasons: Counter[str]) -> str:
    return "were rejected: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
