"""Protobuf's wire format, against the examples of its own documentation."""

from __future__ import annotations

import pytest

from tools.export.protobuf import data, fixed64, number, text, varint


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "00"), (127, "7f"), (128, "8001"), (150, "9601"), (300, "ac02"), (-2, "feffffffffffffffff01")],
)
def test_varint(value: int, written: str) -> None:
    """Seven bits a byte, lowest first; below zero ten bytes."""
    assert varint(value).hex() == written


def test_fields() -> None:
    """A field's number and wire type, then the value."""
    assert number(1, 150).hex() == "089601"
    assert text(2, "testing").hex() == "120774657374696e67"
    assert data(3, number(1, 150)).hex() == "1a03089601"
    assert fixed64(47, 1).hex() == "f9020100000000000000"
