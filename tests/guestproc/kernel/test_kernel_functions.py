"""Numbers for functions: the same in every process, and never two meanings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guestproc.kernel.functions import FunctionTable


def new_table() -> FunctionTable[Callable[[], str]]:
    """One function, number 3."""
    table: FunctionTable[Callable[[], str]] = FunctionTable("callbacks")

    @table.register(3)
    def on_packet() -> str:
        return "packet"

    return table


def test_a_number_finds_its_function_and_its_name() -> None:
    """And the name finds the number."""
    table = new_table()

    assert table.lookup(3)() == "packet"
    assert (table.name_of(3), table.number_of("on_packet")) == ("on_packet", 3)
    assert table.names() == {3: "on_packet"}


def test_null_and_unknown_numbers_have_no_function() -> None:
    """0 is NULL; calling either is our bug, naming them in a report is not."""
    table = new_table()

    assert (table.name_of(0), table.name_of(9)) == ("NULL", "?9")
    for number in (0, 9):
        with pytest.raises(AssertionError, match=f"callbacks: no function has number {number}"):
            table.lookup(number)
    with pytest.raises(AssertionError, match="no function is called off"):
        table.number_of("off")


@pytest.mark.parametrize(
    ("number", "name", "text"),
    [
        (3, "again", "number 3 is on_packet"),
        (4, "on_packet", "on_packet has number 3"),
        (0, "null", "0 is NULL"),
    ],
)
def test_a_number_or_name_is_given_once(number: int, name: str, text: str) -> None:
    """Two meanings would differ from process to process."""
    table = new_table()

    with pytest.raises(AssertionError, match=text):
        table.register(number, name)(lambda: "")
