"""`valueclass`: what a frozen dataclass is, but for the refusal while the program runs."""

from __future__ import annotations

import pytest

from emu.values import valueclass


@valueclass()
class Place:
    """Two numbers."""

    row: int
    column: int = 0


def test_equality_and_hash_are_by_fields() -> None:
    """Two of the same fields are one key."""
    assert Place(1) == Place(1, 0) != Place(1, 2)
    assert len({Place(1), Place(1, 0), Place(1, 2)}) == 2


def test_no_other_attribute_can_be_set() -> None:
    """A name that is no field is refused, as with slots."""
    with pytest.raises(AttributeError):
        setattr(Place(1), "depth", 3)  # noqa: B010 (mypy refuses it otherwise)


def test_keywords_only_if_asked_for() -> None:
    """As of a dataclass."""

    @valueclass(kw_only=True)
    class Named:
        size: int

    assert Named(size=3).size == 3
