"""The linear support vector machine against its objective, scikit-learn's classifier and simple cases."""

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from clipmill.tools.linear_svm import choose_cost, fit_svm


def data(classes=4, count=80, dim=6, spread=1.5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return rng.normal(0, 3, (classes, dim))[labels] + rng.normal(0, spread, (count, dim)), labels


def objective(machine, x, labels, cost, label):
    w, b = machine.weight[:, label], machine.bias[label]
    margin = np.maximum(0, 1 - np.where(labels == label, 1, -1) * (x @ w + b))
    return (w @ w + b * b) / 2 + cost * np.square(margin).sum()


def test_the_objective_is_at_its_minimum():
    x, labels = data()
    machine = fit_svm(x, labels, 0.1)
    assert machine.converged
    rng = np.random.default_rng(1)
    for label in range(4):
        least = objective(machine, x, labels, 0.1, label)
        for _ in range(20):
            step = rng.normal(0, 0.02, x.shape[1])
            moved = type(machine)(weight=machine.weight.copy(), bias=machine.bias.copy())
            moved.weight[:, label] += step
            assert objective(moved, x, labels, 0.1, label) >= least - 1e-4


def test_decisions_equal_scikit_learn():
    x, labels = data()
    theirs = LinearSVC(C=0.01, max_iter=20000, dual="auto", random_state=0).fit(x, labels)
    np.testing.assert_allclose(fit_svm(x, labels, 0.01).decisions(x), theirs.decision_function(x), atol=1e-6)
    stacked = fit_svm(x, labels, 0.01).decisions(x.reshape(8, 10, 6))
    assert stacked.shape == (8, 10, 4)


def test_two_classes_and_classes_without_rows():
    x, labels = data(classes=2)
    scores = fit_svm(x, labels, 1.0, num_classes=3).decisions(x)
    np.testing.assert_allclose(scores[:, 0], -scores[:, 1])
    assert np.isneginf(scores[:, 2]).all()
    assert ((scores[:, 1] > 0) == (labels == 1)).mean() > 0.9
    with pytest.raises(ValueError, match="needs two classes"):
        fit_svm(x, np.zeros(len(x), int), 1.0)
    with pytest.raises(ValueError, match="greater than 0"):
        fit_svm(x, labels, 0.0)


def test_order_of_features_does_not_matter():
    x, labels = data(spread=4.0)
    order = np.random.default_rng(0).permutation(x.shape[1])
    one, two = fit_svm(x, labels, 0.01).decisions(x), fit_svm(x[:, order], labels, 0.01).decisions(x[:, order])
    assert (one.argmax(1) == two.argmax(1)).mean() > 0.97


def test_too_few_iterations_are_reported_not_warned():
    x, labels = data(spread=8.0)
    assert not fit_svm(1e4 * x, labels, 1e4, max_iter=1).converged


def test_a_cost_is_chosen_without_splitting_groups():
    x, labels = data(spread=3.0)
    groups = np.arange(len(x)) // 8
    cost, tried = choose_cost(x, labels, groups, (1.0, 1e-8, 0.01))
    assert [row["cost"] for row in tried] == [1e-8, 0.01, 1.0]
    best = max(row["accuracy"] for row in tried)
    assert next(row for row in tried if row["cost"] == cost)["accuracy"] == best
    assert choose_cost(x, labels, groups, (0.5,)) == (0.5, [])
    with pytest.raises(ValueError, match="two groups"):
        choose_cost(x, labels, np.zeros(len(x)), (0.1, 1.0))
