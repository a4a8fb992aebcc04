"""clipmill: pack raw video, stream clips to the device, pretrain without labels, evaluate.

The names below load on first use, so that ``import clipmill`` costs nothing.

>>> import clipmill
>>> clipmill.__version__.count(".")
2
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "VideoRecord": "pipeline.record",
    "ShardIndex": "pipeline.record",
    "View": "pipeline.views",
    "Span": "pipeline.views",
    "Planner": "pipeline.views",
    "Cursor": "pipeline.order",
    "ClipBatch": "pipeline.batch",
    "Loader": "pipeline.loader",
    "Method": "models.method",
    "Output": "models.method",
    "Encoder": "models.encoder",
    "load_encoder": "models.encoder",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'clipmill' has no attribute {name!r}")
    return getattr(import_module(f"clipmill.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
