"""Functions of two scopes over the same variables.

Where a call or an attribute more is too slow, functions share the variables of the scope that they are defined in
(`emu.tracing`, `emu.ring_producer`). Where such a function has to work on variables of another scope as well, it is
defined with variables of the same kind in its own, and `sharing` puts the others in their place. Nothing is looked up
then: a variable is a cell, and both functions hold the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def variables(function: Callable[..., Any]) -> dict[str, CellType]:
    """The variables of the scopes around it that a function uses, by name."""
    assert isinstance(function, FunctionType), function
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def sharing(function: F, shared: Mapping[str, CellType]) -> F:
    """The same function with these cells in place of its own variables; KeyError for one that it does not use."""
    cells = variables(function)
    if unused := shared.keys() - cells.keys():
        raise KeyError(*sorted(unused))
    assert isinstance(function, FunctionType)
    cells.update(shared)
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells.values())
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return cast(F, made)
