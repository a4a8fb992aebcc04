"""Golden numbers of HCL: the hard, the debiased and the easy objective, and the weighted kNN (joshr17/HCL)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clipmill.models.losses import nt_xent
from clipmill.models.negatives import hard_nce, log_debiased, log_reweighted, pair_logits
from clipmill.tools.evaluate.knn import vote
from clipmill.tools.metrics import nearest, top_classes, topk_accuracy

FAMILIES = ("biased", "debiased", "easy", "hard", "knn")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "hcl"


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


def objectives(golden: Path) -> list[Path]:
    paths = [path for name in FAMILIES[:-1] for path in sorted(golden.glob(f"{name}*.npz"))]
    assert paths
    return paths


def test_objective(golden: Path) -> None:
    for path in objectives(golden):
        data = dict(np.load(path))
        single = data["out_1"].dtype == np.float32
        atol = 1e-5 if single else 1e-9
        u1, u2 = (torch.tensor(data[name], requires_grad=True) for name in ("out_1", "out_2"))
        t, tau, beta = (float(data[name]) for name in ("temperature", "tau_plus", "beta"))
        easy = not bool(data["estimator_hard"])

        def close(found, name, atol=atol, data=data, path=path) -> None:
            found = found.detach().numpy()
            np.testing.assert_allclose(found, data[name], rtol=atol, atol=atol, err_msg=f"{path.name} {name}")

        positive, negatives = pair_logits(u1, u2, t)
        losses, at_floor = hard_nce(positive, negatives, t, beta=beta, tau_plus=tau, easy=easy)
        losses.mean().backward()
        close(losses, "loss_per_anchor")
        close(losses.mean(), "loss")
        close(u1.grad, "grad_out_1")
        close(u2.grad, "grad_out_2")
        close(positive.exp(), "pos")
        close(negatives.exp(), "neg")
        if beta == tau == 0 or easy:
            close(nt_xent(u1, u2, t)[0], "loss")
        if easy:  # the sum of the negatives; nothing is weighted, taken off or bounded
            for name in ("ng", "ng_unclamped", "reweight_neg"):
                close(negatives.logsumexp(1).exp(), name)
            assert not at_floor.any()
            continue
        assert float(data["ng_floor"]) == pytest.approx(negatives.shape[1] * np.exp(-1 / t), rel=1e-6)
        close((beta * negatives).exp(), "importance")
        log_r = log_reweighted(negatives, beta)
        log_g, again = log_debiased(positive, log_r, negatives.shape[1], t, tau)
        close(log_r.exp(), "reweight_neg")
        close((log_r.exp() - tau * negatives.shape[1] * positive.exp()) / (1 - tau), "ng_unclamped")
        close(log_g.exp(), "ng")
        assert at_floor.tolist() == again.tolist() == data["clamped"].tolist()


def test_shards_of_an_objective_give_its_loss_and_gradient(golden: Path) -> None:
    for path in objectives(golden):
        data = dict(np.load(path))
        u1, u2 = (torch.tensor(data[name], dtype=torch.float64, requires_grad=True) for name in ("out_1", "out_2"))
        t, tau, beta = (float(data[name]) for name in ("temperature", "tau_plus", "beta"))
        losses = []
        for row in range(len(u1)):  # as many processes as there are samples
            own = slice(row, row + 1)
            logits = pair_logits(u1[own], u2[own], t, columns=(u1, u2), offset=row)
            losses.append(hard_nce(*logits, t, beta=beta, tau_plus=tau, easy=not data["estimator_hard"])[0].mean())
        loss = torch.stack(losses).mean()
        loss.backward()
        for found, name in ((loss, "loss"), (u1.grad, "grad_out_1"), (u2.grad, "grad_out_2")):
            assert found is not None
            atol = 1e-5 if data["out_1"].dtype == np.float32 else 1e-9
            np.testing.assert_allclose(found.detach().numpy(), data[name], rtol=atol, atol=atol, err_msg=path.name)


def test_weighted_neighbours(golden: Path) -> None:
    paths = sorted(golden.glob("knn*.npz"))
    assert paths
    for path in paths:
        data = dict(np.load(path))
        k, classes, t = int(data["k"]), int(data["num_classes"]), float(data["temperature"])
        numbers, similarity = nearest(data["test"], data["bank"], k)
        shares = vote(data["bank_labels"][numbers], similarity, classes, t)
        scores = data["scores"]  # sums of votes; ours are shares of them, the same ranking
        np.testing.assert_allclose(shares, scores / scores.sum(1, keepdims=True), rtol=0, atol=1e-6)
        totals = np.exp(similarity / t).sum(1, keepdims=True)
        np.testing.assert_allclose(shares * totals, scores, rtol=1e-5)
        voted = (scores > 0).sum(1)
        order = top_classes(shares, classes)
        for row, count in enumerate(voted):  # classes without votes are equal: their order means nothing
            np.testing.assert_array_equal(order[row, :count], data["pred"][row, :count])
        for name in (key for key in data if key.startswith("top")):
            accuracy = topk_accuracy(shares, data["test_labels"], int(name[3:]))
            assert accuracy == pytest.approx(float(data[name]), abs=1e-12), name
