"""Pictures: plain JPEGs keep every byte, everything else becomes one; the loader's decoder reads both alike."""

import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipmill.pipeline.pack.still import canonical_size, is_plain_jpeg


def photo(size=(64, 48), mode="RGB"):
    """Something smooth with edges and colour."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rgb = np.stack([x, y, 0.5 + 0.3 * np.sin(6 * x) * np.cos(5 * y)], -1)
    rgb[height // 4 : height // 2, width // 4 : width // 2] = (0.9, 0.2, 0.1)
    return Image.fromarray(np.uint8(rgb * 255)).convert(mode)


def save(kit, image, name, **options):
    path = kit.folder / name
    image.save(path, **options)
    return path


def pixels(path, upright=False):
    """(H, W, 3) of a picture file, as Pillow reads it."""
    with Image.open(path) as image:
        return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGB")).astype(int)


def rgb_of(result):
    return pixels(result.picture.path)


def packed(kit, path, **settings):
    result = kit.pack(path, **settings)
    assert result.status == "ok", (result.reason, result.detail)
    picture = result.picture
    assert (picture.num_frames, picture.fps, picture.codec.codec) == (1, Fraction(1), "mjpeg")
    assert (picture.codec.matrix, picture.codec.full_range) == ("bt601", True)
    assert picture.width % 2 == picture.height % 2 == 0
    payload = Path(picture.path).read_bytes()
    assert picture.sizes.tolist() == [len(payload)]
    assert is_plain_jpeg(payload)
    assert picture.psnr_db > 30
    return result


def test_a_plain_jpeg_keeps_every_byte(kit):
    path = save(kit, photo(), "a.jpg", quality=80, subsampling="4:2:0")
    result = packed(kit, path)
    assert Path(result.picture.path).read_bytes() == path.read_bytes()
    assert result.facts["normalised"]["kept"]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGB", {}),
        ("a.png", "RGBA", {}),
        ("a.png", "P", {}),
        ("a.png", "L", {}),
        ("a.bmp", "RGB", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.tif", "RGB", {}),
        ("a.ppm", "RGB", {}),
        ("a.jpg", "RGB", {"quality": 95, "subsampling": "4:4:4"}),
        ("a.jpg", "RGB", {"quality": 95, "subsampling": "4:2:2"}),
        ("a.jpg", "RGB", {"quality": 95, "progressive": True}),
        ("a.jpg", "L", {"quality": 95}),
        ("a.jpg", "CMYK", {"quality": 95}),
    ],
)
def test_everything_else_becomes_a_jpeg(kit, name, mode, options):
    image = photo(mode=mode)
    path = save(kit, image, name, **options)
    result = packed(kit, path)
    assert not result.facts["normalised"]["kept"]
    assert np.abs(rgb_of(result) - pixels(path)).mean() < (16 if mode == "P" else 6)  # dither is lost with chroma


def test_odd_sizes_lose_their_edge(kit):
    image = photo((65, 49))
    for name in ("a.png", "a.jpg"):
        result = packed(kit, save(kit, image, name))
        assert (result.picture.width, result.picture.height) == (64, 48)
        assert np.abs(rgb_of(result) - np.asarray(image.crop((0, 0, 64, 48))).astype(int)).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kit, orientation):
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(kit, image, "a.jpg", exif=exif, quality=95, subsampling="4:2:0")
    result = packed(kit, path)
    expected = pixels(path, upright=True)
    found = rgb_of(result)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4
    assert result.facts["normalised"]["kept"] == (orientation == 1)
    with Image.open(result.picture.path) as packed_image:
        assert packed_image.getexif().get(0x0112, 1) == 1


def test_sixteen_bits_become_eight(kit):
    levels = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    result = packed(kit, save(kit, Image.fromarray(levels), "a.png"))
    assert np.abs(rgb_of(result)[..., 0] - levels / 257).max() < 5


def test_of_an_animation_the_first_picture_is_taken(kit):
    first, second = photo(), ImageOps.invert(photo())
    path = save(kit, first, "a.webp", save_all=True, append_images=[second], lossless=True)
    result = packed(kit, path)
    assert result.facts["images"] == 2
    assert np.abs(rgb_of(result) - np.asarray(first).astype(int)).mean() < 6


@pytest.mark.parametrize(("size", "expected"), [((64, 48), (42, 32)), ((48, 64), (32, 42)), ((30, 20), (30, 20))])
def test_the_short_side_is_an_upper_limit(kit, size, expected):
    result = packed(kit, save(kit, photo(size), "a.jpg"), short_side=32)
    assert (result.picture.width, result.picture.height) == expected


def test_data_after_the_end_of_a_jpeg_is_not_kept(kit):
    path = save(kit, photo(), "a.jpg", subsampling="4:2:0")
    path.write_bytes(path.read_bytes() + b"a second picture")
    assert not packed(kit, path).facts["normalised"]["kept"]


def test_an_rgb_jpeg_is_not_taken_for_ycbcr(kit):
    path = save(kit, photo(), "a.jpg", quality=95, keep_rgb=True)
    assert not is_plain_jpeg(path.read_bytes())
    assert np.abs(rgb_of(packed(kit, path)) - np.asarray(photo()).astype(int)).mean() < 6


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_damaged_pictures_are_rejected(kit, name):
    path = save(kit, photo((640, 480)), name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = kit.pack(path)
    assert (result.status, result.reason) == ("rejected", "unreadable")


def test_a_picture_that_would_fill_the_memory_is_rejected(kit):
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (kit.folder / "bomb.png").write_bytes(data)
    result = kit.pack(kit.folder / "bomb.png")
    assert (result.status, result.reason) == ("rejected", "too_large")


def test_tiny_pictures(kit):
    assert canonical_size(1, 1, None) == (2, 2)
    assert canonical_size(3, 5, None) == (2, 4)
    assert canonical_size(1920, 1080, 256) == (456, 256)
    result = packed(kit, save(kit, Image.new("RGB", (1, 1), (9, 9, 9)), "dot.png"))
    assert (result.picture.width, result.picture.height) == (2, 2)
