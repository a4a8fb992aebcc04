"""Published protocols of linear classification and of learning from few labels on pictures, as options of `finetune`.

Sources: SimCLR, Chen et al., ICML 2020, and google-research/simclr; MoCo, He et al., CVPR 2020, and
facebookresearch/moco (DenseCL's and MoCHi's linear probes follow it); HCL, Robinson et al., ICLR 2021, and
joshr17/HCL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Protocol = Literal["own", "simclr_linear", "simclr_1pct", "simclr_10pct", "moco_linear", "hcl_linear"]

_SIMCLR = {
    "train_batch": 4096,
    "optimiser": "sgd",
    "nesterov": True,
    "lr_scaling": "linear",
    "warmup_epochs": 0.0,
    "schedule": "cosine",
    "min_area": 0.08,
    "zero_head": True,
    "views": {"clips": 1, "centre_crop": "cut"},
}
# Learning from few labels: no decay and no other regulariser; all weights are tuned from the pooled feature.
_SIMCLR_FEW = {**_SIMCLR, "lr": 0.05, "weight_decay": 0.0}

PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "own": {},
    "simclr_linear": {**_SIMCLR, "frozen": "eval", "lr": 0.1, "weight_decay": 1e-6, "epochs": 90},
    "simclr_1pct": {**_SIMCLR_FEW, "epochs": 60, "splits": {"labels": 0.01}},
    "simclr_10pct": {**_SIMCLR_FEW, "epochs": 30, "splits": {"labels": 0.1}},
    "moco_linear": {
        "frozen": "eval",
        "train_batch": 256,
        "optimiser": "sgd",
        "lr": 30.0,
        "weight_decay": 0.0,
        "warmup_epochs": 0.0,
        "schedule": "step",
        "milestones": (60, 80),
        "epochs": 100,
        "min_area": 0.08,
        "views": {"clips": 1},
    },
    # The reference fits the classifier under the whole pretraining augmentation; here it is crop and flip.
    "hcl_linear": {
        "frozen": "train",
        "train_batch": 512,
        "optimiser": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-6,
        "warmup_epochs": 0.0,
        "schedule": "constant",
        "epochs": 100,
        "min_area": 0.08,
        "views": {"clips": 1},
    },
}


def filled(options: T, plain: T, wanted: Mapping[str, Any]) -> T:
    """A dataclass with ``wanted`` values in the fields that are as in ``plain``; mappings fill nested dataclasses."""
    changes: dict[str, Any] = {}
    for name, value in wanted.items():
        own, usual = getattr(options, name), getattr(plain, name)
        if isinstance(value, Mapping):
            changes[name] = filled(own, usual, value)
        elif own == usual:
            changes[name] = value
    return replace(options, **changes)  # type: ignore[type-var]
