"""Real clips that nobody here made: every file has one outcome, and what is read back is what PyAV shows."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.decode.pyav import PyavDecoder
from clipmill.pipeline.pack.audit import audit
from clipmill.pipeline.pack.engine_local import LocalEngine
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.shard import ShardReader

EXPECTED = {  # frames, rate, width, height, has sound
    "av1.mkv": (125, "25", 640, 360, False),
    "bigbuckbunny_720p_audio.mp4": (132, "25", 1280, 720, True),
    "bikes_640x272.mp4": (250, "25", 640, 272, False),
    "bt709_full_range.mp4": (30, "30", 1280, 720, False),
    "cockatoo_720p_mp3_audio.mp4": (280, "20", 1280, 720, True),
    "dog_720p_aac_timecode.mp4": (289, "30000/1001", 1280, 720, True),
    "h264_10bit.mp4": (30, "30", 200, 200, False),
    "hevc_10bit.mp4": (30, "30", 200, 200, False),
    "juggle_720p_24fps.mp4": (247, "24", 1280, 720, False),
    "kinetics_340x256_280f_28fps.mp4": (280, "28", 340 * 64 / 51, 256, False),  # its pixels are 64:51
    "nasa_audio_only.mp3": (0, "1", 0, 0, True),
    "nasa_two_video_streams_audio_subtitles.mp4": (390, "30000/1001", 480, 270, True),
    "ucf_style_320x240_mpeg4_mp3.avi": (164, "25", 320, 240, True),
}


@pytest.fixture(scope="module")
def packed(test_data, tmp_path_factory):
    """All real clips, at 128 pixels so that it is quick."""
    root = test_data / "data" / "real_clips"
    if not root.is_dir():
        pytest.skip("no data/real_clips in CLIPMILL_TEST_DATA")
    out = tmp_path_factory.mktemp("real") / "packed"
    paths = sorted(root.iterdir())
    corpus = Corpus(sources=tuple(Source(key=path.name, path=str(path)) for path in paths))
    pack(corpus, out, PackSettings(short_side=128), root=root, workers=2, timeout_s=300)
    return out, paths


def test_every_file_has_exactly_one_outcome(packed):
    out, paths = packed
    records = {record.key: record for record in ShardIndex.open(out)}
    rejects = {row["key"]: row for row in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}
    assert records.keys() | rejects.keys() == {path.name for path in paths}
    assert not records.keys() & rejects.keys()
    counts = json.loads((out / "dataset.json").read_text())["counts"]
    assert sum(counts.values()) == len(paths)
    for name, row in rejects.items():
        assert name not in EXPECTED
        assert row["reason"]
    for name in records.keys() & EXPECTED.keys():
        record = records[name]
        frames, fps, width, height, sound = EXPECTED[name]
        scale = min(1.0, 128 / height) if height else 1.0
        assert (record.num_frames, record.fps) == (frames, Fraction(fps))
        assert (record.width, record.height) == (2 * round(width * scale / 2), 2 * round(height * scale / 2))
        assert (record.num_samples > 0) == sound
        if sound and frames:
            assert record.num_samples == round(frames / record.fps * 16000)
    if "corrupted_720p.mp4" in records:
        assert records["corrupted_720p.mp4"].salvaged
        assert 20 < records["corrupted_720p.mp4"].num_frames < 50


def test_the_data_set_verifies_and_decodes(packed):
    assert audit(packed[0], LocalEngine(workers=2, timeout_s=120, memory_gb=4), decode=True) == []


def reference(path: Path, width: int, height: int, stop: int):
    """(number, I420 frame) of a plain sequential decode, converted by libswscale alone (not by our filters)."""
    with av.open(str(path)) as container:
        stream = max(container.streams.video, key=lambda one: one.codec_context.width)
        for number, frame in enumerate(container.decode(stream)):
            if number == stop:
                return
            if number % 4 and number != stop - 1:
                continue
            space = int(frame.colorspace)
            if space == 2:  # not said
                space = 1 if frame.width >= 1280 or frame.height > 576 else 6
            full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
            yield number, frame.reformat(
                width, height, "yuv420p",
                src_colorspace=Colorspace.ITU709 if space == 1 else Colorspace.ITU601,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
                dst_color_range=ColorRange.MPEG, interpolation="BICUBIC",
            ).to_ndarray()  # fmt: skip


def test_frames_read_back_match_a_sequential_decode_of_the_source(packed, record_property):
    out, paths = packed
    by_name = {path.name: path for path in paths}
    decoder = PyavDecoder(ShardReader())
    checked = 0
    for record in ShardIndex.open(out):
        if record.key not in EXPECTED or not record.num_frames:
            continue
        frames = {}
        decoder.decode(
            record,
            range(record.num_frames),
            lambda number, yuv, frames=frames: frames.update({number: [plane.copy() for plane in yuv]}),
        )
        worst = 99.0
        number = -1
        for number, whole in reference(by_name[record.key], record.width, record.height, record.num_frames):
            luma, chroma = whole[: record.height], whole[record.height :].reshape(2, record.height // 2, -1)
            error = sum(
                float(((a.astype(float) - b) ** 2).sum()) for a, b in zip(frames[number], (luma, *chroma), strict=True)
            )
            worst = min(worst, 10 * np.log10(255**2 * whole.size / max(error, 1e-9)))
        assert number == record.num_frames - 1
        record_property(record.key, round(float(worst), 1))
        assert worst > 34, (record.key, worst)  # a neighbouring frame of these clips has less
        checked += 1
    assert checked >= 12
