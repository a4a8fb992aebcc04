"""The choice of a backend by codec, by name, and what is said when one is not there."""

from __future__ import annotations

import sys

import pytest
import torch

from clipmill.pipeline.decode import auto
from clipmill.pipeline.decode.decoder import UnsupportedCodecError, backends, new_decoder
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.shard import ShardReader
from clipmill.pipeline.spec import VideoSpec, WholeFrame
from clipmill.pipeline.views import Clips, View


def test_the_preferred_backends(stream_of):
    assert auto.preferred(stream_of("raw")[0]) == ("raw",)
    for name in ("h264_open", "hevc", "mjpeg"):
        assert auto.preferred(stream_of(name)[0]) == ("libav", "pyav")
    assert {"raw", "libav", "pyav"} <= set(backends())


def test_what_does_not_work_here_is_passed_over(stream_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "clipmill.pipeline.decode.libav", None)
    decoder = auto.AutoDecoder(ShardReader())
    for name in ("mjpeg", "h264", "raw"):
        seen: list[int] = []
        decoder.decode(stream_of(name)[0], [1, 4], lambda number, planes, seen=seen: seen.append(number))
        assert seen == [1, 4]
    working = {name for name, one in decoder._decoders.items() if one is not None}
    assert working == {"pyav", "raw"}
    assert decoder.decoded >= 6
    assert decoder.read_s > 0


def test_a_backend_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    for package, name in (("decord", "decord"), ("torchcodec", "torchcodec"), ("nvidia.dali", "dali")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.decoders", None)
        with pytest.raises(ValueError, match=f"decoder '{name}' does not work here") as caught:
            new_decoder(name, ShardReader())
        assert f"pip install 'clipmill[{name}]'" in str(caught.value)
        assert "clipmill doctor" in str(caught.value)


def test_a_name_that_does_not_exist_lists_those_that_do():
    for name in ("vhs", "decoder", "../pyav", "rgb"):
        with pytest.raises(ValueError, match="choose from auto, dali, decord") as caught:
            new_decoder(name, ShardReader())
        assert str(caught.value).startswith(f"no decoder {name!r}")


def batches(index, decoder: str) -> torch.Tensor:
    view = View(name="video", num_frames=4, stride=2, augment=VideoSpec(size=32, crop=WholeFrame()))
    config = LoaderConfig(threads=2, processes=0, decoder=decoder)
    with Loader(index, Clips(views=(view,)), batch_size=2, config=config) as loader:
        return torch.cat([batch.video["video"] for batch in loader.epoch()])


@pytest.mark.parametrize("name", ["h264", "h264_open", "raw", "mjpeg"])
def test_a_loader_gives_the_same_batches_whatever_the_backend(name: str, stream_of):
    index = stream_of(name)
    auto_batches = batches(index, "auto")
    assert torch.equal(auto_batches, batches(index, "raw" if name == "raw" else "pyav"))
    try:
        new_decoder("torchcodec", ShardReader())
    except ValueError:
        return
    if name != "raw":
        assert (auto_batches - batches(index, "torchcodec")).abs().max().item() < 6 / 255 / 0.22


def test_the_wrong_choice_is_told_by_the_loader_and_not_counted_as_damage(stream_of):
    with pytest.raises(UnsupportedCodecError, match="choose decoder 'auto'"):
        batches(stream_of("h264"), "raw")
    with pytest.raises(ValueError, match="no decoder 'vhs'"):
        batches(stream_of("h264"), "vhs")
