from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipmill.models.encoder import build_encoder, save_encoder
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import AudioSpec, LogMel
from clipmill.pipeline.views import View
from clipmill.tools.evaluate.opening import encoder_digest, open_encoder, stored_audio_view, untrained
from clipmill.tools.evaluate.splits import Splits, class_names, smallest_hashes, split


def test_an_untrained_encoder_is_the_same_every_time() -> None:
    state = torch.get_rng_state()
    first = open_encoder("random:resnet18:width=0.125")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert encoder_digest(open_encoder("random:resnet18:width=0.125")) == encoder_digest(first)
    assert encoder_digest(open_encoder("random:resnet18:width=0.125,seed=1")) != encoder_digest(first)
    assert first.recipe == {"name": "resnet18", "options": {"width": 0.125}}


def test_a_folder_and_the_same_encoder_before_training(tmp_path: Path) -> None:
    trained = build_encoder("resnet18", width=0.125)
    trained.spec = type(trained.spec)(num_frames=5, size=24, stride=3)
    save_encoder(trained, tmp_path)
    found = open_encoder(str(tmp_path))
    assert encoder_digest(found) == encoder_digest(trained)
    fresh = open_encoder(f"random:{tmp_path}")
    assert fresh.spec == trained.spec
    assert encoder_digest(fresh) != encoder_digest(trained)
    assert encoder_digest(fresh) == encoder_digest(open_encoder(f"random:{tmp_path}:seed=0"))
    assert encoder_digest(fresh) == encoder_digest(untrained(trained))


def test_the_sound_of_the_run_is_remembered(tmp_path: Path) -> None:
    encoder = build_encoder("audio_resnet18", width=0.125)
    view = View(name="a", modality="audio", duration_s=0.5, augment=AudioSpec(logmel=LogMel(mels=32)))
    assert stored_audio_view(encoder) is None
    encoder.audio_view = view
    save_encoder(encoder, tmp_path)
    for text in (str(tmp_path), f"random:{tmp_path}"):
        stored = stored_audio_view(open_encoder(text))
        assert stored is not None
        assert (stored.duration_s, stored.augment) == (0.5, view.augment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random:resnet81", "unknown backbone 'resnet81'; did you mean"),
        ("random:resnet18:0.5", "expected name=value after the backbone, got '0.5'"),
        ("random:resnet18:seed=a", "seed must be an integer, got 'a'"),
        ("random:resnet18:depth=3", "no option 'depth'"),
        ("nowhere", "nowhere: no such folder"),
    ],
)
def test_words_that_name_no_encoder(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_encoder(text)


def test_a_folder_fixes_the_options(tmp_path: Path) -> None:
    save_encoder(build_encoder("resnet18", width=0.125), tmp_path)
    with pytest.raises(ValueError, match="a folder fixes the backbone's options"):
        open_encoder(f"random:{tmp_path}:width=0.5")


def test_only_built_encoders_can_be_built_anew(colour: Any) -> None:
    with pytest.raises(ValueError, match="MeanColour was not made by build_encoder"):
        untrained(colour)


def test_a_digest_sees_weights_names_and_shapes() -> None:
    layers = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)]
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert encoder_digest(layers[0]) != encoder_digest(layers[1])
    before = encoder_digest(layers[0])
    layers[0].bias.data[1] = 1e-7
    assert encoder_digest(layers[0]) != before


# --- splits -------------------------------------------------------------------------------------------------


def test_a_hashed_part_does_not_depend_on_the_order() -> None:
    uids = np.random.default_rng(0).integers(0, 1 << 63, 200).astype(np.uint64)
    mask = smallest_hashes(uids, 0.3, "test")
    assert mask.sum() == 60
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(smallest_hashes(uids[order], 0.3, "test"), mask[order])
    assert (smallest_hashes(uids, 0.6, "test") >= mask).all()
    assert (smallest_hashes(uids, 0.3, "other") != mask).any()


def test_splits_of_the_corpus_and_by_hash(bright: ShardIndex) -> None:
    train, test = split(bright.root, Splits())
    assert (len(train), len(test)) == (16, 8)
    swapped = split(bright.root, Splits(train="test", test="train"))
    assert [part.digest for part in swapped] == [test.digest, train.digest]
    train, test = split(bright.root, Splits(test_fraction=0.25))
    assert (len(train), len(test)) == (18, 6)
    assert not set(train.column("uid")) & set(test.column("uid"))


def test_class_names_reach_every_label(bright: ShardIndex, relabel: Callable[..., ShardIndex], tmp_path: Path) -> None:
    assert class_names(bright) == ["dark", "grey", "light"]
    more = relabel(bright, tmp_path / "more", [4] * 24, [""] * 24, ["a"])
    assert class_names(bright, more) == ["dark", "grey", "light", "3", "4"]
    assert class_names(more, bright) == ["a", "1", "2", "3", "4"]


def test_splits_that_cannot_be(bright: ShardIndex, relabel: Callable[..., ShardIndex], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'val'; it has \['test', 'train'\]"):
        split(bright.root, Splits(test="val"))
    with pytest.raises(ValueError, match="both 'train'"):
        split(bright.root, Splits(test="train"))
    with pytest.raises(ValueError, match=r"test_fraction must lie between 0 and 1, got 1\.5"):
        split(bright.root, Splits(test_fraction=1.5))
    with pytest.raises(ValueError, match=r"24 records are too few to score a share of 0\.001"):
        split(bright.root, Splits(test_fraction=0.001))
    plain = relabel(bright, tmp_path / "plain", [0, 1] * 12, [""] * 24)
    with pytest.raises(ValueError, match="the records have no splits; give --test-fraction"):
        split(plain.root, Splits())
    assert len(split(plain.root, Splits(test_fraction=0.5))[1]) == 12
    names = ["train"] * 20 + ["test"] * 4
    bare = relabel(bright, tmp_path / "bare", [0] * 9 + [-1, -1] + [1] * 13, names)
    with pytest.raises(ValueError, match=f"2 of 20 records have no label, the first is '{bright[9].key}'"):
        split(bare.root, Splits())


# --- few labels ---------------------------------------------------------------------------------------------


def test_few_labels_are_a_share_of_every_class_and_nested(bright: ShardIndex, tmp_path: Path) -> None:
    whole, test = split(bright.root, Splits())
    keys: list[set[str]] = []
    for share in (0.01, 0.5, 0.8):
        train, same = split(bright.root, Splits(labels=share))
        assert same.digest == test.digest
        labels, counts = np.unique(train.column("label"), return_counts=True)
        assert labels.tolist() == [0, 1, 2]
        full = np.unique(whole.column("label"), return_counts=True)[1]
        assert counts.tolist() == [max(1, round(share * int(count))) for count in full]
        keys.append(set(train.column("key")))
    assert keys[0] < keys[1] < keys[2] < set(whole.column("key"))
    names = sorted(keys[1])
    lists = tmp_path / "half.txt"
    lists.write_text(f"{names[0]}\n\n{names[1]}.JPEG\nnowhere.JPEG\n")
    listed, _ = split(bright.root, Splits(label_list=lists))
    assert sorted(listed.column("key")) == names[:2]
    lists.write_text(f"{names[0].rpartition('/')[2]}.JPEG\n")  # a file name alone, as in SimCLR's lists
    assert split(bright.root, Splits(label_list=lists))[0].column("key").tolist() == names[:1]


def test_few_labels_that_cannot_be(bright: ShardIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels = 0\.0 is not possible"):
        split(bright.root, Splits(labels=0.0))
    lists = tmp_path / "list.txt"
    lists.write_text("nothing\n")
    with pytest.raises(ValueError, match="none of its rows is a training record"):
        split(bright.root, Splits(label_list=lists))
    with pytest.raises(ValueError, match="give one of them"):
        split(bright.root, Splits(label_list=lists, labels=0.5))
    lists.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        split(bright.root, Splits(label_list=lists))
