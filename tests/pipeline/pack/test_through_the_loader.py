"""What was packed, as the loader hands it out."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.spec import VideoSpec, WholeFrame
from clipmill.pipeline.views import Clips, View


def test_the_loader_reads_videos_and_pictures_alike(kit):
    paths = [kit.film(f"{n}.mp4", frames=10 + n, sound=kit.clicks(0.4, [0.1], 16000)) for n in range(8)]
    paths.append(kit.folder / "picture.png")
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(paths[-1])
    paths.append(kit.film("sound.wav", frames=0, sound=kit.clicks(1.0, [0.5], 16000)))
    corpus = Corpus(sources=tuple(Source(key=path.stem, path=str(path)) for path in paths))
    pack(corpus, kit.folder / "packed", PackSettings(shard_clips=4), workers=2)
    index = ShardIndex.open(kit.folder / "packed")
    spec = VideoSpec(size=16, crop=WholeFrame(), ops=())
    planner = Clips(views=(View(name="clip", num_frames=2, stride=1, augment=spec),))
    with Loader(index, planner, batch_size=3, shuffle=False, config=LoaderConfig(threads=1, processes=0)) as loader:
        batches = list(loader.epoch(0))
        assert loader.damaged == {}
    assert loader.skipped == 1  # the record without a picture
    starts = torch.cat([(batch.start_s["clip"] * 25).round() for batch in batches]).numpy()
    grey = np.concatenate([batch.video["clip"][:, :, 0].mean((1, 2, 3)).numpy() for batch in batches])
    assert grey[:8] == pytest.approx(2 * starts[:8] / 219, abs=0.006)
    assert grey[8] == pytest.approx(90 / 255, abs=0.01)
