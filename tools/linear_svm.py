"""A linear support vector machine over frozen features: one against the rest, squared hinge, L2 penalty.

The classifier of the field's action and sound benchmarks: liblinear through scikit-learn's `LinearSVC`, whose intercept
is regularised with the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSvm:
    """A trained machine. weight (D, K), bias (K,). converged: liblinear finished within its iterations."""

    weight: np.ndarray
    bias: np.ndarray
    converged: bool = True

    def decisions(self, x_ND: np.ndarray) -> np.ndarray:
        """Signed distances (..., K) of features (..., D); a class that was never trained is -inf."""
        return x_ND @ self.weight + self.bias


def fit_svm(
    x_ND: np.ndarray, labels: np.ndarray, cost: float, *, num_classes: int = 0, max_iter: int = 20000
) -> LinearSvm:
    """Train on rows of features; ``labels`` (N,) are class numbers.

    cost: C, how much a violated margin costs. num_classes: K, 0 = the largest label + 1. Minimises, for each class,
    |w|^2 / 2 + b^2 / 2 + C * sum_i max(0, 1 - y_i (w x_i + b))^2. Raises ValueError for fewer than two classes.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise ValueError(f"a support vector machine needs two classes, the labels hold {present.tolist()}")
    if cost <= 0:
        raise ValueError(f"the cost C must be greater than 0, got {cost}")
    machine = LinearSVC(C=cost, max_iter=max_iter, dual="auto", random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        machine.fit(x_ND, labels)
    converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
    coef, intercept = machine.coef_, machine.intercept_
    if len(present) == 2:  # liblinear trains one machine for two classes; its mirror image is the other
        coef, intercept = np.concatenate([-coef, coef]), np.concatenate([-intercept, intercept])
    size = max(num_classes, int(present[-1]) + 1)
    weight, bias = np.zeros((x_ND.shape[1], size), x_ND.dtype), np.full(size, -np.inf, x_ND.dtype)
    weight[:, present], bias[present] = coef.T, intercept
    return LinearSvm(weight=weight, bias=bias, converged=converged)


def choose_cost(
    x_ND: np.ndarray, labels: np.ndarray, groups: np.ndarray, costs: Sequence[float], *, max_iter: int = 20000
) -> tuple[float, list[dict[str, float]]]:
    """The cost with the best mean accuracy when every group of rows is left out once, and all that were tried.

    groups (N,): rows of one group (a fold, or all windows of one recording) are never on both sides. Equal accuracies
    keep the smaller cost. With one cost nothing is trained.
    """
    if len(costs) == 1:
        return costs[0], []
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"choosing among the costs {list(costs)} needs at least two groups of rows; give one cost")
    size = int(labels.max()) + 1
    tried = []
    for cost in sorted(costs):
        hits = []
        for name in names:
            out = groups == name
            machine = fit_svm(x_ND[~out], labels[~out], cost, num_classes=size, max_iter=max_iter)
            hits.append(float((machine.decisions(x_ND[out]).argmax(1) == labels[out]).mean()))
        tried.append({"cost": float(cost), "accuracy": float(np.mean(hits))})
    best = max(tried, key=lambda row: row["accuracy"])  # the first of equals: the smallest cost
    return best["cost"], tried
