"""How commands name a packed data set: by its folder or by a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec


def named(text: str) -> Path | str:
    """A folder as a path, a URL as it is (a path would join its slashes).

    >>> named("s3://bucket/set")
    's3://bucket/set'
    """
    from clipmill.pipeline.record import is_url  # late: help must not wait for it

    return text if is_url(text) else Path(text)


DataSet = Annotated[
    Path | str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="FOLDER|URL",
        instance_from_str=lambda words: named(words[0]),
        is_instance=lambda value: isinstance(value, Path | str),
        str_from_instance=lambda value: [str(value)],
    ),
]


def full_name(data: Path | str) -> str:
    """How a run records where its data is."""
    return str(data.resolve()) if isinstance(data, Path) else data
