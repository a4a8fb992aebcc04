"""Files that are not what they seem, or not whole: a typed outcome, no hang, and never a wrong or stale frame."""

import os
import socket
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from clipmill.pipeline.pack import probe, task
from clipmill.pipeline.pack.outcome import REASONS, Rejected
from clipmill.pipeline.pack.probe import Media

ALL = list(range(100))
B_FRAMES = {"preset": "ultrafast", "crf": "10", "g": "12", "bf": "2"}
MPEG = {"g": "12", "bf": "2", "b": "8000000", "qmin": "1", "qmax": "2"}


def outcome(result):
    assert result.status == "rejected"
    assert result.reason in REASONS
    assert result.detail
    assert result.picture is None
    assert result.sound is None
    return result.reason


def assert_right_frames(kit, result):
    """The frames of a salvaged film are consecutive frames of the film; returns the first and their number."""
    assert result.status == "salvaged", (result.status, result.reason, result.detail)
    shown = kit.shown(result.picture)
    assert shown == ALL[shown[0] : shown[0] + len(shown)]
    return shown[0], len(shown)


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("faststart.mp4", {"options": B_FRAMES, "muxer": {"movflags": "+faststart"}}),
        ("fragments.mp4", {"options": B_FRAMES, "muxer": {"movflags": "+frag_keyframe+empty_moov"}}),
        ("a.mkv", {"options": B_FRAMES}),
        ("a.avi", {"options": B_FRAMES}),
        ("a.flv", {"options": B_FRAMES}),
        ("a.webm", {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8", "b": "4000000"}}),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.6])
def test_a_cut_off_file_gives_its_whole_beginning(kit, name, facts, share):
    result = kit.pack(cut(kit.film(name, **facts), share))
    first, count = assert_right_frames(kit, result)
    assert result.reason == "truncated"
    assert first == 0
    assert 10 < count < 95


def test_one_picture_of_a_transport_stream_is_one_frame(kit):
    path = kit.film("a.ts", options=B_FRAMES)
    with av.open(path) as container:
        second = [packet.pos for packet in container.demux(video=0) if packet.size][1]
    path.write_bytes(path.read_bytes()[:second])
    result = kit.pack(path)
    assert (result.picture.num_frames, result.picture.fps) == (1, 25)
    assert kit.shown(result.picture) == ALL[:1]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("a.ts", {"options": B_FRAMES}),
        ("a.mpg", {"codec": "mpeg2video", "options": MPEG}),
        ("a.wmv", {"codec": "wmv2", "options": {"g": "12", "b": "8000000", "qmin": "1", "qmax": "2"}}),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.55, 0.6, 0.65])
def test_formats_that_do_not_know_their_length(kit, name, facts, share):
    """Cut between two packets they look whole; in any case only frames that are there are shown."""
    result = kit.pack(cut(kit.film(name, **facts), share))
    assert result.status in ("ok", "salvaged")
    shown = kit.shown(result.picture)
    assert shown == ALL[: len(shown)]
    assert 20 < len(shown) < 100


def test_a_cut_off_file_without_its_table_is_rejected(kit):
    assert outcome(kit.pack(cut(kit.film("a.mp4"), 0.6))) == "unreadable"


def noisy(numbers, seed=0):
    """Overwrite a third of the bytes of the packets with these numbers."""
    rng = np.random.default_rng(seed)
    count = -1

    def change(packet):
        nonlocal count
        count += 1
        if count not in numbers:
            return packet
        data = np.frombuffer(bytes(packet), np.uint8).copy()
        places = rng.integers(0, len(data), max(len(data) // 3, 1))
        data[places] = rng.integers(0, 256, len(places))
        other = av.Packet(data.tobytes())
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        other.duration, other.is_keyframe = packet.duration, packet.is_keyframe
        return other

    return change


def test_few_damaged_packets_leave_the_longest_undamaged_part(kit):
    base = kit.film("base.mp4", options=B_FRAMES)
    first, count = assert_right_frames(kit, kit.pack(kit.remux(base, kit.folder / "one.mp4", noisy({40}))))
    assert (first, count) == (48, 52)  # from the key frame after the damage
    result = kit.pack(kit.remux(base, kit.folder / "three.mp4", noisy({10, 40, 70})))
    assert result.reason == "damaged"
    first, count = assert_right_frames(kit, result)
    assert count > 20


def test_many_damaged_packets_are_over_the_budget(kit):
    base = kit.film("base.mp4", options=B_FRAMES)
    for numbers in (set(range(0, 100, 9)), set(ALL)):
        path = kit.remux(base, kit.folder / f"{len(numbers)}.mp4", noisy(numbers))
        assert outcome(kit.pack(path)) == "damaged"
    assert assert_right_frames(kit, kit.pack(kit.folder / "12.mp4", damage_budget=0.5))


def test_sound_is_cut_with_the_picture_that_was_salvaged(kit):
    at = [0.5, 2.5, 3.1]
    facts = {"sound": kit.clicks(4.0, at, 16000), "sound_codec": "aac"}
    base = kit.film("base.mkv", options=B_FRAMES, **facts)
    video = [number for number, packet in enumerate(_packets(base)) if packet[0] == "video"]
    result = kit.pack(kit.remux(base, kit.folder / "one.mkv", noisy({video[40]})))
    first, count = assert_right_frames(kit, result)
    assert result.sound.num_samples == count * 640
    assert kit.click_times(result.sound, 2) == pytest.approx([t - first / 25 for t in at[1:]], abs=1 / 16000)


def _packets(path):
    with av.open(str(path)) as container:
        return [(packet.stream.type, packet.pts) for packet in container.demux() if packet.size]


@pytest.mark.parametrize("lost", [False, True])
def test_broadcast_packets_overwritten_or_lost(kit, lost):
    data = bytearray(kit.film("a.ts", options=B_FRAMES).read_bytes())
    places = slice(60 * 188, 63 * 188)
    data[places] = b"" if lost else np.random.default_rng(0).integers(0, 256, 3 * 188, np.uint8).tobytes()
    (kit.folder / "b.ts").write_bytes(data)
    result = kit.pack(kit.folder / "b.ts")
    assert_right_frames(kit, result)
    assert result.reason == "damaged"


def test_a_stream_that_starts_between_key_frames_starts_at_the_next(kit):
    data = kit.film("a.ts", options=B_FRAMES).read_bytes()
    (kit.folder / "b.ts").write_bytes(data[len(data) // 3 :])
    result = kit.pack(kit.folder / "b.ts")
    first, count = assert_right_frames(kit, result)
    assert result.reason == "no_key_frame"
    assert first % 12 == 0
    assert first + count == 100


@pytest.mark.parametrize(
    ("box", "offset", "value", "frames"),
    [
        (b"mdhd", 16, 5, 100),  # duration
        (b"stts", 8, 500, 100),  # number of frames, too many
        (b"stts", 8, 50, 100),  # too few: the others have no time of their own
        (b"stsz", 8, 120, 100),  # number of sizes, too many
        (b"stsz", 8, 60, 60),
    ],
)
def test_headers_that_lie(kit, box, offset, value, frames):
    path = kit.film("a.mp4", options=B_FRAMES)
    data = bytearray(path.read_bytes())
    place = data.index(box) + 4 + offset
    data[place : place + 4] = value.to_bytes(4, "big")
    path.write_bytes(data)
    result = kit.pack(path)
    assert result.status == "ok"
    assert kit.shown(result.picture) == ALL[:frames]


def test_things_that_are_no_media(kit):
    folder = kit.folder
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("hello " * 1000)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes())
    film = kit.film("film.mp4")
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{film}\n#EXT-X-ENDLIST\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {film}\n")
    Image.new("RGB", (64, 48)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    (folder / "film.jpg").write_bytes(film.read_bytes())
    (folder / "broken.mp4").symlink_to("nowhere")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.mp4"))
        found = {path.stem: outcome(kit.pack(path)) for path in folder.glob("*.*") if path != film}
    assert found | {"film": ""} == {
        "zero": "empty",
        "text": "not_media",
        "noise": "not_media",
        "list": "not_media",
        "concat": "not_media",
        "picture": "wrong_type",
        "film": "",
        "broken": "missing",
        "loop": "missing",
        "folder": "not_a_file",
        "pipe": "not_a_file",
        "socket": "not_a_file",
    }
    assert outcome(kit.pack(folder / "film.jpg")) == "wrong_type"
    assert outcome(kit.pack(folder / "none.mp4")) == "missing"
    assert outcome(kit.pack("/dev/zero")) == "not_a_file"
    assert list((folder / "out").iterdir()) == []  # nothing is left of any of them


def test_a_file_that_may_not_be_read(kit, monkeypatch):
    path = kit.film("a.mp4", frames=2)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(probe.os, "open", refuse)
    assert outcome(kit.pack(path)) == "permission"


def test_a_file_that_changes_while_it_is_read(kit, monkeypatch):
    path = kit.film("a.mp4", frames=5)
    choose = task.choose_video

    def grow(container):
        with path.open("ab") as file:
            file.write(b"more")
        return choose(container)

    monkeypatch.setattr(task, "choose_video", grow)
    assert outcome(kit.pack(path)) == "changed"


def test_media_says_what_it_cannot_open(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with Media(str(tmp_path / "a")) as media:
        assert media.size == 3
        assert media.head() == b"abc"
        media.check_unchanged()
        (tmp_path / "a").write_bytes(b"abcd")
        with pytest.raises(Rejected, match="changed"):
            media.check_unchanged()
    with pytest.raises(Rejected, match="not_a_file"):
        Media(str(tmp_path))


def test_frames_too_large_for_any_profile_are_rejected(kit):
    path = kit.film("wide.mkv", size=(8200, 16), sar=Fraction(4), frames=1, codec="libx264")
    assert outcome(kit.pack(path)) == "too_large"
    assert kit.pack(path, short_side=16).reason == "too_large"


def test_an_unexpected_fault_rejects_only_its_source(kit, monkeypatch):
    path = kit.film("a.mp4", frames=2)

    def fail(_):
        raise KeyError("surprise")

    monkeypatch.setattr(task, "choose_video", fail)
    assert outcome(kit.pack(path)) == "failed"


def test_a_full_disk_is_not_the_sources_fault(kit, monkeypatch):
    path = kit.film("a.mp4", frames=2)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(task, "choose_video", full)
    with pytest.raises(task.DiskError, match="No space left"):
        kit.pack(path)
    assert list((kit.folder / "out").iterdir()) == []
