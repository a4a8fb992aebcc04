"""Batch statistics that give nothing away: embeddings in groups, and keys embedded among other rows than their query's.

A network with batch normalisation sees a query and its own key in batches of the same samples, and could tell the key
by its statistics alone. K. He et al., "Momentum Contrast", CVPR 2020, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipmill.pipeline import dist


def in_groups(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """A batch in equal parts, to pass through a network one by one, each with batch statistics of its own.

    One process then plays several. Raises ValueError if the batch cannot be cut so.
    """
    if len(x) % groups:
        raise ValueError(f"{len(x)} samples per process cannot be cut into {groups} groups; use a multiple of groups")
    return x.split(len(x) // groups)


def grouped(network: Callable[[Tensor], Tensor], x: Tensor, groups: int) -> Tensor:
    """``network(x)`` with the rows cut into ``groups`` equal batches, each with statistics of its own."""
    return torch.cat([network(part) for part in in_groups(x, groups)])


def shuffled(network: Callable[[Tensor], Tensor], x: Tensor, order: Tensor | None) -> Tensor:
    """``network(x)`` computed where ``order`` sends the rows of all processes, and brought back (shuffling-BN).

    order: (W * n,) permutation, equal in all processes; None: every row stays where it is. No gradient flows through
    an exchange.
    """
    if order is None:
        return network(x)
    return dist.exchange(network(dist.exchange(x, order)), dist.inverse(order))
