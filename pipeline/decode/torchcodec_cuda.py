"""The torchcodec backend on NVDEC. The wheel on PyPI decodes on the CPU only; those of PyTorch's index have CUDA."""

from __future__ import annotations

from clipmill.pipeline.decode import gpu
from clipmill.pipeline.decode.decoder import Decoder
from clipmill.pipeline.decode.torchcodec import decoder
from clipmill.pipeline.shard import Reader


def new(reader: Reader) -> Decoder:
    """The backend's constructor. Raises ImportError without a GPU."""
    if gpu.count() == 0:
        raise ImportError("the CUDA driver shows no GPU")
    return decoder("torchcodec_cuda", reader, f"cuda:{gpu.number()}")
