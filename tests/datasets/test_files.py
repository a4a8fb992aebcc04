"""Finding and naming files whose names and kinds no one would choose."""

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.datasets import folder, images
from clipmill.datasets.files import MEDIA_SUFFIXES, find, key_of, keys_of, read_csv, read_lines, text_of
from clipmill.datasets.source import CorpusError


def touch(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "wb") as file:
                file.write(b"x")
        except OSError as error:  # some file systems take only UTF-8
            pytest.skip(f"this file system refuses {name!r}: {error}")


ODD_NAMES = [
    "plain.mp4",
    "two words.mp4",
    "-dash.mp4",
    "#%?&;!().mp4",
    "new\nline.mp4",
    "back\\slash.mp4",
    "\\xff.mp4",
    b"\xff.mp4",
    b"latin\xe9.mp4",
    unicodedata.normalize("NFC", "é.mp4"),
    unicodedata.normalize("NFD", "é.mp4"),
    "日本.mp4",
    "dots.in.name.mp4",
    "n" * 251 + ".mp4",
    "twin.avi",
    "twin.mp4",
    "twin.mp4.mp4",
]


def test_odd_names_survive(tmp_path: Path) -> None:
    touch(tmp_path, *ODD_NAMES)
    corpus = folder.read(tmp_path)
    assert len(corpus.sources) == len(ODD_NAMES)
    keys = [source.key for source in corpus.sources]
    assert len(set(keys)) == len(keys)
    for source in corpus.sources:
        assert source.key.encode("utf-8").decode("utf-8") == source.key  # no surrogates
        assert Path(source.path).read_bytes() == b"x"  # the real name
    assert {os.fsencode(os.path.basename(source.path)) for source in corpus.sources} == set(map(os.fsencode, ODD_NAMES))
    assert {"plain", "-dash", "new\nline", r"\xff", r"\\xff", "dots.in.name", "n" * 251} <= set(keys)
    assert {"twin.avi", "twin.mp4", "twin.mp4.mp4"} <= set(keys)


def test_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    names = ["b.mp4", "B.mp4", "a/z.mp4", "a-b.mp4", "é.mp4", "a/Z.mp4"]
    for root, order in ((tmp_path / "one", names), (tmp_path / "two", names[::-1])):
        touch(root, *order)
    one, two = find(tmp_path / "one", MEDIA_SUFFIXES), find(tmp_path / "two", MEDIA_SUFFIXES)
    assert one == two == ["B.mp4", "a-b.mp4", "a/Z.mp4", "a/z.mp4", "b.mp4", "é.mp4"]


def test_links_pipes_and_folders_with_media_names(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    touch(root, "real/a.mp4", "clips.mp4/inside.mp4", "empty.mp4/readme.txt", ".hidden.mp4", ".cache/b.mp4", "UP.MP4")
    touch(tmp_path, "elsewhere/c.mp4", "outside.mp4")
    (root / "broken.mp4").symlink_to("nowhere.mp4")
    (root / "self.mp4").symlink_to("self.mp4")
    (root / "file.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "real" / "loop").symlink_to(root)
    (root / "up").symlink_to("..")
    (root / "again").symlink_to("real")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked2").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "pipe.mp4")
    assert find(root, MEDIA_SUFFIXES) == [
        "UP.MP4",
        "broken.mp4",
        "clips.mp4/inside.mp4",
        "empty.mp4",
        "file.mp4",
        "linked/c.mp4",
        "pipe.mp4",
        "real/a.mp4",
        "self.mp4",
    ]


@pytest.mark.slow  # a minute
def test_a_million_files_are_listed_in_bounded_memory(tmp_path: Path) -> None:
    for number in range(1000):
        part = tmp_path / f"{number % 100}" / f"{number}"
        part.mkdir(parents=True)
        for file in range(1000):
            (part / f"{file}.mp4").touch()
    code = "import resource, sys; from pathlib import Path; from clipmill.datasets.folder import read; "
    code += "print(len(read(Path(sys.argv[1])).sources), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    told = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True).stdout
    count, kilobytes = map(int, told.split())
    assert count == 1_000_000
    assert kilobytes < 2 << 20  # about 0.8 GB: a kilobyte for each is more than its text needs
    shutil.rmtree(tmp_path)


def test_a_folder_that_cannot_be_a_corpus(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(CorpusError, match=r"no videos or sound files .* known suffixes"):
        folder.read(tmp_path)
    with pytest.raises(CorpusError, match="no pictures"):
        images.read(tmp_path)
    with pytest.raises(CorpusError, match=r"nowhere: no such folder"):
        folder.read(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"notes\.txt: is not a folder"):
        folder.read(tmp_path / "notes.txt")


@given(st.lists(st.binary(min_size=1, max_size=6).filter(lambda name: b"\0" not in name), unique=True, max_size=8))
def test_keys_are_valid_and_distinct(names: list[bytes]) -> None:
    paths = [os.fsdecode(name) for name in names]
    keys = [key_of(path) for path in paths]
    assert len(set(keys)) == len(paths)
    "".join(keys).encode("utf-8")


@given(st.lists(st.text("ab.mp4/", min_size=1, max_size=9), unique=True, max_size=12))
def test_keys_without_suffix_are_distinct(paths: list[str]) -> None:
    keys = keys_of(paths)
    assert len(set(keys)) == len(paths)
    assert all(path.startswith(key) for path, key in zip(paths, keys, strict=True))


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "walk/1.mp4", "run/deep/2.wav", "run/3.avi")
    corpus = folder.read(tmp_path)
    assert corpus.classes == ("run", "walk")
    assert [(source.key, source.label) for source in corpus.sources] == [("run/3", 0), ("run/deep/2", 0), ("walk/1", 1)]
    assert folder.read(tmp_path, classes=False).classes == ()
    touch(tmp_path, "outside.mp4")
    assert {source.label for source in folder.read(tmp_path).sources} == {-1}
    with pytest.raises(CorpusError, match=r"outside\.mp4: lies in no class folder"):
        folder.read(tmp_path, classes=True)


def test_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.JPEG", "train/dog/2.png", "validation/dog/1.jpg", "train/video.mp4")
    corpus = images.read(tmp_path)
    assert corpus.classes == ("cat", "dog")
    found = [(source.key, source.label, source.split) for source in corpus.sources]
    assert found == [("train/cat/1", 0, "train"), ("train/dog/2", 1, "train"), ("validation/dog/1", 1, "val")]
    touch(tmp_path, "bird/3.jpg")  # now train is a class like any other
    assert images.read(tmp_path).classes == ("bird", "train", "validation")


def test_lists_keep_bytes_and_row_numbers(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo \xff\nthree")
    assert read_lines(tmp_path / "list.txt") == [(1, "one"), (4, "two \udcff"), (5, "three")]
    (tmp_path / "list.csv").write_bytes(b'# note\n\na, \xff ,"c, d"\n')
    assert read_csv(tmp_path / "list.csv") == [(3, ["a", r"\xff", "c, d"])]
    (tmp_path / "bad.csv").write_text('a,"b\n')
    with pytest.raises(CorpusError, match=r"bad\.csv row 1"):
        read_csv(tmp_path / "bad.csv")


def test_messages_stay_on_one_line() -> None:
    assert text_of("a\nb\udcff é") == r"a\nb\udcff é"
