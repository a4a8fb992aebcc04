"""Readers of sound corpora: ESC-50, DCASE 2013 scenes, and a folder in folds."""

from pathlib import Path

import pytest

from clipmill.datasets import dcase, esc50, folds
from clipmill.datasets.source import CorpusError

HEADER = "filename,fold,target,category,esc10,src_file,take"


def write(root: Path, rows, prefix="", skip=()):
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    lines = [HEADER]
    for fold, source, target, name in rows:
        file = f"{fold}-{source}-A-{target}.wav"
        lines.append(f"{file},{fold},{target},{name},{target == 0},{source},A")
        if file not in skip:
            (root / "audio" / (prefix + file)).touch()
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")


ROWS = [(1, 100, 0, "dog"), (1, 101, 1, "rooster"), (2, 102, 0, "dog"), (2, 103, 1, "rooster"), (3, 104, 3, "cow")]


@pytest.mark.parametrize("prefix", ["", "dog-"])
def test_esc50_follows_its_list(tmp_path, prefix):
    write(tmp_path, ROWS, prefix, skip=("2-103-A-1.wav",))
    corpus = esc50.read(tmp_path)
    assert corpus.classes == ("dog", "rooster", "2", "cow")
    assert [(s.key, s.label, s.split) for s in corpus.sources] == [
        ("1-100-A-0", 0, "fold1"),
        ("1-101-A-1", 1, "fold1"),
        ("2-102-A-0", 0, "fold2"),
        ("3-104-A-3", 3, "fold3"),
    ]
    assert all(Path(s.path).is_file() for s in corpus.sources)
    assert len(corpus.missing) == 1
    assert "2-103-A-1.wav" in corpus.missing[0][1]
    assert [s.extra["esc10"] for s in corpus.sources] == [True, False, True, False]
    for source in corpus.sources:  # the name says the same as the list
        assert esc50.parse_name(f"{source.key}.wav") == (int(source.split[-1]), source.label)
    assert dict.fromkeys(s.extra["src_file"] for s in corpus.sources).keys() == {"100", "101", "102", "104"}


def test_esc50_errors(tmp_path):
    write(tmp_path / "a", [*ROWS, (3, 100, 0, "dog")])
    with pytest.raises(CorpusError, match="recording 100 is in folds 1 and 3"):
        esc50.read(tmp_path / "a")
    write(tmp_path / "b", [*ROWS, (3, 105, 0, "cat")])
    with pytest.raises(CorpusError, match="target 0 is 'cat' here"):
        esc50.read(tmp_path / "b")
    write(tmp_path / "c", ROWS)
    (tmp_path / "c" / "meta" / "esc50.csv").write_text("name,fold\nx,1\n")
    with pytest.raises(CorpusError, match="no column filename"):
        esc50.read(tmp_path / "c")
    with pytest.raises(CorpusError, match="not <fold>"):
        esc50.parse_name("barking.wav")


def test_dcase_takes_the_scene_from_the_name(tmp_path):
    for folder, numbers in (("scenes_stereo/scenes_stereo", "01 02"), ("scenes_stereo_testset/x", "01 03")):
        for scene in ("tube", "bus"):
            for number in numbers.split():
                path = tmp_path / folder / f"{scene}{number}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    corpus = dcase.read(tmp_path)
    assert corpus.classes == ("bus", "tube")
    assert len(corpus.sources) == 8
    for source in corpus.sources:
        assert corpus.classes[source.label] == Path(source.path).stem[:-2]
        assert source.split == ("test" if "testset" in source.path else "train")
    (tmp_path / "scenes_stereo" / "notes.wav").touch()
    with pytest.raises(CorpusError, match="not <scene><two digits>"):
        dcase.read(tmp_path)
    (tmp_path / "scenes_stereo" / "notes.wav").rename(tmp_path / "scenes_stereo" / "park01.wav")
    with pytest.raises(CorpusError, match="3 scenes to train on and 2 to test"):
        dcase.read(tmp_path)


def test_a_folder_in_folds(tmp_path):
    for fold in ("f0", "f1"):
        for name in ("zebra", "ant"):
            (tmp_path / fold / name / "deep").mkdir(parents=True)
            (tmp_path / fold / name / "a.wav").touch()
            (tmp_path / fold / name / "deep" / "b.mp3").touch()
    corpus = folds.read(tmp_path)
    assert corpus.classes == ("ant", "zebra")
    assert len(corpus.sources) == 8
    assert {(s.split, s.label) for s in corpus.sources} == {("f0", 0), ("f0", 1), ("f1", 0), ("f1", 1)}
    (tmp_path / "f0" / "loose.wav").touch()
    with pytest.raises(CorpusError, match="not in <fold>/<class>/"):
        folds.read(tmp_path)
    (tmp_path / "f0" / "loose.wav").unlink()
    (tmp_path / "f1").rename(tmp_path / ".f1")
    with pytest.raises(CorpusError, match="1 folds"):
        folds.read(tmp_path)
