"""What a corpus contains, frame by frame: containers, codecs, times, sizes, colours. Every frame names itself."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from clipmill.pipeline.pack import encode
from clipmill.pipeline.pack.engine_local import LocalEngine
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.pack.task import Task, pack_source

ALL = list(range(100))
B_FRAMES = {"preset": "ultrafast", "crf": "10", "g": "25", "bf": "2"}
OPEN_GOP = "keyint=24:min-keyint=24:bframes=3:b-pyramid=normal:open-gop=1:scenecut=0"
SHARP = {"g": "12", "bf": "2", "b": "8000000", "qmin": "1", "qmax": "2"}
QUICK_VP = {"deadline": "realtime", "cpu-used": "8", "crf": "5", "b": "4000000"}


def assert_exact(kit, path, expected=ALL, **settings):
    result = kit.pack(path, **settings)
    assert result.status == "ok", (result.reason, result.detail)
    assert kit.shown(result.picture) == expected
    assert result.picture.num_frames == len(expected)
    return result


def shift(seconds):
    def change(packet):
        ticks = round(Fraction(seconds) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return packet

    return change


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("plain.mp4", {}),
        ("open-gop.mp4", {"options": {"crf": "10", "x264-params": OPEN_GOP}}),
        ("b.mkv", {"options": B_FRAMES}),
        ("b.mov", {"options": B_FRAMES}),
        ("b.ts", {"options": B_FRAMES}),
        ("b.flv", {"options": B_FRAMES}),
        ("one-key.mp4", {"options": {"preset": "ultrafast", "crf": "10", "g": "100000"}}),
        ("packed.avi", {"codec": "mpeg4", "options": SHARP}),
        ("ps.mpg", {"codec": "mpeg2video", "options": SHARP}),
        ("old.wmv", {"codec": "wmv2", "options": {"g": "12", "b": "8000000", "qmin": "1", "qmax": "2"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": QUICK_VP | {"lag-in-frames": "16", "auto-alt-ref": "1"}}),
        ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "10", "crf": "8", "g": "24"}}),
        ("vp8.webm", {"codec": "libvpx", "options": QUICK_VP}),
        ("intra.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
        ("stills.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("lossless.mkv", {"codec": "ffv1"}),
    ],
)
def test_codecs_and_containers(kit, name, facts, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "1")  # errors alone
    assert_exact(kit, kit.film(name, **facts))


def test_hevc_with_open_groups(kit):
    params = "keyint=24:min-keyint=24:bframes=4:open-gop=1:log-level=none"
    assert_exact(kit, kit.film("h.mp4", codec="libx265", options={"x265-params": params, "crf": "4"}))


def test_a_stream_without_any_timestamp(kit):
    assert_exact(kit, kit.film("raw.h264", "h264"))


def test_a_wrong_suffix_does_not_matter(kit):
    path = kit.film("film.mp4")
    assert_exact(kit, path.rename(path.with_suffix(".avi")))


def test_animated_gif_is_a_video(kit):
    def draw(number):
        return av.VideoFrame.from_ndarray(np.full((64, 96), 10 * number, np.uint8), "gray").reformat(format="rgb8")

    result = kit.pack(kit.film("a.gif", frames=12, fps=Fraction(10), codec="gif", pix_fmt="rgb8", draw=draw))
    assert result.status == "ok"
    assert (result.picture.num_frames, result.picture.fps) == (12, 10)


@pytest.mark.parametrize(
    "fps", [Fraction(1), Fraction(15), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(240)]
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_frame_rates(kit, fps, name):
    result = assert_exact(kit, kit.film(name, fps=fps, frames=40), ALL[:40])
    assert result.picture.fps == fps
    assert result.facts["timing"]["constant"]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_few_frames(kit, frames):
    assert_exact(kit, kit.film("few.mp4", frames=frames), ALL[:frames])


def test_variable_rate_shows_what_was_shown_then(kit):
    times = [round((n / 25 + n % 3 * 0.012 + (n >= 50) * 0.7) * 90000) for n in ALL]
    result = kit.pack(kit.film("v.mp4", times=times, time_base=Fraction(1, 90000)))
    assert result.status == "ok"
    fps = result.picture.fps
    expected = [max(n for n in ALL if times[n] <= k / fps * 90000 + 1) for k in range(result.picture.num_frames)]
    assert kit.shown(result.picture) == expected
    assert not result.facts["timing"]["constant"]
    assert result.facts["timing"]["source_times_s"] == pytest.approx([t / 90000 for t in times], abs=2e-6)


@pytest.mark.parametrize("name", ["s.mp4", "s.mkv"])
@pytest.mark.parametrize("step_s", [1, 5])
def test_slide_shows_keep_every_picture_as_long_as_it_is_shown(kit, name, step_s):
    path = kit.film(name, frames=6, times=[25 * step_s * n for n in range(6)])
    result = kit.pack(path, fps=Fraction(5))
    per = 5 * step_s
    assert kit.shown(result.picture)[: 5 * per + 1] == [k // per for k in range(5 * per + 1)]


def test_a_forced_rate_repeats_or_drops_frames(kit):
    path = kit.film("a.mp4")
    assert_exact(kit, path, [k * 25 // 10 for k in range(40)], fps=Fraction(10))
    result = assert_exact(kit, path, [k * 25 // 30 for k in range(120)], fps=Fraction(30))
    assert result.picture.fps == 30


def test_edit_lists_are_honoured(kit):
    def cut(packet):
        return shift("-1.3")(packet) if packet.pts * packet.time_base >= 1 else None

    path = kit.remux(kit.film("base.mp4", options=B_FRAMES), kit.folder / "cut.mp4", cut)
    assert_exact(kit, path, ALL[33:])


def test_negative_times(kit):
    path = kit.remux(
        kit.film("base.mp4", options=B_FRAMES), kit.folder / "n.mkv", shift("-0.5"), avoid_negative_ts="disabled"
    )
    assert assert_exact(kit, path).facts["timing"]["origin_s"] == pytest.approx(-0.5, abs=0.03)


@pytest.mark.parametrize("seconds", ["2.5", "95442"])  # the second passes the wrap of 33-bit clocks at 95443.7 s
@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_late_starts_and_wraps(kit, seconds, name):
    assert_exact(kit, kit.remux(kit.film("base.mp4", options=B_FRAMES), kit.folder / name, shift(seconds)))


def test_a_part_of_a_file(kit):
    path = kit.film("a.mp4", options={"crf": "10", "x264-params": OPEN_GOP})
    for first in (0, 10, 33, 60, 90):
        result = kit.pack(path, first / 25, (first + 8) / 25)
        assert kit.shown(result.picture) == ALL[first : first + 8]
    assert kit.shown(kit.pack(path, 3.8).picture) == ALL[95:]
    outside = kit.pack(path, 7.0, 8.0)
    assert (outside.status, outside.reason) == ("rejected", "segment")


def test_joined_broadcasts_keep_their_time(kit):
    part = kit.film("a.ts", options=B_FRAMES).read_bytes()
    (kit.folder / "joined.ts").write_bytes(part + part)
    result = assert_exact(kit, kit.folder / "joined.ts", ALL + ALL)
    assert result.facts["timing"]["joints"] == 1


def test_a_change_of_size_keeps_the_first_size(kit):
    parts = [kit.film(f"{w}.ts", size=(w, h), options=B_FRAMES).read_bytes() for w, h in ((96, 64), (128, 96))]
    (kit.folder / "joined.ts").write_bytes(b"".join(parts))
    result = assert_exact(kit, kit.folder / "joined.ts", ALL + ALL)
    assert (result.picture.width, result.picture.height) == (96, 64)
    assert result.facts["normalised"]["sizes"] == [[0, 96, 64], [100, 128, 96]]


def test_of_several_streams_the_largest_default_one_is_taken(kit):
    path = kit.folder / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((48, 32), (96, 64)):
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "10"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            streams.append((stream, size))
        for number in range(20):
            for stream, size in streams:
                frame = kit.grey(number, size)
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream, _ in streams:
            container.mux(stream.encode(None))
    result = assert_exact(kit, path, ALL[:20])
    assert (result.picture.width, result.picture.height) == (96, 64)


def test_subtitles_and_data_are_not_video(kit):
    film, titles = kit.film("film.mkv", frames=20), kit.folder / "titles.srt"
    titles.write_text("1\n00:00:00,000 --> 00:00:00,300\nhello\n\n2\n00:00:00,300 --> 00:00:00,400\nthere\n")
    with av.open(str(film)) as pictures, av.open(str(titles)) as words, av.open(str(kit.folder / "t.mkv"), "w") as both:
        streams = [both.add_stream_from_template(one.streams[0]) for one in (words, pictures)]
        for source, stream in zip((words, pictures), streams, strict=True):
            for packet in source.demux():
                if packet.size and packet.dts is not None:
                    packet.stream = stream
                    both.mux(packet)
    with av.open(str(film)) as pictures, av.open(str(kit.folder / "t.mov"), "w", options={"write_tmcd": "1"}) as coded:
        coded.metadata["timecode"] = "01:00:00:00"
        stream = coded.add_stream_from_template(pictures.streams[0])
        for packet in pictures.demux():
            if packet.size and packet.dts is not None:
                packet.stream = stream
                coded.mux(packet)
    for name, kinds in (("t.mkv", ["subtitle", "video"]), ("t.mov", ["video", "data"])):
        with av.open(str(kit.folder / name)) as container:
            assert [stream.type for stream in container.streams] == kinds
        result = assert_exact(kit, kit.folder / name, ALL[:20])
        assert result.sound is None


def test_cover_art_is_not_video(kit):
    path = kit.folder / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1, width=96, height=64, pix_fmt="yuvj420p")
        cover.disposition = 1024  # attached picture
        wave = av.AudioFrame.from_ndarray(np.full((1, 16000), 0.1, np.float32), "fltp", "mono")
        wave.sample_rate = 16000
        frame = kit.grey(5, (96, 64), "yuvj420p")
        frame.pts = 0
        for packet in [*cover.encode(frame), *cover.encode(None), *sound.encode(wave), *sound.encode(None)]:
            container.mux(packet)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    result = kit.pack(path)
    assert (result.status, result.picture) == ("ok", None)
    assert result.sound.num_samples == 16000
    without = kit.pack(path, audio_hz=0)
    assert (without.status, without.reason) == ("rejected", "no_stream")


@pytest.mark.parametrize(
    ("turn", "flips"), [(t, f) for t in (0, 90, 180, 270) for f in ((), (True, False), (False, True))]
)
@pytest.mark.parametrize("colour", [None, (1, 1)])  # with the matrix of the result nothing else is done to a frame
def test_the_display_matrix_is_applied_once(kit, turn, flips, colour):
    def draw(number):
        luma = kit.grey(number, (96, 64)).to_ndarray()
        luma[:32, :48], luma[:32, 48:64] = 235, 180  # a corner that tells all eight orientations apart
        return av.VideoFrame.from_ndarray(luma, "yuv420p")

    result = kit.pack(kit.film("t.mp4", frames=3, draw=draw, turn=(turn, *flips), colour=colour))
    expected = np.rot90(draw(0).to_ndarray()[:64].astype(int), turn // 90)
    if flips:
        expected = expected[:, ::-1] if flips[0] else expected[::-1]
    found = kit.levels(result.picture)[0].astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2
    assert result.picture.psnr_db > 40


@pytest.mark.parametrize(
    ("size", "sar", "turn", "short_side", "expected"),
    [
        ((97, 65), None, None, None, (96, 64)),
        ((97, 65), None, (90,), None, (64, 96)),
        ((96, 64), Fraction(4, 3), None, None, (128, 64)),
        ((96, 64), Fraction(3, 4), (90,), None, (64, 72)),
        ((96, 64), None, None, 32, (48, 32)),
        ((64, 96), None, None, 32, (32, 48)),
        ((96, 64), None, None, 100, (96, 64)),
        ((102, 65), Fraction(2), None, 48, (150, 48)),
    ],
)
def test_sizes(kit, size, sar, turn, short_side, expected):
    path = kit.film("s.mp4", size=size, sar=sar, turn=turn, frames=10, pix_fmt="yuv444p")
    result = assert_exact(kit, path, ALL[:10], short_side=short_side)
    assert (result.picture.width, result.picture.height) == expected


def test_an_odd_size_loses_its_edge_and_nothing_else(kit):
    rng = np.random.default_rng(0)
    picture = rng.integers(16, 236, (65, 97), np.uint8)

    def draw(_):
        frame = kit.flat((128, 128, 128), (97, 65))
        rows = np.zeros((65, frame.planes[0].line_size), np.uint8)
        rows[:, :97] = picture
        frame.planes[0].update(rows.tobytes())
        return frame

    result = kit.pack(kit.film("o.mkv", size=(97, 65), frames=2, codec="ffv1", draw=draw), quality=1)
    assert np.abs(kit.levels(result.picture)[0].astype(int) - picture[:64, :96]).mean() < 2


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p", "yuv444p", "yuv422p10le", "yuv411p", "yuv440p"])
def test_depth_and_chroma(kit, pix_fmt):
    assert_exact(kit, kit.film("c.mkv", frames=50, codec="ffv1", pix_fmt=pix_fmt), ALL[:50])


def test_full_range_becomes_limited(kit):
    def draw(number):
        return kit.flat((round(2 * number * 255 / 219), 128, 128), pix_fmt="yuvj420p")

    result = assert_exact(kit, kit.film("f.mp4", pix_fmt="yuvj420p", draw=draw, colour=(2, 1)))
    assert result.facts["normalised"]["full_range"]
    assert not result.picture.codec.full_range


def bt709(yuv, kr, kb):
    """(Y, U, V) of another limited-range matrix as BT.709, by the definition in ITU-T H.273."""
    y, u, v = (yuv[0] - 16) / 219, (yuv[1] - 128) / 224, (yuv[2] - 128) / 224
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (
        16 + 219 * luma,
        128 + 224 * (blue - luma) / (2 * (1 - 0.0722)),
        128 + 224 * (red - luma) / (2 * (1 - 0.2126)),
    )


@pytest.mark.parametrize(
    ("number", "kr", "kb"),
    [(1, 0.2126, 0.0722), (5, 0.299, 0.114), (6, 0.299, 0.114), (7, 0.212, 0.087), (9, 0.2627, 0.0593)],
)
@pytest.mark.parametrize("yuv", [(100, 90, 180), (180, 140, 100), (60, 128, 128)])
def test_matrices(kit, number, kr, kb, yuv):
    path = kit.film("m.mp4", frames=2, draw=lambda _: kit.flat(yuv), colour=(1, number), options={"crf": "1"})
    picture = kit.pack(path, quality=5).picture
    found = [float(np.median(plane)) for plane in kit.planes(picture)]
    assert found == pytest.approx(bt709(yuv, kr, kb), abs=1.3)
    assert picture.codec.matrix == "bt709"
    kept = kit.pack(path, quality=5, matrix="source").picture
    if number != 7:
        assert [float(np.median(plane)) for plane in kit.planes(kept)] == pytest.approx(yuv, abs=1)
        assert kept.codec.matrix == {1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020"}[number]


def test_high_dynamic_range_keeps_its_curve_and_says_so(kit):
    """Ten bits of BT.2020 under the PQ curve: the matrix becomes ours, levels are not mapped."""
    path = kit.folder / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 9, 9, 16
        for number in range(3):
            frame = kit.flat((100, 90, 180)).reformat(format="yuv420p10le")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    result = kit.pack(path, quality=5)
    origin = result.facts["origin"]["video"]
    assert (origin["color_transfer"], origin["color_primaries"]) == (16, 9)
    assert (result.picture.num_frames, result.picture.codec.matrix) == (3, "bt709")
    found = [float(np.median(plane)) for plane in kit.planes(result.picture)]
    assert found == pytest.approx(bt709((100, 90, 180), 0.2627, 0.0593), abs=1.5)


def test_the_matrix_of_rgb_is_ours(kit):
    def draw(_):
        return av.VideoFrame.from_ndarray(np.full((64, 96, 3), (200, 60, 30), np.uint8), "rgb24")

    path = kit.film("r.mkv", frames=2, codec="libx264rgb", pix_fmt="rgb24", draw=draw, options={"crf": "1"})
    rgb = np.array([200, 60, 30]) / 255
    luma = rgb @ [0.2126, 0.7152, 0.0722]
    expected = (16 + 219 * luma, 128 + 224 * (rgb[2] - luma) / 1.8556, 128 + 224 * (rgb[0] - luma) / 1.5748)
    found = [float(np.median(plane)) for plane in kit.planes(kit.pack(path, quality=5).picture)]
    assert found == pytest.approx(expected, abs=1.5)


def test_interlaced_frames_are_deinterlaced(kit):
    """Two fields of different instants: afterwards no line shows the other field's bar."""

    def draw(number):
        luma = kit.grey(10, (96, 64)).to_ndarray()
        luma[0:64:2, 16 + 2 * number : 24 + 2 * number] = 200  # a bar that moves from field to field
        luma[1:64:2, 17 + 2 * number : 25 + 2 * number] = 200
        return av.VideoFrame.from_ndarray(luma, "yuv420p")

    options = {"preset": "ultrafast", "crf": "5", "flags": "+ildct+ilme", "x264-params": "tff=1:interlaced=1"}
    result = kit.pack(kit.film("i.mp4", frames=20, draw=draw, options=options), quality=5)
    assert result.picture.num_frames == 20
    assert result.facts["normalised"]["deinterlaced"]
    luma = kit.levels(result.picture).astype(int)[2:-2]
    comb = np.abs(luma[:, 1:-1] * 2 - luma[:, :-2] - luma[:, 2:]).mean()
    source = draw(5).to_ndarray()[:64].astype(int)
    assert comb < 0.4 * np.abs(source[1:-1] * 2 - source[:-2] - source[2:]).mean()
    assert_exact(kit, kit.film("flat.mp4", options=options))


def test_progressive_canonical_frames_are_not_touched(kit):
    """An H.264 source that is canonical already goes into the encoder as it was decoded."""
    result = kit.pack(kit.film("c.mp4", colour=(1, 1), options={"crf": "1"}), quality=1)
    assert result.picture.psnr_min_db > 50


def test_key_frames_are_ours_and_not_the_sources(kit):
    result = kit.pack(kit.film("k.mp4", options={"preset": "ultrafast", "g": "3", "bf": "0"}), gop=8)
    assert result.picture.keyframes.tolist() == list(range(0, 100, 8))
    assert kit.pack(kit.folder / "k.mp4", gop=1).picture.keyframes.tolist() == ALL


def test_equal_sizes_share_one_codec_configuration_at_any_rate(kit):
    pictures = [kit.pack(kit.film(f"{fps}.mp4", fps=Fraction(fps), frames=9)).picture for fps in (10, 25, 60)]
    assert len({picture.codec for picture in pictures}) == 1


def test_the_processor_does_not_change_a_byte(kit, monkeypatch):
    """With x264's plain C code the file is the same as with whatever this machine has."""
    path = kit.film("p.mp4", size=(112, 64), frames=20)
    usual = kit.pack(path).picture
    profile = encode.PROFILES["cpu"]

    def plain(settings):
        options = profile.options(settings)
        return options | {"x264-params": options["x264-params"] + ":asm=0"}

    monkeypatch.setitem(encode.PROFILES, "cpu", replace(profile, options=plain))
    again = kit.pack(path).picture
    assert Path(again.path).read_bytes() == Path(usual.path).read_bytes()


# --- large things -------------------------------------------------------------------------------------------


def in_a_worker(path, memory_gb, **settings):
    """The result, or the Failure, of a worker that may use so much memory."""
    task = Task(number=0, path=str(path), stem=str(path.parent / "out" / "0"), settings=PackSettings(**settings))
    ((_, answer),) = LocalEngine(workers=1, timeout_s=120, memory_gb=memory_gb)(pack_source, [task])
    return answer


def test_eight_k_in_bounded_memory(kit):
    path = kit.film("large.mp4", frames=3, size=(7680, 4320), options={"preset": "ultrafast", "crf": "30"})
    result = in_a_worker(path, 4.0, short_side=128)
    assert result.status == "ok", result
    assert (result.picture.width, result.picture.height, kit.shown(result.picture)) == (228, 128, [0, 1, 2])
    failure = in_a_worker(path, 0.75)
    assert failure.reason == "memory", failure


def test_ten_hours_in_bounded_memory(kit):
    """A slide show, one picture in ten seconds."""
    path = kit.film("long.mkv", frames=3600, fps=Fraction(1, 10))
    result = in_a_worker(path, 1.0)
    assert result.status == "ok", result
    assert (result.picture.num_frames, result.picture.fps) == (3600, Fraction(1, 10))
    assert kit.shown(result.picture) == [number % 110 for number in range(3600)]
