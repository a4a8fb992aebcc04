"""Synthetic files: what a reader gets back is the scene, in picture, sound and time."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from clipmill.datasets.synthetic import Scene
from clipmill.datasets.synthetic_draw import draw_clip
from clipmill.datasets.synthetic_media import CONTAINERS, encode, image_bytes, label_map_bytes, voc_palette


@pytest.fixture(scope="module")
def scene() -> Scene:
    return draw_clip(0, 3, 1, 1, size=64, seconds=1.5)


def decode(payload: bytes) -> tuple[list[float], np.ndarray, np.ndarray, float]:
    """(times of the frames, frames, first channel of the sound, time of its first sample)."""
    times, frames, sound, starts = [], [], [], []
    with av.open(io.BytesIO(payload)) as container:
        for frame in container.decode(container.streams.video[0], container.streams.audio[0]):
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time)
                frames.append(frame.to_ndarray(format="rgb24"))
            else:
                assert isinstance(frame, av.AudioFrame)
                samples = frame.to_ndarray()
                samples = samples / 32768 if samples.dtype == np.int16 else samples
                channels = frame.layout.nb_channels
                sound.append(samples[0, :: 1 if frame.format.is_planar else channels])
                starts.append(frame.time)
    return times, np.stack(frames), np.concatenate(sound), starts[0]


@pytest.mark.parametrize(
    ("suffix", "audio_hz", "channels"), [(suffix, 48000, 1) for suffix in CONTAINERS] + [(".mp4", 22050, 2)]
)
def test_file_holds_the_scene(scene: Scene, suffix: str, audio_hz: int, channels: int) -> None:
    payload = encode(scene, suffix, audio_hz, channels)
    times, frames, sound, start_s = decode(payload)
    assert len(frames) == scene.num_frames
    assert times == pytest.approx([float(t / scene.fps) for t in range(scene.num_frames)], abs=6e-4)
    errors = [np.square(frames[t].astype(float) - scene.frame(t)).mean() for t in range(0, scene.num_frames, 7)]
    assert 10 * np.log10(255**2 / np.max(errors)) > 25
    assert start_s == pytest.approx(0, abs=1e-9)
    made = scene.sound(audio_hz)
    assert 0 <= len(sound) - len(made) <= 3 * 1024  # the encoder fills its last block
    overlap = min(len(sound), len(made))
    size = 1 << (2 * overlap).bit_length()
    match = np.fft.irfft(np.fft.rfft(sound[:overlap], size) * np.conj(np.fft.rfft(made[:overlap], size)))
    assert match.argmax() == 0  # to the sample
    assert encode(scene, suffix, audio_hz, channels) == payload


def test_colours_are_marked_as_they_were_made(scene: Scene) -> None:
    with av.open(io.BytesIO(encode(scene))) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_range, codec.pix_fmt) == (6, 1, "yuv420p")  # BT.601, limited


def test_label_maps_survive() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (35, 50)).astype(np.uint8)
    image = Image.open(io.BytesIO(label_map_bytes(labels)))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")), voc_palette()[labels])


def test_palette_is_that_of_pascal_voc() -> None:
    def colour(number: int) -> list[int]:
        parts = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                parts[channel] |= (number >> channel & 1) << 7 - bit
            number >>= 3
        return parts

    assert voc_palette().tolist() == [colour(number) for number in range(256)]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures(scene: Scene, suffix: str) -> None:
    frame = scene.frame(0)
    back = np.asarray(Image.open(io.BytesIO(image_bytes(frame, suffix))))
    assert np.abs(back.astype(int) - frame).mean() <= (0 if suffix == ".png" else 6)
