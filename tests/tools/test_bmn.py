from __future__ import annotations

import numpy as np
import pytest
import torch

from clipmill.tools.bmn import BMN, bmn_loss, labels_of, proposals, sample_mask, soft_nms, train_bmn, valid_cells
from clipmill.tools.localisation_metrics import tiou


def test_samples_are_averages_of_time_steps() -> None:
    mask = sample_mask(20, 4, 3, extend=0.0)
    valid = valid_cells(20)
    np.testing.assert_allclose(mask.sum(0)[:, valid], 1, rtol=1e-6)  # nothing is lost inside the video
    assert (mask[:, :, ~valid] == 0).all()
    ramp = np.einsum("t,tnds->nds", np.arange(20.0), mask)
    assert ramp[:, 9, 5].mean() == pytest.approx(5 + 9 / 2)  # centre of the proposal
    assert np.all(np.diff(ramp[:, 9, 5]) > 0)


def test_labels_peak_at_the_truth() -> None:
    iou, start, end = labels_of(np.array([[0.25, 0.5]]), 16)
    assert np.unravel_index(iou.argmax(), iou.shape) == (3, 4)  # [4 / 16, 8 / 16]
    assert iou.max() == pytest.approx(1)
    assert start[3:5].min() == 1.0
    assert start[8:].max() == 0
    assert end[7:9].min() == 1.0


def test_a_loss_without_positive_cells_is_finite() -> None:
    answer = torch.full((1, 2, 4, 4), 0.5), torch.full((1, 4), 0.5), torch.full((1, 4), 0.5)
    target = torch.zeros(1, 4, 4), torch.zeros(1, 4), torch.zeros(1, 4)
    terms = bmn_loss(answer, target, (torch.rand(1, 4, 4), torch.rand(1, 4, 4)))
    assert all(torch.isfinite(term) for term in terms.values())


def test_candidates_and_pairs() -> None:
    start, end = np.array([0.1, 0.9, 0.2, 0.1]), np.array([0.9, 0.1, 0.1, 0.05])
    maps = np.ones((2, 4, 4))
    rows = proposals(maps, start, end)
    # starts: 0 always and the peak at 1; ends: 3 always, 0 never
    assert rows[:, :2].tolist() == [[0, 0.75], [0.25, 0.75]]
    np.testing.assert_allclose(rows[:, 2], [0.1 * 0.05, 0.9 * 0.05])


def test_near_proposals_lose_score_and_far_ones_do_not() -> None:
    rows = np.array([[0.0, 0.5, 0.9], [0.0, 0.49, 0.8], [0.6, 0.9, 0.5]])
    found = soft_nms(rows)
    assert found[:2].tolist() == [[0.0, 0.5, 0.9], [0.6, 0.9, 0.5]]
    assert found[2, 2] == pytest.approx(0.8 * np.exp(-(0.98**2) / 0.4))
    assert len(soft_nms(rows, top=1)) == 1
    assert soft_nms(np.empty((0, 3))).shape == (0, 3)


def test_training_finds_bright_parts() -> None:
    rng = np.random.default_rng(0)
    features, truths = [], []
    for _ in range(12):
        first, length = rng.integers(1, 8), rng.integers(3, 7)
        x = 0.1 * rng.normal(size=(16, 4))
        x[first : first + length] += 1
        features.append(x)
        truths.append(np.array([[first / 16, (first + length) / 16]]))
    torch.manual_seed(0)
    model = BMN(4, steps=16, samples=6, widths=(16, 16, 8))
    train_bmn(model, features, truths, epochs=40, milestone=35, lr=5e-3, batch_size=4)
    overlaps = []
    for x, truth in zip(features, truths, strict=True):
        with torch.no_grad():
            answer = (part[0].numpy() for part in model(torch.tensor(x.T, dtype=torch.float32)[None]))
        overlaps.append(tiou(soft_nms(proposals(*answer))[:1, :2], truth)[0, 0])
    assert np.mean(overlaps) > 0.6
    with pytest.raises(ValueError, match="cannot be cut into 4 groups"):
        BMN(6, steps=8)
    with pytest.raises(ValueError, match="needs training videos"):
        train_bmn(model, [], [])
