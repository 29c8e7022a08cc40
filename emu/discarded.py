"""A plugin's code, compiled so that a generator that is made and dropped raises where it was dropped.

`channel.send_all(…)` as a statement of its own makes a generator that nobody runs: nothing is sent, and Python says
nothing. So each call in a plugin whose value is dropped is handed to `_not_run`, which raises for such a generator
and costs 50 ns otherwise. Calls whose value is used, and code that is no plugin's, are as they were written; lines
and columns stay what they are, for tracebacks and debuggers.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Generator
from types import CodeType, GeneratorType
from typing import Any, Final

NAME: Final = "__vmbus_emu_not_run__"
"""What a plugin's module has `_not_run` under."""
CONTAINERS: Final = frozenset({"append", "extend", "add", "pop", "popleft", "setdefault", "update", "clear", "discard"})
"""Methods whose value is dropped rightly, a generator or not; and the most frequent ones."""


def compiled(source: bytes, path: str) -> CodeType:
    """Compile a plugin; its module needs `namespace`. SyntaxError as of `compile`."""
    tree = ast.parse(source, path)
    return compile(ast.fix_missing_locations(_Dropped().visit(tree)), path, "exec")


def namespace() -> dict[str, Any]:
    """The names that a compiled plugin needs."""
    return {NAME: _not_run}


class _Dropped(ast.NodeTransformer):
    """Hands the value of each call that is a statement to `_not_run`."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:  # noqa: N802
        """A statement that is an expression."""
        self.generic_visit(node)
        call = node.value
        if isinstance(call, ast.Call) and not (isinstance(call.func, ast.Attribute) and call.func.attr in CONTAINERS):
            name = ast.copy_location(ast.Name(NAME, ast.Load()), call.func)
            node.value = ast.copy_location(ast.Call(name, [call], []), call)
        return node


def _not_run(value: object) -> None:
    """Raise for a generator that nobody has begun; TypeError, in the line that dropped it."""
    if value is None or not isinstance(value, Generator):
        return
    if isinstance(value, GeneratorType) and inspect.getgeneratorstate(value) != inspect.GEN_CREATED:
        return
    what = getattr(value, "__qualname__", type(value).__name__)
    cure = "write `yield from` before the call, or return it"
    raise TypeError(f"{what} was called and has not run: it is a generator; {cure}")
