"""Golden numbers of MoCHi: mixes of given draws, logits, loss, gradients, and MoCo's queue and moving average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmill.models.ema import follow
from clipmill.models.losses import accuracy, info_nce
from clipmill.models.negatives import Mixes, hardest, mix_pairs, mix_query, synthesise, with_synthetic
from clipmill.models.queue import KeyQueue

FAMILIES = ("mix", "hardest", "query", "no_mixing", "moco_bookkeeping")


@pytest.fixture(scope="module")
def golden(test_data: Path) -> Path:
    return test_data / "golden" / "mochi"


def test_every_file_belongs_to_a_family(golden: Path) -> None:
    assert [path.name for path in golden.glob("*.npz") if not path.name.startswith(FAMILIES)] == []


def close(found: Tensor | None, expected: np.ndarray, what: str) -> None:
    assert found is not None
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-9, err_msg=what)


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def test_mixes(golden: Path) -> None:
    paths = [path for path in sorted(golden.glob("*.npz")) if not path.name.startswith("moco_bookkeeping")]
    assert paths
    for path in paths:
        data = dict(np.load(path))
        t, count = float(data["temperature"]), int(data["N"])
        q = torch.tensor(data["q"], requires_grad=True)
        k, queue = torch.tensor(data["k"]), torch.tensor(data["queue"])
        plain, logits = info_nce(q, k, queue.T, t)
        close(plain, data["loss_no_mixing"], f"{path.name} loss without mixes")
        assert float(accuracy(logits, 0)) == pytest.approx(float(data["proxy_acc_no_mixing"]))

        hard = torch.tensor(data["topk_idx"])
        assert np.array_equal(hardest(logits[:, 1:], count).sort(1).values, hard.sort(1).values)
        similarity = (q @ queue.T).detach().gather(1, hard)
        assert bool((similarity.diff(dim=1) <= 0).all())  # the order that the draws count by

        first, second, third = (torch.tensor(data[name]) for name in ("idx1", "idx2", "idx3"))
        alpha, beta = torch.tensor(data["alpha"]), torch.tensor(data["beta"])
        assert (first.shape[1], third.shape[1]) == (int(data["s"]), int(data["s_prime"]))
        mixes = Mixes(first=first, second=second, alpha=alpha, third=third, beta=beta)
        synthetic = synthesise(q, queue, hard, mixes)
        close(synthetic[:, : first.shape[1]], data["mixed_hh"], f"{path.name} mixes of two")
        close(synthetic[:, first.shape[1] :], data["mixed_hq"], f"{path.name} mixes with the query")
        logits = with_synthetic(logits, q, synthetic, t)
        close(logits, data["logits"], f"{path.name} logits")
        assert float(accuracy(logits, 0)) == pytest.approx(float(data["proxy_acc"]))
        loss = loss_of(logits)
        close(loss, data["loss"], f"{path.name} loss")
        close(torch.autograd.grad(loss, q)[0], data["grad_q"], f"{path.name} gradient")

        members = queue[hard.gather(1, third)]
        pairs = mix_pairs(queue[hard.gather(1, first)], queue[hard.gather(1, second)], alpha)
        through = torch.cat([pairs, mix_query(q, members, beta)], 1)
        loss = loss_of(with_synthetic(info_nce(q, k, queue.T, t)[1], q, through, t))
        close(torch.autograd.grad(loss, q)[0], data["grad_q_through_mix"], f"{path.name} gradient through mixes")


def test_queue_and_moving_average(golden: Path) -> None:
    paths = sorted(golden.glob("moco_bookkeeping*.npz"))
    assert paths
    for path in paths:
        data = dict(np.load(path))
        size, dim = data["queue0"].shape
        queue = KeyQueue(dim, size).double()
        queue.keys.copy_(torch.tensor(data["queue0"].T))
        queue.position.fill_(int(data["ptr0"]))
        student, teacher = (nn.ParameterList([torch.tensor(data["param_k0"])]) for _ in range(2))
        for step, keys in enumerate(data["keys"]):
            with torch.no_grad():
                student[0].copy_(torch.tensor(data["param_q_traj"][step]))
            follow(teacher, student, float(data["m"]))
            close(teacher[0], data["param_k_traj"][step], "key parameter")
            queue.push(torch.tensor(keys))
            close(queue.keys.T, data["queue_traj"][step], "queue")
            assert int(queue.position) == int(data["ptr_traj"][step])
