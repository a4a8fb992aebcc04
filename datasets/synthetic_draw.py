"""Random scenes: labelled clips, sequences for masks and boxes, and pictures, each a pure function of its numbers."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

import numpy as np

from clipmill.datasets.synthetic import (
    PITCHES_HZ,
    RGB,
    SHAPES,
    TEXTURES,
    Body,
    Four,
    Rhythm,
    Scene,
    Surface,
    generator,
)

MOTIONS: dict[str, tuple[int, int, int, int]] = {  # how fast the phases of x, y, size and angle run
    "swaying": (1, 0, 0, 0),
    "bouncing": (0, 1, 0, 0),
    "pulsing": (0, 0, 1, 0),
    "circling": (1, 1, 0, 0),
    "rocking": (0, 0, 0, 1),
    "weaving": (1, 2, 0, 0),
}
RHYTHMS: dict[str, tuple[float, bool, float]] = {  # (events per second, loud at the event, share of the first of two)
    "slow beats": (1.3, True, 0.5),
    "fast beats": (2.6, True, 0.5),
    "slow swells": (1.3, False, 0.5),
    "fast swells": (2.6, False, 0.5),
    "galloping beats": (2.2, True, 0.32),
}


def class_names(motions: int, rhythms: int) -> tuple[str, ...]:
    """Names of the classes in label order: label = motion * rhythms + rhythm.

    >>> class_names(2, 2)
    ('swaying slow beats', 'swaying fast beats', 'bouncing slow beats', 'bouncing fast beats')
    """
    for name, count, most in (("motions", motions, len(MOTIONS)), ("rhythms", rhythms, len(RHYTHMS))):
        if not 1 <= count <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {count}")
    return tuple(f"{motion} {rhythm}" for motion in list(MOTIONS)[:motions] for rhythm in list(RHYTHMS)[:rhythms])


def draw_surface(seed: int, look: int, role: Literal["object", "background"], family: str | None = None) -> Surface:
    """One of the textures of a corpus; objects are saturated and dark, so that a flash shows, backgrounds are pale."""
    rng = generator(seed, role, look)
    hue, shift = rng.random(), rng.uniform(0.2, 0.8)
    if role == "object":
        tones = ((hue, 0.9, 0.25), (hue + shift, 0.7, 0.6))
        waves = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
    else:
        tones = ((hue, 0.35, 0.4), (hue + shift, 0.25, 0.62))
        waves = (int(rng.integers(2, 6)), int(rng.integers(2, 6)))
    drawn = _pick(rng, TEXTURES)
    first, second = (_rgb(*tone) for tone in tones)
    return Surface(
        family=family or drawn,
        waves=waves,
        seed=int(rng.integers(2**31)),
        colours=(first, second),
    )


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))
    return red, green, blue


def draw_clip(
    seed: int,
    number: int,
    motion: int,
    rhythm: int,
    *,
    size: int = 112,
    seconds: float = 2.5,
    looks: int = 8,
    group: int | None = None,
) -> Scene:
    """The scene of clip ``number`` of a labelled corpus.

    motion, rhythm: positions in `MOTIONS` and `RHYTHMS`; no other number of the scene depends on them. size: short
    side in pixels, at most; the real size, shape, frame rate and length (0.85 to 1.15 times ``seconds``) vary. looks:
    how many different textures the corpus has for objects and as many for backgrounds: with few of them looks do not
    tell clips apart. group: clips of one group share their looks and shape.
    """
    rng = generator(seed, "clip", number)
    look = rng if group is None else generator(seed, "group", group)
    surface = draw_surface(seed, int(look.integers(looks)), "object")
    background = draw_surface(seed, int(look.integers(looks)), "background")
    shape = _pick(look, SHAPES)

    height, width = _picture_size(rng, size)
    fps = (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30))[int(rng.integers(4))]
    num_frames = max(round(seconds * rng.uniform(0.85, 1.15) * fps), 1)
    side = min(height, width)

    base_hz = rng.uniform(1.05, 1.45)
    phase = rng.uniform(0, 2 * np.pi, 4)
    turn = rng.choice([-1, 1], 4)
    centre_x = width / side / 2 + rng.uniform(-0.12, 0.12)
    centre_y = height / side / 2 + rng.uniform(-0.12, 0.12)
    angle = rng.uniform(0, 2 * np.pi)
    radius = rng.uniform(0.17, 0.23)
    runs = list(MOTIONS.values())[motion]
    if runs[:2] == (1, 1):  # a circle, clockwise or not
        phase[1], turn[1] = phase[0] + turn[1] * np.pi / 2, turn[0]
    body = Body(
        shape=shape,
        surface=surface,
        radius=radius,
        centre=(centre_x, centre_y, 0.0, angle),
        swing=(0.2, 0.2, 0.5, 1.0),
        phase=_four(phase),
        turns_hz=_four(base_hz * turn * np.array(runs)),
        flash=0.8,
    )
    rate_hz, loud_first, split = list(RHYTHMS.values())[rhythm]
    beat = Rhythm(
        rate_hz=rate_hz * rng.uniform(0.9, 1.1), phase=float(rng.random()), loud_first=loud_first, split=split
    )
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.35)
    return Scene(
        height=height,
        width=width,
        fps=fps,
        num_frames=num_frames,
        background=background,
        pan=(float(speed * np.cos(heading)), float(speed * np.sin(heading))),
        sway=(rng.uniform(0, 0.06), rng.uniform(0.3, 1.5), rng.uniform(0, 2 * np.pi)),
        bodies=(body,),
        rhythm=beat,
        pitches_hz=_four(np.array(PITCHES_HZ) * 2.0 ** rng.uniform(-0.15, 0.15, 4)),
        voices=_four(rng.uniform(0.4, 1.0, 4)),
        hiss=float(rng.uniform(0.005, 0.03)),
        seed=int(rng.integers(2**31)),
    )


def draw_sequence(seed: int, number: int, *, size: int = 192, num_frames: int = 40, objects: int = 3) -> Scene:
    """A scene of 1 to ``objects`` objects that wander, turn, grow and cover each other, for masks and boxes.

    size: short side in pixels. At least 1 % of frame 0 shows each object. The last object is in front of all and
    stays in the picture, so it can be tracked throughout.
    """
    rng = generator(seed, "sequence", number)
    for _ in range(1000):
        scene = _wanderers(rng, seed, size, num_frames, 1 + number % objects)
        shares = np.bincount(scene.label_map(0).ravel(), minlength=len(scene.bodies) + 1) / scene.width / scene.height
        if (shares > 0.01).all():
            return scene
    raise ValueError(f"no place for {objects} objects in one picture; ask for fewer")


def _wanderers(rng: np.random.Generator, seed: int, size: int, num_frames: int, objects: int) -> Scene:
    height, width = size, 2 * round(size * 854 / 480 / 2)
    bodies = [
        Body(
            shape=_pick(rng, SHAPES),
            surface=draw_surface(seed, int(rng.integers(2**31)), "object"),
            radius=rng.uniform(0.13, 0.2),
            centre=(width / size / 2 + rng.uniform(-0.4, 0.4), rng.uniform(0.35, 0.65), 0.0, rng.uniform(0, 6)),
            swing=(rng.uniform(0.1, 0.3), rng.uniform(0.05, 0.2), 0.25, 0.6),
            phase=_four(rng.uniform(0, 2 * np.pi, 4)),
            turns_hz=_four(rng.uniform(0.15, 0.5, 4)),
        )
        for _ in range(objects)
    ]
    return Scene(
        height=height,
        width=width,
        fps=Fraction(24),
        num_frames=num_frames,
        background=draw_surface(seed, int(rng.integers(2**31)), "background"),
        bodies=tuple(bodies),
        pan=(rng.uniform(-0.15, 0.15), rng.uniform(-0.05, 0.05)),
        sway=(0.02, 0.5, rng.uniform(0, 2 * np.pi)),
    )


def draw_image(seed: int, number: int, texture: int, *, size: int = 112, looks: int = 8) -> Scene:
    """A still picture (one frame). Its class is the texture of the object; the background is clouds.

    looks: how many different backgrounds the corpus has; with few of them they do not tell pictures apart.
    """
    rng = generator(seed, "image", number)
    height, width = _picture_size(rng, size)
    x, y = (length / min(height, width) / 2 + rng.uniform(-0.15, 0.15) for length in (width, height))
    body = Body(
        shape=_pick(rng, SHAPES),
        surface=draw_surface(seed, int(rng.integers(2**31)), "object", TEXTURES[texture]),
        radius=rng.uniform(0.25, 0.4),
        centre=(x, y, 0.0, rng.uniform(0, 2 * np.pi)),
    )
    background = draw_surface(seed, int(rng.integers(looks)), "background", "clouds")
    return Scene(height=height, width=width, fps=Fraction(25), num_frames=1, background=background, bodies=(body,))


def _picture_size(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """(height, width), even, short side 0.8 to 1 times ``size``: landscape of several shapes, square or portrait."""
    aspect = ((3, 4), (9, 16), (9, 11), (1, 1), (4, 3))[int(rng.integers(5))]
    short = size * (0.8, 0.9, 1.0)[int(rng.integers(3))] / min(aspect)
    height, width = (max(2 * round(short * part / 2), 16) for part in aspect)
    return height, width


def _pick(rng: np.random.Generator, names: Iterable[str]) -> str:
    names = tuple(names)
    return names[int(rng.integers(len(names)))]


def _four(values: np.ndarray) -> Four:
    a, b, c, d = (float(value) for value in values)
    return a, b, c, d
