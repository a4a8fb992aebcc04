"""The fuzzer: the same mutants for the same seed, findings where there are some, and none in what is here."""

from fractions import Fraction

import av
import numpy as np
import pytest

from clipmill.pipeline.pack.outcome import Result
from clipmill.pipeline.pack.task import pack_source
from clipmill.tools.bench import fuzz as fuzzer
from clipmill.tools.bench import mutate
from clipmill.tools.bench.fuzz import Mutant, fuzz, judge_media, judge_shard


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    return folder, mutate.write_seeds(folder)


def test_mutants_are_a_function_of_the_seed():
    data, other = bytes(range(256)) * 8, b"x" * 500
    ways = set()
    for number in range(200):
        way, spoilt = mutate.mutate(data, other, np.random.default_rng((3, number)))
        assert mutate.mutate(data, other, np.random.default_rng((3, number))) == (way, spoilt)
        ways.add(way)
        assert len(spoilt) < 4 * len(data)
    assert ways == {way.__name__.strip("_") for way in mutate.WAYS}


@pytest.mark.slow
def test_seeds_are_packed_without_a_finding(seeds, tmp_path):
    _, paths = seeds
    assert len(paths) >= 20
    for path in paths:
        task = fuzzer.Task(number=0, path=str(path), stem=str(tmp_path / "out"), settings=fuzzer.PackSettings())
        result = pack_source(task)
        assert result.status == "ok", (path.name, result.reason, result.detail)
        if result.picture is not None and path.suffix not in (".jpg", ".png", ".webp", ".gif", ".mov"):
            count, altered, finding = fuzzer._compare_media(result, path, prefix=True)
            assert (count, altered, finding) == (mutate.FRAMES, 0, "")


@pytest.mark.slow
def test_a_wrong_frame_is_found(seeds, tmp_path, monkeypatch):
    """A packer that shows a neighbouring frame, and one that gives a reason that is none."""
    folder, paths = seeds
    path = next(path for path in paths if path.name == "b.mp4")
    task = fuzzer.Task(
        number=0, path=str(path), stem=str(tmp_path / "out"), settings=fuzzer.PackSettings(profile="raw")
    )
    result = pack_source(task)
    data = np.fromfile(result.picture.path, np.uint8).reshape(mutate.FRAMES, -1)
    data[[5, 6]] = data[[6, 5]]
    data.tofile(result.picture.path)
    assert "none that a sequential decode shows" in fuzzer._compare_media(result, path, prefix=False)[2]
    monkeypatch.setattr(
        fuzzer, "pack_source", lambda task: Result(number=0, status="rejected", reason="because", detail="so")
    )
    verdict = judge_media(Mutant(seeds=str(folder), scratch=str(tmp_path), seed=0, number=0))
    assert "for no good reason" in verdict.finding


def _film(path, size=(64, 48), empty=(), form=None):
    """Seven frames of FFV1, each decodable by itself, of which the packets ``empty`` hold nothing."""
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream("ffv1", rate=25, options={"g": "1", "level": "3"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = 1, 1
        packets = []
        for number in range(7):
            frame = av.VideoFrame(*size, "yuv420p")
            for plane, level in zip(frame.planes, (24 + 8 * number, 128, 128), strict=True):
                plane.update(bytes([level]) * plane.buffer_size)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += stream.encode(frame)
        for number, packet in enumerate([*packets, *stream.encode(None)]):
            if number in empty:
                pts, packet = packet.pts, av.Packet(b"")
                packet.pts = packet.dts = pts
                packet.time_base, packet.duration, packet.stream = Fraction(1, 25), 1, stream
            container.mux(packet)
    return path


def _judged(path, folder):
    task = fuzzer.Task(number=0, path=str(path), stem=str(folder / "out"), settings=fuzzer.PackSettings(profile="raw"))
    result = pack_source(task)
    assert result.status == "ok", (result.reason, result.detail)
    return result, fuzzer._compare_media(result, path, prefix=False)


def test_plain_decode_takes_a_file_for_what_it_holds(tmp_path):
    """And not for what its name says, which the packer does not see."""
    path = _film(tmp_path / "a.nut")
    assert _judged(path.rename(tmp_path / "a.webp"), tmp_path)[1] == (7, 0, "")


def test_plain_decode_cuts_off_odd_rows_and_columns(tmp_path):
    result, judged = _judged(_film(tmp_path / "a.mkv", size=(65, 49)), tmp_path)
    assert (result.picture.width, result.picture.height) == (64, 48)
    assert judged == (7, 0, "")


def test_plain_decode_goes_on_after_an_empty_packet(tmp_path):
    path = _film(tmp_path / "a.nut", empty=(3,))
    with av.open(str(path)) as container:
        assert [packet.size == 0 for packet in container.demux(video=0)].index(True) == 3
    result, judged = _judged(path, tmp_path)
    assert result.picture.num_frames == 7
    assert judged[::2] == (7, "")


@pytest.mark.slow
def test_a_wrong_frame_of_a_shard_is_found(seeds, tmp_path, monkeypatch):
    folder = fuzzer.write_data_sets(seeds[1], tmp_path / "packed")
    expected = fuzzer._expected

    def swapped(root):
        return expected(root.removesuffix("raw") + "cpu" if root.endswith("raw") else root)

    monkeypatch.setattr(fuzzer, "_expected", swapped)
    (tmp_path / "scratch").mkdir()
    found = [
        judge_shard(Mutant(seeds=str(folder), scratch=str(tmp_path / "scratch"), seed=1, number=number))
        for number in range(40)
    ]
    wrong = [verdict for verdict in found if verdict.finding]
    assert wrong
    assert all(verdict.way.endswith("raw") for verdict in wrong)


@pytest.mark.parametrize(
    ("media", "shards"), [(240, 60), pytest.param(20_000, 5_000, marks=pytest.mark.slow, id="all")]
)
def test_nothing_is_found(media, shards):
    for what, count in (("media", media), ("shards", shards)):
        report = fuzz(what, count, seed=7, workers=2)
        assert report.findings == []
        assert report.mutants == count
        assert report.peak_mb < 1000
        assert len(report.outcomes) >= 3
        assert report.compared > count
