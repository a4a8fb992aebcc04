"""Every profile: the same frames in the same order, its own kind of packets, and what `copy` takes and refuses."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from clipmill.datasets.source import Corpus, CorpusError, Source
from clipmill.pipeline.decode.decoder import new_decoder
from clipmill.pipeline.pack import encode
from clipmill.pipeline.pack.audit import audit
from clipmill.pipeline.pack.encode import PROFILES
from clipmill.pipeline.pack.estimate import estimate
from clipmill.pipeline.pack.run import PackError, pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import ShardReader
from clipmill.tools import pack as command

ALL = list(range(40))
B_FRAMES = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "2"}
OPEN_GOP = "keyint=24:min-keyint=24:bframes=3:b-pyramid=normal:open-gop=1:scenecut=0"
OPEN_HEVC = "keyint=24:min-keyint=24:bframes=4:open-gop=1:log-level=none:pools=none"
CODECS = {"cpu": "h264", "gpu": "hevc", "intra": "h264", "jpeg": "mjpeg", "raw": "raw", "copy": "h264"}


def here(run_task, tasks):
    for task in tasks:
        yield task, run_task(task)


def packed(kit, paths, profile, **settings):
    """The index of the paths packed with a profile."""
    out = kit.folder / f"{profile}-{len(list(kit.folder.iterdir()))}"
    sources = tuple(Source(key=path.name, path=str(path)) for path in paths)
    pack(Corpus(sources=sources), out, PackSettings(profile=profile, **settings), engine=here)
    return ShardIndex.open(out)


def frames(index, row, wanted):
    """{number: mean luma} of frames of a record, by the decoder the loader would use."""
    reader, seen = ShardReader(), {}
    new_decoder("auto", reader).decode(index[row], wanted, lambda n, yuv: seen.update({n: float(np.median(yuv[0]))}))
    reader.close()
    return seen


def level(number, full_range):
    return 2 * number * 255 / 219 if full_range else 16 + 2 * number


@pytest.mark.parametrize("profile", CODECS)
def test_every_frame_of_every_profile(kit, profile):
    facts = {"frames": 40, "colour": (1, 1), "sound": kit.clicks(1.6, [0.5], 16000)}
    paths = [kit.film("b.mp4", options=B_FRAMES, **facts), kit.film("plain.mkv", size=(112, 80), **facts)]
    index = packed(kit, paths, profile)
    assert [record.codec.codec for record in index] == [CODECS[profile]] * 2
    for row, record in enumerate(index):
        assert (record.num_frames, record.fps, record.num_samples) == (40, 25, 25600)
        assert record.codec.full_range == (profile == "jpeg")
        assert record.codec.matrix == ("bt601" if profile == "jpeg" else "bt709")
        for wanted in (ALL, [39], [7, 8, 9], [3, 17, 31]):
            seen = frames(index, row, wanted)
            assert list(seen) == wanted
            assert [seen[n] for n in wanted] == pytest.approx([level(n, profile == "jpeg") for n in wanted], abs=1.1)
    assert audit(index.root, here, decode=True) == []


@pytest.mark.parametrize("profile", CODECS)
def test_key_frames_and_size_of_every_profile(kit, profile):
    record = packed(kit, [kit.film("a.mp4", frames=40, options=B_FRAMES)], profile, gop=5)[0]
    every = {"cpu": 5, "gpu": 5, "intra": 1, "jpeg": 1, "raw": 1, "copy": 12}[profile]
    assert record.keyframes.tolist() == list(range(0, 40, every))
    if profile == "raw":
        assert set(record.packet_sizes.tolist()) == {96 * 64 * 3 // 2}


@pytest.mark.parametrize("profile", ["gpu", "intra", "jpeg", "raw"])
def test_scaling_and_rate_work_in_every_profile(kit, profile):
    path = kit.film("a.mp4", frames=40, size=(192, 128))
    index = packed(kit, [path], profile, short_side=64, fps=Fraction(10))
    record = index[0]
    assert (record.width, record.height, record.num_frames, record.fps) == (96, 64, 16, 10)
    seen = frames(index, 0, list(range(16)))
    expected = [level(k * 25 // 10, profile == "jpeg") for k in range(16)]
    assert [seen[k] for k in range(16)] == pytest.approx(expected, abs=1.5)


@pytest.mark.parametrize("profile", ["cpu", "gpu", "intra", "jpeg"])
def test_quality_decides_size_and_psnr(kit, profile):
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(60, 180, (96, 12)), np.ones((1, 8))).astype(np.uint8)

    def draw(number):
        planes = np.full((96, 96), 128, np.uint8)
        planes[:64] = np.roll(texture, number, 1)[:64]
        return av.VideoFrame.from_ndarray(planes, "yuv420p")

    path = kit.film("t.mkv", frames=12, codec="ffv1", draw=draw, colour=(1, 1))
    pictures = [kit.pack(path, profile=profile, quality=quality).picture for quality in (8, 20, 38)]
    sizes, psnrs = [int(one.sizes.sum()) for one in pictures], [one.psnr_db for one in pictures]
    assert sizes == sorted(sizes, reverse=True)
    assert psnrs == sorted(psnrs, reverse=True)
    assert sizes[0] > 1.3 * sizes[2]
    assert psnrs[0] > psnrs[2] + 3


def test_pictures_too_small_for_hevc_are_rejected(kit):
    result = kit.pack(kit.film("a.mp4", frames=2, size=(96, 48)), profile="gpu")
    assert (result.status, result.reason) == ("rejected", "too_small")


def test_raw_is_the_decoded_frame_byte_for_byte(kit):
    rng = np.random.default_rng(1)
    planes = rng.integers(0, 256, (5, 96, 96), np.uint8)
    draw = lambda n: av.VideoFrame.from_ndarray(planes[n], "yuv420p")  # noqa: E731
    picture = kit.pack(kit.film("n.mkv", frames=5, codec="ffv1", draw=draw, colour=(1, 1)), profile="raw").picture
    assert Path(picture.path).read_bytes() == planes.tobytes()
    assert (picture.suffix, picture.psnr_db) == (".yuv", 100.0)


@pytest.mark.parametrize("number", [1, 6])
def test_jpeg_frames_have_the_colours_of_jfif(kit, number):
    """A JPEG reader that knows nothing of us shows the colours of the source."""
    yuv = (150, 100, 170)
    path = kit.film("c.mp4", frames=2, draw=lambda _: kit.flat(yuv), colour=(1, number), options={"crf": "1"})
    picture = kit.pack(path, profile="jpeg", quality=8).picture
    with av.open(picture.path) as container:
        seen = next(container.decode(video=0)).to_ndarray(format="rgb24")[20, 20].astype(float)
    kr, kb = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}[number]
    y, u, v = (yuv[0] - 16) / 219, (yuv[1] - 128) / 224, (yuv[2] - 128) / 224
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    assert seen == pytest.approx([255 * red, 255 * green, 255 * blue], abs=4)


def test_full_range_jpeg_sources_stay_what_they_are(kit):
    path = kit.film("f.mp4", frames=10, pix_fmt="yuvj420p", colour=(2, 6), options={"crf": "1"})
    picture = kit.pack(path, profile="jpeg", quality=8).picture
    with av.open(str(path)) as one, av.open(picture.path) as two:
        for a, b in zip(one.decode(video=0), two.decode(video=0), strict=True):
            assert np.abs(a.to_ndarray().astype(int) - b.to_ndarray()).max() <= 2


def test_the_processor_does_not_change_a_byte_of_hevc(kit, monkeypatch):
    """With x265's plain C++ code the file is the same."""
    path = kit.film("p.mp4", size=(112, 64), frames=10)
    usual = Path(kit.pack(path, profile="gpu").picture.path).read_bytes()
    options = PROFILES["gpu"].options

    def plain(settings):
        found = options(settings)
        return found | {"x265-params": found["x265-params"] + ":asm=0"}

    monkeypatch.setitem(PROFILES, "gpu", encode.Profile("libx265", "hevc", plain))
    assert Path(kit.pack(path, profile="gpu").picture.path).read_bytes() == usual


@pytest.mark.parametrize(
    ("name", "facts", "codec"),
    [
        ("open.mp4", {"options": {"crf": "10", "x264-params": OPEN_GOP}}, "h264"),
        ("b.ts", {"options": B_FRAMES}, "h264"),
        ("b.flv", {"options": B_FRAMES}, "h264"),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": OPEN_HEVC, "crf": "4"}}, "hevc"),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "crf": "5"}}, "vp9"),
        ("full.mp4", {"pix_fmt": "yuvj420p", "colour": (2, 1)}, "h264"),
        ("bt601.mp4", {"colour": (1, 6)}, "h264"),
    ],
)
def test_copy_keeps_the_packets_and_gives_every_frame_from_any_place(kit, name, facts, codec):
    path = kit.film(name, frames=60, **facts)
    index = packed(kit, [path], "copy")
    record = index[0]
    with av.open(str(path)) as container:
        size = sum(packet.size for packet in container.demux(video=0))
    assert record.codec.codec == codec
    assert (record.num_frames, record.codec.full_range) == (60, name == "full.mp4")
    assert abs(int(record.packet_sizes.sum(dtype=np.int64)) - size) < 0.2 * size  # headers may move
    for wanted in (list(range(60)), [59], [22, 23, 24, 25], [5, 47]):
        seen = frames(index, 0, wanted)
        assert [seen[n] for n in wanted] == pytest.approx([level(n, name == "full.mp4") for n in wanted], abs=1.5)
    assert audit(index.root, here, decode=True) == []


@pytest.mark.parametrize(
    ("name", "facts", "why"),
    [
        ("odd.mkv", {"size": (97, 65), "pix_fmt": "yuv444p"}, "97x65"),
        ("ten.mkv", {"codec": "ffv1", "pix_fmt": "yuv420p10le"}, "yuv420p10le"),
        ("turned.mp4", {"turn": (90,)}, "turned"),
        ("wide.mp4", {"sar": Fraction(4, 3)}, "pixels 4/3"),
        ("vfr.mp4", {"times": [0, 1, 2, 3, 9, 10, 11, 12, 13, 20]}, "constant rate"),
        ("packed.avi", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, "have no time"),
        ("vp8.webm", {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}, "in an mp4"),
    ],
)
def test_copy_refuses_what_would_have_to_be_changed(kit, name, facts, why):
    result = kit.pack(kit.film(name, **{"frames": 10} | facts), profile="copy")
    assert (result.status, result.reason) == ("rejected", "not_copyable")
    assert why in result.detail
    assert list((kit.folder / "out").iterdir()) == []


def test_copy_does_not_cut(kit):
    path = kit.film("a.mp4")
    assert kit.pack(path, 1.0, 2.0, profile="copy").reason == "not_copyable"
    for wrong in ({"short_side": 32}, {"fps": Fraction(10)}):
        with pytest.raises(ValueError, match="leave short_side and fps out"):
            PackSettings(profile="copy", **wrong)


def test_settings_say_what_holds():
    assert PackSettings(profile="intra", gop=8).gop == 1
    assert PackSettings(profile="raw").to_json()["quality"] == 0
    assert PackSettings(profile="gpu", gop=4).gop == 4
    with pytest.raises(ValueError, match="profile = vhs"):
        PackSettings(profile="vhs")


def test_an_estimate_is_close_to_the_truth_and_writes_nothing(kit, capsys):
    folder = kit.folder / "films"
    folder.mkdir()
    for number in range(6):
        kit.film(f"films/{number}.mp4", frames=30 + number, sound=kit.clicks(1.2, [0.5], 16000))
    (folder / "text.mp4").write_text("no video")
    corpus = command.read_corpus(command.Args(source=folder, out=kit.folder / "none"))
    found = estimate(corpus, PackSettings(), sample=7, workers=1)
    assert (found.sources, found.sampled, found.counts["ok"], found.counts["rejected"]) == (7, 7, 6, 1)
    index = packed(kit, [folder / f"{n}.mp4" for n in range(6)], "cpu")
    truth = sum(int(r.packet_sizes.sum()) + 2 * r.num_samples for r in index) / 1e6
    assert found.total_mb == pytest.approx(truth, rel=0.02)
    assert found.psnr_db > 40
    assert found.clips_per_s > 1
    assert found.pack_s > 0
    args = command.Args(source=folder, out=kit.folder / "none", estimate=True, sample=2, workers=1, profile="raw")
    assert command.main(args) == 0
    assert "profile raw" in capsys.readouterr().out
    assert not (kit.folder / "none").exists()


def test_an_estimate_of_nothing_is_an_error(kit):
    (kit.folder / "text.mp4").write_text("no video")
    corpus = Corpus(sources=(Source(key="a", path=str(kit.folder / "text.mp4")),))
    with pytest.raises(PackError, match="1 not_media"):
        estimate(corpus, PackSettings(), workers=1)
    with pytest.raises(CorpusError, match="no source"):
        estimate(Corpus(sources=()), PackSettings())
    with pytest.raises(ValueError, match="sample = 0"):
        estimate(corpus, PackSettings(), sample=0)
