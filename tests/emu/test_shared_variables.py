"""Functions of two scopes over the same variables."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.shared_variables import sharing, variables


def counter() -> tuple[Callable[[], int], Callable[[], int]]:
    """What counts, and what tells how far."""
    count = 0

    def add() -> int:
        nonlocal count
        count += 1
        return count

    def told() -> int:
        return count

    return add, told


def stepper(step: int) -> Callable[..., int]:
    """What counts in larger steps, in a variable of its own."""
    total = 0

    def steps(times: int = 1, *, more: int = 0) -> int:
        nonlocal total
        total += times * step + more
        return total

    return steps


def test_both_change_one_variable() -> None:
    """Whichever function adds, the other goes on from there; what is not shared stays each one's own."""
    add, told = counter()
    steps = sharing(stepper(10), {"total": variables(add)["count"]})

    assert [add(), steps(), add(), steps(2, more=3), told()] == [1, 11, 12, 35, 35]


def test_function_that_was_given_stays_as_it_was() -> None:
    """The one with other variables is another."""
    add, _told = counter()
    steps = stepper(10)
    sharing(steps, {"total": variables(add)["count"]})()

    assert (steps(), add()) == (10, 11)


def test_variable_that_a_function_does_not_have_is_refused() -> None:
    """A name that changed on one side is found when they are made."""
    add, _told = counter()

    with pytest.raises(KeyError, match="count"):
        sharing(stepper(10), {"count": variables(add)["count"]})
