"""What the benchmarks of frozen features share: both splits, what the encoder says of them, and the facts to report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clipmill.models.encoder import Encoder
from clipmill.pipeline.config import to_json
from clipmill.pipeline.record import ShardIndex
from clipmill.tools.evaluate.evaluator import Progress
from clipmill.tools.evaluate.features import Compute, Features, extract
from clipmill.tools.evaluate.opening import encoder_digest, stored_audio_view
from clipmill.tools.evaluate.splits import Splits, class_names, split
from clipmill.tools.evaluate.views import EvalPlan, Views, eval_views


class DataOptions(Protocol):
    """The part of a benchmark's ``Config`` that says what is read and how."""

    @property
    def views(self) -> Views: ...  # noqa: D102

    @property
    def splits(self) -> Splits: ...  # noqa: D102

    @property
    def compute(self) -> Compute: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Features of the training and the test split, and what a report says about where they come from."""

    train: ShardIndex
    test: ShardIndex
    seen: Features
    unseen: Features
    classes: list[str]
    settings: dict[str, Any]
    digests: dict[str, str]


def frozen_features(
    encoder: Encoder, root: Path, out: Path, config: DataOptions, *, keep_views: bool, progress: Progress
) -> Frozen:
    """Extract both splits, through the cache. keep_views: see `extract`."""
    train, test = split(root, config.splits)
    plan = eval_views(encoder.spec, config.views, stored_audio_view(encoder))
    cache = config.compute.cache or out / "features"

    def features(part: ShardIndex, what: str) -> Features:
        return extract(
            encoder, part, plan, config.compute, keep_views=keep_views, cache=cache, what=what, progress=progress
        )

    if config.splits.official:  # all of them share the features
        whole = features(ShardIndex.open(root), "features")
        seen, unseen = whole.of(train), whole.of(test)
    else:
        seen, unseen = features(train, "features of train"), features(test, "features of test")
    return Frozen(
        train=train,
        test=test,
        seen=seen,
        unseen=unseen,
        classes=class_names(train, test),
        settings=settings(config, plan, train, test),
        digests=digests(encoder, root, train, test),
    )


def settings(config: DataOptions, plan: EvalPlan, train: ShardIndex, test: ShardIndex) -> dict[str, Any]:
    """What decides the numbers: options, the views they led to, and how many records there were."""
    options = to_json(config)
    compute = options.pop("compute")
    return {
        "config": options | {"precision": compute["precision"], "decoder": compute["decoder"]},
        "views": repr(plan.planner),
        "views_per_record": f"{plan.crops} per window" if plan.overlap else plan.num_views,
        "train_records": len(train),
        "test_records": len(test),
    }


def digests(encoder: Encoder, root: Path, train: ShardIndex, test: ShardIndex) -> dict[str, str]:
    """Names of the data, of both splits and of the encoder."""
    data = ShardIndex.open(root).digest
    return {"data": data, "train": train.digest, "test": test.digest, "encoder": encoder_digest(encoder)}
