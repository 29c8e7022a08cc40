"""Numbered functions: how guest RAM names code.

A callback is set, run and reset in different processes, so a record cannot hold the function itself.
A table gives each function a number that all processes agree on, because all import the same modules; 0 is
NULL. Numbers are written down (an IntEnum beside the functions), never handed out in the order of imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

NULL: Final = 0


class _Functions(dict[int, F]):
    """By number."""

    def __init__(self, name: str) -> None:
        self._name: Final = name

    def __missing__(self, number: int) -> F:
        raise AssertionError(f"{self._name}: no function has number {number}")


class FunctionTable(Generic[F]):
    """Functions of one kind (`F` is their signature), by number."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.known: Final[dict[int, F]] = {}
        """The same by number, for a look that is cheaper in compiled code: `known.get(number) or lookup(number)`."""
        self._functions: Final = _Functions[F](name)
        self._names: Final[dict[int, str]] = {}
        self._numbers: Final[dict[str, int]] = {}
        self.lookup: Final[Callable[[int], F]] = self._functions.__getitem__
        """The function that a number means, without a call of ours; an AssertionError if it means none."""

    def register(self, number: int, name: str = "") -> Callable[[F], F]:
        """Decorator: `number` means this function; a number or a name that is taken is our bug."""

        def add(function: F) -> F:
            label = name or function.__name__
            assert number > NULL, f"{self.name}: number {number} for {label}, 0 is NULL"
            known = self._names.get(number)
            assert known is None, f"{self.name}: number {number} is {known}, not also {label}"
            assert label not in self._numbers, f"{self.name}: {label} has number {self._numbers[label]} already"
            self._functions[number] = self.known[number] = function
            self._names[number] = label
            self._numbers[label] = number
            return function

        return add

    def number_of(self, name: str) -> int:
        """Number of the function called `name`."""
        assert name in self._numbers, f"{self.name}: no function is called {name}"
        return self._numbers[name]

    def name_of(self, number: int) -> str:
        """Its name, for traces and reports: "NULL" for 0, "?7" for a number that means nothing."""
        return self._names.get(number, f"?{number}") if number else "NULL"

    def names(self) -> dict[int, str]:
        """All of them, for comparing two processes."""
        return dict(sorted(self._names.items()))


CHANNEL_CALLBACKS: Final[FunctionTable[Callable[..., object]]] = FunctionTable("channel callbacks")
"""`onchannel_callback` and `sc_creation_callback` of channels; the arguments are their callers' affair."""
WORK_FUNCTIONS: Final[FunctionTable[Callable[..., None]]] = FunctionTable("work functions")
TASKLET_FUNCTIONS: Final[FunctionTable[Callable[..., None]]] = FunctionTable("tasklet functions")
IPI_FUNCTIONS: Final[FunctionTable[Callable[..., None]]] = FunctionTable("IPI functions")
DRIVERS: Final[FunctionTable[Callable[..., Any]]] = FunctionTable("drivers")
"""A driver's number → what makes its object in this process."""
