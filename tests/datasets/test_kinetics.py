"""Kinetics lists, with every way of naming and placing the clips."""

from pathlib import Path

import pytest

from clipmill.datasets import kinetics, kinetics_sound
from clipmill.datasets.source import Corpus, CorpusError, Source

HEADER = "label,youtube_id,time_start,time_end,split\n"


def make(root: Path, csv: dict[str, str], *files: str) -> Path:
    root.mkdir(exist_ok=True)
    for name, text in csv.items():
        (root / name).write_text(text)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_names_and_places(tmp_path: Path) -> None:
    rows = [
        "playing violin,-abc_def-12,3,13,train",
        "bowling,AAAAAAAAAAA,0,10,train",
        "bowling,BBBBBBBBBBB,7,17,validate",
        '"tap, tap",CCCCCCCCCCC,100,110,test',
        "bowling,DDDDDDDDDDD,1,11,train",
    ]
    files = [
        "train/playing_violin/-abc_def-12_000003_000013.mp4",
        "AAAAAAAAAAA.MKV",
        "val/bowling/BBBBBBBBBBB_7_17.webm",
        "CCCCCCCCCCC_000100_000110.avi",
        "unlisted_000000_000010.mp4",
    ]
    root = make(tmp_path, {"all.csv": HEADER + "\n".join(rows) + "\n"}, *files)
    corpus = kinetics.read(root)
    assert corpus.classes == ("bowling", "playing violin", "tap, tap")
    assert [(s.key, Path(s.path).relative_to(root).as_posix(), s.label, s.split) for s in corpus.sources] == [
        ("-abc_def-12_000003_000013", files[0], 1, "train"),
        ("AAAAAAAAAAA_000000_000010", files[1], 0, "train"),
        ("BBBBBBBBBBB_000007_000017", files[2], 0, "val"),
        ("CCCCCCCCCCC_000100_000110", files[3], 2, "test"),
    ]
    assert all(source.start_s is None and source.end_s is None for source in corpus.sources)
    (missing,) = corpus.missing
    assert missing[0].endswith("all.csv row 6")
    assert "no file DDDDDDDDDDD_000001_000011.* or DDDDDDDDDDD.*" in missing[1]


def test_whole_videos(tmp_path: Path) -> None:
    rows = "bowling,AAAAAAAAAAA,0,10,train\nbowling,AAAAAAAAAAA,20,30,train\n"
    root = make(tmp_path, {"train.csv": HEADER + rows}, "AAAAAAAAAAA.mp4")
    with pytest.raises(
        CorpusError, match=r"row 3: the file AAAAAAAAAAA\.\* is also the clip of .* row 2; .*trimmed=False"
    ):
        kinetics.read(root)
    corpus = kinetics.read(root, trimmed=False)
    assert [(s.key, s.start_s, s.end_s) for s in corpus.sources] == [
        ("AAAAAAAAAAA_000000_000010", 0.0, 10.0),
        ("AAAAAAAAAAA_000020_000030", 20.0, 30.0),
    ]


def test_a_clip_trimmed_twice_prefers_its_class_and_video(tmp_path: Path) -> None:
    rows = "bowling,AAAAAAAAAAA,0,10,train\n"
    name = "AAAAAAAAAAA_000000_000010"
    root = make(
        tmp_path, {"train.csv": HEADER + rows}, f"abseiling/{name}.mp4", f"bowling/{name}.aac", f"bowling/{name}.mp4"
    )
    (source,) = kinetics.read(root).sources
    assert source.path.endswith(f"bowling/{name}.mp4")


def test_repeated_rows_and_lists_without_labels(tmp_path: Path) -> None:
    row = "bowling,AAAAAAAAAAA,0,10,train\n"
    lists = {"a.csv": HEADER + row + row, "b.csv": "youtube_id,time_start,time_end\nBBBBBBBBBBB,0,10\n"}
    corpus = kinetics.read(make(tmp_path, lists, "AAAAAAAAAAA.mp4", "BBBBBBBBBBB.mp4"))
    assert [source.label for source in corpus.sources] == [0, -1]
    assert [reason for _, reason in corpus.missing] == [f"the same clip as {tmp_path / 'a.csv'} row 2"]


def test_class_list_fixes_the_numbers(tmp_path: Path) -> None:
    root = make(tmp_path, {"val.csv": HEADER + "bowling,AAAAAAAAAAA,0,10,val\n"}, "AAAAAAAAAAA.mp4")
    (root / "classes.txt").write_text("abseiling\nbowling\n")
    corpus = kinetics.read(root, lists="val.csv", class_list="classes.txt")
    assert corpus.sources[0].label == 1
    (root / "classes.txt").write_text("abseiling\nbowlin\n")
    with pytest.raises(CorpusError, match=r"row 2: unknown class 'bowling'; did you mean 'bowlin'"):
        kinetics.read(root, class_list="classes.txt")
    (root / "classes.txt").write_text("bowling\nbowling\n")
    with pytest.raises(CorpusError, match="class 'bowling' twice"):
        kinetics.read(root, class_list="classes.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bad\.csv: no column youtube_id, time_start, time_end"),
        ("label,youtube_id\nx,y\n", "no column time_start, time_end"),
        (HEADER + "bowling,AAAAAAAAAAA,0,10\n", "row 2: 4 fields instead of 5"),
        (HEADER + "bowling,AAAAAAAAAAA,zero,10,train\n", "row 2: id 'AAAAAAAAAAA', time 'zero' to '10'"),
        (HEADER + "bowling,AAAAAAAAAAA,10,10,train\n", "0 <= start < end"),
        (HEADER + "bowling,AAAAAAAAAAA,nan,10,train\n", "0 <= start < end"),
        (HEADER + "bowling,,0,10,train\n", "need an id"),
        (HEADER + "bowling,AAAAAAAAAAA,0,10,train\n", "none of the 1 listed clips is there"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        kinetics.read(make(tmp_path, {"bad.csv": text}))


def test_no_list(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"train\.csv: no such list"):
        kinetics.read(tmp_path, lists="train.csv")


def test_kinetics_sound_names(test_data: Path) -> None:
    names = (test_data / "data" / "split_lists" / "kinetics_label_map_k400.txt").read_text().splitlines()
    assert set(kinetics_sound.CLASSES) <= set(names)


def test_kinetics_sound_rows(tmp_path: Path) -> None:
    assert len(set(kinetics_sound.CLASSES)) == 32
    assert tuple(sorted(kinetics_sound.CLASSES)) == kinetics_sound.CLASSES
    rows = "abseiling,AAAAAAAAAAA,0,10,train\ntickling,BBBBBBBBBBB,0,10,train\nbowling,CCCCCCCCCCC,0,10,train\n"
    root = make(tmp_path, {"train.csv": HEADER + rows}, "AAAAAAAAAAA.mp4", "BBBBBBBBBBB.mp4")
    corpus = kinetics_sound.read(root)
    assert [(s.key[:11], s.label) for s in corpus.sources] == [("BBBBBBBBBBB", 31)]
    assert len(corpus.missing) == 1  # CCCCCCCCCCC; AAAAAAAAAAA is none of ours
    (root / "train.csv").write_text(HEADER + "abseiling,AAAAAAAAAAA,0,10,train\n")
    with pytest.raises(CorpusError, match="no row of a Kinetics-Sound class"):
        kinetics_sound.read(root)


def test_select() -> None:
    sources = tuple(Source(key=str(label), path="", label=label) for label in (0, 1, 2, -1))
    corpus = Corpus(sources=sources, classes=("Tap_Dancing", "abseiling", "bowling"), missing=(("x", "y"),))
    kept = kinetics_sound.select(corpus)
    assert [(s.key, kept.classes[s.label]) for s in kept.sources] == [("0", "tap dancing"), ("2", "bowling")]
    assert kept.missing == corpus.missing
    with pytest.raises(CorpusError, match=r"no clip of the classes running; the corpus has Tap_Dancing"):
        kinetics_sound.select(corpus, ["running"])
