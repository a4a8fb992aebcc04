"""Golden numbers of VCLR's losses, heads, steps, sampler, schedule, SVM and retrieval (official repositories).

Run as a script, this file is one of the processes that replay a case of several: ``test_vclr.py FILE``.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.backbones.resnet import temporal_shift
from clipmill.models.encoder import Encoder, InputSpec
from clipmill.models.losses import info_nce
from clipmill.models.methods.vclr import (
    VCLR,
    Config,
    OrderAxis,
    Tower,
    anchor_and_others,
    inter_loss,
    intra_loss,
    order_label,
    reordered,
)
from clipmill.models.queue import KeyQueue
from clipmill.pipeline import dist
from clipmill.pipeline.config import TrainConfig
from clipmill.pipeline.draws import Draws
from clipmill.pipeline.optim import peak_lr, schedule_of
from clipmill.pipeline.record import VideoRecord
from clipmill.pipeline.views import View
from clipmill.pipeline.views_tuples import TsnSegments, Tuples, segment_bounds, shuffles
from clipmill.tools import metrics

FAMILIES = (
    "inter_queue",
    "intra",
    "video_queue",
    "heads",
    "train_steps",
    "lr_schedule",
    "sampler",
    "retrieval",
    "linear_svm",
    "tsn_sampling",
    "tsm_shift",
)
LOCALISATION = ("bmn", "anet_features", "ar_an")  # in test_vclr_localisation.py
HEADS = {"inter": "fc_inter", "intra": "fc_intra", "order": "fc_order", "video": "fc_tsn"}


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "vclr"


def family(golden: Path, name: str) -> list[Path]:
    assert name in FAMILIES
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return paths


def loaded(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in family(golden, name)]


def double(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64)


def close(found: Tensor | None, expected: np.ndarray, what: str, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    assert found is not None
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol, err_msg=what)


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    known = (*FAMILIES, *LOCALISATION)
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(known)] == []


# --- losses and queues --------------------------------------------------------------------------------------


def queue_of(data: dict[str, np.ndarray]) -> KeyQueue:
    size, dim = data["memory_init"].shape
    queue = KeyQueue(dim, size, init="uniform").double()
    queue.keys.copy_(double(data["memory_init"]).T)
    queue.position.fill_(int(data["index_init"]))
    return queue


def local_rows(data: dict[str, np.ndarray], name: str, step: int) -> np.ndarray:
    """The rows of this rank among the gathered ones."""
    rows = len(data[name][step])
    assert rows * int(data["world_size"]) == len(data[f"{name}_all"][step])
    start = int(data["rank"]) * rows
    return data[f"{name}_all"][step][start : start + rows]


def test_frames_against_the_queue(golden: Path) -> None:
    names = ("k_same", "k_diff1", "k_diff2")
    for data in loaded(golden, "inter_queue"):
        queue = queue_of(data)
        for step in range(len(data["q"])):
            q = double(data["q"][step]).requires_grad_()
            for name in names:
                np.testing.assert_array_equal(local_rows(data, name, step), data[name][step])
            keys = [double(data[name][step]) for name in names]
            loss, logits = inter_loss(q, keys, queue.keys.clone(), float(data["temperature"]))
            loss.backward()
            close(logits, data["logits"][step], "logits")
            close(loss, data["loss"][step], "loss")
            close(q.grad, data["grad_q"][step], "gradient")
            queue.push(torch.cat([double(data[f"{name}_all"][step]) for name in names]))
            np.testing.assert_array_equal(queue.keys.T.numpy(), data["memory_after"][step])
            assert int(queue.position) == int(data["index_after"][step])


def test_frames_within_a_video(golden: Path) -> None:
    for data in loaded(golden, "intra"):
        for step in range(len(data["q"])):
            q = double(data["q"][step]).requires_grad_()
            keys = [double(data[name][step]) for name in ("k_same", "k_diff1", "k_diff2")]
            loss, logits = intra_loss(q, keys, float(data["temperature_intra"]))
            loss.backward()
            close(logits, data["logits"][step], "logits")
            close(loss, data["loss"][step], "loss")
            close(q.grad, data["grad_q"][step], "gradient")


def test_tuples_against_the_queue(golden: Path) -> None:
    for data in loaded(golden, "video_queue"):
        queue = queue_of(data)
        for step in range(len(data["q"])):
            q = double(data["q"][step]).requires_grad_()
            np.testing.assert_array_equal(local_rows(data, "k", step), data["k"][step])
            loss, logits = info_nce(q, double(data["k"][step]), queue.keys.clone(), float(data["temperature"]))
            loss.backward()
            close(logits, data["logits"][step], "logits")
            close(loss, data["loss"][step], "loss")
            close(q.grad, data["grad_q"][step], "gradient")
            queue.push(double(data["k_all"][step]))
            np.testing.assert_array_equal(queue.keys.T.numpy(), data["memory_after"][step])
            assert int(queue.position) == int(data["index_after"][step])


# --- heads --------------------------------------------------------------------------------------------------


class TinyTrunk(Encoder):
    """The cases' trunk: convolution 3x3 of stride 2, normalisation, ReLU, global average."""

    stages, spec = ("res2",), InputSpec()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dim = width
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

    def maps(self, x: Tensor, stage: str) -> Tensor:
        return F.relu(self.bn1(self.conv1(x[:, :, 0])))[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x, "res2").mean((2, 3, 4))


def official(name: str) -> str:
    """The official name of a tensor of our towers."""
    part, rest = name.split(".", 1)
    return (
        rest if part == "trunk" else f"fc_order_classifier.{rest}" if part == "classifier" else f"{HEADS[part]}.{rest}"
    )


def load(tower: Tower, data: dict[str, np.ndarray], prefix: str, partial: bool = False) -> None:
    """Give a tower the stored tensors; with ``partial`` those that are stored."""
    with torch.no_grad():
        for name, tensor in tower.state_dict().items():
            key = prefix + official(name)
            if "num_batches" not in name and (not partial or key in data):
                tensor.copy_(double(data[key]))


@pytest.mark.parametrize("axis", ["segment", "feature"])
def test_heads(golden: Path, axis: OrderAxis) -> None:
    prefix = "" if axis == "segment" else "alt_"
    for data in loaded(golden, "heads"):
        segments, width = data["feat_video_q"].shape[1:]
        dim = data["inter"].shape[1]
        query, key = (Tower(TinyTrunk(width), dim, segments, axis).double() for _ in range(2))
        load(query, data, "q.", partial=True)
        load(key, data, "k.", partial=True)
        stored = {official(name) for name, _ in query.named_parameters() if not name.startswith("trunk")}
        assert stored == {name.removeprefix("q.") for name in data if name.startswith("q.")}
        f_q, f_k = double(data["feat_video_q"]).requires_grad_(), double(data["feat_video_k"])
        frame = query.frame_embeddings(double(data["feat_frame_q"]))
        close(frame, np.concatenate([data["inter"], data["intra"]], 1), "frame embeddings")
        whole, other = query.tuple_embeddings(f_q), key.tuple_embeddings(f_k).detach()
        close(whole[:, :dim], data["video_q"], "video_q")
        close(other[:, :dim], data["video_k"], "video_k")
        close(whole[:, dim:], data[f"{prefix}order_feat_q"], "order features")
        close(other[:, dim:], data[f"{prefix}order_feat_k"], "order features of the key")
        logits = query.classifier(torch.cat([whole[:, dim:], other[:, dim:]], 1))
        loss = F.cross_entropy(logits, torch.tensor(data["order_label"]))
        close(logits, data[f"{prefix}order_logits"], "order logits")
        close(loss, data[f"{prefix}order_loss"], "order loss")
        close(f_q.mean(1), data["video_feat_layer6"], "pooled features")
        if axis == "segment":
            loss.backward()
            close(f_q.grad, data["grad_feat_video_q"], "gradient of the features")
            for name, param in query.named_parameters():
                if f"grad.{official(name)}" in data:
                    close(param.grad, data[f"grad.{official(name)}"], f"gradient of {name}")


# --- whole steps --------------------------------------------------------------------------------------------


def vclr_of(data: dict[str, np.ndarray], groups: int) -> VCLR:
    size, dim = data["memory_inter_init"].shape
    config = Config(
        segments=data["video_q"].shape[2],
        out_dim=dim,
        queue_size=size,
        key_momentum=float(data["alpha"]),
        temperature=float(data["temperature"]),
        temperature_intra=float(data["temperature_intra"]),
        groups=groups,
    )
    vclr = VCLR(config, TinyTrunk(len(data["init.q.conv1.weight"]))).double()
    load(vclr.query, data, "init.q.")
    load(vclr.key, data, "init.k.")
    vclr.frame_queue.keys.copy_(double(data["memory_inter_init"]).T)
    vclr.tuple_queue.keys.copy_(double(data["memory_video_init"]).T)
    return vclr


def replay(path: Path, groups: int = 1) -> None:
    """Run the steps of a case in this process's share of them and compare every stored number.

    groups: ranks of the case that this process plays; its running statistics then see all of them and are left out.
    """
    data = dict(np.load(path))
    world = dist.world()
    assert world * groups == int(data["world_size"])
    ranks = slice(dist.rank() * groups, (dist.rank() + 1) * groups)
    vclr = vclr_of(data, groups)
    params = [param for param in vclr.parameters() if param.requires_grad]
    decay, momentum = float(data["weight_decay"]), float(data["momentum"])
    sgd = torch.optim.SGD(params, float(data["lr"]), momentum, weight_decay=decay)
    rows = data["xq"].shape[1] // world
    mine = slice(dist.rank() * rows, (dist.rank() + 1) * rows)
    for step, lr in enumerate(data["lr_per_step"].tolist()):
        images = {name: double(data[name][step][mine] / 255.0) for name in ("xq", "x1", "x2", "x3")}
        tuples = {name: double(data[name][step][mine] / 255.0).transpose(1, 2) for name in ("video_q", "video_k")}
        x_q, *x_k = (x[:, :, None] for x in images.values())
        label = torch.tensor(data["order_label"][step][mine])
        losses = vclr.contrast(x_q, x_k, *tuples.values(), label, [torch.tensor(p) for p in data["perms"][step]])
        terms = {"inter": losses.inter, "intra": losses.intra, "order": losses.order, "video": losses.video}
        total = torch.stack(list(terms.values())).sum()
        sgd.param_groups[0]["lr"] = lr
        sgd.zero_grad()
        total.backward()
        dist.average_gradients(params)
        for name, term in (*terms.items(), ("total", total)):
            close(term, data[f"loss_{name}"][step, ranks].mean(), f"loss_{name} of step {step}")
        if step == 0:
            for name, param in vclr.query.named_parameters():
                close(param.grad, data[f"grad0.q.{official(name)}"], f"gradient of {name}")
        sgd.step()
        vclr.after_step(step, len(data["perms"]))
    for side, tower in (("q", vclr.query), ("k", vclr.key)):
        for name, tensor in tower.state_dict().items():
            key = f"final.{side}.{official(name)}"
            if "running" not in name and "num_batches" not in name:
                close(tensor, data[key], key)
            elif "running" in name and groups == 1:
                close(tensor, data[key][dist.rank()], key)
    for name, queue in (("inter", vclr.frame_queue), ("video", vclr.tuple_queue)):
        close(queue.keys.T, data[f"memory_{name}_final"], f"{name} queue")
        assert int(queue.position) == int(data[f"index_{name}_final"])


def test_train_steps(golden: Path, run_ranks) -> None:
    for path in family(golden, "train_steps"):
        world = int(np.load(path)["world_size"])
        if world == 1:
            replay(path)
        else:
            run_ranks(__file__, world, path, timeout_s=400)
            replay(path, groups=world)  # one process that plays all of them


def test_learning_rate(golden: Path) -> None:
    for data in loaded(golden, "lr_schedule"):
        base, floor = float(data["base_lr"]), float(data["eta_min"])
        config = TrainConfig(
            epochs=int(data["epochs"]),
            batch_size=256,
            lr=base,
            lr_scaling="linear",
            warmup_epochs=int(data["warmup_epochs"]),
            lr_start=1 / float(data["warmup_multiplier"]),
            lr_end=floor / base,
        )
        per_epoch = int(data["iters_per_epoch"])
        rates = [peak_lr(config) * schedule_of(config, step, per_epoch) for step in range(len(data["lr"]))]
        np.testing.assert_allclose(rates, data["lr"], rtol=1e-10)


# --- frames -------------------------------------------------------------------------------------------------


def record(num_frames: int) -> VideoRecord:
    return cast(VideoRecord, SimpleNamespace(num_frames=num_frames, fps=Fraction(25)))


def as_tuples(frames_RN: np.ndarray) -> Tensor:
    """Frame numbers in the place of pictures."""
    return torch.tensor(frames_RN)[:, None, :, None, None]


def drawn(num_frames: int, segments: int, key: int) -> dict[str, np.ndarray]:
    """One draw of our sampler as the official one describes it, frames counted from 1."""
    views = tuple(View(name=name, num_frames=count) for name, count in (("q", segments), ("k", segments), ("x", 1)))
    spans, aux = (out := Tuples(views=views)(record(num_frames), Draws(key), key)).spans, out.aux
    query, other, same = (np.array([span.frames]) + 1 for span in spans)
    orders = {name: torch.tensor([int(aux[f"{name}_order"])]) for name in ("query", "key")}
    anchor, rest = anchor_and_others(as_tuples(query), torch.tensor([int(aux["anchor"])]))
    return {
        "xq": anchor.numpy().ravel(),
        "x1": same.ravel(),
        **{f"x{number}": x.numpy().ravel() for number, x in enumerate(rest, 2)},
        "label": order_label(orders["query"], orders["key"]).numpy(),
        "video_q": reordered(as_tuples(query), orders["query"]).numpy().reshape(1, -1),
        "video_k": reordered(as_tuples(other), orders["key"]).numpy().reshape(1, -1),
    }


def test_our_selections_turn_temporal_tuples_into_the_stored_draws(golden: Path) -> None:
    for data in loaded(golden, "sampler"):
        segments = data["draw_video_q"].shape[1]
        temporal, aug, orders = {}, {}, {}
        for name in ("video_q", "video_k"):
            place = np.argsort(data[f"draw_{name}"], 1)
            temporal[name] = np.take_along_axis(data[f"draw_{name}"], place, 1)
            aug[name] = np.take_along_axis(data[f"aug_{name}"], place, 1)
            seen = np.argsort(place, 1)  # seen[i] = temporal place of the i-th frame shown
            orders[name] = torch.tensor([shuffles(segments).index(tuple(row)) for row in seen.tolist()])
            for source, prefix in ((temporal, "draw_"), (aug, "aug_")):
                found = reordered(as_tuples(source[name]), orders[name]).reshape(-1, segments).numpy()
                np.testing.assert_array_equal(found, data[f"{prefix}{name}"])
        label = order_label(orders["video_q"], orders["video_k"]).numpy()
        np.testing.assert_array_equal(label, data["draw_label"])
        last = data["draw_xq"] == temporal["video_q"][:, -1]
        anchor = torch.tensor(np.where(last, segments - 1, 0))
        for source, prefix in ((temporal, "draw_"), (aug, "aug_")):
            xq, others = anchor_and_others(as_tuples(source["video_q"]), anchor)
            for name, found in zip(("xq", "x2", "x3"), (xq, *others), strict=True):
                np.testing.assert_array_equal(found.numpy().ravel(), data[f"{prefix}{name}"])
        np.testing.assert_array_equal(data["draw_x1"], data["draw_xq"])
        assert not (
            set(data["aug_x1"]) & {*aug["video_q"].ravel(), *aug["video_k"].ravel()}
        )  # an augmentation of its own
        for row, num_frames in enumerate(data["draw_frame_num"].tolist()):
            for place, (first, stop) in enumerate(segment_bounds(num_frames, segments)):
                pair = {int(temporal[name][row, place]) for name in temporal}
                assert len(pair) == 2
                assert all(first < frame <= stop for frame in pair)


def test_our_draws_are_distributed_like_the_stored_ones(golden: Path) -> None:
    for data in loaded(golden, "sampler"):
        segments = data["seg_first"].shape[1]
        for row, num_frames in enumerate(data["frame_num"].tolist()):
            bounds = segment_bounds(num_frames, segments)
            np.testing.assert_array_equal([first + 1 for first, _ in bounds], data["seg_first"][row])
            np.testing.assert_array_equal([stop for _, stop in bounds], data["seg_last"][row])
        shortest = int(data["draw_frame_num"].min())
        draws = [drawn(shortest, segments, key) for key in range(1200)]
        ours = {name: np.concatenate([draw[name] for draw in draws]) for name in draws[0]}
        theirs = data["draw_frame_num"] == shortest
        for name, values in ours.items():  # everything that occurred there occurs here, and the other way round
            stored = data[f"draw_{name}"][theirs]
            if theirs.sum() > 60:
                known = {tuple(np.atleast_1d(value)) for value in stored} - {()}
                assert known <= {tuple(np.atleast_1d(value)) for value in values}, name
        share = np.bincount(ours["label"], minlength=4) / len(draws)
        np.testing.assert_allclose(share, 0.25, atol=0.06)


def test_evaluation_frames(golden: Path) -> None:
    from clipmill.tools.evaluate.views import rounded_starts  # the processes of a replay do without

    for data in loaded(golden, "sampler"):
        count = int(data["eval_num"])
        for num_frames, expected in zip(data["eval_len"].tolist(), data["eval_idx"], strict=True):
            np.testing.assert_array_equal(rounded_starts(num_frames - 1, count) + 1, expected)


def test_tsn_sampling(golden: Path) -> None:
    for data in loaded(golden, "tsn_sampling"):
        start = int(data["start_index"])
        for key in (key for key in data if key.startswith("test_idx_")):
            count = int(key.rsplit("_", 1)[1])
            view = View(name="clip", num_frames=count)
            for row, num_frames in enumerate(data["total_frames"].tolist()):
                (span,) = TsnSegments(views=(view,), middle=True)(record(num_frames), Draws(0), 0).spans
                np.testing.assert_array_equal(np.array(span.frames) + start, data[key][row])
                train = TsnSegments(views=(view,))
                frames = np.array([train(record(num_frames), Draws(n), n).spans[0].frames for n in range(400)]) + start
                low, high = data[f"train_min_{count}"][row], data[f"train_max_{count}"][row]
                if int(data[f"train_branch_{count}"][row]) == 2:
                    assert num_frames < count
                    np.testing.assert_array_equal(low, high)
                    np.testing.assert_array_equal(frames, np.broadcast_to(low, frames.shape))
                    continue
                length = num_frames // count
                assert (frames >= np.arange(count) * length + start).all()
                assert (low >= np.arange(count) * length + start).all()
                assert (frames < np.arange(1, count + 1) * length + start).all()
                assert (high < np.arange(1, count + 1) * length + start).all()
                if length <= 40:  # 400 draws meet every frame but for one chance in 25000
                    np.testing.assert_allclose(frames.min(0), low, atol=2)
                    np.testing.assert_allclose(frames.max(0), high, atol=2)


def test_temporal_shift(golden: Path) -> None:
    for data in loaded(golden, "tsm_shift"):
        found = temporal_shift(torch.tensor(data["x"]), int(data["num_segments"]), int(data["shift_div"]))
        np.testing.assert_array_equal(found.numpy(), data["y"])


# --- evaluation ---------------------------------------------------------------------------------------------


def test_retrieval(golden: Path) -> None:
    for data in loaded(golden, "retrieval"):
        ks = data["ks"].tolist()
        depth = max(*ks, data["nn20"].shape[1])
        numbers, _ = metrics.retrieve(data["test_feat"].astype(float), data["train_feat"].astype(float), depth)
        np.testing.assert_array_equal(numbers[:, : data["nn20"].shape[1]], data["nn20"])
        near, label = data["train_label"][numbers], data["test_label"]
        rates = metrics.hit_rates(near, label, ks)
        np.testing.assert_allclose(rates, data["recall"], rtol=1e-12)
        np.testing.assert_allclose(np.array(rates) * len(label), data["topk_correct"])
        hits = [int((near[label == k, 0] == k).sum()) for k in range(len(data["class_top1_correct"]))]
        np.testing.assert_array_equal(hits, data["class_top1_correct"])


def test_linear_svm(golden: Path) -> None:
    from clipmill.tools.evaluate.svm import squared_hinge  # the processes of a replay do without

    for data in loaded(golden, "linear_svm"):
        x, label = data["train_feat"], data["train_label"]
        coef = squared_hinge(x, label, len(data["coef"]), float(data["cost"]))
        np.testing.assert_allclose(coef.T, data["coef"], atol=1e-6)
        decision = data["test_feat"] @ coef
        np.testing.assert_allclose(decision, data["decision"], atol=1e-5)
        np.testing.assert_array_equal(decision.argmax(1), data["pred"])
        accuracy = 100 * metrics.topk_accuracy(decision, data["test_label"], 1)
        assert accuracy == pytest.approx(float(data["accuracy"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.setup("cpu")
    replay(Path(sys.argv[1]))
    dist.teardown()
