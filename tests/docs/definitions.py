"""What a source file defines, by qualified name, found without importing it.

`NAME`, `function`, `Class`, `Class.method`, `Class.field`: module-level names, what a class body names, and
the attributes that its methods give to `self`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

Scope = ast.Module | ast.ClassDef


@lru_cache(maxsize=256)
def definitions(path: Path) -> frozenset[str]:
    """Every qualified name that this Python file defines."""
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8")), ""))


def _names(scope: Scope, prefix: str) -> Iterator[str]:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
            if prefix:
                yield from (prefix + name for name in _given_to_self(node))
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from _names(node, f"{prefix}{node.name}.")
        else:
            yield from (prefix + name for name in _assigned(node))


def _assigned(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Name):
                yield part.id


def _given_to_self(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                    yield part.attr
