"""The DALI backend: NVDEC on a GPU; without one only MJPEG, the rest its CPU build does not decode.

Its RGB differs from FFmpeg's by up to ten levels at edges of colour, for it interpolates chroma; FFmpeg repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipmill.pipeline.decode import gpu, mp4
from clipmill.pipeline.decode.decoder import Decoder
from clipmill.pipeline.decode.rgb import RgbDecoder
from clipmill.pipeline.shard import Reader

_CPU_CODECS = ("mjpeg",)


def new(reader: Reader) -> Decoder:
    """The backend's constructor. Raises ImportError where DALI does not load."""
    _check_installed()
    device = gpu.number() if gpu.count() else None
    pictures = Pictures(device)
    return RgbDecoder(
        "dali" if gpu.count() else "dali without a GPU",
        reader,
        lambda clip: pictures(clip.data, clip.places),
        _CPU_CODECS if device is None else mp4.CODECS,
        (RuntimeError,),
    )


class Pictures:
    """Frames of a file's bytes as (N, height, width, 3) uint8 RGB, by a DALI pipeline that stays built.

    device: number of the GPU, or None for the CPU.
    """

    def __init__(self, device: int | None) -> None:
        self._device = device
        self._pipeline: Any = None
        self._data = np.empty(0, np.uint8)
        self._numbers = np.empty(0, np.int32)

    def __call__(self, data: bytes, numbers: Sequence[int]) -> np.ndarray:
        """Decode frames ``numbers`` of the file ``data``."""
        if self._pipeline is None:
            self._pipeline = self._build()
        self._data = np.frombuffer(data, np.uint8)
        self._numbers = np.asarray(numbers, np.int32)
        try:
            (frames,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # after an error it cannot run again
            raise
        return np.array(frames.as_cpu().at(0))

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn
        from nvidia.dali.types import DALIDataType

        pipeline = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=self._device,
            prefetch_queue_depth=1,  # the next clip is not known before this one is done
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            data = fn.external_source(source=lambda: [self._data], dtype=DALIDataType.UINT8, ndim=1)
            numbers = fn.external_source(source=lambda: [self._numbers], dtype=DALIDataType.INT32, ndim=1)
            device = "cpu" if self._device is None else "mixed"
            pipeline.set_outputs(fn.decoders.video(data, device=device, frames=numbers))
        pipeline.build()
        return pipeline


def _check_installed() -> None:
    try:
        import nvidia.dali
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"no 'nvidia-dali-cuda130' or -cuda120, or not all of it: {error}") from error
    except (ImportError, OSError) as error:
        raise ImportError(f"'nvidia-dali-cuda130' does not load: {error}") from error
    assert nvidia.dali
