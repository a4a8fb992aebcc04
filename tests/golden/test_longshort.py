"""Golden numbers of long-short view feature decomposition, of MS-TCN and of the segmentation measures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.ema import follow
from clipmill.models.methods.longshort import TERMS, Aggregator, Config, LongShort, losses
from clipmill.models.queue import KeyQueue
from clipmill.pipeline.draws import Draws
from clipmill.tools.mstcn import MSTCN, stage_losses
from clipmill.tools.segmentation_metrics import score_segmentation

FAMILIES = ("views", "losses", "bookkeeping", "segmentation_metrics", "mstcn")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "longshort"


def family(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    assert name in FAMILIES
    paths = sorted(golden.glob(f"{name}*.npz"))
    assert paths, f"no {name}*.npz in {golden}"
    return [dict(np.load(path)) for path in paths]


def close(found: Tensor | None, expected: np.ndarray, what: str) -> None:
    assert found is not None, what
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-11, err_msg=what)


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


class FromStart(Draws):
    """Draws that give one number, and notes of how many it was one."""

    def __init__(self, start: int) -> None:
        super().__init__(0)
        self.start, self.possible = start, 0

    def integer(self, high: int) -> int:
        self.possible = high
        return self.start


def test_views(golden: Path) -> None:
    for data in family(golden, "views"):
        num_short, length, stride = (int(data[f"hp.{name}"]) for name in ("num_short", "short_len", "stride"))
        config = Config(num_short=num_short, num_frames=length, stride=stride, queue_size=4)
        planner = LongShort.plan(cast(Any, SimpleNamespace(config=config, _short_names=short_names(num_short))))
        for row, (total, start) in enumerate(zip(data["total_frames"].tolist(), data["start"].tolist(), strict=True)):
            record = cast(Any, SimpleNamespace(num_frames=total, fps=Fraction(25)))
            draws = FromStart(start)
            long_q, long_k, *short = (span.frames for span in planner(record, draws, 0).spans)
            assert draws.possible == max(1, total - (num_short * length - 1) * stride)
            assert long_q == long_k == tuple(data["long"][row].tolist())
            assert short == [tuple(frames) for frames in data["short"][row].tolist()]


def short_names(count: int) -> list[str]:
    return [f"short{number}" for number in range(count)]


def test_losses(golden: Path) -> None:
    for data in family(golden, "losses"):
        inputs = {name: torch.tensor(data[name], requires_grad=True) for name in ("psi_s", "phi_s", "xi_q")}
        num_short, dim = data["phi_s"].shape[1:]
        params = {name.removeprefix("p.agg."): x for name, x in data.items() if name.startswith("p.agg.")}
        hidden = len(params["fc1.bias"]) if "fc1.bias" in params else None
        aggregator = Aggregator(cast(Any, str(data["hp.aggregator"])), num_short, dim, hidden).double()
        mine = {official(name): param for name, param in aggregator.named_parameters()}
        assert set(mine) == set(params)
        with torch.no_grad():
            for name, param in mine.items():
                param.copy_(torch.tensor(params[name]))
        aggregated = aggregator(inputs["phi_s"])
        close(aggregated, data["aggregated"], "aggregated")
        keys = {term: torch.tensor(data[name]) for term, name in zip(TERMS, ("psi_l", "phi_l", "xi_k"), strict=True)}
        queues = {
            term: torch.tensor(data[name]).T
            for term, name in zip(TERMS, ("queue_psi", "queue_phi", "queue_xi"), strict=True)
        }
        terms = losses(inputs["psi_s"], aggregated, inputs["xi_q"], keys, queues, float(data["hp.temperature"]))
        close(terms["non_stationary"][1], data["logits_nonstationary"], "logits")
        rows = terms["stationary"][1]
        per_view = F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.int64), reduction="none")
        close(per_view.unflatten(0, (-1, num_short)), data["loss_stationary_per_view"], "loss per view")
        for term in TERMS:
            close(terms[term][0], data[f"loss_{term.replace('_', '')}"], term)
        loss = sum(
            (weight * terms[term][0] for term, weight in zip(TERMS, data["hp.weights"].tolist(), strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        )
        close(loss, data["loss"], "loss")
        loss.backward()
        for name, x in inputs.items():
            close(x.grad, data[f"g.{name}"], f"gradient of {name}")
        for name, param in mine.items():
            close(param.grad, data[f"g.agg.{name}"], f"gradient of {name}")


def official(name: str) -> str:
    """net.weight is weight; of the MLP's layers 0 and 2, net.0.weight is fc1.weight."""
    parts = name.removeprefix("net.").split(".")
    return ".".join(parts) if len(parts) == 1 else f"fc{1 + int(parts[0]) // 2}.{parts[1]}"


class Params(nn.Module):
    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))


def test_bookkeeping(golden: Path) -> None:
    for data in family(golden, "bookkeeping"):
        size, dim = data["queue_before"].shape
        queue = KeyQueue(dim, size).double()
        queue.keys.copy_(torch.tensor(data["queue_before"]).T)
        queue.position.fill_(int(data["ptr"][0]))
        key = Params(data["key_params_before"])
        for step in range(len(data["keys"])):
            assert int(queue.position) == int(data["ptr"][step])
            follow(key, Params(data["query_params"][step]), float(data["hp.momentum"]))
            close(key.values, data["key_params"][step], "key parameters")
            queue.push(torch.tensor(data["keys"][step]))
            close(queue.keys.T, data["queue"][step], "queue")


def test_segmentation_metrics(golden: Path) -> None:
    for data in family(golden, "segmentation_metrics"):
        cuts = data["offsets"][1:-1]
        found, truth = (np.split(data[name], cuts) for name in ("pred", "gt"))
        background = [int(data["hp.bg"])] if data["hp.bg"] >= 0 else []
        score = score_segmentation(found, truth, background=background)
        np.testing.assert_allclose(score.edits, data["edit_per_video"], rtol=1e-12)
        np.testing.assert_array_equal(score.counts.sum(0).T, [data[name] for name in ("tp", "fp", "fn")])
        np.testing.assert_allclose([score.mof, score.edit, *score.f1], [data["acc"], data["edit"], *data["f1"]])


def test_mstcn(golden: Path) -> None:
    for data in family(golden, "mstcn"):
        params = {name.removeprefix("p."): torch.tensor(x) for name, x in data.items() if name.startswith("p.")}
        stages = len(data["logits"])
        layers = len({name for name in params if name.startswith("stage1.layers") and name.endswith("1x1.bias")})
        model = MSTCN(
            data["features"].shape[1],
            data["mask"].shape[1],
            stages=stages,
            layers=layers,
            maps=len(params["stage1.conv_1x1.bias"]),
        )
        model.load_state_dict(params)
        model.double().eval()
        features = torch.tensor(data["features"], requires_grad=True)
        mask = torch.tensor(data["mask"][:, :1])
        logits = model(features, mask)
        close(logits, data["logits"], "logits")
        assert (logits.detach().numpy()[:, data["mask"] == 0] == 0).all()
        entropy, smooth = stage_losses(logits, torch.tensor(data["targets"]), mask)
        close(entropy, data["ce"], "cross-entropy")
        close(smooth, data["smooth"], "smoothing")
        loss = entropy.sum() + smooth.sum()
        close(loss, data["loss"], "loss")
        loss.backward()
        close(features.grad, data["g.features"], "gradient of the features")
