"""The three official splits of a UCF101 layout are known to its packed data set."""

from typing import Any

from clipmill.datasets import ucf101
from clipmill.pipeline.pack.run import pack
from clipmill.pipeline.pack.settings import PackSettings
from clipmill.tools.evaluate.splits import Splits, split


def test_a_packed_ucf101_knows_its_splits(kit: Any) -> None:
    names = [f"Archery/v_Archery_g{group:02d}_c01.avi" for group in range(1, 4)]
    for number, name in enumerate(names):
        (kit.folder / "raw/UCF-101" / name).parent.mkdir(parents=True, exist_ok=True)
        kit.film(f"raw/UCF-101/{name}", frames=10 + number)
    lists = kit.folder / "raw/ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\r\n")
    for number in (1, 2, 3):
        train = [name for place, name in enumerate(names, 1) if place != number]
        (lists / f"trainlist0{number}.txt").write_text("".join(f"{name} 1\r\n" for name in train))
        (lists / f"testlist0{number}.txt").write_text(f"{names[number - 1]}\r\n")
    pack(ucf101.read(kit.folder / "raw"), kit.folder / "packed", PackSettings(), workers=1)
    for number in (1, 2, 3):
        _, test = split(kit.folder / "packed", Splits(official=(number,)))
        assert [record.key for record in test] == [names[number - 1].removesuffix(".avi")]
