"""DALI: a real pipeline on the CPU, and the GPU's codecs where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from clipmill.pipeline.decode import dali, gpu, mp4
from clipmill.pipeline.decode.decoder import UnsupportedCodecError
from clipmill.pipeline.shard import ShardReader

pytest.importorskip("nvidia.dali", reason="no DALI: pip install 'clipmill[dali]'", exc_type=ImportError)


def test_a_pipeline_is_built_once_and_again_after_an_error(stream_of, number_of):
    record = stream_of("mjpeg")[0]
    data = mp4.wrap(record, ShardReader().packets(record, 0, 12), np.arange(12), range(12))
    pictures = dali.Pictures(None)
    first = pictures(data, [0, 3, 11])
    assert first.shape == (3, 64, 96, 3)
    assert [number_of(picture[..., 1]) for picture in first] == [0, 3, 11]
    pipeline = pictures._pipeline
    assert [number_of(picture[..., 1]) for picture in pictures(data, [5])] == [5]
    assert pictures._pipeline is pipeline
    with pytest.raises(RuntimeError):
        pictures(data[: len(data) // 8], [5])
    assert [number_of(picture[..., 1]) for picture in pictures(data, [7, 8])] == [7, 8]


def test_without_a_gpu_only_jpeg_is_taken(stream_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "count", lambda: 0)
    with pytest.raises(UnsupportedCodecError, match="decoder 'dali without a GPU' takes mjpeg; choose decoder 'auto'"):
        dali.new(ShardReader()).decode(stream_of("h264")[0], [0], lambda *_: None)


@pytest.mark.gpu
def test_a_gpu_decodes_what_the_cpu_does_not(stream_of, number_of):
    record = stream_of("h264")[0]
    seen: list[int] = []
    dali.new(ShardReader()).decode(record, [3, 9, 40], lambda number, planes: seen.append(number_of(planes[0])))
    assert seen == [3, 9, 40]
