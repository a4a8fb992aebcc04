"""libjpeg-turbo through ctypes: planes, reduced sizes, and refusal of what would not fit into them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipmill.pipeline.decode import jpeg
from clipmill.pipeline.decode.decoder import DecodeError, UnsupportedCodecError
from clipmill.pipeline.shard import ShardReader

pytestmark = pytest.mark.skipif(jpeg.library() is None, reason="no libjpeg-turbo: pip install 'clipmill[jpeg]'")


def picture(height: int, width: int) -> Image.Image:
    """A smooth colour picture."""
    rows, columns = np.mgrid[:height, :width]
    red = 128 + 90 * np.sin(rows / 23 + columns / 31)
    green = 128 + 80 * np.cos(columns / 19)
    return Image.fromarray(np.stack([red, green, 255 * rows / height], -1).astype(np.uint8))


def packed(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **{"subsampling": "4:2:0", **options})
    return out.getvalue()


@pytest.mark.parametrize(("height", "width"), [(128, 170), (64, 64), (66, 98), (2, 2), (240, 320)])
@pytest.mark.parametrize("scale", jpeg.SCALES)
def test_reduced_planes_are_means_of_the_whole(height: int, width: int, scale: int):
    data = packed(picture(height, width))
    whole = [plane.astype(float) for plane in jpeg.Decompressor()(data, height, width)]
    half = (height // 2, width // 2)
    assert [plane.shape for plane in whole] == [(height, width), half, half]
    y, cb, cr = (np.asarray(plane).astype(float) for plane in picture(height, width).convert("YCbCr").split())
    assert np.abs(whole[0] - y).mean() < 2
    for plane, truth in zip(whole[1:], (cb, cr), strict=True):
        assert np.abs(plane - truth.reshape(half[0], 2, half[1], 2).mean((1, 3))).mean() < 2
    small = jpeg.Decompressor()(data, height, width, scale)
    rows, columns = -(-height // scale), -(-width // scale)
    assert small[0].shape == (rows, columns)
    assert [plane.shape for plane in small[1:]] == [(-(-rows // 2), -(-columns // 2))] * 2
    for plane, full in zip(small, whole, strict=True):
        inner = [side // scale for side in full.shape]
        if min(inner) == 0:
            continue
        means = full[: inner[0] * scale, : inner[1] * scale].reshape(inner[0], scale, inner[1], scale).mean((1, 3))
        error = plane[: inner[0], : inner[1]] - means
        assert np.abs(error).max() < 7  # the edges of blocks ring a little
        assert np.abs(error).mean() < 1.2


def test_the_decoder_takes_a_scale(stream_of):
    record = stream_of("mjpeg")[0]
    found: dict[int, tuple] = {}
    decoder = jpeg.JpegDecoder(ShardReader())
    for scale in jpeg.SCALES:
        decoder.decode(record, [3, 9], lambda number, planes: found.update({number: planes[0].shape}), scale)
        assert found == dict.fromkeys([3, 9], (record.height // scale, record.width // scale))
    assert decoder.decoded == 8


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (packed(picture(32, 48), subsampling="4:4:4"), "not 48x32 in 4:2:0"),
        (packed(picture(32, 48), subsampling="4:2:2"), "not 48x32 in 4:2:0"),
        (packed(picture(32, 48).convert("L")), "not 48x32 in 4:2:0"),
        (packed(picture(32, 64)), "a JPEG of 64x32 pixels"),
        (packed(picture(4000, 6000)), "a JPEG of 6000x4000 pixels"),
        (b"", "not a JPEG"),
        (b"\xff\xd8\xff", "not a JPEG"),
        (bytes(1000), "not a JPEG"),
        (packed(picture(32, 48))[:400], "not a JPEG"),
        (packed(picture(32, 48))[:-200], "a damaged JPEG"),
    ],
)
def test_what_does_not_fit_is_refused(data: bytes, said: str):
    decompress = jpeg.Decompressor()
    with pytest.raises(ValueError, match=said):
        decompress(data, 32, 48)
    assert decompress(packed(picture(32, 48)), 32, 48)[0].shape == (32, 48)


def test_nothing_that_is_altered_does_harm():
    rng = np.random.default_rng(0)
    good = packed(picture(48, 64))
    decompress = jpeg.Decompressor()
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for place in rng.integers(0, len(data), rng.integers(1, 6)).tolist():
            data[place] = int(rng.integers(0, 256))
        try:
            decompress(bytes(data[: int(rng.integers(1, len(data) + 1))]), 48, 64)
        except ValueError:
            refused += 1
    assert refused > 1000
    assert decompress(good, 48, 64)[0].mean() == jpeg.Decompressor()(good, 48, 64)[0].mean()


def test_buffers_are_bounded():
    decompress = jpeg.Decompressor()
    for side in range(16, 64, 2):
        decompress(packed(picture(side, side)), side, side)
    assert len(decompress._buffers) == jpeg._MAX_BUFFERS


def test_errors_name_the_frame_and_other_subsampling_the_remedy(stream_of):
    record = stream_of("mjpeg")[0]
    with pytest.raises(DecodeError, match=r"frame 4 of 'mjpeg/0': a JPEG of 96x64 pixels"):
        jpeg.JpegDecoder(ShardReader()).decode(replace(record, width=48), [4], lambda *_: None)
    other = replace(record, codec=replace(record.codec, pix_fmt="yuvj422p"))
    with pytest.raises(UnsupportedCodecError, match="JPEG in yuvj422p, decoder 'jpeg' takes 4:2:0 in order; choose"):
        jpeg.JpegDecoder(ShardReader()).decode(other, [4], lambda *_: None)


def test_without_the_library_the_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jpeg, "library", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="'turbojpeg'"):
        jpeg.new(ShardReader())


def test_a_library_of_another_kind_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "libturbojpeg.so").write_text("not a library")
    monkeypatch.setattr(jpeg, "_candidates", lambda: [str(tmp_path / "libturbojpeg.so"), "libc.so.6"])
    jpeg.library.cache_clear()
    assert jpeg.library() is None
    jpeg.library.cache_clear()
