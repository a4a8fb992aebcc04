"""The benchmark: fair requests, turns of contestants, who gives the right frames, goals and documents."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipmill.tools import cli
from clipmill.tools.bench import contest as contests
from clipmill.tools.bench import goals, results
from clipmill.tools.bench.contest import Entry, Truth, contest
from clipmill.tools.bench.corpus import make_footage, unpacked
from clipmill.tools.bench.million import order_of
from clipmill.tools.bench.patterns import PATTERNS, requests


@pytest.mark.parametrize("name", PATTERNS)
def test_requests_are_inside_their_videos_and_visit_the_same_ones_every_round(name):
    pattern, frames = PATTERNS[name], [90, 200, 120]
    rounds = requests(pattern, frames, fps=25.0, rounds=3, count=12)
    assert [[file for file, _, _ in one] for one in rounds] == [[file for file, _, _ in rounds[0]]] * 3
    assert {file for file, _, _ in rounds[0]} == {0, 1, 2}
    for file, clips, sound in (request for one in rounds for request in one):
        assert len(clips) == pattern.clips
        for clip in clips:
            assert len(clip) == (90 if pattern.whole else pattern.frames)
            assert clip == sorted(set(clip))
            assert 0 <= clip[0] <= clip[-1] < frames[file]
            if not (pattern.segments or pattern.whole):
                assert set(np.diff(clip)) <= {pattern.stride}
        assert (sound is not None) == (pattern.sound_s > 0)
        if sound:
            assert sound[0] == clips[0][0] / 25.0
            assert sound[0] + sound[1] <= frames[file] / 25.0


def test_videos_that_are_too_short_are_an_error():
    with pytest.raises(ValueError, match="no video has the 61 frames that the pattern '16 frames, stride 4' needs"):
        requests(PATTERNS["stride4"], [60], 25.0, 1, 4)


def test_contestants_take_turns_and_a_broken_one_says_why(dataset, tmp_path: Path):
    files, _ = unpacked(dataset, tmp_path / "files")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho it does not work >&2\nexit 3\n")
    broken.chmod(0o755)
    said = []
    entries = [
        Entry(label="clipmill", name="clipmill", role="ours", order={"root": str(dataset.root)}),
        Entry(label="floor", name="decode floor", role="floor", order={"root": str(dataset.root)}),
        Entry(label="PyAV", name="PyAV seek"),
        Entry(label="broken", name="PyAV seek", python=str(broken)),
    ]
    counts = [record.num_frames for record in dataset]
    wanted = requests(PATTERNS["clip"], counts, 25.0, rounds=3, count=32)
    order = {"files": files, "sounds": [], "out": "uint8", "cores": None}
    found = contest(entries, order, wanted, seconds=0.01, unit=4, say=said.append)
    assert [line for line in said if line.startswith("round")] == [
        f"round {number} of 2: {label}" for number in (1, 2) for label in ("clipmill", "floor", "PyAV")
    ]
    ours, floor, pyav, missing = found
    assert missing.missing == "it does not work"
    assert missing.clips_s == []
    for one in (ours, floor, pyav):
        assert one.missing == ""
        assert len(one.clips_s) == len(one.cpu_clips_s) == 2
        assert min(one.clips_s + one.cpu_clips_s) > 0
        assert one.versions["av"] == __import__("av").__version__
    assert ours.facts["decoded_per_used"] >= 1


def test_a_peer_that_gives_the_frames_asked_for_is_told_so(tmp_path: Path):
    folder = make_footage(tmp_path, 1, seconds=2, size=(48, 64))
    files = [str(path) for path in folder.iterdir()]
    wanted = requests(PATTERNS["stride2"], [56], 28.0, rounds=1, count=8)
    order = {"files": files, "sounds": [], "out": "uint8", "cores": None}
    (found,) = contest([Entry(label="PyAV", name="PyAV seek")], order, wanted, seconds=0.01, truth=Truth(files))
    assert (found.missing, found.right_frames) == ("", 1.0)


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 0.0), (-2, 0.0)])
def test_frames_beside_those_asked_for_are_noticed_whatever_their_colours(shift, expected):
    known = np.random.default_rng(0).normal(120, 1, (40, 64)).cumsum(0) * 0.02

    class Shown:
        def ask(self, message):
            frames = [range(10, 26), range(3, 19)][: message["show"]]
            return {"fingerprints": [(known[np.array(one) + shift] * 1.1 + 9).tolist() for one in frames]}

    asked = [(0, [list(range(10, 26))], None), (0, [list(range(3, 19))], None)]
    process: contests.Process = Shown()  # type: ignore[assignment]
    assert contests._right_frames(process, asked, lambda _, frame: known[frame].tolist()) == expected


# --- goals and documents ------------------------------------------------------------------------------------


def result(label, role, speeds, cpu=None):
    one = contests.Result(label, role, clips_s=list(speeds), cpu_clips_s=list(cpu or speeds), first_s=[0.1])
    return one.to_json()


def table(track, entries, pattern="16 frames, stride 1", facts=None):
    return {"track": track, "data": "d", "pattern": pattern, "results": entries, "facts": facts or {}}


SAME_BITS = [
    result("clipmill", "ours", [10, 11, 12], [100, 110, 120]),
    result("decode floor", "floor", [10, 11, 12], [100, 100, 100]),
    result("copy floor", "floor", [10, 11, 12], [1000, 1100, 1000]),
    result("slow", "peer", [1, 1, 1], [10, 10, 10]),
    result("fast", "peer", [1, 1, 1], [50, 50, 50]),
    result("torchcodec kept open", "peer", [1, 1, 1], [90, 90, 90]),
    result("absent", "peer", []) | {"missing": "not installed"},
]


def test_goals_take_the_best_peer_that_a_corpus_allows():
    tables = [table("same bits", SAME_BITS), table("index", [], "", {"open_s": 0.7, "records": 1_000_000})]
    told = {one["what"]: one for one in goals.judged(tables)}
    assert told["same bits, best peer"]["measured"] == pytest.approx(2.2)
    assert told["same bits, best peer"]["met"] is True
    assert told["same bits, libavcodec floor"]["measured"] == pytest.approx(1.1)
    assert told["same bits, libavcodec and copy floor, in turn"]["measured"] == pytest.approx(1.2)
    assert told["1,000,000 records: open"]["met"] is False
    assert told["raw files, best peer on them against clipmill on its shard"]["met"] is None


def test_results_grow_track_by_track_and_are_written_whole(tmp_path: Path):
    first = results.merged(None, [table("same bits", SAME_BITS)], machine="m", load="1")
    both = results.merged(first, [table("soak", [], facts={"slope_mb_per_10000_clips": 0.2})], machine="m", load="2")
    again = results.merged(both, [table("same bits", SAME_BITS[:2])], machine="m", load="3")
    assert [one["track"] for one in again["tables"]] == ["same bits", "soak"]
    assert len(again["tables"][0]["results"]) == 2
    results.write(tmp_path, both)
    assert json.loads((tmp_path / "bench.json").read_text()) == both
    text = (tmp_path / "RESULTS.md").read_text()
    for document in (text, results.text(both), (tmp_path / "bench.html").read_text()):
        assert "not installed" in document
        assert "slope mb per 10000 clips" in document
    row = next(line for line in text.splitlines() if line.startswith("| fast |"))
    assert [cell.strip() for cell in row.split("|")][2:7] == ["1", "1 - 1", "50", "11", "2.2"]
    assert "| growth over 10,000 clips | <= 1 MB | 0.2 | yes |" in text


def test_the_command_measures_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_footage(tmp_path / "videos", 1, seconds=1, size=(48, 64))
    options = ["--data", tmp_path / "videos", "--short-side", 32, "--clips", 64, "--records", 600, "--device", "cpu"]
    tracks = ["--track", "soak", "augment", "index", "--out", tmp_path / "out", "--json"]
    assert cli.main(["bench", *map(str, [*options, *tracks])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "bench.json").read_text())
    facts = {one["track"]: one["facts"] for one in found["tables"]}
    assert facts["soak"]["clips"] == 64
    assert facts["soak"]["damaged"] == 0
    assert facts["augment"]["crop_flip_gb_s"] > 0
    assert facts["index"]["records"] == 600
    assert facts["index"]["seen_once"]
    assert 0 < facts["index"]["open_s"] < facts["index"]["first_batch_s"]


@pytest.mark.slow
def test_memory_stays_flat_over_fifty_thousand_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_footage(tmp_path / "videos", 1, seconds=1, size=(48, 64))
    options = ["--data", tmp_path / "videos", "--short-side", 32, "--track", "soak", "--json"]
    assert cli.main(["bench", *map(str, options)]) == 0
    facts = json.loads(capsys.readouterr().out)["tables"][0]["facts"]
    assert facts["clips"] == 50_000
    assert abs(facts["slope_mb_per_10000_clips"]) < 1
    assert facts["last_mb"] - facts["first_mb"] < 8


@pytest.mark.parametrize(("records", "world", "batch"), [(10_007, 16, 3), (4096, 64, 8)])
def test_an_epoch_on_many_ranks_is_complete_and_even(records: int, world: int, batch: int):
    facts = order_of(records, world, batch)
    assert facts["seen_once"]
    assert facts["share_min"] == facts["share_max"] == records // (world * batch) * batch
    assert facts["left_over"] == records % (world * batch)


def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "--data", str(tmp_path), "--track", "raw"]) == 2
    assert "no video files there" in capsys.readouterr().err
    assert cli.main(["bench", "--rounds", "0"]) == 2
    assert "must be more than 0" in capsys.readouterr().err


def test_an_unknown_peer_lists_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "--peer", "vhs"]) == 2
    assert "no peer 'vhs'; choose from torchcodec, " in capsys.readouterr().err


def test_peers_need_nothing_of_ours():
    """Peers run in interpreters that do not have clipmill."""
    source = Path(contests.__file__).with_name("peer.py").read_text()
    assert "import clipmill" not in source
    assert "from clipmill" not in source
