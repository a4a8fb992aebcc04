"""XDC and its siblings: labels belong to records, rounds renew heads and nothing else, variants differ as stated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipmill.models.clustering import balance_weights
from clipmill.models.method import EpochContext, recipes
from clipmill.models.methods.xdc import TARGETS, Config, Variant, Xdc, cluster_loss
from clipmill.pipeline.batch import ClipBatch
from clipmill.pipeline.log import read_log
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.ring import LoaderConfig
from clipmill.pipeline.train import TrainConfig, train
from clipmill.pipeline.views import Planner

COUNT = 12


def method_of(variant: Variant = "xdc", **options) -> Xdc:
    config = recipes("xdc")["tiny"].method
    torch.manual_seed(0)
    return Xdc(replace(config, variant=variant, size=32, clusters=3, pca_dim=0, **options))


def corpus(method: Xdc, uids: np.ndarray) -> ClipBatch:
    """A batch of all records, in the order of ``uids``; a record's content follows its uid."""
    clip, sound = method.plan().views
    videos, sounds = [], []
    for uid in uids.tolist():
        rng = torch.Generator().manual_seed(uid)
        videos.append(torch.randn(3, clip.num_frames, 32, 32, generator=rng) + 3 * (uid % 3))
        sounds.append(torch.randn(1, sound.augment.logmel.mels, 101, generator=rng) - 3 * (uid % 4))  # type: ignore[union-attr]
    count = len(uids)
    return ClipBatch(
        video={"clip": torch.stack(videos)},
        audio={"sound": torch.stack(sounds)},
        index=torch.arange(count),
        uid=torch.from_numpy(uids),
        label=torch.full((count,), -1),
    )


def context(method: Xdc, uids: np.ndarray, epoch: int = 0) -> EpochContext:
    @torch.no_grad()
    def collect(_: Planner, function: Callable[[ClipBatch], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        method.eval()
        rows = dict(function(corpus(method, uids)))
        method.train()
        return rows

    torch.manual_seed(7 + epoch)
    return EpochContext(epoch=epoch, num_epochs=8, num_records=len(uids), collect=collect)


UIDS = np.random.default_rng(0).permutation(1000)[:COUNT].astype(np.int64)


@pytest.mark.parametrize("variant", ["xdc", "sdc", "mdc", "cdc"])
def test_heads_and_label_sets_of_the_variants(variant: Variant) -> None:
    method = method_of(variant)
    for modality, targets in TARGETS[variant].items():
        assert len(method.heads[modality]) == len(targets)  # type: ignore[arg-type]
    method.before_epoch(begun := context(method, UIDS))
    assert method.labels.shape == (len(method.sets), COUNT)
    assert {f"kmeans_{name}" for name in method.sets} <= set(begun.log)
    output = method(corpus(method, UIDS))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(sum(output.metrics[f"loss_{m}"].item() for m in ("video", "audio")))


def test_labels_follow_the_record_and_not_its_place() -> None:
    method = method_of()
    method.before_epoch(context(method, UIDS))
    labels = method.labels_of(torch.from_numpy(UIDS))
    order = np.random.default_rng(1).permutation(COUNT)
    assert torch.equal(method.labels_of(torch.from_numpy(UIDS[order])), labels[:, order])
    other = method_of()  # the same records stored in another order
    other.load_state_dict({k: v for k, v in method.state_dict().items() if k not in ("uids", "rows", "labels")}, False)
    rows = torch.from_numpy(UIDS[order])
    other.uids, other.rows = torch.sort(rows)
    other.labels = labels[:, order]
    batch = corpus(method, UIDS[:5])
    assert method(batch).loss.item() == other(batch).loss.item()


def test_labels_are_constants() -> None:
    features = torch.randn(6, 5, requires_grad=True)
    head = torch.nn.Linear(5, 3)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    cluster_loss([head(features)], [target], [torch.ones(3)]).backward()
    assert features.grad is not None
    mine = features.grad.clone()
    features.grad = None
    F.cross_entropy(head(features), target).backward()
    torch.testing.assert_close(mine, features.grad)


def test_equal_partitions_make_xdc_and_sdc_agree() -> None:
    """With the clusters of both modalities equal up to their numbers, relabelled heads give the same loss."""
    torch.manual_seed(0)
    features, video = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    rename = torch.tensor([2, 0, 1])
    audio = rename[video]
    head = torch.nn.Linear(4, 3)
    own = cluster_loss([head(features)], [video], [torch.ones(3)])
    other = torch.nn.Linear(4, 3)
    with torch.no_grad():
        other.weight[rename], other.bias[rename] = head.weight, head.bias
    torch.testing.assert_close(cluster_loss([other(features)], [audio], [torch.ones(3)]), own)


def test_a_second_head_of_weight_0_makes_mdc_sdc() -> None:
    logits = [torch.randn(5, 3), torch.randn(5, 3)]
    labels = [torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 0, 1, 1])]
    ones = [torch.ones(3)] * 2
    alone = cluster_loss(logits[:1], labels[:1], ones[:1])
    torch.testing.assert_close(cluster_loss(logits, labels, ones, 0.0), alone)
    torch.testing.assert_close(cluster_loss(logits, labels, ones), alone + F.cross_entropy(logits[1], labels[1]))


def test_a_round_renews_heads_and_keeps_encoders() -> None:
    method = method_of(epochs_per_round=2)
    method.before_epoch(context(method, UIDS))
    heads = {name: value.clone() for name, value in method.heads.state_dict().items()}
    nets = {name: value.clone() for name, value in method.video.state_dict().items()}
    labels = method.labels.clone()
    method.before_epoch(middle := context(method, UIDS, epoch=1))
    assert all(torch.equal(value, heads[name]) for name, value in method.heads.state_dict().items())
    assert middle.renewed == []
    method.before_epoch(again := context(method, UIDS, epoch=2))
    for name, value in method.heads.state_dict().items():
        assert (value == 0).all() if name.endswith("bias") else not torch.equal(value, heads[name])
    assert {id(p) for p in again.renewed} == {id(p) for p in method.heads.parameters()}
    assert all(torch.equal(value, nets[name]) for name, value in method.video.state_dict().items())
    assert {"nmi_audio", "nmi_video"} <= set(again.log)
    assert method.labels.shape == labels.shape


def test_balance_by_weights_and_by_sampling() -> None:
    method = method_of()
    method.before_epoch(context(method, UIDS))
    for labels, weights in zip(method.labels, method.weights, strict=True):
        np.testing.assert_allclose(weights.numpy(), balance_weights(labels.numpy(), 3), rtol=1e-6)
    sampled = method_of(balance="video", epochs_per_round=2)
    for epoch in range(2):
        sampled.before_epoch(drawn := context(sampled, UIDS, epoch))
        assert drawn.picks is not None
        assert len(drawn.picks) == COUNT
        learnt = sampled.labels[sampled.sets.index("audio")]  # what the video encoder of xdc learns
        counts = np.bincount(learnt[drawn.picks].numpy(), minlength=3)
        assert counts.max() - counts[counts > 0].min() <= COUNT // 3 + 1
    assert (sampled.weights == 1).all()


def test_features_are_taken_of_still_views() -> None:
    method = method_of()
    plan = method.still()
    assert plan.clips == 1
    assert [type(op).__name__ for op in plan.views[0].augment.ops] == ["Normalize"]
    assert {view.name for view in plan.views} == {view.name for view in method.plan().views}


def test_a_batch_before_the_first_round_is_refused() -> None:
    method = method_of()
    with pytest.raises(ValueError, match="no clusters yet"):
        method(corpus(method, UIDS[:2]))


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="clusters"):
        Config(clusters=1)
    with pytest.raises(ValueError, match="pca_dim"):
        Config(pca_dim=-1)


def test_a_run_with_rounds(dataset: ShardIndex, tmp_path) -> None:
    """Through the real loop: labels cover the corpus, whatever the batch size, and rounds are logged."""
    found = {}
    for size in (2, 3):
        method = method_of(epochs_per_round=2, balance="audio")
        config = TrainConfig(
            epochs=3, batch_size=size, lr=1e-3, log_every=1, tensorboard=False, device="cpu", schedule="constant"
        )
        train(method, dataset, config, tmp_path / str(size), loader=LoaderConfig(threads=1, processes=0), verbose=False)
        rows = read_log(tmp_path / str(size))
        rounds = [row["epoch"] for row in rows if row.get("kmeans_audio") is not None]
        assert rounds == [0, 2]
        assert method.labels.shape == (2, len(dataset))
        assert sorted(method.uids.tolist()) == sorted(dataset.column("uid").astype(np.int64).tolist())
        row_of = {int(uid): row for row, uid in enumerate(dataset.column("uid").astype(np.int64))}
        assert [row_of[uid] for uid in method.uids.tolist()] == method.rows.tolist()
        found[size] = rows[0]["kmeans_audio"]
    assert found[2] == pytest.approx(found[3], rel=1e-4)
