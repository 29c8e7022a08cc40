"""`valueclass`: a dataclass whose fields are set once.

`dataclass(frozen=True)` refuses a second time while the program runs, and its `__init__` sets each field by a call for
that: 320 ns more for four fields. An opening of a channel makes some forty of these objects. Here mypy refuses it, by
`dataclass_transform`, and nobody does later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def valueclass(*, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
    """A class decorator: slots, equality and hash by fields; to mypy its instances are frozen."""
    return dataclass(slots=True, unsafe_hash=True, kw_only=kw_only)
