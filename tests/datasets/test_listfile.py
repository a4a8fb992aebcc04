"""`path label` lists."""

import os
from pathlib import Path

import pytest

from clipmill.datasets import listfile
from clipmill.datasets.source import CorpusError


def make(root: Path, text: str | bytes, *files: str | bytes, name: str = "kinetics400_val_list_videos.txt") -> Path:
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for file in files:
        path = os.path.join(os.fsencode(root), os.fsencode(file))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).touch()
    return root


def test_numbers(tmp_path: Path) -> None:
    text = "b dir/two words.mp4 2\na.mp4\t0\r\nnone.mp4 -1\ngone.mp4 1\n"
    corpus = listfile.read(make(tmp_path, text, "b dir/two words.mp4", "a.mp4", "none.mp4"))
    found = [(source.key, source.label, source.split) for source in corpus.sources]
    assert found == [("a", 0, "val"), ("b dir/two words", 2, "val"), ("none", -1, "val")]
    assert corpus.classes == ("0", "1", "2")
    assert corpus.missing == ((f"{tmp_path}/kinetics400_val_list_videos.txt row 4", f"no file {tmp_path}/gone.mp4"),)
    assert listfile.read(tmp_path, split="test").sources[0].split == "test"


def test_names(tmp_path: Path) -> None:
    corpus = listfile.read(make(tmp_path, "a.mp4 walk\nb.mp4 run\n", "a.mp4", "b.mp4", name="list.txt"))
    assert corpus.classes == ("run", "walk")
    assert [(source.label, source.split) for source in corpus.sources] == [(1, ""), (0, "")]
    (tmp_path / "classes.txt").write_text("walk\nrun\n")
    assert [s.label for s in listfile.read(tmp_path, class_list="classes.txt").sources] == [0, 1]
    (tmp_path / "classes.txt").write_text("walk\nruns\n")
    with pytest.raises(CorpusError, match=r"row 2: unknown class 'run'; did you mean 'runs'"):
        listfile.read(tmp_path, class_list="classes.txt")
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 2\n")
    with pytest.raises(CorpusError, match="row 2: label 2, but there are 2 classes"):
        listfile.read(tmp_path, class_list="classes.txt")


def test_bytes_links_and_places(tmp_path: Path) -> None:
    try:
        make(
            tmp_path,
            b"media/\xff.mp4 0\nmedia/\xc3\xa9.mp4 1\nmedia/./broken.mp4 1\n",
            b"media/\xff.mp4",
            "media/é.mp4",
        )
    except OSError as error:
        pytest.skip(f"this file system takes only UTF-8: {error}")
    (tmp_path / "media/broken.mp4").symlink_to("nowhere")
    corpus = listfile.read(tmp_path)
    assert [source.key for source in corpus.sources] == ["media/broken", "media/é", r"media/\xff"]
    assert os.path.lexists(corpus.sources[2].path)
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (elsewhere / "list.txt").write_text(f"é.mp4 0\n{tmp_path}/media/broken.mp4 0\n")
    corpus = listfile.read(elsewhere, videos="../media")
    assert [source.key for source in corpus.sources] == [f"{tmp_path}/media/broken", "é"]


def test_without_labels(tmp_path: Path) -> None:
    corpus = listfile.read(make(tmp_path, "two words.mp4\na.mp4\n", "two words.mp4", "a.mp4"), labelled=False)
    assert [(source.key, source.label) for source in corpus.sources] == [("a", -1), ("two words", -1)]
    assert corpus.classes == ()


def test_repeated_rows(tmp_path: Path) -> None:
    root = make(tmp_path, "a.mp4 1\n./a.mp4 1\n", "a.mp4")
    assert [reason for _, reason in listfile.read(root).missing] == [
        f"the same file as {root}/kinetics400_val_list_videos.txt row 1"
    ]
    make(tmp_path, "a.mp4 1\na.mp4 2\n")
    with pytest.raises(CorpusError, match=r"row 2: a\.mp4 has another label in .* row 1"):
        listfile.read(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4\n", r"row 1: 'a\.mp4' is not `path label`"),
        ("b.mp4 1\n", "none of the 1 listed files is there"),
        ("", "none of the 0"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        listfile.read(make(tmp_path, text, "a.mp4"))


def test_no_list(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"\*\.txt: no such list"):
        listfile.read(tmp_path)
