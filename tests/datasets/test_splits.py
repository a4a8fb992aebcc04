"""UCF101 and HMDB51: layouts made here, and the official lists where they are at hand."""

import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from clipmill.datasets import hmdb51, ucf101
from clipmill.datasets.source import CorpusError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(folder: Path, **lists: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    write(
        tmp_path / "ucfTrainTestlist",
        classInd="1 Archery\r\n2 HandstandPushups\r\n",
        trainlist01="Archery/v_Archery_g02_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g02_c01.avi 2\r\n",
        testlist01="HandstandPushups/v_HandStandPushups_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n",
        trainlist02="HandstandPushups/v_HandStandPushups_g01_c01.avi 2\r\n",
        testlist02="HandstandPushups/v_HandStandPushups_g02_c01.avi\r\n",
    )
    touch(
        tmp_path / "UCF-101",
        "Archery/v_Archery_g02_c01.avi",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "handstandpushups/v_HandstandPushups_g02_c01.mp4",
    )
    return tmp_path


def test_ucf101(ucf: Path) -> None:
    corpus = ucf101.read(ucf)
    assert corpus.classes == ("Archery", "HandstandPushups")
    found = [(source.key, source.label, source.split, source.extra["splits"]) for source in corpus.sources]
    assert found == [
        ("Archery/v_Archery_g02_c01", 0, "train", {"1": "train"}),
        ("HandstandPushups/v_HandStandPushups_g01_c01", 1, "test", {"1": "test", "2": "train"}),
        ("HandstandPushups/v_HandStandPushups_g02_c01", 1, "train", {"1": "train", "2": "test"}),
    ]
    assert Path(corpus.sources[2].path).name == "v_HandstandPushups_g02_c01.mp4"
    (missing,) = corpus.missing
    assert missing[0].endswith("testlist01.txt row 2")
    assert "Archery/v_Archery_g01_c01" in missing[1]
    assert [source.split for source in ucf101.read(ucf, split=2).sources] == ["unused", "train", "test"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classInd", "1 Archery\n3 HandstandPushups\n", r"classInd\.txt row 2: .* is not `2 <class>`"),
        ("trainlist01", "Archery/v_Archery_g02_c01.avi 2\n", r"row 1: label '2', but classInd\.txt says 1"),
        ("trainlist01", "v_Archery_g02_c01.avi 1\n", "is not `Class/file.avi`"),
        ("testlist01", "Archry/v_Archery_g02_c01.avi\n", "unknown class 'Archry'; did you mean 'Archery'"),
        ("testlist01", "Archery/v_Archery_g02_c01.avi\n", "is train and test of split 1"),
    ],
)
def test_bad_ucf101_lists(ucf: Path, name: str, text: str, message: str) -> None:
    write(ucf / "ucfTrainTestlist", **{name: text})
    with pytest.raises(CorpusError, match=message):
        ucf101.read(ucf)


def test_absent_ucf101_parts(ucf: Path) -> None:
    with pytest.raises(CorpusError, match=r"no trainlist03\.txt"):
        ucf101.read(ucf, split=3)
    with pytest.raises(CorpusError, match="none of the 4 listed clips is there"):
        ucf101.read(ucf, videos="ucfTrainTestlist")
    (ucf / "ucfTrainTestlist" / "classInd.txt").unlink()
    with pytest.raises(CorpusError, match=r"classInd\.txt: No such file"):
        ucf101.read(ucf)


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    write(
        tmp_path / "testTrainMulti_7030_splits",
        brush_hair_test_split1="#1_(odd)&;!_brush_hair_u.avi 1 \nb_brush_hair_u.avi 2 \nc_brush_hair_u.avi 0 \n",
        brush_hair_test_split2="b_brush_hair_u.avi 1 \nc_brush_hair_u.avi 1 \n",
        wave_test_split1="two words_wave_u.avi 1\na.b_wave_u.avi 2\n",
    )
    touch(
        tmp_path / "hmdb51",
        "brush_hair/#1_(odd)&;!_brush_hair_u.avi",
        "brush_hair/b_brush_hair_u.avi",
        "brush_hair/c_brush_hair_u.avi",
        "wave/two words_wave_u.avi",
    )
    return tmp_path


def test_hmdb51(hmdb: Path) -> None:
    corpus = hmdb51.read(hmdb)
    assert corpus.classes == ("brush_hair", "wave")
    assert [(source.key, source.label, source.split) for source in corpus.sources] == [
        ("brush_hair/#1_(odd)&;!_brush_hair_u", 0, "train"),
        ("brush_hair/b_brush_hair_u", 0, "test"),
        ("brush_hair/c_brush_hair_u", 0, "unused"),
        ("wave/two words_wave_u", 1, "train"),
    ]
    assert corpus.sources[1].extra["splits"] == {"1": "test", "2": "train"}
    assert ["wave/a.b_wave_u" in reason for _, reason in corpus.missing] == [True]
    assert [source.split for source in hmdb51.read(hmdb, split=2).sources] == ["unused", "train", "train", "unused"]
    with pytest.raises(CorpusError, match="no lists of split 3"):
        hmdb51.read(hmdb, split=3)
    write(hmdb / "testTrainMulti_7030_splits", wave_test_split1="a_wave.avi 3\n")
    with pytest.raises(CorpusError, match=r"wave_test_split1\.txt row 1: .* is not `<file>\.avi 0\|1\|2`"):
        hmdb51.read(hmdb)


def test_hmdb51_lists_of_all_classes(hmdb: Path) -> None:
    lists = {"hmdb_train_split_1": "x/b_brush_hair_u 0 0\n", "testlist01": "two words_wave_u 2\n", "notes": "no list\n"}
    write(hmdb / "flat", **lists)
    with pytest.raises(CorpusError, match=r"testlist01\.txt row 1: .* is not `<clip> \[<frames>\] <label>`"):
        hmdb51.parse_flat(hmdb / "flat")
    write(hmdb / "flat", testlist01="c_brush_hair_u 1\n", trainlist02="c_brush_hair_u 1\ngone 1\n")
    corpus = hmdb51.read(hmdb, lists="flat")
    found = [(source.key, source.label, source.split) for source in corpus.sources]
    assert found == [("brush_hair/b_brush_hair_u", 0, "train"), ("brush_hair/c_brush_hair_u", 0, "test")]
    assert corpus.classes == ("brush_hair",)
    assert len(corpus.missing) == 1
    (hmdb / "classes.txt").write_text("applaud\nbrush_hair\n")
    assert {s.label for s in hmdb51.read(hmdb, lists="flat", class_list="classes.txt").sources} == {1}
    touch(hmdb / "hmdb51", "wave/gone.avi")
    with pytest.raises(CorpusError, match=r"wave/gone\.avi: listed in class 0 like files of brush_hair"):
        hmdb51.read(hmdb, lists="flat")


def unpack(test_data: Path, name: str, folder: Path) -> Path:
    with tarfile.open(test_data / "data" / "split_lists" / name) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def test_official_ucf101_lists(test_data: Path, tmp_path: Path) -> None:
    clips, classes = ucf101.parse(unpack(test_data, "ucfTrainTestlist.tar.gz", tmp_path))
    names = (test_data / "data" / "split_lists" / "ucf101_label_map.txt").read_text().split()
    assert list(classes) == names
    assert len(clips) == 13320
    counts = Counter((split, part) for clip in clips for split, part in clip.splits.items())
    assert counts == {
        (1, "train"): 9537,
        (1, "test"): 3783,
        (2, "train"): 9586,
        (2, "test"): 3734,
        (3, "train"): 9624,
        (3, "test"): 3696,
    }
    for split in (1, 2, 3):  # a group is cut from one video and must not be on both sides
        groups: dict[str, set[str]] = {}
        for clip in clips:
            groups.setdefault(re.sub(r"_c\d+$", "", clip.name), set()).add(clip.splits[split])
        assert all(len(parts) == 1 for parts in groups.values())


def test_official_ucf101_files(test_data: Path, tmp_path: Path) -> None:
    folder = unpack(test_data, "ucfTrainTestlist.tar.gz", tmp_path)
    clips, classes = ucf101.parse(folder)
    touch(tmp_path / "UCF-101", *(f"{clip.name}.avi" for clip in clips[::7]))
    corpus = ucf101.read(tmp_path)
    assert len(corpus.sources) == len(clips[::7])
    assert len(corpus.missing) == len(clips) - len(clips[::7])
    assert all(classes[source.label].lower() == source.key.split("_")[1].lower() for source in corpus.sources)


def test_official_hmdb51_lists(test_data: Path, tmp_path: Path) -> None:
    folder = unpack(test_data, "hmdb51_lists.tar.gz", tmp_path)
    clips = hmdb51.parse_flat(folder)
    counts = Counter((split, part) for clip in clips for split, part in clip.splits.items())
    assert counts == {(split, part): size for split in (1, 2, 3) for part, size in (("train", 3570), ("test", 1530))}
    names = (test_data / "data" / "split_lists" / "hmdb51_label_map.txt").read_text().split()
    assert names == sorted(names)
    of_label = sorted(names, key=lambda name: f"{name}_f")  # these lists count in the order of the clips' names
    assert all(f"_{of_label[clip.label]}_" in clip.name for clip in clips)
    some = clips[::20]
    touch(tmp_path / "hmdb51", *(f"{of_label[clip.label]}/{clip.name}.avi" for clip in some))
    corpus = hmdb51.read(tmp_path, lists=str(folder.relative_to(tmp_path)))
    assert list(corpus.classes) == names
    assert {source.key for source in corpus.sources} == {f"{of_label[clip.label]}/{clip.name}" for clip in some}
    assert all(Path(source.path).parent.name == names[source.label] for source in corpus.sources)
