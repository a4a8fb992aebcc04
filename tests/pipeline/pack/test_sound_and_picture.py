"""Flashes and clicks at the same instants stay together from the raw file to the batch, in every audio case."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from clipmill.datasets.source import Corpus, Source
from clipmill.pipeline.loader import Loader, LoaderConfig
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.pipeline.record import ShardIndex
from clipmill.pipeline.sound_spec import AudioSpec
from clipmill.pipeline.spec import VideoSpec, WholeFrame
from clipmill.pipeline.views import Clips, View

FLASHES = (41, 52, 66, 77, 90)  # frames of 100 at 25 frames/s; the first two seconds leave room for late sound
FPS, HZ, WINDOW_S = 25, 16000, 2.0
CODECS = (
    ("pcm8k.mkv", "pcm_s16le", 8000, 1),
    ("flac44k.mkv", "flac", 44100, 2),
    ("aac48k51.mp4", "aac", 48000, 6),
    ("aac44k.flv", "aac", 44100, 1),
    ("mp3.mp4", "libmp3lame", 44100, 2),
    ("opus.mkv", "libopus", 48000, 2),
    ("ac3.ts", "ac3", 48000, 2),
    ("float96k.mov", "pcm_f32le", 96000, 2),
)


def film(kit, name, codec="aac", hz=48000, channels=1, late_s=0.0, **facts):
    def draw(number):
        return kit.flat((235 if number in FLASHES else 16, 128, 128))

    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    wave = kit.clicks(4.0 - late_s, [frame / FPS - late_s for frame in FLASHES], hz, channels)
    sound = {"sound": wave, "sound_hz": hz, "sound_codec": codec, "sound_layout": layout, "sound_at_s": late_s}
    return kit.film(name, draw=draw, **sound, **facts)


def cases(kit):
    for name, codec, hz, channels in CODECS:
        yield film(kit, name, codec, hz, channels)
    yield film(kit, "late.mkv", "pcm_s16le", 16000, late_s=1.5)
    yield film(kit, "late.ts", late_s=1.25)
    source = film(kit, "source.mp4", options={"preset": "ultrafast", "crf": "10", "g": "25", "bf": "2"})

    def wrapped(packet):
        ticks = round(Fraction(95442) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return packet

    def gap(packet):
        lost = packet.stream.type == "audio" and 1.1 <= packet.pts * packet.time_base < 1.5
        return None if lost else packet

    yield kit.remux(source, kit.folder / "wrap.ts", wrapped, avoid_negative_ts="disabled")
    yield kit.remux(source, kit.folder / "gap.mkv", gap)


def test_flashes_and_clicks_stay_together(kit):
    paths = list(cases(kit))
    corpus = Corpus(sources=tuple(Source(key=path.name, path=str(path)) for path in paths))
    pack(corpus, kit.folder / "packed", PackSettings(), workers=1)
    index = ShardIndex.open(kit.folder / "packed")
    assert len(index) == len(paths)
    spec = VideoSpec(size=8, crop=WholeFrame(), ops=())
    views = (
        View(name="clip", num_frames=round(WINDOW_S * FPS), augment=spec),
        View(name="sound", modality="audio", duration_s=WINDOW_S, augment=AudioSpec(hz=HZ)),
    )
    loader = Loader(
        index, Clips(views=views), batch_size=4, repeat=3, drop_last=False, config=LoaderConfig(threads=1, processes=0)
    )
    errors, heard = {}, 0
    with loader:
        for batch in loader.epoch():
            light = batch.video["clip"].mean((1, 3, 4)).numpy()
            wave = batch.audio["sound"].abs().numpy()
            for row, number in enumerate(batch.index.tolist()):
                for frame in np.flatnonzero(light[row] > 0.5):
                    place = frame / FPS * HZ  # where in the window of sound the click belongs
                    low, high = round(place - HZ / FPS), round(place + HZ / FPS) + 1
                    if low < 0 or high > wave.shape[1]:
                        continue
                    near = np.arange(low, high)
                    level = np.where(wave[row, low:high] > 0.02, wave[row, low:high], 0)
                    assert level.any(), f"{index[number].key}: a flash without its click"
                    error = abs(float((near * level).sum() / level.sum()) - place)
                    errors[index[number].key] = max(errors.get(index[number].key, 0.0), error)
                    heard += 1
    print({name: round(error, 2) for name, error in sorted(errors.items())}, "samples;", heard, "clicks")
    assert len(errors) == len(paths)
    assert heard > 5 * len(paths)
    assert max(errors.values()) <= 1 + 0.5 * HZ / FPS  # one sample and half a frame: what may be promised
    assert max(errors.values()) <= 1.5  # what is kept on a constant frame rate
