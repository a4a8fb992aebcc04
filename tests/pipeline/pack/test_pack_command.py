"""``clipmill pack`` and ``clipmill verify`` as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipmill.datasets.source import CorpusError
from clipmill.tools import pack as command
from clipmill.tools import verify

SMALL = {"frames": 8, "options": {"preset": "ultrafast", "crf": "10"}}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "clipmill.tools.cli", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def corpus(kit):
    """Two classes of one film each."""
    for name in ("cat", "dog"):
        (kit.folder / "corpus" / name).mkdir(parents=True)
        kit.film(f"corpus/{name}/one.mp4", size=(64, 64 if name == "cat" else 48), **SMALL)
    return kit.folder / "corpus"


def test_pack_then_verify(corpus, kit):
    out = kit.folder / "packed"
    done = run("pack", corpus, out)
    assert done.returncode == 0, done.stderr
    assert "2 ok, 0 salvaged, 0 rejected" in done.stdout
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["classes"] == ["cat", "dog"]
    again = run("pack", corpus, out, "--json")
    assert json.loads(again.stdout)["already"]
    checked = run("verify", out, "--decode")
    assert (checked.returncode, checked.stdout.strip()) == (0, f"{out}: no problem found")
    shard = out / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    broken = run("verify", out, "--json")
    assert broken.returncode == 1
    assert {row["where"] for row in json.loads(broken.stdout)["problems"]} == {"shard-00000.tar"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--short-side", "33"], "short_side = 33"),
        (["--quality", "99"], "quality = 99"),
        (["--fps", "fast"], "--fps fast"),
        (["--fps", "0"], "fps = 0"),
        (["--reader", "kinetix"], "--reader kinetix"),
        (["--reader", "folder", "--lists", "a.csv"], "--lists is not an option of the reader folder"),
        (["--workers", "-1"], "--workers"),
        (["--timeout-s", "0"], "timeout_s"),
    ],
)
def test_options_out_of_range_are_one_clear_error(corpus, kit, arguments, message):
    done = run("pack", corpus, kit.folder / "packed", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (kit.folder / "packed").exists()


def test_folders_without_media_are_one_clear_error(kit):
    (kit.folder / "empty").mkdir()
    (kit.folder / "text").mkdir()
    (kit.folder / "text" / "a.mp4").write_text("no video")
    for name, message in (("none", "no such folder"), ("empty", "no videos"), ("text", "1 not_media")):
        done = run("pack", kit.folder / name, kit.folder / "packed")
        assert done.returncode == 2
        assert message in done.stderr
        assert not (kit.folder / "packed").exists()
    assert run("verify", kit.folder / "packed").returncode == 2


def test_the_reader_is_found_from_the_lists(tmp_path):
    for name, file, text in (
        ("kinetics", "train.csv", "label,youtube_id,time_start,time_end,split\n"),
        ("audioset", "eval_segments.csv", "# Segments\n"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1 A\n"),
        ("hmdb51", "splits/jump_test_split1.txt", "a.avi 1\n"),
    ):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
        assert command.guess_reader(tmp_path / name) == name
    (tmp_path / "p").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "p" / "a.png")
    assert command.guess_reader(tmp_path / "p") == "images"
    (tmp_path / "p" / "a.mp4").touch()
    (tmp_path / "p" / "b.mp4").touch()
    assert command.guess_reader(tmp_path / "p") == "folder"


def test_reader_options_arrive(kit):
    for name in ("v_a_g01_c01", "v_b_g01_c01"):
        (kit.folder / "videos").mkdir(exist_ok=True)
        kit.film(f"videos/{name}.mp4", **SMALL)
    (kit.folder / "list.txt").write_text("v_a_g01_c01.mp4 3\nv_b_g01_c01.mp4 1\nv_c_g01_c01.mp4 1\n")
    args = command.Args(
        source=kit.folder, out=Path("unused"), reader="listfile", lists="list.txt", videos="videos", split="val"
    )
    corpus = command.read_corpus(args)
    assert [(source.label, source.split) for source in corpus.sources] == [(3, "val"), (1, "val")]
    assert len(corpus.missing) == 1
    with pytest.raises(ValueError, match="--split one"):
        command.read_corpus(command.Args(source=kit.folder, out=Path("unused"), reader="ucf101", split="one"))
    with pytest.raises(CorpusError, match="no such folder"):
        command.read_corpus(command.Args(source=kit.folder / "none", out=Path("unused")))


def test_readers_are_found_without_a_list_of_them():
    assert {"folder", "images", "kinetics", "audioset", "ucf101", "hmdb51", "listfile"} <= set(command.readers())
    assert not {"files", "source", "synthetic"} & set(command.readers())


def test_help_does_not_import_what_it_does_not_need():
    code = (
        "import sys, clipmill.tools.pack, clipmill.tools.verify; print({'torch', 'av', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_verify_main_in_this_process(corpus, kit, capsys):
    assert command.main(command.Args(source=corpus, out=kit.folder / "packed", workers=1, json=True)) == 0
    assert verify.main(verify.Args(dataset=kit.folder / "packed", workers=1)) == 0
    assert "no problem found" in capsys.readouterr().out
