"""The 100 sequences of OTB: which sets they belong to, which of their images count, and what is hard about them.

Sets and attributes are those of the benchmark (Wu, Lim, Yang, "Online Object Tracking: A Benchmark", CVPR 2013, and
"Object Tracking Benchmark", TPAMI 2015; github.com/jwlim/tracker_benchmark, ``data/tb_100.txt``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ATTRIBUTES = {
    "IV": "illumination variation",
    "SV": "scale variation",
    "OCC": "occlusion",
    "DEF": "deformation",
    "MB": "motion blur",
    "FM": "fast motion",
    "IPR": "in-plane rotation",
    "OPR": "out-of-plane rotation",
    "OV": "out of view",
    "BC": "background clutter",
    "LR": "low resolution",
}

FRAMES = {  # sequences whose folder holds images that are not part of them: first and last image number
    "David": (300, 770),
    "Diving": (1, 215),
    "Football1": (1, 74),
    "Freeman3": (1, 460),
    "Freeman4": (1, 283),
    "Tiger1": (6, 354),  # box files have 349 or 354 rows; the first five images show no target
}

SHARED = {"Jogging-1": "Jogging", "Jogging-2": "Jogging", "Skating2-1": "Skating2", "Skating2-2": "Skating2"}
ONLY_SECOND = {"Human4-2": "Human4"}  # the first target's box file is empty

# Name, in OTB-2013 (13), in OTB-50 (50), attributes. All are in OTB-100.
_TABLE = """
Basketball   13 50  IV OCC DEF OPR BC
Biker        -- 50  SV OCC MB FM OPR OV LR
Bird1        -- 50  DEF FM OV
Bird2        -- --  OCC DEF FM IPR OPR
BlurBody     -- 50  SV DEF MB FM IPR
BlurCar1     -- --  MB FM
BlurCar2     -- 50  SV MB FM
BlurCar3     -- --  MB FM
BlurCar4     -- --  MB FM
BlurFace     -- 50  MB FM IPR
BlurOwl      -- 50  SV MB FM IPR
Board        -- --  SV MB FM OPR OV BC
Bolt         13 50  OCC DEF IPR OPR
Bolt2        -- --  DEF BC
Box          -- 50  IV SV OCC MB IPR OPR OV BC LR
Boy          13 --  SV MB FM IPR OPR
Car1         -- 50  IV SV MB FM BC LR
Car2         -- --  IV SV MB FM BC
Car24        -- --  IV SV BC
Car4         13 50  IV SV
CarDark      13 50  IV BC
CarScale     13 50  SV OCC FM IPR OPR
ClifBar      -- 50  SV OCC MB FM IPR OV BC
Coke         13 --  IV OCC FM IPR OPR BC
Couple       13 50  SV DEF FM OPR BC
Coupon       -- --  OCC BC
Crossing     13 --  SV DEF FM OPR BC
Crowds       -- 50  IV DEF BC
Dancer       -- --  SV DEF IPR OPR
Dancer2      -- --  DEF
David        13 50  IV SV OCC DEF MB IPR OPR
David2       13 --  IPR OPR
David3       13 --  OCC DEF OPR BC
Deer         13 50  MB FM IPR BC LR
Diving       -- 50  SV DEF IPR
Dog          -- --  SV DEF OPR
Dog1         13 --  SV IPR OPR
Doll         13 --  IV SV OCC IPR OPR
DragonBaby   -- 50  SV OCC MB FM IPR OPR OV
Dudek        13 50  SV OCC DEF FM IPR OPR OV BC
FaceOcc1     13 --  OCC
FaceOcc2     13 --  IV OCC IPR OPR
Fish         13 --  IV
FleetFace    13 --  SV DEF MB FM IPR OPR
Football     13 50  OCC IPR OPR BC
Football1    13 --  IPR OPR BC
Freeman1     13 --  SV IPR OPR
Freeman3     13 --  SV IPR OPR
Freeman4     13 50  SV OCC IPR OPR
Girl         13 50  SV OCC IPR OPR
Girl2        -- --  SV OCC DEF MB OPR
Gym          -- --  SV DEF IPR OPR
Human2       -- --  IV SV MB OPR
Human3       -- 50  SV OCC DEF OPR BC
Human4-2     -- 50  IV SV OCC DEF
Human5       -- --  SV OCC DEF
Human6       -- 50  SV OCC DEF FM OPR OV
Human7       -- --  IV SV OCC DEF MB FM
Human8       -- --  IV SV DEF
Human9       -- 50  IV SV DEF MB FM
Ironman      13 50  IV SV OCC MB FM IPR OPR OV BC LR
Jogging-1    13 --  OCC DEF OPR
Jogging-2    13 --  OCC DEF OPR
Jump         -- 50  SV OCC DEF MB FM IPR OPR
Jumping      13 50  MB FM
KiteSurf     -- --  IV OCC IPR OPR
Lemming      13 --  IV SV OCC FM OPR OV
Liquor       13 50  IV SV OCC MB FM OPR OV BC
Man          -- --  IV
Matrix       13 50  IV SV OCC FM IPR OPR BC
Mhyang       13 --  IV DEF OPR BC
MotorRolling 13 50  IV SV MB FM IPR BC LR
MountainBike 13 --  IPR OPR BC
Panda        -- 50  SV OCC DEF IPR OPR OV LR
RedTeam      -- 50  SV OCC IPR OPR LR
Rubik        -- --  SV OCC IPR OPR
Shaking      13 50  IV SV IPR OPR BC
Singer1      13 --  IV SV OCC OPR
Singer2      13 50  IV DEF IPR OPR BC
Skater       -- --  SV DEF IPR OPR
Skater2      -- --  SV DEF FM IPR OPR
Skating1     13 50  IV SV OCC DEF OPR BC
Skating2-1   -- 50  SV OCC DEF FM OPR
Skating2-2   -- 50  SV OCC DEF FM OPR
Skiing       13 50  IV SV DEF IPR OPR
Soccer       13 50  IV SV OCC MB FM IPR OPR BC
Subway       13 --  OCC DEF BC
Surfer       -- 50  SV FM IPR OPR LR
Suv          13 --  OCC IPR OV
Sylvester    13 50  IV IPR OPR
Tiger1       13 --  IV OCC DEF MB FM IPR OPR
Tiger2       13 50  IV OCC DEF MB FM IPR OPR OV
Toy          -- --  SV FM IPR OPR
Trans        -- --  IV SV OCC DEF
Trellis      13 50  IV SV IPR OPR BC
Twinnings    -- --  SV OPR
Vase         -- --  SV FM IPR
Walking      13 50  SV OCC DEF
Walking2     13 50  SV OCC LR
Woman        13 50  IV SV OCC DEF MB FM OPR
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the table."""

    name: str
    in_2013: bool
    in_50: bool
    attributes: tuple[str, ...]


def _entry(row: str) -> Entry:
    name, in_2013, in_50, *attributes = row.split()
    return Entry(name=name, in_2013=in_2013 == "13", in_50=in_50 == "50", attributes=tuple(attributes))


ENTRIES = {entry.name: entry for entry in map(_entry, _TABLE.strip().splitlines())}


def spelling(name: str) -> str:
    """A name without case and with one way to write the number of a target, for comparing.

    >>> spelling("jogging_1") == spelling("Jogging.1") == spelling("Jogging-1") == "jogging-1"
    True
    """
    return re.sub(r"[-._](\d+)$", r"-\1", name).casefold()


_BY_SPELLING = {spelling(name): name for name in ENTRIES} | {spelling(folder): n for n, folder in ONLY_SECOND.items()}


def canonical(name: str) -> str:
    """The benchmark's name of a sequence in anybody's spelling; other names come back as they are.

    >>> canonical("BasketBall"), canonical("human4.2"), canonical("Human4"), canonical("Mine_1")
    ('Basketball', 'Human4-2', 'Human4-2', 'Mine_1')
    """
    return _BY_SPELLING.get(spelling(name), name)
