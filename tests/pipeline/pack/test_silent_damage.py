"""Damage that FFmpeg reports neither as an error nor on the frame is found all the same, and not packed."""

import av
import numpy as np
import pytest

from clipmill.pipeline.pack import keep
from clipmill.pipeline.pack.decoding import Decoder
from clipmill.pipeline.pack.scan import _settled

ALL = list(range(100))
B_FRAMES = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "2"}
FFV1 = {"level": "3", "slicecrc": "1", "g": "12"}
MPEG = {"g": "12", "bf": "2", "b": "8000000", "qmin": "1", "qmax": "2"}


def slope(number):
    """A picture that moves."""
    yuv = np.full((72, 64), 128, np.uint8)
    yuv[:48] = 16 + (np.add.outer(2 * np.arange(48), np.arange(64)) + 3 * number) % 200
    return av.VideoFrame.from_ndarray(yuv, "yuv420p")


def other_bytes(number, place):
    """Replace one byte of one packet; place: as a share of its length."""
    count = -1

    def change(packet):
        nonlocal count
        count += 1
        if count != number:
            return packet
        data = bytearray(bytes(packet))
        data[int(place * len(data))] ^= 0x5A
        other = av.Packet(bytes(data))
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        other.duration, other.is_keyframe = packet.duration, packet.is_keyframe
        return other

    return change


@pytest.mark.parametrize("place", [0.2, 0.5, 0.95])
def test_a_slice_with_a_wrong_checksum_is_damage(kit, place):
    """FFV1 shows the slice of the frame before instead."""
    base = kit.film("base.mkv", codec="ffv1", options=FFV1)
    result = kit.pack(kit.remux(base, kit.folder / "a.mkv", other_bytes(40, place)))
    assert (result.status, result.reason) == ("salvaged", "damaged")
    assert kit.shown(result.picture) == ALL[48:]  # from the next key frame on
    result = kit.pack(kit.remux(base, kit.folder / "b.mkv", other_bytes(70, place)))
    assert kit.shown(result.picture) == ALL[:70]


def packets_of(path):
    with av.open(str(path)) as container:
        packets = [(bytes(packet), packet.pts) for packet in container.demux(video=0) if packet.size]
        return packets, container.streams.video[0].codec_context.extradata


def decoded(name, extradata, packets, hold):
    """(frames, None or whether each packet's damage was found) of `Decoder`, with frames held or not."""
    context = av.CodecContext.create(name, "r")
    context.extradata = extradata
    context.width, context.height = 64, 48
    decoder, held, pictures, found = Decoder(context), [], [], []
    for data, pts in [*packets, (None, None)]:
        packet = None
        if data is not None:
            packet = av.Packet(data)
            packet.pts = pts
        try:
            frames, unmarked = decoder.decode(packet)
        except av.FFmpegError:
            return None
        if any(frame.is_corrupt for frame in frames):
            return None
        pictures += [frame.to_ndarray().tobytes() for frame in frames]
        found.append(unmarked)
        if hold:
            held.append(frames)
    return pictures, any(found)


def spoilt_ffv1(packets):
    """One packet is missing."""
    for lost in range(1, len(packets) - 1):
        yield packets[:lost] + packets[lost + 1 :]


def spoilt_mpeg2(packets):
    """One bit of a packet with motion vectors is another."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        number = int(rng.integers(1, len(packets)))
        data = bytearray(packets[number][0])
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        yield [*packets[:number], (bytes(data), packets[number][1]), *packets[number + 1 :]]


@pytest.mark.parametrize(
    ("name", "options", "spoil", "form"),
    [("ffv1", FFV1, spoilt_ffv1, "mkv"), ("mpeg2video", MPEG, spoilt_mpeg2, "ts")],
)
def test_frames_that_depend_on_what_was_in_memory_are_damaged(kit, name, options, spoil, form):
    """Whenever two decodes of the same packets differ only because one reuses the memory of its frames."""
    path = kit.film(f"a.{form}", codec=name, options=options, frames=13, size=(64, 48), draw=slope)
    packets, extradata = packets_of(path)
    whole = decoded(name, extradata, packets, hold=False)
    assert whole is not None
    assert whole == decoded(name, extradata, packets, hold=True)
    assert (len(whole[0]), whole[1]) == (13, False)
    differ = 0
    for spoilt in spoil(packets):
        reused, kept = (decoded(name, extradata, spoilt, hold) for hold in (False, True))
        if reused is not None and kept is not None and reused[0] != kept[0]:
            differ += 1
            assert reused[1], "the decoder shows what was in its memory, and nobody noticed"
    assert differ > 0  # or this test shows nothing


def test_a_file_that_ends_within_its_index_is_rejected(kit):
    """What is left of the tables may look whole, and lists the wrong frames."""
    path = kit.film("a.mp4", options=B_FRAMES)
    data = path.read_bytes()
    start, table = data.index(b"moov") - 4, data.index(b"stsz")
    for stop in [*range(start + 16, len(data), 60), *range(table + 20, table + 80, 4), len(data) - 1]:
        path.write_bytes(data[:stop])
        result = kit.pack(path, profile="raw")
        assert (result.status, result.reason) == ("rejected", "unreadable")
    path.write_bytes(data + b"\0\0\0\x08free")
    assert kit.pack(path, profile="raw").status == "ok"


def test_boxes_of_any_length_lead_to_the_index(kit):
    """A length in eight bytes, and a last box without one."""
    path = kit.film("a.mp4", options=B_FRAMES)
    data = path.read_bytes()
    start = data.index(b"moov") - 4
    path.write_bytes(data[:start] + b"\0\0\0\x01free" + (24).to_bytes(8, "big") + bytes(8) + data[start:])
    assert kit.shown(kit.pack(path).picture) == ALL
    path.write_bytes(data[:start] + bytes(4) + data[start + 4 :])
    assert kit.shown(kit.pack(path).picture) == ALL


def test_the_first_frames_of_a_broadcast(kit):
    """Cut off after a few frames, of which one that is shown in between was still to come."""
    path = kit.film("a.ts", options=B_FRAMES)
    data, packed = path.read_bytes(), set()
    for stop in range(3 * 188, 16 * 188, 188):
        path.write_bytes(data[:stop])
        result = kit.pack(path)
        if result.picture is not None:
            shown = list(dict.fromkeys(kit.shown(result.picture)))  # one frame alone has no certain rate
            assert shown == ALL[: len(shown)]
            packed.add(len(shown))
    assert {1, 2} <= packed


@pytest.mark.parametrize(
    ("times", "last_decode_time", "whole"),
    [([0, 40, 120], 40, 2), ([0, 80], 0, 1), ([0, 40], 0, 2), ([0, 40, 80], 40, 3), ([0, 80, 160], 80, 3), ([0], 0, 1)],
)
def test_frames_before_the_first_that_is_missing(times, last_decode_time, whole):
    for suspected in (False, True):
        assert _settled(np.array(times), last_decode_time, 40, suspected) == whole


def test_a_copy_that_cannot_be_read_is_not_copyable(kit, monkeypatch):
    """As the muxer makes it of some damaged packets."""
    path = kit.film("a.mp4", frames=5, options={"preset": "ultrafast", "g": "5", "bf": "0"}, colour=(1, 1))
    assert kit.pack(path, profile="copy").status == "ok"
    read_table = keep.read_table

    def cut_off(written):
        with open(written, "r+b") as file:
            file.truncate(200)
        return read_table(written)

    monkeypatch.setattr(keep, "read_table", cut_off)
    result = kit.pack(path, profile="copy")
    assert (result.status, result.reason) == ("rejected", "not_copyable")
    assert len(list((kit.folder / "out").iterdir())) == 1  # the first one
