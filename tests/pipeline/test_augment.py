"""The torch reference of the augmentation against torchvision v2 and against the formulas."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from clipmill.pipeline import augment as A
from clipmill.pipeline.draws import fold
from clipmill.pipeline.slot import crop_table
from clipmill.pipeline.spec import (
    MATRICES,
    Blur,
    CenterCrop,
    Cutout,
    Flip,
    Gray,
    Jitter,
    Normalize,
    RandomResizedCrop,
    ResizedRandomCrop,
    VideoSpec,
    WholeFrame,
    eval_spec,
    moco_v1,
    moco_v2,
    simclr,
)
from clipmill.pipeline.views import View


def random_yuv(frames, height, width, seed=0):
    """Smooth pictures in legal range, (T, H*3/2, W) uint8 I420 planes y, u, v."""
    g = torch.Generator().manual_seed(seed)
    rgb = torch.rand(frames, 3, height // 8 + 2, width // 8 + 2, generator=g) * 0.8 + 0.1
    rgb = torch.nn.functional.interpolate(rgb, (height, width), mode="bilinear")
    yuv = torch.einsum("cd,tdhw->tchw", torch.tensor(to_yuv("bt709"), dtype=torch.float32), rgb)
    y = (16 + 219 * yuv[:, 0]).round().byte()
    uv = (128 + 224 * yuv[:, 1:]).reshape(frames, 2, height // 2, 2, width // 2, 2).mean((3, 5)).round().byte()
    return y, uv[:, 0], uv[:, 1]


def to_yuv(matrix):
    kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}[matrix]
    luma = np.array([kr, 1 - kr - kb, kb])
    return np.stack([luma, (np.eye(3)[2] - luma) / (2 * (1 - kb)), (np.eye(3)[0] - luma) / (2 * (1 - kr))])


def rgb_of(y, u, v, matrix="bt709", full_range=False):
    """The oracle: chroma replicated, matrix inverted, (T, 3, H, W) float64, not clipped."""
    up = [plane.repeat_interleave(2, 1).repeat_interleave(2, 2).double() for plane in (u, v)]
    low, ys, cs = (0, 255, 255) if full_range else (16, 219, 224)
    yuv = torch.stack([(y.double() - low) / ys, (up[0] - 128) / cs, (up[1] - 128) / cs], 1)
    return torch.einsum("cd,tdhw->tchw", torch.from_numpy(np.linalg.inv(to_yuv(matrix))), yuv)


def pack(spec, planes, draws=(1,), matrix="bt709", full_range=False, repeat=1):
    """What the loader would put in a slot for len(draws) samples of the same frames: payload and item table."""
    y, u, v = planes
    frames = len(y)
    view = View(name="v", num_frames=frames, augment=spec)
    keys = np.array([fold(d) for d in draws], np.uint64)
    shape = np.full(len(draws), y.shape[1]), np.full(len(draws), y.shape[2])
    items = crop_table(view, keys, np.tile(np.arange(frames), (len(draws), 1)), *shape)
    items["matrix"], items["full_range"] = MATRICES.index(matrix), full_range
    chunks, end = [], 0
    for row in items:
        for t, item in enumerate(row):
            x, y0, w, h = (int(item[name]) for name in "xywh")
            item["offset"] = end
            chunks += [y[t, y0 : y0 + h, x : x + w].flatten()]
            chunks += [p[t, y0 // 2 : (y0 + h) // 2, x // 2 : (x + w) // 2].flatten() for p in (u, v)]
            end += w * h * 3 // 2
    return torch.cat(chunks), items, keys


def run(spec, planes, draws=(1,), **kwargs):
    payload, items, keys = pack(spec, planes, draws, **kwargs)
    params = A.op_params(spec, keys, items.shape[1], fold("batch"), "v")
    return A.augment(payload, items, spec, params), items, params


def absolute_box(item):
    return [float(item[a] + item[b]) for a, b in (("x", "bx"), ("y", "by"))] + [float(item["bw"]), float(item["bh"])]


@pytest.mark.parametrize(
    ("interpolation", "antialias"),
    [("bilinear", True), ("bilinear", False), ("bicubic", True)],  # torchvision's unfiltered bicubic has a = -0.75
)
@pytest.mark.parametrize("size", [24, 96])
def test_random_resized_crop_equals_torchvision_within_a_level(interpolation, antialias, size):
    planes = random_yuv(2, 96, 128)
    spec = VideoSpec(size=size, ops=(), interpolation=interpolation, antialias=antialias)
    out, items, _ = run(spec, planes, draws=range(6))
    full = rgb_of(*planes)
    mode = v2.InterpolationMode(interpolation)
    for row in range(6):
        x, y, w, h = (round(value) for value in absolute_box(items[row, 0]))
        expected = TF.resized_crop(full, y, x, h, w, [size, size], interpolation=mode, antialias=antialias).clamp(0, 1)
        assert (out[row].transpose(0, 1) - expected).abs().max() < 1 / 255


@pytest.mark.parametrize("shape", [(96, 128), (128, 98), (96, 96)])
def test_center_crop_equals_torchvision_within_a_level(shape):
    planes = random_yuv(2, *shape)
    out, _, _ = run(VideoSpec(size=56, crop=CenterCrop(size=56, resize=64), ops=()), planes)
    exact = TF.center_crop(TF.resize(rgb_of(*planes), [64], antialias=True), [56, 56]).clamp(0, 1)
    assert (out[0].transpose(0, 1) - exact).abs().max() < 1 / 255


def test_scale_jitter_equals_a_crop_of_the_resized_frame():
    planes = random_yuv(1, 96, 128)
    spec = VideoSpec(size=40, crop=ResizedRandomCrop(size=40, resize=(48, 80)), ops=())
    out, items, _ = run(spec, planes, draws=range(6))
    shorts = set()
    for row in range(6):
        x, y, _, h = absolute_box(items[row, 0])
        short = round(40 * 96 / h)
        shorts.add(short)
        resized = TF.resize(rgb_of(*planes), [short], antialias=True)
        top, left = round(y * short / 96), round(x * resized.shape[-1] / 128)
        exact = resized[..., top : top + 40, left : left + 40].clamp(0, 1)
        assert (out[row].transpose(0, 1) - exact).abs().max() < 1 / 255
    assert len(shorts) > 2


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
def test_colour_matrices(matrix, full_range):
    planes = random_yuv(1, 32, 32)
    out, _, _ = run(VideoSpec(size=32, crop=WholeFrame(), ops=()), planes, matrix=matrix, full_range=full_range)
    assert (out[0].transpose(0, 1) - rgb_of(*planes, matrix, full_range).clamp(0, 1)).abs().max() < 1e-5


def test_black_white_and_grey_are_exact():
    for level, value in ((16, 0.0), (235, 1.0), (126, 110 / 219)):
        planes = torch.full((1, 16, 16), level).byte(), *(torch.full((1, 8, 8), 128).byte(),) * 2
        out, _, _ = run(VideoSpec(size=16, crop=WholeFrame(), ops=()), planes)
        assert torch.allclose(out, torch.full_like(out, value), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(16, 200),
    st.integers(16, 200),
    st.integers(8, 128),
    st.sampled_from(["rrc", "jitter", "center", "whole"]),
)
def test_regions_hold_all_that_is_read(height, width, size, kind):
    height, width = height & ~1, width & ~1
    crops = {
        "rrc": RandomResizedCrop(scale=(0.05, 1.0)),
        "jitter": ResizedRandomCrop(size=size, resize=(size, size * 2)),
        "center": CenterCrop(size=size, resize=size + size // 7),
        "whole": WholeFrame(),
    }
    for interpolation in ("bilinear", "bicubic"):
        spec = VideoSpec(size=size, crop=crops[kind], ops=(), interpolation=interpolation)
        view = View(name="v", num_frames=2, augment=spec)
        keys = np.array([fold(i) for i in range(8)], np.uint64)
        table = crop_table(view, keys, np.zeros((8, 2), int), np.full(8, height), np.full(8, width))
        assert ((table["x"] % 2 == 0) & (table["y"] % 2 == 0) & (table["w"] % 2 == 0) & (table["h"] % 2 == 0)).all()
        assert ((table["x"] >= 0) & (table["x"] + table["w"] <= width)).all()
        assert ((table["y"] >= 0) & (table["y"] + table["h"] <= height)).all()
        assert ((table["bw"] > 0) & (table["bh"] > 0)).all()
        for item in table[:, 0]:
            cut = A.resize_matrix(size, item["bx"], item["bw"], item["cx0"], item["cx1"], int(item["w"]), spec)
            whole = A.resize_matrix(
                size, item["bx"] + item["x"], item["bw"], item["cx0"] + item["x"], item["cx1"] + item["x"], width, spec
            )
            inside = whole[:, item["x"] : item["x"] + item["w"]]
            if kind in ("center", "jitter"):  # these may read the whole frame: nothing may be missing from the region
                whole = A.resize_matrix(size, item["bx"] + item["x"], item["bw"], 0, width, width, spec)
                inside = whole[:, item["x"] : item["x"] + item["w"]]
            assert np.allclose(cut, inside, atol=1e-5)


def test_random_resized_crop_has_the_distribution_of_torchvision():
    keys = np.array([fold(i) for i in range(4000)], np.uint64)
    ours = RandomResizedCrop(scale=(0.2, 1.0)).boxes(keys, np.full(4000, 120), np.full(4000, 160)).box
    image = torch.empty(3, 120, 160)
    torch.manual_seed(0)
    sampler = v2.RandomResizedCrop(8, (0.2, 1.0))
    drawn = [sampler.make_params([image]) for _ in range(4000)]
    theirs = np.array([[one[name] for name in ("left", "top", "width", "height")] for one in drawn])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        assert abs(mine.mean() - other.mean()) < 4 * other.std() * np.sqrt(2 / 4000)
        assert abs(mine.std() - other.std()) < 0.06 * other.std() + 0.1


# --- operators against torchvision --------------------------------------------------------------------------


def picture(rows=5, frames=2, size=20, seed=0):
    return torch.rand(rows, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


FACTORS = np.array([0.6, 0.9, 1.0, 1.2, 1.4])


@pytest.mark.parametrize(
    ("number", "oracle"),
    [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation), (3, TF.adjust_hue)],
)
def test_jitter_operators_equal_torchvision(number, oracle):
    x = picture()
    factors = np.ones((5, 4))
    factors[:, 3] = 0
    factors[:, number] = FACTORS if number < 3 else (FACTORS - 1)
    drawn = {"apply": np.ones(5, bool), "factors": factors, "order": np.tile([3, 1, 0, 2], (5, 1))}
    out = A.apply_ops(x, (Jitter(),), [drawn])
    for row in range(5):
        assert torch.allclose(out[row], oracle(x[row], float(factors[row, number])), atol=2e-5)


def test_the_order_of_jitter_matters_and_is_obeyed():
    x = picture(2)
    x[1] = x[0]
    factors = np.tile([1.4, 0.6, 1.3, 0.1], (2, 1))
    order = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    out = A.apply_ops(x, (Jitter(),), [{"apply": np.ones(2, bool), "factors": factors, "order": order}])
    chain = [
        lambda v: TF.adjust_brightness(v, 1.4),
        lambda v: TF.adjust_contrast(v, 0.6),
        lambda v: TF.adjust_saturation(v, 1.3),
        lambda v: TF.adjust_hue(v, 0.1),
    ]
    for row in range(2):
        expected = x[row]
        for number in order[row]:
            expected = chain[number](expected)
        assert torch.allclose(out[row], expected, atol=3e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur_equals_torchvision(sigma):
    x = picture(3)
    out = A.gaussian_blur(x, torch.full((3,), sigma), 7)
    assert torch.allclose(out, TF.gaussian_blur(x, [7, 7], [sigma, sigma]), atol=1e-5)


def test_blur_differs_per_row_and_keeps_constants():
    x = torch.ones(2, 1, 3, 16, 16) * 0.5
    x[1, 0, :, 8, 8] = 1
    out = A.gaussian_blur(x, torch.tensor([1.0, 3.0]), 9)
    assert torch.allclose(out[0], x[0], atol=1e-6)
    alone = A.gaussian_blur(x[1:], torch.tensor([3.0]), 9)
    assert torch.allclose(out[1:], alone, atol=1e-6)
    edges = A.gaussian_blur(torch.ones(1, 1, 3, 16, 16), torch.ones(1), 9, border="zero")
    assert edges[0, 0, 0, 0, 0] < 0.7
    rows_only = A.gaussian_blur(x[1:], torch.tensor([2.0]), 9, vertical_only=True)
    assert torch.allclose(rows_only[0, 0, :, :, 7], x[1, 0, :, :, 7], atol=1e-6)


def test_gray_flip_and_normalise():
    x = picture(4)
    drawn = {"apply": np.array([True, False, True, False])}
    gray = A.apply_ops(x, (Gray(),), [drawn])
    assert torch.allclose(gray[0], TF.rgb_to_grayscale(x[0], 3), atol=1e-6)
    assert torch.equal(gray[1], x[1])
    flipped = A.apply_ops(x, (Flip(),), [drawn])
    assert torch.equal(flipped[2], x[2].flip(-1))
    assert torch.equal(flipped[3], x[3])
    op = Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.allclose(A.apply_ops(x, (op,), [{}]), TF.normalize(x, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), atol=1e-6)


def test_hsv_equals_colorsys():
    x = picture(1, 1, 6)
    x[0, 0, :, 0, 0] = 0.3  # grey
    x[0, 0, :, 0, 1] = 0.0  # black
    hsv = A.rgb_to_hsv(x)[0, 0].permute(1, 2, 0).reshape(-1, 3)
    for pixel, expected in zip(hsv, x[0, 0].permute(1, 2, 0).reshape(-1, 3), strict=True):
        assert np.allclose(pixel.numpy(), colorsys.rgb_to_hsv(*expected.tolist()), atol=1e-5)
    assert torch.allclose(A.hsv_to_rgb(A.rgb_to_hsv(x)), x, atol=1e-5)


def test_cutout_multiplies_one_square_by_the_mean_of_the_first_frame():
    x = picture(1, 2, 10)
    drawn = {"side": np.array([4.0]), "row": np.array([0.5]), "column": np.array([0.0])}
    out = A.apply_ops(x, (Cutout(),), [drawn])
    inside = torch.zeros(10, 10, dtype=torch.bool)
    inside[3:7, 0:2] = True
    assert torch.equal(out[..., ~inside], x[..., ~inside])
    assert torch.allclose(out[..., inside], x[..., inside] * x[0, 0].mean())


# --- what is random, and for whom ---------------------------------------------------------------------------


def test_frames_share_draws_unless_asked():
    planes = tuple(plane.repeat(4, 1, 1) for plane in random_yuv(1, 64, 64))
    shared, _, _ = run(moco_v2(32), planes, draws=range(4))
    assert all(torch.equal(shared[:, :, 0], shared[:, :, t]) for t in range(4))
    apart, _, _ = run(moco_v2(32, per_frame=True), planes, draws=range(4))
    assert all(not torch.equal(apart[b, :, 0], apart[b, :, 1]) for b in range(4))


def test_a_sample_does_not_depend_on_its_batch():
    planes = random_yuv(2, 64, 64)
    for spec in (moco_v1(32), moco_v2(32, per_frame=True), eval_spec(32)):
        together, _, _ = run(spec, planes, draws=(5, 6, 7))
        alone, _, _ = run(spec, planes, draws=(6,))
        assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_batch_wide_coins_are_shared_and_the_rest_is_not():
    spec = VideoSpec(ops=(Jitter(coin="batch", order="batch"), Blur(coin="batch", strength="batch")))
    keys = np.array([fold(i) for i in range(32)], np.uint64)
    coins = []
    for batch in range(60):
        jitter, blur = A.op_params(spec, keys, 1, fold(batch), "v")
        assert len(set(jitter["apply"].tolist())) == len(set(blur["apply"].tolist())) == 1
        assert len(set(blur["sigma"].tolist())) == 1
        assert len({tuple(order) for order in jitter["order"].tolist()}) == 1
        assert len({tuple(f) for f in jitter["factors"].tolist()}) == 32
        coins.append((bool(jitter["apply"][0]), bool(blur["apply"][0])))
    assert {True, False} == {c[1] for c in coins}


def test_strengths_stay_in_range_and_probabilities_hold():
    keys = np.array([fold(i) for i in range(5000)], np.uint64)
    drawn = Jitter(brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2, p=0.8).draw(keys)
    low, high = drawn["factors"].min(0), drawn["factors"].max(0)
    assert np.allclose(low, [0.2, 0.6, 0.0, -0.2], atol=0.01)
    assert np.allclose(high, [1.8, 1.4, 2.5, 0.2], atol=0.01)
    assert abs(drawn["apply"].mean() - 0.8) < 0.02
    orders, counts = np.unique(drawn["order"], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 140
    assert abs(Flip().draw(keys)["apply"].mean() - 0.5) < 0.025
    sides = Cutout(max_side=20).draw(keys)["side"]
    assert (sides.min(), sides.max()) == (1, 20)


def test_views_of_one_group_share_their_draws():
    spec = moco_v2(16)
    keys = np.array([fold(3)], np.uint64)
    one, two = (A.op_params(spec, keys, 1, 0, View(name=n, augment=spec, group="g").key) for n in "ab")
    other = A.op_params(spec, keys, 1, 0, View(name="c", augment=spec).key)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in a)
    assert not np.array_equal(one[0]["factors"], other[0]["factors"])


def test_simclr_preset_is_the_published_one():
    spec = simclr(224)
    flip, jitter, gray, blur = spec.ops
    assert spec.interpolation == "bicubic"
    assert (flip.p, jitter.brightness, jitter.hue, jitter.p, gray.p) == (0.5, 0.8, 0.2, 0.8, 0.2)
    assert (blur.taps, blur.border, blur.strength, blur.p) == (23, "zero", "batch", 0.5)
    assert len(simclr(32, strength=0.5, blur=False).ops) == 3
