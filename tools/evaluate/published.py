"""Numbers of the literature for action recognition, shown beside ours where corpus and protocol are the same.

A row names its method and source; its numbers have the names and the scale of our metrics. Sources: the methods'
released repositories. UCF101 and HMDB51 are means over the three splits where a whole network was tuned, and of split 1
where videos were retrieved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CORPORA = {  # first and last class, and how many
    ("applyeyemakeup", "yoyo", 101): "UCF101",
    ("brush_hair", "wave", 51): "HMDB51",
    ("abseiling", "zumba", 400): "Kinetics-400",
}
_TUNED = {  # method, backbone, pretraining: UCF101, HMDB51; source
    ("XDC", "R(2+1)D-18", "AudioSet"): (0.930, 0.637, "HumamAlwassel/XDC"),
    ("XDC", "R(2+1)D-18", "IG-Kinetics 65M"): (0.955, 0.689, "HumamAlwassel/XDC"),
    ("labels", "R(2+1)D-18", "Kinetics-400"): (0.942, 0.651, "HumamAlwassel/XDC"),
    ("CrissCross", "R(2+1)D-18", "Kinetics-400"): (0.915, 0.647, "pritamqu/CrissCross"),
    ("CrissCross", "R(2+1)D-18", "AudioSet"): (0.924, 0.674, "pritamqu/CrissCross"),
    ("VideoMoCo", "R(2+1)D-18", "Kinetics-400"): (0.825, 0.492, "tinapan-pt/VideoMoCo"),
    ("VCLR", "R50 TSN", "Kinetics-400"): (0.856, 0.541, "amazon-research/video-contrastive-learning"),
    ("CoCLR RGB", "S3D", "Kinetics-400"): (0.879, 0.546, "TengdaHan/CoCLR"),
}
_RETRIEVED = {
    ("VCLR", "R50", "Kinetics-400"): (0.706, 0.352, "amazon-research/video-contrastive-learning"),
    ("VCLR", "R50", "UCF101"): (0.468, 0.176, "amazon-research/video-contrastive-learning"),
    ("CoCLR RGB", "S3D", "UCF101"): (0.518, None, "TengdaHan/CoCLR"),
}


def corpus_of(classes: Sequence[str]) -> str:
    """UCF101, HMDB51 or Kinetics-400 by its class names; empty for others.

    >>> corpus_of(["walk", "run"])
    ''
    """
    names = sorted(name.casefold().replace(" ", "_") for name in classes)
    return _CORPORA.get((names[0], names[-1], len(names)), "") if names else ""


def published(benchmark: str, classes: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows for a report of ``benchmark`` on a corpus with these classes."""
    corpus = corpus_of(classes)
    if benchmark == "svm" and corpus == "Kinetics-400":
        source = "amazon-research/video-contrastive-learning"
        return [
            {"method": "VCLR, R50, Kinetics-400", "top1": 0.641, "source": source},
            {"method": "SeCo, R50, Kinetics-400", "top1": 0.619, "source": source},
        ]
    table, metric = {"finetune": (_TUNED, "top1"), "retrieval": (_RETRIEVED, "r@1")}.get(benchmark, ({}, ""))
    if corpus not in ("UCF101", "HMDB51"):
        return []
    column = ("UCF101", "HMDB51").index(corpus)
    return [
        {"method": ", ".join(who), metric: row[column], "source": row[2]}
        for who, row in table.items()
        if row[column] is not None
    ]
