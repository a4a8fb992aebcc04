"""RGB back to planes, and the files that RGB backends are given."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

import av
import numpy as np
import pytest

from clipmill.pipeline.codec import CodecConfig
from clipmill.pipeline.decode.decoder import DecodeError, UnsupportedCodecError, new_decoder
from clipmill.pipeline.decode.rgb import Clip, RgbDecoder, clips, to_planes
from clipmill.pipeline.decode.runs import Feed
from clipmill.pipeline.shard import ShardReader
from clipmill.pipeline.spec import yuv_to_rgb_matrix

COLOURS = pytest.mark.parametrize(
    ("matrix", "full_range"), [("bt709", False), ("bt601", False), ("bt601", True), ("bt2020", False)]
)


@COLOURS
def test_planes_are_what_the_inverse_matrix_says(matrix: str, full_range: bool):
    rgb = np.random.default_rng(0).integers(0, 256, (10, 14, 3)).astype(np.uint8)
    mix, shift = yuv_to_rgb_matrix(matrix, full_range)
    yuv = np.linalg.solve(mix, (rgb.reshape(-1, 3) / 255.0 - shift).T).T.reshape(10, 14, 3)
    y, u, v = to_planes(rgb, CodecConfig(codec="h264", matrix=matrix, full_range=full_range))
    assert np.abs(y - yuv[..., 0]).max() <= 0.51
    for plane, channel in ((u, 1), (v, 2)):
        mean = yuv[..., channel].reshape(5, 2, 7, 2).mean((1, 3))
        assert np.abs(plane - mean).max() <= 0.51


@COLOURS
def test_exact_rgb_gives_the_planes_it_was_made_from(matrix: str, full_range: bool):
    rng = np.random.default_rng(1)
    y, u, v = (rng.integers(low, high, shape) for low, high, shape in ((80, 160, (12, 16)), *[(112, 144, (6, 8))] * 2))
    mix, shift = yuv_to_rgb_matrix(matrix, full_range)
    yuv = np.stack([y, u.repeat(2, 0).repeat(2, 1), v.repeat(2, 0).repeat(2, 1)], -1)
    rgb = np.rint(255 * (yuv @ mix.T + shift)).clip(0, 255).astype(np.uint8)
    found = to_planes(rgb, CodecConfig(codec="h264", matrix=matrix, full_range=full_range))
    for plane, truth in zip(found, (y, u, v), strict=True):
        assert np.abs(plane.astype(int) - truth).max() <= 1


def test_a_picture_that_is_not_contiguous_will_do():
    rgb = np.random.default_rng(2).integers(0, 256, (3, 8, 20)).astype(np.uint8).transpose(1, 2, 0)[:, ::2]
    codec = CodecConfig(codec="h264")
    for plane, other in zip(to_planes(rgb, codec), to_planes(rgb.copy(), codec), strict=True):
        assert np.array_equal(plane, other)


def test_one_file_holds_the_groups_that_are_needed(stream_of):
    record = stream_of("h264")[0]
    (clip,) = clips(Feed(ShardReader()), record, [3, 5, 17, 38])
    assert clip.numbers == [3, 5, 17, 38]
    assert clip.places == [3, 5, 6 + 1, 6 + 2 + 6]  # 0..5, 16..17, 32..38
    assert clip.delay == 0
    sizes = record.packet_sizes
    assert clip.data.endswith(b"".join(bytes(p) for p in ShardReader().packets(record, 32, 39)))
    assert len(clip.data) < sizes[:6].sum() + sizes[16:18].sum() + sizes[32:39].sum() + 1500


@pytest.mark.parametrize("name", ["h264_open", "hevc_open"])
def test_reordered_groups_have_files_of_their_own_that_begin_one_group_earlier(name: str, stream_of, number_of):
    record = stream_of(name)[0]
    keys, shown = record.keyframes.tolist(), record.presentation.tolist()
    wanted = [shown[keys[1]] + 1, shown[keys[2]] + 2, shown[keys[2]] + 3]
    found = list(clips(Feed(ShardReader()), record, wanted))
    assert [clip.numbers for clip in found] == [wanted[:1], wanted[1:]]
    for clip, begin in zip(found, (0, shown[keys[1]]), strict=True):
        with av.open(io.BytesIO(clip.data)) as container:
            frames = {frame.pts - clip.delay: frame.to_ndarray() for frame in container.decode(video=0)}
        assert [number_of(frames[place][: record.height]) for place in clip.places] == clip.numbers
        assert number_of(frames[0][: record.height]) == begin  # what is shown before the key frame is left out


@pytest.mark.parametrize("library", ["torchcodec", "decord"])
@pytest.mark.parametrize("name", ["h264", "mjpeg"])
def test_rgb_is_that_of_ffmpeg_with_the_records_matrix(library: str, name: str, stream_of):
    try:
        new_decoder(library, ShardReader())
    except ValueError as error:
        pytest.skip(str(error))
    module = import_module(f"clipmill.pipeline.decode.{library}")
    record = stream_of(name)[0]
    (clip,) = clips(Feed(ShardReader()), record, [0, 9, 17])
    with av.open(io.BytesIO(clip.data)) as container:
        frames = list(container.decode(video=0))
    for place, picture in zip(clip.places, module.pictures(clip.data, clip.places), strict=True):
        assert np.abs(picture.astype(int) - frames[place].to_ndarray(format="rgb24")).max() <= 2
        mix, shift = yuv_to_rgb_matrix(record.codec.matrix, record.codec.full_range)
        y, uv = np.split(frames[place].to_ndarray().ravel(), [64 * 96])
        u, v = uv.reshape(2, 32, 48).repeat(2, 1).repeat(2, 2)
        exact = 255 * (np.stack([y.reshape(64, 96), u, v], -1) @ mix.T + shift).clip(0, 1)
        assert np.abs(picture - exact).max() < 3  # rounded down


def decoder(pictures: Any, **options: Any) -> RgbDecoder:
    return RgbDecoder("some", ShardReader(), pictures, ("h264",), (RuntimeError,), **options)


def test_what_a_library_says_is_checked_and_wrapped(stream_of):
    record = stream_of("h264")[0]

    def broken(clip: Clip) -> np.ndarray:
        raise RuntimeError("no more frames")

    with pytest.raises(DecodeError, match=r"h264/0.*no more frames"):
        decoder(broken).decode(record, [1], lambda *_: None)
    with pytest.raises(DecodeError, match=r"decodes to \(1, 64, 90, 3\)"):
        decoder(lambda clip: np.zeros((1, 64, 90, 3), np.uint8)).decode(record, [1], lambda *_: None)
    with pytest.raises(DecodeError, match="decodes to"):
        decoder(lambda clip: np.zeros((1, 64, 96, 3), np.uint8)).decode(record, [1, 2], lambda *_: None)


def test_a_library_that_counts_frames_is_not_given_reordered_ones(stream_of):
    with pytest.raises(UnsupportedCodecError, match="'some' may confuse; choose decoder 'auto'"):
        decoder(lambda clip: None).decode(stream_of("h264_open")[0], [1], lambda *_: None)
