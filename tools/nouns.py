"""A noun agrees with its number: 1 violation, 2 violations."""

from __future__ import annotations


def noun(count: float, one: str, many: str = "") -> str:
    """The noun for so many, without the number; `many` where it is not `one` with an s, or has its verb with it."""
    return one if count == 1 else many or f"{one}s"


def counted(count: int, one: str, many: str = "") -> str:
    """The same behind its number: `1 record was`, `12,000 records were`."""
    return f"{count:,} {noun(count, one, many)}"
