"""Published protocols of fine-tuning on actions, of linear classification and of few labels, as options of `finetune`.

Sources: SimCLR, Chen et al., ICML 2020, and google-research/simclr; MoCo, He et al., CVPR 2020, and
facebookresearch/moco (DenseCL's and MoCHi's linear probes follow it); HCL, Robinson et al., ICLR 2021, and
joshr17/HCL. SeLaVi, Asano et al., NeurIPS 2020, and facebookresearch/selavi; CrissCross, Sarkar and Etemad, AAAI 2023,
and pritamqu/CrissCross; CoCLR, Han et al., NeurIPS 2020, and TengdaHan/CoCLR; VideoMoCo, Pan et al., CVPR 2021, and
tinapan-pt/VideoMoCo; VCLR, Kuang et al., ICCV workshops 2021, and amazon-research/video-contrastive-learning with
mmaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Protocol = Literal[
    "own",
    "selavi",
    "crisscross_8f",
    "crisscross_32f",
    "coclr",
    "videomoco",
    "vclr_tsn",
    "vclr_tsn_activitynet",
    "vclr_tsn_ssv2",
    "vclr_tsm_ssv2",
    "simclr_linear",
    "simclr_1pct",
    "simclr_10pct",
    "moco_linear",
    "hcl_linear",
]

_ACTIONS = {"optimiser": "sgd", "warmup_epochs": 0.0, "schedule": "step"}
# CrissCross pools by maximum and draws its classifier orthogonal; both are left as everywhere else.
_CRISSCROSS = {
    **_ACTIONS,
    "epochs": 20,
    "weight_decay": 0.0,
    "gamma": 0.3,
    "clips_per_epoch": 10,
    "min_area": 0.08,
    "jitter": (0.4, 0.4, 0.4, 0.2),
    "grey": 0.2,
    "cutout": 20,
}
_VCLR = {
    **_ACTIONS,
    "train_batch": 256,  # 32 videos on each of 8 devices
    "lr": 0.01,
    "weight_decay": 5e-4,
    "clip_grad_norm": 40.0,
    "epochs": 300,
    "milestones": (120, 240),
    "segments": 3,
    "dropout": 0.4,
    "train_size": 224,
    "views": {"clips": 25, "spacing": "middle", "frames": 1, "size": 256, "resize": 256},
}
# Left and right make classes of Something-Something. Milestones are not published; they are mmaction's.
_SSV2 = {**_VCLR, "epochs": 50, "milestones": (20, 40), "lr": 0.02, "weight_decay": 1e-4, "segments": 8, "flip": 0.0}

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
    "selavi": {
        **_ACTIONS,
        "epochs": 12,
        "lr": 2.5e-3,
        "encoder_lr_scale": 0.1,
        "weight_decay": 5e-3,
        "warmup_epochs": 2.0,
        "milestones": (6, 10),
        "gamma": 0.05,
        "clips_per_epoch": 10,
        "views": {"clips": 10, "crops": "three", "frames": 32, "stride": 1, "size": 128},
    },
    "crisscross_8f": {
        **_CRISSCROSS,
        "train_batch": 64,
        "lr": 5e-4,
        "milestones": (6, 10, 14),
        "views": {"clips": 10, "frames": 8, "fps": 16.0, "size": 224},
    },
    "crisscross_32f": {
        **_CRISSCROSS,
        "train_batch": 32,
        "lr": 1e-4,
        "milestones": (8, 12, 16),
        "views": {"clips": 10, "frames": 32, "fps": 16.0, "size": 224},
    },
    "coclr": {
        **_ACTIONS,
        "epochs": 500,
        "train_batch": 32,
        "optimiser": "adam",
        "lr": 1e-3,
        "milestones": (400, 450),
        "dropout": 0.9,
        "views": {"clips": 1, "spacing": "overlap", "crops": "ten", "frames": 32, "stride": 1, "size": 128},
    },
    "videomoco": {
        **_ACTIONS,
        "epochs": 10,
        "train_batch": 256,
        "lr": 0.005,
        "milestones": (6, 8),
        "clips_per_epoch": 10,
        "views": {"clips": 10, "frames": 32, "size": 112},
    },
    "vclr_tsn": _VCLR,
    "vclr_tsn_activitynet": {**_VCLR, "segments": 8, "dropout": 0.8, "views": {**_VCLR["views"], "crops": "three"}},
    "vclr_tsn_ssv2": {
        **_SSV2,
        "views": {"clips": 8, "spacing": "middle", "crops": "ten", "frames": 1, "size": 224, "resize": 256},
    },
    "vclr_tsm_ssv2": {
        **_SSV2,
        "shift": 8,
        "views": {"clips": 1, "spacing": "segments", "frames": 8, "size": 224, "resize": 256},
    },
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
