"""Synthetic scenes: textured objects that move over a moving textured background, with sound made from the motion.

A `Scene` is a handful of numbers; picture, masks and sound are pure functions of it and of time. What is to be
learnt from a scene is its class, *motion pattern x rhythm*, and both halves of it can be seen and heard:

* an object has four coordinates: x, y, size and angle. Each is a cosine whose phase either runs or rests; the motion
  pattern says which ones run. Each coordinate is the pitch of its own voice (low to high in that order), so a running
  one is heard as vibrato in its band;
* the rhythm drives a level between 0 and 1: how brightly the object flashes and how loud the voices are.

One frame does not tell the class. At any instant a resting phase is as uniform as a running one, the level of every
rhythm is uniform on [0, 1], and everything else (textures, shape, place, camera, pitch, loudness) is drawn from a
stream that never sees the class. Classes differ neither in left and right nor in phase, so that flips, crops and
any window of about 0.6 s or more keep the class.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

SHAPES: dict[str, tuple[int, float]] = {  # (corners, depth): a polygon if the depth is 0, else petals; 0 = disc
    "disc": (0, 0.0),
    "triangle": (3, 0.0),
    "square": (4, 0.0),
    "clover": (3, 0.22),
    "flower": (5, 0.18),
}
TEXTURES = ("stripes", "checks", "dots", "waves", "clouds")
PITCHES_HZ = (220.0, 620.0, 1500.0, 3400.0)  # middle of the band of each coordinate's voice
PITCH_SWING = 0.35  # octaves up and down
TEXELS = 64  # side of an object's texture

RGB = tuple[int, int, int]
Four = tuple[float, float, float, float]  # one number for each of x, y, size, angle


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """A texture of two colours that repeats. family: one of `TEXTURES`. waves: periods along x and y. seed: noise."""

    family: str
    waves: tuple[int, int]
    seed: int
    colours: tuple[RGB, RGB]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """A train of events. rate_hz: events per second on average; phase: in pairs of events, at time 0.

    loud_first: the level falls from 1 to 0 after each event (a beat), else it rises to 1 before it (a swell). split:
    length of the first of each two intervals, as a share of both.
    """

    rate_hz: float
    phase: float
    loud_first: bool = True
    split: float = 0.5

    def level(self, time_s: np.ndarray | float) -> np.ndarray:
        """Between 0 and 1, a straight line from event to event."""
        pair = (self.phase + np.asarray(time_s) * (self.rate_hz / 2)) % 1.0
        part = np.where(pair < self.split, pair / self.split, (pair - self.split) / (1 - self.split))
        return 1.0 - part if self.loud_first else part

    def events_s(self, duration_s: float) -> np.ndarray:
        """Times of the events in [0, duration_s), in seconds."""
        pairs = np.arange(np.ceil(self.phase + duration_s * self.rate_hz / 2) + 1)
        times_s = (np.stack([pairs, pairs + self.split], 1).reshape(-1) - self.phase) / (self.rate_hz / 2)
        return times_s[(times_s >= 0) & (times_s < duration_s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """One object. Lengths are in short sides of the picture, angles in radians.

    Coordinate k of (x, y, log2 of size, angle) is centre[k] + swing[k] * cos(phase[k] + 2 pi turns_hz[k] t).
    velocity: of x and y on top, per second. radius: at size 1. flash: how far the rhythm lightens it, 0 to 1.
    """

    shape: str
    surface: Surface
    radius: float
    centre: Four
    swing: Four = (0.0, 0.0, 0.0, 0.0)
    phase: Four = (0.0, 0.0, 0.0, 0.0)
    turns_hz: Four = (0.0, 0.0, 0.0, 0.0)
    velocity: tuple[float, float] = (0.0, 0.0)
    flash: float = 0.0

    def wave(self, k: int, time_s: np.ndarray | float) -> np.ndarray:
        """Coordinate k's cosine, in [-1, 1]."""
        return np.cos(self.phase[k] + 2 * np.pi * self.turns_hz[k] * np.asarray(time_s))

    def pose(self, time_s: float) -> tuple[float, float, float, float]:
        """(x, y, radius, angle) at a time."""
        x, y, log2_size, angle = (self.centre[k] + self.swing[k] * float(self.wave(k, time_s)) for k in range(4))
        return x + self.velocity[0] * time_s, y + self.velocity[1] * time_s, self.radius * 2.0**log2_size, angle


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A synthetic video: everything that picture, masks and sound are computed from.

    height, width: pixels. bodies: the objects, later ones in front; the first one makes the sound. background: scrolls
    by pan (x, y; short sides per second) and sways by sway (amplitude in short sides, Hz, phase). pitches_hz: middle
    of the four voices; voices: their loudness; hiss: level of the noise; seed: of the noise.
    """

    height: int
    width: int
    fps: Fraction
    num_frames: int
    background: Surface
    bodies: tuple[Body, ...]
    pan: tuple[float, float] = (0.0, 0.0)
    sway: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rhythm: Rhythm = Rhythm(rate_hz=1.0, phase=0.0)
    pitches_hz: Four = PITCHES_HZ
    voices: Four = (0.5, 0.5, 0.5, 0.5)
    hiss: float = 0.01
    seed: int = 0

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return float(self.num_frames / self.fps)

    def frame(self, t: int) -> np.ndarray:
        """Frame number t as (H, W, 3) uint8 RGB."""
        return self._draw(t)[0]

    def label_map(self, t: int) -> np.ndarray:
        """(H, W) uint8: 0 for the background, i + 1 where object i is visible."""
        return self._draw(t)[1]

    def annotated(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame and label map of one instant."""
        return self._draw(t)

    def box(self, t: int, body: int = 0) -> tuple[int, int, int, int] | None:
        """(x, y, width, height) of the visible part of an object in pixels from 0; None when nothing is visible."""
        return box_of(self.label_map(t) == body + 1)

    def sound(self, audio_hz: int) -> np.ndarray:
        """The whole sound track: mono float32 in [-1, 1], sample 0 at the time of frame 0."""
        time_s = np.arange(round(self.duration_s * audio_hz)) / audio_hz
        body = self.bodies[0]
        wave = np.zeros(len(time_s))
        for k, (pitch_hz, loudness) in enumerate(zip(self.pitches_hz, self.voices, strict=True)):
            if pitch_hz * 2**PITCH_SWING < audio_hz / 2:
                cycles = np.cumsum(pitch_hz * np.exp2(PITCH_SWING * body.wave(k, time_s))) / audio_hz
                wave += loudness * np.sin(2 * np.pi * (cycles % 1.0))
        wave *= 0.15 + 0.85 * self.rhythm.level(time_s)
        noise = generator(self.seed, "hiss").standard_normal(len(time_s), np.float32)
        events_s = np.append(-np.inf, self.rhythm.events_s(self.duration_s))
        since_s = time_s - events_s[np.searchsorted(events_s, time_s, "right") - 1]
        wave += noise * (self.hiss + 0.25 * np.exp(-since_s / 0.012))  # every event clicks
        return np.clip(0.3 * wave, -1.0, 1.0).astype(np.float32)

    def _draw(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= t < self.num_frames:
            raise ValueError(f"frame {t} of a scene of {self.num_frames} frames")
        time_s = float(t / self.fps)
        side = min(self.height, self.width)
        swing = self.sway[0] * np.cos(2 * np.pi * self.sway[1] * time_s + self.sway[2])
        image = _scrolled(
            _tiles(self.background, self.height, self.width),
            (self.pan[1] * time_s + swing) * side,
            (self.pan[0] * time_s + swing) * side,
            self.height,
            self.width,
        )
        labels = np.zeros((self.height, self.width), np.uint8)
        level = float(self.rhythm.level(time_s))
        for number, body in enumerate(self.bodies):
            _paint(image, labels, number + 1, body, body.pose(time_s), side, body.flash * level)
        return image, labels


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(x, y, width, height) of the tight box around a boolean mask, in pixels from 0; None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that belong to a key."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


# --- painting -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _texture(surface: Surface, side: int) -> np.ndarray:
    """One period of a texture, (side, side, 3) float32 in 0..255."""
    u, v = np.meshgrid(np.arange(side) / side, np.arange(side) / side)
    a, b = surface.waves
    if surface.family == "stripes":
        value = np.sin(2 * np.pi * (a * u + b * v))
    elif surface.family == "checks":
        value = 2 * np.sin(2 * np.pi * a * u) * np.sin(2 * np.pi * b * v)
    elif surface.family == "dots":
        value = 2 * np.cos(2 * np.pi * a * u) * np.cos(2 * np.pi * a * v) - 0.7
    elif surface.family == "waves":
        value = np.sin(2 * np.pi * (a * u + 0.35 * np.sin(2 * np.pi * b * v)))
    else:
        value = _clouds(surface.seed, side, a + b)
    mix = np.clip(0.5 + 0.8 * value, 0, 1)[..., None]
    dark, light = (np.array(colour, np.float64) for colour in surface.colours)
    return (dark + (light - dark) * mix).astype(np.float32)


def _clouds(seed: int, side: int, waves: int) -> np.ndarray:
    """Periodic noise of about ``waves`` blobs per side, standard deviation 0.6."""
    noise = np.fft.rfft2(generator(seed, "clouds").standard_normal((side, side)))
    distance = np.hypot(np.fft.fftfreq(side, 1 / side)[:, None], np.fft.rfftfreq(side, 1 / side)[None])
    smooth = np.fft.irfft2(noise * np.exp(-0.5 * (distance / waves) ** 2) * (distance > 0), s=(side, side))
    return 0.6 * smooth / smooth.std()


@lru_cache(maxsize=4)
def _tiles(surface: Surface, height: int, width: int) -> np.ndarray:
    """A background texture, repeated so that a window of the picture's size can start anywhere in the first period."""
    side = -(-max(height, width) // 32) * 32
    tile = np.rint(_texture(surface, side)).astype(np.uint16)
    return np.pad(tile, ((0, height + 1), (0, width + 1), (0, 0)), mode="wrap")


def _scrolled(tiles: np.ndarray, down: float, right: float, height: int, width: int) -> np.ndarray:
    """A window of a repeating picture at a fractional offset, bilinear in 8-bit fixed point."""
    period = tiles.shape[0] - height - 1
    y, x = round(down * 256) % (period * 256), round(right * 256) % (period * 256)
    (top, fy), (left, fx) = divmod(y, 256), divmod(x, 256)
    window = tiles[top : top + height + 1, left : left + width + 1]
    rows = (window[:-1] * np.uint16(256 - fy) + window[1:] * np.uint16(fy)) >> 8
    return ((rows[:, :-1] * np.uint16(256 - fx) + rows[:, 1:] * np.uint16(fx)) >> 8).astype(np.uint8)


def _outline(shape: str, theta: np.ndarray) -> np.ndarray:
    """Distance from the centre to the edge of a shape of radius 1, by direction."""
    corners, depth = SHAPES[shape]
    if not corners:
        return np.ones_like(theta)
    if depth:
        return (1 + depth * np.cos(corners * theta)).astype(np.float32)
    half = np.pi / corners
    return (np.cos(half) / np.cos(theta % (2 * half) - half) * 1.15).astype(np.float32)


def _paint(image: np.ndarray, labels: np.ndarray, label: int, body: Body, pose: Four, side: int, flash: float) -> None:
    """Blend one object into (H, W, 3) and mark where it covers at least half of a pixel."""
    height, width = labels.shape
    x, y, radius, angle = (pose[0] * side, pose[1] * side, pose[2] * side, pose[3])
    reach = 1.25 * radius + 1
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 2, height)
    left, right = max(int(x - reach), 0), min(int(x + reach) + 2, width)
    if top >= bottom or left >= right:
        return
    dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y)[:, None] / radius
    dx = (np.arange(left, right, dtype=np.float32) + 0.5 - x)[None] / radius
    u = dx * np.cos(angle) + dy * np.sin(angle)
    v = dy * np.cos(angle) - dx * np.sin(angle)
    edge = _outline(body.shape, np.arctan2(v, u))
    cover = np.clip((edge - np.hypot(u, v)) * np.float32(radius) + np.float32(0.5), 0, 1).astype(np.float32)
    texture = _texture(body.surface, TEXELS)
    rows = (v * (TEXELS / 2)).astype(np.int32) & (TEXELS - 1)  # the texture spans the object once
    columns = (u * (TEXELS / 2)).astype(np.int32) & (TEXELS - 1)
    colour = texture[rows, columns]
    colour += (np.float32(250) - colour) * np.float32(flash)
    patch = image[top:bottom, left:right]
    patch[...] = np.rint(patch + (colour - patch) * cover[..., None]).astype(np.uint8)
    labels[top:bottom, left:right][cover >= 0.5] = label
