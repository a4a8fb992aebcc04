"""AudioSet segment lists."""

from pathlib import Path

import pytest

from clipmill.datasets import audioset
from clipmill.datasets.source import CorpusError

HEADER = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
"""
CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/m/068hy,"Animal"\n'


def make(root: Path, rows: str, *files: str, classes: str = CLASSES) -> Path:
    (root / "balanced_train_segments.csv").write_text(HEADER + rows)
    if classes:
        (root / "class_labels_indices.csv").write_text(classes)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_names_and_labels(tmp_path: Path) -> None:
    rows = """--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/09x0r"
-0Gj8-vB1q4, 30.000, 40.000, "/m/09x0r"
A_________A, 30.000, 40.000, "/m/05zppz"
B_________B, 1.500, 11.500, "/m/068hy"
C_________C, 5.000, 15.000, "/m/068hy"
D_________D, 0.000, 10.000, "/m/068hy"
"""
    files = [
        "--4gqARaEJE.mp4",
        "wav/Y-0Gj8-vB1q4.wav",
        "A_________A_30000_40000.flac",
        "B_________B_1.500.mkv",
        "C_________C_000005_000015.mp4",
    ]
    corpus = audioset.read(make(tmp_path, rows, *files))
    assert corpus.classes == ("Speech", "Male speech, man speaking", "Animal")
    by_key = {source.key: source for source in corpus.sources}
    assert list(by_key) == sorted(by_key)
    expected = {
        "--4gqARaEJE_0": (files[0], -1, (2, 0)),
        "-0Gj8-vB1q4_30000": (files[1], 0, (0,)),
        "A_________A_30000": (files[2], 1, (1,)),
        "B_________B_1500": (files[3], 2, (2,)),
        "C_________C_5000": (files[4], 2, (2,)),
    }
    found = {key: (Path(s.path).relative_to(tmp_path).as_posix(), s.label, s.labels) for key, s in by_key.items()}
    assert found == expected
    assert {source.split for source in corpus.sources} == {"balanced_train"}
    assert [name.rpartition(" ")[2] for name, _ in corpus.missing] == ["9"]


def test_whole_videos(tmp_path: Path) -> None:
    rows = 'A_________A, 3, 13, "/m/068hy"\nA_________A, 30, 40, "/m/068hy"\nB_________B, 30, 40, "/m/068hy"\n'
    root = make(tmp_path, rows, "A_________A.mp4", "B_________B_30.mp4")
    with pytest.raises(CorpusError, match=r"row 5: the file A_________A\.\* is also the segment of .* row 4"):
        audioset.read(root)
    corpus = audioset.read(root, trimmed=False)
    assert [(s.start_s, s.end_s) for s in corpus.sources] == [(3, 13), (30, 40), (None, None)]


def test_without_class_names(tmp_path: Path) -> None:
    corpus = audioset.read(make(tmp_path, 'A_________A, 0, 10, "/m/b,/m/a"\n', "A_________A.mp4", classes=""))
    assert corpus.classes == ("/m/a", "/m/b")
    assert corpus.sources[0].labels == (1, 0)


def test_a_segment_listed_twice_is_reported(tmp_path: Path) -> None:
    rows = 'A_________A, 0, 10, "/m/068hy"\n'
    corpus = audioset.read(make(tmp_path, rows + rows, "A_________A.mp4"))
    assert len(corpus.sources) == 1
    assert [reason for _, reason in corpus.missing] == ["the segment A_________A_0 is listed twice"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("A_________A, 0, 10\n", 'row 4: .* is not YTID, start, end, "mid,mid"'),
        ('A_________A, x, 10, "/m/068hy"\n', "row 4: .* is not YTID"),
        ("A_________A, 0, 10, /m/068hy,/m/09x0r\n", "row 4: .* is not YTID"),
        ('A_________A, 10, 0, "/m/068hy"\n', "row 4: needs an id, seconds"),
        ('A_________A, 0, 10, ""\n', "at least one label"),
        ('A_________A, 0, 10, "/m/068hx"\n', r"row 4: unknown class '/m/068hx'; did you mean '/m/068hy'"),
        ('B_________B, 0, 10, "/m/068hy"\n', "none of the 1 segments is there"),
    ],
)
def test_bad_rows(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        audioset.read(make(tmp_path, row, "A_________A.mp4"))


@pytest.mark.parametrize(
    "classes", ["0,/m/a,A\n2,/m/b,B\n", "0,/m/a,A\n1,/m/a,B\n", "index,mid,display_name\n0,/m/a\n"]
)
def test_bad_class_list(tmp_path: Path, classes: str) -> None:
    with pytest.raises(CorpusError, match=r"class_labels_indices\.csv row \d: .* counted from 0"):
        audioset.read(make(tmp_path, 'A_________A, 0, 10, "/m/a"\n', "A_________A.mp4", classes=classes))
